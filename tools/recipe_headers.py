"""Write the first line of every shipped recipe from its estimate: the smallest usual card that does, what it needs, how long it
takes.

    python tools/recipe_headers.py
"""

from pe_dpo.estimate import estimate_run, find_card
from pe_dpo.estimate.estimate import duration
from pe_dpo.recipe import find_recipe, load_recipe, recipe_names

SIZES = (8, 12, 16, 24, 48, 80)
TIMED = "RTX 4090"


def first_line(name: str) -> str:
    """Return the line as it should be: `One 12 GB GPU; nf4, 8.6 GB at least; 7 h 24 on an RTX 4090 (estimated).`"""
    recipe = load_recipe(name)
    tried = ((size, estimate_run(recipe, find_card(f"{size}GB"))) for size in SIZES)
    size, found = next((size, found) for size, found in tried if found.fits)
    kind = "16 bits" if found.setup.quantize == "none" else found.setup.quantize
    hours = duration(found.on(find_card(TIMED)).seconds)
    return f"One {size} GB GPU; {kind}, {found.needed / 1e9:.1f} GB at least; {hours} on an {TIMED} (estimated)."


def main() -> None:
    """Write them."""
    for name in recipe_names():
        path = find_recipe(name)
        _, rest = path.read_text(encoding="utf-8").split("\n", 1)
        path.write_text(f"# {first_line(name)}\n{rest}", encoding="utf-8")
        print(f"{name:26}{first_line(name)}")


if __name__ == "__main__":
    main()

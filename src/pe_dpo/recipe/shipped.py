"""The recipes that come with the package."""

import difflib
import shutil
from pathlib import Path

from pe_dpo.disk import unlike_a_file
from pe_dpo.errors import RecipeError, UsageError

FOLDER = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(source: str | Path) -> Path:
    """Return the path of a recipe given by path or by name.

    Raises:
        RecipeError: there is neither such a file nor such a name.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{source}: is a folder; a recipe is a YAML file")
    if kind := unlike_a_file(path):
        raise RecipeError(f"{source}: is {kind}; write the recipe into a file and name that")
    shipped = FOLDER / f"{Path(source).name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and path.parent in (Path(), Path("recipes")):
        return shipped
    close = difflib.get_close_matches(str(source), recipe_names(), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else "`pe-dpo recipes list` shows those that come with the package"
    raise RecipeError(f"{source}: no such file and no such recipe; {hint}")


def recipe_header(name: str) -> str:
    """Return the comment lines at the top of a shipped recipe (hardware, memory, time), without the marks."""
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
    header = []
    for line in lines:
        if not line.startswith("#"):
            break
        header.append(line.lstrip("# ").rstrip())
    return "\n".join(header)


def copy_recipe(name: str, target: Path) -> Path:
    """Copy a shipped recipe to `target` (a file or a folder) and return where it lies.

    Raises:
        UsageError: something lies there already.
    """
    source = find_recipe(name)
    destination = target / source.name if target.is_dir() else target
    if destination.exists():
        raise UsageError(f"{destination}: exists already; name another file")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)
    except OSError as error:
        raise UsageError(f"{destination}: cannot be written: {error.strerror}; name another file") from error
    return destination

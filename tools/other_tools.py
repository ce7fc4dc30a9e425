"""What other tools call things: `python tools/other_tools.py` prints the tables of docs/coming-from-other-tools.md.

They are made of the data that `pe-dpo convert` and the answers to unknown keys are made of (`pe_dpo.recipe.elsewhere`). With
`--write` the tables of the page are written anew, below its line "## Names of losses".
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from pe_dpo.convert.draft import in_yaml
from pe_dpo.recipe.elsewhere import TOOLS, Key
from pe_dpo.recipe.elsewhere.key import TRAINER
from pe_dpo.recipe.presets import ALIASES, NOT_HERE

PAGE = Path(__file__).parents[1] / "docs" / "coming-from-other-tools.md"
BEGIN = "## Names of losses\n"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    header = [*header]
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def losses() -> str:
    """Return the table of losses by other names, and of those that are not here."""
    rows = [(f"`{name}`", f"`preset: {ours}`") for name, ours in ALIASES.items()]
    rows += [(f"`{name}`", f"not here: {words}") for name, words in NOT_HERE.items()]
    return table(("there", "here"), rows)


def keys(known: dict[str, Key]) -> str:
    """Return the table of a tool's keys: first those that are a key here, then, by their reason, those that are not."""
    rows = []
    for name, key in known.items():
        if key.here:
            default = "" if key.default is None else f"`{in_yaml(key.default)}`"
            rows.append((f"`{name}`", f"`{key.here}`", default, key.differs))
    reasons: dict[tuple[str, bool], list[str]] = {}
    for name, key in known.items():
        if not key.here:
            reasons.setdefault((key.differs.removesuffix("; drop the key"), key.breaks), []).append(f"`{name}`")
    for (words, breaks), names in sorted(reasons.items(), key=lambda item: not item[0][1]):
        rows.append((", ".join(names), "**another objective**" if breaks else "–", "", words))
    return table(("there", "here", "default there", "what is different"), rows)


def tables() -> str:
    """Return all tables, each under its heading."""
    parts = [f"{BEGIN}\n{losses()}"]
    for tool in TOOLS.values():
        own = {name: key for name, key in tool.keys.items() if TRAINER.get(name) != key}
        parts.append(f"## {tool.title}\n\nKnown by: {tool.has}.\n\n{keys(own)}")
    users = ", ".join(tool.title for tool in TOOLS.values() if TRAINER.items() & set(tool.keys.items()))
    parts.append(
        f"## transformers' TrainingArguments\n\nAs they are in {users}, but for what stands in their tables.\n\n{keys(TRAINER)}"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(BEGIN)[0] + tables(), encoding="utf-8")
    else:
        print(tables(), end="")

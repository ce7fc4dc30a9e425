"""A file of another tool as a recipe, with what means something else here and what was left out.

source.py     what the file says, and whose it is
trl.py, axolotl.py, llama_factory.py, torchtune.py, swift.py     each tool's settings, written into a draft
losses.py     its loss as a point of ours
draft.py      the lines, each with its origin; keys that nobody has read
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pe_dpo.convert import axolotl, llama_factory, swift, torchtune, trl
from pe_dpo.convert.draft import Difference, Draft, Said
from pe_dpo.convert.losses import TheirLoss
from pe_dpo.convert.source import read_source
from pe_dpo.errors import RecipeError, UsageError
from pe_dpo.recipe import Recipe, recipe_from_yaml

_CONVERTERS: dict[str, Callable[[Draft], TheirLoss | None]] = {
    "trl": trl.convert,
    "simpo": trl.convert,
    "axolotl": axolotl.convert,
    "llama-factory": llama_factory.convert,
    "torchtune": torchtune.convert,
    "ms-swift": swift.convert,
}


@dataclass(frozen=True)
class Conversion:
    """A recipe made of another tool's settings."""

    title: str
    """Of the tool."""
    text: str
    """The recipe, each line with a comment that says where it came from."""
    recipe: Recipe
    differences: list[Difference]
    """What means something else here."""
    dropped: list[Difference]
    """What was left out."""
    unknown: list[str]
    """Keys that are none of the tool's that is known."""
    loss: TheirLoss | None
    """The loss there; None where it is another method altogether."""
    is_another_objective: bool
    """Whether something was left out, or means something else, that changes what is minimized."""


def convert(path: Path, *, cards: int | None = None) -> Conversion:
    """Return the recipe that another tool's file comes to.

    Args:
        path: YAML, JSON or a script of TRL, alignment-handbook, SimPO, Axolotl, LLaMA-Factory, torchtune or ms-swift.
        cards: How many cards (processes) the file is run on there; by default as many as it starts itself, else one.

    Raises:
        UsageError: The file cannot be read, whose it is cannot be told, or it names no base or no data.
    """
    source = read_source(path)
    known = source.cards if cards is None else cards
    draft = Draft(source, known or 1, are_cards_known=known is not None)
    loss = _CONVERTERS[source.name](draft)
    output = draft.said("output_dir")
    if output.is_written:
        draft.put("output", str(output.value), output)
    draft.finish()
    _note_variables(draft)
    missing = [_missing(draft, key) for key in ("model.base", "data.train") if key not in draft.lines]
    if missing:
        raise UsageError(f"{path}: names no {' and no '.join(missing)}; write it there first, as {source.tool.title} has it")
    breaks = any(one.breaks for one in (*draft.differences, *draft.dropped))
    warning = "# NOT THE SAME OBJECTIVE: see what `pe-dpo convert` says of it.\n" if breaks else ""
    text = f"# {path.name}, {source.tool.title}.\n{warning}{draft.text()}"
    try:
        recipe = recipe_from_yaml(text, f"{path} as a recipe", default_output=f"runs/{path.stem}")
    except RecipeError as error:
        raise UsageError(f"{path}: cannot be a recipe:\n{error}\n\n{text}") from error
    return Conversion(source.tool.title, text, recipe, draft.differences, draft.dropped, draft.unknown, loss, breaks)


def _missing(draft: Draft, here: str) -> str:
    """Return in words what the settings do not name, by the key that would, or what stands under it."""
    theirs = [name for name, key in draft.source.tool.keys.items() if key.name_here == here]
    found = next((name for name in theirs if name in draft.source.values), None)
    if found is not None:
        return f"{here}: {Said(found, draft.source.values[found], True)} is none"
    return f"{here} ({theirs[0]})"


def _note_variables(draft: Draft) -> None:
    """Note values that a shell would complete, and the file alone does not."""
    for key, value in draft.source.values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search(r"\$[\w{(]|`", text) and "{%" not in text:
                draft.differs(Said(key, text, True), "has a variable whose value the file does not say; write the value")

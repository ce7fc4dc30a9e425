"""The options that several commands share, and how they become overrides of a recipe."""

import json
from typing import Annotated, get_args

import typer

from pe_dpo.links import LinkName

LINKS = get_args(LinkName)

Loss = Annotated[str | None, typer.Option("--loss", help="A named loss: dpo, gdpo, hinge, simpo, … (recipes losses).")]
Beta = Annotated[float | None, typer.Option("--beta", help="Weight of the policy.")]
Gamma = Annotated[str | None, typer.Option("--gamma", help='Weight of the reference: a number, or "0.5x" times beta.')]
Margin = Annotated[float | None, typer.Option("--margin", help="Constant subtracted from the score.")]
Link = Annotated[str | None, typer.Option("--link", help=f"{', '.join(LINKS[:-1])} or {LINKS[-1]}.")]
Mixout = Annotated[
    float | None, typer.Option("--mixout", help="Share of the input units taken from the reference in training; 0 is off.")
]
LearningRate = Annotated[str | None, typer.Option("--lr", help="Learning rate.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the pairs.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of adapter, data order and dropout.")]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder of the run.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any other key: --set section.key=value. Repeatable.")]


def scales(option: str, text: str | None) -> list[float] | None:
    """Return the fractions of "0.5,0.75"; no fraction for "none", and None where the option was not given.

    Raises:
        UsageError: they are no fractions.
    """
    from pe_dpo.errors import UsageError
    from pe_dpo.recipe.schema import check_scales

    if text is None or text.strip() == "none":
        return None if text is None else []
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text}: write fractions of the adapter with commas between them, as 0.5,0.75") from error
    try:
        check_scales(found)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}") from error
    return found


def overrides(settings: list[str] | None, **dials: str | float | int | None) -> list[str]:
    """Return "section.key=value" for every dial that was turned, after the plain settings."""
    from pe_dpo.recipe.names import SHORT_NAMES

    turned = {name: value for name, value in dials.items() if value is not None}
    if "output" in turned:  # a path is taken as it is, not read as YAML
        turned["output"] = json.dumps(turned["output"], ensure_ascii=False)
    return [*(settings or []), *(f"{SHORT_NAMES[name]}={value}" for name, value in turned.items())]

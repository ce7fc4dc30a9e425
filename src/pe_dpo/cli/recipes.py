"""`pe-dpo recipes`: the recipes and losses that come with the package."""

import json
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

recipes = typer.Typer(
    help="List, show and copy recipes; losses and the schema.", epilog="Example: pe-dpo recipes list", no_args_is_help=True
)


@recipes.command("list", short_help="List the recipes, with their hardware", epilog="Example: pe-dpo recipes list")
def list_recipes() -> None:
    """List the recipes, with their hardware."""
    from pe_dpo.recipe import recipe_header, recipe_names

    for name in recipe_names():
        _say(f"{name:24}{recipe_header(name).splitlines()[0]}", indent=24)


@recipes.command(short_help="Show a recipe or a named loss, with its formula", epilog="Example: pe-dpo recipes show dpo")
def show(name: Annotated[str, typer.Argument(help="A recipe, shipped or your own, or a named loss.")]) -> None:
    """Show a recipe, or a named loss: the effective formula, κ = γ/β, and the published name that it equals."""
    from pe_dpo.errors import UsageError
    from pe_dpo.recipe import PRESETS, describe, find_recipe, load_recipe
    from pe_dpo.recipe.loss_section import LossSection
    from pe_dpo.recipe.presets import ALIASES, NOT_HERE

    if name in NOT_HERE:
        raise UsageError(f"{name} is not here: {NOT_HERE[name]}")
    if name in PRESETS or name in ALIASES:
        loss = LossSection(preset=ALIASES.get(name, name))
    else:
        loss = load_recipe(name).loss
        typer.echo(find_recipe(name).read_text(encoding="utf-8"))
    for line in describe(loss).lines():
        _say(line, indent=8)


@recipes.command(short_help="List the named losses, with papers", epilog="Example: pe-dpo recipes losses")
def losses() -> None:
    """List the named losses with their formulas and papers, and what other tools call them."""
    from pe_dpo.recipe import PRESETS
    from pe_dpo.recipe.describe import formula
    from pe_dpo.recipe.loss_section import LossSection
    from pe_dpo.recipe.presets import ALIASES

    for name, preset in PRESETS.items():
        others = [other for other, ours in ALIASES.items() if ours == name]
        also = f" (also {', '.join(others)})" if others else ""
        _say(f"{name}{also}: {preset.title}; {preset.source}", indent=2)
        loss = LossSection(preset=name)
        per_token = "  (Δ per token)" if loss.reduce == "mean" else ""
        _say(f"    {formula(loss).partition(',  Δ = ')[0].removesuffix(', summed over tokens')}{per_token}", indent=6)


@recipes.command(short_help="Copy a recipe, to change it", epilog="Example: pe-dpo recipes copy qwen3-0.6b-dpo mine.yaml")
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    to: Annotated[Path, typer.Argument(help="A file, or a folder.")] = Path(),
) -> None:
    """Copy a recipe, to change it."""
    from pe_dpo.recipe import copy_recipe

    copied = copy_recipe(name, to)
    typer.echo(f"copied to {copied}\nput your own data and base in, then: pe-dpo check {shlex.quote(str(copied))}")


@recipes.command(
    short_help="Print the JSON schema of a recipe, for editors", epilog="Example: pe-dpo recipes schema > recipe.schema.json"
)
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from pe_dpo.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False))


def _say(line: str, *, indent: int) -> None:
    """Print a line, folded between words where the terminal is narrower, the lines below it indented."""
    columns = shutil.get_terminal_size().columns
    below = " " * indent
    typer.echo(textwrap.fill(line, columns, subsequent_indent=below, break_long_words=False, break_on_hyphens=False))

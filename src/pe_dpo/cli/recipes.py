"""`pe-dpo recipes`: the recipes and losses that come with the package."""

import json
from pathlib import Path
from typing import Annotated

import typer

recipes = typer.Typer(help="List, show and copy recipes; losses and the schema.", no_args_is_help=True)


@recipes.command("list")
def list_recipes() -> None:
    """List the recipes, with their hardware."""
    from pe_dpo.recipe import recipe_header, recipe_names

    for name in recipe_names():
        typer.echo(f"{name:32} {recipe_header(name).splitlines()[0]}")


@recipes.command()
def show(name: Annotated[str, typer.Argument(help="A recipe, shipped or your own, or a named loss.")]) -> None:
    """Show a recipe, or a named loss: the effective formula, κ = γ/β, and the published name that it equals."""
    from pe_dpo.recipe import PRESETS, describe, find_recipe, load_recipe
    from pe_dpo.recipe.loss_section import LossSection

    if name in PRESETS:
        typer.echo("\n".join(describe(LossSection(preset=name)).lines()))
        return
    recipe = load_recipe(name)
    typer.echo(find_recipe(name).read_text(encoding="utf-8"))
    typer.echo("\n".join(describe(recipe.loss).lines()))


@recipes.command()
def losses() -> None:
    """List the named losses with their papers."""
    from pe_dpo.recipe import PRESETS

    for name, preset in PRESETS.items():
        typer.echo(f"{name:10} {preset.title}: {preset.source}")


@recipes.command()
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    to: Annotated[Path, typer.Argument(help="A file, or a folder.")] = Path(),
) -> None:
    """Copy a recipe, to change it."""
    from pe_dpo.recipe import copy_recipe

    typer.echo(f"copied to {copy_recipe(name, to)}")


@recipes.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from pe_dpo.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False))

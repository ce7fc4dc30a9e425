"""What a person may ask for: schema, strict YAML, published losses as data. No torch here."""

from pe_dpo.recipe.data_section import DataSection, DataSource, describe_sources, list_sources
from pe_dpo.recipe.describe import LossDescription, describe
from pe_dpo.recipe.load import (
    changed_settings,
    load_recipe,
    recipe_difference,
    recipe_from_yaml,
    recipe_to_yaml,
    with_absolute_paths,
    with_gamma,
    with_public_names,
)
from pe_dpo.recipe.names import SHORT_NAMES, known_keys
from pe_dpo.recipe.presets import PRESETS
from pe_dpo.recipe.schema import Recipe, warnings
from pe_dpo.recipe.shipped import copy_recipe, find_recipe, recipe_header, recipe_names

__all__ = [
    "PRESETS",
    "SHORT_NAMES",
    "DataSection",
    "DataSource",
    "LossDescription",
    "Recipe",
    "changed_settings",
    "copy_recipe",
    "describe",
    "describe_sources",
    "find_recipe",
    "known_keys",
    "list_sources",
    "load_recipe",
    "recipe_difference",
    "recipe_from_yaml",
    "recipe_header",
    "recipe_names",
    "recipe_to_yaml",
    "warnings",
    "with_absolute_paths",
    "with_gamma",
    "with_public_names",
]

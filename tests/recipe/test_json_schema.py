"""The JSON schema for editors: accepts what the loader accepts, refuses what it refuses."""

from typing import Any

import jsonschema
import pytest

from pe_dpo.recipe import Recipe, find_recipe, recipe_names
from pe_dpo.recipe.strict_yaml import parse_document

NEEDED = {"model": {"base": "b"}, "data": {"train": "d"}, "output": "o"}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = Recipe.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_satisfies_the_schema(validator: jsonschema.Draft202012Validator, name: str) -> None:
    validator.validate(parse_document(find_recipe(name).read_text(encoding="utf-8"), name)[0])


@pytest.mark.parametrize("values", [
    {"lr": 1e-5},
    {"loss": {"betta": 0.1}},
    {"loss": {"beta": "0.1"}},
    {"loss": {"beta": 0}},
    {"loss": {"link": "exponential"}},
    {"adapter": {"rank": 1.5}},
    {"adapter": {"targets": "q_proj"}},
    {"train": {"seed": -1}},
    {"data": {}},
    {"data": {"train": []}},
    {"data": {"train": [{"weight": 2}]}},
    {"data": {"train": {"path": "d", "weight": 0}}},
    {"data": {"train": {"path": "d", "splits": "x"}}},
    {"model": {"base": "b", "quantize": "nf5"}},
])  # fmt: skip
def test_a_broken_recipe_does_not(validator: jsonschema.Draft202012Validator, values: dict[str, Any]) -> None:
    assert not validator.is_valid({**NEEDED, **values})


@pytest.mark.parametrize("values", [
    {"loss": {"gamma": "0.5x", "beta": 1}},
    {"loss": {"gamma": 0}},
    {"data": {"train": "d", "eval": "held-out.jsonl"}},
    {"data": {"train": "d", "eval": 0.1, "columns": {"chosen": "better"}}},
    {"data": {"train": ["d", {"path": "e", "weight": 0.5, "columns": {"chosen": "better"}}], "eval": ["f"]}},
    {"data": {"train": {"path": "d", "subset": "en", "split": "s", "revision": "r"}, "eval": {"path": "f", "split": "t"}}},
    {"adapter": {"targets": ["q_proj"]}},
    {"train": {"gradient_checkpointing": True}},
])  # fmt: skip
def test_keys_with_more_than_one_form_are_accepted_in_each(
    validator: jsonschema.Draft202012Validator, values: dict[str, Any]
) -> None:
    validator.validate({**NEEDED, **values})
    Recipe.model_validate({**NEEDED, **values})


def test_a_recipe_file_needs_no_output(validator: jsonschema.Draft202012Validator) -> None:
    validator.validate({"model": {"base": "b"}, "data": {"train": "d"}})

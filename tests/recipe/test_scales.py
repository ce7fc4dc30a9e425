"""generation.scales: fractions of the finished adapter, between the reference and it."""

import jsonschema
import pytest

from pe_dpo.errors import RecipeError
from pe_dpo.recipe import Recipe, recipe_from_yaml, recipe_to_yaml

TEXT = "model: {base: b}\ndata: {train: d}\noutput: o\n"


def with_scales(value):
    return recipe_from_yaml(f"{TEXT}generation: {{scales: {value}}}\n", "r.yaml")


def test_there_are_none_unless_asked_for():
    assert recipe_from_yaml(TEXT, "r.yaml").generation.scales == []


@pytest.mark.parametrize("way", ["file", "override"])
def test_they_are_read_and_written_as_they_are(way):
    recipe = with_scales("[0.5, 0.75]") if way == "file" else recipe_from_yaml(TEXT, "r", ["generation.scales=[0.5, 0.75]"])
    assert recipe.generation.scales == [0.5, 0.75]
    assert recipe_from_yaml(recipe_to_yaml(recipe), "again") == recipe


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[0.5, 1.0]", r"1 does not lie between 0, which is the reference, and 1, which is the adapter as it is; write"),
        ("[0]", "0 does not lie between 0"),
        ("[-0.5]", "-0.5 does not lie between 0"),
        ("[.nan]", "nan does not lie between 0"),
        ("[0.5, 0.75, 0.5]", "0.5 is there twice; name each fraction once"),
        ("0.5", "found 0.5; input should be a valid list"),
        ("[half]", "found 'half'; input should be a valid number"),
    ],
)
def test_what_is_no_fraction_is_refused_with_its_line_and_by_the_schema(value, words):
    with pytest.raises(RecipeError, match=rf"r\.yaml:4: generation\.scales.*: {words}"):
        with_scales(value)


@pytest.mark.parametrize(("values", "is_valid"), [([0.5, 0.75], True), ([], True), ([1], False), ([0.5, 0.5], False)])
def test_the_schema_for_editors_says_the_same(values, is_valid):
    recipe = {"model": {"base": "b"}, "data": {"train": "d"}, "output": "o", "generation": {"scales": values}}
    assert jsonschema.Draft202012Validator(Recipe.model_json_schema()).is_valid(recipe) == is_valid

"""YAML as people mean it: the values that PyYAML gets wrong, and the constructs that a recipe has no use for."""

import math
import time
from pathlib import Path
from typing import Any

import pytest

from pe_dpo.errors import RecipeError
from pe_dpo.recipe import strict_yaml
from pe_dpo.recipe.strict_yaml import parse_document, parse_scalar

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def value_of(text: str) -> Any:
    return parse_document(f"key: {text}", "x.yaml")[0]["key"]


@pytest.mark.parametrize(("text", "value"), [
    ("5e-6", 5e-6), ("1E3", 1000.0), ("1.0e-5", 1e-5), (".5", 0.5), ("2.", 2.0), ("-3.5e+2", -350.0), ("-.inf", -math.inf),
])  # fmt: skip
def test_a_number_with_a_point_or_an_exponent_is_a_float(text: str, value: float) -> None:
    assert isinstance(value_of(text), float)
    assert value_of(text) == value


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("-7", -7), ("+3", 3), ("0", 0)])
def test_digits_are_a_decimal_integer_whatever_they_begin_with(text: str, value: int) -> None:
    assert isinstance(value_of(text), int)
    assert value_of(text) == value


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "Y", "12:30:45", "1_000", "0x10", "0o7", "2026-01-31", "1e", "="])
def test_what_only_yaml_1_1_takes_for_something_else_is_a_string(text: str) -> None:
    assert value_of(text) == text


@pytest.mark.parametrize("text", ["'5e-6'", '"true"', "'010'", "'~'"])
def test_quotes_make_a_string(text: str) -> None:
    assert value_of(text) == text[1:-1]


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("TRUE", True)])
def test_true_and_false_are_booleans(text: str, value: bool) -> None:
    assert value_of(text) is value


@pytest.mark.parametrize("text", ["~", "null", ""])
def test_null_and_nothing_are_none(text: str) -> None:
    assert value_of(text) is None


def test_lists_and_sections_keep_their_order_and_types() -> None:
    assert parse_document("b: [1, x]\na: {c: 2.5}\n", "x.yaml")[0] == {"b": [1, "x"], "a": {"c": 2.5}}


def test_every_value_knows_its_line() -> None:
    lines = parse_document("# header\nloss:\n  beta: 1\n\n  link: hinge\ntrain: {seed: 3}\n", "x.yaml")[1]
    assert {path: lines[path] for path in [("loss",), ("loss", "beta"), ("loss", "link"), ("train", "seed")]} == {
        ("loss",): 2, ("loss", "beta"): 3, ("loss", "link"): 5, ("train", "seed"): 6,
    }  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [
    ("a: 1\nb: 2\na: 3\n", r"x\.yaml:3: a is set twice \(first on line 1\); keep one"),
    ("loss:\n  beta: 1\n  beta: 2\n", r"x\.yaml:3: beta is set twice \(first on line 2\); keep one"),
    ("a: 1\nb: !!python/name:os.system x\n", r"x\.yaml:2: the YAML tag .*python/name:os\.system is not used .*plain value"),
    ("a: 1\nb: !mine 3\n", r"x\.yaml:2: the YAML tag !mine is not used in recipes; write a plain value"),
    ("a: &x 1\n", r"x\.yaml:1: anchors and aliases \(&, \*\) are not used in recipes; write the value out"),
    ("a: &x {c: 1}\nb: *x\n", r"x\.yaml:1: anchors and aliases"),
    ("a: *parts\n", r"x\.yaml:1: anchors and aliases .*write the value out, and a path that begins with \* in quotes"),
    ("a: {b: *.jsonl}\n", r"x\.yaml:1: not readable as YAML: .*, and a path that begins with \* in quotes"),
    ("a:\n\tb: 1\n", r"x\.yaml:2: not readable as YAML: found character '\\t'"),
    ("a: [1, 2\n", r"x\.yaml:2: not readable as YAML: expected ',' or '\]'"),
    ("a: b: c\n", r"x\.yaml:1: not readable as YAML: mapping values are not allowed here"),
    ("a: 1\n---\nb: 2\n", r"x\.yaml:2: not readable as YAML: but found another document"),
    ("? [a]\n: 1\n", r"x\.yaml:1: a key must be a plain word; found a list"),
    ("- model\n- data\n", r"x\.yaml: a recipe is a mapping of sections .* found a list"),
    ("hello\n", r"x\.yaml: a recipe is a mapping of sections .* found the text 'hello'"),
    ("", r"x\.yaml: a recipe is a mapping of sections .* found an empty file"),
    ("# only a comment\n", r"x\.yaml: a recipe is a mapping of sections .* found an empty file"),
    ("a: \0\n", r"x\.yaml: not readable as YAML: unacceptable character #x0000"),
])  # fmt: skip
def test_what_is_no_plain_mapping_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_document(text, "x.yaml")


@pytest.mark.parametrize("text", ["!!int abc", "!!float 1", "!!str 1", "!mine {a: 1}", "!mine [a]", "!!set {a}"])
def test_a_tag_is_refused_wherever_it_stands(text: str) -> None:
    with pytest.raises(RecipeError, match=r"x\.yaml:1: the YAML tag"):
        value_of(text)


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse_document("\ufeffa: 1\n", "x.yaml")[0] == {"a": 1}


def test_a_setting_is_read_by_the_same_rules() -> None:
    assert [parse_scalar(text, "--set") for text in ("5e-6", "no", "010", "[q_proj, 2]", "")] == [
        5e-6, "no", 10, ["q_proj", 2], None,
    ]  # fmt: skip


def test_a_setting_is_one_value() -> None:
    with pytest.raises(RecipeError, match="--set"):
        parse_scalar("1\nother: 2", "--set")


@pytest.mark.parametrize(("text", "said"), [
    ("train: " + "[" * 20_000, "r.yaml:1: nested too deeply: more than 50 brackets or levels"),
    ("a:\n" + "\n".join(" " * depth + "a:" for depth in range(1, 300)), "r.yaml:51: nested too deeply"),
    ("seed: " + "9" * 10_000, "r.yaml:1: a number of 10000 digits"),
    ('output: "\\ud800"', r"r.yaml:1: '\ud800' within a text, which neither files nor their names take"),
    ('output: "a\\0b"', r"r.yaml:1: '\x00' within a text"),
    ('"\\ud800": 1', r"r.yaml:1: '\ud800' within a text"),
    ('output: "\\U00110000"', "r.yaml: not readable as YAML: chr() arg not in range"),
    ("a: &a [x, x]\nb: [*a, *a]", "r.yaml:1: anchors and aliases (&, *) are not used in recipes"),
    ("a: b\n" * 300_000, "r.yaml: has more than 1,000,000 characters"),
    ("a\x1b: b", "r.yaml: not readable as YAML"),
])  # fmt: skip
def test_a_recipe_that_is_made_to_break_its_reader_is_one_line_at_once(text: str, said: str) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError) as error:
        parse_document(text, "r.yaml")
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert time.process_time() - began < 1


def test_recipes_read_the_same_where_pyyaml_was_built_without_libyaml(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [path.read_text(encoding="utf-8") for path in RECIPES]
    fast = [parse_document(text, "x.yaml") for text in texts]
    monkeypatch.setattr(strict_yaml, "_FastRecipeLoader", strict_yaml._RecipeLoader)
    assert len(fast) > 10
    assert fast == [parse_document(text, "x.yaml") for text in texts]

"""β and weight of a pair: read where a map names their columns, checked in every row, and never read in silence."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths_to_pairs import load_pairs, prepare_pairs

from pe_dpo.data import prepare_pairs as prepare_section
from pe_dpo.data.encoded import data_hash
from pe_dpo.errors import DataError, RecipeError
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.recipe.data_section import DataSection

ROW = {"prompt": "How old is he?", "chosen": "Two.", "rejected": "No idea."}


@pytest.fixture
def read(write_lines: Callable[..., Path]) -> Callable[..., Any]:
    """Return the pairs of some rows and the report."""
    return lambda *rows, **settings: load_pairs(write_lines(*rows), **settings)


@pytest.mark.parametrize("column", ["beta", "weight"])
def test_a_column_that_a_map_names_is_read_by_its_name_or_another(read: Callable[..., Any], column: str) -> None:
    """Numbers may be text, which is all that CSV has."""
    pairs, report = read({**ROW, column: 0.5}, {**ROW, column: "2"}, columns={column: column})
    assert [getattr(pair, column) for pair in pairs] == [0.5, 2.0]
    pairs, _ = read({**ROW, "x": 3}, columns={column: "x"})
    assert [getattr(pair, column) for pair in pairs] == [3.0]
    assert report.unread_columns == []


def test_a_weight_of_zero_is_one_and_a_beta_of_zero_is_none(read: Callable[..., Any]) -> None:
    assert read({**ROW, "weight": 0}, columns={"weight": "weight"})[0][0].weight == 0.0
    with pytest.raises(DataError, match=r"train\.jsonl:1: column 'beta' is 0; a finite number > 0 is expected in every row"):
        read({**ROW, "beta": 0}, columns={"beta": "beta"})


@pytest.mark.parametrize("column", ["beta", "weight"])
@pytest.mark.parametrize(("value", "found"), [
    (-0.5, "-0.5"), ("high", "'high'"), (None, "None"), ("", "''"), (float("nan"), "nan"), (float("inf"), "inf"),
    (True, "True"), ([1], r"\[1\]"), (1e300, r"1e\+300"),
])  # fmt: skip
def test_what_is_no_number_of_a_pair_is_refused_with_its_row(
    read: Callable[..., Any], column: str, value: Any, found: str
) -> None:
    rows = {**ROW, column: 1}, {**ROW, column: value}
    why = rf"train\.jsonl:2: column '{column}' is {found}; a finite number >=? 0(| and up to 1e\+09) is expected in every row"
    with pytest.raises(DataError, match=why):
        read(*rows, columns={column: column})
    pairs, report = read(*rows, columns={column: column}, bad_rows="drop")
    assert (len(pairs), len(report.dropped["malformed"])) == (1, 1)


@pytest.mark.parametrize("column", ["beta", "weight"])
def test_a_row_without_the_column_is_refused_and_a_file_without_it_at_once(read: Callable[..., Any], column: str) -> None:
    with pytest.raises(DataError, match=rf"train\.jsonl:2: column '{column}' is missing; a finite number"):
        read({**ROW, column: 1}, ROW, columns={column: column})
    with pytest.raises(DataError, match=rf"data\.columns\.{column}: .* has no column '{column}'"):
        read(ROW, ROW, columns={column: column})


def test_without_a_map_a_column_beta_is_named_as_unread_and_a_weight_stops_with_the_map_to_write(
    read: Callable[..., Any],
) -> None:
    pairs, report = read({**ROW, "beta": 0.5})
    assert (pairs[0].beta, report.unread_columns) == (None, ["beta"])
    assert "columns not read: beta" in report.facts()
    for name in ("weight", "sample_weight"):
        row = {**ROW, name: 0.5}
        with pytest.raises(DataError, match="and all pairs weigh the same") as error:
            read(row, {**row, name: 1})
        written = re.search(r"data: (\{columns: \{.*?\}\})", str(error.value))
        assert written
        assert read(row, **yaml.safe_load(written[1]))[0][0].weight == 0.5
    assert read({**ROW, "weight": 1})[0][0].weight is None


def test_the_hash_of_data_tells_weights_and_betas_and_is_what_it_was_without_them(
    write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    rows = [{**ROW, "prompt": f"{number}?", "w": 1 + number, "x": 9} for number in range(3)]
    columns: list[dict[str, str] | None] = [None, {"weight": "w"}, {"weight": "x"}, {"beta": "w"}, {"beta": "w", "weight": "x"}]
    found = [
        prepare_pairs(write_lines(*rows), tokenizer=tokenizer, max_length=99, columns=each, eval=0.0).train for each in columns
    ]
    assert len({data_hash(pairs) for pairs in found}) == len(columns)
    bare = [replace(pair, beta=None, weight=None) for pair in found[-1]]
    assert data_hash(bare) == data_hash(found[0])
    assert [pair.weight for pair in found[1]] == [1.0, 2.0, 3.0]


def test_a_place_without_the_column_has_the_betas_of_the_loss_and_weight_one(
    tmp_path: Path, tokenizer: Any, write_lines: Callable[..., Path]
) -> None:
    weighted = write_lines({**ROW, "w": 3, "b": 0.5})
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "Who?", "chosen": "He.", "rejected": "I."}\n')
    places = [{"path": str(weighted), "columns": {"weight": "w", "beta": "b"}}, str(plain)]
    section = DataSection.model_validate({"train": places, "max_length": 99, "eval": 0.0})
    data = prepare_section(section, tokenizer=tokenizer)
    assert [pair.weight for pair in data.train] == [3.0, 1.0]
    assert data.train[0].beta == 0.5
    assert data.train[1].beta != data.train[1].beta  # NaN: that of the loss
    assert data.report.pair_numbers["beta"] == {"min": 0.5, "mean": 0.5, "max": 0.5}
    assert "weight of each pair from its column: 1 to 3, mean 2" in data.report.facts()


def test_the_section_says_which_numbers_pairs_have() -> None:
    assert DataSection(train="a").pair_columns == ()
    assert DataSection(train="a", columns={"weight": "w", "beta": "b"}).pair_columns == ("beta", "weight")
    assert DataSection.model_validate({"train": ["a", {"path": "b", "columns": {"weight": "w"}}]}).pair_columns == ("weight",)


def test_a_gamma_from_data_and_betas_from_data_are_refused_together() -> None:
    text = "model: {base: b}\ndata: {train: d, columns: {beta: beta}}\noutput: o\nloss: {gamma: auto}"
    with pytest.raises(RecipeError, match=r"loss\.gamma: auto finds one number, and with data\.columns\.beta each pair has"):
        recipe_from_yaml(text, "r.yaml")

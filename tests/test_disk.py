"""Files that are whole or not there, and JSON that other programs read."""

import json
import math
from pathlib import Path

import pytest

from pe_dpo.disk import json_without_nan, write_json


def test_json_without_nan_has_null_for_numbers_that_are_not_finite_and_everything_else_as_it_is() -> None:
    content = {"a": math.nan, "b": [1, math.inf, (2.5, -math.inf)], "c": {"d": True, "e": None, "f": "NaN"}}
    expected = {"a": None, "b": [1, None, [2.5, None]], "c": {"d": True, "e": None, "f": "NaN"}}
    assert json_without_nan(content) == expected
    json.dumps(json_without_nan(content), allow_nan=False)


def test_a_json_file_is_replaced_whole_and_keeps_its_letters(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"formula": "β·Δπ"})
    assert path.read_text(encoding="utf-8") == '{\n "formula": "β·Δπ"\n}'
    with pytest.raises(TypeError):
        write_json(path, {"formula": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"formula": "β·Δπ"}
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]


def test_a_json_file_has_null_where_there_is_no_number(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"mean": math.nan, "pairs": 3})
    assert (tmp_path / "run.json").read_text() == '{\n "mean": null,\n "pairs": 3\n}'

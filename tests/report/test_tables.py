"""Tables as markdown: whatever stands in a cell stays text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pe_dpo.report.content import PageTable
from pe_dpo.report.page import escape_markdown, to_markdown


def _table(*rows: list[str]) -> PageTable:
    return PageTable("arms", "Arms & effects", ["arm", "KL", "50 %"], list(rows), "± is one standard error.")


def test_markdown_has_a_header_a_rule_and_its_rows() -> None:
    caption, _, *table, _, note = to_markdown([_table(["a", "1", "2"])]).splitlines()
    assert caption == "**Arms \\& effects**"
    assert table == ["| arm | KL | 50 % |", "|:--|--:|--:|", "| a | 1 | 2 |"]
    assert note == "± is one standard error."


@pytest.mark.slow
@given(st.text(max_size=40))
def test_no_text_makes_another_markdown_cell_or_line(text: str) -> None:
    cell = escape_markdown(text)
    assert "\n" not in cell
    assert cell.isprintable()
    assert not re.search(r"(?<!\\)(\\\\)*[|<`]", cell)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a|b", "`code`", "[x](http://y)", "\\|"])
def test_markdown_shows_markup_as_text(text: str) -> None:
    unescaped = re.sub(r"\\(.)", r"\1", escape_markdown(text))
    assert unescaped == text

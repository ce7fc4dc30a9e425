"""Tables as LaTeX and markdown: whatever stands in a cell stays text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pe_dpo.report.content import Table
from pe_dpo.report.tables import escape_latex, escape_markdown, to_latex, to_markdown

NASTY = r"50% of $x_1 & {y}^2 #3 ~ \input{/etc/passwd} <b>|a|</b> `x` -- 'q' \"r\""


def _table(*rows: list[str]) -> Table:
    return Table("arms", "Arms & effects", ["arm", "KL", "50 %"], list(rows), "± is one standard error.")


def _balanced(latex: str) -> bool:
    depth = 0
    for sign in re.sub(r"\\[{}\\]", "", latex):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth < 0:
            return False
    return depth == 0


def test_latex_has_a_cell_for_each_column_and_closes_what_it_opens() -> None:
    latex = to_latex([_table(["β = 0.4", "0.12", "−1.5"], [NASTY, "1", "2"])])
    opened, closed = re.findall(r"\\begin\{(\w+)\}", latex), re.findall(r"\\end\{(\w+)\}", latex)
    assert sorted(opened) == sorted(closed) == ["table", "tabular"]
    assert _balanced(latex)
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [2, 2, 2]
    assert r"\begin{tabular}{lrr}" in latex


def test_latex_prints_every_special_character() -> None:
    assert escape_latex("50% & $5_a {b} #1 ~ ^ \\") == (
        r"50\% \& \$5\_a \{b\} \#1 \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert escape_latex("−1 ± 2") == r"$-$1 $\pm$ 2"
    assert escape_latex("KL(π‖π0), Δ, κ") == r"KL($\pi$$\Vert$$\pi$0), $\Delta$, $\kappa$"
    assert escape_latex("a\nb") == "a b"
    assert escape_latex("犬") == "?"


@given(st.text(max_size=40))
def test_no_text_breaks_out_of_its_latex_cell(text: str) -> None:
    latex = escape_latex(text)
    bare = re.sub(r"\\(textbackslash|text\w+|ldots)|\\[&%$#_{}]|\$\\?[\w-]+(\{\d\})*\$", "", latex)
    assert not re.search(r"[\\&%$#_~^\n]", bare)
    assert _balanced(latex)
    assert latex.isprintable()


def test_markdown_has_a_header_a_rule_and_its_rows() -> None:
    caption, _, *table, _, note = to_markdown([_table(["a", "1", "2"])]).splitlines()
    assert caption == "**Arms \\& effects**"
    assert table == ["| arm | KL | 50 % |", "|:--|--:|--:|", "| a | 1 | 2 |"]
    assert note == "± is one standard error."


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

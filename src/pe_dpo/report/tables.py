"""Tables as markdown and as LaTeX; whatever stands in a cell comes out as that text."""

import re
from collections.abc import Sequence

from pe_dpo.report.content import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "-": "{-}",  # two in a row would be a dash
    "'": r"{\textquotesingle}",
    "−": r"$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "√": r"$\surd$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "≠": r"$\neq$",
    "∞": r"$\infty$",
    "→": r"$\rightarrow$",
    "Δ": r"$\Delta$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "δ": r"$\delta$",
    "κ": r"$\kappa$",
    "π": r"$\pi$",
    "σ": r"$\sigma$",
    "‖": r"$\Vert$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "½": r"$\frac{1}{2}$",
}


def to_markdown(tables: Sequence[Table]) -> str:
    """Return the tables as GitHub's markdown, one below the other, each under its caption."""
    return "\n".join(_markdown(table) for table in tables)


def to_latex(tables: Sequence[Table]) -> str:
    """Return the tables as LaTeX for `\\input`; what they need is said in the first lines."""
    needs = "% needs \\usepackage{booktabs} and \\usepackage{textcomp}; each table is a float, ready to be \\input\n"
    return needs + "\n".join(_latex(table) for table in tables)


def escape_latex(text: str) -> str:
    """Return text as LaTeX that prints it; signs that plain LaTeX has no command for become a question mark."""
    line = " ".join(text.split())
    return "".join(_LATEX.get(sign) or (sign if " " <= sign <= "~" or _is_latin(sign) else "?") for sign in line)


def escape_markdown(text: str) -> str:
    """Return text as markdown that shows it, on one line."""
    line = "".join(sign if sign.isprintable() else "�" for sign in " ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", line)


def _markdown(table: Table) -> str:
    lines = [f"**{escape_markdown(table.caption)}**", "", _markdown_row(table.header)]
    lines.append("|" + "|".join([":--", *["--:"] * (len(table.header) - 1)]) + "|")
    lines += [_markdown_row(row) for row in table.rows]
    if table.note:
        lines += ["", escape_markdown(table.note)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape_markdown(cell) for cell in cells) + " |"


def _latex(table: Table) -> str:
    columns = "l" + "r" * (len(table.header) - 1)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _latex_row(table.header),
        r"\midrule",
        *(_latex_row(row) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if table.note:
        lines.append(rf"\par\smallskip {escape_latex(table.note)}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(escape_latex(cell) for cell in cells) + r" \\"


def _is_latin(sign: str) -> bool:
    """Whether inputenc knows it without further packages: the letters of Latin-1."""
    return "À" <= sign <= "ÿ" and sign not in "×÷"

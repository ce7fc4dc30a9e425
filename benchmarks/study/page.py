"""The tables of docs/study-gamma-vs-mixout.md, between marks `<!-- name -->` and `<!-- end -->`, from the kept numbers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.study import explicit, figures, learning, luck, real
from benchmarks.study.measured import Measured
from benchmarks.study.run import NUMBERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "study-gamma-vs-mixout.md"
REAL: dict[str, Callable[[], str]] = (
    {f"{data}-moved": partial(real.moved_table, data) for data in real.DATA}
    | {f"{data}-points": partial(real.points_table, data) for data in real.DATA}
    | {"pooled": real.pooled_table}
)
VALE: dict[str, dict[str, Callable[[Measured], str]]] = {
    "learning": {
        "learning-named": lambda one: "\n\n".join(learning.named(one)),
        "learning-arms": lambda one: learning.arms_table(one, "from-reference"),
        "learning-courteous": lambda one: learning.arms_table(one, "from-courteous"),
        "learning-cells": learning.cells_table,
    },
    "explicit": {
        "explicit-named": explicit.named,
        "explicit-others": explicit.others,
        "explicit-dials": explicit.dials_table,
    },
    "luck": {"luck-components": luck.components_table, "luck-best": luck.best_table},
}
VALE_FACTS = {"learning": learning.facts, "explicit": explicit.facts, "luck": luck.facts}


def tables() -> dict[str, str]:
    """Return every table of which the numbers are there, by its mark."""
    made = {name: one() for name, one in REAL.items()}
    for experiment, of_it in VALE.items():
        if (NUMBERS / f"{experiment}.json").is_file():
            measured = Measured(experiment)
            made |= {name: one(measured) for name, one in of_it.items()}
    return made


def source_of(name: str) -> str:
    """Return the file with the command and the machine of a table's numbers, relative to the results."""
    experiment = next((one for one, of_it in VALE.items() if name in of_it), None)
    return (
        f"study/vale/{experiment}.json"
        if experiment
        else f"study/{'harmless' if 'harmless' in name else 'politeness'}/plan.json"
    )


def facts() -> dict[str, dict[str, str]]:
    """Return the numbers that the page's sentences take from each file of numbers, as they stand there."""
    made = {f"study/{data}/plan.json": real.facts(data) for data in real.DATA}
    for experiment, of_it in VALE_FACTS.items():
        if (NUMBERS / f"{experiment}.json").is_file():
            made[f"study/vale/{experiment}.json"] = of_it(Measured(experiment))
    return made


def write_page() -> None:
    """Put every table into the page, and draw its figures beside it.

    Raises:
        ValueError: the page has no place for one of them.
    """
    text = PAGE.read_text(encoding="utf-8")
    for name, made in tables().items():
        start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        if start not in text:
            raise ValueError(f"{PAGE.name}: has no {start.strip()}")
        before, _, rest = text.partition(start)
        text = before + start + made + end + rest[rest.index("<!-- end -->") + len("<!-- end -->") :]
    PAGE.write_text(text, encoding="utf-8")
    figures.draw_real(PAGE.parent / "study")
    for experiment in VALE:
        if (NUMBERS / f"{experiment}.json").is_file():
            figures.draw(Measured(experiment), PAGE.parent / "study")

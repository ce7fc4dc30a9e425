"""Every number that README and pages state of what was measured, with where it comes from: `results/claims.json`.

`python -m benchmarks claims` writes it from the tables and sentences as they are made; a test holds the file to them, and its
texts to their pages. A number of a table is named by table, row and column; losses stand beside wins, and what was aimed at
beside what was not reached.

    status    measured     by the command, at the commit, on the machine
              superseded   measured at a commit whose code was changed since in what it measures
              counted      worked out, not run: operations, bytes, estimates of cards that were not there
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks import table
from benchmarks.study import page as study
from benchmarks.study.real import verdicts_find

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILE = RESULTS / "claims.json"
AIMS = {
    ("`train`, 64 steps of 8 pairs of HH, one epoch", "× TRL default"): 5.0,
    ("`train`, 64 steps of 8 pairs of HH, one epoch", "× TRL best"): 1.8,
    ("`sweep`, 8 values of β × 3 epochs of 4 steps of 8 pairs of HH", "× TRL default"): 7.0,
    ("`sweep`, 8 values of β × 3 epochs of 4 steps of 8 pairs of HH", "× TRL best"): 1.9,
    ("step, answers of 1,000 tokens, float32, reference stored", "× TRL best"): 1.8,
    ("step, answers of 1,000 tokens, float32, reference in step", "× TRL best"): 1.3,
}
"""Row and column of the README: the least that was aimed at."""


class Claim(NamedTuple):
    """One number, or one row of them, as a page has it."""

    id: str
    page: str
    text: str
    """As it stands in the page."""
    status: str
    source: str
    """File of the results, relative to the repository."""
    command: str
    commit: str | None
    machine: str | None
    aim: float | None = None
    is_reached: bool | None = None


def claims() -> list[Claim]:
    """Return all claims of README and pages."""
    titles = {_load(f"commands-{case}.json")["title"]: f"commands-{case}.json" for case in table.measured_cases()}
    titles["peak memory of the HH step beyond the model, as a share"] = "step-hh-fp32-m8k.json"
    found = [*_of_table("README.md", "speed", table.table(), "steps.json", aims=AIMS, sources=titles)]
    found += _of_table("README.md", "cards", table.sizes_table(), "estimate.json", status="counted")
    for name, made in table.page_tables().items():
        found += _of_table("docs/speed.md", name, made, "steps.json" if name == "commands" else f"{name}.json", sources=titles)
    found += _of_table("docs/explanation/merging.md", "merging", table.merge_table(), "merge.json")
    found += _of_table("benchmarks/README.md", "mixout", table.mixout_table(), "mixout.json")
    for name, made in study.tables().items():
        found += _of_table("docs/study-gamma-vs-mixout.md", name, made, study.source_of(name))
    for source, facts in study.facts().items():
        for words, value in facts.items():
            name = source.removesuffix(".json").removesuffix("/plan")
            found.append(_claim(f"{name}/{words}", "docs/study-gamma-vs-mixout.md", value, source))
    found.append(_claim("contrasts/verdicts", "docs/how-to/compare.md", verdicts_find(), "study/politeness/plan.json"))
    kinds, crash = _load("architectures.json"), _load("crash.json")
    found.append(_claim("bases/kinds", "README.md", f"{len(kinds['rows'])} kinds of models", "architectures.json"))
    found.append(_claim("reliability/kills", "docs/reliability.md", f"{crash['kills']} kills", "crash.json"))
    return found


def write() -> Path:
    """Write the claims as JSON and return the file."""
    rows = [json.dumps(one._asdict(), ensure_ascii=False) for one in claims()]
    FILE.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
    return FILE


def _of_table(
    page: str,
    name: str,
    made: str,
    source: str,
    *,
    status: str = "measured",
    aims: Mapping[tuple[str, str], float] = MappingProxyType({}),
    sources: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Claim]:
    """Yield a claim for every cell with a number of the tables in some Markdown; `sources` by row, where it is another."""
    head: list[str] = []
    number = 0
    for line in made.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head, number = cells, number + 1
        elif not set(line) <= set("|-: "):
            for column, cell in zip(head[1:], cells[1:], strict=True):
                if any(letter.isdigit() for letter in cell):
                    aim = aims.get((cells[0], column))
                    reached = None if aim is None else float(cell.split()[0]) >= aim
                    first = cells[0] if made.count(f"\n| {cells[0]} |") <= 1 else f"{cells[0]}, {head[1]} {cells[1]}"
                    row = first if number == 1 else f"{number}/{first}"
                    one = _claim(f"{name}/{row}/{column}", page, cell, sources.get(cells[0], source), status=status)
                    yield one._replace(aim=aim, is_reached=reached, **_made_apart(one.source, cells[0]))


def _made_apart(source: str, row: str) -> dict[str, str]:
    """Return command and commit of a row of a file whose rows were measured at several commits; nothing for another."""
    if not source.endswith("/steps.json"):
        return {}
    words = row.removeprefix("step, ")
    for shape, title in table.SHAPES.items():
        for dtype, spelt in table.DTYPES.items():
            if words.removesuffix(", reference stored").removesuffix(", reference in step") == f"{title}, {spelt}":
                commit = _load("steps.json")["rows"][f"{shape} {dtype}"]["commit"]
                return {"command": f"python -m benchmarks steps --shapes {shape}", "commit": commit}
    raise ValueError(f"{source}: has no row for '{row}'")


def _claim(name: str, page: str, text: str, source: str, *, status: str = "measured") -> Claim:
    known = _load(source)
    machine = known.get("machine") or {}
    command = known.get("command") or f"python -m benchmarks{'.study page' if 'study/' in source else f' {Path(source).stem}'}"
    return Claim(name, page, text, status, f"benchmarks/results/{source}", command, machine.get("commit"), machine.get("cpu"))


@cache
def _load(source: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / source).read_text(encoding="utf-8"))
    return found

"""What works with what, from the results of `architectures` and `engines`: the tables of docs/support.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.architectures.table import is_equal
from benchmarks.engines.measure import CASES
from benchmarks.engines.table import NAMES, artefact_name
from benchmarks.results import load

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"
KINDS = {
    "dense": "llama",
    "mixtures of experts": "qwen2-moe",
    "state spaces and hybrids": "mamba",
    "models that also see": "gemma3-4b",
}
"""Kinds of bases, each with the first architecture of its part of the results."""
SHOWN = 5
"""Names of a kind, in a cell that a phone has room for."""
FEW = 2
"""An engine asked about no more artefacts than this has no column of its own: a page of 46 em has no room for it."""


def bases_table() -> str:
    """Return how many bases of each kind are trained and merged to what plain PEFT computes, and which are not."""
    rows = load(RESULTS / "architectures.json")["rows"]
    first = {name: kind for kind, name in KINDS.items()}
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {kind: {} for kind in KINDS}
    kind = ""
    for name, row in rows.items():
        kind = first.get(name, kind)
        kinds[kind][name] = row["found"]
    lines = ["| kind | tried | float32 | nf4 | not | which |", "| --- | --- | --- | --- | --- | --- |"]
    for kind, found in kinds.items():
        equal = {way: [name for name, one in found.items() if _is_equal(one[way])] for way in ("none", "nf4")}
        others = [f"`{name}`" for name in found if any(name not in names for names in equal.values())]
        names = ", ".join(f"`{name}`" for name in list(found)[:SHOWN]) + f" and [{len(found) - SHOWN} more](bases.md)"
        cells = [kind, str(len(found)), str(len(equal["none"])), str(len(equal["nf4"])), ", ".join(others) or "–", names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def engines_table() -> str:
    """Return which engine answers as transformers does on which artefact: the largest difference of a log-prob, in nats."""
    engines = load(RESULTS / "engines.json")["engines"]
    cells: dict[str, dict[str, str]] = {}
    for engine in CASES:
        for row in engines.get(engine, {}).get("rows", []):
            cells.setdefault(artefact_name(row), {})[engine] = _answer(row)
    answers = {engine: sum(engine in found for found in cells.values()) for engine in CASES}
    columns = [engine for engine, number in answers.items() if number > FEW]
    others = [engine for engine, number in answers.items() if 0 < number <= FEW]
    lines = [f"| | {' | '.join(NAMES[engine] for engine in columns)} | others |", f"|{' --- |' * (len(columns) + 2)}"]
    for name, found in cells.items():
        other = "; ".join(f"{NAMES[engine]}: {found[engine]}" for engine in others if engine in found) or "–"
        lines.append(f"| {name} | {' | '.join(found.get(engine, '–') for engine in columns)} | {other} |")
    return "\n".join(lines)


def write_page() -> None:
    """Put both tables into docs/support.md, between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in page_tables().items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{made}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    PAGE.write_text(text, encoding="utf-8")


def page_tables() -> dict[str, str]:
    """Return the tables by the names of their marks."""
    return {"bases": bases_table(), "engines": engines_table()}


def _is_equal(found: Mapping[str, Any]) -> bool:
    return "kl_merged" in found and is_equal(found)


def _answer(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return "no"
    if row["known"]:
        return f"no ({row['known']})"
    if "difference" in row:
        return f"{row['difference']:.0e}"
    same = [f"{row[part][0]} of {row[part][1]} {part}" for part in ("chats", "prompts") if part in row]
    return ", ".join(same)

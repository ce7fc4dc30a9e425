"""The table of architectures as Markdown, from the results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import load

HEADER = (
    "base", "stands for", "check", "adapted layers (never moved)", "4-bit share", "merged, 32 bit", "merged, nf4",
    "KL to plain PEFT, 32 bit / nf4", "s",
)  # fmt: skip
EQUAL = 1e-9
"""Nats of KL below which two models are the same: float32 arithmetic in another order."""


def architectures_table(path: Path) -> str:
    """Return the table, a row for each architecture."""
    rows = [[name, row["stands_for"], *_cells(row)] for name, row in load(path)["rows"].items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [HEADER, ["---"] * len(HEADER), *rows])


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["failed"], "", "", "", "", "", ""]
    plain, nf4 = row["found"]["none"], row["found"]["nf4"]
    said = nf4["check"]["said"].removeprefix("error: ")
    check = f"refused: {said}" if nf4["check"]["code"] else "ready"
    adapted = f"{nf4['adapted']} ({nf4['unmoved']})" if "adapted" in nf4 else "–"
    share = f"{nf4['four_bit_share']:.2f}" if "four_bit_share" in nf4 else "–"
    distances = " / ".join(_distance(one) for one in (plain, nf4))
    return [check, adapted, share, _merged(plain), _merged(nf4), distances, f"{row['seconds']:g}"]


def _merged(found: Mapping[str, Any]) -> str:
    if "merge" not in found:
        return "–" if found["check"]["code"] else f"not trained: {found['train']['said'].removeprefix('error: ')}"
    if found["merge"]["code"]:
        return f"no: {found['merge']['said'].removeprefix('error: ')}"
    return found["verdict"]


def _distance(found: Mapping[str, Any]) -> str:
    if "kl_merged" not in found:
        return "–"
    worst = max(found["kl_merged"], found.get("kl_merged_as_published", 0.0))
    return "equal" if worst < EQUAL else f"{worst:.1e}"

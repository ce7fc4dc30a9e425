"""The table of architectures as Markdown, from the results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import load

HEADER = ("base", "such as", "layers with an adapter", "4-bit share of the weights", "float32", "nf4")
EQUAL = 1e-8
"""Nats of KL below which two models are the same: float32 arithmetic in another order."""


def architectures_table(path: Path) -> str:
    """Return the table, a row for each architecture."""
    rows = [[name, row["stands_for"], *_cells(row)] for name, row in load(path)["rows"].items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [HEADER, ["---"] * len(HEADER), *rows])


def is_equal(found: Mapping[str, Any]) -> bool:
    """Return whether what was found on one quantization is a merged model, equal to plain PEFT's, of layers that all moved."""
    worst = max(found.get("kl_merged", float("inf")), found.get("kl_merged_as_published", 0.0))
    return worst < EQUAL < found["kl_reference"] and not found["unmoved"] and found["names_as_in_base"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "failed" in row:
        return ["", "", row["failed"], row["failed"]]
    plain, nf4 = row["found"]["none"], row["found"]["nf4"]
    adapted = f"{nf4['adapted']}" if "adapted" in nf4 else "–"
    share = f"{nf4['four_bit_share']:.2f}" if "four_bit_share" in nf4 else "–"
    return [adapted, share, _outcome(plain), _outcome(nf4)]


def _outcome(found: Mapping[str, Any]) -> str:
    failed = next((step for step in ("check", "train", "merge") if step in found and found[step]["code"]), None)
    if failed is not None:
        word = {"check": "refused", "train": "not trained", "merge": "not merged"}[failed]
        return f"{word}: {found[failed]['said'].removeprefix('error: ').removeprefix('base: ')}"
    if not is_equal(found):
        return f"{found['verdict']}, KL {found['kl_merged']:.0e}, {found['unmoved']} layers did not move"
    return f"equal, {found['kl_merged']:.0e}"

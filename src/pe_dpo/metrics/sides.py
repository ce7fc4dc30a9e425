"""Shares of pairs apart: of those that a model ranks right, and of those that it ranks wrong.

                            π0 right (Δ0 > 0)   π0 wrong (Δ0 < 0)
    moved toward chosen            51 %                92 %             one share of all would be the mean of opposite signs
    ranked right by π              89 %                 …

Right and wrong are by log-probs per token where the loss is (`reduce: mean`), else by their sums. A tie is on neither side.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from pe_dpo.metrics.catalogue import METRICS, Metric
from pe_dpo.metrics.estimates import pairs_worth, wilson_interval
from pe_dpo.metrics.table import PairTable

By = Literal["reference", "policy"]
"""Whose ranking parts the pairs."""
RANKINGS: dict[By, str] = {"reference": "π0", "policy": "π"}
"""What each is called in tables."""
SIDES = ("right", "wrong")


class SideShare(NamedTuple):
    """A share of the pairs of one side."""

    pairs: int
    share: float
    """Ties ½; NaN of no pairs."""
    low: float
    """95 %, Wilson's, for as many independent pairs as those of the prompts are worth."""
    high: float

    def describe(self) -> str:
        """Return "0.510 [0.402, 0.617]", or a dash of no pairs."""
        return "–" if math.isnan(self.share) else f"{self.share:.3f} [{self.low:.3f}, {self.high:.3f}]"


def of_side(table: PairTable, by: By, side: str, *, per_token: bool | None = None) -> PairTable | None:
    """Return the pairs that a model ranks right, or wrong; None where there are none.

    Args:
        table: Of all pairs.
        by: Whose ranking it is.
        side: One of SIDES.
        per_token: Whether by log-probs per token; None for as the loss has them.
    """
    sign = np.sign(table.delta(by, per_token=table.reduce == "mean" if per_token is None else per_token))
    rows = np.flatnonzero(sign == (1 if side == "right" else -1))
    return table.take(rows) if len(rows) else None


def share_metrics(table: PairTable, by: By) -> list[Metric[PairTable]]:
    """Return the shares that say something of a side, by the log-probs that the loss takes: none that the side is made of."""
    way = "_per_token" if table.reduce == "mean" else ""
    other = "policy" if by == "reference" else "reference"
    metrics = [METRICS[key] for key in (f"accuracy/shift{way}", f"accuracy/{other}{way}", "rewards/accuracies")]
    return [metric for metric in metrics if table.knows(*metric.needs)]


def shares_by_side(table: PairTable, by: By) -> dict[str, dict[str, SideShare]]:
    """Return each share by its metric's key and by side; empty where the reference was not run on the pairs.

    Args:
        table: Of pairs as scored now.
        by: Whose ranking parts them.
    """
    if not table.has_reference:
        return {}
    parts = {side: of_side(table, by, side) for side in SIDES}
    return {metric.key: {side: _share(metric, part) for side, part in parts.items()} for metric in share_metrics(table, by)}


def describe_sides(table: PairTable) -> str:
    """Return the share moved toward chosen where π0 is right and where wrong, in a sentence; empty without a reference."""
    found = next(iter(shares_by_side(table, "reference").values()), {})
    parts = [
        f"{part.share:.0%} [{100 * part.low:.0f}, {100 * part.high:.0f}] of the {part.pairs} that π0 ranks {side}"
        for side, part in found.items()
        if part.pairs
    ]
    way = "per token" if table.reduce == "mean" else "by summed log-probs"
    return f"Moved toward chosen ({way}): {', '.join(parts)}." if parts else ""


def _share(metric: Metric[PairTable], part: PairTable | None) -> SideShare:
    if part is None:
        return SideShare(0, math.nan, math.nan, math.nan)
    assert metric.numerator is not None, "a share has rows"
    share = metric(part)
    return SideShare(len(part), share, *wilson_interval(share, pairs_worth(metric.numerator(part), part.prompt_key)))

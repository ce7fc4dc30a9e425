"""Paired differences of an experiment: Student's t over seeds or draws, Holm over those that were named, and equivalence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pe_dpo.metrics.bootstrap import holm
from pe_dpo.metrics.table import Floats


@dataclass(frozen=True)
class Contrast:
    """A difference between two arms, one value a seed or a draw."""

    name: str
    mean: float
    low: float
    """Of the 95 % interval."""
    high: float
    p: float
    p_holm: float
    inside: tuple[float, float]
    """The 90 % interval, which lies within ±d where two one-sided tests at 0.05 find the difference smaller than d."""
    values: list[float]

    def is_within(self, distance: float) -> bool:
        """Return whether two one-sided tests say that the difference is smaller than this (Schuirmann 1987)."""
        return -distance < self.inside[0] and self.inside[1] < distance


def contrasts(differences: dict[str, Sequence[float] | Floats]) -> list[Contrast]:
    """Return contrasts that were named together, each from its paired differences, adjusted by Holm."""
    found = []
    for name, values in differences.items():
        numbers = np.asarray(values, dtype=np.float64)
        mean, error, freedom = numbers.mean(), numbers.std(ddof=1) / len(numbers) ** 0.5, len(numbers) - 1
        wide, narrow = (stats.t.ppf(1 - level, freedom) * error for level in (0.025, 0.05))
        p = 2 * stats.t.sf(abs(mean) / error, freedom) if error else float(mean == 0)
        found.append((name, mean, mean - wide, mean + wide, p, (mean - narrow, mean + narrow), numbers.tolist()))
    adjusted = holm(np.array([one[4] for one in found]))
    return [
        Contrast(name, mean, low, high, p, float(p_holm), inside, values)
        for (name, mean, low, high, p, inside, values), p_holm in zip(found, adjusted, strict=True)
    ]


def contrast_table(found: Sequence[Contrast], *, unit: str, scale: float, within: float | None = None) -> str:
    """Return contrasts as Markdown.

    Args:
        found: those that were named together.
        unit: of the differences, for the head.
        scale: by which they are multiplied.
        within: of an equivalence that is told beside, in the same unit.
    """
    head = ["contrast", f"difference, {unit}", "95 % CI", "p (Holm)"]
    head += [] if within is None else [f"90 % CI, within ±{within:g}?"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in found:
        cells = [
            one.name,
            _signed(scale * one.mean),
            f"{_signed(scale * one.low)} to {_signed(scale * one.high)}",
            _p(one.p_holm),
        ]
        if within is not None:
            low, high = (scale * end for end in one.inside)
            is_within = "yes" if one.is_within(within / scale) else "not shown"
            cells.append(f"{_signed(low)} to {_signed(high)}, {is_within}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"

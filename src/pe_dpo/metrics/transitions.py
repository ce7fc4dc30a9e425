"""How many pairs changed sides, and whether chance alone could have done it.

    p = P(|Σ_c s_c·D_c| >= |Σ_c D_c|),  s_c = ±1 with probability ½       D_c: gained minus lost pairs of prompt c

With one pair per prompt this is McNemar's exact test; pairs of one prompt change sides together, so that they are one draw.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from pe_dpo.inference.drift import clustered_mean
from pe_dpo.runs.run_record import Floats


class Flips(NamedTuple):
    """Pairs by how they were ranked at the start and now; a pair with a tie in either is in `tied` alone."""

    kept: int
    lost: int
    gained: int
    still_wrong: int
    tied: int
    change: float
    """Of the share ranked right, ties counted ½."""
    low: float
    high: float
    """95 % interval of the change, clustered by prompt; NaN with fewer than two prompts."""
    p: float
    """Of a change as large or larger, either way, if sides were changed by chance."""

    @property
    def counts(self) -> list[list[int]]:
        """[[right → right, right → wrong], [wrong → right, wrong → wrong]]."""
        return [[self.kept, self.lost], [self.gained, self.still_wrong]]


class Change(NamedTuple):
    """A mean over pairs with its 95 % interval, clustered by prompt; NaN with fewer than two prompts."""

    mean: float
    low: float
    high: float


def count_flips(start: Floats, now: Floats, prompt_keys: Sequence[str]) -> Flips:
    """Return how the ranking of pairs changed.

    Args:
        start: Δπ at the start, (N,) with N >= 1.
        now: Δπ now, (N,).
        prompt_keys: N of them; pairs of one prompt are not independent.
    """
    before, after = np.sign(start), np.sign(now)
    change = mean_change((after - before) / 2, prompt_keys)
    return Flips(
        kept=int(((before > 0) & (after > 0)).sum()),
        lost=int(((before > 0) & (after < 0)).sum()),
        gained=int(((before < 0) & (after > 0)).sum()),
        still_wrong=int(((before < 0) & (after < 0)).sum()),
        tied=int(((before == 0) | (after == 0)).sum()),
        change=change.mean,
        low=change.low,
        high=change.high,
        p=sign_flip_test(_sums(after - before, prompt_keys)),
    )


def mean_change(values: Floats, prompt_keys: Sequence[str]) -> Change:
    """Return the mean of values over pairs with its interval (Student's t over prompts)."""
    found = clustered_mean(values.tolist(), list(prompt_keys))
    mean, error = found["mean"], found["standard_error"]
    assert mean is not None, "there is at least one pair"
    if error is None:
        return Change(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, len(set(prompt_keys)) - 1)) * error
    return Change(mean, mean - half, mean + half)


def sign_flip_test(sums: Sequence[int]) -> float:
    """Return the exact two-sided p value of a sum of independent numbers, each of which could as well have had the other sign.

    Args:
        sums: whole numbers; zeros do not count.

    Example:
        [1, 1, 1, 1, 1] → 2/32, as McNemar's exact test with 5 gained and 0 lost.
    """
    sizes = [abs(int(number)) for number in sums if number]
    total = sum(sizes)
    chances = np.zeros(2 * total + 1)
    chances[total] = 1.0
    for size in sizes:
        up, down = np.zeros_like(chances), np.zeros_like(chances)
        up[size:], down[:-size] = chances[:-size], chances[size:]
        chances = (up + down) / 2
    extreme = abs(int(sum(sums)))
    return min(1.0, float(chances[np.abs(np.arange(-total, total + 1)) >= extreme].sum()))


def _sums(values: Floats, prompt_keys: Sequence[str]) -> list[int]:
    """Whole-number sums per prompt of values that are multiples of 1."""
    found: dict[str, float] = {}
    for key, value in zip(prompt_keys, values.tolist(), strict=True):
        found[key] = found.get(key, 0.0) + value
    return [round(value) for value in found.values()]

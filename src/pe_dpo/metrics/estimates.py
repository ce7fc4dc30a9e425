"""Shares, means and slopes over pairs or answers, with their errors and tests; NumPy and SciPy alone.

Pairs and answers of one prompt are not independent of each other. Where prompt keys are given, errors and tests allow for that.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pe_dpo.metrics.table import Floats


def right(preference: Floats) -> Floats:
    """Return 1 for each Δ > 0, ½ for a tie (so that step 0 of DPO shows 0.5, not 0), 0 otherwise; NaN stays."""
    return (np.sign(preference) + 1) / 2


def share_right(preference: ArrayLike) -> float:
    """Return the share of pairs with Δ > 0, a tie counts one half; NaN of no pairs."""
    values = right(np.asarray(preference, dtype=np.float64))
    return float(values.mean()) if values.size else math.nan


def wilson_interval(share: float, pairs: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share of `pairs` independent pairs.

    Args:
        share: in [0, 1]; ties counted ½ are fine.
        pairs: how many, or how many independent ones they are worth; 0 gives (0, 1).
        confidence: of the interval, two-sided.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if pairs == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * pairs)) / (1 + z * z / pairs)
    half = z / (1 + z * z / pairs) * (share * (1 - share) / pairs + z * z / (4 * pairs * pairs)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def pairs_worth(values: ArrayLike, prompt_keys: Sequence[Hashable], confidence: float = 0.95) -> float:
    """Return how many independent pairs tell a share as well as these, of which some share prompts, do.

        N / deff · (t_{N−1} / t_{C−1})²      deff = C/(C−1) Σ_c r_c² / (N/(N−1) Σ_i r_i²),  r_i = value − share, r_c: their sum

    N where every prompt has one pair, and never more than N. Where the pairs of each of C prompts are all alike they are worth
    a little less than C independent pairs, since C prompts, and not N pairs, tell the spread.

    Args:
        values: 1, ½ or 0 of each pair, (N,); NaN is no pair.
        prompt_keys: (N,).
        confidence: of the interval that it is for: few prompts tell their own spread badly.

    Source:
        Kish 1965, "Survey sampling", for the design effect; Korn & Graubard 1998, "Confidence intervals for proportions with
        small expected number of positive counts estimated from survey data", for the effective size with Student's quantiles.
    """
    from scipy.special import stdtrit  # dear to import

    column = np.asarray(values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(column)).tolist()
    column, prompt_keys = column[known], [prompt_keys[row] for row in known]
    pairs, prompts = len(known), len(set(prompt_keys))
    if prompts in (0, 1, pairs):
        return float(prompts)
    apart = column - column.mean()
    squares = float((apart**2).sum())
    if squares == 0:
        return float(prompts)
    effect = prompts / (prompts - 1) * float((cluster_sums(apart, prompt_keys) ** 2).sum()) * (pairs - 1) / pairs / squares
    level = (1 - confidence) / 2
    return pairs / max(1.0, effect) * float(stdtrit(pairs - 1, level) / stdtrit(prompts - 1, level)) ** 2


def clustered_mean(values: ArrayLike, clusters: Sequence[Hashable]) -> dict[str, float | None]:
    """Return the mean of values with a standard error that allows for dependence within clusters; see `clustered_ratio`."""
    return clustered_ratio(values, np.ones(len(clusters)), clusters)


def clustered_ratio(numerators: ArrayLike, denominators: ArrayLike, clusters: Sequence[Hashable]) -> dict[str, float | None]:
    """Return Σ numerators / Σ denominators with its standard error.

    Clusters are independent of each other, what is in one may depend on each other in any way. The error is that of the linear
    approximation, √(C/(C−1) Σ_c r_c²) / Σ denominators with r_c the sum of numerator − ratio·denominator in cluster c; for
    means of clusters of one size it is the standard error of the mean of the clusters' means.

    Args:
        numerators: N values.
        denominators: N values, not all 0.
        clusters: which cluster each belongs to.

    Returns:
        `mean` and `standard_error`, the latter None if there is only one cluster.

    Source:
        Cochran 1977, "Sampling techniques", 6.3 and 9A; Miller 2024 (arXiv 2411.00640), section 2.2.
    """
    above, below = (np.asarray(values, dtype=np.float64) for values in (numerators, denominators))
    mean = float(above.sum() / below.sum())
    sums = cluster_sums(above - mean * below, clusters)
    count = len(sums)
    if count < 2:
        return {"mean": mean, "standard_error": None}
    error = float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / abs(below.sum()))
    return {"mean": mean, "standard_error": error}


def mean_change(values: ArrayLike, prompt_keys: Sequence[str]) -> tuple[float, float, float]:
    """Return the mean of values over pairs, and both ends of its 95 % interval: Student's t over prompts; NaN of one prompt."""
    from scipy import stats  # dear to import

    found = clustered_mean(values, prompt_keys)
    mean, error = found["mean"], found["standard_error"]
    assert mean is not None, "there is at least one pair"
    half = math.nan if error is None else float(stats.t.ppf(0.975, len(set(prompt_keys)) - 1)) * error
    return mean, mean - half, mean + half


class ChangedSides(NamedTuple):
    """How many pairs one ranking has right and another wrong."""

    gained: int
    """Wrong before, right now."""
    lost: int
    p: float
    """Exact and two-sided, of as many gained as lost; 1 where none changed."""


def changed_sides(before: Floats, now: Floats, clusters: Sequence[Hashable]) -> ChangedSides:
    """Return how many pairs changed sides: McNemar's test, with the pairs of a prompt as one draw (`sign_flip_test`).

    A pair that is tied in one of the two rankings, or has no number in it, is neither gained nor lost, and not in the test.

    Args:
        before: 1 where a pair was right, ½ of a tie, 0 where wrong, see `right`; (N,).
        now: the same of the other ranking.
        clusters: the prompt of each pair, (N,).
    """
    moved = np.trunc(np.nan_to_num(now - before))
    sums = cluster_sums(moved, clusters).astype(int).tolist()
    return ChangedSides(int((moved > 0).sum()), int((moved < 0).sum()), sign_flip_test(sums))


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p of as many gained as lost, for pairs that are independent of each other.

    Args:
        gained: pairs right in the second ranking alone.
        lost: pairs right in the first alone.

    Example:
        10 gained and 2 lost: p = 2·(1 + 12 + 66)/2¹² = 0.039.

    Source:
        McNemar 1947, in its exact form: a binomial test of gained against lost.
    """
    from scipy.special import bdtr  # dear to import

    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def sign_flip_test(sums: Sequence[int]) -> float:
    """Return the exact two-sided p of a sum of independent numbers, each of which could as well have had the other sign.

        p = P(|Σ_c s_c·D_c| >= |Σ_c D_c|),  s_c = ±1 with probability ½       D_c: gained minus lost pairs of prompt c

    With one pair per prompt this is McNemar's exact test; pairs of one prompt change sides together, so that they are one draw.

    Where a sum takes more than 10⁸ steps to enumerate, its normal limit (half a step off) stands for it.

    Args:
        sums: D_c, whole numbers; zeros do not count.

    Example:
        [1, 1, 1, 1, 1] → 2/32, as McNemar's exact test with 5 gained and 0 lost.
    """
    from scipy.special import gammaln  # dear to import

    sizes = [abs(int(number)) for number in sums if number]
    total = sum(sizes)
    if total == len(sizes):
        return mcnemar(sum(number > 0 for number in sums), sum(number < 0 for number in sums))
    if total * len(sizes) > 100_000_000:
        size = (abs(int(sum(sums))) - math.gcd(*sizes)) / math.sqrt(sum(size * size for size in sizes))
        return min(1.0, math.erfc(size / math.sqrt(2)))
    chances = np.ones(1)
    for size, count in Counter(sizes).items():
        logs = gammaln(np.arange(count + 1) + 1)
        of_size = np.zeros(2 * size * count + 1)  # of their part of the sum, shifted to begin at 0
        of_size[:: 2 * size] = np.exp(logs[-1] - logs - logs[::-1] - count * math.log(2))
        chances = np.convolve(chances, of_size)
    extreme = abs(int(sum(sums)))
    return min(1.0, float(chances[np.abs(np.arange(-total, total + 1)) >= extreme].sum()))


def cluster_sums(values: Floats, clusters: Sequence[Hashable]) -> Floats:
    """Return the sum of the values of each cluster, in the order of first appearance."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    return np.bincount([numbers[cluster] for cluster in clusters], values).astype(np.float64)


def correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Return Pearson's correlation of two columns; NaN where one of them is constant."""
    left, right = (np.asarray(values, dtype=np.float64) for values in (one, other))
    left, right = left - left.mean(), right - right.mean()
    spread = math.sqrt(float((left**2).sum()) * float((right**2).sum()))
    return float((left * right).sum()) / spread if spread else math.nan


def correlation_interval(r: float, pairs: int) -> tuple[float, float]:
    """Return the 95 % interval of a correlation of independent pairs, by Fisher's z.

    Args:
        r: in [-1, 1].
        pairs: how many; at least 4.

    Source:
        Fisher 1921, "On the probable error of a coefficient of correlation deduced from a small sample".
    """
    centre, half = math.atanh(min(max(r, -0.999999), 0.999999)), NormalDist().inv_cdf(0.975) / math.sqrt(pairs - 3)
    return math.tanh(centre - half), math.tanh(centre + half)


def length_slope(preference: Floats, length_difference: Floats) -> float:
    """Return by how many nats a preference changes with each token that the chosen answer is longer; 0 if all differ alike.

    The slope of a least-squares line with an intercept.

    Args:
        preference: Δ, (N,) nats, summed over tokens.
        length_difference: |chosen| − |rejected|, (N,) tokens.
    """
    centred = length_difference - length_difference.mean()
    spread = float((centred**2).sum())
    return float((centred * preference).sum()) / spread if spread > 0 else 0.0


def without_length(preference: Floats, length_difference: Floats) -> Floats:
    """Return Δ − slope·(|chosen| − |rejected|), the preference as it would be between answers of equal length.

    The intercept of the line stays in, since it is no effect of length; arguments as `length_slope`.
    """
    return preference - length_slope(preference, length_difference) * length_difference

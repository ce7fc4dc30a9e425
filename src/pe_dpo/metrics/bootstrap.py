"""How sure a difference between runs is, when runs share prompts and seeds: NumPy and SciPy alone, no files and no models.

The metric of a run is a sum over prompts, divided by another. A replicate draws prompts with replacement, the same ones for all
runs, and all metrics, KLs and interpolations follow from the drawn prompts. The error of a difference D̄ = mean of D_s over S
seeds has three parts, of which two can be seen each by itself:

    V_seeds    = var(D_s)/S                    seeds, and what seeds and prompts do together
    V_prompts  = var of D̄ over replicates      prompts, and what they do together
    V_together = (mean of var D_s over replicates − V_prompts)/(S − 1)

    half²      = max(t²(C−1)·V_prompts,  t²(S−1)·V_seeds + t²(C−1)·(V_prompts − V_together))

with Student's quantiles t for S seeds and C prompts. Resampling three seeds with replacement and reading off quantiles calls
a difference real that is not there in 20 % of cases instead of 5 %, where seeds matter more than prompts: the variance comes
out a third too small, and three seeds do not tell it well either. The above errs in 1 to 5 %, however much seeds matter.

Source:
    Owen 2007, "The pigeonhole bootstrap", for the three parts; Graybill and Wang 1980, "Confidence intervals on nonnegative
    linear combinations of variances", for adding squared half-widths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from pe_dpo.metrics.table import Floats

_CELLS = 4_000_000
"""Weights held at once, 32 MB."""


class Errors(NamedTuple):
    """Variances of a mean over seeds, by what brings them in."""

    prompts: float
    """V_prompts."""
    alone: float
    """V_prompts − V_together."""
    together: float
    """V_together, as far as it was seen in V_seeds."""
    seeds: float
    """V_seeds − V_together: more prompts do not make it smaller. NaN with one seed."""
    clusters: float
    """C; of several data sets together, what their degrees of freedom come to."""
    runs: int
    """S."""
    seed_freedom: float = 0
    """Degrees of freedom of V_seeds; 0 stands for S − 1."""

    @property
    def is_of_one_seed(self) -> bool:
        """Whether the spread between seeds is not known, of one data set or of each of several."""
        return math.isnan(self.seeds)

    def variance(self, more: float = 1.0) -> float:
        """Return the variance of the mean, had there been `more` times the prompts."""
        seen = 0.0 if self.is_of_one_seed else self.seeds + (self.together + self.alone) / more
        return max(self.prompts / more, seen)

    def half_width(self, level: float, more: float = 1.0) -> float:
        """Return half the width of the interval that errs with a chance of `level`, had there been `more` times the prompts."""
        prompt_t = -special.stdtrit(self.clusters * more - 1, level / 2)
        squared = prompt_t**2 * self.prompts / more
        if not self.is_of_one_seed:
            seed_t = -special.stdtrit(self.seed_freedom or self.runs - 1, level / 2)
            both = seed_t**2 * (self.seeds + self.together / more) + prompt_t**2 * self.alone / more
            squared = max(squared, both)
        return float(squared**0.5)

    def level(self, size: float) -> float:
        """Return the level at which an interval reaches just as far as `size`: the two-sided p of an estimate of that size."""
        smallest = 1e-12
        if size > 0 and self.half_width(smallest) <= size:
            return smallest
        if size > 0 and self.half_width(1 - smallest) < size:
            return math.exp(
                optimize.brentq(lambda level: self.half_width(math.exp(level)) - size, math.log(smallest), 0.0, xtol=1e-9)
            )
        return 1.0

    def with_runs(self, runs: int) -> "Errors":
        """Return what the errors would be, had there been so many seeds; more than one were run."""
        fewer = self.runs / runs
        prompts = self.alone + fewer * (self.prompts - self.alone)
        freedom = self.seed_freedom and self.seed_freedom + runs - self.runs
        return Errors(prompts, self.alone, fewer * self.together, fewer * self.seeds, self.clusters, runs, freedom)


@dataclass(frozen=True)
class Effect:
    """A difference between runs, paired by seed: the mean over seeds with its error."""

    estimate: float
    low: float
    high: float
    p: float
    """Two-sided, of no difference; not adjusted for other comparisons."""
    p_adjusted: float
    """By Holm, over all effects that were tested together; NaN where it was not tested."""
    standard_error: float
    seed_sd: float
    """Standard deviation between seeds; NaN with one seed, whose spread is in neither interval nor p."""
    per_seed: list[float]
    errors: Errors
    margin: float = math.nan
    """What counts as no difference; NaN where that was not asked."""
    inner_low: float = math.nan
    inner_high: float = math.nan
    """The interval that lies within ± margin where the p of equivalence is below the level: 90 % for a level of 5 %."""
    p_equivalent: float = math.nan
    """Of a difference as large as the margin or larger: the larger of two one-sided p."""
    p_equivalent_adjusted: float = math.nan
    """By Holm, as `p_adjusted`."""

    @classmethod
    def known_to(cls, errors: Errors, estimate: float, *, confidence: float, seed_sd: float, per_seed: list[float]) -> "Effect":
        """Return an effect with the interval and the p that its errors give it, not adjusted."""
        half = errors.half_width(1 - confidence)
        return cls(
            estimate=estimate,
            low=estimate - half,
            high=estimate + half,
            p=errors.level(abs(estimate)),
            p_adjusted=math.nan,
            standard_error=errors.variance() ** 0.5,
            seed_sd=seed_sd,
            per_seed=per_seed,
            errors=errors,
        )


def cluster_weights(random: np.random.Generator, repeats: int, clusters: int) -> Floats:
    """Return how often each cluster is drawn when as many as there are are drawn with replacement: (repeats, clusters)."""
    drawn = random.integers(0, clusters, (repeats, clusters)) + clusters * np.arange(repeats)[:, None]
    return np.bincount(drawn.ravel(), minlength=repeats * clusters).reshape(repeats, clusters).astype(np.float64)


def resampled_ratios(numerators: Floats, denominators: Floats, *, repeats: int, seed: int) -> Floats:
    """Return Σ numerators / Σ denominators over resampled clusters, (repeats, columns); the draws are the same for all columns.

    Args:
        numerators: (clusters, columns).
        denominators: the same; a column that draws none of its rows becomes NaN.
        repeats: how many replicates.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    clusters, columns = numerators.shape
    of_each = [column.tobytes() for column in denominators.T]  # most are the same
    numbers = {column: number for number, column in enumerate(dict.fromkeys(of_each))}
    distinct = np.stack([np.frombuffer(column, denominators.dtype) for column in numbers], axis=1)
    which = [numbers[column] for column in of_each]
    result = np.empty((repeats, columns))
    size = max(1, _CELLS // max(1, clusters))
    for start in range(0, repeats, size):
        weights = cluster_weights(random, min(size, repeats - start), clusters)
        below = weights @ distinct
        below[below == 0] = np.nan
        result[start : start + size] = (weights @ numerators) / below[:, which]
    return result


def interpolate(knots: Floats, values: Floats, at: Floats, *, nearest: bool = False) -> Floats:
    """Return values of piecewise linear curves, one curve in each row; outside its knots a curve has none.

    Args:
        knots: (rows, K), in any order.
        values: (rows, K), at the knots.
        at: (rows,).
        nearest: take the value of the outermost knot instead of NaN outside. That is meant for replicates of a curve that is
            inside as observed.
    """
    order = np.argsort(knots, axis=1, kind="stable")
    knots, values = np.take_along_axis(knots, order, 1), np.take_along_axis(values, order, 1)
    rows, last = np.arange(len(at)), knots.shape[1] - 1
    right = np.clip((knots < at[:, None]).sum(1), min(1, last), last)
    left = np.maximum(right - 1, 0)
    begin, end = knots[rows, left], knots[rows, right]
    with np.errstate(invalid="ignore"):  # of knots at one place, 0/0
        share = np.where(end > begin, (np.clip(at, begin, end) - begin) / (end - begin), 0.5)
    found = values[rows, left] + share * (values[rows, right] - values[rows, left])
    inside = (at >= knots[:, 0]) & (at <= knots[:, -1])
    return found if nearest else np.where(inside, found, np.nan)


def effect(per_seed: Floats, replicates: Floats, *, clusters: int, one_row: float = 0.0, confidence: float = 0.95) -> Effect:
    """Return the mean of per-seed differences with its interval and p; see the formulas at the top of the file.

    Args:
        per_seed: D_s as observed, (S,).
        replicates: D_s over resampled prompts, (repeats, S). One that is not known in every seed counts for nothing.
        clusters: C, prompts that were resampled; at least 2.
        one_row: what one row more that differs would change, 1/pairs for a share; a standard error is never smaller. Where no
            pair differs a bootstrap knows no error (Agresti & Min 2005 add such a pair).
        confidence: of the interval, two-sided.
    """
    estimate, seeds_count = float(per_seed.mean()), len(per_seed)
    of_mean, of_both = _variances(replicates)
    larger = clusters / (clusters - 1)  # a bootstrap's variances are too small by the inverse
    # Where all prompts have the same difference, one more might have none.
    least = max(one_row, abs(estimate) / clusters)
    prompts = max(of_mean * larger, least**2)
    together, seeds = 0.0, math.nan
    alone = prompts
    if seeds_count > 1:
        together = min(of_both * larger, prompts)
        alone, observed = prompts - together, float(per_seed.var(ddof=1)) / seeds_count
        together, seeds = min(together, observed), max(0.0, observed - together)
    errors = Errors(prompts, alone, together, seeds, clusters, seeds_count)
    seed_sd = float(np.std(per_seed, ddof=1)) if seeds_count > 1 else math.nan
    return Effect.known_to(errors, estimate, confidence=confidence, seed_sd=seed_sd, per_seed=per_seed.tolist())


def without_lone_seeds(found: Sequence[Effect | None]) -> list[Effect | None]:
    """Return effects, those of a single seed without interval and p where others rest on several.

    Such an interval would hold for that run alone and look surer than theirs; the estimate stays.
    """
    several = any(one is not None and not one.errors.is_of_one_seed for one in found)
    return [
        replace(one, low=math.nan, high=math.nan, p=math.nan, standard_error=math.nan)
        if one and several and one.errors.is_of_one_seed
        else one
        for one in found
    ]


def tested_together(
    found: Sequence[Effect | None], *, confidence: float = 0.95, margins: Sequence[float] | None = None
) -> list[Effect | None]:
    """Return effects with their p adjusted for their number (Holm), of difference and of equivalence.

    One that rests on a single seed is no test where others rest on several, see `without_lone_seeds`. Differences and
    equivalences are two families: each keeps its level by itself, both together err at twice that level at most.

    Args:
        found: what is tested together; None is what could not be measured.
        confidence: 1 − it is the level.
        margins: of each, what counts as no difference; NaN for one that is not asked for equivalence.

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure"; Schuirmann 1987, "A comparison of the two
        one-sided tests procedure", for equivalence.
    """
    tested: list[Effect | None] = []
    for one, margin in zip(without_lone_seeds(found), margins or [math.nan] * len(found), strict=True):
        if one is None or math.isnan(margin) or math.isnan(one.p):
            tested.append(one)
            continue
        beyond, half = margin - abs(one.estimate), one.errors.half_width(2 * (1 - confidence))
        one_sided = one.errors.level(abs(beyond)) / 2
        tested.append(
            replace(
                one,
                margin=margin,
                inner_low=one.estimate - half,
                inner_high=one.estimate + half,
                p_equivalent=one_sided if beyond > 0 else 1 - one_sided,
            )
        )
    adjusted = holm(np.array([math.nan if one is None else one.p for one in tested]))
    equivalent = holm(np.array([math.nan if one is None else one.p_equivalent for one in tested]))
    return [
        one and replace(one, p_adjusted=float(p), p_equivalent_adjusted=float(other))
        for one, p, other in zip(tested, adjusted, equivalent, strict=True)
    ]


def mean_effect(found: Sequence[Effect], *, confidence: float = 0.95) -> Effect:
    """Return the mean of the same difference over independent data sets, each counted alike.

    Variances are added; the degrees of freedom of the sum are Satterthwaite's. What is said is said of these data sets.

    Args:
        found: of each data set.
        confidence: of the interval.

    Source:
        Satterthwaite 1946, "An approximate distribution of estimates of variance components".
    """
    count = len(found)
    parts = np.array([one.errors[:4] for one in found]) / count**2
    prompts, alone, together, seeds = parts.sum(0).tolist()

    def freedom(variances: Floats, of_each: Sequence[float]) -> float:
        squares = float((variances**2 / np.array(of_each)).sum())
        return float(variances.sum()) ** 2 / squares if squares > 0 else float(sum(of_each))

    runs = [one.errors.seed_freedom or one.errors.runs - 1 for one in found]
    errors = Errors(
        prompts,
        alone,
        together,
        seeds,
        1 + freedom(parts[:, 0], [one.errors.clusters - 1 for one in found]),
        sum(one.errors.runs for one in found),
        0 if math.isnan(seeds) else freedom(parts[:, 2] + parts[:, 3], runs),
    )
    return Effect.known_to(
        errors,
        float(np.mean([one.estimate for one in found])),
        confidence=confidence,
        seed_sd=float(np.mean([one.seed_sd**2 for one in found])) ** 0.5,
        per_seed=[value for one in found for value in one.per_seed],
    )


def hierarchical_replicates(per_seed: Floats, replicates: Floats, draws: Floats) -> Floats:
    """Return replicates of a mean over seeds, (repeats,), whose variance is that of prompts and of seeds.

    Drawn seeds are added as deviations from the mean of those observed, made larger by S/(S−1), which resampling S of them
    loses, and smaller by the part of their variance that the prompts already brought in.

    Args:
        per_seed: values as observed, (S,).
        replicates: over resampled prompts, (repeats, S).
        draws: uniform in [0, 1), (repeats, S or more); the same for all runs, which pairs them by seed.
    """
    seeds = len(per_seed)
    middle: Floats = replicates.mean(1)
    if seeds == 1:
        return middle
    observed = float(per_seed.var(ddof=1)) / seeds
    surplus = max(0.0, observed - _variances(replicates)[1])
    scale = (surplus / observed * seeds / (seeds - 1)) ** 0.5 if observed > 0 else 0.0
    drawn = per_seed[(draws[:, :seeds] * seeds).astype(int)]
    return middle + scale * (drawn.mean(1) - per_seed.mean())


def holm(p: Floats) -> Floats:
    """Return p values adjusted for their number by Holm's step-down; NaN stays NaN and counts for nothing."""
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted


def smallest_found(
    errors: Errors, *, more: float = 1.0, confidence: float = 0.95, power: float = 0.8, comparisons: int = 1
) -> float:
    """Return the difference that a comparison with such errors finds with a chance of `power`.

    The errors count as known. That few seeds tell theirs by chance costs little but where the level is very small: with three
    seeds and 23 comparisons the chance is 68 % instead of 80 %, with five seeds, or four comparisons, 76 to 80 %.

    Args:
        errors: of one that was made.
        more: how many times as many prompts it shall have.
        confidence: of its interval.
        power: the chance.
        comparisons: that are tested together; Holm's first step asks each for that part of the level.
    """
    return errors.half_width((1 - confidence) / comparisons, more) + errors.half_width(2 * (1 - power), more)


def prompts_needed(
    errors: Errors, difference: float, *, confidence: float = 0.95, power: float = 0.8, comparisons: int = 1
) -> float:
    """Return how many times as many prompts such a comparison needs to find a difference; infinite where seeds hide it.

    Args:
        errors: of one that was made; its number of seeds stays.
        difference: to be found.
        confidence: of the interval.
        power: chance to find it.
        comparisons: that are tested together.
    """

    def short(log_more: float) -> float:
        more = math.exp(log_more)
        return smallest_found(errors, more=more, confidence=confidence, power=power, comparisons=comparisons) - difference

    fewest, most = math.log(3 / errors.clusters), math.log(1e9)
    if short(most) >= 0:
        return math.inf
    return math.exp(fewest if short(fewest) <= 0 else optimize.brentq(short, fewest, most, xtol=1e-6))


def pareto_membership(costs: Floats, values: Floats) -> Floats:
    """Return in which share of replicates each point is on the front: no other costs no more and is worth no less.

    Args:
        costs: less is better, (repeats, points); NaN for a point that is not there.
        values: more is better, the same shape.
    """
    beaten = np.zeros(costs.shape, dtype=bool)
    for other in range(costs.shape[1]):
        cost, value = costs[:, other, None], values[:, other, None]
        beaten |= (cost <= costs) & (value >= values) & ((cost < costs) | (value > values))
    there = ~np.isnan(costs) & ~np.isnan(values)
    return np.asarray((there & ~beaten).sum(0) / np.maximum(1, there.sum(0)), dtype=np.float64)


def optimism_of_best(observed: Floats, replicates: Floats) -> float:
    """Return by how much the best of several points is expected to look better than it is, because it was picked.

    Points are picked again in every replicate, which scatter around the observed values drawn together: by as much as these
    differ by noise alone. Without that, noise would count twice, once in the observed values and once in the replicates,
    and the optimism of equal points would come out √½ times too small.

    Args:
        observed: more is better, (points,).
        replicates: of the same, (repeats, points). One that is not known at every point counts for nothing.
    """
    if len(observed) < 2:
        return 0.0
    noise = _known(replicates)
    noise = noise - noise.mean(0)
    within = float((noise - noise.mean(1, keepdims=True)).var(axis=0).sum()) / (len(observed) - 1)
    between = float(observed.var(ddof=1))
    kept = max(0.0, 1 - within / between) if between > 0 else 0.0
    drawn_together = observed.mean() + kept * (observed - observed.mean())
    again = drawn_together + noise
    best = again.argmax(1)
    return max(0.0, float((again[np.arange(len(again)), best] - drawn_together[best]).mean()))


def _known(replicates: Floats) -> Floats:
    """Those in which every column is known."""
    is_unknown = np.isnan(replicates)
    return replicates[~is_unknown.any(1)] if is_unknown.any() else replicates


def _variances(replicates: Floats) -> tuple[float, float]:
    """The variance of the mean over seeds, and what seeds and prompts do together, as part of it; 0 with one seed."""
    known = _known(replicates)
    centred, seeds = known - known.mean(0), known.shape[1]
    covariance = centred.T @ centred / len(known)
    of_mean = float(covariance.mean())
    return of_mean, max(0.0, float(covariance.trace()) / seeds - of_mean) / max(1, seeds - 1)

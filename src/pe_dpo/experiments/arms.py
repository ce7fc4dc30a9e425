"""What the arms of a comparison come to: means, paired differences with errors, the Pareto front, the best, the power."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.experiments import wording
from pe_dpo.experiments.comparison import Arm, Best, Difference, Power
from pe_dpo.experiments.matching import Paired, Point, against_line, against_point, paired_seeds
from pe_dpo.experiments.measured import Measured
from pe_dpo.metrics import statistics
from pe_dpo.metrics.catalogue import Metric
from pe_dpo.metrics.statistics import Effect, Floats

POINTS = 0.02
"""The difference of a share for which the needed pairs are told."""


class Findings(NamedTuple):
    """Arms and what follows from all of them."""

    arms: list[Arm]
    power: Power | None
    best: Best | None


class _Contrast(NamedTuple):
    """What points have more than something else, in their order; None where there is nothing to tell."""

    paired: list[Paired | None]
    effects: list[Effect | None]
    differences: list[Difference | None]


def find_arms(
    measured: Measured, points: Sequence[Point], line: Sequence[Point], metric: Metric[Any], *, seed: int, confidence: float
) -> Findings:
    """Return what the points come to.

    Args:
        measured: all observations.
        points: to tell about; the base point is the one without settings, else the first.
        line: those that make the line of equal KL.
        metric: that was measured.
        seed: of drawn seeds.
        confidence: of intervals.
    """
    base = next((point for point in points if not point.settings), points[0])

    one_row = 1 / _rows(measured, points[0], metric) if metric.is_share else 0.0

    def contrast(left_out: Sequence[Point], against: Callable[[Point], Paired], one_row: float) -> _Contrast:
        paired = [None if point in left_out else against(point) for point in points]
        return _contrast(paired, measured.prompts, one_row, confidence)

    matched = contrast(line, lambda point: against_line(measured, point, line), one_row)
    direct = contrast([base], lambda point: against_point(point, base, measured.values, measured.value_replicates), one_row)
    direct_kl = contrast([base], lambda point: against_point(point, base, measured.kl, measured.kl_replicates), 0.0)
    draws = np.random.default_rng([seed, 1]).random((len(measured.value_replicates), max(len(p.by_seed) for p in points)))
    values = _over_seeds(points, measured.values, measured.value_replicates, draws)
    front = _front(measured, points, values, draws, metric.direction)
    arms = [
        Arm(
            **_means(measured, point),
            is_baseline=point in line,
            matched=matched.differences[index],
            **_range(matched.paired[index]),
            direct=direct.differences[index],
            direct_kl=direct_kl.differences[index],
            mcnemar=_mcnemar(measured, point, base, metric),
            pareto=float(front[index]),
        )
        for index, point in enumerate(points)
    ]
    power = _power(measured, points, base, matched if any(matched.effects) else direct, metric, confidence)
    return Findings(arms, power, _best(measured, points, values, metric.direction))


def _rows(measured: Measured, point: Point, metric: Metric[Any]) -> int:
    """How many pairs or answers one observation has."""
    rows = measured.observations[point.columns[0]].rows(metric.kind)
    return len(rows) if rows else 0


def _contrast(paired: list[Paired | None], prompts: int, one_row: float, confidence: float) -> _Contrast:
    """Effects of all that was paired, with p adjusted for how many there are."""
    effects = [
        statistics.effect(one.per_seed, one.replicates, clusters=prompts, one_row=one_row, confidence=confidence)
        if one is not None and len(one.per_seed)
        else None
        for one in paired
    ]
    adjusted = statistics.holm(np.array([math.nan if effect is None else effect.p for effect in effects]))
    differences = [effect and _difference(effect, float(p)) for effect, p in zip(effects, adjusted, strict=True)]
    return _Contrast(paired, effects, differences)


def _difference(effect: Effect, p_adjusted: float) -> Difference:
    return Difference(
        estimate=effect.estimate,
        low=effect.low,
        high=effect.high,
        p=effect.p,
        p_adjusted=p_adjusted,
        standard_error=effect.standard_error,
        seed_sd=effect.seed_sd,
        per_seed=list(effect.per_seed),
    )


def _means(measured: Measured, point: Point) -> dict[str, Any]:
    """What an arm is, and comes to by itself."""
    values = measured.values[point.columns]
    return {
        "name": wording.point_name(point.settings),
        "settings": point.settings,
        "seeds": sorted(point.by_seed),
        "value": float(values.mean()),
        "value_sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        "kl": float(measured.kl[point.columns].mean()),
        "root_kl": float(measured.roots[point.columns].mean()),
    }


def _range(paired: Paired | None) -> dict[str, Any]:
    """For how many seeds an arm was in range of the line."""
    if paired is None:
        return {"seeds_in_range": 0, "seeds_compared": 0, "gap": math.nan}
    gap = float(np.mean(paired.gaps)) if paired.gaps else math.nan
    return {"seeds_in_range": len(paired.per_seed), "seeds_compared": paired.compared, "gap": gap}


def _over_seeds(points: Sequence[Point], observed: Floats, replicates: Floats, draws: Floats) -> Floats:
    """Replicates of every point's mean over seeds, (repeats, points); prompts and seeds are drawn for all points alike.

    NaN for a point that was not measured at every seed.
    """

    def one(at: list[int]) -> Floats:
        if np.isnan(observed[at]).any():
            return np.full(len(replicates), math.nan)
        return statistics.hierarchical_replicates(observed[at], replicates[:, at], draws)

    return np.stack([one(point.columns) for point in points], axis=1)


def _front(measured: Measured, points: Sequence[Point], values: Floats, draws: Floats, direction: int | None) -> Floats:
    """Share of replicates in which each point is on the front; the reference, which costs nothing, competes too."""
    if not direction:
        return np.full(len(points), math.nan)
    roots = _over_seeds(points, measured.roots, measured.root_replicates, draws)
    is_known = ~np.isnan(roots).all(axis=0)
    if not math.isnan(measured.reference):
        roots, values = np.c_[roots, np.zeros(len(roots))], np.c_[values, measured.reference_replicates]
    shares = statistics.pareto_membership(roots, direction * values)[: len(points)]
    return np.where(is_known, shares, math.nan)


def _outcomes(measured: Measured, point: Point, base: Point, metric: Metric[Any]) -> tuple[Floats, Sequence[str]] | None:
    """Differences of the single pairs of two runs of one seed, and the pairs' prompts; None for what is no share of pairs."""
    twins, right_or_wrong = paired_seeds(point.by_seed, base.by_seed), metric.numerator
    if not metric.is_share or metric.kind != "pairs" or not twins or right_or_wrong is None:
        return None
    ours = measured.observations[point.by_seed[twins[0][0]]].pairs
    theirs = measured.observations[base.by_seed[twins[0][1]]].pairs
    if ours is None or theirs is None:
        return None
    return right_or_wrong(ours) - right_or_wrong(theirs), ours.prompt_key


def _mcnemar(measured: Measured, point: Point, base: Point, metric: Metric[Any]) -> dict[str, float] | None:
    outcomes = _outcomes(measured, point, base, metric)
    if outcomes is None or len(point.by_seed) > 1 or point is base:
        return None
    gained, lost = int((outcomes[0] > 0).sum()), int((outcomes[0] < 0).sum())
    return {"gained": gained, "lost": lost, "p": statistics.mcnemar(gained, lost)}


def _power(
    measured: Measured, points: Sequence[Point], base: Point, contrast: _Contrast, metric: Metric[Any], confidence: float
) -> Power | None:
    """What 2 points take, in a comparison of average error: one alone does not know how much its few seeds scatter."""
    effects = [effect for effect in contrast.effects if effect is not None]
    if not effects:
        return None
    seeds = max(effect.errors.runs for effect in effects)
    errors = statistics.average_errors([effect.errors for effect in effects if effect.errors.runs == seeds])
    pairs = _rows(measured, points[0], metric)
    outcomes = [_outcomes(measured, point, base, metric) for point in points if point is not base]
    flips = [_flips(*one) for one in outcomes if one is not None]
    discordance, widening = np.mean(flips, axis=0).tolist() if flips else (math.nan, math.nan)
    return Power(
        unit=metric.kind.removesuffix("s"),
        pairs=pairs,
        seeds=seeds,
        needed=pairs * statistics.prompts_needed(errors, POINTS, confidence=confidence) if metric.is_share else math.nan,
        needed_for_two_runs=statistics.pairs_needed(discordance, POINTS, design_effect=widening, confidence=confidence)
        if flips
        else math.nan,
        smallest_found=statistics.smallest_found(errors, confidence=confidence),
        discordance=discordance,
        design_effect=widening,
        seed_sd=(errors.seeds * seeds) ** 0.5,
    )


def _flips(differences: Floats, prompts: Sequence[str]) -> tuple[float, float]:
    """Discordance of two runs, and the design effect of pairs that share prompts."""
    clusters = np.unique(list(prompts), return_inverse=True)[1]
    return float((differences**2).mean()), statistics.design_effect(differences, clusters)


def _best(measured: Measured, points: Sequence[Point], values: Floats, direction: int | None) -> Best | None:
    """The best of all ends of runs; snapshots and scaled adapters are no candidates of their own."""
    ends = [index for index, point in enumerate(points) if wording.is_end(point.settings)]
    if not direction or len(ends) < 2:
        return None
    means = direction * np.array([measured.values[points[index].columns].mean() for index in ends])
    optimism = statistics.optimism_of_best(means, direction * values[:, ends])
    best = int(means.argmax())
    return Best(
        name=wording.point_name(points[ends[best]].settings),
        points=len(ends),
        value=float(direction * means[best]),
        optimism=optimism,
        corrected=float(direction * (means[best] - optimism)),
    )

"""Points of a sweep apart by what a model ranks right and wrong: the metric on both sides, and the gap between them.

    point            π0 right (r_s)   π0 wrong (w_s)   gap  w_s − r_s      gap minus the base recipe's, seed by seed

Both sides of all runs are resampled over the same prompts, so that gaps, and differences between gaps, are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pe_dpo.errors import UsageError
from pe_dpo.experiments import summary
from pe_dpo.experiments.compare import check_names, is_per_token, why_missing
from pe_dpo.experiments.comparison import Method, as_json
from pe_dpo.experiments.resampled import Resampled, Setting, base_of, paired_seeds, settings_of
from pe_dpo.metrics import bootstrap
from pe_dpo.metrics.bootstrap import Effect
from pe_dpo.metrics.catalogue import METRICS, Metric
from pe_dpo.metrics.sides import RANKINGS, SIDES, By, of_side
from pe_dpo.runs.observations import Observation, data_sets, read_observations


@dataclass(frozen=True)
class SidePoint:
    """One setting apart by what a model ranks right and wrong.

    Each number is a mean over the seeds in which all that it is made of is known of two prompts or more, and None where there
    is no such seed. Of one seed, where others have several, it has neither interval nor p.
    """

    name: str
    """The setting, in words."""
    settings: dict[str, Any]
    """Dotted recipe key: value, where it differs from the base recipe."""
    seeds: list[int]
    """Those of the gap."""
    pairs: dict[str, float]
    """How many pairs are right, and wrong; mean over all seeds."""
    right: Effect | None
    """The metric of the pairs that are ranked right."""
    wrong: Effect | None
    """The same of those that are ranked wrong."""
    gap: Effect | None
    """Wrong minus right, paired by seed and prompt."""
    gap_direct: Effect | None
    """The gap minus that of the base recipe, tested by Holm over all settings; None for the base recipe itself."""


@dataclass(frozen=True)
class SideComparison:
    """What `compare_sides` found."""

    by: By
    per_token: bool
    """Whether the ranking is by log-probs per token."""
    metric: str
    is_share: bool
    confidence: float
    points: list[SidePoint]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it: numbers that are not finite become null."""
        return as_json(self)


def compare_sides(
    targets: Sequence[str | Path],
    *,
    by: By,
    metric: str | None = None,
    repeats: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> SideComparison:
    """Return a metric of runs, apart by what the reference or the policy ranks right and wrong.

    Args:
        targets: as `compare.compare`; sweeps of several data sets are told each by itself.
        by: whose ranking parts the held-out pairs, per token where all losses are (`reduce: mean`).
        metric: one of pairs; by default `accuracy/shift`, per token where all losses are.
        repeats: replicates of the bootstrap.
        seed: of the bootstrap.
        confidence: of intervals.

    Raises:
        UsageError: there is no such ranking or metric, or no run that has both; or as `compare.compare`.
    """
    method = Method(repeats, seed, confidence)
    method.check()
    if by not in RANKINGS:
        raise UsageError(f"`by` {by}: must be one of {', '.join(RANKINGS)}")
    check_names(metric, "beta")
    if metric and METRICS[metric].kind != "pairs":
        raise UsageError(f"`by` {by}: parts held-out pairs, and {metric} is of sampled answers; name a metric of pairs")
    read = {name: read_observations(group)[0] for name, group in data_sets(targets).items()}
    return compare_observed_sides(read, by=by, metric=metric, method=method)


def compare_observed_sides(
    read: Mapping[str, Sequence[Observation]], *, by: By, metric: str | None, method: Method
) -> SideComparison:
    """Return the same of what was read already, by the name of its data set.

    Raises:
        UsageError: no run has that ranking and metric.
    """
    per_token = is_per_token([one for observations in read.values() for one in observations])
    chosen = METRICS[metric or ("accuracy/shift_per_token" if per_token else "accuracy/shift")]
    points: list[SidePoint] = []
    for name, observations in read.items():
        usable = [
            one
            for one in observations
            if one.pairs and (by == "policy" or one.pairs.has_reference) and why_missing(chosen, one) is None
        ]
        if not usable:  # logs of TRL, say, which have means alone
            continue
        found = find_sides(usable, settings_of(usable), chosen, by, per_token=per_token, method=method)
        points += [replace(one, name=f"{name}: {one.name}") for one in found] if len(read) > 1 else found
    if not points:
        ranked = " and the reference's log-probs" if by == "reference" else ""
        raise UsageError(
            f"`by` {by}: no run has held-out pairs one by one with {chosen.key}{ranked}; measure them with pe-dpo eval"
        )
    return SideComparison(by, per_token, chosen.key, chosen.is_share, method.confidence, points)


def find_sides(
    observations: Sequence[Observation],
    settings: Sequence[Setting],
    metric: Metric[Any],
    by: By,
    *,
    per_token: bool,
    method: Method,
) -> list[SidePoint]:
    """Return each setting's metric on both sides, the gap, and by how much that differs from the base recipe's.

    Args:
        observations: all that are compared.
        settings: to tell about.
        metric: of pairs.
        by: whose ranking parts the pairs.
        per_token: whether by log-probs per token, of all runs alike.
        method: how differences are tested.
    """
    count, tables = len(observations), [one.pairs for one in observations]
    parts = [table and of_side(table, by, side, per_token=per_token) for side in SIDES for table in tables]
    both = Resampled(
        [one._replace(answers=None, pairs=part) for one, part in zip([*observations] * 2, parts, strict=True)],
        metric,
        repeats=method.repeats,
        seed=method.seed,
    )
    prompts, pairs = [len(set(part.prompt_key)) if part else 0 for part in parts], [len(part or ()) for part in parts]
    is_known = (np.array(prompts) > 1) & ~np.isnan(both.values)  # one prompt says nothing of others

    def effect(columns: Sequence[Sequence[int]], signs: Sequence[int]) -> Effect | None:
        """The mean over seeds of the metric in some columns, added with these signs."""
        known = [list(of_seed) for of_seed in columns if is_known[list(of_seed)].all()]
        if not known:
            return None
        used = {column for of_seed in known for column in of_seed}
        return bootstrap.effect(
            both.values[known] @ signs,
            both.value_replicates[:, known] @ signs,
            clusters=min(prompts[column] for column in used),
            one_row=1 / min(pairs[column] for column in used) if metric.is_share else 0.0,
            confidence=method.confidence,
        )

    base = base_of(settings)
    found: dict[str, list[Effect | None]] = {"right": [], "wrong": [], "gap": [], "gap_direct": []}
    for one in settings:
        twins = [] if one is base else paired_seeds(one.by_seed, base.by_seed)
        against = [(one.by_seed[seed], base.by_seed[twin]) for seed, twin in twins]
        found["right"].append(effect([(column,) for column in one.columns], (1,)))
        found["wrong"].append(effect([(count + column,) for column in one.columns], (1,)))
        found["gap"].append(effect([(count + column, column) for column in one.columns], (1, -1)))
        quads = [(count + ours, ours, count + theirs, theirs) for ours, theirs in against]
        found["gap_direct"].append(effect(quads, (1, -1, -1, 1)))
    found = {name: bootstrap.without_lone_seeds(effects) for name, effects in found.items()}
    if metric.is_share:  # with few seeds an interval would go beyond 0 and 1, where a share cannot be
        for side in SIDES:
            found[side] = [
                one and replace(one, low=float(np.clip(one.low, 0, 1)), high=float(np.clip(one.high, 0, 1)))
                for one in found[side]
            ]
    found["gap_direct"] = bootstrap.tested_together(found["gap_direct"], confidence=method.confidence)
    return [
        SidePoint(
            name=summary.setting_name(one.settings),
            settings=one.settings,
            seeds=sorted(seed for seed, column in one.by_seed.items() if is_known[[column, count + column]].all()),
            pairs={
                side: float(np.mean([pairs[at * count + column] for column in one.columns])) for at, side in enumerate(SIDES)
            },
            **{name: effects[number] for name, effects in found.items()},
        )
        for number, one in enumerate(settings)
    ]

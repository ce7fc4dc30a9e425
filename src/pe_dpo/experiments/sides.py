"""Points of a sweep apart by what a model ranks right and wrong: the metric on both sides, and the gap between them.

    point            π0 right (r_s)   π0 wrong (w_s)   gap  w_s − r_s      gap minus the base recipe's, seed by seed

Both sides of all runs are resampled over the same prompts, so that gaps, and differences between gaps, are paired.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pe_dpo.disk import json_without_nan
from pe_dpo.errors import UsageError
from pe_dpo.experiments import summary
from pe_dpo.experiments.compare import check_names, why_missing
from pe_dpo.experiments.comparison import SCALE, STEP
from pe_dpo.experiments.resampled import Resampled, Setting, paired_seeds, settings_of
from pe_dpo.metrics import bootstrap
from pe_dpo.metrics.bootstrap import Effect
from pe_dpo.metrics.catalogue import METRICS, Metric
from pe_dpo.metrics.sides import RANKINGS, SIDES, By, of_side
from pe_dpo.metrics.table import Floats
from pe_dpo.runs.observations import Observation, data_sets, read_observations


@dataclass(frozen=True)
class SidePoint:
    """One setting apart by what a model ranks right and wrong; means over the seeds that have both sides."""

    name: str
    settings: dict[str, Any]
    seeds: list[int]
    pairs: dict[str, float]
    """How many are right, and wrong; mean over seeds."""
    right: Effect | None
    """The metric of the pairs that are ranked right, with its interval; None where no run has any."""
    wrong: Effect | None
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
        found: dict[str, Any] = json_without_nan(asdict(self))
        for effect in (point[key] for point in found["points"] for key in ("right", "wrong", "gap", "gap_direct")):
            if effect is not None:
                del effect["errors"]  # what its interval and p are made of
        return found


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
        targets: As `compare.compare`; sweeps of several data sets are told each by itself.
        by: Whose ranking parts the held-out pairs, per token where all losses are (`reduce: mean`).
        metric: One of pairs; by default `accuracy/shift`, per token where all losses are.
        repeats: Replicates of the bootstrap.
        seed: Of the bootstrap.
        confidence: Of intervals.

    Raises:
        UsageError: the ranking or the metric is none, or nothing has it; or as `compare.compare`.
    """
    if by not in RANKINGS:
        raise UsageError(f"`by` {by}: must be one of {', '.join(RANKINGS)}")
    check_names(metric, "beta")
    if metric and METRICS[metric].kind != "pairs":
        raise UsageError(f"`by` {by}: parts held-out pairs, and {metric} is of sampled answers; name a metric of pairs")
    read = {str(one[0]): read_observations(one)[0] for one in data_sets(targets)}
    pairs = [one.pairs for observations in read.values() for one in observations if one.pairs is not None]
    per_token = bool(pairs) and all(table.reduce == "mean" for table in pairs)
    chosen = METRICS[metric or f"accuracy/shift{'_per_token' if per_token else ''}"]
    points: list[SidePoint] = []
    for name, observations in read.items():
        usable = [one for one in observations if one.pairs and one.pairs.has_reference and why_missing(chosen, one) is None]
        if not usable:  # logs of TRL, say, which have means alone
            continue
        settings = [one for one in settings_of(usable) if STEP not in one.settings or set(one.settings) == {STEP}]
        settings = sorted(settings, key=lambda one: SCALE in one.settings)
        found = find_sides(usable, settings, chosen, by, per_token=per_token, repeats=repeats, seed=seed, confidence=confidence)
        points += [replace(one, name=f"{Path(name).name}: {one.name}") for one in found] if len(read) > 1 else found
    if not points:
        raise UsageError(f"`by` {by}: no run has held-out pairs one by one with {chosen.key}; measure them with pe-dpo eval")
    return SideComparison(by, per_token, chosen.key, chosen.is_share, confidence, points)


def find_sides(
    observations: Sequence[Observation],
    settings: Sequence[Setting],
    metric: Metric[Any],
    by: By,
    *,
    per_token: bool,
    repeats: int,
    seed: int,
    confidence: float,
) -> list[SidePoint]:
    """Return each setting's metric on both sides, the gap, and by how much that differs from the base recipe's.

    Args:
        observations: All that are compared.
        settings: To tell about; the base is the one that changes nothing, else the first.
        metric: Of pairs.
        by: Whose ranking parts the pairs.
        per_token: Whether by log-probs per token, of all runs alike.
        repeats: Replicates of the bootstrap.
        seed: Of the draws.
        confidence: Of intervals.
    """
    parts = [
        one._replace(answers=None, pairs=one.pairs and of_side(one.pairs, by, side, per_token=per_token))
        for side in SIDES
        for one in observations
    ]
    both, count = Resampled(parts, metric, repeats=repeats, seed=seed), len(observations)
    prompts = [0 if one.pairs is None else len({*one.pairs.prompt_key}) for one in parts]
    pairs = [0 if one.pairs is None else len(one.pairs) for one in parts]

    def effect(observed: Floats, replicates: Floats, columns: Sequence[int]) -> Effect | None:
        if not columns:
            return None
        clusters, rows = max(2, min(prompts[column] for column in columns)), min(pairs[column] for column in columns)
        one_row = 1 / rows if metric.is_share else 0.0
        return bootstrap.effect(observed, replicates, clusters=clusters, one_row=one_row, confidence=confidence)

    def possible(found: Effect | None) -> Effect | None:
        """With few seeds an interval of a share would go beyond 0 and 1, where the share cannot be."""
        if found is None or not metric.is_share:
            return found
        return replace(found, low=float(np.clip(found.low, 0, 1)), high=float(np.clip(found.high, 0, 1)))

    # Of each setting, seed by seed: the columns of both sides, where both have the metric.
    columns = {
        id(one): {
            seed: (column, count + column)
            for seed, column in one.by_seed.items()
            if not np.isnan(both.values[[column, count + column]]).any()
        }
        for one in settings
    }
    base = columns[id(next((one for one in settings if not one.settings), settings[0]))]
    arms, differences = [], []
    for one in settings:
        its = columns[id(one)]
        right, wrong = ([side[at] for side in its.values()] for at in range(2))
        value, replicates = both.values, both.value_replicates
        gap = effect(value[wrong] - value[right], replicates[:, wrong] - replicates[:, right], [*right, *wrong])
        quads = [(*its[seed], *base[twin]) for seed, twin in paired_seeds(its, base)] if its is not base else []
        a, b, c, d = ([quad[at] for quad in quads] for at in range(4))
        more = value[b] - value[a] - value[d] + value[c]
        of_replicates = replicates[:, b] - replicates[:, a] - replicates[:, d] + replicates[:, c]
        differences.append(effect(more, of_replicates, [*a, *b, *c, *d]))
        arms.append(
            SidePoint(
                name=summary.setting_name(one.settings),
                settings=one.settings,
                seeds=sorted(its),
                pairs={
                    side: float(np.mean([pairs[at * count + column] for column in one.columns]))
                    for at, side in enumerate(SIDES)
                },
                right=possible(effect(value[right], replicates[:, right], right)),
                wrong=possible(effect(value[wrong], replicates[:, wrong], wrong)),
                gap=gap,
                gap_direct=None,
            )
        )
    tested = bootstrap.tested_together(differences, confidence=confidence)
    return [replace(arm, gap_direct=found) for arm, found in zip(arms, tested, strict=True)]

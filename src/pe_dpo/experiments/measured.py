"""Metric and KL of many observations, as observed and over prompts drawn with replacement, the same draws for all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.errors import UsageError
from pe_dpo.metrics.catalogue import METRICS, Metric
from pe_dpo.metrics.statistics import Floats, resampled_ratios
from pe_dpo.runs.observations import Observation

FEWEST_PROMPTS = 5
"""To resample: below that an interval would be a guess."""


class Measured(NamedTuple):
    """J observations; nats, and √nats for roots."""

    observations: list[Observation]
    values: Floats
    """The metric, (J,)."""
    kl: Floats
    """(J,); NaN without sampled answers."""
    value_replicates: Floats
    """(repeats, J)."""
    kl_replicates: Floats
    """(repeats, J)."""
    reference: float
    """The metric of π0; NaN where the line of equal KL does not begin there."""
    reference_replicates: Floats
    """(repeats,)."""
    roots: Floats
    """√KL, (J,)."""
    root_replicates: Floats
    """(repeats, J)."""
    prompts: int
    """Clusters that were resampled."""
    kl_prompts: int


def measure(observations: Sequence[Observation], metric: Metric[Any], *, repeats: int, seed: int) -> Measured:
    """Return the metric and the KL of observations that all have the metric's rows.

    KL is measured on the prompts to which every observation with answers has some. Replicates that draw none of them are left
    out, of which there are few if any.

    Args:
        observations: at least one.
        metric: what to measure.
        repeats: replicates.
        seed: of the draws.

    Raises:
        UsageError: there are fewer than FEWEST_PROMPTS prompts to resample.
    """
    answered = _common_prompts(observations)
    if metric.kind == "answers":
        keys = sorted(answered)
    else:
        keys = sorted(answered.union(*(set(one.pairs.prompt_key) for one in observations if one.pairs)))
    if len(keys) < FEWEST_PROMPTS:
        raise UsageError(f"runs share {len(keys)} prompts, of which no interval can be made; hold out more (data.eval)")
    at = {key: index for index, key in enumerate(keys)}
    nothing = np.zeros(len(keys)), np.zeros(len(keys))
    kl_at = {key: index for key, index in at.items() if key in answered}

    def drift(one: Observation) -> tuple[Floats, Floats]:
        return METRICS["kl"].sums(one.answers, kl_at, size=len(keys)) if one.answers else nothing

    rows = [one.rows(metric.kind) for one in observations]
    parts = [metric.sums(part, at) if part else nothing for part in rows]
    parts += [drift(one) for one in observations]
    parts.append((metric.reference_sums(rows[0], at) if rows[0] else None) or nothing)
    numerators, denominators = (np.stack(side, axis=1) for side in zip(*parts, strict=True))
    with np.errstate(invalid="ignore"):
        observed = numerators.sum(0) / denominators.sum(0)
    replicates = resampled_ratios(numerators, denominators, repeats=repeats, seed=seed)
    whole = ~np.isnan(replicates[:, ~np.isnan(observed)]).any(1)
    replicates, count = replicates[whole], len(observations)
    return Measured(
        observations=list(observations),
        values=observed[:count],
        kl=observed[count:-1],
        value_replicates=replicates[:, :count],
        kl_replicates=replicates[:, count:-1],
        reference=float(observed[-1]),
        reference_replicates=replicates[:, -1],
        roots=_root(observed[count:-1]),
        root_replicates=_root(replicates[:, count:-1]),
        prompts=len(keys),
        kl_prompts=len(answered),
    )


def _common_prompts(observations: Sequence[Observation]) -> set[str]:
    """Prompts to which all observations that have answers have some."""
    found = [set(one.answers.prompt_key) for one in observations if one.answers]
    return set.intersection(*found) if found else set()


def _root(kl: Floats) -> Floats:
    """√KL; an estimate below 0, which no KL is, counts as 0."""
    root: Floats = np.sqrt(np.maximum(kl, 0))
    return root

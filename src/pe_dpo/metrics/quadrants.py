"""Which pairs drive the learning: policy right or wrong × reference right or wrong.

                      π0 right (Δ0 > 0)      π0 wrong (Δ0 < 0)
    π right (Δπ > 0)  kept                   gained
    π wrong (Δπ < 0)  lost                   not yet

A pair is right when it ranks chosen above rejected. Ties (Δ exactly 0) are in none of the four and are counted apart. The share
of gradient weight tells where the loss pulls: with γ > β on pairs that π0 already ranks right, with γ < β on the others.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pe_dpo.links import LinkName, link_named, link_weight
from pe_dpo.metrics.estimates import changed_sides, length_slope, mean_change, right
from pe_dpo.metrics.table import Floats, Model, PairTable

QUADRANT_TITLES = {
    "policy_right_reference_right": "both rank right",
    "policy_right_reference_wrong": "only the policy ranks right (gained)",
    "policy_wrong_reference_right": "only the reference ranks right (lost)",
    "policy_wrong_reference_wrong": "both rank wrong",
}
"""Key of each quadrant and what it says in words."""
QUADRANTS = tuple(QUADRANT_TITLES)
WAYS = ("regimes", "regimes_per_token", "regimes_length_matched")
"""By summed log-probs, which mostly measure length; per token; and as if all answers of a pair were of equal length."""
SATURATED = 0.05
"""A weight within this share of none, or of the largest that the link can give, no longer says how right a pair is."""


def preference(table: PairTable, model: Model, way: str) -> Floats:
    """Return Δ of each pair in one of the WAYS.

    Matched on length, the reference's slope on length is taken off the preferences of all models, since no training moves it:
    so policy and reference agree at step 0 here too.
    """
    if way != "regimes_length_matched":
        return table.delta(model, per_token=way == "regimes_per_token")
    slope = length_slope(table.delta("reference"), table.length_difference)
    return table.delta(model) - slope * table.length_difference


def quadrant_metrics(table: PairTable, way: str) -> dict[str, float]:
    """Return the numbers of `quadrants` for a table whose reference was run, named `way/…`."""
    policy, reference = (preference(table, model, way) for model in ("policy", "reference"))
    change = policy - preference(table, "initial", way) if table.knows("initial_chosen") else None
    found = quadrants(policy, reference, table.score, table.weight, change)
    return {f"{way}/{name}": value for name, value in found.items()}


def quadrants(
    policy: ArrayLike, reference: ArrayLike, score: ArrayLike, weight: ArrayLike, change: ArrayLike | None = None
) -> dict[str, float]:
    """Return counts of pairs and shares of gradient weight for policy right/wrong × reference right/wrong.

    Args:
        policy: Δπ, (N,) nats.
        reference: Δ0, (N,) nats.
        score: z, (N,).
        weight: −∂loss/∂(βΔπ), (N,).
        change: of Δπ since step 0, (N,) nats; None where it is not known.

    Returns:
        `ties`: pairs with Δπ or Δ0 exactly 0. `satisfied_early`: pairs with z >= 0 although Δπ < 0, so that the loss is content
        with a wrong order. For each of QUADRANTS `…/pairs` and `…/weight_share` (of Σ|w|; 0 when no pair has any weight), and
        where it is not empty `…/active` (share with z < 0, on which a hinge pulls), `…/mean_score`, `…/mean_change`.

    Source:
        Cho, "Continued musing on DPO", for the table; Meng et al. 2024 and HyPO (arXiv 2602.11902) for early satisfaction.
    """
    policy, reference, score, weight = (np.asarray(values, dtype=np.float64) for values in (policy, reference, score, weight))
    cell, pull = _cells(policy, reference), np.abs(weight)
    columns = {"active": score < 0, "mean_score": score} | ({} if change is None else {"mean_change": np.asarray(change)})
    total = float(pull.sum())
    found: dict[str, float] = {
        "ties": int(((policy == 0) | (reference == 0)).sum()),
        "satisfied_early": int(((score >= 0) & (policy < 0)).sum()),
    }
    for number, name in enumerate(QUADRANTS):
        members = cell == number
        pairs = int(members.sum())
        found[f"{name}/pairs"] = pairs
        found[f"{name}/weight_share"] = float(pull[members].sum()) / total if total != 0 else 0.0
        if pairs:
            found |= {f"{name}/{what}": float(values[members].mean()) for what, values in columns.items()}
    return found


def transitions(before: ArrayLike, now: ArrayLike, prompt_keys: Sequence[str] | None = None) -> dict[str, float]:
    """Return how many pairs changed sides between two rankings, and whether more did so one way than the other.

    Args:
        before: Δ of one ranking, say that at step 0, (N,).
        now: Δ of the other.
        prompt_keys: (N,), where pairs share prompts.

    Returns:
        `kept`, `gained`, `lost`, `not_yet`: counts of pairs; one that is tied or has no number on either side is in none.
        `p_value`: that of `changed_sides`; without prompts each pair counts as an independent one.
    """
    counts = np.bincount(_cells(now, before), minlength=len(QUADRANTS) + 1).tolist()
    before, now = (right(np.asarray(values, dtype=np.float64)) for values in (before, now))
    changed = changed_sides(before, now, range(len(before)) if prompt_keys is None else prompt_keys)
    return {**dict(zip(("kept", "gained", "lost", "not_yet"), counts, strict=False)), "p_value": changed.p}


def clustered_transitions(before: Floats, now: Floats, prompt_keys: Sequence[str]) -> dict[str, float]:
    """Return the same, with the pairs that are tied and by how much the share ranked right changed.

    Returns:
        As `transitions`; `tied`: pairs with a tie in either; `change` of the share ranked right, ties counted ½, with its
        95 % interval `low` and `high` (NaN with fewer than two prompts). A pair without a number in either is in none of them;
        without any pair that has, `change` is NaN.
    """
    known = np.flatnonzero(~(np.isnan(before) | np.isnan(now))).tolist()
    if not known:
        return transitions(before, now) | {"tied": 0, "change": math.nan, "low": math.nan, "high": math.nan}
    before, now, prompt_keys = before[known], now[known], [prompt_keys[row] for row in known]
    change, low, high = mean_change(right(now) - right(before), prompt_keys)
    tied = int(((before == 0) | (now == 0)).sum())
    return transitions(before, now, prompt_keys) | {"tied": tied, "change": change, "low": low, "high": high}


def effective_pairs(weight: ArrayLike) -> float:
    """Return (Σ|w|)²/Σw²: how many equally weighted pairs would pull as evenly; 0 when no pair has any weight."""
    pull = np.abs(np.asarray(weight, dtype=np.float64))
    squares = float((pull**2).sum())
    return float(pull.sum()) ** 2 / squares if squares else 0.0


def saturation(score: ArrayLike, link: LinkName) -> tuple[float, float] | None:
    """Return the shares of pairs whose weight is nearly none, and nearly the largest; None where the link has no such thing.

    The logistic link's slope is σ(−z), at most 1. A hinge's is 0 or 1 and nothing between (its active share says it all), and a
    squared link's grows without end: neither saturates.

    Args:
        score: z, (N,).
        link: of the loss.
    """
    if not link_named(link).saturates:
        return None
    weight = link_weight(link, np.asarray(score, dtype=np.float64)) / link_named(link).largest_weight
    return float((weight < SATURATED).mean()), float((weight > 1 - SATURATED).mean())


def _cells(policy: ArrayLike, reference: ArrayLike) -> NDArray[np.int64]:
    """Index of each pair's cell in QUADRANTS, (N,); after the last one come ties and what is not a number."""
    policy, reference = (np.sign(np.asarray(values, dtype=np.float64)) for values in (policy, reference))
    return np.where(np.abs(policy * reference) == 1, 2 * (policy < 0) + (reference < 0), len(QUADRANTS))

"""Which pairs drive the learning: policy right or wrong × reference right or wrong.

                      π0 right (Δ0 > 0)      π0 wrong (Δ0 < 0)
    π right (Δπ > 0)  kept                   gained
    π wrong (Δπ < 0)  lost                   not yet

A pair is right when it ranks chosen above rejected. Ties (Δ exactly 0) are in none of the four and are counted apart. The share
of gradient weight tells where the loss pulls: with γ > β on pairs that π0 already ranks right, with γ < β on the others.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pe_dpo.links import LinkName, link_named, link_weight

QUADRANT_TITLES = {
    "policy_right_reference_right": "both rank right",
    "policy_right_reference_wrong": "only the policy ranks right (gained)",
    "policy_wrong_reference_right": "only the reference ranks right (lost)",
    "policy_wrong_reference_wrong": "both rank wrong",
}
"""Key of each cell and what it says in words."""
QUADRANTS = tuple(QUADRANT_TITLES)

SATURATED = 0.05
"""A weight within this share of none, or of the largest that the link can give, no longer says how right a pair is."""


class Quadrant(NamedTuple):
    """One cell of the 2×2 table."""

    pairs: int
    weight_share: float
    """Share of the summed size of gradient weights; 0 when no pair has any weight, NaN when one is NaN."""
    active: int
    """Pairs whose score is below 0, the ones a hinge still pulls on."""
    mean_score: float
    """Mean z, NaN for an empty cell."""
    mean_change: float = math.nan
    """Mean change of Δπ since step 0, NaN for an empty cell or where step 0 is not known."""


class RegimeTable(NamedTuple):
    """The 2×2 table of one set of pairs."""

    quadrants: dict[str, Quadrant]
    """Keyed by QUADRANTS."""
    ties: int
    """Pairs with Δπ or Δ0 exactly 0."""
    effective_pairs: float
    """(Σ|w|)²/Σw²: how many equally weighted pairs would pull as evenly; 0 when no pair has any weight."""
    satisfied_early: int
    """Pairs with z >= 0 although Δπ < 0: the loss is content with a wrong order."""


class Transitions(NamedTuple):
    """McNemar's table: pairs ranked right or wrong at step 0 × now; a pair that is tied on either side is in none."""

    kept: int
    gained: int
    lost: int
    not_yet: int
    p_value: float
    """Two-sided exact p of as many pairs gained as lost, 1 when none changed; each pair counts as an independent one."""


class Saturation(NamedTuple):
    """Shares of pairs whose weight no longer says how right they are."""

    low: float
    """Weight below SATURATED of the largest: the loss is done with them."""
    high: float
    """Weight above 1 − SATURATED of the largest: far from what the loss asks, all pulled on alike."""


def regime_table(
    policy_preference: Tensor, reference_preference: Tensor, score: Tensor, weight: Tensor, change: Tensor | None = None
) -> RegimeTable:
    """Return counts and shares of gradient weight for policy right/wrong × reference right/wrong.

    Args:
        policy_preference: Δπ, (B,) nats.
        reference_preference: Δ0, (B,) nats.
        score: z, (B,).
        weight: −∂loss/∂(βΔπ), (B,).
        change: of Δπ since step 0, (B,) nats; None where it is not known.

    Source:
        Cho, "Continued musing on DPO", the table of γ ≫ 0 against γ = 0; Meng et al. 2024 and HyPO (arXiv 2602.11902) for
        early satisfaction.
    """
    cell, pull = _cells(policy_preference, reference_preference), weight.abs()
    total, squares = float(pull.sum()), float(pull.square().sum())

    def sums(values: Tensor) -> list[float]:
        summed: list[float] = torch.bincount(cell, weights=values, minlength=len(QUADRANTS) + 1).tolist()
        return summed

    columns = zip(
        QUADRANTS,
        torch.bincount(cell, minlength=len(QUADRANTS)).tolist(),
        sums(pull),
        sums((score < 0).double()),
        sums(score),
        [math.nan] * len(QUADRANTS) if change is None else sums(change),
        strict=False,  # the sums have one cell more, the ties
    )
    return RegimeTable(
        quadrants={
            name: Quadrant(
                pairs, share / total if total != 0 else 0.0, int(active), _ratio(scores, pairs), _ratio(moved, pairs)
            )
            for name, pairs, share, active, scores, moved in columns
        },
        ties=int(((policy_preference == 0) | (reference_preference == 0)).sum()),
        effective_pairs=total**2 / squares if squares != 0 else 0.0,
        satisfied_early=int(((score >= 0) & (policy_preference < 0)).sum()),
    )


def transitions(before: Tensor, now: Tensor) -> Transitions:
    """Return which pairs changed sides since step 0, and whether more did so one way than the other.

    Args:
        before: Δπ at step 0, (B,).
        now: Δπ, (B,).

    Example:
        10 gained and 2 lost: p = 2·(1 + 12 + 66)/2¹² = 0.039.

    Source:
        McNemar 1947, in its exact form: a binomial test of gained against lost.
    """
    kept, gained, lost, not_yet, _ = torch.bincount(_cells(now, before), minlength=len(QUADRANTS) + 1).tolist()
    return Transitions(kept, gained, lost, not_yet, mcnemar(gained, lost))


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p of `gained` against `lost` under equal chances."""
    from scipy.special import bdtr  # dear to import

    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def saturation(score: Tensor, link: LinkName) -> Saturation | None:
    """Return the shares of pairs whose weight is nearly none, or nearly the largest; None where the link has no such thing.

    The logistic link's slope is σ(−z), at most 1. A hinge's is 0 or 1 and nothing between (its active share says it all), and a
    squared link's grows without end: neither saturates.

    Args:
        score: z, (B,).
        link: of the loss.
    """
    if not link_named(link).saturates:
        return None
    weight = link_weight(link, score.numpy()) / link_named(link).largest_weight
    return Saturation(float((weight < SATURATED).mean()), float((weight > 1 - SATURATED).mean()))


def length_slope(preference: Tensor, length_difference: Tensor) -> float:
    """Return by how many nats a preference changes with each token that the chosen answer is longer; 0 if all differ alike.

    The slope of a least-squares line with an intercept. Δ − slope·(|chosen| − |rejected|) is the preference as it would be
    between answers of equal length; the intercept stays, since it is no effect of length.

    Args:
        preference: Δ, (B,) nats, summed over tokens.
        length_difference: |chosen| − |rejected|, (B,) tokens.
    """
    centred = length_difference - length_difference.mean()
    spread = float(centred.square().sum())
    return float((centred * preference).sum()) / spread if spread > 0 else 0.0


def correlation(one: Tensor, other: Tensor) -> float:
    """Return Pearson's correlation of two (B,) tensors; NaN where one of them is constant."""
    one, other = one - one.mean(), other - other.mean()
    return _ratio(float((one * other).sum()), math.sqrt(float(one.square().sum()) * float(other.square().sum())))


def share_right(preference: Tensor) -> float:
    """Return the share of pairs with Δ > 0; a tie counts one half (so that step 0 of DPO shows 0.5, not 0)."""
    return float(((preference > 0).double() + 0.5 * (preference == 0).double()).mean()) if preference.numel() else float("nan")


def is_dead(weight: Tensor) -> bool:
    """Return whether no pair pulls at all, so that training cannot move."""
    return not bool(torch.any(weight != 0))


def _cells(policy_preference: Tensor, reference_preference: Tensor) -> Tensor:
    """Index of each pair's cell in QUADRANTS, (B,); after the last one come ties and what is not a number."""
    is_decided = (policy_preference != 0) & (reference_preference != 0)
    is_decided &= ~(policy_preference.isnan() | reference_preference.isnan())
    return torch.where(is_decided, 2 * (policy_preference < 0) + (reference_preference < 0).long(), len(QUADRANTS))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

"""Which pairs drive the learning: policy right or wrong × reference right or wrong.

                      π0 right (Δ0 > 0)      π0 wrong (Δ0 < 0)
    π right (Δπ > 0)  kept                   gained
    π wrong (Δπ < 0)  lost                   not yet

A pair is right when it ranks chosen above rejected. Ties (Δ exactly 0) are in none of the four and are counted apart. The share
of gradient weight tells where the loss pulls: with γ > β on pairs that π0 already ranks right, with γ < β on the others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

QUADRANT_TITLES = {
    "policy_right_reference_right": "both rank right",
    "policy_right_reference_wrong": "only the policy ranks right (gained)",
    "policy_wrong_reference_right": "only the reference ranks right (lost)",
    "policy_wrong_reference_wrong": "both rank wrong",
}
"""Key of each cell and what it says in words."""
QUADRANTS = tuple(QUADRANT_TITLES)


class Quadrant(NamedTuple):
    """One cell of the 2×2 table."""

    pairs: int
    weight_share: float
    """Share of the summed size of gradient weights; 0 when no pair has any weight, NaN when one is NaN."""
    active: int
    """Pairs whose score is below 0, the ones a hinge still pulls on."""
    mean_score: float
    """Mean z, NaN for an empty cell."""


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


def regime_table(policy_preference: Tensor, reference_preference: Tensor, score: Tensor, weight: Tensor) -> RegimeTable:
    """Return counts and shares of gradient weight for policy right/wrong × reference right/wrong.

    Args:
        policy_preference: Δπ, (B,) nats.
        reference_preference: Δ0, (B,) nats.
        score: z, (B,).
        weight: −∂loss/∂(βΔπ), (B,).

    Source:
        Cho, "Continued musing on DPO", the table of γ ≫ 0 against γ = 0; Meng et al. 2024 and HyPO (arXiv 2602.11902) for
        early satisfaction.
    """
    pull = weight.abs()
    total = pull.sum()
    quadrants = {}
    for name, policy_sign, reference_sign in zip(QUADRANTS, (1, 1, -1, -1), (1, -1, 1, -1), strict=True):
        member = (policy_preference.sign() == policy_sign) & (reference_preference.sign() == reference_sign)
        quadrants[name] = Quadrant(
            pairs=int(member.sum()),
            weight_share=float(pull[member].sum() / total) if total != 0 else 0.0,
            active=int((member & (score < 0)).sum()),
            mean_score=float(score[member].mean()) if member.any() else float("nan"),
        )
    squares = pull.square().sum()
    return RegimeTable(
        quadrants=quadrants,
        ties=int(((policy_preference == 0) | (reference_preference == 0)).sum()),
        effective_pairs=float(total.square() / squares) if squares != 0 else 0.0,
        satisfied_early=int(((score >= 0) & (policy_preference < 0)).sum()),
    )


def share_right(preference: Tensor) -> float:
    """Return the share of pairs with Δ > 0; a tie counts one half (so that step 0 of DPO shows 0.5, not 0)."""
    return float(((preference > 0).double() + 0.5 * (preference == 0).double()).mean()) if preference.numel() else float("nan")


def is_dead(weight: Tensor) -> bool:
    """Return whether no pair pulls at all, so that training cannot move."""
    return not bool(torch.any(weight != 0))

"""What training will make of a pair, known before it begins: closed forms for a pair with two logits of its own.

    dz/dt = −2β²·link′(z)        score z of a pair under gradient flow, when no other pair moves its answers
    with λ on the rejected answer      dz/dt = −(1+λ²)β²·link′(z),   dΔπ/dz = (1+λ)/((1+λ²)β)
    logistic     e^z + z = e^z₀ + z₀ + 2β²t
    hinge        z = min(0, z₀ + 2β²t) from z₀ < 0, and z₀ where it starts at 0 or above
    squared      z = z₀·e^(−4β²t)

Real pairs share weights, so these are what the loss alone would do; they say which pairs it cannot reach in any sensible time.
Everything is told by scores: the score at step 0, and the score at a tie (Δπ = 0), which the loss gives for any margin, floor
and length penalty. Label smoothing and the SFT term are left out of the flows.

Source: SCIENCE of the test bed (checked against Euler steps); Chen et al. 2024 (arXiv 2405.19534) for flips and ideal accuracy.
"""

import math
from typing import assert_never

import numpy as np

from pe_dpo.links import LinkName
from pe_dpo.objective import Loss


def time_to_pass(
    start: np.ndarray,
    goal: np.ndarray,
    *,
    beta: float | np.ndarray,
    link: LinkName = "logistic",
    rejected_weight: float = 1.0,
    weight: float | np.ndarray = 1.0,
) -> np.ndarray:
    """Return the time until each score has risen above a goal: 0 where it starts there, infinite where it never will.

    With the score at a tie as the goal, this is the time until a pair that is ranked wrong flips.

    Args:
        start: z at time 0, (B,) float64.
        goal: (B,).
        beta: coefficient of the policy, > 0, of all pairs or of each.
        link: of the loss.
        rejected_weight: λ > 0 of the loss.
        weight: what the loss is multiplied by, >= 0, of all pairs or of each.

    Example:
        c = 50 nats wrong, β = γ = 0.1, margin 0: from z = 0 to z = γc = 5 in (e⁵ + 5 − 1)/(2β²) = 152.4/(2β²); with γ = 0 from
        −5 to 0 in 6.0/(2β²).
    """
    rise = goal - start
    with np.errstate(all="ignore"):  # what overflows takes longer than a number can tell
        match link:
            case "logistic":
                units = np.exp(goal) * -np.expm1(-rise) + rise  # e^goal − e^start without cancellation, and without inf − inf
            case "hinge":
                units = np.where(goal < 0, rise, math.inf)
            case "squared":
                units = np.where((start < 0) & (goal < 0), 0.5 * np.log(start / goal), math.inf)
            case _:
                assert_never(link)
        return np.where(rise <= 0, 0.0, units / ((1 + rejected_weight**2) * beta**2 * weight))


def flow_score_at_tie(
    score: np.ndarray, preference: np.ndarray, *, beta: float | np.ndarray, rejected_weight: float
) -> np.ndarray:
    """Return the score that each pair has when the flow from step 0 has brought it to a tie, Δπ = 0.

    With λ other than 1 a tie alone does not tell the score: it depends on how likely both answers are there.

    Args:
        score: z at step 0, where the policy is the reference, (B,).
        preference: Δ0, (B,).
        beta: coefficient of the policy, > 0, of all pairs or of each.
        rejected_weight: λ > 0 of the loss.
    """
    return score - beta * (1 + rejected_weight**2) / (1 + rejected_weight) * preference


def ideal_preference(
    agreement: float, score_at_tie: np.ndarray, swapped_at_tie: np.ndarray, loss: Loss, *, beta: np.ndarray | None = None
) -> np.ndarray:
    """Return Δπ at each pair's own optimum, where the mean loss is least over annotators of whom a share labels it as it is.

    It is κ·Δ0 + d*/β where a floor, a length penalty or pair margins do not change it, with d* = z + m at the optimum.

    Args:
        agreement: share in (0, 1) of annotators that label a pair as it is labelled.
        score_at_tie: z at Δπ = 0, (B,).
        swapped_at_tie: the same for the pair with its labels swapped, (B,).
        loss: that gives these scores.
        beta: of each pair, (B,), in the place of the loss's.

    Returns:
        (B,); infinite where nothing holds it (unbiased smoothing that takes off more noise than there is).

    Example:
        Logistic with margin 0: d* is the Bradley–Terry log-odds log(p/(1−p)), 1.10 for p = 0.75.

    Source:
        Chen et al. 2024 (arXiv 2405.19534), idealized ranking accuracy; here with a reference coefficient of its own.
    """
    smoothing, margin = loss.label_smoothing, -(score_at_tie + swapped_at_tie) / 2
    if loss.label_smoothing_mode == "conservative":  # p is the share with which the plain loss has the same optimum
        p = (1 - smoothing) * agreement + smoothing * (1 - agreement)
    else:
        p = (agreement - smoothing) / (1 - 2 * smoothing)
    match loss.link:
        case "logistic" if p >= 1:
            optimum = np.full_like(margin, math.inf)
        case "logistic":
            # e^d solves (1−p)·u² − (2p−1)·e^m·u − p = 0; written with asinh so that e^m may be large.
            half = 0.5 * math.log(p / (1 - p))
            slope = abs(2 * p - 1) / (2 * math.sqrt(p * (1 - p)))
            grown = np.arcsinh(slope * np.exp(np.minimum(margin, 300))) + np.maximum(margin - 300, 0) * (slope > 0)
            optimum = half + math.copysign(1.0, half) * grown
        case "hinge":
            optimum = math.copysign(1.0, p - 0.5) * np.maximum(margin, 0)
        case "squared":
            optimum = (2 * p - 1) * margin
        case _:
            assert_never(loss.link)
    return ((swapped_at_tie - score_at_tie) / 2 + optimum) / (loss.beta if beta is None else beta)

"""What training will make of a pair, known before it begins: closed forms for a pair with two logits of its own.

    dz/dt = −2β²·link′(z)        score z of a pair under gradient flow, when no other pair moves its answers
    logistic     e^z + z = e^z₀ + z₀ + 2β²t
    hinge        z = min(0, z₀ + 2β²t) from z₀ < 0, and z₀ where it starts at 0 or above
    squared      z = z₀·e^(−4β²t)
    exponential  e^z = e^z₀ + 2β²t

Real pairs share weights, so these are what the loss alone would do; they say which pairs it cannot reach in any sensible time.
Everything is told by scores: the score at step 0, and the score at a tie (Δπ = 0), which `preference_loss` gives for any
margin, floor and length penalty. Label smoothing and the SFT term are left out of the flows.

Source: SCIENCE of the test bed (checked against Euler steps); Chen et al. 2024 (arXiv 2405.19534) for flips and ideal accuracy.
"""

import math
from typing import Literal

import torch
from torch import Tensor

FlowLink = Literal["logistic", "hinge", "squared", "exponential"]

_LARGE = 37.0
"""Above it e^−z is below the rounding error of 1."""
_NEWTON_STEPS = 12
"""From the bounds below, 7 reach the last bit everywhere."""


def flow(score: Tensor, time: float | Tensor, *, beta: float, link: FlowLink = "logistic") -> Tensor:
    """Return the score of each pair after some time of gradient flow.

    Args:
        score: z at time 0, (B,) float64.
        time: t >= 0, one number or (B,); dz/dt = −2β²·link′(z).
        beta: coefficient of the policy, > 0.
        link: of the loss.

    Example:
        A hinge with β = 0.5 moves at 2β² = 0.5 a unit of time: from z = −1 it is at −0.5 after 1, and at 0 after 2.
    """
    passed = torch.as_tensor(2 * beta**2 * time, dtype=score.dtype, device=score.device)
    if link == "hinge":
        return torch.where(score < 0, (score + passed).clamp(max=0), score)
    if link == "squared":
        return score * torch.exp(-2 * passed)
    if link == "exponential":
        return torch.logaddexp(score, passed.log())
    return torch.where(score > _LARGE, score + torch.log1p(passed * torch.exp(-score)), _logistic_flow(score, passed))


def time_to_pass(start: Tensor, goal: Tensor, *, beta: float, link: FlowLink = "logistic") -> Tensor:
    """Return the time until each score has risen above a goal: 0 where it starts there, infinite where it never will.

    With the score at a tie as the goal, this is the time until a pair that is ranked wrong flips.

    Args:
        start: z at time 0, (B,) float64.
        goal: (B,).
        beta: coefficient of the policy, > 0.
        link: of the loss.

    Example:
        c = 50 nats wrong, β = γ = 0.1, margin 0: from z = 0 to z = γc = 5 in (e⁵ + 5 − 1)/(2β²) = 152.4/(2β²); with γ = 0 from
        −5 to 0 in 6.0/(2β²).
    """
    rise = goal - start
    never = torch.full_like(rise, math.inf)
    if link == "hinge":
        units = torch.where(goal < 0, rise, never)
    elif link == "squared":
        units = torch.where((start < 0) & (goal < 0), 0.5 * torch.log(start / goal), never)
    else:
        # e^goal − e^start without cancellation, and without inf − inf.
        units = torch.exp(goal) * -torch.expm1(-rise) + (rise if link == "logistic" else 0.0)
    return torch.where(rise <= 0, 0.0, units) / (2 * beta**2)


def hinge_final(preference: Tensor, score: Tensor, *, beta: float) -> Tensor:
    """Return Δπ at which a hinge leaves each pair: moved until its score is 0, and not at all from there on.

    Args:
        preference: Δπ at step 0, (B,) nats.
        score: z at step 0, (B,).
        beta: coefficient of the policy, > 0.

    Example:
        From the reference it is max(Δ0, κ·Δ0 + margin/β): a pair with Δ0 = −4, β = γ = 0.1 and margin 1 goes from −4 to 6.
    """
    return preference + torch.relu(-score) / beta


def hinge_accuracy(score: Tensor, score_at_tie: Tensor) -> float:
    """Return the share of pairs that a hinge ends with ranking right: those that are, and those it stops above a tie.

    Args:
        score: z at step 0, (B,).
        score_at_tie: z at Δπ = 0, (B,); without length penalty and floor it is −γ·Δ0 − margin.

    Example:
        γ = β and margin 0: no pair moves, so this is the reference's own accuracy.
    """
    right = (score > score_at_tie) | (score_at_tie < 0)
    return float(right.double().mean())


def label_optimum(
    agreement: float,
    margin: Tensor,
    *,
    link: FlowLink = "logistic",
    label_smoothing: float = 0.0,
    label_smoothing_mode: Literal["conservative", "unbiased"] = "conservative",
) -> Tensor:
    """Return d* = z + margin at which the mean loss is least, for a pair that a share of annotators labels as it is labelled.

    Args:
        agreement: share p in (0, 1) of labels that say so.
        margin: (B,).
        link: of the loss.
        label_smoothing: ε in [0, ½) of the loss.
        label_smoothing_mode: of the loss.

    Returns:
        (B,); infinite where nothing holds it (unbiased smoothing that takes off more noise than there is).

    Example:
        Logistic with margin 0: the Bradley–Terry log-odds log(p/(1−p)), 1.10 for p = 0.75.
    """
    p = _effective_agreement(agreement, label_smoothing, label_smoothing_mode)
    if link == "hinge":
        return math.copysign(1.0, p - 0.5) * margin.clamp(min=0)
    if link == "squared":
        return (2 * p - 1) * margin
    if p >= 1:
        return torch.full_like(margin, math.inf)
    half = 0.5 * math.log(p / (1 - p))
    if link == "exponential":
        return torch.full_like(margin, half)
    # e^d solves (1−p)·u² − (2p−1)·e^m·u − p = 0; written with asinh so that e^m may be large.
    slope = abs(2 * p - 1) / (2 * math.sqrt(p * (1 - p)))
    grown = torch.asinh(slope * torch.exp(margin.clamp(max=300))) + (margin - 300).clamp(min=0) * (slope > 0)
    return half + math.copysign(1.0, half) * grown


def ideal_preference(score_at_tie: Tensor, swapped_at_tie: Tensor, optimum: Tensor, *, beta: float) -> Tensor:
    """Return Δπ at each pair's own optimum: κ·Δ0 + d*/β, where a floor, a length penalty or pair margins do not change it.

    Args:
        score_at_tie: z at Δπ = 0, (B,).
        swapped_at_tie: the same for the pair with its labels swapped, (B,).
        optimum: d* of `label_optimum` at the margins −(score_at_tie + swapped_at_tie)/2, (B,).
        beta: coefficient of the policy, > 0.

    Source:
        Chen et al. 2024 (arXiv 2405.19534), idealized ranking accuracy; here with a reference coefficient of its own.
    """
    return ((swapped_at_tie - score_at_tie) / 2 + optimum) / beta


def _logistic_flow(score: Tensor, passed: Tensor) -> Tensor:
    """Newton's method on the convex e^z + z, from above, where it never leaves the side that it is on."""
    low = score.clamp(max=_LARGE)
    total = torch.exp(low) + low + passed
    z = torch.where(total > 1, torch.log(total.clamp(min=1)), total)
    for _ in range(_NEWTON_STEPS):
        grown = torch.exp(z)
        z = z - (grown + z - total) / (grown + 1)
    return z


def _effective_agreement(agreement: float, smoothing: float, mode: str) -> float:
    """Share of labels with which the plain loss has the optimum that smoothing gives."""
    if mode == "conservative":
        return (1 - smoothing) * agreement + smoothing * (1 - agreement)
    return (agreement - smoothing) / (1 - 2 * smoothing)

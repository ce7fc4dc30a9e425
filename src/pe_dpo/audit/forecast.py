"""What a loss will do to pairs of which only the reference's log-probs are known: its gradient at step 0, and where it leads.

At step 0 the policy is the reference, so Δπ = Δ0 and z = (β−γ)·Δ0 − m, in z with the loss's λ: no forward is needed to know
each pair's weight. What comes later is told by the closed forms of `audit.dynamics`, as if each pair had two logits of its own.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from pe_dpo.audit.dynamics import flow_score_at_tie, ideal_preference, time_to_pass
from pe_dpo.inference.pairs import preferences
from pe_dpo.metrics.estimates import share_right
from pe_dpo.metrics.quadrants import effective_pairs, saturation
from pe_dpo.objective import Loss, PairLogprobs, PairTerms

FLIP_QUANTILES = (0.1, 0.5, 0.9)
"""Of the times after which pairs that are ranked wrong flip."""
AGREEMENTS = (0.6, 0.75, 0.9)
"""Shares of annotators that agree with a label, for idealized accuracy: labelers of InstructGPT agreed in 0.73 of cases (Ouyang
et al. 2022, arXiv 2203.02155)."""


@dataclass(frozen=True)
class Forecast:
    """What a loss does; shares are of pairs, or of Σ|w| where they say weight. NaN where no pair has any weight."""

    gamma: float
    kappa: float
    """γ/β."""
    delta: float
    """(γ−β)·sd(Δ0): the spread of scores at step 0, with the sign of γ−β; with λ of what the score has in the place of Δ0."""
    loss: float
    """Mean at step 0."""
    weight_right: float
    """Share of gradient weight on pairs that the reference ranks right: both rank right, since the policy is the reference."""
    weight_wrong: float
    """On pairs that it ranks wrong; what is left to 1 lies on ties."""
    effective: float
    """(Σ|w|)²/(B·Σw²): as which share of the pairs, pulling alike, they pull."""
    saturated: float | None
    """Share of pairs whose weight hardly depends on the pair any more (`quadrants.saturation`); None for links without such."""
    active: float
    """Share of pairs with z < 0, on which a hinge pulls."""
    hinge_accuracy: float
    """Share of pairs that a hinge with this γ and these margins ends with ranking right: those that are, and those it stops
    above a tie."""
    flip_times: tuple[float, float, float]
    """Quantiles FLIP_QUANTILES over pairs ranked wrong, in units of 1/(2β²); infinite for never, NaN without such pairs."""
    never_flips: float
    """Share of pairs ranked wrong that never flip; NaN without such pairs."""
    ideal_accuracy: tuple[float, float, float]
    """Share ranked right when every pair is at its own optimum, for AGREEMENTS; ties ½. NaN with λ other than 1, where raising
    both answers together raises both scores and no pair has an optimum."""


def forecast(loss: Loss, reference: PairLogprobs, terms: PairTerms) -> Forecast:
    """Return what a loss does.

    Args:
        loss: with any γ.
        reference: log-probs of the pairs under π0.
        terms: what the data give the pairs; one of weight 0 stays as the reference has it.
    """
    tied = torch.zeros_like(reference.chosen)
    swapped = PairLogprobs(reference.rejected, reference.chosen, reference.rejected_lengths, reference.chosen_lengths)
    start = loss(reference, reference, *terms)
    score, pull = start.score.numpy(), start.weight.abs().numpy()
    score_at_tie, swapped_at_tie = (
        loss(of._replace(chosen=tied, rejected=tied), of, *terms).score.numpy() for of in (reference, swapped)
    )
    preference = preferences(reference, loss.reduce)
    beta = np.broadcast_to(np.asarray(loss.beta_of_pairs(terms.beta)), preference.shape)
    weight = np.ones_like(preference) if terms.weight is None else terms.weight.numpy()
    has_optimum = loss.rejected_weight == 1
    if not has_optimum:
        score_at_tie = flow_score_at_tie(score, preference, beta=beta, rejected_weight=loss.rejected_weight)
    wrong = preference < 0
    times = (
        2
        * loss.beta**2
        * time_to_pass(
            score[wrong],
            score_at_tie[wrong],
            beta=beta[wrong],
            link=loss.link,
            rejected_weight=loss.rejected_weight,
            weight=weight[wrong],
        )
    )
    # Order statistics: between a number and never there is nothing to interpolate.
    first, middle, last = np.quantile(times, FLIP_QUANTILES, method="inverted_cdf").tolist() if wrong.any() else (math.nan,) * 3
    ideal = [ideal_preference(p, score_at_tie, swapped_at_tie, loss, beta=beta) for p in AGREEMENTS]
    few, some, most = (share_right(np.where(weight > 0, at, preference)) if has_optimum else math.nan for at in ideal)
    scored = preferences(reference, loss.reduce, rejected_weight=loss.rejected_weight) * (beta / loss.beta)
    extremes = saturation(start.score, loss.link)
    total = float(pull.sum()) or math.nan
    return Forecast(
        gamma=loss.gamma,
        kappa=loss.gamma / loss.beta,
        delta=(loss.gamma - loss.beta) * float(scored.std(ddof=1)) if len(scored) > 1 else math.nan,
        loss=float(start.loss.mean()),
        weight_right=float(pull[preference > 0].sum()) / total,
        weight_wrong=float(pull[wrong].sum()) / total,
        effective=(effective_pairs(pull) or math.nan) / len(pull),
        saturated=None if extremes is None else sum(extremes),
        active=float((score < 0).mean()),
        hinge_accuracy=float(((score > score_at_tie) | ((score_at_tie < 0) & (weight > 0))).mean()),
        flip_times=(first, middle, last),
        never_flips=float(np.isinf(times).mean()) if wrong.any() else math.nan,
        ideal_accuracy=(few, some, most),
    )

"""What a loss will do to pairs of which only the reference's log-probs are known: its gradient at step 0, and where it leads.

At step 0 the policy is the reference, so Δπ = Δ0 and z = (β−γ)·Δ0 − m: no forward is needed to know each pair's weight. What
comes later is told by the closed forms of `objective.dynamics`, as if each pair had two logits of its own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pe_dpo.audit.dynamics import hinge_accuracy, ideal_preference, label_optimum, time_to_pass
from pe_dpo.inference.logprobs import PairLogprobs
from pe_dpo.inference.pairs import preferences
from pe_dpo.metrics.estimates import share_right
from pe_dpo.metrics.quadrants import effective_pairs, quadrants, saturation
from pe_dpo.objective import Loss, PreferenceLoss
from pe_dpo.recipe.loss_section import LossSection

FLIP_QUANTILES = (0.1, 0.5, 0.9)
"""Of the times after which pairs that are ranked wrong flip."""
AGREEMENTS = (0.6, 0.75, 0.9)
"""Shares of annotators that agree with a label, for idealized accuracy: labelers of InstructGPT agreed in 0.73 of cases (Ouyang
et al. 2022, arXiv 2203.02155)."""


@dataclass(frozen=True)
class Outlook:
    """What a loss with one γ does; shares are of pairs, or of Σ|w| where they say weight. NaN where no pair has any weight."""

    gamma: float
    kappa: float
    """γ/β."""
    delta: float
    """(γ−β)·sd(Δ0): the spread of scores at step 0, with the sign of γ−β."""
    loss: float
    """Mean at step 0."""
    weight_right: float
    """Share of gradient weight on pairs that the reference ranks right: both rank right, since the policy is the reference."""
    weight_wrong: float
    """On pairs that it ranks wrong; what is left to 1 lies on ties."""
    effective: float
    """(Σ|w|)²/(B·Σw²): as which share of the pairs, pulling alike, they pull."""
    saturated: float | None
    """Share of pairs whose weight hardly depends on the pair any more (`quadrants.saturation`); None for other links."""
    active: float
    """Share of pairs with z < 0, on which a hinge pulls."""
    hinge_accuracy: float
    """Share of pairs ranked right where a hinge with this γ and these margins stops."""
    flip_times: tuple[float, float, float]
    """Quantiles FLIP_QUANTILES over pairs ranked wrong, in units of 1/(2β²); infinite for never, NaN without such pairs."""
    never_flips: float
    """Share of pairs ranked wrong that never flip; NaN without such pairs."""
    ideal_accuracy: tuple[float, float, float]
    """Share ranked right when every pair is at its own optimum, for AGREEMENTS; ties ½."""


def outlook(loss: LossSection, gamma: float, reference: PairLogprobs, margins: Tensor) -> Outlook:
    """Return what a loss does with this γ in place of its own.

    Args:
        loss: of a recipe; its γ plays no part.
        gamma: >= 0.
        reference: log-probs of the pairs under π0.
        margins: the data's margin column, (B,); zeros without one.
    """
    start, tie, swapped = scores(loss, gamma, reference, margins)
    preference = torch.from_numpy(preferences(reference, loss.reduce))
    cells = quadrants(preference, preference, start.score, start.weight)
    none = 0.0 if start.weight.any() else float("nan")
    extremes = saturation(start.score, loss.link)
    wrong = preference < 0
    times = time_to_pass(start.score[wrong], tie[wrong], beta=loss.beta, link=loss.link) * (2 * loss.beta**2)
    return Outlook(
        gamma=gamma,
        kappa=gamma / loss.beta,
        delta=(gamma - loss.beta) * _spread(preference),
        loss=float(start.loss.mean()),
        weight_right=cells["policy_right_reference_right/weight_share"] + none,
        weight_wrong=cells["policy_wrong_reference_wrong/weight_share"] + none,
        effective=effective_pairs(start.weight) / len(preference) + none,
        saturated=None if extremes is None else sum(extremes),
        active=_share(start.score < 0),
        hinge_accuracy=hinge_accuracy(start.score, tie),
        flip_times=_quantiles(times),
        never_flips=_share(times.isinf()),
        ideal_accuracy=_ideal(loss, tie, swapped),
    )


def scores(loss: LossSection, gamma: float, reference: PairLogprobs, margins: Tensor) -> tuple[PreferenceLoss, Tensor, Tensor]:
    """Return the loss at step 0, the scores that the pairs would have at a tie (Δπ = 0), and those with labels swapped.

    Args:
        loss: as in `outlook`.
        gamma: in place of its own.
        reference: log-probs of the pairs under π0.
        margins: (B,).
    """
    at = Loss(**loss.model_copy(update={"gamma": 0.0}).coefficients()).with_gamma(gamma)
    nothing = torch.zeros_like(reference.chosen)
    other = PairLogprobs(reference.rejected, reference.chosen, reference.rejected_lengths, reference.chosen_lengths)
    tie = at(reference._replace(chosen=nothing, rejected=nothing), reference, margins).score
    return at(reference, reference, margins), tie, at(other._replace(chosen=nothing, rejected=nothing), other, margins).score


def _ideal(loss: LossSection, tie: Tensor, swapped: Tensor) -> tuple[float, float, float]:
    def accuracy(agreement: float) -> float:
        optimum = label_optimum(
            agreement,
            -(tie + swapped) / 2,
            link=loss.link,
            label_smoothing=loss.label_smoothing,
            label_smoothing_mode=loss.label_smoothing_mode,
        )
        return share_right(ideal_preference(tie, swapped, optimum, beta=loss.beta))

    few, some, most = map(accuracy, AGREEMENTS)
    return few, some, most


def _quantiles(times: Tensor) -> tuple[float, float, float]:
    """Order statistics: between a number and never there is nothing to interpolate."""
    if not len(times):
        return (float("nan"),) * 3
    first, middle, last = np.quantile(times.numpy(), FLIP_QUANTILES, method="inverted_cdf").tolist()
    return first, middle, last


def _spread(preference: Tensor) -> float:
    return float(preference.std()) if len(preference) > 1 else float("nan")


def _share(members: Tensor) -> float:
    return float(members.double().mean()) if len(members) else float("nan")

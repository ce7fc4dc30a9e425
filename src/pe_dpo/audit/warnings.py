"""What an audit finds that looks off, in words, each with what to turn."""

import math

from pe_dpo.audit.forecast import Outlook
from pe_dpo.audit.label_fit import Evidence
from pe_dpo.audit.quantization_error import QuantizationNoise
from pe_dpo.metrics.reference_accuracy import Ranking
from pe_dpo.recipe.loss_section import LossSection

LARGEST_DELTA = 1.0
"""Of |δ|: beyond it, pairs one sd apart differ in score by more than a logistic weight can follow."""
LARGEST_CORRELATION = 0.5
SMALLEST_EFFECTIVE = 0.5
SMALLEST_RELIABILITY = 0.95
FEW_PROMPTS = 30
"""Below so many, percentiles of a bootstrap over prompts are too narrow."""
SLOWEST_FLIP = 1000
"""Times the flip time without a reference: from there on it is out of reach of any number of epochs."""


def start_warnings(plan: Outlook, loss: LossSection) -> list[str]:
    """Return what looks off in the gradient of step 0.

    Args:
        plan: of the recipe.
        loss: of the recipe.
    """
    if math.isnan(plan.effective):
        return ["no pair has a gradient at step 0, so nothing would be learned; set margin > 0, or gamma different from beta"]
    lines = []
    if abs(plan.delta) > LARGEST_DELTA:
        per_token = ", or use reduce: mean" if loss.reduce == "sum" else ""
        lines.append(
            f"δ = (γ−β)·sd(Δ0) = {plan.delta:.3g}: at step 0 scores spread so wide that pairs which the reference ranks right "
            f"have {plan.weight_right:.0%} of the gradient and those it ranks wrong {plan.weight_wrong:.0%}; bring gamma "
            f"closer to beta, lower both{per_token}"
        )
    if plan.effective < SMALLEST_EFFECTIVE:
        lines.append(
            f"at step 0 the gradient is as uneven as if {plan.effective:.0%} of the pairs pulled alike and the others not at "
            "all; bring gamma closer to beta, or lower both"
        )
    return lines


def ranking_warnings(ranking: Ranking, found: Evidence, loss: LossSection, *, pairs: int, prompts: int) -> list[str]:
    """Return what looks off in how the reference ranks the pairs.

    Args:
        ranking: by the reduction of the loss.
        found: of the same preferences.
        loss: of the recipe.
        pairs: how many.
        prompts: how many.
    """
    lines = []
    if abs(ranking.length_correlation) > LARGEST_CORRELATION:
        remedy = "per token and at equal length, and consider reduce: mean"
        lines.append(
            f"Δ0 mostly measures length (correlation {ranking.length_correlation:.2f} with |chosen| − |rejected|), so right "
            f"and wrong tell which answer is longer; read the shares {remedy if loss.reduce == 'sum' else 'at equal length'}"
        )
    low, high = found.interval
    if prompts < FEW_PROMPTS:
        lines.append(f"{prompts} prompts are few, so all intervals are rough; audit on more pairs")
    if low <= 0 <= high:
        lines.append(
            f"the reference says nothing about these preferences that {pairs} pairs could show (τ̂ between {low:.2g} and "
            f"{high:.2g}): gamma 0 with a margin loses no information, but loses what holds the policy near the reference"
        )
    elif high < 0:
        lines.append(
            f"the reference prefers the rejected answers (τ̂ between {low:.2g} and {high:.2g}): look whether chosen and "
            "rejected are swapped; gamma: auto is 0 here"
        )
    elif found.is_length_alone:
        lines.append(
            "what the reference says about these preferences is length alone: at equal length τ̂ is "
            f"{found.scale_without_length:.2g} ± {found.standard_error_without_length:.1g}; gamma: auto would weigh length, so "
            "consider reduce: mean or length_penalty"
        )
    return lines


def later_warnings(plan: Outlook, without_reference: Outlook, loss: LossSection) -> list[str]:
    """Return what looks off in where the loss leads.

    Args:
        plan: of the recipe.
        without_reference: the same with γ = 0.
        loss: of the recipe.
    """
    if plan.never_flips > 0.5:
        return [
            f"{plan.never_flips:.0%} of the pairs that the reference ranks wrong stay wrong for good, since the {loss.link} "
            "link is content before they flip; raise margin above γ·|Δ0|, or lower gamma"
        ]
    usual = without_reference.flip_times[1]
    slower = plan.flip_times[1] / usual if usual > 0 else math.nan
    if slower > SLOWEST_FLIP:
        return [
            f"half of the pairs that the reference ranks wrong take {slower:.0e} times as long to flip as with gamma 0, longer "
            "than any run; lower gamma, or set reference_floor: 0"
        ]
    return []


def noise_warnings(noise: QuantizationNoise) -> list[str]:
    """Return what looks off in the noise of quantization."""
    if not noise.reliability < SMALLEST_RELIABILITY:
        return []
    return [
        f"{1 - noise.reliability:.1%} of the variance of Δ0 is noise of {noise.quantize}; keep gamma = beta, where it cancels, "
        "or set model.quantize: none"
    ]

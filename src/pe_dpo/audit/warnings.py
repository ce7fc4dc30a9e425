"""What an audit finds that looks off, in words, each with what to turn."""

import math
from typing import TYPE_CHECKING

from pe_dpo.recipe.describe import preference_names

if TYPE_CHECKING:
    from pe_dpo.audit.audit import Audit

LARGEST_DELTA = 1.0
"""Of |δ|: beyond it, pairs one sd apart differ in score by more than a logistic weight can follow."""
LARGEST_CORRELATION = 0.5
SMALLEST_EFFECTIVE = 0.5
SMALLEST_RELIABILITY = 0.95
FEW_PROMPTS = 30
"""Below so many, percentiles of a bootstrap over prompts are too narrow."""
SLOWEST_FLIP = 1000
"""Times the flip time without a reference: from there on it is out of reach of any number of epochs."""


def warnings(audit: "Audit") -> list[str]:
    """Return what looks off: in the gradient of step 0, in how the reference ranks the pairs, in where the loss leads."""
    plan, without_reference = audit.recipe, audit.kappas[0]
    weight = audit.loss.rejected_weight
    lines = []
    if math.isnan(plan.effective):
        lines.append(
            "no pair has a gradient at step 0, so nothing would be learned; set margin > 0, or gamma different from beta"
        )
    if abs(plan.delta) > LARGEST_DELTA and not math.isnan(plan.effective):
        lines.append(
            f"δ = (γ−β)·sd({preference_names(weight)[1]}) = {plan.delta:.3g}: at step 0 scores spread so wide that pairs which "
            f"the reference ranks right have {plan.weight_right:.0%} of the gradient and those it ranks wrong "
            f"{plan.weight_wrong:.0%}; bring gamma closer to beta, lower both"
            f"{', or use reduce: mean' if audit.loss.reduce == 'sum' else ''}"
        )
    if plan.effective < SMALLEST_EFFECTIVE:
        lines.append(
            f"at step 0 the gradient is as uneven as if {plan.effective:.0%} of the pairs pulled alike and the others not at "
            "all; bring gamma closer to beta, or lower both"
        )
    lines += _of_labels(audit)
    usual = without_reference.flip_times[1]
    slower = plan.flip_times[1] / usual if usual > 0 else math.nan
    if plan.never_flips > 0.5:
        lines.append(
            f"{plan.never_flips:.0%} of the pairs that the reference ranks wrong stay wrong for good, since the "
            f"{audit.loss.link} link is content before they flip; raise margin above γ·|Δ0|, or lower gamma"
        )
    elif slower > SLOWEST_FLIP:
        lines.append(
            f"half of the pairs that the reference ranks wrong take {slower:.0e} times as long to flip as with gamma 0, longer "
            f"than any run; lower gamma{', or set reference_floor: 0' if weight == 1 else ''}"
        )
    return lines


def _of_labels(audit: "Audit") -> list[str]:
    """What looks off in the data, whatever the loss does with them."""
    lines = []
    correlation, fit = audit.ranking.length_correlation, audit.label_fit
    if abs(correlation) > LARGEST_CORRELATION:
        remedy = "per token and at equal length, and consider reduce: mean" if audit.loss.reduce == "sum" else "at equal length"
        lines.append(
            f"Δ0 mostly measures length (correlation {correlation:.2f} with |chosen| − |rejected|), so right and wrong tell "
            f"which answer is longer; read the shares {remedy}"
        )
    if audit.prompts < FEW_PROMPTS:
        lines.append(f"{audit.prompts} prompts are few, so all intervals are rough; audit on more pairs")
    low, high = fit.interval
    alone, error = fit.scale_without_length, fit.standard_error_without_length
    if low <= 0 <= high:
        lines.append(
            f"the reference says nothing about these preferences that {audit.pairs} pairs could show (τ̂ between {low:.2g} and "
            f"{high:.2g}): gamma 0 with a margin loses no information, but loses what holds the policy near the reference"
        )
    elif high < 0:
        lines.append(
            f"the reference prefers the rejected answers (τ̂ between {low:.2g} and {high:.2g}): look whether chosen and "
            "rejected are swapped; gamma: auto is 0 here"
        )
    elif low > 0 and alone is not None and error is not None and not alone > 1.96 * error:
        lines.append(
            f"what the reference says about these preferences is length alone: at equal length τ̂ is {alone:.2g} ± {error:.1g}; "
            "gamma: auto would weigh length, so consider reduce: mean or length_penalty"
        )
    return lines

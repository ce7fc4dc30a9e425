"""What an audit finds that looks off, in words, each with what to turn."""

import math
from typing import TYPE_CHECKING

from pe_dpo.printable import counted
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


Found = tuple[str, str]
"""What looks off, and what to turn."""


def warnings(audit: "Audit") -> list[str]:
    """Return what looks off, each with what to turn; what endangers the result most comes first."""
    return [f"{reason}; {remedy}" for reason, remedy in (*_dangers(audit), *_doubts(audit))]


def recommendation(audit: "Audit") -> str:
    """Return the one thing to do before training, with its reason."""
    dangers = _dangers(audit)
    if dangers:
        reason, remedy = dangers[0]
        return f"do this first: {remedy}; since {reason}"
    plan, (low, high) = audit.recipe, audit.label_fit.interval
    reason = (
        f"at step 0 {plan.effective:.0%} of the pairs pull, and those that the reference ranks wrong have "
        f"{plan.weight_wrong:.0%} of the gradient"
    )
    if low > 0 and plan.gamma > 0 and not low <= plan.gamma <= high:
        beside = f"gamma {audit.label_fit.scale:.2g} [{low:.2g}, {high:.2g}] is what these labels speak for"
        return f"train it as it is, and beside it with gamma: auto; since {reason}, and {beside}"
    return f"train it as it is; since {reason}" + (", and these labels do not tell which gamma is better" if low <= 0 else "")


def _dangers(audit: "Audit") -> list[Found]:
    """What makes a run worthless or worse than it could be, the worst first."""
    plan, without_reference, (low, high) = audit.recipe, audit.kappas[0], audit.label_fit.interval
    weight = audit.loss.rejected_weight
    found = []
    if math.isnan(plan.effective):
        found.append(
            ("no pair has a gradient at step 0, so nothing would be learned", "set margin > 0, or gamma different from beta")
        )
    if high < 0:
        found.append((
            f"the reference prefers the rejected answers (τ̂ between {low:.2g} and {high:.2g})",
            "look whether chosen and rejected are swapped; gamma: auto is 0 here",
        ))  # fmt: skip
    usual = without_reference.flip_times[1]
    slower = plan.flip_times[1] / usual if usual > 0 else math.nan
    if plan.never_flips > 0.5:
        found.append((
            f"{plan.never_flips:.0%} of the pairs that the reference ranks wrong stay wrong for good, since the "
            f"{audit.loss.link} link is content before they flip",
            "raise margin above γ·|Δ0|, or lower gamma",
        ))  # fmt: skip
    if abs(plan.delta) > LARGEST_DELTA and not math.isnan(plan.effective):
        found.append((
            f"δ = (γ−β)·sd({preference_names(weight)[1]}) = {plan.delta:.3g}: at step 0 scores spread so wide that pairs which "
            f"the reference ranks right have {plan.weight_right:.0%} of the gradient and those it ranks wrong "
            f"{plan.weight_wrong:.0%}",
            f"bring gamma closer to beta, lower both{', or use reduce: mean' if audit.loss.reduce == 'sum' else ''}",
        ))  # fmt: skip
    if plan.effective < SMALLEST_EFFECTIVE:
        found.append((
            f"at step 0 the gradient is as uneven as if {plan.effective:.0%} of the pairs pulled alike and the others not at "
            "all",
            "bring gamma closer to beta, or lower both",
        ))  # fmt: skip
    # With a spread like this each other γ would leave the gradient to one side.
    is_wide = audit.loss.reduce == "sum" and audit.loss.beta * audit.ranking.spread > LARGEST_DELTA
    lower = "use reduce: mean" if is_wide else "lower gamma"
    if not plan.never_flips > 0.5 and slower > SLOWEST_FLIP:
        found.append((
            f"half of the pairs that the reference ranks wrong take {slower:.0e} times as long to flip as with gamma 0, longer "
            "than any run",
            f"{lower}{', or set reference_floor: 0' if weight == 1 else ''}",
        ))  # fmt: skip
    return found


def _doubts(audit: "Audit") -> list[Found]:
    """What makes the audit itself less sure, or the data of less use, whatever the loss does with them."""
    found = []
    correlation, fit = audit.ranking.length_correlation, audit.label_fit
    low, high = fit.interval
    alone, error = fit.scale_without_length, fit.standard_error_without_length
    if low > 0 and alone is not None and error is not None and math.isfinite(error) and not alone > 1.96 * error:
        found.append((
            f"what the reference says about these preferences is length alone: at equal length τ̂ is {alone:.2g} ± {error:.1g}",
            "gamma: auto would weigh length, so consider reduce: mean or length_penalty",
        ))  # fmt: skip
    if abs(correlation) > LARGEST_CORRELATION:
        remedy = "per token and at equal length, and consider reduce: mean" if audit.loss.reduce == "sum" else "at equal length"
        found.append((
            f"Δ0 mostly measures length (correlation {correlation:.2f} with |chosen| − |rejected|), so right and wrong tell "
            "which answer is longer",
            f"read the shares {remedy}",
        ))  # fmt: skip
    if low <= 0 <= high:
        found.append((
            f"the reference says nothing about these preferences that {audit.pairs} pairs could show (τ̂ between {low:.2g} and "
            f"{high:.2g}): gamma 0 with a margin loses no information, but loses what holds the policy near the reference",
            "keep gamma where it is, or audit more pairs",
        ))  # fmt: skip
    if audit.prompts < FEW_PROMPTS:
        found.append(
            (
                f"{counted(audit.prompts, 'prompt')} {'is' if audit.prompts == 1 else 'are'} few, so all intervals are rough",
                "audit on more pairs",
            )
        )
    return found

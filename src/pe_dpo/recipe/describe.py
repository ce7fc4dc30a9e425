"""A loss in words: its effective formula, κ = γ/β, and the published name that it equals."""

import re
from collections.abc import Collection
from typing import NamedTuple

from pe_dpo.links import link_named
from pe_dpo.recipe.loss_section import LossSection
from pe_dpo.recipe.presets import PRESETS, Preset


class LossDescription(NamedTuple):
    """What a loss section amounts to."""

    formula: str
    kappa: float | None
    """γ/β; 1 is DPO's, 0 is without a reference; None while γ is to be calibrated."""
    equals: str
    """The published losses of this form, or a plain statement that there is none."""
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the description as lines for a person."""
        kappa = "known once γ is" if self.kappa is None else f"{self.kappa:g}"
        return [f"loss    {self.formula}", f"κ = γ/β {kappa}", f"equals  {self.equals}", *self.notes]


def name_loss(loss: LossSection) -> str:
    """Return a loss as one line: the first name under which it was published, what it is made of, and where the rest stands."""
    preset = next(iter(_published(loss)), None)
    name = "no published one" if preset is None else re.split(" with |, | \\(", preset.title)[0]
    gamma = f"{loss.gamma} (found from the data)" if loss.is_calibrated else f"{loss.gamma_value:g}"
    always = f"beta {loss.beta:g}, gamma {gamma}, margin {loss.margin:g}, link {loss.link}, reduce {loss.reduce}"
    turned = [f"{key} {getattr(loss, key):g}" for key in _RARE if getattr(loss, key) != LossSection.model_fields[key].default]
    return f"loss: {', '.join([name, always, *turned])}; formula: pe-dpo recipes show RECIPE"


_RARE = ("margin_scale", "reference_floor", "label_smoothing", "sft_weight", "length_penalty", "rejected_weight")
"""Numbers of a loss that are named where they are on."""


def describe(loss: LossSection, pair_columns: Collection[str] = ()) -> LossDescription:
    """Return the effective formula, κ, and the published name of a loss.

    Args:
        loss: a checked loss section; `Recipe.loss`, or `LossSection(preset="simpo")`.
        pair_columns: which of beta and weight each pair has of its own, see `DataSection.pair_columns`.
    """
    names = [f"{preset.title} ({preset.source})" for preset in _published(loss)]
    notes = []
    if loss.label_smoothing:
        moves = "" if loss.rejected_weight == 1 else f", and {loss.rejected_weight:g} is on the other answer"
        notes.append(f"z′ is the score of the pair with its labels swapped (the margin keeps its sign{moves})")
    if loss.kappa is None:
        notes.append(f"γ is found from the reference's log-probs of the training pairs ({loss.gamma}); `pe-dpo audit` tells it")
    elif loss.kappa > 1 and loss.rejected_weight == 1:
        notes.append("κ > 1: learning starts on pairs that the reference already ranks right")
    elif 0 < loss.kappa < 1 and loss.rejected_weight == 1:
        notes.append("κ < 1: learning starts on pairs that the reference ranks wrong")
    elif loss.kappa == 0:
        notes.append("κ = 0: the reference is never run")
    elif loss.kappa == 1 and loss.link == "logistic" and loss.margin == 0:
        start = "score 0" if pair_columns else "weight ½ and loss log 2"
        notes.append(f"κ = 1: every pair starts with {start}")
    if loss.rejected_weight != 1 and not loss.label_smoothing:
        notes.append(f"a rejected answer is pulled down {loss.rejected_weight:g} times as hard as its chosen one is pulled up")
    if "beta" in pair_columns:
        notes.append(f"β is each pair's own, from its column, in the place of loss.beta {loss.beta:g}; γ is κ times it")
    if "weight" in pair_columns:
        notes.append("weight is each pair's own, from its column; a step is the mean over its pairs whatever their weights")
    return LossDescription(
        formula=formula(loss, pair_columns),
        kappa=loss.kappa,
        equals="; ".join(names) if names else "no published loss by itself: a mixture of the terms above",
        notes=notes,
    )


def formula(loss: LossSection, pair_columns: Collection[str] = ()) -> str:
    """Return the loss with its numbers filled in; β and a weight of each pair's own stay letters."""
    policy, reference = preference_names(loss.rejected_weight)
    delta = f"Δ = {_DELTA[loss.reduce]}"
    if loss.rejected_weight != 1:
        delta = delta.replace("Δ", "Δλ").replace("− ", f"− {loss.rejected_weight:g}·")
    beta, gamma = f"{loss.beta:g}", "γ" if loss.is_calibrated else f"{loss.gamma_value:g}"
    if "beta" in pair_columns:
        beta, gamma = "β", "β" if loss.kappa == 1 else f"{loss.kappa:g}·β"
    score = [f"{beta}·{policy}"]
    if loss.uses_reference:
        floored = reference if loss.reference_floor is None else f"max(Δ0, {loss.reference_floor:g})"
        score.append(f"− {gamma}·{floored}")
    if loss.margin:
        score.append(f"{'−' if loss.margin > 0 else '+'} {abs(loss.margin):g}")
    if loss.margin_scale:
        score.append(f"− {loss.margin_scale:g}·margin column")
    if loss.length_penalty:
        sign = "+" if loss.length_penalty > 0 else "−"
        score.append(f"{sign} {abs(loss.length_penalty):g}·(|chosen| − |rejected|)")
    parts = [link_named(loss.link).formula]
    epsilon = loss.label_smoothing
    if epsilon:
        link, swapped = parts[0], parts[0].replace("z", "z′")
        if loss.label_smoothing_mode == "conservative":
            parts = [f"{1 - epsilon:g}·[{link}] + {epsilon:g}·[{swapped}]"]
        else:
            parts = [f"({1 - epsilon:g}·[{link}] − {epsilon:g}·[{swapped}]) / {1 - 2 * epsilon:g}"]
    if loss.sft_weight:
        parts.append(f"+ {loss.sft_weight:g}·NLL(chosen)/|chosen|")
    whole = " ".join(parts)
    whole = f"weight·({whole})" if "weight" in pair_columns else whole
    return f"{whole},  z = {' '.join(score)},  {delta}"


def preference_names(rejected_weight: float) -> tuple[str, str]:
    """Return what the score is made of, of the policy and of the reference, in a formula with this λ."""
    return ("Δπ", "Δ0") if rejected_weight == 1 else ("Δλπ", "Δλ0")


_DELTA = {
    "sum": "log p(chosen) − log p(rejected), summed over tokens",
    "mean": "log p(chosen)/|chosen| − log p(rejected)/|rejected|, per token",
}


def _published(loss: LossSection) -> list[Preset]:
    """The named losses of the form of this one."""
    return [preset for preset in PRESETS.values() if _form(LossSection.model_validate(preset.values)) == _form(loss)]


def _form(loss: LossSection) -> tuple[object, ...]:
    """What makes two losses the same method, apart from the sizes of their coefficients."""
    kappa = loss.kappa
    fixed_beta = link_named(loss.link).has_kink and kappa == 0 and loss.reduce == "sum"
    return (
        loss.link,
        loss.reduce,
        0 if kappa == 0 else 1 if kappa == 1 else "other",
        loss.margin > 0,
        loss.margin < 0,
        loss.margin_scale != 0,
        None if loss.reference_floor is None else loss.reference_floor == 0,
        loss.label_smoothing_mode if loss.label_smoothing else None,
        loss.sft_weight > 0,
        loss.length_penalty > 0,
        loss.length_penalty < 0,
        loss.rejected_weight < 1,
        loss.rejected_weight > 1,
        loss.beta == 1 if fixed_beta else None,
    )

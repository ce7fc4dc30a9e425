"""What would make a run smaller that does not fit: each setting by itself, with what it saves of the least that the run
needs."""

from dataclasses import replace
from typing import NamedTuple

from pe_dpo.data.pairs import row_length
from pe_dpo.estimate.estimate import Estimate, check_before, least
from pe_dpo.estimate.lengths import Lengths
from pe_dpo.estimate.memory import OPTIMIZER_BYTES, Setup

SMALL_OPTIMIZER = "adamw_bnb_8bit"
WORTH = 20_000_000
"""Bytes below which a setting is not named."""


class Knob(NamedTuple):
    """A setting that saves memory."""

    setting: str
    """As a recipe says it."""
    saved: float
    """Bytes, of the least that the run needs."""
    costs: str
    """What it costs, in a few words."""


def knobs(estimate: Estimate) -> list[Knob]:
    """Return the settings that save memory, the most first.

    Args:
        estimate: of the run as its recipe is.
    """
    setup, lengths = estimate.setup, estimate.lengths

    def needed(setup: Setup, lengths: Lengths) -> float:
        return max(least(estimate.recipe, setup, lengths.longest), check_before(setup, lengths))

    before = needed(setup, lengths)
    found = [Knob(setting, before - needed(changed, lengths), costs) for setting, changed, costs in _changes(setup)]
    half = row_length(lengths.longest) // 2
    shorter = [pair for pair in lengths.sample if row_length(pair) <= half]
    if shorter:
        dropped = 1 - len(shorter) / len(lengths.sample)
        saved = before - needed(setup, replace(lengths, sample=shorter))
        found.append(Knob(f"data.max_length: {half}", saved, f"drops {dropped:.0%} of the pairs"))
    return sorted((knob for knob in found if knob.saved > WORTH), key=lambda knob: -knob.saved)


def _changes(setup: Setup) -> list[tuple[str, Setup, str]]:
    """Settings, the setup that each makes, and what it costs."""
    changes = []
    if setup.stored is not None:
        pass  # such a base is trained on these very codes
    elif setup.quantize in ("none", "int8"):
        changes.append(("model.quantize: nf4", setup._replace(quantize="nf4"), "rounds the base"))
    elif setup.quantize.endswith("-single"):
        double = setup._replace(quantize="nf4")
        changes.append(("model.quantize: nf4", double, "scales in 8 bits"))
    if setup.width == 4 and setup.device == "cuda":
        changes.append(("model.dtype: bfloat16", setup._replace(width=2), "coarser arithmetic"))
    if not setup.with_experts and setup.stored is None and setup.shape.experts_a_token:
        changes.append(("model.quantize_experts: true", setup._replace(with_experts=True), "rounds the experts"))
    if setup.recomputes_above is None:
        changes.append(("train.gradient_checkpointing: true", setup._replace(recomputes_above=0), "a third more arithmetic"))
    if OPTIMIZER_BYTES[setup.optimizer] > OPTIMIZER_BYTES[SMALL_OPTIMIZER]:
        small = setup._replace(optimizer=SMALL_OPTIMIZER)
        changes.append((f"train.optimizer: {SMALL_OPTIMIZER}", small, "averages in 8 bits"))
    if setup.rank > 1:
        half = setup._replace(rank=setup.rank / 2, trained=setup.trained // 2)
        changes.append((f"adapter.rank: {int(setup.rank / 2)}", half, "a smaller adapter"))
    attention = tuple((weight, layers) for weight, layers in setup.adapted if "attn" in weight.path)
    if attention and len(attention) < len(setup.adapted):
        share = sum((w.inputs + w.outputs) * n for w, n in attention) / sum(
            (w.inputs + w.outputs) * n for w, n in setup.adapted
        )
        fewer = setup._replace(adapted=attention, trained=round(setup.trained * share))
        changes.append(("adapter.targets: attention", fewer, "fewer layers are trained"))
    return changes

"""A converted loss held against TRL's own: the same token ids, the same weights, TRL's trainer with the settings of the source.

one pair at a time      L_here = factor · L_there, and the adapter's gradients with it     what the recipe claims
all pairs in one batch  the same, but for a likelihood that is a mean over tokens there
"""

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pe_dpo.convert.convert import Conversion
from pe_dpo.convert.losses import TheirLoss
from pe_dpo.errors import UsageError
from pe_dpo.recipe import DataSection, Recipe, list_sources

PAIRS = 8
ROWS = 64
"""Rows that are read for the pairs, since some may be left out."""
_CPO = {"sigmoid", "hinge", "ipo", "simpo"}
_DPO = {"sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"}


@dataclass(frozen=True)
class Proof:
    """The largest differences between a converted loss and TRL's."""

    trainer: str
    """TRL's trainer and its loss, or why there is none to compare with."""
    pairs: str = ""
    """How many pairs, and where from."""
    factor: float = 1.0
    loss: float = math.nan
    """The largest difference of a pair's loss, in units of the larger of it and 1."""
    gradient: float = math.nan
    """The largest difference of a pair's gradient, as a share of its norm."""
    batch_loss: float = math.nan
    """The difference of the loss of all pairs in one batch."""
    batch_gradient: float = math.nan
    is_token_mean: bool = False
    """Whether a likelihood is added that is a mean over tokens there."""

    @property
    def holds(self) -> bool:
        """Whether both are the same loss, to the accuracy of float32."""
        return self.loss < 1e-4 and self.gradient < 1e-4

    def lines(self) -> list[str]:
        """Return what was found, for people."""
        if not self.pairs:
            return [f"proof: none; {self.trainer}"]
        times = "" if self.factor == 1 else f"{self.factor:g} times "
        verdict = "the same loss" if self.holds else "NOT the same loss"
        found = [
            f"proof: {verdict} as {times}{self.trainer}, on {self.pairs}",
            f"  pair by pair    loss off by {self.loss:.1e}, gradient by {self.gradient:.1e} at most",
            f"  in one batch    loss off by {self.batch_loss:.1e}, gradient by {self.batch_gradient:.1e}",
        ]
        if self.is_token_mean:
            found.append("  the batch differs where a likelihood is per pair here and per token of the batch there")
        return found


def prove(conversion: Conversion, *, count: int = PAIRS) -> Proof:
    """Return how far a converted loss is from TRL's, on pairs of the converted data, if they are here, or embedded ones.

    Args:
        conversion: What `convert` returned.
        count: How many pairs.

    Raises:
        UsageError: TRL is not installed.
        DataError: The pairs that the recipe names are here and cannot be read.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPO lives in trl.experimental, which warns of that at each import
    try:
        import trl
    except ImportError as error:
        raise UsageError("TRL is not installed; pip install trl==1.16.0 (the extra `peer`)") from error
    theirs = conversion.loss
    reason = _why_not(theirs)
    if theirs is None or reason:
        return Proof(f"TRL {trl.__version__} {reason}")
    import torch

    from pe_dpo.inference.inputs import read_inputs
    from pe_dpo.inference.scorer import choose_scorer
    from pe_dpo.model.adapter import as_reference, attach_adapter
    from pe_dpo.model.base import load_base
    from pe_dpo.objective import Loss

    recipe, origin = _tiny(conversion.recipe)
    info, tokenizer, data, *_ = read_inputs(recipe)
    pairs = data.train[:count]
    mine = _with_noise(attach_adapter(load_base(info), rank=4, alpha=8.0))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _their_trainer(theirs, load_base(info), mine.peft_config["default"], tokenizer, folder)
    _with_noise(trainer.model)
    loss, scorer = Loss(**conversion.recipe.loss.coefficients()), choose_scorer(mine, pairs, packing=False, token_budget=4096)

    def ours(some: Sequence[Any]) -> tuple[float, torch.Tensor]:
        with as_reference(mine) as frozen, torch.no_grad():
            reference = scorer.logprobs(frozen, some) if loss.needs_reference else None
        return _step(
            mine, loss(scorer.logprobs(mine, some), reference, torch.zeros(len(some), dtype=torch.float64)).loss.mean()
        )

    def difference(some: Sequence[Any]) -> tuple[float, float]:
        one, slope = ours(some)
        theirs_of_some = trainer.compute_loss(trainer.model, _their_batch(theirs, some))
        other, steepness = _step(trainer.model, theirs.factor * theirs_of_some)
        size = max(float(slope.norm()), float(steepness.norm()), 1e-30)
        return abs(one - other) / max(abs(one), abs(other), 1.0), float((slope - steepness).norm()) / size

    singly = [difference([pair]) for pair in pairs]
    together = difference(pairs)
    return Proof(
        f"TRL {trl.__version__}'s {type(trainer).__name__}, loss_type {', '.join(theirs.names)}",
        f"{len(pairs)} pairs ({origin}) and the embedded model",
        theirs.factor,
        max(one for one, _ in singly),
        max(slope for _, slope in singly),
        *together,
        is_token_mean=conversion.recipe.loss.sft_weight > 0,
    )


def _why_not(theirs: TheirLoss | None) -> str:
    """Return why TRL has no loss to compare with; empty where it has one."""
    if theirs is None or not theirs.has_counterpart:
        return "may have this method, but no preset is that loss"
    if theirs.preference not in (_DPO if theirs.has_reference else _CPO):
        return f"has no {theirs.preference}"
    smoothing = theirs.smoothing.value if theirs.smoothing else 0
    if smoothing and theirs.has_reference and theirs.preference in theirs.is_smoothed:
        return "does not smooth sigmoid, as this tool does (cdpo here)"
    return ""


def _tiny(recipe: Recipe) -> tuple[Recipe, str]:
    """Return a recipe of the embedded base with the data of another, where they are here, and where they are from."""
    from pe_dpo.disk import matching_paths
    from pe_dpo.quickstart.demo import BASE
    from pe_dpo.quickstart.demo import PAIRS as EMBEDDED

    here = all(matching_paths(place.path) for place in list_sources(recipe.data.train))
    data = DataSection(train=str(EMBEDDED), eval=0.0, limit=ROWS)
    if here:
        data = recipe.data.model_copy(update={"eval": 0.0, "limit": ROWS, "max_length": None, "template": "auto"})
    model = recipe.model.model_copy(update={"base": str(BASE), "quantize": "none", "dtype": "float32", "revision": None})
    return recipe.model_copy(update={"model": model, "data": data}), "of the recipe's data" if here else "embedded"


def _their_trainer(theirs: TheirLoss, base: Any, adapter: Any, tokenizer: Any, folder: str) -> Any:
    """Return TRL's trainer with the settings of the source, over one row, which is not looked at."""
    from datasets import Dataset

    options: dict[str, Any] = {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False,
        "remove_unused_columns": False, "beta": float(theirs.beta.value),
    }  # fmt: skip
    smoothing = float(theirs.smoothing.value or 0) if theirs.smoothing else 0.0
    likelihood = float(theirs.likelihood.value or 0) if theirs.likelihood else 0.0
    if theirs.has_reference:
        from trl import DPOConfig, DPOTrainer

        names, weights = list(theirs.names), theirs.weights or [1.0] * len(theirs.names)
        if likelihood:
            names, weights = [*names, "sft"], [*weights, likelihood]
        args = DPOConfig(loss_type=names, loss_weights=weights, label_smoothing=smoothing, **options)
        kind = DPOTrainer
    else:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        smoothing = smoothing if theirs.preference in theirs.is_smoothed else 0.0
        args = CPOConfig(
            loss_type=theirs.preference, simpo_gamma=theirs.gamma, cpo_alpha=likelihood, label_smoothing=smoothing, **options
        )
        kind = CPOTrainer
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return kind(model=base, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)


def _their_batch(theirs: TheirLoss, pairs: Sequence[Any]) -> dict[str, Any]:
    """Return pairs as TRL's collators lay them out: all in one for DPO, side by side for CPO."""
    from pe_dpo.data.batches import pad

    ids, attention, scored = pad(pairs)
    if theirs.has_reference:
        return {"input_ids": ids, "attention_mask": attention, "completion_mask": scored}
    labels = ids.masked_fill(scored == 0, -100)
    batch: dict[str, Any] = {}
    for side, rows in (("chosen", slice(0, len(pairs))), ("rejected", slice(len(pairs), None))):
        batch |= {f"{side}_input_ids": ids[rows], f"{side}_attention_mask": attention[rows], f"{side}_labels": labels[rows]}
    return batch


def _adapter(model: Any) -> dict[str, Any]:
    return {name: one for name, one in sorted(model.named_parameters()) if "lora_" in name and ".default." in name}


def _with_noise(model: Any) -> Any:
    """Return the model with its adapter full of numbers that the names of its tensors alone decide, so that π is not π0."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for one in _adapter(model).values():
        one.data.copy_(torch.empty(one.shape).normal_(0, 0.05, generator=generator))
    return model


def _step(model: Any, loss: Any) -> tuple[float, Any]:
    """Return a loss, and the adapter's gradients in one vector."""
    import torch

    model.zero_grad()
    loss.backward()
    return float(loss.detach()), torch.cat([one.grad.double().flatten() for one in _adapter(model).values()])

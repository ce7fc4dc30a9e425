"""The models that are served unmerged, measured on the pairs: what a merge is held against.

reference    the base as in training, or with the adapter that π0 has
trained      the same with the adapter on; scaled toward the reference where that is what is served
floor        the trained one with the noise of rounding to the dtype that is served
"""

import gc
import logging
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from pe_dpo.errors import ModelError, OutOfMemory
from pe_dpo.inference.scorer import Scorer, choose_scorer
from pe_dpo.log import quiet
from pe_dpo.merging.behaviour import TOKENS, Agreement, Behaviour, agreement, measure, verification_failures
from pe_dpo.merging.source import Source
from pe_dpo.merging.training_base import TrainingBase
from pe_dpo.model.adapter import POLICY, acting, add_finished_adapter
from pe_dpo.model.adapter_config import REFERENCE
from pe_dpo.model.base import BaseInfo, compute_in, inspect_base, load_base
from pe_dpo.model.fingerprint import parameter_fingerprints
from pe_dpo.model.provenance import changed, quantized_names
from pe_dpo.model.quantization import add_rounding_noise, check_weights_unpacked
from pe_dpo.quantizations import is_four_bit

logger = logging.getLogger(__name__)


class Unmerged:
    """Reference and trained model on the pairs of a source, from one base that is loaded once and freed again.

    Args:
        source: to merge, with pairs; where it is scaled, "the trained model" is the one with its weights.
        facts: of the base, quantized as in training (or not, to measure the adapter on the original).
        dtype: that will be served.

    Raises:
        ModelError: the base is not the one of training, naming a tensor.
    """

    def __init__(self, source: Source, facts: BaseInfo, *, dtype: torch.dtype) -> None:
        device = device_for(facts)
        model: Any = load_base(facts, device=device)
        layers = quantized_names(model)
        self.scale = source.scale
        self.base = TrainingBase(source, layers, parameter_fingerprints(model), device)
        """As it was just loaded."""
        self._check_base(facts)
        # An adapter may have been trained on more tokens than the base has.
        embedding = model.get_input_embeddings()
        name = next((name for name, module in model.named_modules() if module is embedding), "")
        change = source.adapter.changes.get(f"{name}.weight")
        shape = source.adapter.shape(change) if change else None
        if shape is not None and shape[0] != embedding.weight.shape[0]:
            model.resize_token_embeddings(shape[0], mean_resizing=False)
        # float32 where a whole model of it fits where the merged one will be measured; else as in training.
        fits = not torch.cuda.is_available() or device_for(facts._replace(quantize="none"), torch.float32).type == "cuda"
        self.computed_in = torch.float32 if fits else facts.dtype
        """What all that is compared is computed in."""
        if self.computed_in != facts.dtype:
            compute_in(model, self.computed_in)
        model.eval()
        if source.reference:
            model = add_finished_adapter(model, source.reference, REFERENCE)
        scorer = _choose_scorer(model, source)
        self.reference = measure(model, source.pairs, scorer)
        model = add_finished_adapter(model, source.trained)
        # Each adapter acts as much as it does in what is served, by PEFT's own scalings.
        shares = {name: weight for name, weight in zip((REFERENCE, POLICY), source.weights, strict=True) if weight}
        noisy = None
        with nullcontext() if shares == {POLICY: 1.0} else acting(model, shares):
            self.trained = measure(model, source.pairs, scorer)
            check_weights_unpacked(model)
            with suppress(torch.OutOfMemoryError, OutOfMemory):
                if self.computed_in != torch.float32:  # already rounded, and its arithmetic too: that in float32 instead
                    compute_in(model, torch.float32)
                    scorer = _choose_scorer(model, source)  # attention kernels of 16 bits do not take it
                    noisy = measure(model, source.pairs, scorer)
                elif dtype != torch.float32:
                    add_rounding_noise(model, dtype)
                    noisy = measure(model, source.pairs, scorer)
        if noisy is None and not self.computed_in == dtype == torch.float32:
            logger.warning("no memory to measure the noise of the dtype; the merge is judged without it")
        self.floor = None if noisy is None else self.agreement(noisy)
        """How near the trained one with the noise of rounding comes to itself; None where nothing is rounded, or memory did not
        do for it."""
        del model, embedding
        free()

    def agreement(self, served: Behaviour) -> Agreement:
        """Return how near a model comes to the trained one."""
        return agreement(served, self.trained, self.reference)

    def failures(self, found: Agreement) -> list[str]:
        """Return in words why a model that comes so near is not what was trained, or was to be served; empty if it is."""
        in_float32 = self.computed_in == torch.float32
        return verification_failures(found, self.floor, in_float32=in_float32, scale=self.scale)

    def _check_base(self, facts: BaseInfo) -> None:
        source, record = self.base.source, self.base.source.record
        if record is None:
            logger.warning(
                "no base.json beside the adapter: nothing can show that this is the base it was trained on, or that it was "
                f"loaded in {str(facts.dtype).removeprefix('torch.')} there"
            )
            return
        if facts.quantize != record.quantize:
            return  # on purpose: the adapter measured on the original
        others = changed(record.tensors, self.base.fingerprints)
        if others and not source.allow_base_mismatch:
            raise ModelError(
                f"{facts.base}: is not the base of training: {len(others)} of its tensors differ as loaded (sha256), the "
                f"first is {others[0]}; restore the base, or merge with the device ({record.device}) and versions of "
                "training; `allow_base_mismatch` merges all the same"
            )
        if others:
            logger.warning(f"{len(others)} tensors of the base are not those of training ({others[0]}, …)")


def _choose_scorer(model: Any, source: Source) -> Scorer:
    """The way to log-probs of the pairs; which it is concerns the measurement, not the merge, and is not said."""
    with quiet():
        return choose_scorer(model, source.pairs, token_budget=TOKENS)


def measure_served(source: Source, computed_in: torch.dtype, *, merged: Path | None = None) -> Behaviour:
    """Return what is served does on the pairs of a source.

    Args:
        source: with the pairs.
        computed_in: as the unmerged models were.
        merged: a whole model on disk; by default the base as in training with the source's one adapter.
    """
    if merged is None:
        facts, device = source.facts, device_for(source.facts)
    else:
        facts = inspect_base(str(merged), quantize="none", dtype=str(computed_in).removeprefix("torch."))
        device = device_for(facts, computed_in)
    model: Any = load_base(facts, device=device)
    if merged is None:
        compute_in(model, computed_in)
        model = add_finished_adapter(model, source.adapter.folder)
    model.eval()
    found = measure(model, source.pairs, _choose_scorer(model, source))
    del model
    free()
    return found


def device_for(facts: BaseInfo, dtype: torch.dtype | None = None) -> torch.device:
    """Return the GPU if there is one whose free memory holds a model, else the CPU.

    Args:
        facts: of the model.
        dtype: of its weights; None for how its base is loaded.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    size = facts.parameters * (dtype.itemsize if dtype else 0.6 if is_four_bit(facts.quantize) else facts.dtype.itemsize)
    free, _ = torch.cuda.mem_get_info()
    return torch.device("cuda" if 1.2 * size < free else "cpu")


def free() -> None:
    """Give back the memory of models that went out of use: they hold references in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""The models that are served unmerged, measured on the pairs: what a merge is held against.

reference    the base as in training, or with the adapter that π0 has
trained      the same with the adapter on; scaled toward the reference where that is what is served
floor        the trained one with the noise of rounding to the dtype that is served
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from pe_dpo.errors import ModelError
from pe_dpo.merging.behaviour import Agreement, Behaviour, agreement, measure, verification_failures
from pe_dpo.merging.memory import place_model
from pe_dpo.merging.source import Source
from pe_dpo.merging.training_base import TrainingBase
from pe_dpo.model.adapter import POLICY, acting, add_finished_adapter
from pe_dpo.model.adapter_config import REFERENCE
from pe_dpo.model.base import BaseInfo, compute_in, inspect_base, load_base
from pe_dpo.model.fingerprint import parameter_fingerprints
from pe_dpo.model.layers_on_disk import LayersOnDisk, decoder_layers
from pe_dpo.model.provenance import changed, quantized_names
from pe_dpo.model.quantization import add_rounding_noise, check_weights_unpacked, codes_rounded
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
        model, on_disk = _load(facts, source)
        device = model.get_input_embeddings().weight.device
        fingerprints = parameter_fingerprints(model) if on_disk is None else on_disk.fingerprints
        self.scale = source.scale
        self.base = TrainingBase(source, quantized_names(model), fingerprints, device)
        """As it was just loaded."""
        self._check_base(facts)
        if source.resized_to is not None:
            model.resize_token_embeddings(source.resized_to, mean_resizing=False)
        compute_in(model, torch.float32)
        model.eval()
        loaded = None if on_disk is None else on_disk.loaded
        if source.reference:
            model = add_finished_adapter(model, source.reference, REFERENCE)
        self.reference = measure(model, source.pairs, loaded)
        model = add_finished_adapter(model, source.trained)
        # Each adapter acts as much as it does in what is served, by PEFT's own scalings.
        shares = {name: weight for name, weight in zip((REFERENCE, POLICY), source.weights, strict=True) if weight}
        self.floor: Agreement | None = None
        """How near the trained one with the noise of rounding comes to itself; None where nothing is rounded."""
        with nullcontext() if shares == {POLICY: 1.0} else acting(model, shares):
            self.trained = measure(model, source.pairs, loaded)
            check_weights_unpacked(model)
            if dtype != torch.float32:
                self.floor = self.agreement(_measure_rounded(model, source, dtype, on_disk))
        del model
        free()

    def agreement(self, served: Behaviour) -> Agreement:
        """Return how near a model comes to the trained one."""
        return agreement(served, self.trained, self.reference)

    def failures(self, found: Agreement) -> list[str]:
        """Return in words why a model that comes so near is not what was trained, or was to be served; empty if it is."""
        return verification_failures(found, self.floor, scale=self.scale)

    def _check_base(self, facts: BaseInfo) -> None:
        source, record = self.base.source, self.base.source.record
        if record is None or facts.quantize != record.quantize:
            return  # which was said; or on purpose, the adapter measured on the original
        others = changed(record.tensors, self.base.fingerprints)
        if others and not source.allow_base_mismatch:
            raise ModelError(
                f"{facts.base}: is not the base of training: {len(others)} of its tensors differ as loaded (sha256), the "
                f"first is {others[0]}; restore the base, or merge with the device ({record.device}) and versions of "
                "training; `allow_base_mismatch` merges all the same"
            )
        if others:
            logger.warning(f"{len(others)} tensors of the base are not those of training ({others[0]}, …)")


def _load(facts: BaseInfo, source: Source) -> tuple[Any, LayersOnDisk | None]:
    """The model where there is room for it, and its layers where these stay on disk."""
    place = place_model(facts, source.pairs)
    if not place.is_layerwise:
        return load_base(facts, device=place.device), None
    on_disk = LayersOnDisk(facts, device=place.device, compute_dtype=torch.float32)
    return on_disk.model, on_disk


def _measure_rounded(model: Any, source: Source, dtype: torch.dtype, on_disk: LayersOnDisk | None) -> Behaviour:
    """What a model does with the noise of rounding its weights to a dtype; of codes one layer at a time is a plain one."""
    layers = decoder_layers(model.get_base_model())
    inside = {id(part) for layer in layers.values() for part in (*layer.modules(), *layer.parameters())}

    @contextmanager
    def rounded(name: str) -> Iterator[None]:
        if on_disk is None:
            with codes_rounded(model, layers[name].modules(), dtype):
                yield
        else:
            with on_disk.loaded(name):
                add_rounding_noise(((f"{name}.{leaf}", weight) for leaf, weight in layers[name].named_parameters()), dtype)
                yield

    always = ((name, one) for name, one in model.named_parameters() if on_disk is None or id(one) not in inside)
    add_rounding_noise(always, dtype)
    with codes_rounded(model, (part for part in model.modules() if id(part) not in inside), dtype):
        is_layerwise = on_disk is not None or is_four_bit(source.facts.quantize)
        return measure(model, source.pairs, rounded if is_layerwise else None)


def measure_served(source: Source, *, merged: Path | None = None) -> Behaviour:
    """Return what is served does on the pairs of a source.

    Args:
        source: with the pairs.
        merged: a whole model on disk; by default the base as in training with the source's one adapter.
    """
    facts = source.facts if merged is None else inspect_base(str(merged), quantize="none", dtype="float32")
    model, on_disk = _load(facts, source)
    if merged is None:
        compute_in(model, torch.float32)
        model = add_finished_adapter(model, source.adapter.folder)
    model.eval()
    found = measure(model, source.pairs, None if on_disk is None else on_disk.loaded)
    del model, on_disk
    free()
    return found


def free() -> None:
    """Give back the memory of models that went out of use: they hold references in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

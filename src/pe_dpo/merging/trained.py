"""The trained model as it was in training (or scaled toward the reference), unmerged: what a merge is held against."""

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pe_dpo.errors import ModelError
from pe_dpo.inference.scorer import Scorer, choose_scorer
from pe_dpo.merging.source import Source, device_for
from pe_dpo.merging.stream import BaseAsTrained
from pe_dpo.merging.verify import Behaviour, behaviour
from pe_dpo.model.adapter import POLICY, REFERENCE, add_finished_adapter, switch_on_both
from pe_dpo.model.base import BaseFacts, add_rounding_noise, compute_in, inspect_base, load_base
from pe_dpo.model.fingerprint import parameter_fingerprints
from pe_dpo.model.provenance import changed_tensors
from pe_dpo.model.quantization import check_weights_unpacked, four_bit_layers

TOKENS = 2048
"""Most tokens of one forward."""


class Trained(NamedTuple):
    """What was measured of the trained model, and how its base was loaded."""

    base: BaseAsTrained
    reference: Behaviour
    trained: Behaviour
    floor: Behaviour | None
    """Of the trained model with the noise of rounding; None where nothing is rounded, or memory did not do for it."""
    computed_in: torch.dtype
    """Of all three, and of what is compared with them."""


def measure_trained(
    source: Source,
    facts: BaseFacts,
    *,
    dtype: torch.dtype,
    allow_base_mismatch: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Return what reference and trained model do on the pairs, one base loaded once and freed again.

    Args:
        source: to merge, with pairs; where it is scaled, "the trained model" is the one with its weights.
        facts: of the base, quantized as in training (or not, to measure the adapter on the original).
        dtype: that will be served.
        allow_base_mismatch: go on where the base is not the one of training.
        say: gets lines of facts.

    Raises:
        ModelError: the base is not the one of training, naming a tensor.
    """
    device = device_for(facts)
    model: Any = load_base(facts, device=device)
    tensors = parameter_fingerprints(model)
    _check_base(source, facts, tensors, allow_base_mismatch, say)
    layers = frozenset(name for name, _ in four_bit_layers(model))
    _resize(model, source)
    computed_in = _computed_in(facts)
    if computed_in != facts.dtype:
        compute_in(model, computed_in)
    model.eval()
    if source.reference:
        model = add_finished_adapter(model, source.reference, REFERENCE)
    scorer = choose_scorer(model, source.pairs, device=device)
    reference = measure(model, source, scorer)
    model = add_finished_adapter(model, source.trained)
    _weigh(model, source.weights)
    trained = measure(model, source, scorer)
    check_weights_unpacked(model)
    floor = _measure_noise(model, computed_in, dtype, source, scorer, say)
    del model
    free()
    base = BaseAsTrained(facts.quantize, facts.dtype, layers, tensors, device)
    return Trained(base, reference, trained, floor, computed_in)


def _weigh(model: Any, weights: tuple[float, float]) -> None:
    """Let the adapters act as much as they do in what is served, by PEFT's own scalings."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            for name, weight in zip((REFERENCE, POLICY), weights, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
    if weights[0]:
        switch_on_both(model)


def _computed_in(facts: BaseFacts) -> torch.dtype:
    """float32 where a whole model of it fits where the merged one will be measured; else as in training."""
    if not torch.cuda.is_available() or device_for(facts._replace(quantize="none"), torch.float32).type == "cuda":
        return torch.float32
    return facts.dtype


def noise_words(computed_in: torch.dtype, served: torch.dtype) -> str:
    """Return what the noise floor is, in a word or two."""
    return f"rounded to {str(served).removeprefix('torch.')}" if computed_in == torch.float32 else "in float32"


def measure_merged(folder: Path, source: Source, computed_in: torch.dtype) -> Behaviour:
    """Return what a merged model on disk does on the pairs.

    Args:
        folder: a whole model.
        source: with the pairs.
        computed_in: as the trained model was.
    """
    facts = inspect_base(str(folder), quantize="none", dtype=str(computed_in).removeprefix("torch."))
    device = device_for(facts, computed_in)
    model = load_base(facts, device=device).eval()
    found = measure(model, source, choose_scorer(model, source.pairs, device=device))
    del model
    free()
    return found


def measure_adapter(source: Source, computed_in: torch.dtype) -> Behaviour:
    """Return what the base, loaded as in training, does with the source's one adapter.

    Args:
        source: with the pairs.
        computed_in: as the trained model was.
    """
    device = device_for(source.facts)
    base = load_base(source.facts, device=device)
    compute_in(base, computed_in)
    model = add_finished_adapter(base, source.adapter.folder)
    found = measure(model, source, choose_scorer(model, source.pairs, device=device))
    del model
    free()
    return found


def measure(model: Any, source: Source, scorer: Scorer) -> Behaviour:
    """Return what a model does on the pairs of a source, in the state it is in."""
    return behaviour(model, source.pairs, scorer, token_budget=TOKENS)


def free() -> None:
    """Give back the memory of models that went out of use: they hold references in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure_noise(
    model: Any, computed_in: torch.dtype, served: torch.dtype, source: Source, scorer: Scorer, say: Callable[[str], None]
) -> Behaviour | None:
    """The trained model with its weights rounded as served; where it was computed in 16 bits, in float32 arithmetic instead."""
    if computed_in == served == torch.float32:
        return None
    try:
        if computed_in == torch.float32:
            add_rounding_noise(model, served)
        else:
            compute_in(model, torch.float32)
            scorer = choose_scorer(model, source.pairs, device=scorer.device)  # attention kernels of 16 bits do not take it
        return measure(model, source, scorer)
    except torch.OutOfMemoryError:
        say("look: no memory to measure the noise of the dtype; the merge is judged without it")
        return None


def _check_base(
    source: Source, facts: BaseFacts, tensors: Mapping[str, str], allow_mismatch: bool, say: Callable[[str], None]
) -> None:
    record = source.record
    if record is None:
        say(
            "look: no base.json beside the adapter: nothing can show that this is the base it was trained on, or that it was "
            f"loaded in {str(facts.dtype).removeprefix('torch.')} there"
        )
        return
    if facts.quantize != record["quantize"]:
        return  # on purpose: the adapter measured on the original
    changed = changed_tensors(record, tensors)
    if changed and allow_mismatch:
        say(f"look: {len(changed)} tensors of the base are not those of training ({changed[0]}, …)")
    elif changed:
        raise ModelError(
            f"{facts.base}: is not the base of training: {len(changed)} of its tensors differ as loaded (sha256), the first is "
            f"{changed[0]}; restore the base, or merge with the device ({record.get('device')}) and versions of training; "
            "--allow-base-mismatch merges all the same"
        )


def _resize(model: Any, source: Source) -> None:
    """Give the base the vocabulary of an adapter that was trained on more tokens."""
    name = next((name for name, module in model.named_modules() if module is model.get_input_embeddings()), "")
    change = source.adapter.changes.get(f"{name}.weight")
    shape = source.adapter.shape(change) if change else None
    if shape is not None and shape[0] != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(shape[0], mean_resizing=False)

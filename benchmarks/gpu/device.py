"""The device that a check runs on, how time and memory are read there, and the random bases and pairs of real sizes."""

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.quickstart.demo import BASE

Size = Literal["tiny", "layers-4", "llama-3.1-8b", "layer-of-8b", "gemma-3-1b"]
Lengths = Literal["hh", "uf"]

LLAMA: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "layers-4": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8
    },
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "layer-of-8b": {
        "vocab_size": 1024, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "num_attention_heads": 32
    },
}  # fmt: skip
KEY_VALUE_HEADS = {"tiny": 2, "layers-4": 2, "llama-3.1-8b": 8, "layer-of-8b": 8}

MEAN_LENGTHS: dict[str, tuple[int, int, int]] = {"hh": (105, 55, 54), "uf": (140, 290, 270)}
"""Tokens of prompt, chosen and rejected; lognormal with σ 0.75, as HH's and UltraFeedback's are about."""
DEVIATION = 0.75
IDS = 500
"""Token ids lie below it, so that the tiny base takes them, too."""


@dataclass(frozen=True)
class Device:
    """A card, or the CPU in a rehearsal.

    Args:
        is_rehearsal: whether the CPU stands in for the card, with tiny bases.
        scratch: folder for the random bases; they are kept from check to check.
        out: folder for what a check writes beside its numbers.
    """

    is_rehearsal: bool
    scratch: Path
    out: Path

    @property
    def torch(self) -> torch.device:
        """As torch names it."""
        return torch.device("cpu" if self.is_rehearsal else "cuda")

    def size(self, wanted: Size) -> Size:
        """Return the size asked for, in a rehearsal the tiny one."""
        return "tiny" if self.is_rehearsal else wanted

    def wait(self) -> None:
        """Return once all that was asked of the card is done."""
        if not self.is_rehearsal:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], *, times: int = 5, warm: int = 2) -> float:
        """Return the median wall seconds of a call."""
        for _ in range(warm):
            run()
        taken = []
        for _ in range(1 if self.is_rehearsal else times):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def peak_gb(self, run: Callable[[], object]) -> float | None:
        """Return the most that torch held during a call, GB (10⁹ bytes), weights included; None on a CPU."""
        if self.is_rehearsal:
            run()
            return None
        self.empty()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() / 1e9

    def empty(self) -> None:
        """Give back what nobody holds any longer."""
        gc.collect()
        if not self.is_rehearsal:
            torch.cuda.empty_cache()


def here(*, is_rehearsal: bool, out: Path) -> Device:
    """Return the device of this machine."""
    scratch = Path(tempfile.gettempdir()) / "pe-dpo-benchmarks" / ("rehearsal" if is_rehearsal else "card")
    scratch.mkdir(parents=True, exist_ok=True)
    return Device(is_rehearsal, scratch, out)


def random_base(device: Device, size: Size) -> Path:
    """Return the folder of a random base in bfloat16, made on first use on the device, with the quickstart's tokenizer.

    Args:
        device: whose scratch folder it lies in.
        size: of the base; Gemma's has its windows and its large vocabulary.
    """
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    folder = device.scratch / size
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device.torch:
            if size == "gemma-3-1b":
                model: Any = Gemma3ForCausalLM(Gemma3TextConfig(
                    vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
                    num_key_value_heads=1, head_dim=256, max_position_embeddings=131072, sliding_window=512,
                ))  # fmt: skip
            else:
                model = LlamaForCausalLM(
                    LlamaConfig(
                        **LLAMA[size],
                        num_key_value_heads=KEY_VALUE_HEADS[size],
                        max_position_embeddings=8192,
                        tie_word_embeddings=False,
                        pad_token_id=0,
                        bos_token_id=None,
                        eos_token_id=1,
                    )
                )
    finally:
        torch.set_default_dtype(torch.float32)
    partial = folder.with_name(f"{size}.partial")
    model.save_pretrained(partial, max_shard_size="4GB")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE / file, partial)
    partial.replace(folder)
    return folder


def random_pairs(count: int, lengths: Lengths, *, seed: int = 0) -> list[EncodedPair]:
    """Return pairs of random ids with the lengths of a data set."""
    generator = np.random.default_rng(seed)

    def draw(mean: int) -> np.ndarray:
        length = max(2, int(np.exp(generator.normal(np.log(mean) - DEVIATION**2 / 2, DEVIATION))))
        return generator.integers(5, IDS, size=length).astype(np.int32)

    return [
        EncodedPair(*(draw(mean) for mean in MEAN_LENGTHS[lengths]), margin=0.0, where=f"{lengths}:{n}", prompt_key=str(n))
        for n in range(count)
    ]


def random_policy(device: Device, size: Size, quantize: Literal["nf4", "int8", "none"]) -> Any:
    """Return a random base in a dtype on the device, under a rank-16 adapter with B ≠ 0."""
    from pe_dpo.model.adapter import attach_adapter
    from pe_dpo.model.base import inspect_base, load_base

    facts = inspect_base(str(random_base(device, size)), quantize=quantize, dtype="bfloat16")
    model = attach_adapter(load_base(facts, device=device.torch), rank=16, alpha=32)
    generator = torch.Generator(device=device.torch).manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model

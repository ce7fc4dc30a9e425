"""The memory that `pe-dpo estimate` counts, against the peak of real runs on the CPU: a fresh process each.

    python -m benchmarks estimate            every shape below; results/estimate.json

Measured is the high-water mark of the resident set (VmHWM) above what was resident before the run began. Each run has a process
of its own, forked from one in which a tiny run imported and set up what any run needs. Blocks of memory that are freed go back
to the system at once, as in `memory`. Counted is what the estimate says of the same pairs: weights, adapters, optimizer, and
the fullest row of the run or the check before it.
"""

import ctypes
import json
import multiprocessing
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.memory import RETURN_BLOCKS, peak_mib
from benchmarks.pairs import END, PAD, VOCABULARY, _hh_rows, scratch, tokenizer
from benchmarks.results import Settings, save

MMAP_THRESHOLD = -3
"""glibc's name of the setting in mallopt (malloc.h)."""


class Case(NamedTuple):
    """A random base and how it is trained."""

    kind: str
    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    head_size: int = 64
    vocabulary: int = VOCABULARY
    tied: bool = False
    settings: tuple[str, ...] = ()
    """Of the recipe."""

    def config(self) -> Any:
        """Return transformers' configuration of the base."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.kind, hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads, intermediate_size=self.inner, head_dim=self.head_size,
            vocab_size=self.vocabulary, tie_word_embeddings=self.tied, max_position_embeddings=2048, bos_token_id=None,
            eos_token_id=END, pad_token_id=PAD,
        )  # fmt: skip


RECOMPUTED, NF4, BF16 = "train.gradient_checkpointing=true", "model.quantize=nf4", "model.dtype=bfloat16"
CASES: dict[str, Case] = {
    "llama 69 M": Case("llama", 768, 8, 12, 12, 2048),
    "llama 69 M, nf4": Case("llama", 768, 8, 12, 12, 2048, settings=(NF4,)),
    "llama 24 M, attention with dropout": Case(
        "llama", 512, 6, 8, 8, 1216, settings=("adapter.targets=attention", "adapter.dropout=0.1")
    ),
    "gemma3 29 M": Case("gemma3_text", 512, 6, 4, 1, 1536, 256, 16384, True),
    "qwen2 24 M, rank 64": Case("qwen2", 512, 6, 8, 2, 1536, settings=("adapter.rank=64",)),
    "qwen3 31 M, nf4": Case("qwen3", 512, 8, 8, 4, 1536, 128, 16384, True, settings=(NF4,)),
    "mistral 38 M, rank 128, sgd, rows of 512": Case(
        "mistral", 768, 6, 12, 4, 1728,
        settings=("adapter.rank=128", "train.optimizer=sgd", "train.tokens_per_microbatch=512"),
    ),
    "gemma2 28 M": Case("gemma2", 512, 6, 4, 2, 1536, 128, 16384, True),
    "llama 69 M, recomputed": Case("llama", 768, 8, 12, 12, 2048, settings=(RECOMPUTED,)),
    "llama 69 M, nf4, recomputed": Case("llama", 768, 8, 12, 12, 2048, settings=(NF4, RECOMPUTED)),
    "llama 69 M, bfloat16": Case("llama", 768, 8, 12, 12, 2048, settings=(BF16,)),
}  # fmt: skip


def prepare(name: str, folder: Path) -> list[str]:
    """Write the base and the pairs of a case; return the settings of its recipe."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    case = CASES[name]
    base = folder / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(case.config()).to(torch.bfloat16).save_pretrained(base)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="</s>", pad_token="<pad>").save_pretrained(base)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in _hh_rows()[:24])
    return [
        f"model.base={base}", f"data.train={folder / 'pairs.jsonl'}", "data.eval=0.1", "data.max_length=1024",
        "train.eval_every=2", "train.save_every=2",
        "train.max_steps=2", "train.pairs_per_step=7", "reference.policy=step", f"output={folder / 'run'}", *case.settings,
    ]  # fmt: skip


def measure_case(name: str) -> dict[str, Any]:
    """Return counted and measured peak of a case in this process, MiB."""
    from pe_dpo.estimate import estimate_run
    from pe_dpo.recipe import load_recipe
    from pe_dpo.training.train import train

    folder = Path(tempfile.mkdtemp(dir=scratch()))
    try:
        recipe = load_recipe("llama-3.2-1b-gdpo", ["loss.preset=dpo", "data.template=plain", *prepare(name, folder)])
        counted = estimate_run(recipe, None)
        peak = peak_mib(lambda: train(recipe))
    finally:
        shutil.rmtree(folder)
    parts = {part: size / 2**20 for part, size in counted.parts.items()}
    return {"counted_mib": counted.peak / 2**20, "measured_mib": peak, "tokens": counted.row.tokens, "parts_mib": parts}


def run_estimate(settings: Settings) -> Path:
    """Measure every case that the results do not have yet, each in a process of its own; return the file."""
    from pe_dpo.quickstart.demo import quickstart_recipe
    from pe_dpo.training.train import train

    path = settings.out / f"{settings.name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else {}
    found = {name: case for name, case in found.items() if name in CASES}
    missing = [name for name in CASES if name not in found]
    if missing:
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, int(RETURN_BLOCKS["MALLOC_MMAP_THRESHOLD_"]))
        with tempfile.TemporaryDirectory(dir=scratch()) as folder:
            train(quickstart_recipe(["train.max_steps=1", "data.limit=40", f"output={folder}/run"]))
    for name in missing:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[name] = pool.apply(measure_case, (name,))
        path = save(settings, {"cases": found})
        print(describe_case(name, found[name]), flush=True)
    return path


def describe_case(name: str, found: dict[str, Any]) -> str:
    """Return a case in a line."""
    counted, measured = found["counted_mib"], found["measured_mib"]
    return f"  {name:<45} counted {counted:6.0f}   measured {measured:6.0f} MiB   {counted / measured - 1:+.1%}"

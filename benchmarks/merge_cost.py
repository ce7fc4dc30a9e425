"""Time and peak memory of merging a model of 200 M parameters, against PEFT in 16 bit: a fresh process each."""

import argparse
import ctypes
import gc
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import spread
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.quickstart.demo import BASE

COSTS = {
    "ours-16bit": "ours, 16-bit base",
    "ours-nf4": "ours, nf4 base, every tensor checked",
    "peft": "PEFT merge_and_unload + save_pretrained, 16-bit base",
}


def cost(work: Path, *, rounds: int) -> dict[str, Any]:
    """Return wall and CPU seconds and peak memory of each merge, interleaved rounds, a fresh process each."""
    large = work / "large"
    _child("make", large)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in COSTS}
    order = random.Random(0)
    for number in range(1, rounds + 1):
        for name in order.sample(list(COSTS), len(COSTS)):
            found[name].append(_child(name, large))
        line = ", ".join(f"{name} {found[name][-1]['wall_seconds']:.1f} s" for name in COSTS)
        print(f"  round {number} of {rounds}: {line}", flush=True)
    index = json.loads((large / "base" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = len(set(index["weight_map"].values()))
    size = index["metadata"]["total_size"]
    return {"parameters": size // torch.bfloat16.itemsize, "bytes": size, "shards": shards, "rounds": found}


def _child(what: str, large: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.merge_cost", what, str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{what}: the process failed:\n{done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def make_large(folder: Path) -> None:
    """Write a random Llama of 200 M parameters in bfloat16 shards, and a random adapter with the record of its base in nf4."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from pe_dpo.model.base import load_tokenizer
    from pe_dpo.model.provenance import base_record

    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 13, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=32000, tie_word_embeddings=True, **shape)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="70MB")
    tokenizer = load_tokenizer(str(BASE))
    tokenizer.save_pretrained(folder / "base")
    adapted: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 1e-3)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    shutil.copytree(folder / "adapter", folder / "adapter-nf4")
    facts = inspect_base(str(folder / "base"), quantize="nf4", dtype="bfloat16")
    record = base_record(load_base(facts), facts, tokenizer)
    (folder / "adapter-nf4" / "base.json").write_text(json.dumps(record), encoding="utf-8")
    tokenizer.save_pretrained(folder / "adapter-nf4")


def merge_large(what: str, folder: Path) -> dict[str, float]:
    """Return the cost of one merge in this process; imports are not in it. Linux only."""
    import peft
    import transformers

    from pe_dpo.merging.merge import merge

    output = folder / f"merged-{what}"
    transformers.AutoModelForCausalLM, peft.PeftModel, peft.tuners.lora  # noqa: B018 -- imports happen here
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, cpu, wall = _status_mib("VmRSS"), time.process_time(), time.perf_counter()
    if what == "peft":
        base: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
        merged.save_pretrained(output)
        transformers.AutoTokenizer.from_pretrained(folder / "base").save_pretrained(output)
    elif what == "ours-nf4":
        merge(folder / "adapter-nf4", output, pairs=0)
    else:
        merge(folder / "adapter", output, pairs=0, quantize="none")
    cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    cost["peak_mib"] = _status_mib("VmHWM") - before
    shutil.rmtree(output)
    return cost


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(kib) / 1024


def markdown_cost(found: dict[str, Any]) -> str:
    """Return seconds and MiB of each merge, median (smallest–largest), and how many times PEFT's, within rounds."""
    lines = ["| | wall s | × PEFT | CPU s | × PEFT | peak MiB | × PEFT |", "|" + "---|" * 7]
    peer = found["rounds"]["peft"]
    for name, title in COSTS.items():
        cells = []
        for key in ("wall_seconds", "cpu_seconds", "peak_mib"):
            values = [one[key] for one in found["rounds"][name]]
            over = [value / one[key] for value, one in zip(values, peer, strict=True)]
            cells += [f"{spread(values)!s}", f"{spread(over)!s}"]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _main() -> None:
    """One process of `cost`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["make", *COSTS])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "make":
        make_large(options.folder)
        print("{}")
        return
    print(json.dumps(merge_large(options.what, options.folder)))


if __name__ == "__main__":
    _main()

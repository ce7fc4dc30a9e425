"""One architecture on one quantization: what `check`, `train` and `merge` say, and what came of it.

base       random, with the public layout of its files
check      ready to train, or the reason why not
train      two steps of four pairs, adapter on the default targets; which of its layers moved
merge      verified by the product, or the reason why not
equal      KL(base and adapter in plain PEFT ‖ the merged model in plain transformers), the largest of any position
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as hf
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.architectures.models import ARCHITECTURES, VOCABULARY
from pe_dpo.cli import main
from pe_dpo.disk import write_json
from pe_dpo.model.base import auto_class, inspect_base, load_base, load_tokenizer
from pe_dpo.quickstart.demo import BASE, PAIRS

QUANTIZATIONS = ("none", "nf4")
TOWERS = ("vision", "visual", "audio", "embed_tokens_extend")
"""What names of modules that are no part of the language model have in them."""


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Return what came of an architecture, by quantization.

    Args:
        name: in the table.
        folder: empty, for base, runs and merged models.
    """
    architecture, base = ARCHITECTURES[name], folder / "base"
    architecture.save(base)
    load_tokenizer(str(BASE)).save_pretrained(base)
    for side, rows in (("train", 8), ("test", 4)):
        lines = (PAIRS / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        (folder / f"{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {quantize: _measure(name, base, folder, quantize) for quantize in QUANTIZATIONS}


def _measure(name: str, base: Path, folder: Path, quantize: str) -> dict[str, Any]:
    recipe, run, merged = (folder / f"{quantize}{ending}" for ending in (".yaml", "-run", "-merged"))
    settings = {
        "model": {"base": str(base), "quantize": quantize},
        "adapter": {"rank": 4},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "test.jsonl")},
        "train": {"max_steps": 2, "pairs_per_step": 4, "learning_rate": 1e-2, "warmup": 0.0},
        "reference": {"store": str(folder / "store.sqlite")},
        "output": str(run),
    }
    write_json(recipe, settings)
    began = time.perf_counter()
    found: dict[str, Any] = {"check": command("check", recipe)}
    found["train"] = command("train", recipe)
    if (run / "adapter_model.safetensors").is_file():
        found |= _adapted(run, base)
        found["merge"] = command("merge", run, "-o", merged)
        if (merged / "merge_report.json").is_file():
            found["verdict"] = json.loads((merged / "merge_report.json").read_text(encoding="utf-8"))["verdict"]
        if (merged / "config.json").is_file():
            found |= _compare(base, run, merged, quantize, ARCHITECTURES[name].model_class)
    found["seconds"] = round(time.perf_counter() - began, 1)
    return found


def command(*arguments: object) -> dict[str, Any]:
    """Run a command of `pe-dpo` in this process; return its exit code, last line, warnings, and how it failed."""
    out, err = io.StringIO(), io.StringIO()
    argv, code, crash = ["pe-dpo", *map(str, arguments)], 0, None
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, {"COLUMNS": "1000"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception as error:  # noqa: BLE001 -- what a user would see as a traceback is a finding
            code, crash = -1, f"{type(error).__name__}: {error}"
            origin = traceback.extract_tb(error.__traceback__)
    said = [line.strip() for line in (err.getvalue() + out.getvalue()).splitlines() if line.strip()]
    result: dict[str, Any] = {"code": code, "said": said[-1] if said else ""}
    if crash is not None:
        ours = [frame for frame in origin if "pe_dpo" in frame.filename]
        result["said"] = " ".join(crash.split())[:300]
        result["crash"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in (ours[-1], origin[-1])]
    elif code:
        result["said"] = next((line for line in said if line.startswith("error:")), result["said"])
    result["warnings"] = [line for line in said if line.startswith("warning:")]
    return result


def _adapted(run: Path, base: Path) -> dict[str, Any]:
    """Which layers have an adapter and moved, and what share of the parameters is 4-bit."""
    adapter = load_file(run / "adapter_model.safetensors")
    moved = {
        name.rpartition(".lora_")[0]: bool(tensor.any())
        for name, tensor in adapter.items()
        if ".lora_B" in name or "embedding_B" in name
    }
    in_towers = [name for name in moved if any(word in name for word in TOWERS)]
    record = json.loads((run / "base.json").read_text(encoding="utf-8"))
    config = hf.AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    four_bit = sum(sizes.get(f"{layer}.weight") or sizes[layer] for layer in record["quantized_layers"])
    kinds = sorted({name.rpartition(".")[2] for name, has_moved in moved.items() if not has_moved})
    return {
        "adapted": len(moved),
        "unmoved": sum(not has_moved for has_moved in moved.values()),
        "in_towers": len(in_towers),
        "unmoved_layers": kinds,
        "adapted_layers": sorted({name.rpartition(".")[2] for name in moved}),
        "four_bit_share": round(four_bit / sum(sizes.values()), 4),
    }


def _compare(base: Path, run: Path, merged: Path, quantize: str, model_class: str | None) -> dict[str, Any]:
    """How far the merged model in plain transformers is from base and adapter in plain PEFT, nats."""
    ids = torch.randint(10, VOCABULARY - 10, (3, 40), generator=torch.Generator().manual_seed(0))
    kind = auto_class(hf.AutoConfig.from_pretrained(base))
    # 4-bit experts are the product's own; they are tested against dense values elsewhere.
    nf4 = load_base(inspect_base(str(base), quantize="nf4")) if quantize == "nf4" else None
    plain = (nf4 or kind.from_pretrained(base, dtype=torch.float32)).eval()
    reference = _logprobs(plain, ids)
    trained = _logprobs(PeftModel.from_pretrained(plain, str(run)).eval(), ids)
    served = kind.from_pretrained(merged, dtype=torch.float32).eval()
    found = {
        "kl_merged": largest_kl(trained, _logprobs(served, ids)),
        "kl_reference": largest_kl(trained, reference),
        "names_as_in_base": _names(merged) == _names(base),
    }
    if model_class is not None:
        whole, loading = getattr(hf, model_class).from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
        found["kl_merged_as_published"] = largest_kl(trained, _logprobs(whole.eval(), ids))
        found["missing"] = sorted(loading["missing_keys"])
    return found


def largest_kl(this: Tensor, other: Tensor) -> float:
    """Return the largest KL(this ‖ other) of any position, nats, from log-probs in float64."""
    return float((this.exp() * (this - other)).sum(-1).max())


@torch.no_grad()
def _logprobs(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.double().log_softmax(-1)


def _names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names

"""Where memory ends: running out of it, the longest row; and what else a card does: sampling, a merge, the tests of a GPU."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import Device, random_base, random_pairs, random_policy
from benchmarks.gpu.found import Found
from benchmarks.results import temporary_folder
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.inference.policy import Policy
from pe_dpo.inference.sampling import sample
from pe_dpo.inference.scorer import Scorer, choose_scorer
from pe_dpo.merging.merge import merge
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.model.base import checkpoint_activations, inspect_base
from pe_dpo.quickstart.demo import BASE
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.training.train import train

ROOT = Path(__file__).resolve().parents[2]


def gpu_tests(device: Device) -> Found:
    """The tests that need a card."""
    arguments = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    (device.out / "pytest.txt").write_text(run.stdout + run.stderr, encoding="utf-8")
    closing = (run.stdout.strip().splitlines() or ["nothing"])[-1]
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    is_right = run.returncode == 0 and (device.is_rehearsal or " passed" in closing)
    return Found(is_right, {"closing": closing, "failed": failed[:8]})


def out_of_memory(device: Device) -> Found:
    """A row that does not fit is split, and the gradient is the one that it has where all fits."""
    if device.is_rehearsal:
        return Found(None, {"rehearsed": False})
    model, pairs = random_policy(device, "layers-4", "none"), random_pairs(200, "hh")
    scorer = choose_scorer(model, pairs)
    scorer.token_budget = 10**9
    model.train()
    roomy = _gradient(model, scorer, pairs)
    allowed = torch.cuda.memory_allocated() + 0.4 * (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
    device.empty()
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        tight = _gradient(model, scorer, pairs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    off = float((tight - roomy).norm() / roomy.norm())
    facts = {"budget": scorer.token_budget, "tokens": scorer.tokens(pairs), "gradient_off": off}
    return Found(scorer.token_budget < scorer.tokens(pairs) and off < 2e-2, facts)


def _gradient(model: Any, scorer: Scorer, pairs: list[EncodedPair]) -> torch.Tensor:
    """The gradient of the summed preference, rows split until they fit as in training."""

    def work() -> None:
        model.zero_grad(set_to_none=True)
        for indices in scorer.split(pairs):
            scored = scorer.logprobs(model, [pairs[index] for index in indices])
            (scored.chosen - scored.rejected).sum().backward()

    scorer.within_memory(pairs, work)
    return torch.cat([parameter.grad.flatten() for parameter in adapter_parameters(model)])


def longest_row(device: Device) -> Found:
    """The longest pair that a gemma-3-1b can be trained on, activations recomputed; TRL 1.15 says 59,392 tokens on 79 GiB.

    Doubled until memory ends, then halved in between, on at most 79 GiB.
    """
    size = "tiny" if device.is_rehearsal else "gemma-3-1b"
    model = random_policy(device, size, "none")  # type: ignore[arg-type]
    scorer = choose_scorer(model, random_pairs(4, "hh"))
    checkpoint_activations(model.get_base_model())
    model.train()
    if not device.is_rehearsal:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 79 * 2**30 / total))
    peaks: dict[int, float | None] = {}
    fits, fails, length = 0, 0, 256 if device.is_rehearsal else 8192
    while not fails or fails - fits > 2048:
        try:
            peaks[length] = device.peak_gb(lambda: _one_pair(model, scorer, length))  # noqa: B023  (called at once)
            fits = length
        except torch.OutOfMemoryError:
            fails = length
        device.empty()
        if device.is_rehearsal:
            break
        length = (fits + fails) // 2 if fails else 2 * fits
    return Found(None, {"tokens": fits, "path": scorer.path, "peaks_gb": peaks})


def _one_pair(model: Any, scorer: Any, tokens: int) -> None:
    """Forward and backward of a pair of so many tokens in all, half of them the prompt."""
    ids = torch.randint(5, 500, (tokens,), generator=torch.Generator().manual_seed(tokens)).int().numpy()
    quarter = tokens // 4
    parts = ids[: 2 * quarter], ids[2 * quarter : 3 * quarter], ids[3 * quarter :]
    scored = scorer.logprobs(model, [EncodedPair(*parts, margin=0.0, where="long", prompt_key="long")])
    (scored.chosen - scored.rejected).sum().backward()
    model.zero_grad(set_to_none=True)


def sampling(device: Device) -> Found:
    """Tokens a second of 32 answers drawn together."""
    size = device.size("llama-3.1-8b")
    model, count, tokens = random_policy(device, size, "nf4"), *((4, 8) if device.is_rehearsal else (32, 64))
    facts = inspect_base(str(random_base(device, size)), quantize="nf4", dtype="bfloat16")
    policy, prompts = Policy(model, None, facts, ()), [pair.prompt_ids for pair in random_pairs(count, "hh")]

    def draw() -> list[Any]:
        return sample(policy, prompts, max_new_tokens=tokens, token_budget=65536)

    seconds = device.seconds(draw, times=1, warm=1)
    return Found(None, {"tokens_s": round(count * tokens / seconds), "ms_a_token": round(1e3 * seconds / tokens, 1)})


def merge_of_a_layer(device: Device) -> Found:
    """One layer of 8B trained for two steps and merged onto its codes; and whether card and CPU make the same codes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight, values = torch.randn(4096, 512 if device.is_rehearsal else 14336, dtype=torch.bfloat16), {}
    for place in {"cpu", device.torch.type}:
        codes = quantize_4bit(weight.to(place), quant_type="nf4", compress_statistics=True)
        values[place] = dequantize_4bit(*codes).cpu()
    facts: dict[str, Any] = {"values_unlike_the_cpus": int((values["cpu"] != values[device.torch.type]).sum())}

    folder, pairs = temporary_folder(), BASE.parent / "pairs" / "test.jsonl"
    text = (
        f"model: {{base: '{random_base(device, device.size('layer-of-8b'))}', quantize: nf4, dtype: bfloat16}}\n"
        f"data: {{train: '{pairs}'}}\noutput: '{folder / 'run'}'\n"
        "train: {max_steps: 2, pairs_per_step: 8, learning_rate: 1.0e-3}\n"
    )
    start = time.monotonic()
    run = train(recipe_from_yaml(text, "merge")).folder
    facts["train_s"] = round(time.monotonic() - start, 1)
    start = time.monotonic()
    report = merge(run, folder / "merged").report
    facts |= {"merge_s": round(time.monotonic() - start, 1), "kept": report["mean_kept"], "kl": report["held_out"]["kl"]}
    return Found(abs(report["mean_kept"] - 1) < 0.02, facts)

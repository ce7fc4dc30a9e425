"""The preference step at the sizes of Llama 3.1 8B: ours and TRL's on the same ids, in time, memory and parts.

Predicted for an H200 before any was seen: 0.95 s for 64 pairs of HH on nf4 (floor 0.63), 0.43 more for their reference;
UltraFeedback 2.9 s.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from benchmarks.gpu.device import Device, random_base, random_pairs, random_policy
from benchmarks.gpu.found import Found
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.estimate import estimate_run, local_card
from pe_dpo.estimate.lengths import of_pairs
from pe_dpo.inference.logprobs import concatenate
from pe_dpo.inference.scorer import Scorer, choose_scorer
from pe_dpo.model.adapter import as_reference
from pe_dpo.model.fingerprint import base_fingerprint
from pe_dpo.objective import preference_loss
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.training.memory import plan_memory

PAIRS = 64
BETA = 0.1
LENGTHS: tuple[Literal["hh", "uf"], ...] = ("hh", "uf")


def make_base(device: Device) -> Found:
    """The random base of 8B, written to disk for all later checks."""
    start = time.monotonic()
    folder = random_base(device, device.size("llama-3.1-8b"))
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Found(None, {"gb": round(size / 1e9, 3), "seconds": round(time.monotonic() - start, 1)})


def ours_on_codes(device: Device) -> Found:
    """Our step on nf4."""
    return _ours(device, "nf4")


def ours_in_bf16(device: Device) -> Found:
    """Our step on 16-bit weights."""
    return _ours(device, "none")


def _ours(device: Device, quantize: Literal["nf4", "none"]) -> Found:
    start = time.monotonic()
    model = random_policy(device, device.size("llama-3.1-8b"), quantize)
    device.wait()
    facts: dict[str, Any] = {"load_s": round(time.monotonic() - start, 1)}
    facts["fingerprint_s"] = round(device.seconds(lambda: base_fingerprint(model), times=1, warm=0), 1)
    count = 4 if device.is_rehearsal else PAIRS
    samples = {name: random_pairs(count, name, seed=number) for number, name in enumerate(LENGTHS)}
    start = time.monotonic()
    scorer = choose_scorer(model, samples["hh"])
    facts |= {"choose_s": round(time.monotonic() - start, 1), "path": scorer.path}
    start = time.monotonic()
    tokens, recomputation = plan_memory(model, samples["hh"] + samples["uf"], scorer, tokens="auto", checkpointing="auto")
    facts |= {"plan_s": round(time.monotonic() - start, 1), "row_tokens": tokens, "recomputed_above": recomputation.above}
    scorer.token_budget = tokens
    model.train()
    for name, pairs in samples.items():
        facts[name] = {**_timed(device, model, scorer, pairs), "estimated": _estimated(device, quantize, pairs)}
    if not device.is_rehearsal:
        facts["kernels"], table = _profile(model, scorer, samples["hh"][: PAIRS // 4])
        (device.out / f"kernels-{quantize}.txt").write_text(table, encoding="utf-8")
    wanted = "segments" if device.is_rehearsal else "varlen"
    return Found(scorer.path == wanted, facts)


def _timed(device: Device, model: Any, scorer: Scorer, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    """Seconds of a step with the reference stored, of the reference pass, and the most memory."""
    rows = [[pairs[index] for index in row] for row in scorer.split(pairs)]

    def reference() -> Any:
        with as_reference(model) as frozen:
            return [scorer.logprobs(frozen, row) for row in rows]

    stored = reference()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        for row, known in zip(rows, stored, strict=True):
            scored = scorer.logprobs(model, row)
            loss = preference_loss(scored.chosen, scored.rejected, known.chosen, known.rejected, beta=BETA).loss
            (loss.sum() / len(pairs)).backward()

    seconds = device.seconds(step, times=3, warm=1)
    tokens = scorer.tokens(pairs)
    return {
        "tokens": tokens,
        "rows": len(rows),
        "step_s": round(seconds, 3),
        "pairs_s": round(len(pairs) / seconds, 1),
        "reference_s": round(device.seconds(reference, times=2, warm=1), 3),
        "peak_gb": device.peak_gb(step),
        "mean_logprob": float(concatenate(stored).chosen.mean()),
    }


def _estimated(device: Device, quantize: str, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    """What `pe-dpo estimate` says of a run on these pairs."""
    recipe = recipe_from_yaml(
        f"model: {{base: '{random_base(device, device.size('llama-3.1-8b'))}', quantize: {quantize}, dtype: bfloat16}}\n"
        f"data: {{train: pairs.jsonl}}\noutput: run\nadapter: {{rank: 16, alpha: 32}}\n"
        f"train: {{pairs_per_step: {len(pairs)}}}\n",
        "estimate",
    )
    found = estimate_run(recipe, local_card(), lengths=of_pairs(pairs, 0, recipe))
    seconds = round(found.step.seconds, 3) if found.card else None
    return {"peak_gb": round(found.peak / 1e9, 2), "step_s": seconds, "row_tokens": found.budget}


def _profile(model: Any, scorer: Scorer, pairs: Sequence[EncodedPair]) -> tuple[dict[str, Any], str]:
    """Kernels of one row forward and backward, how long the card was busy with them, and the table of the longest."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        scored = scorer.logprobs(model, pairs)
        (scored.chosen - scored.rejected).sum().backward()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
    return {"count": len(kernels), "pairs": len(pairs), "busy_s": round(busy, 3)}, table


def trl_on_codes(device: Device) -> Found:
    """TRL's step on nf4."""
    return _trl(device, "nf4")


def trl_in_bf16(device: Device) -> Found:
    """TRL's step on 16-bit weights."""
    return _trl(device, "bf16")


def _trl(device: Device, dtype: Literal["nf4", "bf16"]) -> Found:
    """TRL at its defaults, and at the settings that were best elsewhere: small batches, the reference stored."""
    from benchmarks.trl_side import PRECISIONS, GridPoint, PeerStep

    count = 4 if device.is_rehearsal else PAIRS
    base, facts = random_base(device, device.size("llama-3.1-8b")), {}
    default = GridPoint(min(8, count), True, False, False, PRECISIONS[dtype][-1])
    best = [GridPoint(size, False, True, True, PRECISIONS[dtype][-1]) for size in (4, 8) if size <= count]
    for name in LENGTHS:
        pairs = random_pairs(count, name, seed=LENGTHS.index(name))
        for label, point in (("default", default), *((f"best of {p.pairs_per_microbatch}", p) for p in best)):
            seconds: Callable[[Callable[[], object]], float] = lambda run: device.seconds(run, times=3, warm=1)  # noqa: E731
            step = PeerStep(point, pairs, base, device="cpu" if device.is_rehearsal else "cuda")
            facts[f"{name}, {label}"] = {
                "point": point.name, "step_s": round(seconds(step), 3), "peak_gb": device.peak_gb(step)
            }  # fmt: skip
            del step
            device.empty()
    return Found(None, facts)

"""One tensor of the merge: summed in float32, rounded once, and how much of the update is left after it.

    kept = ⟨Ŵ − W, ΔW⟩ / ⟨ΔW, ΔW⟩                 1 where all of the update is in the file, 0 where nothing
    its sd by rounding alone: √(Σ (step·ΔW)² / 12) / ⟨ΔW, ΔW⟩

Values of 4-bit codes in float32 lie between those of the 16-bit grid, so that one rounding loses nothing on average. A 16-bit
W lies on the grid, and there every |ΔW| below half a step is lost by rounding to nearest; stochastic rounding keeps its mean.
Without double quantization one value in 28 lies on the grid as well (codes ±1 give back the weight that set the scale).
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pe_dpo.errors import ModelError
from pe_dpo.merging.plan import Plan, PlannedTensor

KEPT_BAND = 0.5
"""How far the share kept of one tensor may be from 1. A tensor left out has 0, added twice 2."""
MEAN_BAND = 0.1
"""The same of all tensors, each counted by ⟨ΔW, ΔW⟩."""
NOISE_BAND = 6.0
"""Standard deviations of rounding that are allowed where they are more; the largest of 147 good tensors was 5.5, at |ΔW|/|W| of
3e-4 and less, with 12 to 98 thousand weights each (research log)."""
ENOUGH = 0.99
"""Below this share kept, `rounding: auto` rounds stochastically what lies on the grid."""


_BLOCK = 1 << 20
"""Numbers that are rounded stochastically, or summed, at a time: a dozen arrays of this size are needed for it."""


class MergedTensor(NamedTuple):
    """What became of one tensor that the adapter changes."""

    name: str
    kept: float | None
    """None where there is nothing to keep, an update of zeros."""
    relative_size: float
    """‖ΔW‖ / ‖W‖, Frobenius."""
    energy: float
    """⟨ΔW, ΔW⟩."""
    noise: float
    """Standard deviation of `kept` by rounding alone."""
    rounding: str
    """nearest, or stochastic for all of it or for what lies on the grid."""


def merge_tensor(plan: Plan, planned: PlannedTensor, weight: Tensor) -> tuple[Tensor, MergedTensor]:
    """Return a tensor with its change in the dtype that is written, and what became of the update.

    Args:
        plan: of the merge.
        planned: the tensor, with a change.
        weight: as it is in the base, float32.

    Raises:
        ModelError: shapes do not fit, or a value was not rounded to a neighbour.
    """
    change, adapter = planned.change, plan.source.adapter
    assert change is not None, "the caller's branch"
    name, shape, dtype = planned.facts
    exact = adapter.updated(change, weight)
    if exact.shape != shape:
        raise ModelError(f"{name}: would become {tuple(exact.shape)} where {tuple(shape)} is expected")
    if exact.shape != weight.shape:  # another vocabulary: what is new has nothing to be compared with
        shared = min(len(exact), len(weight))
        weight = torch.cat([weight[:shared], exact[shared:]])
    # ΔW by itself for plain LoRA, so that one that was left out or added twice shows; else what the formula made of W.
    update = adapter.low_rank_update(change, weight.device) if change.keys == [change.a, change.b] else None
    delta = exact - weight if update is None else update
    seed = int.from_bytes(hashlib.sha256(f"{plan.seed} {name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    if plan.rounding == "stochastic":
        result = stochastically_rounded(exact, dtype, generator)
        return result, _compare(name, weight, exact, delta, result, "stochastic")
    result = exact.to(dtype)
    report = _compare(name, weight, exact, delta, result, "nearest")
    if plan.rounding == "auto" and report.kept is not None and report.kept < ENOUGH:
        # Only where W itself lies on the grid; elsewhere rounding to nearest is unbiased, and has less noise.
        is_on_grid = weight.to(dtype).float() == weight
        result = torch.where(is_on_grid, stochastically_rounded(exact, dtype, generator), result)
        report = _compare(name, weight, exact, delta, result, "stochastic on the grid")
    return result, report


def stochastically_rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return values in a 16-bit dtype, each one of its two neighbours there, so that the mean over seeds is the value itself.

    Args:
        values: float32, any shape.
        dtype: bfloat16 or float16; float32 returns the values.
        generator: on the CPU, so that a seed is the same everywhere.
    """
    if dtype == torch.float32 or not values.numel():
        return values.to(dtype)
    blocks = []
    for block in values.reshape(-1).split(_BLOCK):
        near = block.to(dtype)
        off = block - near.float()
        # The bits of a float without its sign count its distance from zero.
        is_away = torch.where(near == 0, torch.ones_like(off, dtype=torch.bool), (off > 0) == (near > 0))
        bits = torch.where(near == 0, torch.zeros_like(near).copysign(near), near).view(torch.int16)
        other = torch.where(is_away, bits + 1, bits - 1).view(dtype)
        step = (other.float() - near.float()).abs()
        chance = torch.where(step.isfinite() & (step > 0), off.abs() / step, torch.zeros_like(off))
        drawn = torch.rand(block.shape, generator=generator).to(block.device)
        blocks.append(torch.where(drawn < chance, other, near))
    return torch.cat(blocks).view(values.shape)


def _compare(name: str, weight: Tensor, exact: Tensor, delta: Tensor, result: Tensor, rounding: str) -> MergedTensor:
    """Sum in float32 within blocks and in float64 over them; block by block, so that nothing of the tensor's size is made."""
    moved_along = energy = size = noise = 0.0
    info = torch.finfo(result.dtype)
    parts = (one.reshape(-1).split(_BLOCK) for one in (weight, exact, delta, result))
    for w, e, d, rounded in zip(*parts, strict=True):
        # The distance of neighbours where each value is: a float's exponent is what is left of its bits.
        step = e.abs().clamp_min_(info.smallest_normal).view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
        step.mul_(info.eps)
        r = rounded.float()
        if not bool(((r - e).abs_() <= step).all()):
            raise ModelError(f"{name}: was not rounded to a neighbour in {result.dtype}; a fault of this program or of torch")
        step.mul_(d)
        moved_along += float(torch.dot(r - w, d))
        energy += float(torch.dot(d, d))
        size += float(torch.dot(w, w))
        noise += float(torch.dot(step, step))
    return MergedTensor(
        name=name,
        kept=moved_along / energy if energy else None,
        relative_size=(energy / size) ** 0.5 if size else float("inf"),
        energy=energy,
        noise=(noise / 12) ** 0.5 / energy if energy else 0.0,
        rounding=rounding,
    )


def tensor_failures(merged: Sequence[MergedTensor]) -> list[str]:
    """Return which tensors did not keep their update, in words; empty if all did."""
    failures = []
    for tensor in merged:
        width = max(KEPT_BAND, NOISE_BAND * tensor.noise)
        if tensor.kept is not None and abs(tensor.kept - 1) > width:
            failures.append(
                f"{tensor.name}: {tensor.kept:.3f} of its update kept (wanted 1 ± {width:.2f}), "
                f"|ΔW|/|W| {tensor.relative_size:.1e}, {tensor.rounding} rounding"
            )
    mean, width = mean_kept(merged), max(MEAN_BAND, NOISE_BAND * mean_noise(merged))
    if mean is not None and abs(mean - 1) > width:
        failures.append(f"all tensors: {mean:.3f} of the update kept (wanted 1 ± {width:.2f})")
    return failures


def mean_kept(merged: Sequence[MergedTensor]) -> float | None:
    """Return ⟨Ŵ−W, ΔW⟩ / ⟨ΔW, ΔW⟩ over all tensors together; None if no tensor has an update."""
    measured = [(tensor.kept, tensor.energy) for tensor in merged if tensor.kept is not None]
    return sum(kept * energy for kept, energy in measured) / sum(energy for _, energy in measured) if measured else None


def mean_noise(merged: Sequence[MergedTensor]) -> float:
    """Return the standard deviation of `mean_kept` by rounding alone."""
    measured = [(tensor.noise, tensor.energy) for tensor in merged if tensor.kept is not None]
    total = sum(energy for _, energy in measured)
    return sum((noise * energy) ** 2 for noise, energy in measured) ** 0.5 / total if measured else 0.0

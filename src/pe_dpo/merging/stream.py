"""The merge itself, tensor by tensor from files to files; memory is bounded by the largest tensor, never by the model.

    dequantized   Ŵ = round(dequantize(quantize(W)) + ΔW)      all in float32, rounded once; what was 4-bit in training
    original      Ŵ = round(W + ΔW)

Values of 4-bit codes in float32 lie between those of the 16-bit grid, so that one rounding loses nothing on average. A 16-bit
W lies on the grid, and there every |ΔW| below half a step is lost by rounding to nearest; stochastic rounding keeps its mean.
Without double quantization one value in 28 lies on the grid as well (codes ±1 give back the weight that set the scale).

    kept = ⟨Ŵ − W, ΔW⟩ / ⟨ΔW, ΔW⟩                 1 where all of the update is in the file, 0 where nothing
    its sd by rounding alone: √(Σ (step·ΔW)² / 12) / ⟨ΔW, ΔW⟩
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pe_dpo.errors import ModelError
from pe_dpo.merging.plan import Output
from pe_dpo.merging.updates import AdapterFiles, Change
from pe_dpo.model.fingerprint import parameter_fingerprint
from pe_dpo.model.quantization import dequantized, quantized_parameter
from pe_dpo.model.tensor_files import TensorFiles, TensorWriter
from pe_dpo.quantizations import Quantization, is_four_bit

Rounding = Literal["auto", "nearest", "stochastic"]

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


class BaseAsTrained(NamedTuple):
    """How the base was loaded in training."""

    quantize: Quantization
    dtype: torch.dtype
    quantized_layers: frozenset[str]
    tensors: Mapping[str, str]
    """sha256 of each parameter as loaded, by name; may be empty."""
    device: torch.device


def write_merged(
    outputs: Sequence[Output],
    files: TensorFiles,
    adapter: AdapterFiles,
    writer: TensorWriter,
    base: BaseAsTrained,
    *,
    onto: Literal["dequantized", "original"],
    rounding: Rounding = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[MergedTensor]:
    """Write all tensors and return what became of those that the adapter changes.

    Args:
        outputs: in the writer's order.
        files: of the base.
        adapter: to merge.
        writer: closed by the caller.
        base: how it was loaded in training; each tensor is checked against it.
        onto: see above.
        rounding: to the dtype written.
        seed: of stochastic rounding; with the tensor's name it determines every bit.
        progress: called with bytes done and bytes in all.

    Raises:
        ModelError: a tensor is not the one of training, or has no finite place in the dtype written.
    """
    merged = []
    total, done = sum(output.facts.bytes for output in outputs), 0
    with torch.no_grad():
        for output in outputs:
            stored = files.read(output.source)
            parameter = _as_loaded(output, stored, base)
            loaded_in = _check_same_tensor(output, stored, parameter, files, base)
            weight = _as_trained(stored, parameter, loaded_in) if onto == "dequantized" else stored
            if output.change is None:
                result = weight.to(output.facts.dtype)
            else:
                result, report = _merge_tensor(output, weight.to(base.device).float(), adapter, rounding, seed)
                merged.append(report)
            if not bool(result.isfinite().all()):
                raise ModelError(f"{output.facts.name}: would not be finite in {result.dtype}; write --dtype bf16 or fp32")
            writer.write(output.facts.name, result.cpu())
            done += output.facts.bytes
            progress(done, total)
    return merged


def faults(merged: Sequence[MergedTensor]) -> list[str]:
    """Return which tensors did not keep their update, in words; empty if all did."""
    found = []
    for tensor in merged:
        width = max(KEPT_BAND, NOISE_BAND * tensor.noise)
        if tensor.kept is not None and abs(tensor.kept - 1) > width:
            found.append(
                f"{tensor.name}: {tensor.kept:.3f} of its update kept (wanted 1 ± {width:.2f}), "
                f"|ΔW|/|W| {tensor.relative_size:.1e}, {tensor.rounding} rounding"
            )
    mean, width = mean_kept(merged), max(MEAN_BAND, NOISE_BAND * mean_noise(merged))
    if mean is not None and abs(mean - 1) > width:
        found.append(f"all tensors: {mean:.3f} of the update kept (wanted 1 ± {width:.2f})")
    return found


def mean_kept(merged: Sequence[MergedTensor]) -> float | None:
    """Return ⟨Ŵ−W, ΔW⟩ / ⟨ΔW, ΔW⟩ over all tensors together; None if no tensor has an update."""
    measured = [(tensor.kept, tensor.energy) for tensor in merged if tensor.kept is not None]
    return sum(kept * energy for kept, energy in measured) / sum(energy for _, energy in measured) if measured else None


def mean_noise(merged: Sequence[MergedTensor]) -> float:
    """Return the standard deviation of `mean_kept` by rounding alone."""
    measured = [(tensor.noise, tensor.energy) for tensor in merged if tensor.kept is not None]
    total = sum(energy for _, energy in measured)
    return sum((noise * energy) ** 2 for noise, energy in measured) ** 0.5 / total if measured else 0.0


def _as_loaded(output: Output, stored: Tensor, base: BaseAsTrained) -> Any:
    """The 4-bit parameter that loading made of a tensor in training; None for one that was not quantized."""
    if not is_four_bit(base.quantize) or output.module_name.removesuffix(".weight") not in base.quantized_layers:
        return None
    return quantized_parameter(stored.to(base.dtype), base.quantize, device=base.device)


def _check_same_tensor(output: Output, stored: Tensor, parameter: Any, files: TensorFiles, base: BaseAsTrained) -> torch.dtype:
    """Check a tensor against training, and return the dtype that it had there.

    A few models keep some weights in float32 whatever they are loaded in; what is no floating point number stays what it is.
    """
    usual = base.dtype if stored.is_floating_point() else stored.dtype
    expected = base.tensors.get(output.recorded_as)
    if expected is None:
        return usual
    if parameter is not None and expected == parameter_fingerprint(parameter):
        return usual
    for dtype in dict.fromkeys((usual, torch.float32, stored.dtype)) if parameter is None else ():
        if expected == parameter_fingerprint(stored.to(dtype)):
            return dtype
    raise ModelError(
        f"{files.file_of(output.source)}: {output.source} is not what the adapter was trained on (sha256 of the loaded "
        "weights): another base, a damaged file, or quantized to other bits by another device or version; restore the "
        "base, or merge where it was trained"
    )


def _as_trained(stored: Tensor, parameter: Any, loaded_in: torch.dtype) -> Tensor:
    """The values that training had: those of the 4-bit codes, or the base's own, rounded where they were loaded narrower."""
    if parameter is not None:
        return dequantized(parameter)
    return stored.to(loaded_in) if loaded_in.itemsize < stored.dtype.itemsize else stored


def _merge_tensor(
    output: Output, weight: Tensor, adapter: AdapterFiles, rounding: Rounding, seed: int
) -> tuple[Tensor, MergedTensor]:
    assert output.change is not None, "the caller's branch"
    exact = adapter.updated(output.change, weight)
    dtype, name = output.facts.dtype, output.facts.name
    if exact.shape != output.facts.shape:
        raise ModelError(f"{name}: would become {tuple(exact.shape)} where {tuple(output.facts.shape)} is due")
    if exact.shape != weight.shape:  # another vocabulary: what is new has nothing to be compared with
        shared = min(len(exact), len(weight))
        weight = torch.cat([weight[:shared], exact[shared:]])
    delta = _wanted_update(output.change, weight, exact, adapter)
    generator = _generator(seed, name)
    if rounding == "stochastic":
        result, how = stochastically_rounded(exact, dtype, generator), "stochastic"
        sums = _sums(weight, exact, delta, result)
    else:
        result, how = exact.to(dtype), "nearest"
        sums = _sums(weight, exact, delta, result)
        if rounding == "auto" and sums.moved_along < ENOUGH * sums.energy:
            result, how = _stochastic_on_grid(weight, exact, result, generator), "stochastic on the grid"
            sums = _sums(weight, exact, delta, result)
    if not sums.are_neighbours:
        raise ModelError(f"{name}: was not rounded to a neighbour in {dtype}; a fault of this program or of torch")
    kept = sums.moved_along / sums.energy if sums.energy else None
    noise = (sums.noise / 12) ** 0.5 / sums.energy if sums.energy else 0.0
    relative = (sums.energy / sums.size) ** 0.5 if sums.size else float("inf")
    return result, MergedTensor(name, kept, relative, sums.energy, noise, how)


class _Sums(NamedTuple):
    """Over all numbers of a tensor."""

    moved_along: float
    """⟨Ŵ−W, ΔW⟩."""
    energy: float
    """⟨ΔW, ΔW⟩."""
    size: float
    """⟨W, W⟩."""
    noise: float
    """⟨step·ΔW, step·ΔW⟩."""
    are_neighbours: bool
    """Whether each Ŵ is one of the two neighbours of W + ΔW."""


def _sums(weight: Tensor, exact: Tensor, delta: Tensor, result: Tensor) -> _Sums:
    """In float32 within blocks and in float64 over them; block by block, so that nothing of the tensor's size is made."""
    totals, are_neighbours = [0.0, 0.0, 0.0, 0.0], True
    parts = (one.reshape(-1).split(_BLOCK) for one in (weight, exact, delta, result))
    for w, e, d, rounded in zip(*parts, strict=True):
        r, step = rounded.float(), _step(e, result.dtype)
        are_neighbours = are_neighbours and bool(((r - e).abs_() <= step).all())
        step.mul_(d)
        for index, (one, other) in enumerate(((r - w, d), (d, d), (w, w), (step, step))):
            totals[index] += float(torch.dot(one, other))
    moved_along, energy, size, noise = totals
    return _Sums(moved_along, energy, size, noise, are_neighbours)


def _stochastic_on_grid(weight: Tensor, exact: Tensor, nearest: Tensor, generator: torch.Generator) -> Tensor:
    """Round stochastically where W itself lies on the grid; elsewhere rounding to nearest is unbiased, and has less noise."""
    is_on_grid = weight.to(nearest.dtype).float() == weight
    return torch.where(is_on_grid, stochastically_rounded(exact, nearest.dtype, generator), nearest)


def _wanted_update(change: Change, weight: Tensor, exact: Tensor, adapter: AdapterFiles) -> Tensor:
    """ΔW by itself for plain LoRA, so that one that was left out or added twice shows; else what the formula made of W."""
    is_plain = change.keys == [change.a, change.b]
    update = adapter.low_rank_update(change, weight.device) if is_plain else None
    return exact - weight if update is None else update


def stochastically_rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return values in a 16-bit dtype, each one of its two neighbours there, so that the mean over seeds is the value itself.

    Args:
        values: float32, any shape.
        dtype: bfloat16 or float16; float32 returns the values.
        generator: on the CPU, so that a seed is the same everywhere.
    """
    if dtype == torch.float32:
        return values
    blocks = [_round_block(block, dtype, generator) for block in values.reshape(-1).split(_BLOCK)]
    return torch.cat(blocks).view(values.shape) if blocks else values.to(dtype)


def _round_block(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    near = values.to(dtype)
    off = values - near.float()
    # The bits of a float without its sign count its distance from zero.
    away = torch.where(near == 0, torch.ones_like(off, dtype=torch.bool), (off > 0) == (near > 0))
    start = torch.where(near == 0, torch.zeros_like(near).copysign(values.to(dtype)), near)
    bits = start.view(torch.int16)
    other = torch.where(away, bits + 1, bits - 1).view(dtype)
    step = (other.float() - near.float()).abs()
    chance = torch.where(step.isfinite() & (step > 0), off.abs() / step, torch.zeros_like(off))
    drawn = torch.rand(values.shape, generator=generator).to(values.device)
    return torch.where(drawn < chance, other, near)


def _generator(seed: int, name: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(number)


def _step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbours in a dtype, where each value is; float32. A float's exponent is what is left of its bits."""
    info = torch.finfo(dtype)
    powers = values.abs().clamp_min_(info.smallest_normal).view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    return powers.mul_(info.eps)

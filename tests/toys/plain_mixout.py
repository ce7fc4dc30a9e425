"""Mixout written out, for tests: SplitMix64 in Python's integers, and the mixed weight as a matrix."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_ALL = 2**64 - 1


def split_mix(state: int) -> Iterator[int]:
    """Yield the 64-bit numbers of the SplitMix64 generator from a state (Steele, Lea & Flood 2014), one by one."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _ALL
        bits = state
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _ALL
        yield bits ^ (bits >> 31)


def factors(seed: int, draw: int | tuple[int, ...], name: str, shape: Sequence[int], p: float) -> Tensor:
    """Return the factors of a mask, row by row, in float64: 0 with probability p, else 1/(1−p)."""
    numbers = split_mix(int.from_bytes(hashlib.sha256(f"{seed} {draw} {name}".encode()).digest()[:8], "big"))
    count = int(torch.Size(shape).numel())
    kept = [next(numbers) / 2**64 >= p for _ in range(count)]
    return torch.tensor([1 / (1 - p) if one else 0.0 for one in kept], dtype=torch.float64).view(*shape)


def mixed(weight: Tensor, target: Tensor, factors: Tensor) -> Tensor:
    """Return W0 + M ⊙ (W − W0) / (1−p), with a gradient for both."""
    factors = factors.to(weight.dtype)
    return torch.where(factors != 0, target + (weight - target) * factors, target)

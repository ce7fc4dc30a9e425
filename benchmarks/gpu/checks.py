"""The checks in order of value: what each proves, how long it takes on an H200, and which of its lines a CPU cannot run."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.gpu import arithmetic, limits, steps
from benchmarks.gpu.device import Device
from benchmarks.gpu.found import Found


class Check(NamedTuple):
    """One thing to be shown."""

    name: str
    seconds: float
    """What it needs on an H200, at most; it is ended at twice that."""
    run: Callable[[Device], Found]
    cuda_only: tuple[str, ...] = ()
    """What of it a rehearsal leaves out."""


CHECKS: list[Check] = [
    Check("versions", 20, arithmetic.versions, ("clocks of a matrix product and of a copy",)),
    Check("attention", 15, arithmetic.attention, ("the variable-length kernel",)),
    Check("head", 10, arithmetic.head),
    Check("self-check", 50, arithmetic.self_check, ("int8", "the choice of the variable-length kernel")),
    Check("base", 70, steps.make_base),
    Check("step-nf4", 100, steps.ours_on_codes, ("peaks of memory", "kernels by the profiler")),
    Check("trl-nf4", 100, steps.trl_on_codes, ("peaks of memory",)),
    Check("tests", 90, limits.gpu_tests, ("tests/gpu",)),
    Check("memory", 30, limits.out_of_memory, ("all of it",)),
    Check("step-bf16", 60, steps.ours_in_bf16, ("peaks of memory",)),
    Check("trl-bf16", 70, steps.trl_in_bf16, ("peaks of memory",)),
    Check("longest-row", 60, limits.longest_row, ("all of it but one short row",)),
    Check("sampling", 40, limits.sampling),
    Check("merge", 30, limits.merge_of_a_layer),
]

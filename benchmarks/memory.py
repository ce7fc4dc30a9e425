"""Peak memory of one step, each variant in a fresh process: the high-water mark above what was resident before the step.

The allocator is told to return large blocks at once. By default glibc keeps freed blocks of up to 32 MiB in a heap that frays:
the same step then peaks anywhere from 500 to 610 MiB, where 307 MiB are alive.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.models import saved_base
from benchmarks.ours import OurStep, ladder
from benchmarks.pairs import draw, population
from benchmarks.results import Settings

RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
"""glibc: blocks from this size on, in bytes, come from the kernel and go back to it."""


def make_step(name: str, settings: Settings, pairs: Any) -> Any:
    """Return the step of a variant by its name, TRL's or ours."""
    if name.startswith("TRL "):
        from benchmarks.trl_side import PeerStep, parse_point  # here, since our processes are quicker without TRL

        return PeerStep(parse_point(name), pairs, saved_base(settings.model))
    (rung,) = [rung for rung in ladder() if rung.name == name]
    return OurStep(rung, pairs, settings.model, settings.dtype)


def measure_one(name: str, settings: Settings) -> float:
    """Return the peak of one step in this process, MiB above what was resident before it. Linux only."""
    pairs = draw(population(settings.shape), settings.shape)
    return peak_mib(make_step(name, settings, pairs))


def peak_mib(work: Callable[[], Any]) -> float:
    """Return the peak while some work runs, MiB above what was resident before it. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading left in the heap must not hide what the work takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_mib("VmRSS")
    work()
    return _status_mib("VmHWM") - before


def measure(names: Iterable[str], settings: Settings) -> dict[str, float]:
    """Return the peak of each variant's step, MiB, each from a process of its own."""
    peaks = {}
    for name in names:
        options = ["--shape", settings.shape, "--dtype", settings.dtype, "--model", settings.model]
        command = [sys.executable, "-m", "benchmarks", "memory-one", "--variant", name, *options]
        done = subprocess.run(command, env=os.environ | RETURN_BLOCKS, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"memory of {name}: the process failed:\n{done.stderr[-2000:]}")
        peaks[name] = float(json.loads(done.stdout.splitlines()[-1])["mib"])
        print(f"  {name:<60} {peaks[name]:7.0f} MiB", flush=True)
    return peaks


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(kib) / 1024

"""Interleaved rounds: every variant once per round, in random order, ratios formed within a round."""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

TOUCHED_BYTES = 5 * 2**29
"""What the largest step of the small model takes, and some."""

Step = Callable[[], float]
"""Runs one optimizer batch forward and backward, and returns its loss."""


class Spread(NamedTuple):
    """Median and range over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def keep_heap() -> None:
    """Let the allocator keep what it once got, so that the kernel's zeroing of pages is not timed.

    glibc otherwise maps and unmaps every large temporary: up to 7 CPU seconds of a 20-second step of TRL's default, and nothing
    of a small step. Kept heaps are kinder to whoever uses large temporaries; processes that measure memory do not call this.
    The heap is touched once here, so that the first steps do not pay for its pages either.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)
        torch.ones(TOUCHED_BYTES // 4)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds (user and system, all threads of the process) of some work, and its result."""
    gc.collect()
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def run_rounds(steps: Mapping[str, Step], rounds: int, *, seed: int = 0, is_quiet: bool = False) -> dict[str, list[float]]:
    """Return the CPU seconds of each step in each round; Ctrl-C ends after the rounds that are complete.

    Args:
        steps: by name, warmed up.
        rounds: how many.
        seed: of the orders.
        is_quiet: say nothing of rounds that went well.
    """
    order = random.Random(seed)
    complete: list[dict[str, float]] = []
    try:
        for number in range(1, rounds + 1):
            names = order.sample(list(steps), len(steps))
            complete.append({name: timed(steps[name])[0] for name in names})
            if not is_quiet:
                print(f"  round {number} of {rounds}: {sum(complete[-1].values()):.0f} CPU seconds", flush=True)
    except KeyboardInterrupt:
        print(f"  interrupted: {len(complete)} complete rounds are kept", flush=True)
        if not complete:
            raise
    return {name: [row[name] for row in complete] for name in steps}


def spread(values: Sequence[float]) -> Spread:
    """Return median, smallest and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(seconds: Mapping[str, Sequence[float]], name: str, over: str) -> Spread:
    """Return how many times faster `name` is than `over`, formed within each round."""
    return spread([slow / fast for slow, fast in zip(seconds[over], seconds[name], strict=True)])

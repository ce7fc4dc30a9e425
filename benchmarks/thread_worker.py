"""Wall seconds of our step with several torch threads, after a warm-up: `python -P thread_worker.py THREADS STEPS`, as JSON."""

import json
import sys
import time

import torch

from benchmarks.ours import FULL_STACK, OurStep, ladder
from benchmarks.pairs import draw, population


def main() -> None:
    """Run the steps and print their seconds."""
    threads, count = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    (rung,) = [rung for rung in ladder() if rung.name == FULL_STACK]
    step = OurStep(rung, draw(population("hh"), "hh"), "m8k", "fp32")
    step()
    seconds, cpu = [], time.process_time()
    for _ in range(count):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"wall_seconds": seconds, "cpu_seconds": (time.process_time() - cpu) / count}))


if __name__ == "__main__":
    main()

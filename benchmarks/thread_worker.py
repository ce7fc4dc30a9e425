"""Wall seconds of our step on several torch threads, after a warm-up: `python -P thread_worker.py '{"threads": 2, …}'`.

threads     of torch
steps       that are timed
busy        processes that do nothing but count, started after the warm-up
is_alone    give this process and the busy ones precedence over all else that runs on the machine, for the timed steps alone
"""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.ours import FULL_STACK, OurStep, ladder
from benchmarks.pairs import draw, population

GROUP = Path("/proc/self/autogroup")
"""The kernel's scheduling group of a session; its weight is against all other sessions, and needs root to be raised."""


def main() -> None:
    """Run the steps and print their seconds."""
    asked = json.loads(sys.argv[1])
    os.setsid()
    torch.set_num_threads(asked["threads"])
    (rung,) = [rung for rung in ladder() if rung.name == FULL_STACK]
    step = OurStep(rung, draw(population("hh"), "hh"), "m8k", "fp32")
    step()
    with ExitStack() as stack:
        for _ in range(asked["busy"]):
            process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        if asked["is_alone"]:
            GROUP.write_text("-20", encoding="utf-8")
            stack.callback(GROUP.write_text, "0", encoding="utf-8")
        seconds, cpu = [], time.process_time()
        for _ in range(asked["steps"]):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        cpu = (time.process_time() - cpu) / asked["steps"]
    print(json.dumps({"wall_seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main()

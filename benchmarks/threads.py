"""The command `threads`: wall time of our step on two torch threads, on idle cores and beside busy processes.

A thread that waits for another at the end of a parallel part first spins and then sleeps. Where a core is busy with something
else, it spins while the other thread waits for the core. How long is GNU's runtime's to say, the one in torch's wheels for
Linux; it reads OMP_WAIT_POLICY (PASSIVE: not at all) and GOMP_SPINCOUNT when it is loaded.

Each variant is a process of its own; those of a round run one after the other in random order, with one thread beside them for
comparison. What else the machine did meanwhile is written down (load average); `--alone` puts the timed steps before all of it.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.processes import environment
from benchmarks.results import Settings, load, save
from pe_dpo.cli import SPINS

THREADS, STEPS = 2, 3
BESIDE = (0, 1, 2)
"""Busy processes."""
VARIANTS: dict[str, tuple[int, dict[str, str]]] = {
    "one thread": (1, {}),
    "as it comes": (THREADS, {}),
    "OMP_WAIT_POLICY=PASSIVE": (THREADS, {"OMP_WAIT_POLICY": "PASSIVE"}),
    f"GOMP_SPINCOUNT={SPINS}, as `pe-dpo` sets it": (THREADS, {"GOMP_SPINCOUNT": SPINS}),
}


def run_threads(settings: Settings, beside: tuple[int, ...] = BESIDE, *, is_alone: bool = False) -> None:
    """Time every variant beside so many busy processes, write and print; what the results have of others is kept."""
    path = settings.out / f"{settings.name}.json"
    found: dict[str, Any] = load(path)["beside"] if path.is_file() else {}
    order = random.Random(0)
    for busy in beside:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for _ in range(settings.rounds):
            for name in order.sample(list(VARIANTS), len(VARIANTS)):
                rows[name].append(_measure(busy, *VARIANTS[name], is_alone=is_alone))
        found[str(busy)] = rows
        print(f"beside {busy} busy processes, wall seconds of a step:")
        for name, runs in rows.items():
            values = [seconds for run in runs for seconds in run["wall_seconds"]]
            middle, cpu = statistics.median(values), statistics.median(run["cpu_seconds"] for run in runs)
            words = f"{middle:6.2f} ({min(values):.2f}–{max(values):.2f}), {cpu:.2f} CPU s; load {runs[0]['load']:.1f}"
            print(f"  {name:<42} {words}", flush=True)
        save(settings, {"threads": THREADS, "is_alone": is_alone, "beside": found, "openmp": openmp_runtime()})


def _measure(busy: int, threads: int, variables: dict[str, str], *, is_alone: bool) -> dict[str, Any]:
    asked = json.dumps({"threads": threads, "steps": STEPS, "busy": busy, "is_alone": is_alone})
    command = [sys.executable, "-P", str(Path(__file__).with_name("thread_worker.py")), asked]
    load_before = os.getloadavg()[0]
    done = subprocess.run(command, env=environment(threads=0, **variables), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the step failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"load": load_before}


def openmp_runtime() -> list[str]:
    """Return the files of the OpenMP runtime that torch has loaded into this process. Linux only."""
    import torch  # noqa: F401

    files = {line.split("/")[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    return sorted(file for file in files if "omp" in file)

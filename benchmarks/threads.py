"""The command `threads`: wall time of our step on two torch threads, on idle cores and beside busy processes.

A thread that waits for another at the end of a parallel part first spins and then sleeps. Where a core is busy with something
else, it spins while the other thread waits for the core. OMP_WAIT_POLICY=PASSIVE lets it sleep at once; GNU's runtime, the one
in torch's wheels for Linux, reads it when it is loaded.

Each variant is a process of its own; those of a round run one after the other in random order. What else the machine does
meanwhile is measured and written down, since the idle case needs a quiet one.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.processes import environment
from benchmarks.results import Settings, load, save

THREADS, STEPS = 2, 6
BESIDE = (0, 1, 2)
"""Busy processes."""
VARIANTS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
}


def run_threads(settings: Settings, beside: tuple[int, ...] = BESIDE) -> None:
    """Time every variant beside so many busy processes, write and print; what the results have of others is kept."""
    path = settings.out / f"{settings.name}.json"
    found: dict[str, Any] = load(path)["beside"] if path.is_file() else {}
    order = random.Random(0)
    for busy in beside:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for _ in range(settings.rounds):
            for name in order.sample(list(VARIANTS), len(VARIANTS)):
                rows[name].append(_measure(busy, VARIANTS[name]))
        found[str(busy)] = rows
        print(f"beside {busy} busy processes, wall seconds of a step on {THREADS} threads:")
        for name, runs in rows.items():
            values = [seconds for run in runs for seconds in run["wall_seconds"]]
            others = statistics.median(run["others"] for run in runs)
            middle, cpu = statistics.median(values), statistics.median(run["cpu_seconds"] for run in runs)
            words = f"{middle:6.2f} ({min(values):.2f}–{max(values):.2f}), {cpu:.2f} CPU s; others used {others:.2f} cores"
            print(f"  {name:<26} {words}", flush=True)
        save(settings, {"threads": THREADS, "beside": found, "openmp": _openmp()})


def _measure(busy: int, variables: dict[str, str]) -> dict[str, Any]:
    """One process's steps, and the cores that all others but the busy ones of ours used meanwhile."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("thread_worker.py")), str(THREADS), str(STEPS)]
    with ExitStack() as stack:
        for _ in range(busy):
            process = subprocess.Popen([sys.executable, "-I", "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        before = _machine_seconds()
        done = subprocess.run(command, env=environment(threads=0, **variables), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the step failed:\n{done.stderr[-2000:]}")
    wall, used, ours = (now - then for now, then in zip(_machine_seconds(), before, strict=True))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"others": round(max(0.0, used - ours) / (wall / (os.cpu_count() or 1)), 3)}


def _machine_seconds() -> tuple[float, float, float]:
    """Seconds of all cores, those in which they were used, and those of our children that ended."""
    ticks = [int(value) for value in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    per_second, usage = os.sysconf("SC_CLK_TCK"), os.times()
    return sum(ticks) / per_second, (sum(ticks) - ticks[3] - ticks[4]) / per_second, usage.children_user + usage.children_system


def _openmp() -> str:
    """The OpenMP runtime of torch, as it names itself."""
    import torch

    lines = torch.__config__.parallel_info().splitlines()
    libraries = sorted(
        {line.split("/")[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line.split("/")[-1]}
    )
    return "; ".join([*(line.strip() for line in lines if "OpenMP" in line), *libraries])

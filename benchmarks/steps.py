"""The command `steps`: one preference step on six shapes of pairs × float32, bfloat16, nf4; ours, ours before, TRL's.

TRL's default, and its best of sizes and orders of micro-batches without checkpointing and with a stored reference; both steps
of ours (the reference stored, the reference in the step) in this version and in the one before, each in a process of its own.
Every step of a round runs once, in random order. First all are held against the float64 step (`truth`).
"""

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import agreement
from benchmarks.models import Dtype, saved_base
from benchmarks.ours import FULL_STACK, IN_STEP
from benchmarks.pairs import PAIRS_PER_STEP, ShapeName, draw, facts, facts_lines, graph_tokens, population
from benchmarks.processes import BEFORE, environment, package_root
from benchmarks.results import Settings, load, machine, save, temporary_folder
from benchmarks.rounds import ratio, spread, timed
from benchmarks.trl_side import PRECISIONS, GridPoint, PeerStep, default_point
from benchmarks.truth import true_outcome

SHAPES: tuple[ShapeName, ...] = ("hh", "uf", "uf-graph", "polite", "near", "long")
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "nf4")
VARIANTS = {"stored": FULL_STACK, "in step": IN_STEP}
FINALISTS = 2


class Worker:
    """A process that runs our steps in the package of a folder."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("step_worker.py"))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment(root), stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, *words: str) -> dict[str, Any]:
        """Return the answer to a command."""
        self.process.stdin.write("\t".join(words) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of our step ended at {words}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Peer(NamedTuple):
    """A step of TRL that goes into the rounds."""

    step: PeerStep
    outcome: agreement.Outcome


def run_steps(settings: Settings, shapes: Sequence[ShapeName], dtypes: Sequence[Dtype]) -> None:
    """Measure every shape in every dtype; what the results have already of other shapes and dtypes is kept."""
    path = settings.out / f"{settings.name}.json"
    rows = load(path)["rows"] if path.is_file() else {}
    for shape in shapes:
        pairs = draw(population(shape), shape)
        of_weights: dict[str, agreement.Outcome] = {}
        print("\n" + "\n".join(facts_lines(shape, facts(pairs))), flush=True)
        for dtype in dtypes:
            with ExitStack() as stack:
                roots = {"ours": package_root(), "before": package_root(BEFORE)}
                workers = {name: stack.enter_context(Worker(root)) for name, root in roots.items()}
                weights = "nf4" if dtype == "nf4" else "stored in bfloat16, so the same in float32"
                of_weights[weights] = of_weights.get(weights) or true_outcome("m8k", dtype, pairs)
                rows[f"{shape} {dtype}"] = measure(shape, dtype, pairs, of_weights[weights], workers, settings.rounds)
            made = {key: machine()[key] for key in ("commit", "date")}
            rows[f"{shape} {dtype}"] |= made | {"tokens": facts(pairs)._asdict(), "graph_tokens": graph_tokens(pairs)}
            print_row(f"{shape} {dtype}", rows[f"{shape} {dtype}"])
            save(settings, {"before": BEFORE, "rows": rows})


def measure(
    shape: ShapeName, dtype: Dtype, pairs: Sequence[Any], truth: agreement.Outcome, workers: Mapping[str, Worker], rounds: int
) -> dict[str, Any]:
    """Return agreement, CPU seconds of every round, and ratios of one shape in one dtype."""
    peers = screen(shape, dtype, pairs)
    outcomes = {name: peer.outcome for name, peer in peers.items()}
    file, folder = temporary_folder() / "pairs.npz", temporary_folder()
    parts = {
        f"{part}{n}": getattr(pair, f"{part}_ids") for n, pair in enumerate(pairs) for part in ("prompt", "chosen", "rejected")
    }
    keys = {f"key{n}": np.array(pair.prompt_key) for n, pair in enumerate(pairs)}
    np.savez(file, count=len(pairs), **parts, **keys)
    for name, worker in workers.items():
        worker.ask("prepare", str(file), dtype)
        for words, rung in VARIANTS.items():
            worker.ask("gradients", str(folder / "found.pt"), rung)
            outcomes[f"{name}, {words}"] = agreement.Outcome(**torch.load(folder / "found.pt"))
    distances = agreement.check_against(truth, outcomes, dtype)
    seconds = in_rounds(peers, workers, rounds)
    default = next(iter(peers))
    best = min(peers, key=lambda name: statistics.median(seconds[name]))
    over = {"TRL default": default, "TRL best": best} | {f"before, {words}": f"before, {words}" for words in VARIANTS}
    return {
        "trl_default": default,
        "trl_best": best,
        "to_float64": distances,
        "cpu_seconds": seconds,
        "ratios": {
            f"{name} over {words}": list(ratio(seconds, name, other))
            for name in seconds
            if name not in peers
            for words, other in over.items()
            if other.split(", ")[-1] in (name.split(", ")[-1], default.split(", ")[-1], best.split(", ")[-1])
        },
    }


def screen(shape: ShapeName, dtype: Dtype, pairs: Sequence[Any]) -> dict[str, Peer]:
    """Return TRL's default, and the fastest of its points without checkpointing and with a stored reference, by name."""
    whole = PAIRS_PER_STEP[shape]
    sizes = sorted({size for size in (1, 2, 4, whole) if whole % size == 0})
    points = [GridPoint(size, False, True, 1 < size < whole, PRECISIONS[dtype][-1]) for size in sizes]
    points += [GridPoint(1, False, True, False, precision) for precision in PRECISIONS[dtype][:-1]]
    found: dict[str, Peer] = {}
    seconds: dict[str, float] = {}
    default = default_point(shape, dtype)
    for point in (default, *points):
        step = PeerStep(point, pairs, saved_base("m8k"))
        taken, loss = timed(step)
        found[point.name] = Peer(step, agreement.outcome(step.trainer.model, loss))
        step.model.zero_grad(set_to_none=True)
        seconds[point.name] = taken
        fastest = sorted((name for name in found if name != default.name), key=seconds.__getitem__)[:FINALISTS]
        found = {name: peer for name, peer in found.items() if name in (default.name, *fastest)}
    return found


def in_rounds(peers: Mapping[str, Peer], workers: Mapping[str, Worker], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of every step in every round, all steps of a round in random order."""

    def of_ours(name: str) -> float:
        worker, words = name.split(", ")
        return float(workers[worker].ask("run", VARIANTS[words])["cpu_seconds"])

    ours = [f"{worker}, {words}" for worker in workers for words in VARIANTS]
    seconds: dict[str, list[float]] = {name: [] for name in (*peers, *ours)}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(seconds), len(seconds)):
            seconds[name].append(timed(peers[name].step)[0] if name in peers else of_ours(name))
    return seconds


def print_row(name: str, row: Mapping[str, Any]) -> None:
    """Print the seconds, distances and ratios of one shape in one dtype."""
    print(f"{name}: TRL default {row['trl_default']}; best {row['trl_best']}")
    for variant, values in row["cpu_seconds"].items():
        far = row["to_float64"][variant]
        print(f"  {variant:<58} {spread(values)!s:>20} CPU s, gradient {far['gradient']:.1e} from float64")
    for words, values in row["ratios"].items():
        print(f"  {words:<58} {values[0]:.2f} ({values[1]:.2f}–{values[2]:.2f})", flush=True)

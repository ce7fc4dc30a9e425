"""The command `starts`: CPU seconds and peak memory of every command on a run of a few steps, before and after.

The base is that of the quickstart, the pairs are made of random words, so that what a command takes is its start: imports,
checks, reading, hashes, records. Each command is a process of its own on one thread; before and after take turns.
"""

import random
from pathlib import Path
from typing import Any

from benchmarks.audit_speed import write_world
from benchmarks.processes import BEFORE, emptied, environment, package_root, pe_dpo, run_process
from benchmarks.results import Settings, save, temporary_folder
from benchmarks.rounds import ratio, spread

PAIRS, STEPS = 256, 4


def commands_of(folder: Path, recipe: Path) -> dict[str, list[str]]:
    """Return the arguments of every command, in an order in which each finds what it needs."""
    run, sweep = str(folder / "run"), str(folder / "sweep")
    return {
        "--help": ["--help"],
        "check": ["check", str(recipe)],
        "train": ["train", str(recipe), "-o", run],
        "eval": ["eval", run],
        "merge --pairs 0": ["merge", run, "--pairs", "0", "-o", str(folder / "merged")],
        "audit": ["audit", str(recipe)],
        "report": ["report", run],
        "sweep": ["sweep", str(recipe), "--grid", "beta=0.05,0.1", "--prompts", "0", "-o", sweep],
    }


def run_starts(settings: Settings) -> None:
    """Run every command of both versions in rounds, write and print."""
    world = temporary_folder()
    recipe = write_world(world, PAIRS)
    words = recipe.read_text(encoding="utf-8").replace("eval: 0}", "eval: 0.05}")
    recipe.write_text(words + f"train: {{max_steps: {STEPS}, pairs_per_step: 8}}\n", encoding="utf-8")
    roots = {"before": package_root(BEFORE), "after": package_root()}
    found: dict[str, dict[str, list[Any]]] = {}
    order = random.Random(0)
    for _ in range(settings.rounds):
        folders = {name: emptied(world / name) for name in roots}
        for command in commands_of(world, recipe):
            for name in order.sample(list(roots), len(roots)):
                folder = folders[name]
                variables = environment(roots[name], PE_DPO_CACHE=str(folder / "cache"))
                spent = run_process(pe_dpo(*commands_of(folder, recipe)[command]), variables, folder)
                found.setdefault(command, {}).setdefault(name, []).append(spent._asdict())
    for command, sides in found.items():
        print("  " + describe_start(command, sides), flush=True)
    save(settings, {"before": BEFORE, "pairs": PAIRS, "steps": STEPS, "commands": found})


def describe_start(command: str, sides: dict[str, list[dict[str, float]]]) -> str:
    """Return what a command takes, before and after, in a line."""
    seconds = {name: [run["cpu_seconds"] for run in runs] for name, runs in sides.items()}
    peaks = {name: max(run["peak_mib"] for run in runs) for name, runs in sides.items()}
    times = (
        f"{spread(seconds['before'])!s} → {spread(seconds['after'])!s} CPU s ({ratio(seconds, 'after', 'before').median:.2f} ×)"
    )
    return f"{command:<16} {times}, {peaks['before']:.0f} → {peaks['after']:.0f} MiB"

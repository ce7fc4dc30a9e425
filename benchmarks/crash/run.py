"""Chains of kills: a command dies, is given again, dies again, …, ends; what it came to is that of the one that lived."""

import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.crash.jobs import Job, Outcome, jobs, prepare
from benchmarks.crash.process import Death, Ending, run_command
from benchmarks.results import Settings, save, temporary_folder

MOST_KILLS = 5
"""Of one chain; then it is left to live."""
MOMENTS = 0.25
"""Share of the kills that come at a moment of the clock; the others at a change of the disk."""


def kill_and_compare(
    kills: int, *, work: Path, seed: int = 0, names: Sequence[str] = (), make: Callable[[Path], None] = prepare
) -> dict[str, Any]:
    """Kill commands so many times in all, and return what each job came to against the one that nobody killed.

    Args:
        kills: How many in all; the jobs take turns.
        work: An empty folder; every chain works in the same place below it, so that paths are no difference.
        seed: Of what is killed where.
        names: Of the jobs; default: all.
        make: Makes the folder that a command works in, a base and pairs of some size.

    Returns:
        jobs: of each its kills, its chains, the faults that were found, and of every kind of change of the disk that the
            living one made (digits left out) how many deaths came right before one.
    """
    random_, place = random.Random(seed), work / "work"
    finished, merged = work / "finished", work / "merged"
    _make_inputs(place, finished, merged, make)
    chosen = [job for job in jobs(finished, merged) if not names or job.name in names]
    lived: dict[str, tuple[Outcome, Ending, float]] = {}
    for job in chosen:
        _fresh(place, make)
        began = time.monotonic()
        ending = _give(job, place, is_first=True)
        if ending.code:
            raise RuntimeError(f"{job.name}: ends with {ending.code} although nobody killed it:\n{ending.said}")
        lived[job.name] = job.outcome(place), ending, time.monotonic() - began
    found: dict[str, dict[str, Any]] = {
        name: {"kills": 0, "chains": 0, "faults": [], "deaths": {"a moment": 0} | dict.fromkeys(map(kind, ending.changes), 0)}
        for name, (_, ending, _) in lived.items()
    }
    try:
        while (done := sum(one["kills"] for one in found.values())) < kills:
            print(f"{done} of {kills} kills, {sum(len(one['faults']) for one in found.values())} faults", flush=True)
            for job in chosen:
                left = kills - sum(one["kills"] for one in found.values())
                if left > 0:
                    share = min(left, random_.randint(1, MOST_KILLS))
                    _chain(job, place, found[job.name], lived[job.name], random_, share, make)
    except KeyboardInterrupt:
        print("interrupted: the commands that ended are kept")
    return {"kills": sum(one["kills"] for one in found.values()), "seed": seed, "jobs": found}


def _chain(
    job: Job,
    place: Path,
    found: dict[str, Any],
    lived: tuple[Outcome, Ending, float],
    random_: random.Random,
    kills: int,
    make: Callable[[Path], None],
) -> None:
    """Kill one command until it was killed so often or has ended, let it end, and note what is wrong then."""
    expected, straight, seconds = lived
    _fresh(place, make)
    deaths: list[str] = []
    is_first, ending = True, None
    for _ in range(kills):
        if random_.random() < MOMENTS:
            death = Death(seconds=random_.random() * seconds)
        else:  # of a kind that has seen the fewest deaths
            fewest = min(found["deaths"][kind(change)] for change in straight.changes)
            rare = [number for number, change in enumerate(straight.changes, 1) if found["deaths"][kind(change)] == fewest]
            death = Death(change=random_.choice(rare), torn=random_.random() if random_.random() < 0.5 else None)
        ending = _give(job, place, is_first=is_first, death=death)
        is_first = False
        if not ending.was_killed:
            break
        deaths.append(ending.at or f"after {death.seconds:.2f} s")
        hit = kind(ending.at) if ending.at else "a moment"
        found["deaths"][hit] = found["deaths"].get(hit, 0) + 1
    if ending is None or ending.was_killed:
        ending = _give(job, place, is_first=False)
    found["kills"] += len(deaths)
    found["chains"] += 1
    # What was whole already when the process died is refused the next time, as something lies there: that is no fault.
    outcome = job.outcome(place)
    differs = sorted(key for key in expected.keys() | outcome.keys() if expected.get(key) != outcome.get(key))
    if differs:
        details = {key: [str(expected.get(key))[:300], str(outcome.get(key))[:300]] for key in differs}
        found["faults"].append({"deaths": deaths, "differs": details, "ends with": ending.code, "said": ending.said[-2000:]})


def kind(change: str) -> str:
    """Return what a change of the disk has in common with those of other steps: `open run/checkpoint-#/adapter_config.json`."""
    return re.sub(r"[0-9]+", "#", change)


def _give(job: Job, place: Path, *, is_first: bool, death: Death | None = None) -> Ending:
    attempts = [job.first] if is_first else [job.again, job.first]
    environment = {"PE_DPO_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    return run_command(attempts, folder=place, death=death, processes=job.processes, environment=environment)


def _fresh(place: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    make(place)


def _make_inputs(place: Path, finished: Path, merged: Path, make: Callable[[Path], None]) -> None:
    """Train a run and merge it, for the jobs that begin with one."""
    _fresh(place, make)
    for words in (["train", "recipe.yaml", "-o", str(finished)], ["merge", str(finished), "-o", str(merged)]):
        ending = run_command([words], folder=place, environment={"PE_DPO_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"})
        if ending.code:
            raise RuntimeError(f"pe-dpo {' '.join(words)}:\n{ending.said}")


def run_crash(settings: Settings, *, kills: int, seed: int) -> Path:
    """Kill all jobs, write what was found, and return the file."""
    found = kill_and_compare(kills, work=temporary_folder(), seed=seed)
    for name, one in found["jobs"].items():
        deaths = [count for what, count in one["deaths"].items() if what != "a moment"]
        print(f"{name}: {one['kills']} kills in {one['chains']} chains, {len(one['faults'])} of these with a fault; before")
        print(f"  {sum(count > 0 for count in deaths)} of {len(deaths)} kinds of changes of the disk")
    return save(settings, found)

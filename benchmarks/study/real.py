"""The sweeps on real pairs: which pairs moved, by what π0 says of them; and every point against the β dial at equal KL."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet

from benchmarks.results import temporary_folder
from benchmarks.study.packed import unpack
from benchmarks.study.run import NUMBERS
from pe_dpo.experiments.comparison import Arm, Comparison, Power, is_end
from pe_dpo.metrics.catalogue import METRICS as CATALOGUE
from pe_dpo.metrics.table import Floats

DATA = ("politeness", "harmless")
BETAS, KAPPAS = (0.5, 2.0, 8.0), (0.0, 0.5, 1.0, 2.0)
METRICS = ("accuracy/shift_per_token", "accuracy/policy_per_token")
CELLS = tuple((data, metric) for data in DATA for metric in METRICS)


class Moved(NamedTuple):
    """Shares of held-out pairs of which the preference per token moved toward chosen, one a seed."""

    right: Floats
    """Among those that π0 ranks right."""
    wrong: Floats


class End(NamedTuple):
    """The held-out pairs at the end of one run: preferences per token, nats."""

    policy: Floats
    reference: Floats


def kept(data: str) -> list[Path]:
    """Return the folders with the numbers of a data set, each of a sweep over some of its seeds."""
    return sorted(folder for folder in NUMBERS.parent.iterdir() if folder.name.startswith(data))


@cache
def grid_ends(data: str) -> dict[tuple[float, float], list[End]]:
    """Return the ends of runs by (β, κ) of the grid, one a seed."""
    found: dict[tuple[float, float], list[End]] = {}
    for folder in kept(data):
        for key, ends in _ends_in(folder).items():
            found.setdefault(key, []).extend(ends)
    return found


def _ends_in(folder: Path) -> dict[tuple[float, float], list[End]]:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    pairs = pyarrow.parquet.read_table(folder / "pairs.parquet")
    rows: dict[str, list[int]] = {}
    for number, place in enumerate(pairs["folder"].to_pylist()):
        rows.setdefault(place, []).append(number)
    deltas = [
        (pairs[f"{model}_chosen"].to_numpy() / pairs["chosen_lengths"].to_numpy())
        - (pairs[f"{model}_rejected"].to_numpy() / pairs["rejected_lengths"].to_numpy())
        for model in ("policy", "reference")
    ]
    found: dict[tuple[float, float], list[End]] = {}
    for point in plan["sweep"]["points"]:
        settings = point["settings"]
        if set(settings) <= {"loss.beta", "loss.gamma"} and point["folder"] in rows:
            at = settings.get("loss.beta", 2.0), kappa_of(settings)
            found.setdefault(at, []).append(End(*(delta[rows[point["folder"]]] for delta in deltas)))
    return found


def kappa_of(settings: Mapping[str, Any]) -> float:
    """Return γ/β of what a point changes in the base recipe, whose β is 2 and whose γ is β."""
    gamma = settings.get("loss.gamma", "1x")
    return float(gamma.removesuffix("x")) if isinstance(gamma, str) else float(gamma / settings.get("loss.beta", 2.0))


@cache
def moved(data: str) -> dict[tuple[float, float], Moved]:
    """Return what moved by (β, κ) of the grid, at the end of runs."""
    return {
        key: Moved(
            *(np.array([(one.policy > one.reference)[one.reference * side > 0].mean() for one in ends]) for side in (1, -1))
        )
        for key, ends in grid_ends(data).items()
    }


def gap(shares: Moved) -> Floats:
    """Return moved where π0 is wrong, minus moved where it is right, one a seed."""
    return shares.wrong - shares.right


def moved_table(data: str) -> str:
    """Return moved where π0 is right / wrong for every β and κ, and the gap of each seed below, in points."""
    lines = ["| β | " + " | ".join(f"κ = {one:g}" for one in KAPPAS) + " |", "|---|" + "---|" * len(KAPPAS)]
    for beta in BETAS:
        cells = []
        for of_reference in KAPPAS:
            shares = moved(data)[beta, of_reference]
            gaps = ", ".join(f"{one:+.0f}".replace("-", "−") for one in 100 * gap(shares))
            cells.append(f"**{100 * shares.right.mean():.0f} / {100 * shares.wrong.mean():.0f}** ({gaps})")
        lines.append(f"| {beta:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


DIALS = ("mixout", "dropout", "scale", "step")
WITHIN = 2


@cache
def compared(data: str, metric: str) -> Comparison:
    """Return what the tool says of all points of a data set, and of each dial's points together."""
    from pe_dpo import compare

    questions = [f"{dial} against beta within {WITHIN}" for dial in DIALS]
    return compare(_unpacked(data), metric=metric, contrasts=questions)


@cache
def _unpacked(data: str) -> list[Path]:
    """The sweeps of a data set in a folder that is there until the process ends."""
    place = temporary_folder()
    for folder in kept(data):
        unpack(folder, place / folder.name)
    return [place / folder.name for folder in kept(data)]


def pooled_table() -> str:
    """Return each dial's points together against the β dial at equal KL: points, 95 % CI, and whether within 2."""
    lines = [
        "| all of a dial, minus β at equal KL | " + " | ".join(f"{data}, {_name(metric)}" for data, metric in CELLS) + " |"
    ]
    lines.append("|---|" + "---|" * len(CELLS))
    found = [compared(data, metric).contrasts for data, metric in CELLS]
    for number, dial in enumerate(DIALS):
        cells = []
        for contrasts in found:
            effect = contrasts[number].effect
            assert effect is not None, "every dial has points within β's KLs"
            words = f"{100 * effect.estimate:+.1f} [{100 * effect.low:+.1f}, {100 * effect.high:+.1f}]".replace("-", "−")
            cells.append(f"{words}{', within 2' if effect.p_equivalent < 0.05 else ''}")
        lines.append(f"| {dial} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _name(metric: str) -> str:
    return metric.split("/")[1].split("_")[0]


def points_table(data: str) -> str:
    """Return every point: KL, and each metric with its paired difference from the β dial at equal KL, in points."""
    found = [compared(data, metric) for metric in METRICS]
    head = " | ".join(f"{_name(one.metric)} | {_name(one.metric)} at equal KL" for one in found)
    lines = [f"| point | KL | {head} |", "|---|---|" + "---|---|" * len(found)]
    for arms in zip(*(one.arms for one in found), strict=True):
        cells = " | ".join(f"{100 * arm.value:.1f} | {_at_equal_kl(arm)}" for arm in arms)
        lines.append(f"| {arms[0].name} | {arms[0].kl:.2f} | {cells} |")
    return "\n".join(lines)


def _at_equal_kl(arm: Any) -> str:
    assert isinstance(arm, Arm)
    if arm.is_baseline:
        return "the line"
    if arm.matched is None:
        return "out of range"
    known, is_one = arm.matched, len(arm.matched.per_seed) == 1
    star = "**" if known.p_adjusted < 0.05 and not is_one else ""
    partly = "" if arm.seeds_in_range == len(arm.seeds) else f" ({arm.seeds_in_range} of {len(arm.seeds)} seeds)"
    interval = "" if is_one else f" [{100 * known.low:+.1f}, {100 * known.high:+.1f}]"
    values = f"{100 * known.estimate:+.1f}{interval}".replace("-", "−")
    return f"{star}{values}{star}{partly}"


def power_of_points(data: str, metric: str) -> Power | None:
    """Return what the verdict over all points can find, which is asked of the dials alone where those are named."""
    from pe_dpo.experiments.compare import find_power

    found = compared(data, metric)
    tested = [arm.matched for arm in found.arms if arm.matched is not None and not math.isnan(arm.matched.p)]
    return find_power(tested, CATALOGUE[metric], rows=found.pairs, confidence=found.confidence)


def verdicts_find() -> str:
    """Return what verdicts over all points find, and what those over the four dials alone, on both data sets and metrics."""
    powers = [(power_of_points(*cell), compared(*cell).power) for cell in CELLS]
    found = [[100 * one.smallest_in_verdict for one in of_all if one is not None] for of_all in zip(*powers, strict=True)]
    points, dials = (f"{min(sizes):.0f} to {max(sizes):.0f}" for sizes in found)
    return f"finds {points} points of difference with five seeds, one over four contrasts {dials}"


def facts(data: str) -> dict[str, str]:
    """Return the numbers that the page's sentences take from a data set, as they stand there."""
    found = compared(data, METRICS[0])
    runs = [one for one in found.runs if one.is_final and one.scale is None]
    values = np.array([one.value for one in runs])
    of_reference = np.array([kappa_of(one.settings) for one in runs])
    roots = np.sqrt([one.kl for one in runs])
    by_kappa = np.array([values[of_reference == one].mean() for one in of_reference])
    explained = np.corrcoef(roots, values)[0, 1] ** 2, by_kappa.var() / values.var()
    deviations = [100 * arm.value_sd for arm in found.arms if is_end(arm.settings)]
    drift = {(key, value): arm.kl for arm in found.arms for key, value in arm.settings.items() if len(arm.settings) == 1}
    over = [100 * (drift["adapter.dropout", p] / drift["mixout.p", p] - 1) for p in (0.3, 0.5, 0.7, 0.9)]
    doubled = next(arm.direct_kl for arm in found.arms if arm.settings == {"loss.gamma": "2x"})
    assert doubled is not None, "answers were sampled"
    shortened = [
        arm.matched
        for arm in found.arms
        if arm.matched is not None and not arm.is_baseline and arm.settings.get("loss.gamma", "1x") == "1x"
    ]
    beyond = sum(one.low > 0 or one.high < 0 for one in shortened)
    grid = moved(data)
    falls = np.concatenate([gap(grid[beta, 0.0]) - gap(grid[beta, 2.0]) for beta in BETAS])
    without = [(grid[beta, 0.0], grid[beta, 1.0]) for beta in (2.0, 8.0)]
    fewer = [100 * (both.right - none.right).mean() for none, both in without]
    more = [100 * (none.wrong - both.wrong).mean() for none, both in without]
    powers = [power for metric in METRICS if (power := power_of_points(data, metric)) is not None]
    return {
        "smallest difference that the verdict finds": " and ".join(f"{100 * one.smallest_in_verdict:.0f}" for one in powers),
        "that one test finds": " and ".join(f"{100 * one.smallest_found:.1f}" for one in powers),
        "and with two more seeds": " and ".join(f"{100 * one.with_two_more:.1f}" for one in powers),
        "fall of the gap from κ = 0 to 2": f"{100 * falls.min():.0f} to {100 * falls.max():.0f}",
        "γ = 0 moves fewer that π0 has right": f"{min(fewer):.0f} to {max(fewer):.0f}",
        "γ = 0 moves more that π0 has wrong": f"{min(more):.0f} to {max(more):.0f}",
        "explained by √KL and by κ": f"{explained[0]:.2f} and {explained[1]:.2f}",
        "sd between seeds": f"{min(deviations):.1f} to {max(deviations):.1f}",
        "KL of dropout over mixout": f"{min(over):.0f} to {max(over):.0f} %".replace("-", "−"),
        "KL of γ = 2β over γ = β": f"{doubled.estimate:+.1f} [{doubled.low:+.1f}, {doubled.high:+.1f}]".replace("-", "−"),
        "intervals without 0": f"{beyond} of {len(shortened)}",
    }

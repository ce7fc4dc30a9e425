"""What κ, β, mixout and the floor do where reward, KL and entropy are exact: the log-linear world of the tests, swept.

    dial           what is turned                  at its end
    kappa          γ = κβ, β = ½                   π0 sharpened without bound
    beta           β = γ                           π0
    beta_alone     β, γ = 0                        the uniform policy, not π0
    mixout         p, β = γ = ½                    π0
    mixout_alone   p, β = ½, γ = 0                 π0
    floor          β = γ with Δ0 floored at 0      another policy than π0
    early          steps of one run, β = γ = ½     π0 (where it starts)
    early_alone    the same with γ = 0             π0

Dials are compared with the β dial at the same KL, per seed, by straight lines over √KL between neighbouring runs; π0 is a point
of those that end there and of no other. κ passes each KL twice, so its runs are compared one by one, each at its own KL. Six
seeds; intervals are 95 % by Student's t.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.results import Settings, save

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "worlds"))
log_linear: Any = importlib.import_module("log_linear")

BETA, STEPS = 0.5, 300
KAPPAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
BETAS = (0.1, 0.175, 0.25, 0.35, 0.5, 0.7, 1.0, 1.5, 2.5, 5.0, 10.0)
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
EARLY = (1, 2, 3, 4, 6, 8, 10, 13, 16, 20, 25)
"""Steps of Adam; from about 25 on the KL falls again, by Adam's overshooting."""
TARGETS = (0.1, 0.25, 0.5, 0.8, 1.2)
"""Nats at which dials are compared."""
ENDS_AT_REFERENCE = ("beta", "mixout", "mixout_alone", "early", "early_alone")


class Point(NamedTuple):
    """One setting of one dial, over all seeds."""

    value: float
    measures: Any
    """`log_linear.Measures`."""


@dataclass(frozen=True)
class WorldSettings(Settings):
    """Results that lie in worlds.json."""

    @property
    def name(self) -> str:
        """Name of the results."""
        return "-".join(["worlds"] + ["quick"] * self.is_quick)


def run_worlds(settings: Settings) -> None:
    """Sweep all dials, print two tables, and save every number with a picture."""
    settings = WorldSettings(**vars(settings))
    worlds = log_linear.make_worlds()
    dials = sweep(worlds, every=3 if settings.is_quick else 1)
    reference = log_linear.measure(worlds, worlds.reference)
    others = {name: points for name, points in dials.items() if name not in ("beta", "kappa")}
    content = {
        "settings": {"beta": BETA, "steps": STEPS, "learning_rate": 0.05, "seeds": list(log_linear.SEEDS)},
        "world": {
            "prompts": log_linear.PROMPTS,
            "answers": log_linear.ANSWERS,
            "features": log_linear.FEATURES,
            "pairs_per_prompt": log_linear.PAIRS_PER_PROMPT,
            "reference_scale": log_linear.REFERENCE_SCALE,
            "reference_tilt": log_linear.REFERENCE_TILT,
            "own_reward": log_linear.OWN_REWARD,
        },
        "reference": _numbers(reference),
        "dials": {
            name: [{"value": point.value, **_numbers(point.measures)} for point in points] for name, points in dials.items()
        },
        "reward_at_the_same_kl": {name: compare(points, dials["beta"], reference, name) for name, points in others.items()},
        "reward_of_kappa_at_its_own_kl": compare_each(dials["kappa"], dials["beta"], reference),
    }
    print(kappa_table(content), matched_table(content), sep="\n\n")
    from benchmarks.worlds_plot import plot_worlds

    path = save(settings, content)
    print(path, plot_worlds(path))


def sweep(worlds: Any, *, every: int = 1) -> dict[str, list[Point]]:
    """Return the points of all dials.

    Args:
        worlds: to train in.
        every: keep one of so many values, the first among them.
    """

    def points(values: Sequence[float], **settings: Any) -> list[Point]:
        """One run a value; a setting may be a function of it."""
        found = []
        for value in values[::every]:
            here = {key: setting(value) if callable(setting) else setting for key, setting in settings.items()}
            found.append(Point(value, log_linear.measure(worlds, log_linear.train(worlds, steps=STEPS, **here))))
        return found

    def early(gamma: float) -> list[Point]:
        kept = EARLY[::every]
        path = log_linear.trajectory(worlds, beta=BETA, gamma=gamma, steps=STEPS, keep=kept)[:-1]
        return [Point(step, log_linear.measure(worlds, weights)) for step, weights in zip(kept, path, strict=True)]

    def same(value: float) -> float:
        return value

    return {
        "kappa": points(KAPPAS, beta=BETA, gamma=lambda kappa: kappa * BETA),
        "beta": points(BETAS, beta=same, gamma=same),
        "beta_alone": points(BETAS, beta=same, gamma=0.0),
        "mixout": points(RATES, beta=BETA, gamma=BETA, mixout=same),
        "mixout_alone": points(RATES, beta=BETA, gamma=0.0, mixout=same),
        "floor": points(BETAS, beta=same, gamma=same, reference_floor=0.0),
        "early": early(BETA),
        "early_alone": early(0.0),
    }


def compare(points: Sequence[Point], against: Sequence[Point], reference: Any, name: str) -> list[dict[str, Any]]:
    """Return the difference in reward at each KL where every seed was observed in both dials."""
    own = _along(points, reference, joins=name in ENDS_AT_REFERENCE)
    other = _along(against, reference, joins=True)
    found = []
    for target in TARGETS:
        at = torch.full((len(reference.kl),), target, dtype=torch.float64)
        difference = log_linear.reward_at(own, at) - log_linear.reward_at(other, at)
        found.append({"kl": target, **_difference(difference)})
    return found


def compare_each(points: Sequence[Point], against: Sequence[Point], reference: Any) -> list[dict[str, Any]]:
    """Return, for each run, its reward less that of the other dial at the run's own KL."""
    other = _along(against, reference, joins=True)
    return [
        {"value": point.value, **_difference(point.measures.reward - log_linear.reward_at(other, point.measures.kl))}
        for point in points
    ]


def kappa_table(content: dict[str, Any]) -> str:
    """Return κ against KL, reward, entropy and accuracy as markdown: mean ± half the interval."""
    keys = ("kl", "reward", "entropy", "accuracy", "win_rate", "chosen_shift", "rejected_shift")
    lines = [f"| κ | {' | '.join(keys)} | reward less β = γ at this KL |", "|---" * (len(keys) + 2) + "|"]
    for point, row in zip(content["dials"]["kappa"], content["reward_of_kappa_at_its_own_kl"], strict=True):
        cells = " | ".join(_with_half_width(point[key]) for key in keys)
        lines.append(f"| {point['value']:g} | {cells} | {_cell(row)} |")
    return "\n".join(lines)


def matched_table(content: dict[str, Any]) -> str:
    """Return the differences in reward against the β dial as markdown."""
    lines = ["| dial | " + " | ".join(f"KL {target:g}" for target in TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for name, rows in content["reward_at_the_same_kl"].items():
        lines.append(f"| {name} | {' | '.join(map(_cell, rows))} |")
    return "\n".join(lines)


def _along(points: Sequence[Point], reference: Any, *, joins: bool) -> list[Any]:
    """The runs of a dial in the order of their KL, as far as it rises for every seed."""
    runs = sorted((point.measures for point in points), key=lambda run: float(run.kl.mean()))
    rising = [reference] if joins else []
    for run in runs:
        if not rising or bool((run.kl > rising[-1].kl).all()):
            rising.append(run)
    return rising


def _difference(difference: torch.Tensor) -> dict[str, Any]:
    """What is said of a difference: nothing where a seed was not observed."""
    seeds = int(difference.isfinite().sum())
    if seeds < len(difference):
        return {"seeds_in_range": seeds}
    mean, interval = float(difference.mean()), log_linear.interval(difference)
    return {"seeds_in_range": seeds, "difference": difference.tolist(), "mean": mean, "interval": interval}


def _cell(row: dict[str, Any]) -> str:
    """A difference in a table."""
    if "mean" not in row:
        return f"{row['seeds_in_range']} of {len(log_linear.SEEDS)} seeds in range"
    low, high = row["interval"]
    return f"{row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _numbers(measures: Any) -> dict[str, list[float]]:
    """Every number of every seed."""
    return {name: [round(value, 6) for value in values.tolist()] for name, values in measures._asdict().items()}


def _with_half_width(values: list[float]) -> str:
    seeds = torch.tensor(values, dtype=torch.float64)
    low, high = log_linear.interval(seeds)
    return f"{float(seeds.mean()):.3f} ± {(high - low) / 2:.3f}"

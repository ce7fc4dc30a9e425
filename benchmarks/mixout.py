"""What mixout costs, all of it: layers, memory and draws (`mixout_cost`), whole steps (`mixout_step`), and the picture."""

import os
from dataclasses import dataclass
from typing import Any

from benchmarks.mixout_cost import CASES, COLUMN, MOST, WEIGHED, P, cost_lines, memory_lines, time_draws, time_layer, weigh
from benchmarks.mixout_plot import plot_mixout
from benchmarks.mixout_step import time_steps, weigh_steps
from benchmarks.results import Settings, save


@dataclass(frozen=True)
class MixoutSettings(Settings):
    """Results that lie in mixout.json."""

    @property
    def name(self) -> str:
        """Name of the results."""
        return "-".join(["mixout"] + ["quick"] * self.is_quick)


def run_mixout(settings: Settings) -> None:
    """Measure layers, memory, draws and steps; print and save them with a picture.

    Raises:
        Disagreement: an arm computes something else, or the element form keeps a matrix for the backward.
    """
    settings = MixoutSettings(**vars(settings))
    content: dict[str, Any] = {"settings": {"p": P, "quick": settings.is_quick}, "load_before": os.getloadavg()}
    content["memory"] = [weigh(case) for case in (WEIGHED[:1] if settings.is_quick else WEIGHED)]
    print(memory_lines(content["memory"]), "\n", sep="\n")
    content["draws"] = time_draws()
    content["layers"] = [time_layer(case, settings.rounds) for case in (CASES[:2] if settings.is_quick else CASES)]
    content["steps"] = [time_steps("fp32", settings.rounds)]
    if not settings.is_quick:
        content["steps"].append(time_steps("nf4", settings.rounds))
        content["steps_peak_mib"] = weigh_steps()
        print("a step's peak, MiB:", ", ".join(f"{name} {peak:.0f}" for name, peak in content["steps_peak_mib"].items()))
    content["load_after"] = os.getloadavg()
    print("\n", cost_lines(content["layers"] + content["steps"]), "\n", verdict(content["layers"] + content["steps"]), sep="\n")
    path = save(settings, content)
    print(path.name, plot_mixout(path).name)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Return in how many rows the column form is within its limit, and where it is not."""
    over = {row["title"]: row["over_plain"][COLUMN][0] for row in rows}
    missed = [f"{title}: {median:.3f}" for title, median in over.items() if median > MOST]
    return f"column at most {MOST:g} × plain: in {len(over) - len(missed)} of {len(over)}" + "; not in ".join(["", *missed])

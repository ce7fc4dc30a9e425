"""What a sweep folder says of its runs: every one that was planned, how it stands, and what comparing them came to."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.errors import UsageError
from pe_dpo.experiments.compare import check_names, compare, why_missing
from pe_dpo.experiments.comparison import Arm, Comparison, RunRow, with_state
from pe_dpo.experiments.resampled import resample, settings_of
from pe_dpo.experiments.summary import setting_name
from pe_dpo.metrics.bootstrap import Effect, effect
from pe_dpo.metrics.catalogue import METRICS
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.runs.files import SWEEP_FILE
from pe_dpo.runs.observations import Observation, read_observations

REPEATS = 2000
"""Replicates of the intervals that are drawn as crosses."""


class PlannedRun(NamedTuple):
    """One planned run and how it stands."""

    name: str
    """The name of its point, in words."""
    seed: int
    folder: Path
    facts: dict[str, Any]
    """run.json; empty before the run is started."""
    row: RunRow | None
    """What was measured at its end."""
    kappa: float
    """γ/β as trained; NaN where not known."""

    @property
    def status(self) -> str:
        """One of finished, failed, interrupted, training, starting, and "not started"."""
        return str(self.facts.get("status", "not started"))

    def measured(self, key: str) -> float:
        """Return a metric of its end, by the comparison or else as the run wrote it; NaN where it was not measured."""
        known = {"kl": self.row.kl, **self.row.metrics} if self.row else {}
        value = known.get(key, (self.facts.get("after") or {}).get(key))
        return math.nan if value is None else float(value)

    @property
    def margin_noise(self) -> float:
        """How far a mask of mixout moves scores, in units of what training moved them; NaN without mixout."""
        value = (self.facts.get("mixout") or {}).get("margin_noise")
        return math.nan if value is None else float(value)


class SweepRecord:
    """A sweep as its folder tells it.

    Attributes:
        folder: with sweep.json.
        recipe: from which every point turns something away.
        runs: every planned run.
        comparison: what comparing them came to, or None.
        why_not: why there is no comparison; empty where there is one.
        crosses: of each arm of the comparison, 95 % intervals of √KL and of the metric over prompts and seeds; None where
            unknown.
    """

    def __init__(self, folder: Path, *, metric: str | None = None, baseline: str = "beta") -> None:
        """Read what lies in a sweep folder, and compare it as far as that goes.

        Args:
            folder: with sweep.json.
            metric: what to compare on; see `compare`.
            baseline: the hyperparameter that others are held against at equal KL.

        Raises:
            UsageError: sweep.json is torn, or there is no such metric or hyperparameter.
            RecipeError: its recipe.yaml is none.
        """
        check_names(metric, baseline)
        self.folder = folder
        points = _read_points(folder / SWEEP_FILE)
        self.recipe = recipe_from_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder / "recipe.yaml"))
        facts = [_read_facts(folder / point["folder"]) for point in points]
        self.comparison: Comparison | None = None
        self.why_not = "no run of this sweep is finished; start the same `pe-dpo sweep` again to go on with it"
        self.crosses: list[tuple[Effect | None, Effect | None]] = []
        observations: list[Observation] = []
        if any(found.get("status") == "finished" for found in facts):
            try:
                self.comparison, self.why_not = compare([folder], metric=metric, baseline=baseline), ""
                observations = read_observations([folder]).observations
                self.crosses = _crosses(self.comparison, observations)
            except UsageError as error:
                self.why_not = str(error)
        kappas = {one.run: one.kappa for one in observations if one.is_final and one.kappa is not None}
        rows = {row.run: row for row in (self.comparison.runs if self.comparison else []) if row.is_final}
        self.runs = []
        for point, found in zip(points, facts, strict=True):
            run = folder / point["folder"]
            row = rows.get(str(run))
            name = row.name if row else setting_name(point["settings"])
            self.runs.append(PlannedRun(name, int(point["seed"]), run, found, row, kappas.get(str(run), math.nan)))

    @property
    def finished(self) -> list[PlannedRun]:
        """Runs that came to their end."""
        return [run for run in self.runs if run.status == "finished"]

    def runs_of(self, arm: Arm) -> list[PlannedRun]:
        """Return the finished runs of an arm; none for an arm of earlier or scaled states of runs."""
        return [run for run in self.finished if run.row is not None and run.row.settings == arm.settings]

    def rows_of(self, arm: Arm) -> list[RunRow]:
        """Return what was measured of an arm, seed by seed, at the ends of runs or at other states of them."""
        rows = self.comparison.runs if self.comparison else []
        return [
            row
            for row in rows
            if with_state(row.settings, step=row.step, is_final=row.is_final, scale=row.scale) == arm.settings
        ]


def _read_points(path: Path) -> list[dict[str, Any]]:
    try:
        points = json.loads(path.read_text(encoding="utf-8"))["points"]
        return [
            {"folder": str(point["folder"]), "settings": dict(point["settings"]), "seed": point["seed"]} for point in points
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is not the plan of a sweep ({error!r}); restore the file") from error


def _read_facts(run: Path) -> dict[str, Any]:
    """run.json; empty where there is none, or only a part of it."""
    try:
        found = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _crosses(comparison: Comparison, observations: list[Observation]) -> list[tuple[Effect | None, Effect | None]]:
    """Intervals of every arm by itself, from resampled prompts and the spread of seeds."""
    metric = METRICS[comparison.metric]
    usable = [one for one in observations if one.source == "pe-dpo" and why_missing(metric, one) is None]
    if not usable:
        return []
    measured = resample(usable, metric, repeats=REPEATS, seed=0)
    points = {repr(point.settings): point.columns for point in settings_of(measured.observations)}
    found: list[tuple[Effect | None, Effect | None]] = []
    for arm in comparison.arms:
        columns = points.get(repr(arm.settings))
        if columns is None:
            found.append((None, None))
            continue
        root, roots = None, measured.roots[columns]
        if not np.isnan(roots).any():
            root = effect(roots, measured.root_replicates[:, columns], clusters=measured.kl_prompts)
        value = effect(measured.values[columns], measured.value_replicates[:, columns], clusters=measured.prompts)
        found.append((root, value))
    return found

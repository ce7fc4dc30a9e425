"""What a sweep folder says of its runs: every one that was planned, how it stands, and what comparing them came to."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pe_dpo.errors import UsageError
from pe_dpo.experiments.compare import check_names, compare, why_missing
from pe_dpo.experiments.comparison import Arm, Comparison, RunRow, with_state
from pe_dpo.experiments.plan import read_plan
from pe_dpo.experiments.resampled import Resampled, settings_of
from pe_dpo.experiments.summary import setting_name
from pe_dpo.metrics.bootstrap import Effect, effect
from pe_dpo.metrics.catalogue import METRICS
from pe_dpo.runs.observations import Observation, read_observations
from pe_dpo.runs.run import Run, RunInfo

REPEATS = 2000
"""Replicates of the intervals that are drawn as crosses."""


class PlannedRun(NamedTuple):
    """One planned run and how it stands."""

    name: str
    """The name of its point, in words."""
    seed: int
    folder: Path
    info: RunInfo
    row: RunRow | None
    """What was measured at its end."""
    kappa: float
    """γ/β as trained; NaN where not known."""

    def measured(self, key: str) -> float:
        """Return a metric of its end, by the comparison or else as the run wrote it; NaN where it was not measured."""
        known = {"kl": self.row.kl, **self.row.metrics} if self.row else {}
        return known.get(key, self.info.after.get(key, math.nan))

    @property
    def margin_noise(self) -> float:
        """How far a mask of mixout moves scores, in units of what training moved them; NaN without mixout."""
        noise = self.info.mixout.get("margin_noise")  # None where training moved nothing
        return math.nan if noise is None else float(noise)


class SweepRecord:
    """A sweep as its folder tells it.

    Attributes:
        folder: with sweep.json.
        recipe: from which every point turns something away.
        runs: every planned run.
        comparison: what comparing them came to, or None.
        observations: what was compared.
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
        plan = read_plan(folder)
        self.folder, self.recipe = folder, plan.recipe
        infos: list[RunInfo] = []
        for point in plan.points:
            try:
                infos.append(Run(folder / point.folder).info)
            except UsageError as error:  # a run whose record cannot be read has failed for that
                infos.append(RunInfo(status="failed", why=str(error)))
        self.comparison: Comparison | None = None
        self.why_not = "no run of this sweep is finished; start the same `pe-dpo sweep` again to go on with it"
        self.crosses: list[tuple[Effect | None, Effect | None]] = []
        self.observations: list[Observation] = []
        if any(info.is_finished for info in infos):
            try:
                self.comparison, self.why_not = compare([folder], metric=metric, baseline=baseline), ""
                self.observations, _ = read_observations([folder])
                self.crosses = _crosses(self.comparison, self.observations)
            except UsageError as error:
                self.why_not = str(error)
        kappas = {one.run: one.kappa for one in self.observations if one.is_final and one.kappa is not None}
        rows = {row.run: row for row in (self.comparison.runs if self.comparison else []) if row.is_final}
        self.runs = []
        for point, info in zip(plan.points, infos, strict=True):
            run = folder / point.folder
            row = rows.get(str(run))
            name = row.name if row else setting_name(point.settings)
            seed = point.seed if row is None or row.seed is None else row.seed
            self.runs.append(PlannedRun(name, seed, run, info, row, kappas.get(str(run), math.nan)))

    @property
    def finished(self) -> list[PlannedRun]:
        """Runs that came to their end."""
        return [run for run in self.runs if run.info.is_finished]

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


def _crosses(comparison: Comparison, observations: list[Observation]) -> list[tuple[Effect | None, Effect | None]]:
    """Intervals of every arm by itself, from resampled prompts and the spread of seeds."""
    metric = METRICS[comparison.metric]
    usable = [one for one in observations if one.source == "pe-dpo" and why_missing(metric, one) is None]
    if not usable:
        return []
    measured = Resampled(usable, metric, repeats=REPEATS, seed=0)
    points = {repr(point.settings): point.columns for point in settings_of(measured.observations)}
    found: list[tuple[Effect | None, Effect | None]] = []
    for arm in comparison.arms:
        columns = points.get(repr(arm.settings))
        if columns is None:
            found.append((None, None))
            continue
        root, roots = None, measured.roots[columns]
        if measured.kl_prompts > 1 and not np.isnan(roots).any():  # one prompt says nothing of others
            root = effect(roots, measured.root_replicates[:, columns], clusters=measured.kl_prompts)
        value = effect(measured.values[columns], measured.value_replicates[:, columns], clusters=measured.prompts)
        found.append((root, value))
    return found

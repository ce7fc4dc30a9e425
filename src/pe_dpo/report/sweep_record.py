"""What a sweep folder says of its runs: every one that was planned, how it stands, and what comparing them came to."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.errors import UsageError
from pe_dpo.experiments.compare import check_names, compare
from pe_dpo.experiments.comparison import Arm, Comparison, RunRow
from pe_dpo.experiments.matching import points_of
from pe_dpo.experiments.measured import measure
from pe_dpo.experiments.wording import point_name, with_state
from pe_dpo.metrics.catalogue import METRICS, missing_words
from pe_dpo.metrics.statistics import effect
from pe_dpo.recipe import Recipe, recipe_from_yaml
from pe_dpo.runs.files import SWEEP_FILE
from pe_dpo.runs.observations import Observation, read_observations

REPEATS = 2000
"""Replicates of the intervals that are drawn as crosses."""


class RunState(NamedTuple):
    """One planned run and how it stands."""

    name: str
    """Of its point, in words."""
    seed: int
    folder: Path
    status: str
    """finished, failed, interrupted, training, starting, or "not started"."""
    why: str
    """Of a failed one."""
    facts: dict[str, Any]
    """run.json; empty before it is started."""
    row: RunRow | None
    """What was measured at its end."""
    kappa: float
    """γ/β as trained; NaN where not known."""

    def after(self, key: str) -> float:
        """Return a held-out metric at the end; NaN where it was not measured."""
        value = (self.facts.get("after") or {}).get(key)
        return float("nan") if value is None else float(value)

    @property
    def margin_noise(self) -> float:
        """How far a mask of mixout moves scores, in units of what training moved them; NaN without mixout."""
        value = (self.facts.get("mixout") or {}).get("margin_noise")
        return float("nan") if value is None else float(value)


class Cross(NamedTuple):
    """95 % intervals of an arm's √KL and metric, over prompts and seeds; NaN where unknown."""

    root_kl_low: float
    root_kl_high: float
    low: float
    high: float


class SweepRecord(NamedTuple):
    """A sweep as its folder tells it."""

    folder: Path
    recipe: Recipe
    """From which every point turns something away."""
    states: list[RunState]
    comparison: Comparison | None
    why_not: str
    """Why there is no comparison; empty where there is one."""
    crosses: list[Cross]
    """Of the comparison's arms, in their order."""

    @property
    def finished(self) -> list[RunState]:
        """Runs that came to their end."""
        return [state for state in self.states if state.status == "finished"]

    @property
    def unfinished(self) -> list[RunState]:
        """Runs that did not."""
        return [state for state in self.states if state.status != "finished"]

    def runs_of(self, arm: Arm) -> list[RunState]:
        """Return the finished runs of an arm; none for an arm of earlier or scaled states of runs."""
        return [state for state in self.finished if state.row is not None and state.row.settings == arm.settings]

    def rows_of(self, arm: Arm) -> list[RunRow]:
        """Return what was measured of an arm, seed by seed, at the ends of runs or at other states of them."""
        rows = self.comparison.runs if self.comparison else []
        return [row for row in rows if _settings(row) == arm.settings]


def _settings(row: RunRow) -> dict[str, Any]:
    return with_state(row.settings, step=row.step, is_final=row.is_final, scale=row.scale)


def read_sweep_record(folder: Path, *, metric: str | None = None, baseline: str = "beta") -> SweepRecord:
    """Return what lies in a sweep folder, compared as far as that goes.

    Args:
        folder: with sweep.json.
        metric: to compare on; see `compare`.
        baseline: the dial that others are held against at equal KL.

    Raises:
        UsageError: sweep.json is torn, or there is no such metric or dial.
        RecipeError: its recipe.yaml is none.
    """
    check_names(metric, baseline)
    points = _read_points(folder / SWEEP_FILE)
    recipe = recipe_from_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder / "recipe.yaml"))
    comparison, why_not, observed = None, "", {}
    crosses: list[Cross] = []
    if any(_read_facts(folder / point["folder"]).get("status") == "finished" for point in points):
        try:
            comparison = compare([folder], metric=metric, baseline=baseline)
            observations = read_observations([folder]).observations
            observed = {one.run: one for one in observations if one.is_final}
            crosses = _crosses(comparison, observations)
        except UsageError as error:
            why_not = str(error)
    else:
        why_not = "no run of this sweep is finished; start the same `pe-dpo sweep` again to go on with it"
    rows = {row.run: row for row in comparison.runs if row.is_final} if comparison else {}
    states = [_state(folder / point["folder"], point, rows, observed) for point in points]
    return SweepRecord(folder, recipe, states, comparison, why_not, crosses)


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


def _state(run: Path, point: dict[str, Any], rows: dict[str, RunRow], observed: dict[str, Observation]) -> RunState:
    facts, row = _read_facts(run), rows.get(str(run))
    kappa = observed[str(run)].kappa if str(run) in observed else None
    return RunState(
        name=row.name if row else point_name(point["settings"]),
        seed=int(point["seed"]),
        folder=run,
        status=str(facts.get("status", "not started")),
        why=str(facts.get("why", "")),
        facts=facts,
        row=row,
        kappa=math.nan if kappa is None else float(kappa),
    )


def _crosses(comparison: Comparison, observations: Sequence[Observation]) -> list[Cross]:
    """Intervals of every arm by itself, from resampled prompts and the spread of seeds."""
    metric = METRICS[comparison.metric]
    usable = [one for one in observations if one.source == "pe-dpo" and missing_words(metric, one) is None]
    if not usable:
        return []
    measured = measure(usable, metric, repeats=REPEATS, seed=0)
    points = {repr(point.settings): point.columns for point in points_of(measured.observations)}
    nothing = Cross(*[math.nan] * 4)

    def cross(arm: Arm) -> Cross:
        columns = points.get(repr(arm.settings))
        if columns is None:
            return nothing
        value = effect(measured.values[columns], measured.value_replicates[:, columns], clusters=measured.prompts)
        if np.isnan(measured.roots[columns]).any():
            return nothing._replace(low=value.low, high=value.high)
        root = effect(measured.roots[columns], measured.root_replicates[:, columns], clusters=measured.kl_prompts)
        return Cross(root.low, root.high, value.low, value.high)

    return [cross(arm) for arm in comparison.arms]

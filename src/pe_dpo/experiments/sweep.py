"""The runs of a sweep, one after the other on one loaded base, or spread over workers; what is finished is never run again.

    plan ── points without a finished run ──┬─ local: one base, one set of pairs, one reference pass
                                            └─ ray:   the same in every worker (experiments/on_ray.py)

A run folder says itself whether it is finished, so that a sweep goes on after a kill at any point: the run that was cut
off from its newest checkpoint, the others as they are.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from pe_dpo.data import data_hash
from pe_dpo.disk import write_atomically
from pe_dpo.errors import PeDpoError, RunFolderError
from pe_dpo.experiments.plan import Point, SweepPlan, save_plan
from pe_dpo.log import logged_to, quiet
from pe_dpo.model.base import load_base
from pe_dpo.model.provenance import adapter_fingerprint
from pe_dpo.recipe import Recipe, recipe_difference, recipe_to_yaml, with_absolute_paths
from pe_dpo.runs.checkpoints import checkpoints
from pe_dpo.runs.files import RECIPE_FILE, RUN_FILE
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter, check_same_inputs, free_to_change, locked
from pe_dpo.training.gamma import with_recorded_gamma
from pe_dpo.training.train import SharedRun, prepare_run, train

logger = logging.getLogger(__name__)

Engine = Literal["local", "ray"]


class PointState(NamedTuple):
    """How one run of a sweep stands."""

    point: Point
    status: Literal["waiting", "running", "finished", "failed", "interrupted"]
    seconds: float = 0.0
    metrics: Mapping[str, float] = {}
    """Held-out metrics of a finished run, see `metrics.catalogue.pair_metrics`, and `kl` where answers were sampled."""
    why: str = ""
    """Of a failed one."""


def sweep(
    plan: SweepPlan,
    *,
    engine: Engine = "local",
    workers: int | None = None,
    tell: Callable[[Sequence[PointState]], None] = lambda states: None,
) -> list[PointState]:
    """Run all points of a plan that are not finished, and return how every point stands.

    Args:
        plan: from `make_plan`; points that lie in its folder already are joined to it.
        engine: "local" in this process; "ray" on the GPUs and machines of a Ray cluster, or on this one.
        workers: with ray, how many runs at once; default: one per GPU, else one.
        tell: called with all points at the beginning, and whenever a run begins or ends.

    Raises:
        RunFolderError: the folder is not this sweep's, is in use, or holds a run of other settings or other pairs.
        UsageError: ray is asked for and not installed.
        DataError, ModelError: the base or the pairs cannot be used at all.
    """
    with locked(plan.folder):
        plan = save_plan(plan)
        states = {point.folder: _state_on_disk(plan, point, recipe) for point, recipe in _pairs(plan)}
        todo = [(point, recipe) for point, recipe in _pairs(plan) if states[point.folder].status != "finished"]
        logger.info(f"{len(plan.points)} runs, {len(todo)} of them to do")
        tell(list(states.values()))
        finished = (Path(recipe.output) for point, recipe in _pairs(plan) if states[point.folder].status == "finished")
        like = next(finished, None)
        if engine == "ray" and todo:
            from pe_dpo.experiments.on_ray import run_on_ray

            changes = run_on_ray(todo, like=like, workers=workers)
        else:
            changes = _run_here(todo, like)
        for state in changes:
            states[state.point.folder] = state
            tell(list(states.values()))
            if state.status == "interrupted":
                break
        return list(states.values())


def _run_here(todo: list[tuple[Point, Recipe]], like: Path | None) -> Iterator[PointState]:
    """Yield the state of each point when its run begins and when it ends."""
    shared: SharedRun | None = None
    for point, recipe in todo:
        shared = shared or share(recipe, like)
        yield PointState(point, "running")
        yield run_point(point, recipe, shared)


def share(recipe: Recipe, like: Path | None = None) -> SharedRun:
    """Return pairs and loaded base that all runs of a sweep have in common.

    Args:
        recipe: of one of them.
        like: folder of a finished run of the sweep, if there is one.

    Raises:
        RunFolderError: the finished run had other pairs.
        DataError, ModelError: the base or the pairs cannot be used at all.
    """
    with quiet():  # each run says it again in its own log
        prepared = prepare_run(recipe)
    if like is not None:
        check_same_inputs(Run(like), {"data": data_hash(prepared.data.train), "held_out": data_hash(prepared.data.held_out)})
    for line in prepared.data.report.lines():
        logger.info(line)
    return SharedRun(prepared, load_base(prepared.base, device="cuda" if torch.cuda.is_available() else "cpu"))


def run_point(point: Point, recipe: Recipe, shared: SharedRun) -> PointState:
    """Train one point, or go on with it from its newest checkpoint, and return what came of it; a failure is a state, too."""
    folder, began = Path(recipe.output), time.perf_counter()
    try:
        with logged_to(folder / "log.txt"):
            goes_on = bool(checkpoints(folder))
            result = train(recipe, resume=goes_on, overwrite=not goes_on, shared=shared)
    except PeDpoError as error:
        if not isinstance(error, RunFolderError):  # else somebody else's run may lie there
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / RECIPE_FILE).is_file():  # it did not come to that
                write_atomically(folder / RECIPE_FILE, recipe_to_yaml(with_absolute_paths(recipe)))
            RunWriter(folder).update(status="failed", why=str(error))
        return PointState(point, "failed", time.perf_counter() - began, {}, str(error))
    if result.interrupted_by is not None:
        return PointState(point, "interrupted", time.perf_counter() - began)
    for checkpoint in checkpoints(folder):  # what they are for is over, and a sweep has many
        shutil.rmtree(checkpoint)
    return PointState(point, "finished", time.perf_counter() - began, _metrics(folder, result.after))


def _metrics(folder: Path, after: Mapping[str, float]) -> dict[str, float]:
    generation = Run(folder).generation
    return {**after, "kl": generation["kl"]["mean"]} if generation else dict(after)


def _state_on_disk(plan: SweepPlan, point: Point, recipe: Recipe) -> PointState:
    folder = plan.folder / point.folder
    if not (folder / RUN_FILE).is_file():
        return PointState(point, "waiting")
    run = Run(folder)
    info = run.info
    if not info.is_finished:
        return PointState(point, "waiting")
    old = run.recipe
    asked = with_recorded_gamma(run, with_absolute_paths(recipe))
    difference = recipe_difference(old, asked, ignore=free_to_change(old))
    if difference:
        raise RunFolderError(f"{folder}: was trained with other settings ({'; '.join(difference)}); move it away")
    if asked.adapter.start:
        check_same_inputs(run, {"start": adapter_fingerprint(Path(asked.adapter.start))})
    return PointState(point, "finished", info.seconds, _metrics(folder, info.after))


def _pairs(plan: SweepPlan) -> list[tuple[Point, Recipe]]:
    return list(zip(plan.points, plan.recipes, strict=True))

"""The runs of a sweep, one after the other on one loaded base, or spread over workers; what is finished is never run again.

    plan ── points without a finished run ──┬─ local: one base, one set of pairs, one reference pass
                                            └─ ray:   the same in every worker (experiments/on_ray.py)

A run folder says itself whether it is finished, so that a sweep goes on after a kill at any point: the run that was cut
off from its newest checkpoint, the others as they are.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pe_dpo.disk import disk_errors_named
from pe_dpo.errors import RunFolderError
from pe_dpo.evaluation.judged_runs import Judge
from pe_dpo.experiments.on_ray import run_on_ray
from pe_dpo.experiments.plan import Point, SweepPlan, save_plan
from pe_dpo.experiments.point import PointState, run_metrics, run_point, share
from pe_dpo.inference.inputs import Inputs
from pe_dpo.interruption import Interrupted
from pe_dpo.model.provenance import adapter_inputs
from pe_dpo.printable import counted
from pe_dpo.recipe import Recipe, recipe_difference, with_absolute_paths
from pe_dpo.recipe.load import far_places
from pe_dpo.runs.checkpoints import checkpoints
from pe_dpo.runs.files import RUN_FILE
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import check_same_inputs, free_to_change, locked
from pe_dpo.training.gamma import with_recorded_gamma

logger = logging.getLogger(__name__)

Engine = Literal["local", "ray"]


def sweep(
    plan: SweepPlan,
    *,
    engine: Engine = "local",
    workers: int | None = None,
    scorer: str | None = None,
    tell: Callable[[Sequence[PointState]], None] = lambda states: None,
) -> list[PointState]:
    """Run all points of a plan that are not finished, and return how every point stands.

    Args:
        plan: from `make_plan`; points that lie in its folder already are joined to it.
        engine: "local" in this process; "ray" on the GPUs and machines of a Ray cluster, or on this one.
        workers: with ray, how many runs at once; default: one per GPU, else one.
        scorer: judges what was sampled of every run against π0's answers, when the runs are done, in this process; what it
            fails of is that point's failure and loses nothing: the same sweep judges it again.
        tell: called with all points at the beginning, and whenever a run begins, ends or was judged.

    Raises:
        RunFolderError: the folder is not this sweep's, is in use, or holds a run of other settings or other pairs.
        UsageError: ray is asked for and not installed, or the scorer is not there or has nothing to judge.
        DataError, ModelError: the base or the pairs cannot be used at all.
        DiskError: the folder of the sweep cannot be written.
    """
    again = "the same sweep goes on where it was"
    judge = Judge(scorer, plan.recipes) if scorer else None
    for line in far_places(plan.recipe.model_copy(update={"output": str(plan.folder)})):
        logger.info(line)
    with locked(plan.folder), disk_errors_named(plan.folder, advice=again), _named(plan):
        plan = save_plan(plan)
        states = {point.folder: _state_on_disk(plan, point, recipe) for point, recipe in _pairs(plan)}
        todo = [(point, recipe) for point, recipe in _pairs(plan) if states[point.folder].status != "finished"]
        logger.info(f"{counted(len(plan.points), 'run')}, {len(todo)} to do")
        tell(list(states.values()))
        folders = {Path(recipe.output): states[point.folder].status for point, recipe in _pairs(plan)}
        begun = [folder for folder, status in folders.items() if status == "finished" or checkpoints(folder)]
        like = next(iter(begun), None)
        changes = run_on_ray(todo, like=like, workers=workers) if engine == "ray" and todo else _run_here(todo, like)
        for state in changes:
            states[state.point.folder] = state
            tell(list(states.values()))
            if state.status == "interrupted":
                return list(states.values())
        ended = {plan.folder / folder: state for folder, state in states.items() if state.status == "finished"}
        for run, why in judge.judge([Run(folder) for folder in ended]) if judge else ():
            point, seconds = ended[run.folder].point, ended[run.folder].seconds
            state = PointState(point, "finished", seconds, run_metrics(run.folder, run.info.after))
            if why:
                state = PointState(point, "failed", seconds, why=f"it is trained and measured, and was not judged: {why}")
            states[point.folder] = state
            tell(list(states.values()))
        return list(states.values())


@contextmanager
def _named(plan: SweepPlan) -> Iterator[None]:
    """Within the block a signal says how the sweep goes on, and not how the run that it met would."""
    try:
        yield
    except Interrupted as stop:
        done = sum(Run(plan.folder / point.folder).info.is_finished for point in plan.points)
        again = Interrupted(stop.number, stop.work)
        again.add_note(f"{done} of {len(plan.points)} runs are finished; start the same command again to go on")
        raise again from stop


def _run_here(todo: list[tuple[Point, Recipe]], like: Path | None) -> Iterator[PointState]:
    """Yield the state of each point when its run begins and when it ends."""
    shared: Inputs | None = None
    for point, recipe in todo:
        shared = shared or share(recipe, like)
        yield PointState(point, "running")
        state = run_point(point, recipe, shared)
        if state.leaves_doubts:
            shared = None
        yield state


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
    check_same_inputs(run, adapter_inputs(asked.adapter))
    return PointState(point, "finished", info.seconds, run_metrics(folder, info.after))


def _pairs(plan: SweepPlan) -> list[tuple[Point, Recipe]]:
    return list(zip(plan.points, plan.recipes, strict=True))

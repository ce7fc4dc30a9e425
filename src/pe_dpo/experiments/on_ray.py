"""The runs of a sweep on Ray: one worker per GPU, each with its own base, on this machine or a cluster with shared files."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pe_dpo.errors import UsageError, describe_error
from pe_dpo.experiments.plan import Point
from pe_dpo.experiments.point import PointState, run_point, share
from pe_dpo.recipe import Recipe

logger = logging.getLogger(__name__)


class _Worker:
    """Runs points one after the other; its base is loaded once, with the first of them."""

    def __init__(self, like: Path | None) -> None:
        self.like = like
        self.shared: Any = None

    def run(self, point: Point, recipe: Recipe) -> PointState:
        """Return how the run of a point ended."""
        if self.shared is None:
            self.shared = share(recipe, self.like)
        state = run_point(point, recipe, self.shared)
        if state.leaves_doubts:
            self.shared = None
        return state


def run_on_ray(
    todo: list[tuple[Point, Recipe]],
    *,
    like: Path | None = None,
    workers: int | None,
) -> Iterator[PointState]:
    """Run points on the cluster that RAY_ADDRESS names, else on this machine, and yield each as it begins and ends.

    A worker that is free gets the next point. A point whose worker died has failed, and a new one takes its place; so has one
    whose worker could not load the base.

    Args:
        todo: points with their recipes; their folders must be the same files for every worker.
        like: folder of a finished run of the sweep, which must have had the same pairs.
        workers: runs at once; default: one per GPU of the cluster, else one. Those that the cluster has no room for begin once
            others have ended.

    Raises:
        UsageError: ray is not installed, or its cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError('`engine` ray needs Ray: pip install "pe-dpo[ray]", or `engine` local') from error
    try:
        ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ray.exceptions.RayError) as error:
        why = " ".join(str(error).split())[:200]
        raise UsageError(
            f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS', '(unset)')}: no cluster of Ray lets us in ({why}); see `ray status`, "
            "unset it to run on this machine, or `engine` local"
        ) from error
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = min(workers or gpus or 1, len(todo))
        logger.info(f"ray: up to {count} runs at once on {gpus} GPUs")
        make = partial(ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Worker).remote, like and like.absolute())
        waiting, running = list(reversed(todo)), dict[Any, tuple[Any, Point]]()
        free: list[Any] = [make() for _ in range(count)]
        while waiting or running:
            while waiting and free:
                point, recipe = waiting.pop()
                worker = free.pop()
                # By its absolute path: workers run in folders of their own.
                recipe = recipe.model_copy(update={"output": str(Path(recipe.output).absolute())})
                running[worker.run.remote(point, recipe)] = worker, point
                yield PointState(point, "running")
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            worker, point = running.pop(ended)
            try:
                yield ray.get(ended)
            except ray.exceptions.RayActorError as error:
                yield PointState(point, "failed", why=f"its worker died: {error}".splitlines()[0])
                worker = make() if waiting else worker
            except Exception as error:  # noqa: BLE001  # whatever the worker raised, wrapped by Ray: it is this point's own
                yield PointState(point, "failed", why=describe_error(getattr(error, "cause", None) or error))
            if waiting:
                free.append(worker)
            else:
                ray.kill(worker)  # a worker for which the cluster has no room yet takes its place
    finally:
        ray.shutdown()

"""One run of a sweep, on the base and the pairs that all share; one that fails has that for its state and stops no other."""

import gc
import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from pe_dpo.data import data_hash
from pe_dpo.disk import write_atomically
from pe_dpo.errors import PeDpoError, RunFolderError, describe_error
from pe_dpo.experiments.plan import Point
from pe_dpo.inference.inputs import Findings, Inputs, read_inputs
from pe_dpo.log import logged_to, quiet
from pe_dpo.model.base import load_base
from pe_dpo.recipe import Recipe, recipe_to_yaml, with_absolute_paths
from pe_dpo.runs.checkpoints import checkpoints
from pe_dpo.runs.files import RECIPE_FILE
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter, check_same_inputs
from pe_dpo.training.train import train

logger = logging.getLogger(__name__)


class PointState(NamedTuple):
    """How one run of a sweep stands."""

    point: Point
    status: Literal["waiting", "running", "finished", "failed", "interrupted"]
    seconds: float = 0.0
    metrics: Mapping[str, float] = {}
    """Held-out metrics of a finished run, see `metrics.catalogue.pair_metrics`; `kl` where answers were sampled, and `win_rate`
    where they were judged."""
    why: str = ""
    """Of a failed one."""
    leaves_doubts: bool = False
    """Whether it failed of what nobody foresaw, so that the next run had better have a base that is loaded anew."""


def share(recipe: Recipe, like: Path | None = None) -> Inputs:
    """Return pairs and loaded base that all runs of a sweep have in common; whatever else a recipe asks for is its own run's.

    Args:
        recipe: of one of them.
        like: folder of a run of the sweep that is finished or can be gone on with, if there is one; what it held out is held
            out again.

    Raises:
        RunFolderError: that run had other pairs.
        DataError, ModelError: the base or the pairs cannot be used at all.
    """
    with quiet():  # each run says it again in its own log
        prepared = read_inputs(recipe, recorded=None if like is None else Run(like).data_report)
    if like is not None:
        check_same_inputs(Run(like), {"data": data_hash(prepared.data.train), "held_out": data_hash(prepared.data.held_out)})
    prepared.data.report.tell(logger)
    base = load_base(prepared.base, device="cuda" if torch.cuda.is_available() else "cpu")
    return prepared._replace(loaded_base=base, findings=Findings())


def run_point(point: Point, recipe: Recipe, shared: Inputs) -> PointState:
    """Train one point, or go on with it from its newest checkpoint, and return what came of it; a failure is a state, too.

    Whatever ends the run, of this package or of any library, is the failure of this run alone; its traceback is in log.txt.
    """
    folder, began, result = Path(recipe.output), time.perf_counter(), None
    log = folder / "log.txt"
    try:
        with logged_to(log):
            goes_on = bool(checkpoints(folder))
            try:
                result = train(recipe, resume=goes_on, overwrite=not goes_on, shared=shared)
            except Exception as error:
                if not isinstance(error, PeDpoError):
                    logger.exception("an error that nobody foresaw")
                raise
        if result.interrupted_by is not None:
            return PointState(point, "interrupted", time.perf_counter() - began)
        for checkpoint in checkpoints(folder):  # what they are for is over, and a sweep has many
            shutil.rmtree(checkpoint, ignore_errors=True)
        return PointState(point, "finished", time.perf_counter() - began, run_metrics(folder, result.after))
    except Exception as error:  # noqa: BLE001  # whatever it is, it is this run's own and the others go on
        why, is_doubtful = describe_error(error), not isinstance(error, PeDpoError)
        if not isinstance(error, RunFolderError):  # else somebody else's run may lie there
            with suppress(OSError):  # of a full disk, say; the table of the sweep has it all the same
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / RECIPE_FILE).is_file():  # it did not come to that
                    write_atomically(folder / RECIPE_FILE, recipe_to_yaml(with_absolute_paths(recipe)))
                RunWriter(folder).update(status="failed", why=why)
    except BaseException:  # Ctrl-C, before the run has begun: a folder with its log alone would be taken for somebody else's
        if {path.name for path in folder.glob("*")} <= {".lock", log.name}:
            log.unlink(missing_ok=True)
        raise
    gc.collect()  # what the error held in its traceback lies in cycles, and the next run needs its memory
    return PointState(point, "failed", time.perf_counter() - began, {}, why, leaves_doubts=is_doubtful)


def run_metrics(folder: Path, after: Mapping[str, float]) -> dict[str, float]:
    """Return the held-out metrics of a finished run, with KL and win rate of its sampled answers where there are some."""
    run = Run(folder)
    sampled = {name: run.estimate(name) for name in ("kl", "win_rate")} if run.generation else {}
    return {**after, **{name: found[0] for name, found in sampled.items() if found is not None}}

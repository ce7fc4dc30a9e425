"""Trackers of transformers (wandb, trackio, mlflow, tensorboard, …) beside a run, never in its way.

One run here is one run there, also in a sweep: it has a name of its own, and ends when the run ends. What a tracker raises, for
lack of a network, an account or a disk, is said once and written into run.json; metrics.jsonl has everything all the same.

    train.report_to: wandb      train.project: summaries      train.run_name: first try
"""

import difflib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from pe_dpo.errors import RecipeError, describe_error
from pe_dpo.recipe import Recipe
from pe_dpo.runs.files import SWEEP_FILE
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter

logger = logging.getLogger(__name__)

PACKAGES = {
    "azure_ml": "azureml-core",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""The trackers of transformers, and the package that each is."""
PROJECT = {
    "clearml": "CLEARML_PROJECT",
    "comet_ml": "COMET_PROJECT_NAME",
    "dagshub": "MLFLOW_EXPERIMENT_NAME",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "neptune": "NEPTUNE_PROJECT",
    "swanlab": "SWANLAB_PROJECT",
    "wandb": "WANDB_PROJECT",
}
"""Where transformers' callbacks read the name of a project; trackio's is an argument."""

SECONDS = 30
"""How long wandb may take to begin a run; 90 by default."""
ENOUGH = 3
"""Failures in a row after which a tracker is asked no more: each may have waited for a network."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known and installed; none of them is imported.

    Raises:
        RecipeError: one is not, with what to install.
    """
    for name in names:
        if name not in PACKAGES:
            meant = difflib.get_close_matches(name, PACKAGES, 1)
            hint = f"did you mean {meant[0]}?" if meant else f"write one of {', '.join(PACKAGES)}"
            raise RecipeError(f"train.report_to: {name} is not a tracker of transformers; {hint}")
        try:
            is_there = importlib.util.find_spec(PACKAGES[name].replace("-", ".")) is not None
        except (ImportError, ValueError):  # of the package that it lies in, or a half-removed one
            is_there = False
        if not is_there:
            raise RecipeError(
                f"train.report_to: {name} is not installed: pip install {PACKAGES[name]}, or leave it out: metrics.jsonl has "
                "everything all the same"
            )


class Trackers:
    """Passes the events of transformers' Trainer on to trackers; within its block they are those of one run.

    Args:
        recipe: Names them, and the run and the project that they are told of.
        writer: The writer of the run.
    """

    def __init__(self, recipe: Recipe, writer: RunWriter) -> None:
        self.names, self.project, self.writer = recipe.train.report_to, recipe.train.project, writer
        folder = Path(recipe.output)
        sweep = folder.parents[2] if len(folder.parents) > 2 and (folder.parents[2] / SWEEP_FILE).is_file() else None
        self.group = sweep.name if sweep else None
        """The sweep that the run belongs to."""
        asked = recipe.train.run_name
        own = folder.name if sweep is None else "/".join(folder.parts[-2:])
        self.run_name = (asked or own) if sweep is None else " ".join(filter(None, (asked, own)))
        self.failures: dict[str, str] = {}
        """Why a tracker failed first, and how often; recorded in run.json."""
        self._callbacks: dict[str, Any] = {}
        self._in_a_row: dict[str, int] = {}
        self._last: tuple[Any, ...] = ()
        self._opened_wandb: Any = None
        self._is_over: set[str] = set()

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Return what passes on an event, which is what Trainer calls everything that begins with "on_"."""
        if not event.startswith("on_"):
            raise AttributeError(event)
        return partial(self._pass_on, event)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the run of each tracker, as failed where an error ended it: the next one in this process begins its own."""
        for name, callback in self._callbacks.items():
            with self._kept_from_training(name):
                if name in ("mlflow", "dagshub") and kind is not None and getattr(callback, "_auto_end_run", False):
                    callback._ml_flow.end_run("FAILED")
                elif name != "wandb" and self._last and name not in self._is_over:
                    callback.on_train_end(*self._last)
        if self._opened_wandb is not None:
            with self._kept_from_training("wandb"):
                self._opened_wandb.finish(exit_code=int(kind is not None))
        self._callbacks, self._opened_wandb = {}, None
        if self.failures:
            self.writer.update(trackers=self.failures)

    def _pass_on(self, event: str, args: Any, state: Any, control: Any, **words: Any) -> None:
        if event == "on_train_begin":
            self._last, self._is_over = (args, state, control), set()
            args.run_name = self.run_name
            if self.project is not None:
                args.project = self.project
            for name in self.names:
                with self._kept_from_training(name, at_once=True):
                    self._open(name, args, state, control, **words)
            return
        for name, callback in list(self._callbacks.items()):
            with self._kept_from_training(name, step=state.global_step), self._environment(name):
                getattr(callback, event)(args, state, control, **words)
                self._in_a_row[name] = 0
            if event == "on_train_end":
                self._is_over.add(name)

    def _open(self, name: str, args: Any, state: Any, control: Any, **words: Any) -> None:
        """Begin a run of one tracker."""
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        with self._environment(name):
            callback = self._callbacks[name] = INTEGRATION_TO_CALLBACK[name]()
            run = Run(self.writer.folder).info.id or ""
            if name == "wandb" and state.is_world_process_zero and callback._wandb.run is None:
                self._opened_wandb = self._open_wandb(callback._wandb, run)
            if name == "trackio":  # which takes a run of the same name for the same run
                args.run_name = f"{self.run_name}-{run[:8]}"
            callback.on_init_end(args, state, control, **words)
            callback.on_train_begin(args, state, control, **words)
            args.run_name = self.run_name

    def _open_wandb(self, wandb: Any, run: str) -> Any:
        """Return an open run of wandb, offline where it cannot be reached: what is recorded there can be sent later.

        Opened here, since its callback asks for what the environment said when wandb was first used in this process.
        """
        project = self.project or os.environ.get("WANDB_PROJECT", "huggingface")
        words = {"project": project, "group": self.group, "name": self.run_name}
        try:
            return wandb.init(id=run, resume="allow", settings=wandb.Settings(init_timeout=SECONDS), **words)
        except (wandb.Error, OSError) as error:
            opened = wandb.init(id=f"{run}-offline", mode="offline", **words)
            self._tell("wandb", 0, f"{describe_error(error)}; recorded offline, to be sent with: wandb sync {opened.dir}/..")
            return opened

    def _tell(self, name: str, step: int, why: str) -> None:
        """Say and write down why a tracker failed, the first time it does."""
        if name not in self.failures:
            self.failures[name] = f"step {step}: {why}"
            logger.warning(f"train.report_to: {name} fails at step {step} ({why}); training goes on, and metrics.jsonl has all")

    @contextmanager
    def _kept_from_training(self, name: str, *, step: int = 0, at_once: bool = False) -> Iterator[None]:
        """Within the block, what a tracker raises is written down; after the first error, or a few, it is asked no more."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # of any library, and nothing that training depends on
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
            self._tell(name, step, describe_error(error))
            if at_once or self._in_a_row[name] >= ENOUGH:
                self._callbacks.pop(name, None)

    @contextmanager
    def _environment(self, name: str) -> Iterator[None]:
        """Within the block the environment says what transformers' callbacks read there."""
        wanted: dict[str, str] = {}
        if self.project is not None and name in PROJECT:
            wanted[PROJECT[name]] = self.project
        if name in ("mlflow", "dagshub"):  # 7 by default, of which each waits twice as long as the last: four minutes
            wanted["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        if name == "tensorboard" and "TENSORBOARD_LOGGING_DIR" in os.environ:  # else all runs would be in one folder
            wanted["TENSORBOARD_LOGGING_DIR"] = str(Path(os.environ["TENSORBOARD_LOGGING_DIR"]) / self.run_name)
        before: Mapping[str, str | None] = {key: os.environ.get(key) for key in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value

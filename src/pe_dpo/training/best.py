"""Keeps the adapter of the best evaluation, and ends a run that has not become better for some evaluations.

    evaluation   1     2     3     4     5           patience 2
    metric      .61   .66   .64   .65                 the run ends at 4; best/ is of 2

How much of the best is luck: among equal adapters the largest of n measurements is above their mean. By how much, a bootstrap
over prompts tells, which picks again in every replicate (`metrics.bootstrap.optimism_of_best`).
"""

import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from pe_dpo.disk import write_json
from pe_dpo.metrics.bootstrap import optimism_of_best, resampled_ratios
from pe_dpo.metrics.catalogue import METRICS, SELECTING, pair_metrics, share_intervals
from pe_dpo.metrics.table import Floats, PairTable
from pe_dpo.model.provenance import adapter_fingerprints
from pe_dpo.runs.best import BestRecord, copy_links, new_best, remove_best, replace_best
from pe_dpo.runs.files import BASE_FILE, BEST, BEST_FILE, PAIRS_FILE, read_object
from pe_dpo.runs.writing import RunWriter, save_evaluation

logger = logging.getLogger(__name__)

SELECTION_FILE = "selection.npz"
REPEATS = 2_000
"""Replicates of the bootstrap: the optimism of ten equal points comes out to a few percent of itself."""


class KeepBest(TrainerCallback):
    """Looks at every evaluation of the held-out pairs.

    Args:
        trainer: The trainer of the run, which scores and saves.
        writer: The writer of the run.
        metric: The key of a metric in `SELECTING`.
        patience: After how many evaluations without a better one the run ends; None for never.
    """

    def __init__(self, trainer: Any, writer: RunWriter, metric: str, patience: int | None) -> None:
        self.trainer, self.writer, self.patience = trainer, writer, patience
        self.metric, self.direction = METRICS[metric], SELECTING[metric]
        self.steps: list[int] = []
        """Of the evaluations so far."""
        self.sums: list[tuple[Floats, Floats]] = []
        """Numerators and denominators of the metric in each, summed over the pairs of each prompt."""

    @property
    def values(self) -> Floats:
        """The metric in each evaluation; NaN where it was not defined."""
        return np.array([above.sum() / below.sum() if below.sum() else math.nan for above, below in self.sums])

    @property
    def best(self) -> int | None:
        """Which evaluation was the best, the first of equals; None before there is one."""
        values = self.direction * self.values
        return None if np.isnan(values).all() else int(np.nanargmax(values))

    @property
    def is_over(self) -> bool:
        """Whether the run's patience is at its end."""
        best = self.best
        since = len(self.steps) if best is None else len(self.steps) - 1 - best
        return self.patience is not None and since >= self.patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the adapter where it is better than all before, and end the run where patience is at its end."""
        if not self.trainer.evaluated or state.global_step in self.steps:
            return
        table: PairTable = self.trainer.evaluated[1]
        sums = self.metric.sums(table, {key: at for at, key in enumerate(dict.fromkeys(table.prompt_key))})
        if args.world_size > 1:  # one process's numbers decide for all
            sums = broadcast_object_list([sums])[0]
        self.steps.append(state.global_step)
        self.sums.append(sums)
        if self.best == len(self.steps) - 1 and self.writer.writes:
            self._write(table)
        if self.is_over and state.global_step < state.max_steps:  # saved when the line of the last step is written
            control.should_training_stop, control.should_log, control.should_save = True, True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the end of a run whose patience is at its end; Trainer comes here when it has stopped."""
        control.should_save = control.should_save or (control.should_training_stop and self.is_over)

    def _write(self, table: PairTable) -> None:
        run, metrics = self.writer.folder, pair_metrics(table, is_fixed_set=True)
        place = new_best(run)
        self.trainer.save_policy(place)
        shutil.copyfile(run / BASE_FILE, place / BASE_FILE)
        table.save(place / PAIRS_FILE)
        save_evaluation(place, metrics, share_intervals(metrics))
        value = {"metric": self.metric.key, "step": self.steps[-1], "value": float(self.values[-1])}
        write_json(place / BEST_FILE, {**value, "adapter": adapter_fingerprints(place)})
        replace_best(run)

    def save(self, checkpoint: Path) -> None:
        """Write what was seen so far, and the best adapter, into a checkpoint."""
        above, below = (np.array([one[part] for one in self.sums]) for part in (0, 1))
        with (checkpoint / SELECTION_FILE).open("wb") as file:
            np.savez(
                file, metric=np.array(self.metric.key), steps=np.array(self.steps, dtype=np.int64), above=above, below=below
            )
        if self.best is not None:
            copy_links(self.writer.folder / BEST, checkpoint / BEST)

    def restore(self, checkpoint: Path | None) -> None:
        """Read back what a checkpoint keeps; best/ is afterwards the one of then.

        A checkpoint of another metric, or of none, has seen nothing: the best is picked from here on.
        """
        self.steps, self.sums = [], []
        if checkpoint is not None and (checkpoint / SELECTION_FILE).is_file():
            with np.load(checkpoint / SELECTION_FILE, allow_pickle=False) as found:
                if str(found["metric"]) == self.metric.key:
                    self.steps = [int(step) for step in found["steps"]]
                    self.sums = list(zip(found["above"], found["below"], strict=True))
        run = self.writer.folder
        if not self.writer.writes:
            return
        if checkpoint is None or self.best is None:
            remove_best(run)
        elif read_object(run / BEST / BEST_FILE) != read_object(checkpoint / BEST / BEST_FILE):
            copy_links(checkpoint / BEST, new_best(run))
            replace_best(run)

    def summary(self, before: Mapping[str, float]) -> BestRecord | None:
        """Return what the best came to: its value, what of it is luck, what is to be expected on other pairs.

        Args:
            before: The metrics of the held-out pairs at step 0.

        Returns:
            None before there is one.
        """
        best, values = self.best, self.values
        if best is None:
            return None
        known = ~np.isnan(values)
        above, below = (np.array([one[part] for one in self.sums])[known].T for part in (0, 1))
        luck = None
        if len(above) > 1 and known.sum() > 1:
            replicates = resampled_ratios(above, below, repeats=REPEATS, seed=0)
            luck = optimism_of_best(self.direction * values[known], self.direction * replicates)
        value, start = float(values[best]), before.get(self.metric.key)
        return BestRecord(
            metric=self.metric.key,
            step=self.steps[best],
            value=value,
            last=float(values[-1]) if known[-1] else None,
            evaluations=len(self.steps),
            pairs=len(self.trainer.held_out),
            luck=luck,
            expected=None if luck is None else value - self.direction * luck,
            before=start,
            before_is_no_worse=start is not None and self.direction * start >= self.direction * value,
        )

    def describe_end(self) -> str:
        """Return why a run ended before its last step, in words; empty where it did not."""
        step, all_steps = self.trainer.state.global_step, self.trainer.state.max_steps
        if not self.is_over or step >= all_steps:
            return ""
        since = f"since step {self.steps[self.best]}" if self.best is not None else "at all"
        return (
            f"ended after step {step} of {all_steps}: no better {self.metric.title} {since}, in {self.patience} evaluations "
            "(train.patience)"
        )

"""Callbacks of a run: metrics into metrics.jsonl, measurements along the way, and a signal turned into a checkpoint."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback

from pe_dpo.interruption import Signals, finishing
from pe_dpo.runs.writing import RunWriter


class MetricsFile(TrainerCallback):
    """Writes every logged line to metrics.jsonl of the main process; the last step of a run is always logged."""

    def __init__(self, writer: RunWriter) -> None:
        self.writer = writer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append the line with its step."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self.writer.log({"step": state.global_step, **logs})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a line of the last step, whatever `logging_steps`; a run that is stopped keeps its window (`Window`).

        Raises:
            TrainingError: the folder was removed, and a checkpoint would make another.
        """
        if state.is_world_process_zero:
            self.writer.check_is_there()
        if state.global_step >= state.max_steps:
            control.should_log = True


class Snapshots(TrainerCallback):
    """Calls `measure` with the step after each of some optimizer steps."""

    def __init__(self, steps: Collection[int], measure: Callable[[int], None]) -> None:
        self.steps, self.measure = frozenset(steps), measure

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is expected."""
        if state.global_step in self.steps:
            self.measure(state.global_step)


class StopOnSignal(TrainerCallback):
    """On a signal that asks the process to end (`interruption.STOPPING`) finishes the step, saves and stops."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._block = ExitStack()
        self._signals: Signals | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a word instead of an exception."""
        self._signals = self._block.enter_context(finishing())

    def restore(self) -> None:
        """Signals are exceptions again."""
        self._block.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint and the end when a signal came."""
        self._agree(args)
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening; what came after the last step counts in every process."""
        self._agree(args)
        self.restore()

    def _agree(self, args: Any) -> None:
        """Take over another process's signal: one may reach one process only, or each in another step."""
        self.received = self.received or (self._signals.received if self._signals else None)
        if args.world_size > 1:
            signals = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(signals, op=torch.distributed.ReduceOp.MAX)
            self.received = int(signals) or None

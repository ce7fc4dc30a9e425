"""Callbacks of a run: metrics into metrics.jsonl, measurements along the way, and a signal turned into a checkpoint."""

import signal
import threading
from collections.abc import Callable, Collection, Sequence
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

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
        """Ask for a line of the last step, whatever `logging_steps`; a run that is stopped keeps its window (`Window`)."""
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


STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
"""Asked to end, Ctrl-C, the terminal is gone, and the notice that a job scheduler gives before it ends a job."""
PERSISTING = ("SIGHUP", "SIGUSR1")
"""These come more than once without meaning more: kernel and shell both tell that a terminal is gone."""


class StopOnSignal(TrainerCallback):
    """On one of `STOPPING` finishes the step, saves and stops; a second SIGTERM or SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to listen; outside the main thread signals are somebody else's."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in STOPPING:
            number = getattr(signal, name, None)  # not every system has all of them
            before = None if number is None else signal.getsignal(number)
            if number is None or before is None:  # somebody's who is not Python and could not get it back
                continue
            if name == "SIGHUP" and before == signal.SIG_IGN:  # nohup: it is to outlive its terminal
                continue
            self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self.restore(but=PERSISTING)

    def restore(self, but: Sequence[str] = ()) -> None:
        """Give the signals back to whoever handled them before, all `but` some."""
        for number, handler in list(self._previous.items()):
            if signal.Signals(number).name not in but:
                signal.signal(number, handler)
                del self._previous[number]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint and the end when a signal came."""
        self._agree(args)
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening; what came after the last step counts in every process."""
        self.restore()
        self._agree(args)

    def _agree(self, args: Any) -> None:
        """Take over another process's signal: one may reach one process only, or each in another step."""
        if args.world_size > 1:
            signals = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(signals, op=torch.distributed.ReduceOp.MAX)
            self.received = int(signals) or None

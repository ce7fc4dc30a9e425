"""Checkpoints by the clock, so that a run of a week loses minutes whatever a tenth of it takes."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback


class SaveClock(TrainerCallback):
    """Asks for a checkpoint where the last one is so many minutes old; the first process's clock decides for all.

    Args:
        minutes: Between two checkpoints; 0 for those by steps alone.
        now: Seconds of a clock that never goes back.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self._now = minutes, now
        self._saved = now()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self._saved = self._now()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count anew, whatever the checkpoint was for."""
        self._saved = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, in all processes or in none."""
        is_due = self.minutes > 0 and self._now() - self._saved >= 60 * self.minutes
        if self.minutes > 0 and args.world_size > 1:
            flag = torch.tensor(int(is_due), device=args.device)
            torch.distributed.broadcast(flag, src=0)
            is_due = bool(flag)
        control.should_save = control.should_save or is_due

"""A run that ends in the middle of everything, as a killed process does."""

from typing import Any

from transformers import TrainerCallback


class Killed(BaseException):
    """Stands for the end of the process."""


class KillAt(TrainerCallback):
    """Ends the run after a step's checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed

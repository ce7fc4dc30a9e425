"""The pairs that were trained on since the last logged line of metrics, which a checkpoint between two lines keeps.

step      1   2   3 | 4   5            log_every: 5
saved             ^                    a resumed run logs the line of 5 over all five steps, as the straight run does
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from pe_dpo.metrics.table import PairTable
from pe_dpo.objective import Loss


class Window(TrainerCallback):
    """What one process has seen since the last line; a callback, since Trainer begins its own sums anew before training.

    Args:
        trainer: The Trainer whose sum of losses belongs to the window.
        loss: The loss that the pairs are scored with.
    """

    def __init__(self, trainer: Any, loss: Loss) -> None:
        self._trainer, self._loss = trainer, loss
        self._parts: list[PairTable] = []
        self._tokens = 0
        self._began = time.perf_counter()
        self._sums: tuple[float, int] | None = None

    def add(self, scored: list[PairTable], tokens: int) -> None:
        """Add the pairs of one optimizer step.

        Args:
            scored: The pairs of this process.
            tokens: How many tokens all processes read together.
        """
        self._parts.extend(scored)
        self._tokens += tokens

    def restart_clock(self) -> None:
        """Leave out of the speed what was done since the last step."""
        self._began = time.perf_counter()

    def empty(self) -> tuple[PairTable, float]:
        """Return the pairs of all processes and the tokens a second, and begin anew."""
        parts = gather_object([PairTable.join(self._parts)] if self._parts else [])
        speed = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        self._parts, self._tokens, self._began = [], 0, time.perf_counter()
        return PairTable.join(parts), speed

    def save(self, folder: Path) -> None:
        """Write what is not logged yet into a checkpoint, each process its part; nothing where all is."""
        trainer = self._trainer
        logged = trainer._globalstep_last_logged
        if logged == trainer.state.global_step:
            return
        columns = PairTable.join(self._parts).columns() if self._parts else {}
        sums = {"loss": trainer._tr_loss.item(), "logged": logged, "tokens": self._tokens}
        arrays = {f"pairs/{name}": np.asarray(column) for name, column in columns.items()} | sums
        with self._file(folder).open("wb") as file:
            np.savez(file, **arrays)

    def restore(self, folder: Path) -> None:
        """Read back what a checkpoint keeps; a checkpoint without it was made at a logged step, or is from before."""
        self._parts, self._tokens, self._sums = [], 0, None
        if not self._file(folder).is_file():
            return
        with np.load(self._file(folder), allow_pickle=False) as found:
            self._tokens, self._sums = int(found["tokens"]), (float(found["loss"]), int(found["logged"]))
            columns: dict[str, Any] = {
                name.removeprefix("pairs/"): found[name].tolist() if found[name].dtype.kind == "U" else found[name]
                for name in found.files
                if name.startswith("pairs/")
            }
        if columns:
            settings: dict[str, Any] = {name: getattr(self._loss, name) for name in PairTable.SETTINGS}
            self._parts = [replace(PairTable(**columns), **settings)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Trainer back the sum of losses that it had, which it has set to 0 just now."""
        if self._sums is not None and hasattr(self._trainer, "_tr_loss"):  # a checkpoint of the last step is only read back
            loss, self._trainer._globalstep_last_logged = self._sums
            self._trainer._tr_loss += torch.tensor(loss, device=args.device)

    def _file(self, folder: Path) -> Path:
        return folder / f"window-{self._trainer.args.process_index}.npz"

"""The kept numbers of an experiment in the vale, and what they come to for every measured state.

moved        share of held-out pairs with Δπ > Δ0, apart for those that π0 ranks right and wrong
gap          moved where π0 is wrong, minus moved where it is right
win          chance that an answer of the policy is worth more than one of π0 to the same question, ties half
kl           KL(π‖π0) of the policy's answers, nats
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet

from benchmarks.study.run import NUMBERS
from pe_dpo.metrics.table import Floats


class State(NamedTuple):
    """A policy that was measured."""

    part: str
    draw: int
    settings: dict[str, Any]
    """Dotted recipe key: value, where it differs from the part's recipe."""
    seed: int
    step: int
    is_end: bool
    scale: float | None
    delta: Floats
    """Δπ of the held-out pairs, nats."""
    kl: Floats
    """Of each answer, nats."""
    worth: Floats
    """Of each answer, 0, 1 or 2."""


class Measured:
    """The numbers of one experiment.

    Args:
        name: learning, explicit or luck.
        folder: where they are kept.
    """

    def __init__(self, name: str, folder: Path = NUMBERS) -> None:
        self.name = name
        self.shared: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        self.states = [
            State(
                part=row["part"],
                draw=row["draw"],
                settings=json.loads(row["settings"]),
                seed=row["seed"],
                step=row["step"],
                is_end=row["is_end"],
                scale=row["scale"],
                delta=np.asarray(row["chosen"], dtype=np.float64) - np.asarray(row["rejected"]),
                kl=np.asarray(row["kl"], dtype=np.float64),
                worth=np.asarray(row["worth"]),
            )
            for row in pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()
        ]

    @cached_property
    def reference(self) -> Floats:
        """Δ0 of the held-out pairs, nats."""
        return np.asarray(self.shared["reference_chosen"]) - np.asarray(self.shared["reference_rejected"])

    @cached_property
    def chances(self) -> Floats:
        """Chance that an answer worth 0, 1, 2 wins against one of π0, ties half, for each answer's prompt: (answers, 3)."""
        shares = np.asarray(self.shared["reference_worth"])
        return np.cumsum(shares, axis=1) - shares / 2

    def initial(self, state: State) -> Floats:
        """Δπ of step 0, nats: Δ0, but for a start that is not π0."""
        known = self.shared["initial_delta"].get(state.part)
        return self.reference if known is None else np.asarray(known)

    def win(self, state: State, rows: Any = slice(None)) -> float:
        """Return the true win rate, of all answers or of some."""
        return float(self.chances[np.arange(len(state.worth)), state.worth][rows].mean())

    def moved(self, state: State, *, is_right: bool) -> float:
        """Return the share of pairs with Δπ > Δ0 among those that π0 ranks right, or wrong."""
        among = self.reference > 0 if is_right else self.reference < 0
        return float((state.delta > self.reference)[among].mean())

    def gap(self, state: State) -> float:
        """Return moved where π0 is wrong, minus moved where it is right."""
        return self.moved(state, is_right=False) - self.moved(state, is_right=True)


def kappa(state: State, base: float = 1.0) -> float:
    """Return γ/β of a state's settings: a multiple of β, or 0."""
    gamma = state.settings.get("loss.gamma", f"{base}x")
    return float(gamma.removesuffix("x")) if isinstance(gamma, str) else float(gamma)

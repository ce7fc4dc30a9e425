"""Steps whose loss or gradient is not finite: skipped before the optimizer sees them, written down, several in a row the end.

    Σ ℓ or ∇ not finite in any process ── nothing is updated ── whose pairs? ── metrics.jsonl, run.json ── k in a row: failed

Such a step counts all the same: the order of the data, the masks of mixout and the learning rate are functions of a step's
number alone. Adapter and optimizer stay to the bit, the count of Adam's updates with them.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, TypeVar

import numpy as np

from pe_dpo.errors import TrainingError
from pe_dpo.metrics.table import PairTable
from pe_dpo.runs.writing import RunWriter

logger = logging.getLogger(__name__)

NAMED = 5
"""Pairs of a step that are named, and looked for: where the whole adapter went wrong all of them are bad, and five tell it."""

_Item = TypeVar("_Item")


class BadSteps:
    """The steps of a run that were skipped.

    Args:
        limit: How many in a row stop the run.
        writer: The writer of the run; None outside of one.
    """

    def __init__(self, limit: int = 5, writer: RunWriter | None = None) -> None:
        self.limit, self.writer = limit, writer
        self.pairs: dict[int, dict[str, str]] = {}
        """Of each such step, by its number: where the pairs lie that are to blame, and what of each is not finite."""

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take over what a resumed run had skipped before, from the lines of its metrics.jsonl."""
        self.pairs = {line["step"]: line["skipped"] for line in lines if "skipped" in line}
        self._write()

    def add(self, step: int, pairs: Mapping[str, str]) -> None:
        """Write down that a step is skipped.

        Args:
            step: Its number.
            pairs: Where the pairs lie that are to blame, and what of each is not finite; empty where no pair alone is.

        Raises:
            TrainingError: it is one of too many in a row.
        """
        self.pairs[step] = dict(pairs)
        words = f"skipped, nothing was updated; {describe_pairs(pairs)}"
        logger.warning(f"step {step}: {words}")
        if self.writer:
            self.writer.log({"step": step, "skipped": dict(pairs), "words": words})
        self._write()
        first = next(number for number in count(step, -1) if number - 1 not in self.pairs)
        if step - first + 1 < self.limit:
            return
        since = f"steps {first} to {step}" if first < step else f"step {step}"
        raise TrainingError(
            f"{since}: loss or gradient were not finite, and train.bad_steps is {self.limit}; last {describe_pairs(pairs)}. "
            "A few rows that come again: correct or remove them. Other rows in every step: lower train.learning_rate or "
            "loss.beta. None of these steps changed anything and checkpoints stay; with the same settings `resume` would meet "
            "the same steps again"
        )

    def check_some_step_was_taken(self, steps: int) -> None:
        """Check that not all of so many steps were skipped.

        Raises:
            TrainingError: they were, and the adapter is the one that the run began with.
        """
        if steps and len(self.pairs) == steps:
            raise TrainingError(
                f"all {steps} steps were skipped, so that nothing was learned: {describe_pairs(self.pairs[steps])}. Correct or "
                "remove these rows, or lower loss.beta"
            )

    def _write(self) -> None:
        if self.writer and self.pairs:
            blamed = {where: what for pairs in self.pairs.values() for where, what in pairs.items()}
            self.writer.update(skipped_steps=list(self.pairs), bad_pairs=blamed)


def describe_pairs(pairs: Mapping[str, str]) -> str:
    """Return which pairs are to blame and for what, as `train.jsonl:7 (loss is inf)`, in words for a message."""
    if not pairs:
        return "the gradient of its pairs together is not finite, while no one's alone is"
    found = [f"{where} ({what})" for where, what in pairs.items()]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"not finite: {', '.join(found[:NAMED])}{more}"


def unfit_pairs(table: PairTable, *, needs_reference: bool) -> dict[str, str]:
    """Return where the pairs lie that no gradient can be made of, and what of each is not finite; empty without.

    Args:
        table: The pairs as they were scored.
        needs_reference: Whether the loss is made of π0's log-probs too.
    """
    titles = {f"policy_{side}": f"log-prob of its {side} answer" for side in ("chosen", "rejected")}
    if needs_reference:
        titles |= {f"reference_{side}": f"log-prob of its {side} answer under π0" for side in ("chosen", "rejected")}
    titles["loss"] = "loss"
    found: dict[str, str] = {}
    for name, title in titles.items():
        values = getattr(table, name)
        if not np.isfinite(values).all():
            bad = [(where, value) for where, value in zip(table.where, values, strict=True) if not np.isfinite(value)]
            found = {where: f"{title} is {value:g}" for where, value in bad} | found
    return found


def bisect(items: Sequence[_Item], is_good: Callable[[Sequence[_Item]], bool], *, most: int) -> list[_Item]:
    """Return those of a bad list that are bad alone, found by halving: one bad item among n costs two passes over n.

    Args:
        items: That are not good together.
        is_good: Says whether some of them are.
        most: How many to find before it is enough.

    Returns:
        Nothing where every half is good and only their sum is not.
    """
    if len(items) <= 1:
        return list(items)
    found: list[_Item] = []
    for half in (items[: len(items) // 2], items[len(items) // 2 :]):
        if len(found) < most and not is_good(half):
            found += bisect(half, is_good, most=most - len(found))
    return found

"""What happened to every row of a preference data set: nothing is dropped or changed without being counted here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from pe_dpo.data.pairs import EncodedPair, RowFlaw
from pe_dpo.errors import DataError

BadRows = Literal["error", "drop"]
NAMED_ROWS = 20

MALFORMED = "malformed"
EMPTY = "empty answer"
IDENTICAL = "identical answers"
OVERLONG = "longer than max_length"
ANSWERS_TOO_LONG = "answers alone longer than max_length"
PROMPT_IN_TRAINING = "held-out row whose prompt is in training"


@dataclass
class Tally:
    """How many rows something happened to, and the names of the first of them."""

    count: int = 0
    rows: list[str] = field(default_factory=list)

    def add(self, row: str) -> None:
        self.count += 1
        if len(self.rows) < NAMED_ROWS:
            self.rows.append(row)


@dataclass
class DataReport:
    """Everything that happened between the files and the token ids.

    Args:
        files: Rows read from each file or split that was used.
        unused_files: Data files or splits beside them that were not used.
        shape: In words, how the rows were understood.
        template: In words, how pairs became text.
        kept: Pairs to train on.
        held_out: Pairs held out.
        held_out_from: In words, where the held-out pairs come from.
        dropped: Rows that are in neither side, by reason.
        noted: Rows that are used and odd, by fact.
        remarks: Facts about the tokenizer or its template that concern every row.
        tokens: Quantiles of the lengths of the pairs to train on, in tokens: prompt, chosen, rejected, and pair
            (the prompt with its longer answer).
        chosen_longer: Share of the pairs to train on whose chosen answer has more tokens; equal lengths count one half.
    """

    files: dict[str, int] = field(default_factory=dict)
    unused_files: list[str] = field(default_factory=list)
    shape: str = ""
    template: str = ""
    kept: int = 0
    held_out: int = 0
    held_out_from: str = "none"
    dropped: dict[str, Tally] = field(default_factory=dict)
    noted: dict[str, Tally] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    chosen_longer: float | None = None

    @property
    def rows_read(self) -> int:
        """Rows read from all files that were used."""
        return sum(self.files.values())

    def drop(self, reason: str, row: str) -> None:
        """Count a row that will not be used."""
        self.dropped.setdefault(reason, Tally()).add(row)

    def note(self, fact: str, row: str) -> None:
        """Count an odd row that is used all the same."""
        self.noted.setdefault(fact, Tally()).add(row)

    def remark(self, fact: str) -> None:
        """Keep a fact that concerns all rows, once."""
        if fact not in self.remarks:
            self.remarks.append(fact)

    def refuse(self, where: str, flaw: RowFlaw | str, bad_rows: BadRows) -> None:
        """Stop at a row that cannot be used, or count it.

        Args:
            where: The row.
            flaw: What is wrong with it.
            bad_rows: `error` stops, `drop` counts.

        Raises:
            DataError: With `bad_rows` at `error`.
        """
        if bad_rows == "error":
            raise DataError(f"{where}: {flaw} (correct the row, or leave such rows out with data.bad_rows: drop)")
        self.drop(MALFORMED, f"{where}: {flaw}")

    def measure(self, train: Sequence[EncodedPair]) -> None:
        """Fill in the lengths of the pairs to train on."""
        prompt, chosen, rejected = (
            np.array([len(getattr(pair, name)) for pair in train]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        pair = prompt + np.maximum(chosen, rejected)
        lengths = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "pair": pair}
        self.tokens = {name: _quantiles(values) for name, values in lengths.items()}
        self.chosen_longer = float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON-able values, the content of `data_report.json`."""
        return {"rows_read": self.rows_read, **asdict(self)}

    def lines(self) -> list[str]:
        """The report for people: one short fact a line, most important first."""
        files = ", ".join(f"{name} ({rows:,})" for name, rows in self.files.items())
        unused = f"; not used: {', '.join(self.unused_files)}" if self.unused_files else ""
        lines = [f"read {self.rows_read:,} rows: {files}{unused}"]
        lines += [f"understood as {self.shape}"] if self.shape else []
        lines += [f"written with {self.template}"] if self.template else []
        if self.kept:
            lines.append(f"{self.kept:,} pairs to train on, {self.held_out:,} held out ({self.held_out_from})")
        if self.tokens:
            lines.append(self._lengths_line())
        if self.dropped:
            lines.append(f"left out: {_tallies(self.dropped)}")
        if self.noted:
            lines.append(f"used, but look at: {_tallies(self.noted)}")
        return lines + self.remarks

    def _lengths_line(self) -> str:
        medians = ", ".join(f"{name} {self.tokens[name]['50%']}" for name in ("prompt", "chosen", "rejected"))
        longest = self.tokens["pair"]["max"]
        return f"median tokens: {medians}; longest pair {longest:,}; chosen longer in {self.chosen_longer:.0%} of pairs"


def _quantiles(values: np.ndarray) -> dict[str, int]:
    points = {"min": 0.0, "5%": 0.05, "50%": 0.5, "95%": 0.95, "max": 1.0}
    return {name: int(np.quantile(values, share, method="lower")) for name, share in points.items()}


def _tallies(tallies: dict[str, Tally]) -> str:
    return "; ".join(f"{tally.count:,} {name} ({_first(tally.rows)})" for name, tally in tallies.items())


def _first(rows: list[str], shown: int = 3) -> str:
    short = [row if len(row) <= 120 else row[:117] + "..." for row in rows[:shown]]
    return ", ".join(short) + (", ..." if len(rows) > shown else "")

"""What happened to every row of a preference data set: nothing is dropped or changed without being counted here."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pe_dpo.data import messages
from pe_dpo.data.encoded import EncodedPairs, lengths, same_answers, same_prompts
from pe_dpo.data.pairs import RowError
from pe_dpo.errors import DataError
from pe_dpo.printable import counted

NAMED_ROWS = 20
"""Of the rows that something happened to, so many are named in files and errors."""

PROPORTIONATE = 0.05
"""Of the rows, so many may be left out for their length without a warning."""

MALFORMED = "malformed"
EMPTY = "empty answer"
IDENTICAL = "identical answers"
OVERLONG = "longer than max_length"
ANSWERS_TOO_LONG = "answers alone longer than max_length"
NO_WINNER = "no winner"
PROMPT_IN_TRAINING = "held-out row whose prompt is in training"
DUPLICATE = "exact duplicate"
CONTRADICTION = "contradicts an earlier pair (a over b, b over a)"
WITHOUT_MARGIN = "without a margin where others have one"


class DataReport:
    """Everything that happened between the files and the token ids.

    Attributes:
        files: Rows read from each file or split that was used.
        sources: Each place that the recipe names for training, its pairs that are not held out, and how many pairs its weight
            makes of them.
        unused_files: Data files or splits beside them that were not used.
        shape: In words, how the rows were understood.
        unread_columns: The columns that had content in some row and were not read.
        template: In words, how pairs became text.
        template_date: The date that a chat template with a clock wrote, as 2026-11-29; None for a template without one.
        kept: Pairs to train on.
        held_out: Pairs held out.
        held_out_from: In words, where the held-out pairs come from.
        held_out_most: Pairs held out of a share at most; None for no bound, as in older runs and of a share that was asked for.
        held_out_rows: The rows held out, all of them, for those who go on with a run; None for a run that named none.
        dropped: The names of the rows that are in neither side, by reason.
        noted: The names of the rows that are used and suspicious, by what is to be looked at.
        remarks: What concerns every row, about the tokenizer or its template.
        warnings: What probably is not meant, each with what to do; not among the `lines`.
        unit: What lengths are counted in.
        tokens: Quantiles of the lengths of the pairs to train on, in tokens: prompt, chosen, rejected, and pair
            (the prompt with its longer answer).
        pair_numbers: Least, mean and largest β and weight of the pairs to train on, of those that have their own.
        chosen_longer: Share of the pairs to train on whose chosen answer has more tokens; equal lengths count one half.
    """

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.sources: list[dict[str, Any]] = []
        self.unused_files: list[str] = []
        self.shape = ""
        self.unread_columns: list[str] = []
        self.template = ""
        self.template_date: str | None = None
        self.kept = 0
        self.held_out = 0
        self.held_out_from = "none"
        self.held_out_most: int | None = None
        self.held_out_rows: list[str] | None = None
        self.dropped: defaultdict[str, list[str]] = defaultdict(list)
        self.noted: defaultdict[str, list[str]] = defaultdict(list)
        self.remarks: list[str] = []
        self.warnings: list[str] = []
        self.unit = "tokens"
        self.tokens: dict[str, dict[str, int]] = {}
        self.pair_numbers: dict[str, dict[str, float]] = {}
        self.chosen_longer: float | None = None

    @property
    def rows_read(self) -> int:
        """The rows read from all files that were used."""
        return sum(self.files.values())

    def add(self, part: "DataReport") -> None:
        """Add what was dropped, noted and not read in a part of the rows."""
        for own, found in ((self.dropped, part.dropped), (self.noted, part.noted)):
            for what, rows in found.items():
                own[what] += rows
        self.unread_columns += [name for name in part.unread_columns if name not in self.unread_columns]

    def refuse(self, where: str, error: RowError, bad_rows: Literal["error", "drop"]) -> None:
        """Stop at a row that cannot be used, or count it.

        Args:
            where: The row.
            error: What is wrong with it.
            bad_rows: "error" stops, "drop" counts.

        Raises:
            DataError: With `bad_rows` at "error".
        """
        if bad_rows == "error":
            raise DataError(f"{where}: {error} (correct the row, or leave such rows out with data.bad_rows: drop)")
        self.dropped[MALFORMED].append(f"{where}: {error}")

    def examine(self, train: EncodedPairs, held_out: EncodedPairs) -> None:
        """Count the pairs of both sides, note those that are suspicious, and measure the lengths of those to train on.

        Suspicious are duplicates, contradictory pairs, and answers that begin with the whole other answer.
        """
        self.kept, self.held_out = len(train), len(held_out)
        pairs = (train + held_out).distinct()  # copies that a weight asks for are one
        order, reverse, begins = same_answers(pairs)
        seen: set[int] = set()
        for at, (pair, turned, is_beginning) in enumerate(zip(order, reverse, begins, strict=True)):
            found = [DUPLICATE] if pair in seen else []
            found += [CONTRADICTION] if turned in seen else []
            found += ["one answer is the beginning of the other"] if is_beginning else []
            for what in found:
                self.noted[what].append(pairs.where(at))
            seen.add(pair)
        shared = 0 if self.held_out_rows is not None else len(same_prompts(held_out, train))
        if shared:
            self.warnings.append(
                f"the prompts of {shared} of {len(held_out)} held-out pairs are read in training too, written otherwise: this "
                "run is from before such prompts were put on one side"
            )
        prompt, chosen, rejected = lengths(train).T
        tokens = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "pair": prompt + np.maximum(chosen, rejected)}
        points = {"min": 0.0, "5%": 0.05, "50%": 0.5, "95%": 0.95, "max": 1.0}
        self.tokens = {
            name: {point: int(np.quantile(values, share, method="lower")) for point, share in points.items()}
            for name, values in tokens.items()
        }
        for name in ("beta", "weight"):
            own = train.numbers(name)
            numbers = [] if own is None else own[~np.isnan(own)].tolist()
            if numbers and (name == "beta" or {*numbers} != {1.0}):  # weight 1 is what pairs have anyway
                self.pair_numbers[name] = {"min": min(numbers), "mean": float(np.mean(numbers)), "max": max(numbers)}
        self.chosen_longer = float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))

    def examine_lengths(self, tokens: Sequence[int], *, max_length: int, context_length: int | None) -> None:
        """Warn where more than `PROPORTIONATE` of the rows are left out for their length, with what would keep them.

        Args:
            tokens: Tokens of every pair, of those that are left out too.
            max_length: What they may have at most.
            context_length: What the model takes at most, if it has a bound.
        """
        left_out = len(self.dropped.get(OVERLONG, ())) + len(self.dropped.get(ANSWERS_TOO_LONG, ()))
        if not tokens or left_out <= PROPORTIONATE * len(tokens):
            return
        enough = sorted(tokens)[math.ceil((1 - PROPORTIONATE) * len(tokens)) - 1]
        remedy = f"data.max_length: {enough} keeps {1 - PROPORTIONATE:.0%}"
        if context_length and enough > context_length:
            kept = sum(length <= context_length for length in tokens) / len(tokens)
            remedy = f"data.max_length: {context_length}, the model's context, keeps {kept:.0%}"
            if context_length <= max_length:
                remedy = f"the model's context of {context_length} tokens has no room for more"
        if OVERLONG in self.dropped:
            remedy += "; data.overlong: truncate_prompt keeps whole answers and cuts the beginning of long prompts"
        self.warnings.append(
            f"{left_out:,} of {len(tokens):,} rows ({left_out / len(tokens):.0%}) are left out because they are longer than "
            f"{max_length} tokens: {remedy}"
        )

    def tell(self, logger: logging.Logger) -> None:
        """Log the lines as facts and the warnings as warnings."""
        for line in self.lines():
            logger.info(line)
        for line in self.warnings:
            logger.warning(line)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as JSON-able values, the content of `data_report.json`."""
        counted = {
            name: {what: {"count": len(rows), "rows": rows[:NAMED_ROWS]} for what, rows in found.items()}
            for name, found in (("dropped", self.dropped), ("noted", self.noted))
        }
        return {"rows_read": self.rows_read, **vars(self), **counted}

    def facts(self) -> list[str]:
        """Return for people what was read, how, and what there is of it, one fact a line; nothing about single rows."""
        files = list_names([f"{name} ({rows:,})" for name, rows in self.files.items()])
        unused = f"; not used: {list_names(self.unused_files)}" if self.unused_files else ""
        lines = [f"read {counted(self.rows_read, 'row')}: {files}{unused}"]
        lines += [f"understood as {self.shape}"] if self.shape else []
        lines += [f"columns not read: {messages.list_names(self.unread_columns)}"] if self.unread_columns else []
        if self.template:
            clock = f", which writes the date: {self.template_date} here and whenever this run is evaluated"
            lines.append(f"written with {self.template}{clock if self.template_date else ''}")
        if self.kept:
            lines.append(f"{counted(self.kept, 'pair')} to train on, {self.held_out:,} held out ({self.held_out_from})")
        if any(len(self.sources) > 1 or source["pairs"] != source["trained_on"] for source in self.sources):
            trained = list_names([f"{one['trained_on']:,} of {one['pairs']:,} from {one['source']}" for one in self.sources])
            lines.append(f"pairs to train on: {trained}")
        if self.tokens:
            medians = ", ".join(f"{name} {self.tokens[name]['50%']}" for name in ("prompt", "chosen", "rejected"))
            longest = f"longest pair {self.tokens['pair']['max']:,}"
            lines.append(f"median {self.unit}: {medians}; {longest}; chosen longer in {self.chosen_longer:.0%} of pairs")
        lines += [
            f"{name} of each pair from its column: {found['min']:.4g} to {found['max']:.4g}, mean {found['mean']:.4g}"
            for name, found in self.pair_numbers.items()
        ]
        return lines

    def lines(self) -> list[str]:
        """Return the report for people: one short fact a line, most important first."""
        lines = self.facts()
        if self.dropped:
            lines.append(f"left out: {first_of_each(self.dropped)}")
        if self.noted:
            lines.append(f"used, but look at: {first_of_each(self.noted)}")
        return lines + self.remarks


def first_of_each(found: Mapping[str, list[str]], shown: int = 3) -> str:
    """Return how many rows each finding has, and the names of the first."""
    parts = []
    for what, rows in found.items():
        short = [row if len(row) <= 120 else row[:117] + "..." for row in rows[:shown]]
        parts.append(f"{len(rows):,} {what} ({', '.join(short)}{', ...' if len(rows) > shown else ''})")
    return "; ".join(parts)


def list_names(names: Sequence[str], shown: int = 8) -> str:
    """Return names for a line that people read: all of a few, of many the first and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")

"""Pairs from files: sources, then rows, then the one shape that all rows are held to. No tokenizer here."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from pe_dpo.data.files import Row
from pe_dpo.data.pairs import Pair, RowFlaw
from pe_dpo.data.report import BadRows, DataReport
from pe_dpo.data.shapes import read_pair, recognise_shape
from pe_dpo.data.sources import Part, find_sources
from pe_dpo.errors import DataError

_FIRST_ROWS = 20  # the shape is recognised from these


def load_pairs(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "error",
    split: Literal["train", "held_out"] = "train",
    limit: int | None = None,
) -> tuple[list[Pair], DataReport]:
    """The pairs of a data set, before tokenization.

    Args:
        path: A file, a folder, or a Hub name; see `pe_dpo.data.sources`.
        columns: From `prompt`, `chosen`, `rejected`, ... to the names of the columns that hold them.
        bad_rows: `error` stops at the first malformed row, `drop` leaves such rows out and counts them.
        split: The side to read.
        limit: Read at most so many rows.

    Returns:
        The pairs, and a report with files, shape and malformed rows filled in.

    Raises:
        DataError: When the data cannot be found, read or understood, or lacks the held-out side that was asked for.
    """
    sources = find_sources(path)
    parts = sources.train if split == "train" else sources.held_out
    if not parts:
        raise DataError(f"{path}: has no held-out file or split; name one, or hold out a share of the pairs")
    report = DataReport(unused_files=sources.unused)
    return read_pairs(parts, columns=columns, bad_rows=bad_rows, limit=limit, report=report), report


def read_pairs(
    parts: Sequence[Part],
    *,
    columns: Mapping[str, str] | None,
    bad_rows: BadRows,
    limit: int | None,
    report: DataReport,
) -> list[Pair]:
    """The pairs of some files, in order; all files must have one shape.

    Args:
        parts: The files or splits.
        columns: As in `load_pairs`.
        bad_rows: As in `load_pairs`.
        limit: As in `load_pairs`, over all parts.
        report: Files, shape and malformed rows are added to it.

    Returns:
        One pair for every well-formed row.

    Raises:
        DataError: When a file cannot be read, its rows are of no known shape, or a row is malformed.
    """
    names = ", ".join(part.name for part in parts)
    rows = _good_rows(islice(_rows(parts, report), limit), bad_rows, report)
    first = list(islice(rows, _FIRST_ROWS))
    if not first:
        flaw = next((tally.rows[0] for tally in report.dropped.values()), "the file is empty")
        raise DataError(f"{names}: no row can be used of {report.rows_read} read: {flaw}; pairs are due, one a row")
    shape = recognise_shape([row.values for row in first], where=names, columns=columns)
    if shape.words not in report.shape:
        report.shape = f"{report.shape} | {shape.words}" if report.shape else shape.words
    pairs = []
    for row in chain(first, rows):
        try:
            pairs.append(read_pair(row.values, shape, where=row.where))
        except RowFlaw as flaw:
            report.refuse(row.where, flaw, bad_rows)
    _note_missing_margins(pairs, report)
    return pairs


def _rows(parts: Sequence[Part], report: DataReport) -> Iterator[Row]:
    for part in parts:
        report.files.setdefault(part.name, 0)
        for row in part.rows():
            report.files[part.name] += 1
            yield row


def _good_rows(rows: Iterator[Row], bad_rows: BadRows, report: DataReport) -> Iterator[Row]:
    for row in rows:
        if row.flaw is None:
            yield row
        else:
            report.refuse(row.where, row.flaw, bad_rows)


def _note_missing_margins(pairs: Sequence[Pair], report: DataReport) -> None:
    """Some rows with a margin and some without: those without count as 0, which the user may not mean."""
    without = [pair for pair in pairs if pair.margin is None]
    if len(without) < len(pairs):
        for pair in without:
            report.note("without a margin where others have one", pair.where)

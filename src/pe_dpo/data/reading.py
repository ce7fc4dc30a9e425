"""Rows of files as pairs before tokenization, one after the other: nothing but the first rows of a place is held.

place ── part (a file, a split) ── rows ── shape, from the first rows of the place ── pairs
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal

from pe_dpo.data.pairs import Pair, RowError
from pe_dpo.data.report import NO_WINNER, WITHOUT_MARGIN, DataReport, list_names
from pe_dpo.data.row_reader import RowReader
from pe_dpo.data.shapes import Shape
from pe_dpo.data.sources import Parts, Place
from pe_dpo.errors import DataError
from pe_dpo.recipe.data_section import DataSection

_FIRST_ROWS = 20  # the shape is recognised from these


def iterate_places(
    places: Sequence[Place],
    settings: DataSection,
    report: DataReport,
    *,
    side: Literal["train", "held_out"] = "train",
    is_other: bool = False,
) -> Iterator[tuple[int, Pair]]:
    """Yield the pairs of several places before tokenization, each with its place's number; `limit` counts over all of them.

    What concerns all pairs, as margins that only some have, is in the report once the last was taken.

    Args:
        places: From `find_places`; each has its own shape, and its own columns where its source names such.
        settings: Its `columns`, `bad_rows` and `limit` count here.
        report: Files, shape and malformed rows are added to it.
        side: Of the places, which is read.
        is_other: Whether these are no pairs of the run: then they may lack the columns of β and weight that its map names.

    Raises:
        DataError: A file cannot be read, its rows are of no known shape, or a row is malformed.
    """
    before = report.rows_read
    counts, without = [0] * len(places), [list[str]() for _ in places]
    for number, place in enumerate(places):
        left = None if settings.limit is None else settings.limit - report.rows_read + before
        columns = settings.columns if place.source.columns is None else place.source.columns
        own = settings.model_copy(update={"columns": columns, "limit": left})
        parts = place.train if side == "train" else place.held_out
        try:
            for pair in _read_parts(parts, own, report, is_other=is_other) if parts and left != 0 else ():
                counts[number] += 1
                without[number] += [pair.where] if pair.margin is None else []
                yield number, pair
        except DataError as error:
            if len(places) == 1 or "{columns: " not in str(error):
                raise
            raise DataError(f"{error}\nor for this place alone: {{path: {place.source.path}, columns: …}}") from error
        if len(without[number]) < counts[number]:  # they count as 0, which the user may not mean
            for where in without[number]:
                report.noted[WITHOUT_MARGIN].append(where)
    if any(len(names) < count for names, count in zip(without, counts, strict=True)):
        for names, count in zip(without, counts, strict=True):
            if count and len(names) == count:
                report.noted[WITHOUT_MARGIN] += names


def read_places(
    places: Sequence[Place],
    settings: DataSection,
    report: DataReport,
    *,
    side: Literal["train", "held_out"] = "train",
    is_other: bool = False,
) -> list[list[Pair]]:
    """Return the pairs of each of several places, see `iterate_places`."""
    found: list[list[Pair]] = [[] for _ in places]
    for number, pair in iterate_places(places, settings, report, side=side, is_other=is_other):
        found[number].append(pair)
    return found


def _read_parts(parts: Parts, settings: DataSection, report: DataReport, *, is_other: bool) -> Iterator[Pair]:
    """Yield the pairs of the files of one place, one for every well-formed row, in order."""
    names = list_names(list(parts))
    rows = _good_rows(parts, settings, report)
    first = list(islice(rows, _FIRST_ROWS))
    if not first:
        found = next(iter(report.dropped.values()), ["the file is empty or has a header alone"])[0]
        raise DataError(f"{names}: no row can be used of {report.rows_read} read: {found}; pairs are expected, one a row")
    columns = settings.columns or {}
    lacking = [
        name for name in ("beta", "weight") if name in columns and not any(columns[name] in values for _, values in first)
    ]
    for name in lacking if is_other else ():
        own = "the loss's β" if name == "beta" else "weight 1"
        report.remarks.append(f"{names} has no column '{columns[name]}', so all its pairs have {own}")
        columns = {ours: theirs for ours, theirs in columns.items() if ours != name}
    shape = Shape([values for _, values in first], where=names, columns=columns, ignore=settings.ignore)
    if shape.words not in report.shape:
        report.shape = f"{report.shape} | {shape.words}" if report.shape else shape.words
    reader = RowReader(shape)
    for where, values in chain(first, rows):
        try:
            pair = reader.read(values, where=where)
        except RowError as error:
            report.refuse(where, error, settings.bad_rows)
            continue
        if pair is None:
            report.dropped[NO_WINNER].append(where)
        else:
            yield pair
    report.unread_columns += [name for name in reader.unread if name not in report.unread_columns]
    for what, wheres in reader.noted.items():
        report.noted[what] += wheres


def _good_rows(parts: Parts, settings: DataSection, report: DataReport) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each well-formed row is and its columns; count what is read, refuse the others."""
    left = settings.limit
    for name, rows in parts.items():
        before = report.files.setdefault(name, 0)
        for where, values in islice(rows, left):
            report.files[name] += 1
            if isinstance(values, RowError):
                report.refuse(where, values, settings.bad_rows)
            else:
                yield where, values
        left = None if left is None else left - report.files[name] + before
        if left == 0:
            return

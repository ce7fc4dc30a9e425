"""The lines of text files, packed or not, in the encoding that their first bytes show; and the rows of CSV and TSV."""

import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from pe_dpo.data.pairs import RowError
from pe_dpo.errors import DataError

BOM = "\ufeff"

Row = tuple[str, dict[str, Any] | RowError]
"""Where a row is, for people, and its columns, or why it alone cannot be read."""

_SEPARATORS = (",", ";", "\t", "|")

LARGEST_ROW = 40_000_000
"""Bytes, or characters, of a row; which is ten million tokens, more than any model could be trained on."""
_MOST_UNPACKED = 200
"""Times its size that a packed file may unpack to where that is over `_SMALL`; texts shrink to a fifth or, repeated, a 50th."""
_SMALL = 200_000_000
_OF_A_LINE = 50
"""Bytes that a line counts more than it has, for the time that it takes."""
_AT_ONCE = 1_000_000
"""Bytes or characters that are read at once of a line that is longer."""
MOST_COLUMNS = 10_000


DEEPEST = 100
"""Lists and objects within each other; a call of a tool has some ten."""
TOO_DEEP = f"is nested too deeply: more than {DEEPEST} lists and objects within each other; a row is one flat object"


_HALF = re.compile("[\ud800-\udfff]")


class TooLong(RowError):
    """A line that is larger than a row may be; it may still be a part of a document."""


class Swollen:
    """Counts what is read of a file that is packed, and refuses one that is made to fill memory or never to end."""

    def __init__(self, path: Path, name: str) -> None:
        """Begin with nothing read.

        Args:
            path: The file.
            name: What it is called in messages.
        """
        self._most, self._name, self._read = max(_SMALL, _MOST_UNPACKED * path.stat().st_size), name, 0

    def count(self, size: int) -> None:
        """Count some bytes that were read.

        Raises:
            DataError: They are more than data that was packed can come to.
        """
        self._read += size
        if self._read > self._most:
            raise DataError(
                f"{self._name}: unpacks to more than {self._most / 1e6:,.0f} MB, {_MOST_UNPACKED} times its size or more, as "
                "no data does; fetch the file anew from whom you trust"
            )


def open_bytes(path: Path) -> BinaryIO:
    """Return a file opened for its bytes, unpacked if it begins as gzip does, whatever its name."""
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path)) if is_packed else path.open("rb")


def read_lines(path: Path, name: str, *, of_document: bool = False) -> Iterator[tuple[str, RowError | None]]:
    """Yield the lines of a text with their ends, and what is wrong with the bytes of each; \\n, \\r and \\r\\n end a line.

    Args:
        path: The file.
        name: What it is called in messages.
        of_document: Whether the lines are parts of a document, and may have any length; else of one that is larger than a row
            may be the beginning alone comes, with an error.

    Raises:
        DataError: The file is neither UTF-8 nor what its first bytes say, or unpacks to what no data comes to.
    """
    with open_bytes(path) as file:
        encoding = json.detect_encoding(file.read(4))  # UTF-16 and UTF-32 by their mark or their zeros, else UTF-8
        is_packed = isinstance(file, gzip.GzipFile)
    swollen = Swollen(path, name) if is_packed else None
    longest = None if of_document else LARGEST_ROW
    with open_bytes(path) as file:
        if not encoding.startswith("utf-8"):
            try:
                with io.TextIOWrapper(file, encoding=encoding, newline="") as text:
                    yield from _lines_within(text, ("\n", "\r"), longest, swollen)
            except UnicodeDecodeError as error:
                raise DataError(f"{name}: is not valid {encoding} ({error.reason}); save the file as UTF-8") from error
            return
        for raw, too_long in _lines_within(file, b"\n", longest, swollen):
            if too_long:
                yield raw[:_AT_ONCE].decode("utf-8", "replace"), too_long
                continue
            try:
                line = raw.decode("utf-8")
                if "\r" not in line or "\r" not in line.rstrip("\r\n"):
                    yield line, None
                    continue
            except UnicodeDecodeError:
                pass
            # Files of old Macs have \r alone, so that all of them is one line of \n.
            for piece in re.split(rb"(?<=\r)(?=[^\r\n])", raw):
                try:
                    yield piece.decode("utf-8"), None
                except UnicodeDecodeError as error:
                    yield piece.decode("utf-8", "replace"), RowError(_not_utf8(piece, error.start))


def _lines_within(file: Any, ends: Any, longest: int | None, swollen: Swollen | None) -> Iterator[tuple[Any, RowError | None]]:
    """Yield lines with what is wrong with their length; what one has beyond `longest` is read past and not kept."""
    while piece := file.readline(_AT_ONCE):
        kept, length = [piece], 0
        while piece:
            length += len(piece)
            if swollen:
                swollen.count(_OF_A_LINE + len(piece))
            if piece.endswith(ends):
                break
            piece = file.readline(_AT_ONCE)
            if longest is None or length <= longest:
                kept.append(piece)
        line = kept[0] if len(kept) == 1 else kept[0][:0].join(kept)
        yield line, None if longest is None or length <= longest else TooLong(too_large(length))


def find_flaw(row: Any) -> RowError | None:
    """Return why a row cannot be one, whatever its columns: its size or depth, names that are no text, or an error inside."""
    size, level = 0, [row]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str | bytes):
                size += len(value)
            elif isinstance(value, dict):
                size += sum(map(len, value))
                below += value.values()
                if half := _HALF.search(" ".join(value)):
                    return RowError(f"has a key with half a surrogate pair ({half[0]!a}); rename it")
            elif isinstance(value, list):
                below += value
            elif isinstance(value, RowError):
                return value
        size += len(below)
        if size > LARGEST_ROW:
            return RowError(too_large(size))
        if not below:
            return None
        level = below
    return RowError(TOO_DEEP)


def too_large(size: int) -> str:
    """Return what is said of a row of so many bytes."""
    return f"has {size / 1e6:,.0f} MB, and a row may have {LARGEST_ROW / 1e6:.0f}; shorten its texts, or leave it out"


def _not_utf8(line: bytes, at: int) -> str:
    before, after = (part.decode("cp1252", "replace") for part in (line[max(at - 20, 0) : at], line[at : at + 20]))
    word = re.findall(r"\w*$", before)[0] + re.findall(r"^\w*", after)[0]
    hint = f" (in Windows-1252 it would be in {word!r})" if word else ""
    return f"is not valid UTF-8: byte 0x{line[at]:02x} at {at}{hint}; save the file as UTF-8"


def read_csv(path: Path, name: str, *, usual: str) -> Iterator[Row]:
    """Yield the rows of a file of cells with a header.

    Args:
        path: The file.
        name: What it is called in messages.
        usual: The separator; another one is taken where the header has it and not this one, or where a line `sep=;` says so.

    Raises:
        DataError: A quote is open or misplaced, or the header names a column twice or is not readable.
    """
    csv.field_size_limit(LARGEST_ROW)  # the module's own limit of 128 KiB refuses long answers
    flaws: list[RowError] = []  # of the lines of a row
    is_new_row, size, number = True, 0, 0

    def lines() -> Iterator[str]:
        nonlocal is_new_row, size
        for line, error in read_lines(path, name):
            size = (0 if is_new_row else size) + _OF_A_LINE + len(line)
            if size > LARGEST_ROW:  # a quote that nothing closes takes the whole file
                raise DataError(f"{name} row {number + 1} {too_large(size)}; look for an open quote")
            if error or is_new_row:
                flaws.extend([error] if error else [])
                line, is_new_row = line.lstrip(BOM) if is_new_row else line, False
            yield line

    source = lines()
    skipped, first = 0, next(source, "")
    while first and re.fullmatch(r'("?sep=.?"?)?\s*', first, re.IGNORECASE):  # Excel writes sep=; and reads it
        usual = first.strip('"\r\n')[4:5] or usual
        is_new_row, skipped, first = True, skipped + 1, next(source, "")
    separator = usual if usual in first else next((known for known in _SEPARATORS if known in first), usual)
    reader = csv.reader(chain([first], source), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        names = [cell.strip() for cell in header]
        if flaws:
            raise DataError(f"{name}:{reader.line_num + skipped}: {flaws[0]}")
        check_names(names, name)
        is_new_row = True
        while (cells := next(reader, None)) is not None:
            if len(cells) > 1 or "".join(cells).strip():  # no blank line
                number += 1
                yield f"{name} row {number}", flaws[0] if flaws else _read_cells(header, names, cells)
            is_new_row = True
            flaws.clear()
    except csv.Error as error:
        raise DataError(
            f"{name}:{reader.line_num + skipped}: is not valid CSV: {error}; check the quotes (one inside a cell is written "
            "twice), or save the data as .jsonl"
        ) from error


def check_names(columns: Sequence[str], name: str) -> None:
    """Check that no two columns have one name; those without a name, which a spreadsheet leaves at the end, may be many.

    Raises:
        DataError: Two have: a row would keep the last of them without a word; or there are more columns than a table has.
    """
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{name}: has {len(columns):,} columns, and pairs have a few; write a table with the columns of pairs")
    twice = next((column for column, times in Counter(columns).items() if column and times > 1), None)
    if twice is not None:
        raise DataError(f"{name}: has the column '{twice}' twice; keep one of them")


def _read_cells(header: list[str], names: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    """Return a row by the names of its columns, or what is wrong with it.

    Args:
        header: The names as they stand in the file.
        names: The same without spaces around them; one without a name that is neither empty nor an index gets its place.
        cells: The row.
    """
    begins_with_space = [cell[:1] == " " for cell in cells[1:] if cell]
    if all(name[:1] == " " for name in header[1:]) and begins_with_space and all(begins_with_space):
        return RowError("has a space behind every separator, as the header has; write the separator alone")
    if len(cells) > len(names):
        return RowError(f"has {len(cells) - len(names)} more cells than the header; quote cells that hold the separator")
    if len(cells) < len(names):
        return RowError(f"ends before column '{names[len(cells)]}'; fill in the missing cells")
    if [cell.strip() for cell in cells] == names:
        return RowError("repeats the header, as files do that were put together; remove the line")
    row = {name: cell for name, cell in zip(names, cells, strict=True) if name}
    for at, (name, cell) in enumerate(zip(names, cells, strict=True), start=1):
        if not name and cell.strip() and not (at == 1 and cell.isdigit()):
            row.setdefault(f"column {at}", cell)
    return row

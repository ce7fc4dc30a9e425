"""The lines of text files, packed or not, in the encoding that their first bytes show; and the rows of CSV and TSV."""

import csv
import gzip
import io
import json
import re
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


def open_bytes(path: Path) -> BinaryIO:
    """Return a file opened for its bytes, unpacked if it begins as gzip does, whatever its name."""
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path)) if is_packed else path.open("rb")


def read_lines(path: Path, name: str) -> Iterator[tuple[str, RowError | None]]:
    """Yield the lines of a text with their ends, and what is wrong with the bytes of each; \\n, \\r and \\r\\n end a line.

    Raises:
        DataError: The file is neither UTF-8 nor what its first bytes say.
    """
    with open_bytes(path) as file:
        encoding = json.detect_encoding(file.read(4))  # UTF-16 and UTF-32 by their mark or their zeros, else UTF-8
    with open_bytes(path) as file:
        if not encoding.startswith("utf-8"):
            try:
                with io.TextIOWrapper(file, encoding=encoding, newline="") as text:
                    yield from ((line, None) for line in text)
            except UnicodeDecodeError as error:
                raise DataError(f"{name}: is not valid {encoding} ({error.reason}); save the file as UTF-8") from error
            return
        for raw in file:
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
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB refuses long answers
    flaws: list[RowError] = []  # of the lines of a row
    is_new_row = True

    def lines() -> Iterator[str]:
        nonlocal is_new_row
        for line, error in read_lines(path, name):
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
    number = 0
    try:
        header = next(reader, [])
        names = [cell.strip() for cell in header]
        if flaws:
            raise DataError(f"{name}:{reader.line_num + skipped}: {flaws[0]}")
        check_names(names, name)
        while True:
            is_new_row = True
            flaws.clear()
            cells = next(reader, None)
            if cells is None:
                return
            if len(cells) < 2 and not "".join(cells).strip():  # a blank line
                continue
            number += 1
            yield f"{name} row {number}", flaws[0] if flaws else _read_cells(header, names, cells)
    except csv.Error as error:
        raise DataError(
            f"{name}:{reader.line_num + skipped}: is not valid CSV: {error}; check the quotes (one inside a cell is written "
            "twice), or save the data as .jsonl"
        ) from error


def check_names(columns: Sequence[str], name: str) -> None:
    """Check that no two columns have one name; those without a name, which a spreadsheet leaves at the end, may be many.

    Raises:
        DataError: Two have: a row would keep the last of them without a word.
    """
    twice = next((column for column in columns if column and columns.count(column) > 1), None)
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

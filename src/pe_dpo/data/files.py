"""The rows of a file, strictly read: JSON, JSON lines, CSV and TSV (all of them packed with gzip too), Parquet.

What has one plain meaning is read; what could mean two things is refused, with the row and what to write instead.

`datasets` reads plain files too, but turns date-like strings into dates, loses line numbers, fills missing columns with
nulls in silence, and stops at invalid UTF-8 only when the row is used (measured on datasets 5.2).
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pe_dpo.data.json_files import read_json, read_json_lines
from pe_dpo.data.pairs import RowError
from pe_dpo.data.text_files import Row, Swollen, check_names, find_flaw, open_bytes, read_csv
from pe_dpo.disk import unlike_a_file
from pe_dpo.errors import DataError

JSON_LINES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".json", *JSON_LINES, ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")

_AT_ONCE = 64
"""Rows of Parquet that are decoded at once; 16 take 9 µs a row more (29 instead of 20), 1,000 16 times the memory."""
_MOST_MEMORY = 2_000_000_000
"""Bytes that decoding them may take."""
_PACKED = "is packed in a way that is not read; unpack it first (a text file packed as .gz is read as it is)"
_SHEET = "is a spreadsheet; save the sheet as CSV in UTF-8"
_ARROW = "is an Arrow file; write it as .parquet, or name the folder that save_to_disk of `datasets` wrote"
FOREIGN_SUFFIXES = {
    **dict.fromkeys((".gz", ".zst", ".zip", ".bz2", ".xz", ".lz4", ".7z", ".rar", ".tar", ".tgz"), _PACKED),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), _SHEET),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), _ARROW),
}
"""Suffixes of files that hold data in a form that is not read, and what to do."""
_FOREIGN_BEGINNINGS = {
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet, whatever its name; unpack it, or save the sheet as CSV in UTF-8",
    b"PAR1": "is Parquet, whatever its name; name it .parquet",
    b"ARROW1": _ARROW,
    b"BZh9": _PACKED,
    b"\xfd7zXZ\x00": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,
    b"SQLite format 3": "is an SQLite database; write its table as JSON lines",
    b"version https://git-lfs": "is a pointer of Git LFS in the place of the data; fetch them with `git lfs pull`",
    b"<!DOCTYPE html": "is an HTML page, so the download failed; fetch the file itself",
    b"<html": "is an HTML page, so the download failed; fetch the file itself",
}


def data_format(path: Path) -> str | None:
    """Return the suffix that says how a file is read, in small letters and without .gz; None where it cannot be read."""
    name = path.name.lower()
    is_packed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in (TEXT_SUFFIXES if is_packed else SUFFIXES) else None


def read_rows(path: Path, name: str | None = None) -> Iterator[Row]:
    """Yield the rows of one file, in order.

    Args:
        path: A file whose name ends in one of `SUFFIXES`; all but .parquet may be followed by .gz.
        name: What it is called where a row is named; its own name by default.

    Yields:
        Where each row is, and its columns; a row that alone is malformed comes as its error and does not end the file.

    Raises:
        DataError: The file as a whole cannot be read, or has another suffix.
    """
    name = name or path.name
    suffix = data_format(path)
    if suffix is None:
        last = path.suffix.lower()
        known = ", ".join(SUFFIXES)
        unknown = f"the format cannot be told from '{last}'; one of {known} is expected: name the file for what it holds"
        raise DataError(f"{path}: {FOREIGN_SUFFIXES.get(last, unknown)}")
    kind = unlike_a_file(path)
    if kind:
        raise DataError(f"{path}: is {kind}, which may have no end; write the rows into a file and name that")
    try:
        with open_bytes(path) as file:
            beginning = file.read(64).lstrip().lower()
        for mark, what in _FOREIGN_BEGINNINGS.items():
            if beginning.startswith(mark.lower()) and (mark, suffix) != (b"PAR1", ".parquet"):
                raise DataError(f"{path}: {what}")
        if suffix in JSON_LINES:
            yield from read_json_lines(path, name)
        elif suffix == ".json":
            yield from read_json(path, name)
        elif suffix == ".parquet":
            yield from _read_parquet(path, name)
        else:
            yield from read_csv(path, name, usual="\t" if suffix == ".tsv" else ",")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); it may have been cut: fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file and its permissions") from error


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number, swollen = 0, Swollen(path, name)
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            check_names(table.schema_arrow.names, name)
            batches = table.iter_batches(batch_size=_AT_ONCE)
            while True:
                with _in_memory_of(_MOST_MEMORY):  # a value that is written once may stand in every row, and often in one
                    batch = next(batches, None)
                if batch is None:
                    return
                swollen.count(batch.nbytes)
                for values in batch.to_pylist():
                    number += 1
                    values.pop("__index_level_0__", None)  # the index of a pandas table, without a name
                    yield f"{name} row {number}", check_row(values)
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise DataError(
            f"{name}: cannot be read as Parquet after row {number} ({error}); fetch the file again or write it anew"
        ) from error


@contextmanager
def _in_memory_of(size: int) -> Iterator[None]:
    """Within the block this process may take so many bytes more than it has, where the system (Linux) knows such a bound."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(pages.read_text().split()[0]) * resource.getpagesize() + size
    bounds = [bound for bound in (before, hard, most) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def check_row(values: dict[str, Any]) -> dict[str, Any] | RowError:
    """Return a row of Arrow as `clean_arrow` does, or why it cannot be one."""
    row = clean_arrow(values)
    return find_flaw(row) or row


def clean_arrow(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row that Arrow gave as JSON lines would have had it.

    A column of records has every key of every record, null where a record lacks it; such nulls are left out, but a cell that
    is null as a whole stays. Bytes that are text are text, maps are objects, and messages whose keys are columns (a `Sequence`
    of objects in old versions of `datasets`) are a list of messages.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
            value = dict(value)
        if isinstance(value, dict) and {"role", "from"} & value.keys() and all(isinstance(one, list) for one in value.values()):
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                return value
        return value

    return {column: clean(cell) for column, cell in row.items()}

"""What a path or a name stands for, and the rows of each file (JSON, JSON lines, CSV, TSV, Parquet), strictly read.

pairs.jsonl           one file
folder/               train.* (or train-*, train_*) and validation|valid|val|eval|dev|test.*; else every data file
saved dataset/        what `datasets` wrote with save_to_disk
owner/name            a data set of the Hub, read with `datasets`

`datasets` reads plain files too, but turns date-like strings into dates, loses line numbers, fills missing columns with
nulls in silence, and stops at invalid UTF-8 only when the row is used (measured on datasets 5.2).
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pe_dpo.data.pairs import RowError, describe_value
from pe_dpo.errors import DataError
from pe_dpo.hub import hub_is_reachable, is_hub_name

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *JSON_LINES, ".csv", ".tsv", ".parquet")
BOM = b"\xef\xbb\xbf"
HELD_OUT_NAMES = ("validation", "valid", "val", "eval", "dev", "test")  # the first that is there is used

Row = tuple[str, dict[str, Any] | RowError]
"""Where a row is, for people, and its columns, or why it alone cannot be read."""

Parts = dict[str, Iterator[Row]]
"""The rows of files or splits by their names; a file is opened only when its rows are read, and they can be read once."""


def find_sources(path: str | Path) -> tuple[Parts, Parts, list[str]]:
    """Return the parts that a path or Hub name stands for.

    Args:
        path: A data file, a folder of data files, a folder written by `datasets.save_to_disk`, or a Hub name.
            What looks like a path (a known suffix, a leading `.`, `/` or `~`) is never looked up on the Hub.

    Returns:
        The parts to train on, the parts to hold out, and the names of what stays unused.

    Raises:
        DataError: There is no such file, the folder holds no data, or the Hub has no such data set or cannot be reached.
    """
    place, name = Path(path).expanduser(), str(path)
    if place.is_file():
        return {place.name: read_rows(place)}, {}, []
    is_saved_dataset = (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()
    if place.is_dir() and not is_saved_dataset:
        return _folder(place)
    if not is_saved_dataset and (name.lower().endswith(SUFFIXES) or name.startswith((".", "/", "~")) or not is_hub_name(name)):
        raise DataError(f"{path}: there is no such file or folder (looked from {Path.cwd()}); check the spelling")
    import datasets

    if is_saved_dataset:
        try:
            return _splits(place.name, datasets.load_from_disk(str(place)))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{place}: cannot be read as a saved dataset ({error}); save it again") from error
    missing = f"{name}: there is no such file or folder, and as the name of a data set on the Hub"
    cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if not cached.exists() and not hub_is_reachable():  # noticed first, because `datasets` 5.2 retries it for 23 s
        raise DataError(f"{missing} it cannot be looked up: the Hub cannot be reached; check the path or the network")
    try:
        return _splits(name, datasets.load_dataset(name))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{missing} it cannot be read ({error}); check the name, or name a file") from error


def divide_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names to train on and the names to hold out.

    Args:
        names: Stems of files, or names of splits.

    Returns:
        `train` itself, else names that begin with `train-` or `train_` (of several, those that say `pref`); the same
        for the first of `HELD_OUT_NAMES` that is there. Without a training name: everything that is not a
        held-out name; if nothing is, all names, and none held out.
    """
    best: dict[str, list[str]] = {}
    reserved: set[str] = set()
    for word in ("train", *HELD_OUT_NAMES):
        named = [name for name in names if name == word or name.startswith((f"{word}-", f"{word}_"))]
        best[word] = [name for name in named if name == word] or [name for name in named if "pref" in name] or named
        reserved |= {*named} if word != "train" else set()
    train = best["train"] or [name for name in names if name not in reserved]
    held_out = next((best[word] for word in HELD_OUT_NAMES if best[word]), [])
    return (train, held_out) if train else (list(names), [])


def _folder(folder: Path) -> tuple[Parts, Parts, list[str]]:
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    files = {path.stem: path for path in paths}
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise DataError(f"{folder}: no data file in this folder; found {found}; name a {', '.join(SUFFIXES)} file")
    train, held_out = divide_names(list(files))
    twice = [path for path in paths if path.stem in train + held_out and path != files[path.stem]]
    if twice:
        raise DataError(
            f"{folder}: {files[twice[0].stem].name} and {twice[0].name} differ only in their suffix; "
            "name one of the files instead of the folder"
        )
    used = [{files[stem].name: read_rows(files[stem]) for stem in side} for side in (train, held_out)]
    return used[0], used[1], [path.name for path in paths if path.name not in {**used[0], **used[1]}]


def _splits(name: str, data: Any) -> tuple[Parts, Parts, list[str]]:
    def rows(part: str, values: Any) -> Iterator[Row]:
        return ((f"{part} row {number}", row) for number, row in enumerate(values, start=1))

    if not hasattr(data, "keys"):
        return {name: rows(name, data)}, {}, []
    train, held_out = divide_names(list(data))
    used = [{f"{name}/{split}": rows(f"{name}/{split}", data[split]) for split in side} for side in (train, held_out)]
    return used[0], used[1], [f"{name}/{split}" for split in data if split not in train + held_out]


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one file, in order.

    Args:
        path: A file whose name ends in one of `SUFFIXES`.

    Yields:
        Where each row is, and its columns; a row that alone is malformed comes as its error and does not end the file.

    Raises:
        DataError: The file as a whole cannot be read, or has another suffix.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in JSON_LINES:
            yield from _read_json_lines(path)
        elif suffix == ".json":
            yield from _read_json(path)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(path, delimiter="\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            yield from _read_parquet(path)
        else:
            raise DataError(f"{path}: the format cannot be told from '{suffix}'; one of {', '.join(SUFFIXES)} is expected")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file and its permissions") from error


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                row = _as_row(json.loads(line.decode("utf-8"), object_pairs_hook=_as_object))
            except UnicodeDecodeError as error:
                row = RowError(_not_utf8(error))
            except json.JSONDecodeError as error:
                cut = "" if line.endswith(b"\n") else "; the file ends inside this row, so it may have been cut: fetch it again"
                row = RowError(f"is not valid JSON: {error.msg} at column {error.colno}{cut}")
            except ValueError as error:  # Python reads no integer of more than 4,300 digits
                row = RowError(f"is not valid JSON: {error}")
            except RecursionError:
                row = RowError("is nested too deeply to be read; a row is one flat object")
            yield f"{path.name}:{number}", row


def _read_json(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array of objects, of {"data": [such objects]}, or of JSON lines under the wrong name."""
    try:
        text = path.read_bytes().removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: {_not_utf8(error)}") from error
    try:
        document = json.loads(text, object_pairs_hook=_as_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_json_lines(path)
            return
        raise DataError(
            f"{path.name}:{error.lineno}: is not valid JSON: {error.msg} at column {error.colno}; "
            "if the file ends there it may have been cut: fetch it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: cannot be read ({error}); a list of flat objects is expected") from error
    if isinstance(document, RowError):
        raise DataError(f"{path.name}: {document}")
    if isinstance(document, dict):
        document = document["data"] if isinstance(document.get("data"), list) else [document]
    if not isinstance(document, list):
        raise DataError(f"{path.name}: holds {describe_value(document)}; a list of objects, one a pair, is expected")
    for number, value in enumerate(document, start=1):
        yield f"{path.name} row {number}", _as_row(value)


def _read_csv(path: Path, *, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB refuses long answers
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            _check_names(path, reader.fieldnames or ())
            for number, values in enumerate(reader, start=1):
                row: dict[str, Any] | RowError = dict(values)
                missing = [name for name, cell in values.items() if cell is None]
                if None in values:
                    more = len(values[None])  # DictReader keeps the cells without a name there
                    row = RowError(f"has {more} more cells than the header; quote cells that hold the separator")
                elif missing:
                    row = RowError(f"ends before column '{missing[0]}'; fill in the missing cells")
                yield f"{path.name} row {number}", row
        except UnicodeDecodeError as error:
            raise DataError(f"{path.name}: {_not_utf8(error)}") from error
        except csv.Error as error:
            raise DataError(
                f"{path.name}:{reader.reader.line_num}: is not valid CSV: {error}; check the quotes, or save the data as .jsonl"
            ) from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_names(path, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", values
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path.name}: cannot be read as Parquet after row {number} ({error}); fetch the file again or write it anew"
        ) from error


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Check that no two columns have one name; those without a name, which a spreadsheet leaves at the end, may be many.

    Raises:
        DataError: Two have: a row would keep the last of them without a word.
    """
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path.name}: has the column '{twice}' twice; keep one of them")


def _as_object(items: list[tuple[str, Any]]) -> dict[str, Any] | RowError:
    """Return a JSON object, or in its place the error that it has one key twice."""
    values = dict(items)
    if len(values) == len(items):
        return values
    names = [name for name, _ in items]
    twice = next(name for name in names if names.count(name) > 1)
    return RowError(f"has the key '{twice}' twice in one object; keep one of them")


def _as_row(value: Any) -> dict[str, Any] | RowError:
    """Return a JSON value as a row, which is an object without an error anywhere inside."""

    def error_in(value: Any) -> RowError | None:
        if isinstance(value, RowError):
            return value
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next((found for found in map(error_in, inner) if found), None)

    try:
        error = error_in(value)
    except RecursionError:
        error = RowError("is nested too deep; a flat object with one pair is expected")
    if error is None and not isinstance(value, dict):
        error = RowError(f"is {describe_value(value)}; an object with one pair is expected")
    return error or value


def _not_utf8(error: UnicodeDecodeError) -> str:
    found = error.object[error.start]
    hint = " (it looks like UTF-16)" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    return f"is not valid UTF-8: byte 0x{found:02x} at {error.start}{hint}; save the file as UTF-8"

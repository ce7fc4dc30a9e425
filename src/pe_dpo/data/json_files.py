"""The rows of JSON lines and of JSON documents, in the layouts in which tools write tables.

{"prompt": "a", "chosen": "b", …}                  an object a line, or a row
[{"prompt": "a", …}, …]                            rows
{"data": [{"prompt": "a", …}, …]}                  rows under one of a few names
{"prompt": ["a", …], "chosen": ["b", …], …}        columns
{"prompt": {"0": "a", …}, "chosen": {…}, …}        columns by their index: pandas' default
{"0": {"prompt": "a", …}, …}                       rows by their index
{"What is …?": {"chosen": "b", "rejected": "c"}}   rows by their prompt
{"columns": […], "data": [[…], …]}                 pandas' "split"
{"train": [{…}], "test": [{…}]}                    splits, see `read_json_splits`

Trailing commas and objects as Python prints them have one meaning and are read. No key may stand twice in an object.
"""

import ast
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from pe_dpo.data.columns import begins_with_prompt, read_as
from pe_dpo.data.dialogues import ends_with_tag, split_texts
from pe_dpo.data.pairs import RowError, describe_value
from pe_dpo.data.split import named_side
from pe_dpo.data.text_files import BOM, TOO_DEEP, Row, TooLong, find_flaw, open_bytes, read_lines
from pe_dpo.errors import DataError

_WRAPPERS = ("data", "rows", "examples", "records", "train")
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*(?:[\]}]|$))')
_ID = re.compile(r"[\w.:/-]*\d[\w.:/-]*", re.ASCII)
"""What may be the id of a row: one word with a digit."""
_LONGEST_PRINTED = 1_000_000
"""Characters of a text that is read as Python prints it, for which Python's parser takes 100 times its size."""
_BETWEEN = f" \t\r\n,{BOM}"
"""What may stand between the values of a file that was put together."""
_LISTS = re.compile(r'"([^"\\]*)"\s*:\s*\[')
"""A key of a list."""


def read_json_lines(path: Path, name: str) -> Iterator[Row]:
    """Yield the object on each line, or of a JSON document whose first line is none by itself."""
    is_first = True
    for number, (line, error) in enumerate(read_lines(path, name), start=1):
        line = line.lstrip(BOM)
        if not line.strip():
            continue
        value: Any = None
        try:
            value = error or _parse(line)
            row = _as_row(value)
        except json.JSONDecodeError as fault:
            cut = "; the file ends inside this row, so it may have been cut: fetch it again"
            is_whole = line.endswith(("\n", "\r"))
            found = f"{fault.msg.removesuffix(' at')} at column {fault.colno}"
            row = RowError(f"is not valid JSON: {found}{'' if is_whole else cut}")
        except ValueError:
            row = RowError("is not valid JSON: it has an integer of more digits than Python reads (4,300); write it as text")
        except RecursionError:
            row = RowError(TOO_DEEP)
        if is_first and (value is None or isinstance(value, list | TooLong)):
            rows = _rows_of_document(path, name)
            if rows:
                yield from number_rows(rows, name)
                return
        is_first = False
        yield f"{name}:{number}", row


def read_json(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of a JSON document, or of JSON lines under the name of one.

    Raises:
        DataError: It is not JSON, or holds no rows.
    """
    document = _read_document(path, name)
    if document is None:
        yield from read_json_lines(path, name)
        return
    if isinstance(document, RowError):
        raise DataError(f"{name}: {document}")
    if not isinstance(document, list | dict):
        raise DataError(f"{name}: holds {describe_value(document)}; a list of objects, one a pair, is expected")
    yield from number_rows(_rows_of(document, name), name)


def number_rows(values: Iterable[Any], name: str) -> Iterator[Row]:
    """Yield JSON values as the rows of what has this name."""
    return ((f"{name} row {number}", _as_row(value)) for number, value in enumerate(values, start=1))


def read_json_splits(path: Path) -> dict[str, list[Any]]:
    """Return the rows of each split of a document like {"train": [...], "test": [...]}; nothing for any other.

    Rows under one of the names that stand for all rows are a split beside those that are named as a side.

    Raises:
        DataError: The file begins like such a document, and is not JSON.
    """
    try:
        with open_bytes(path) as file:
            head = file.read(500).decode("utf-8", "replace").lstrip(BOM)
        if not head.lstrip().startswith("{") or not any(map(named_side, _LISTS.findall(head))):
            return {}
        document = _read_document(path, path.name)
    except (OSError, EOFError, zlib.error):  # said when the rows are read
        return {}
    if not isinstance(document, dict) or {"chosen", "rejected"} & document.keys():
        return {}
    splits = {name: rows for name, rows in document.items() if (named_side(name) or name in _WRAPPERS) and _are_rows(rows)}
    return splits if any(map(named_side, splits)) else {}


def _read_text(path: Path, name: str) -> str:
    """Return the text of a file that is read as a whole.

    Raises:
        DataError: A line of it is not text, or it does not fit into memory as a whole.
    """
    lines, size = [], 0
    most = psutil.virtual_memory().available // 20  # measured: 12 times the size of a list of short rows
    for number, (line, error) in enumerate(read_lines(path, name, of_document=True), start=1):
        if error:
            raise DataError(f"{name}:{number}: {error}")
        lines.append(line)
        size += len(line)
        if size > most:
            raise DataError(
                f"{name}: has more than {most / 1e9:.1f} GB of JSON, which is read as a whole and would fill the memory; write "
                "it as JSON lines (.jsonl), one row a line"
            )
    return "".join(lines).lstrip(BOM)


def _read_document(path: Path, name: str) -> Any:
    """Return the JSON value in a file; None where several follow each other, as in JSON lines."""
    text = _read_text(path, name)
    try:
        return _parse(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise DataError(
            f"{name}:{error.lineno}: is not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}; "
            "if the file ends there it may have been cut: fetch it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: cannot be read ({error}); a list of flat objects is expected") from error


def _rows_of_document(path: Path, name: str) -> list[Any]:
    """Return the rows of a text that as a whole is JSON, one value or several one after the other; nothing where it is not."""
    try:
        text = _read_text(path, name).strip(_BETWEEN)
    except DataError:
        return []
    try:
        try:
            values = [_parse(text)]
        except json.JSONDecodeError:
            decoder, values, at = json.JSONDecoder(object_pairs_hook=_as_object), [], 0
            while at < len(text):
                value, at = decoder.raw_decode(text, at)
                values.append(value)
                while text[at : at + 1] in (*_BETWEEN,):
                    at += 1
    except (ValueError, RecursionError):
        return []
    if all(map(_are_rows, values)):
        return [row for value in values for row in value]
    rows = _rows_of(values[0], name) if len(values) == 1 and isinstance(values[0], list | dict) else values
    return rows if _are_rows(rows) else []


def _rows_of(document: Any, name: str) -> list[Any]:
    """Return the rows of a JSON list or object, see the layouts at the top; an object of none of them is one row.

    Raises:
        DataError: It has several lists of rows, or columns of different lengths.
    """
    if isinstance(document, list):
        return document
    columns = {key: value for key, value in document.items() if isinstance(value, list)}
    lists = [key for key, value in columns.items() if value and _are_rows(value)]
    named = None if {"chosen", "rejected"} & document.keys() else next(filter(named_side, lists), None)
    wrapper = next((key for key in _WRAPPERS if key in lists), named)
    if wrapper and len(lists) > 1 and wrapper != "data":
        found = ", ".join(lists[:5])
        raise DataError(f"{name}: holds several lists of rows ({found}); name this file itself and not its folder, or save one")
    if wrapper:
        return columns[wrapper]
    names, cells = columns.get("columns", []), columns.get("data", [])
    if names and all(isinstance(one, str) for one in names) and all(isinstance(row, list) for row in cells):
        return [dict(zip(names, row, strict=True)) if len(row) == len(names) else row for row in cells]
    if isinstance(document.get("data"), list):
        return columns["data"]
    return _rows_of_columns(document, name) or [document]


def _rows_of_columns(document: dict[str, Any], name: str) -> list[Any]:
    """Return the rows of an object whose values are columns, or rows by their index; nothing for any other.

    Raises:
        DataError: It has columns of different lengths.
    """
    values = list(document.values())
    if document and all(isinstance(value, dict) for value in values):
        if all(key.isdecimal() for key in document):
            return values
        if all({"chosen", "rejected"} <= value.keys() for value in values):
            return _rows_by_key(document, name)
        index = list(values[0])
        if all(key.isdecimal() for key in index) and all(value.keys() == values[0].keys() for value in values):
            return [{column: cells[key] for column, cells in document.items()} for key in index]
    if not all(isinstance(value, list) for value in values) or any(value and _are_messages(value) for value in values):
        return []
    lengths = {key: len(value) for key, value in document.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} {length}" for key, length in list(lengths.items())[:10])
        raise DataError(f"{name}: has columns of different lengths ({found}); give each a value for every row")
    return [dict(zip(document, cells, strict=True)) for cells in zip(*values, strict=True)]


def _rows_by_key(document: dict[str, dict[str, Any]], name: str) -> list[Any]:
    """Return the rows of an object whose keys are prompts, or the ids of rows that bring their own.

    Raises:
        DataError: The keys are needed as prompts, and some are none.
    """
    rows = list(document.values())
    others = [(key, cell) for row in rows for key, cell in row.items() if key not in ("chosen", "rejected")]
    if any(read_as(key) in ("prompt", "input", "messages") or (isinstance(cell, str) and " " in cell) for key, cell in others):
        return rows
    if any(begins_with_prompt(row[side]) for row in rows for side in ("chosen", "rejected")) or all(map(_share_tag, rows)):
        return rows
    ids = [key for key in document if not key.strip() or _ID.fullmatch(key)]
    if len(ids) == len(document):
        return rows
    if ids:
        raise DataError(
            f"{name}: the keys of its objects are taken for prompts, as these have none, and {ids[0]!r} looks like the id of a "
            'row; write the rows as a list, each with its "prompt"'
        )
    return [{"prompt": key, **row} for key, row in document.items()]


def _share_tag(row: dict[str, Any]) -> bool:
    """Return whether two texts begin with one prompt and the tag of an answer."""
    try:
        return ends_with_tag(split_texts(row["chosen"], row["rejected"])[0])
    except (TypeError, RowError):
        return False


def _are_rows(value: Any) -> bool:
    is_list_of_objects = isinstance(value, list) and all(isinstance(row, dict | RowError) for row in value)
    return is_list_of_objects and not (value and _are_messages(value))  # an empty list is a side without rows


def _are_messages(value: list[Any]) -> bool:
    return all(isinstance(turn, dict) and ({"role", "from"} & turn.keys()) for turn in value)


def _parse(text: str) -> Any:
    """Return the JSON value in a text, also where commas stand before closing brackets or Python printed it.

    Raises:
        JSONDecodeError: It is neither; ValueError, RecursionError: it is beyond Python's limits.
    """
    try:
        return json.loads(text, object_pairs_hook=_as_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            if text[error.pos :].strip() != ",":
                raise
            return json.loads(text[: error.pos], object_pairs_hook=_as_object)
        repaired = _TRAILING_COMMA.sub(lambda found: found[1] or "", text)
        try:
            return json.loads(repaired, object_pairs_hook=_as_object)
        except json.JSONDecodeError:
            pass
        try:
            is_long = len(text) > _LONGEST_PRINTED
            if is_long or not re.match(r"[\[\s]*\{\s*'", text):  # Python puts its keys into these quotes
                raise error from None
            with warnings.catch_warnings(action="error"):
                return _python_value(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, SyntaxWarning, DeprecationWarning, ValueError, RecursionError, MemoryError):
            raise error from None


def _python_value(node: ast.expr) -> Any:
    """Return what a literal of Python says that JSON could say too.

    Raises:
        ValueError: JSON could not, or it is no literal.
    """
    match node:
        case ast.Dict(keys=keys, values=values):
            names = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            return _as_object(list(zip(names, map(_python_value, values), strict=True)))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_python_value(item) for item in items]
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
    raise ValueError("no literal")


def _as_object(items: list[tuple[str, Any]]) -> dict[str, Any] | RowError:
    """Return a JSON object, or in its place the error that it has one key twice."""
    values = dict(items)
    if len(values) == len(items):
        return values
    twice = next(name for name, times in Counter(name for name, _ in items).items() if times > 1)
    return RowError(f"has the key '{twice}' twice in one object; keep one of them")


def _as_row(value: Any) -> dict[str, Any] | RowError:
    """Return a JSON value as a row, which is an object without an error anywhere inside."""
    error = find_flaw(value)
    if error is None and not isinstance(value, dict):
        error = RowError(f"is {describe_value(value)}; an object with one pair is expected")
    return error or value

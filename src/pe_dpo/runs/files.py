"""What a run left on disk of what was measured: parquet files as columns, JSON as objects, and what to do where one is torn."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pe_dpo.errors import UsageError
from pe_dpo.runs.scaled import FOLDER as SCALED

Floats = NDArray[np.float64]

SWEEP_FILE, EVALUATION_FILE = "sweep.json", "evaluation.json"


class Rows(NamedTuple):
    """Pairs or answers, each of a prompt."""

    prompts: tuple[str, ...]
    """Key of each row's prompt."""
    names: tuple[str, ...]
    """Which pair or answer of its prompt a row is."""
    columns: dict[str, Floats]


def read_rows(path: Path, name: str, numbers: Iterable[str]) -> Rows | None:
    """Return a parquet file's rows in the order of their prompts' keys and names; None where there is no file, or no row.

    Args:
        path: of the file.
        name: of the column that tells the rows of one prompt apart.
        numbers: columns to read, those that are there.

    Raises:
        UsageError: it cannot be read.
    """
    from pyarrow import ArrowException, parquet

    if not path.is_file():
        return None
    try:
        with parquet.ParquetFile(path) as file:
            there = set(file.schema_arrow.names)
            table = file.read(columns=["prompt_key", name, *(key for key in numbers if key in there)])
        keys, names = table["prompt_key"].to_pylist(), [str(value) for value in table[name].to_pylist()]
        columns = {key: np.asarray(table[key].to_numpy(), dtype=np.float64) for key in table.column_names[2:]}
    except (OSError, ArrowException, KeyError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}; {remedy(path.parent)}") from error
    if not keys:
        return None
    order = sorted(range(len(keys)), key=lambda row: (keys[row], names[row]))
    names = _numbered([(keys[row], names[row]) for row in order])
    return Rows(tuple(keys[row] for row in order), tuple(names), {key: values[order] for key, values in columns.items()})


def _numbered(sorted_rows: Sequence[tuple[str, str]]) -> list[str]:
    """Names made different where a row of the data gave several pairs to one prompt."""
    seen: dict[tuple[str, str], int] = {}
    names = []
    for row in sorted_rows:
        seen[row] = seen.get(row, -1) + 1
        names.append(row[1] if not seen[row] else f"{row[1]}#{seen[row]}")
    return names


def read_evaluation(place: Path) -> dict[str, dict[str, Any]]:
    """Return what evaluation.json in a folder says of its pairs and of sampled answers; each may be empty.

    Raises:
        UsageError: it cannot be read, or has another shape.
    """
    content = read_object(place / EVALUATION_FILE)
    parts = {name: content.get(name) or {} for name in ("pairs", "generation")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise UsageError(
                f"{place / EVALUATION_FILE}: {name} is {part!r}, not an object; write it again with: pe-dpo eval, or restore it"
            )
    return {**content, **parts}


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is no file.

    Raises:
        UsageError: it cannot be read, or is no object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}; restore the file, or move its folder away") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is not a JSON object; restore the file")
    return content


def remedy(place: Path, scales: Sequence[str] = ()) -> str:
    """Return how what was measured of a run, or lies in a folder below it, is measured again, in words."""
    if place.parent.name == "snapshots":
        return f"a snapshot cannot be measured again: move {place} away"
    if place.parent.name == SCALED:
        return remedy(place.parents[1], [place.name.removeprefix("a-")])
    return f"measure it again with: pe-dpo eval {place}" + (f" --scale {','.join(scales)}" if scales else "")

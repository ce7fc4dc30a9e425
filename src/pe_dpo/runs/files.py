"""What a run left on disk of what was measured: JSON as objects, and what to do where one is torn."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pe_dpo.errors import UsageError
from pe_dpo.runs.scaled import FOLDER as SCALED

SWEEP_FILE, EVALUATION_FILE = "sweep.json", "evaluation.json"


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

"""Writing so that a kill leaves the old or the new, never a part; JSON as other programs read it; files that a glob means."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a text file, whole or in parts, so that a reader sees the old or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as `write_atomically` does, indented for people, with letters as they are and null for NaN."""
    write_atomically(path, json.dumps(json_without_nan(content), indent=1, ensure_ascii=False, allow_nan=False))


def json_without_nan(value: Any) -> Any:
    """Return the same tree with None for every number that is not finite, for which JSON has no word; tuples become lists."""
    if isinstance(value, dict):
        return {key: json_without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def follow_umask(path: Path) -> None:
    """Give a file the permissions that a new one gets; what safetensors 0.8 writes is the owner's alone."""
    probe = path.with_name(f".{path.name}.partial")
    probe.touch()
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def sync(path: Path) -> None:
    """Return once a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def matching_paths(path: str) -> list[Path]:
    """Return what a path stands for: itself where it is there, else all that it matches as a glob (`**` goes down folders)."""
    place = Path(path).expanduser()
    if place.exists() or not any(mark in path for mark in "*?["):
        return [place] if place.exists() else []
    try:
        return sorted(Path(place.anchor or ".").glob(str(place.relative_to(place.anchor))))
    except ValueError:  # `**` beside other letters, which is no glob
        return []

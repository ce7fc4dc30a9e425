"""Checkpoints that are whole or not there: staged, hashed, renamed; the newest that verifies is the one resumed from.

    .staging/checkpoint-30/ … files, fsync … MANIFEST.json (size and sha256 of each) … fsync … rename → checkpoint-30/

The manifest also names the run and what it started from (`inputs`), so that the checkpoint of another run is not gone on with.

A kill at any moment leaves the last checkpoint intact and at most something in .staging, which the next save sweeps away.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pe_dpo.disk import sync, write_json
from pe_dpo.runs.records import MANIFEST_RECORD, known

MANIFEST = "MANIFEST.json"
_PREFIX = "checkpoint-"


def staging_folder(run: Path) -> Path:
    """Return where a checkpoint is put together, as a folder of its final name."""
    return run / ".staging"


def commit_checkpoint(
    run: Path, step: int, inputs: Mapping[str, Any], *, keep: int, former: Mapping[str, Collection[str]] = MappingProxyType({})
) -> None:
    """Seal the staged checkpoint of a step with a manifest and give it its final name, atomically; remove the oldest others.

    Args:
        run: The folder of the run.
        step: The optimizer step of the checkpoint.
        inputs: What the run started from, see `Run.inputs`.
        keep: How many checkpoints up to this step stay; besides, the newest one before it that is whole and the run's own. What
            a kill left of unfinished ones goes, too.
        former: As for `unusable`.
    """
    final = run / f"{_PREFIX}{step}"
    staged = staging_folder(run) / final.name
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    manifest = {
        "step": step,
        "inputs": dict(inputs),
        "files": {str(path.relative_to(staged)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
    }
    for path in files:
        sync(path)
    write_json(staged / MANIFEST, manifest)
    sync(staged)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    sync(run)
    # One of a later step was passed over when the run went on; it must not count for this one.
    older = [one for one in checkpoints(run) if checkpoint_step(one) < step]
    to_remove = older[: max(0, len(older) - keep + 1)]
    if to_remove:
        last_good = next((one for one in reversed(older) if unusable(one, inputs, former) is None), None)
        for checkpoint in to_remove:
            if checkpoint != last_good:
                shutil.rmtree(checkpoint)
    shutil.rmtree(staging_folder(run), ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """Return the sealed checkpoints of a run, oldest first."""
    found = [path for path in run.glob(f"{_PREFIX}*") if path.is_dir() and path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was taken."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def unusable(
    checkpoint: Path, inputs: Mapping[str, Any], former: Mapping[str, Collection[str]] = MappingProxyType({})
) -> str | None:
    """Return why a run cannot go on from a checkpoint, None where it can.

    Runs and checkpoints were made without an id once: a run without one takes checkpoints without one.

    Args:
        checkpoint: Its folder.
        inputs: What the run started from, see `Run.inputs`.
        former: What a person replaced since, see `Run.former_inputs`.
    """
    damage = faults(checkpoint)
    if damage:
        return damage[0]
    sealed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")).get("inputs", {})
    if sealed.get("run") != inputs.get("run"):
        return "is a checkpoint of another run"
    other = [name for name, value in inputs.items() if sealed.get(name, value) not in (value, *former.get(name, ()))]
    return f"was made with other inputs ({', '.join(other)})" if other else None


def faults(checkpoint: Path) -> list[str]:
    """Return what is wrong with a checkpoint's files against its manifest; empty for a whole one."""
    try:
        files = known(MANIFEST_RECORD, json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))["files"].items()
    except (OSError, ValueError, KeyError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__})"]
    found = []
    for name, expected in files:
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif _sha256(path) != expected["sha256"]:
            found.append(f"{name} is not what was written")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

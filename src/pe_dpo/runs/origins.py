"""What a run began with besides its recipe, written down so that a resumed run can say what is otherwise now, in words.

    inputs.json     processes, device, threads; template, tokenizer, end tokens, configuration of the base, adapters
    rows.jsonl.gz     every pair: side, where it stands, hashes of prompt and answers, margin, β, weight

What is compared by content has to be the same. What only moves the last digits (versions, threads, a card of another kind) is
said, and recorded in the run. `training.origins` makes the record.
"""

import gzip
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pe_dpo.disk import write_json
from pe_dpo.errors import RunFolderError
from pe_dpo.runs.files import read_object
from pe_dpo.runs.records import INPUTS, check_record

INPUTS_FILE, ROWS_FILE = "inputs.json", "rows.jsonl.gz"

Row = tuple[str, str, str, str, str, str, str, str]
"""Side (train or held_out), where, hashes of prompt, chosen and rejected, margin, β, weight; empty where a pair has none."""

_IDLE = ("python", "platform", "safetensors", "datasets")
"""Versions that no number of a run depends on: what they read is compared by content."""
_OF_TOKENS = {"tokens", "added tokens", "bos_token", "eos_token", "pad_token", "unk_token"}
SHOWN = 3
"""Of many things that differ, so many are named."""
_TEXT = 60
"""Characters of a value that are shown."""


def save_origins(folder: Path, inputs: Mapping[str, Any], rows: Iterable[Row] | None) -> None:
    """Write both files into the folder of a run, each atomically; without rows there is no file of them."""
    write_json(folder / INPUTS_FILE, inputs)
    if rows is None:
        (folder / ROWS_FILE).unlink(missing_ok=True)
        return
    partial = folder / f".{ROWS_FILE}.partial"
    with partial.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=1, mtime=0) as packed:
        for row in rows:
            packed.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
    partial.replace(folder / ROWS_FILE)


def saved_rows(folder: Path) -> list[Row] | None:
    """Return the pairs that a run began with; None for one from before they were written down, and where they are too many.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder / ROWS_FILE
    if not path.is_file():
        return None
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="surrogatepass") as file:
            rows = [tuple(json.loads(line)) for line in file]
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}; restore the file, or remove it") from error
    return rows


def row_differences(then: Sequence[Row], now: Sequence[Row]) -> dict[str, str]:
    """Return how the pairs differ, in words, under "data" and "held_out"; sides that are the same are left out."""
    found = {}
    for side in ("train", "held_out"):
        before, after = ([row[1:] for row in rows if row[0] == side] for rows in (then, now))
        if before != after:
            found["data" if side == "train" else side] = _describe_rows(before, after)
    return found


def _describe_rows(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> str:
    gone, new = Counter(map(tuple, before)), Counter(map(tuple, after))
    gone, new = gone - new, new - gone
    if not gone and not new:
        return f"the same {len(after)} pairs in another order"
    known = {row[0]: row for row in gone}
    changed = [(known.pop(row[0]), row) for row in new if row[0] in known]
    names = {row[0] for _, row in changed}
    missing, added = [row[0] for row in gone if row[0] not in names], [row[0] for row in new if row[0] not in names]
    parts = []
    if changed:
        first = _describe_change(*changed[0])
        parts.append(f"{len(changed)} of {len(after)} pairs {_verb(changed)}, first {changed[0][1][0]} ({first})")
    parts += [
        f"{len(rows)} {what} ({', '.join(rows[:SHOWN])}{', …' if len(rows) > SHOWN else ''})"
        for rows, what in ((missing, "gone"), (added, "new"))
        if rows
    ]
    return "; ".join(parts)


def _verb(things: Collection[Any]) -> str:
    return "differs" if len(things) == 1 else "differ"


def _describe_change(before: Sequence[str], after: Sequence[str]) -> str:
    names = ("", "prompt", "chosen", "rejected", "margin", "beta", "weight")
    parts = []
    for name, was, now in list(zip(names, before, after, strict=True))[1:]:
        if was != now:
            one, other = (f"{float(value):g}" if value and name in names[4:] else value or "none" for value in (was, now))
            parts.append(f"another {name}" if name in names[:4] else f"{name} {one} → {other}")
    return ", ".join(parts)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return what of the compared inputs differs, in words, by name; what either record does not have is passed over.

    Another version of transformers may know further keys of a configuration, and one of tokenizers may write the same parts
    otherwise: then the keys that both know count, and of a tokenizer its tokens. What it does to the pairs is in their ids.
    """
    versions = [
        {name: record.get("versions", {}).get(name) for name in ("transformers", "tokenizers")} for record in (then, now)
    ]
    found = {}
    for name in ("config", "tokenizer", "end_tokens", "template", "start", "over"):
        if name not in then or name not in now or then[name] == now[name]:
            continue
        was, value = then[name], now[name]
        if isinstance(was, dict) and isinstance(value, dict):
            both = was.keys() & value.keys() if name in ("config", "tokenizer") else was.keys() | value.keys()
            if name == "tokenizer" and versions[0] != versions[1]:
                both = both & _OF_TOKENS
            words = _describe_entries(was, value, both)
        elif isinstance(was, str) and isinstance(value, str):
            words = _first_difference(was, value)
        else:
            words = f"{_shown(was)} → {_shown(value)}"
        if words:
            found[name] = words
    return found


def machine_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what of machine and libraries differs, "threads: 1 → 2" each; what either record does not have is passed over."""
    return [
        f"{name}: {_shown(then[part][name])} → {_shown(now[part][name])}"
        for part in ("machine", "versions")
        for name in then.get(part, {})
        if name in now.get(part, {}) and name not in _IDLE and then[part][name] != now[part][name]
    ]


def recorded_inputs(folder: Path) -> dict[str, Any]:
    """Return what inputs.json says; an empty record for a run from before.

    Raises:
        RunFolderError: it cannot be read, or is no such record.
    """
    found = read_object(folder / INPUTS_FILE)
    check_record(INPUTS, found, folder / INPUTS_FILE, remedy="restore the file, or remove it")
    return found


def tensor_differences(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return how many tensors of a base differ, and the first of them."""
    names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if not names:
        return "its buffers"
    return f"{len(names)} of {len(now)} tensors {_verb(names)}, first {names[0]}"


def _describe_entries(was: Mapping[str, Any], value: Mapping[str, Any], keys_compared: Collection[str]) -> str:
    """Return which of these entries of two records differ; of objects within them, what came and what went."""
    parts = []
    for key in sorted(key for key in keys_compared if was.get(key) != value.get(key)):
        one, other = was.get(key), value.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            came, went = ([k for k in a if k not in b] for a, b in ((other, one), (one, other)))
            moved = [k for k in one if k in other and one[k] != other[k]]
            parts += [
                f"{key}: {len(keys)} {what} ({', '.join(map(_shown, keys[:SHOWN]))}{', …' if len(keys) > SHOWN else ''})"
                for keys, what in ((came, "added"), (went, "gone"), (moved, "changed"))
                if keys
            ]
        else:
            parts.append(f"{key} {_shown(one)} → {_shown(other)}")
    more = f"; and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return "; ".join(parts[:SHOWN]) + more


def _first_difference(was: str, value: str) -> str:
    """Return the first line in which two texts differ, with both."""
    old, new = was.splitlines(), value.splitlines()
    size = max(len(old), len(new))
    padded = ([*lines, *[""] * (size - len(lines))] for lines in (old, new))
    number, one, other = next(
        ((number, a, b) for number, (a, b) in enumerate(zip(*padded, strict=True), start=1) if a != b),
        (size, was[-1:], value[-1:]),
    )
    start = max(
        0, next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))) - 20
    )
    return f"line {number}: {_shown(one[start:])} → {_shown(other[start:])}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() and " " not in value and value else repr(value)
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"

"""Encoded pairs kept on disk from one command to the next: what is there is mapped, what is not is made once.

    pairs/KEY/tokens.arrow      token ids and names of rows, in batches of Arrow
              NAME.npy          one number a pair: lengths, margin, prompt key, …
              train.npy         rows of each side, in its order
              held_out.npy
              report.json       what happened to every row; the hashes of both sides
              checksums.json    of the other files, written last

KEY is a sha256 over all that determines them: contents of the files, tokenizer, settings, how the held-out side is found, and
the source of this room. An entry comes under its name whole, and is checked as a whole when it is opened; one that is not what
was written is made anew. Nothing in it is run: no pickle is read.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pe_dpo.data.encoded import DIGESTS, Batches, EncodedPairs, FileBatches, pairs_of
from pe_dpo.data.report import DataReport
from pe_dpo.disk import map_parts
from pe_dpo.errors import DataError

logger = logging.getLogger(__name__)

MOST_BYTES = 20e9
"""Of all entries together; those that were not used for longest go, never the one that was just made."""
_TOKENS, _REPORT, _CHECKSUMS = "tokens.arrow", "report.json", "checksums.json"
_SIDES = ("train", "held_out")

Made = tuple[EncodedPairs, EncodedPairs, DataReport]
"""Both sides, and what happened on the way."""


class DamagedEntry(DataError):
    """What lies on disk is not what was written."""


class EncodedStore:
    """Entries in one folder; several processes may use it at once, and only one of them makes an entry.

    Args:
        folder: Made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_or_make(self, key: str, make: Callable[[Batches], Made], also: Callable[[DataReport], set[str]]) -> Made:
        """Return an entry, made now if there is none.

        Args:
            key: Of the entry.
            make: Returns its content, having written its tokens.
            also: Returns the keys under which what was made is to be found.

        Raises:
            OSError: It cannot be written, or not be locked.
        """
        from filelock import FileLock, Timeout

        found = self._find(key, is_ours=False)
        if found is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            logger.info("waiting for another process, which encodes the same pairs")
            lock.acquire()
        try:
            found = self._find(key, is_ours=True)
            if found is not None:
                return found
            staged = self.folder / f"{key}.partial"  # of nobody who is alive: the lock is ours
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            try:
                made = make(Batches(staged / _TOKENS))
                _write(staged, made)
                entry = self.folder / key
                if entry.is_symlink():
                    entry.unlink()
                shutil.rmtree(entry, ignore_errors=True)
                staged.rename(entry)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            with suppress(OSError):  # what follows is for others
                for other in (self.folder / name for name in also(made[2]) - {key}):
                    if other.is_symlink() and not other.exists():
                        other.unlink()
                    if not other.exists():
                        other.symlink_to(key)
                self._remove_oldest(key)
            return _read(entry, is_checked=False)
        finally:
            lock.release()

    def _find(self, key: str, *, is_ours: bool) -> Made | None:
        """Return an entry, or None; that it is damaged is said by the process that has the lock to make it anew."""
        entry = self.folder / key
        try:
            if not (entry / _CHECKSUMS).is_file():
                return None
            found = _read(entry)
            with suppress(OSError):  # it may be another user's
                os.utime(entry / _CHECKSUMS)
            return found
        except (DamagedEntry, OSError) as error:
            if is_ours:
                logger.warning(f"{entry}: is damaged ({error}); its pairs are encoded again")
            return None

    def _remove_oldest(self, kept: str) -> None:
        """Remove entries until the others have room, with what was left of them and of what was begun."""
        entries = []
        for path in self.folder.iterdir():
            if path.is_symlink():
                if not path.exists():
                    path.unlink(missing_ok=True)
            elif path.is_dir() and path.suffix != ".partial":
                with suppress(OSError):
                    size = sum(file.stat().st_size for file in path.iterdir())
                    entries.append(((path / _CHECKSUMS).stat().st_mtime, size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total > MOST_BYTES and path.name != kept:
                shutil.rmtree(path, ignore_errors=True)
                path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
                total -= size


def _write(folder: Path, made: Made) -> None:
    """Write what belongs to tokens that were written already."""
    train, held_out, report = made
    for name, values in train.table.numbers.items():
        if name not in (*DIGESTS, "place"):  # which are for preparing alone
            np.save(folder / f"{name}.npy", np.ascontiguousarray(values), allow_pickle=False)
    content: dict[str, Any] = {"report": vars(report)}
    for name, side in zip(_SIDES, (train, held_out), strict=True):
        np.save(folder / f"{name}.npy", side.rows, allow_pickle=False)
        content[name] = side.digest
    (folder / _REPORT).write_text(json.dumps(content), encoding="ascii")
    sums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / _CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")


def _read(folder: Path, *, is_checked: bool = True) -> Made:
    """Return what an entry holds.

    Raises:
        DamagedEntry: It is not what was written.
    """
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in sums.items() if is_checked else ():
            if _checksum(folder / name) != expected:
                raise DamagedEntry(f"{name} is not what was written")
        arrays = {
            name.removesuffix(".npy"): np.load(folder / name, mmap_mode="r", allow_pickle=False)
            for name in sums
            if name.endswith(".npy")
        }
        sides = {name: arrays.pop(name) for name in _SIDES}
        content = json.loads((folder / _REPORT).read_text(encoding="ascii"))
        table = pairs_of(FileBatches(folder / _TOKENS), arrays).table
        train, held_out = (EncodedPairs(table, np.asarray(sides[name]), digest=content[name]) for name in _SIDES)
        report = DataReport()
        for name, value in content["report"].items():
            if name in ("dropped", "noted"):
                getattr(report, name).update(value)
            else:
                setattr(report, name, value)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedEntry(str(error)) from error
    return train, held_out, report


def _checksum(path: Path) -> list[int]:
    """Return size and CRC-32 of each part of a file: against bits that fell over, not against a person."""
    return [number for part in map_parts(path, lambda part: (len(part), zlib.crc32(part))) for number in part]

"""A disk that refuses what it is asked below one folder, once or from some moment on, on the floor on which Python stands.

Opening to write, making and removing folders, renaming and removing files are seen by an audit hook, whoever calls them, and a
sync by `os.fsync`. Libraries of other languages are not seen; for those there are limits of the system and full devices.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


class FailingDisk:
    """Counts what is asked below a folder, and refuses.

    Args:
        folder: below which.
        number: of the error; None refuses nothing.
        at: which of the requests is the first that is refused, from 0.
        lasts: whether all later ones are, too.
    """

    def __init__(self, folder: Path, number: int | None = None, *, at: int = 0, lasts: bool = False) -> None:
        self.folder, self.number, self.at, self.lasts = str(folder), number, at, lasts
        self.asked: list[str] = []

    def ask(self, what: str, path: str) -> None:
        """Count a request, or refuse it."""
        if not path.startswith(self.folder) or path.endswith(".lock"):
            return
        self.asked.append(f"{what} {path}")
        count = len(self.asked) - 1
        if self.number is not None and (count == self.at or (self.lasts and count > self.at)):
            raise OSError(self.number, os.strerror(self.number), path)


_active: list[FailingDisk] = []


def _hook(event: str, details: tuple) -> None:
    if _active and event in _WATCHED and (event != "open" or (isinstance(details[2], int) and details[2] & 3)):
        path = details[0]
        if isinstance(path, str | bytes | os.PathLike):
            _active[-1].ask(event, str(Path(os.fsdecode(path)).absolute()))


@contextmanager
def failing(disk: FailingDisk) -> Iterator[FailingDisk]:
    """Within the block this disk is the one that is asked."""
    if not hasattr(sys, "_pe_dpo_disk_hook"):  # a hook stays as long as the process
        sys.addaudithook(_hook)
        sys._pe_dpo_disk_hook = True  # type: ignore[attr-defined]
    fsync = os.fsync

    def sync(handle: int) -> None:
        disk.ask("fsync", str(Path(f"/proc/self/fd/{handle}").readlink()))

    os.fsync = sync
    _active.append(disk)
    try:
        yield disk
    finally:
        _active.pop()
        os.fsync = fsync

"""A folder that appears whole or not at all: put together beside its place under a hidden name, synced, renamed.

    .OUT.staging/ … files, fsync … rename → OUT

A kill at any moment leaves nothing under OUT, and what it left beside is swept by the next start.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pe_dpo.disk import disk_errors_named, sync
from pe_dpo.errors import UsageError
from pe_dpo.runs.writing import locked


def check_free(output: Path) -> None:
    """Check that nothing lies where a folder is to appear.

    Raises:
        UsageError: something does, or there is no folder to make it in.
    """
    if output.is_dir() and any(output.iterdir()):
        raise UsageError(f"{output}: is not empty; choose another -o")
    if output.is_symlink():
        raise UsageError(f"{output}: is a link, and a finished folder takes its place by name; name the folder itself")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; -o is a folder")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output}: there is no folder {output.absolute().parent}; make it first")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `output` at the end of the block, unless the block raises.

    Raises:
        UsageError: `output` is taken, or another process is making it.
        DiskError: the disk is full, or cannot be written.
    """
    check_free(output)
    output = output.absolute()
    staging = output.with_name(f".{output.name}.staging")
    with locked(staging) as folder, disk_errors_named(output, advice="nothing was left there"):
        try:
            _sweep(folder)
            yield folder
            for path in (*sorted(path for path in folder.rglob("*") if path.is_file()), folder):
                sync(path)
            check_free(output)
            folder.rename(output)
            (output / ".lock").unlink()  # held until the name is taken, or another process would begin in the same folder
            sync(output.parent)
        finally:
            _remove(folder)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that is gone after the block; what a kill left in it is swept by the next start.

    Raises:
        UsageError: another process works there.
        DiskError: the disk is full, or cannot be written.
    """
    with locked(folder), disk_errors_named(folder):
        try:
            _sweep(folder)
            yield folder
        finally:
            _remove(folder)


def _sweep(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(folder: Path) -> None:
    """Remove a locked folder, the lock last: until then no other process works there."""
    with suppress(OSError):  # what cannot be removed now is swept by the next start
        if folder.is_dir():
            _sweep(folder)
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()  # unless another process has begun there

"""Writing so that a kill leaves the old or the new, never a part; a disk's refusals in words; files that a glob means."""

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pe_dpo.errors import DiskError, PeDpoError
from pe_dpo.printable import printable_json

Result = TypeVar("Result")

_PART_BYTES = 1 << 24
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", "make room there"),
    errno.EDQUOT: ("the disk quota is used up", "remove what is not needed there, or ask for a larger quota"),
    errno.EFBIG: ("a file may not become so large", "raise the limit (ulimit -f), or choose another disk"),
    errno.EROFS: ("the disk is read-only", "have it mounted for writing, or choose another place"),
    errno.EACCES: ("permission denied", "permit this user to read and write there, or choose another place"),
    errno.EPERM: ("the system does not permit that", "permit this user to read and write there, or choose another place"),
    errno.EMFILE: ("this process has too many files open", "raise the limit (ulimit -n 65536)"),
    errno.ENFILE: ("the machine has too many files open", "end other programs, or raise the limit (fs.file-max)"),
    errno.EIO: ("the disk failed (input/output error)", "look at it (dmesg), and choose another if it is broken"),
    errno.ESTALE: ("what the file server had there was replaced (stale file handle)", "have it mounted again"),
    errno.ENOTCONN: ("the file system is not connected any more", "have it mounted again"),
    errno.ENODEV: ("the disk is gone", "have it mounted again"),
    errno.ENXIO: ("the disk is gone", "have it mounted again"),
    errno.ENAMETOOLONG: ("the name is too long for the disk", "choose a shorter one"),
}
"""What a disk refuses, and what to do about it; an error of any other number is none of the disk's."""
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EBUSY, errno.ELOOP)
"""Something else lies where a file or folder is to be made."""


TEMPORARY = "or set TMPDIR to a folder on another disk"
"""The advice where it is a temporary folder that cannot be written."""


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """Yield the place of a file that takes its name at the end of the block, on the disk by then; an error leaves nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the error itself says more
            partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a text file, whole or in parts, so that a reader sees the old or the new one, never a part."""
    with appearing_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as `write_atomically` does, indented for people: null for NaN, letters as they are, no secrets."""
    text = json.dumps(json_without_nan(content), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, printable_json(text))


def json_without_nan(value: Any) -> Any:
    """Return the same tree with None for every number that is not finite, for which JSON has no word; tuples become lists."""
    if isinstance(value, dict):
        return {key: json_without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def map_parts(path: Path, work: Callable[[bytes], Result]) -> list[Result]:
    """Return what some work makes of each 16 MB of a file, in their order; in threads, as hashes let go of the interpreter.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        places = range(0, os.fstat(file.fileno()).st_size, _PART_BYTES)
        if len(places) < 2:
            return [work(file.read())]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda place: work(os.pread(file.fileno(), _PART_BYTES, place)), places))


def cache_folder() -> Path:
    """Return where what can be made again is kept: $PE_DPO_CACHE, $XDG_CACHE_HOME/pe-dpo or ~/.cache/pe-dpo."""
    own, shared = os.environ.get("PE_DPO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared) / "pe-dpo" if shared else Path.home() / ".cache" / "pe-dpo"


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


@contextmanager
def disk_errors_named(place: Path, *, name: str = "", advice: str = "") -> Iterator[None]:
    """Within the block, what the disk refuses is a `DiskError` in words, through whatever library it was asked.

    Args:
        place: where the block writes, named where the error says of no file.
        name: of that place, where it is no path.
        advice: a sentence on how to go on once the fault is gone.

    Raises:
        DiskError: from the error that says so.
    """
    try:
        yield
    except Exception as error:
        found = disk_error(error, place, name=name, advice=advice)
        if found is None:
            raise
        raise found from error


def disk_error(error: BaseException, place: Path, *, name: str = "", advice: str = "") -> DiskError | None:
    """Return what the disk refused, and what to do about it, as an error; None where an error is not the disk's.

    Python says a number; libraries in Rust (safetensors, tokenizers) and Arrow write it into their text; PyTorch's writer says
    only that it could not write.

    Args:
        error: as it came from Python or a library.
        place: as for `disk_errors_named`, as are the others.
    """
    if isinstance(error, PeDpoError):
        return None
    text, number = str(error), error.errno if isinstance(error, OSError) else None
    if number is None:
        told = re.search(r"\b(?:os error|errno) (\d+)\b", text, re.IGNORECASE)
        number = int(told[1]) if told else None
    named = getattr(error, "filename", None)
    where = os.fsdecode(named) if isinstance(named, str | bytes) else name or str(place)
    if number is None and isinstance(error, RuntimeError) and "inline_container" in text:  # of torch.save, which has no number
        number = _why_writing_fails(_nearest_folder(place))
    if number in _REFUSALS:
        what, remedy = _REFUSALS[number]
    elif number in _IN_THE_WAY:
        what, remedy = f"cannot be written: {os.strerror(number)}", "choose another place, or move away what lies there"
    elif number == errno.ENOENT and not _is_folder(place) and Path(where).absolute().is_relative_to(place.absolute()):
        what, remedy, advice = (
            "was removed while it was worked in",
            "restore it, or begin anew",
            "",
        )  # what was saved is gone with it
    else:
        return None
    if number == errno.ENOSPC and where != name:
        with suppress(OSError):  # of a disk that does not even say that any more
            what += f" ({shutil.disk_usage(_nearest_folder(place)).free / 1e6:,.1f} MB free)"
    return DiskError(f"{where}: {what}; {remedy}" + (f"; {advice}" if advice else ""))


def check_can_be_written(place: Path, needed: int = 1, *, what: str = "", remedy: str = "") -> None:
    """Check that a disk takes files and has room for what is going to be written; cheap, and said before hours of work.

    Args:
        place: that is going to be written; need not exist.
        needed: bytes.
        what: needs so many, in words.
        remedy: what else to do where there is no room than to make some.

    Raises:
        DiskError: a file cannot be made there, or there is less room.
    """
    from tempfile import TemporaryFile

    there = _nearest_folder(place)
    with disk_errors_named(place), TemporaryFile(dir=there) as file:
        file.write(b"\0")
    usage = shutil.disk_usage(there)
    if needed > usage.free and usage.total:  # some network shares tell of no size at all
        sizes = f"{needed / 1e6:,.1f} MB, and {usage.free / 1e6:,.1f} MB are free there"
        raise DiskError(f"{place}: {what} takes {sizes}; {remedy or 'make room, or choose another place'}")


def _why_writing_fails(folder: Path) -> int:
    """Return the number of the error that a megabyte meets; that of a failing disk where it meets none."""
    from tempfile import TemporaryFile

    try:
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return errno.EIO


def _nearest_folder(place: Path) -> Path:
    return next(folder for folder in (place.absolute(), *place.absolute().parents) if _is_folder(folder))


def _is_folder(place: Path) -> bool:
    try:
        return place.is_dir()
    except OSError:  # of a disk that is gone
        return False


def unlike_a_file(path: Path) -> str | None:
    """Return what a path is that is there and neither a file nor a folder, and may have no end; None for anything else."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # a name that no file can have
        return None
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode))


def matching_paths(path: str) -> list[Path]:
    """Return what a path stands for: itself where it is there, else all that it matches as a glob (`**` goes down folders)."""
    place = Path(path).expanduser()
    if place.exists() or not any(mark in path for mark in "*?["):
        return [place] if place.exists() else []
    try:
        return sorted(Path(place.anchor or ".").glob(str(place.relative_to(place.anchor))))
    except ValueError:  # `**` beside other letters, which is no glob
        return []

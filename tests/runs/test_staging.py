"""A staged folder appears whole or not at all."""

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pe_dpo.errors import DiskError, RunFolderError, UsageError
from pe_dpo.runs.staging import check_free, staged


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder in which OUT is to appear."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def content(folder: Path) -> dict[str, str]:
    """Text of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_files_and_folders_appear_together_at_the_end(place: Path) -> None:
    with staged(place / "out") as folder:
        (folder / "a").write_text("one")
        (folder / "below").mkdir()
        (folder / "below" / "b").write_text("two")
        assert not (place / "out").exists()
    assert content(place) == {"out/a": "one", "out/below/b": "two"}


def test_an_empty_folder_is_taken_over(place: Path) -> None:
    (place / "out").mkdir()
    with staged(place / "out") as folder:
        (folder / "a").write_text("one")
    assert content(place) == {"out/a": "one"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_whatever_ends_the_block_nothing_is_left(place: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(place / "out") as folder:
        (folder / "a").write_text("one")
        raise error
    assert list(place.iterdir()) == []


def test_a_full_disk_is_said_with_where_and_what_and_leaves_nothing(place: Path) -> None:
    with pytest.raises(DiskError) as caught, staged(place / "out") as folder:
        (folder / "a").write_text("one")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = re.sub(r"\([\d,.]+ MB free\)", "(no MB free)", str(caught.value))
    assert said == f"{place / 'out'}: the disk is full (no MB free); make room there; nothing was left there"
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_that_shows_only_when_the_disk_is_asked_to_keep_the_bytes_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(DiskError, match=r"the disk (is full|failed)"), staged(place / "out") as folder:
        (folder / "a").write_text("one")
        monkeypatch.setattr(os, "fsync", fails)
    assert list(place.iterdir()) == []


def test_every_file_is_synced_before_the_name_appears_and_the_name_after(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def fsync(handle: int) -> None:
        synced.append((Path(f"/proc/self/fd/{handle}").readlink().name, (place / "out").exists()))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("looks into /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    with staged(place / "out") as folder:
        (folder / "a").write_text("one")
        (folder / "below").mkdir()
        (folder / "below" / "b").write_text("two")
    assert {"a", "b", ".out.staging"} <= {name for name, is_there in synced if not is_there}
    assert synced[-1] == ("place", True)


def test_what_lies_at_the_place_is_never_touched(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="out: is not empty; choose another -o"), staged(place / "out"):
        raise AssertionError("the block was entered")
    assert content(place) == {"out/thesis.txt": "years of work"}


def test_what_came_to_the_place_in_the_meantime_is_never_touched(place: Path) -> None:
    with pytest.raises(UsageError, match="out: is not empty"), staged(place / "out") as folder:
        (folder / "a").write_text("one")
        (place / "out").mkdir()
        (place / "out" / "thesis.txt").write_text("years of work")
    assert content(place) == {"out/thesis.txt": "years of work"}


def test_a_file_at_the_place_and_a_place_without_a_folder_are_refused(place: Path) -> None:
    (place / "out").write_text("mine")
    with pytest.raises(UsageError, match="out: is a file; -o is a folder"):
        check_free(place / "out")
    with pytest.raises(UsageError, match=r"there is no folder .*/none; make it first"):
        check_free(place / "none" / "out")
    assert content(place) == {"out": "mine"}


@pytest.mark.parametrize("points_to", ["nothing", "an empty folder"])
def test_a_link_at_the_place_is_refused_before_any_work(place: Path, points_to: str) -> None:
    (place / "empty").mkdir()
    (place / "out").symlink_to(place / ("empty" if points_to == "an empty folder" else "nothing"))
    with pytest.raises(UsageError, match="out: "), staged(place / "out"):
        raise AssertionError("the block was entered")


def test_what_a_killed_start_left_is_swept_by_the_next(place: Path) -> None:
    left = place / ".out.staging"
    (left / "below").mkdir(parents=True)
    for name in ("a", "below/b", ".lock"):
        (left / name).write_text("of the killed one")
    with staged(place / "out") as folder:
        assert [path.name for path in folder.iterdir()] == [".lock"]
        (folder / "a").write_text("one")
    assert content(place) == {"out/a": "one"}


def test_two_cannot_stage_one_place_at_a_time_and_the_first_is_not_disturbed(place: Path) -> None:
    with staged(place / "out") as folder:
        (folder / "a").write_text("one")
        with pytest.raises(RunFolderError, match="another run is writing there"), staged(place / "out"):
            raise AssertionError("the block was entered")
    assert content(place) == {"out/a": "one"}


def test_one_that_starts_while_the_other_gives_its_folder_its_name_cannot_sweep_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the worst moment, when nothing is left to do but the renaming."""
    rename, intruders = Path.rename, []

    def rename_late(path: Path, to: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        try:
            with staged(place / "out") as folder:
                intruders.append(folder)
        except (UsageError, DiskError):
            pass
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", rename_late)
    with staged(place / "out") as folder:
        (folder / "a").write_text("one")
    assert content(place / "out") == {"a": "one"}


PROGRAM = """
import sys
from pathlib import Path
from pe_dpo.runs.staging import staged
place = Path(sys.argv[1])
print("ready", flush=True)
for number in range(10**9):
    with staged(place / str(number)) as folder:
        for part in range(8):
            (folder / str(part)).write_text(str(number) * 1000)
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_whole_folders_only(place: Path) -> None:
    """A process that stages one folder after the other, killed six times; all that is visible is whole.

    Killed between taking its name and giving up its lock, it leaves that empty file too, which holds nobody up.
    """
    moments = random.Random(0)
    visible = 0
    for attempt in range(6):
        room = place / str(attempt)
        room.mkdir()
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(room)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while not any(not folder.name.startswith(".") for folder in room.iterdir()):
            time.sleep(0.001)
        time.sleep(0.1 * moments.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for folder in room.iterdir():
            if not folder.name.startswith("."):
                lock = {} if not (folder / ".lock").exists() else {".lock": ""}
                assert content(folder) == {str(part): folder.name * 1000 for part in range(8)} | lock
                visible += 1
    assert visible >= 6

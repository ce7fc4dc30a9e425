"""Files that are whole or not there, JSON that other programs read, and what a disk refuses in words."""

import errno
import json
import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pe_dpo.disk import check_can_be_written, disk_error, disk_errors_named, json_without_nan, write_json
from pe_dpo.errors import DataError, DiskError


def test_json_without_nan_has_null_for_numbers_that_are_not_finite_and_everything_else_as_it_is() -> None:
    content = {"a": math.nan, "b": [1, math.inf, (2.5, -math.inf)], "c": {"d": True, "e": None, "f": "NaN"}}
    expected = {"a": None, "b": [1, None, [2.5, None]], "c": {"d": True, "e": None, "f": "NaN"}}
    assert json_without_nan(content) == expected
    json.dumps(json_without_nan(content), allow_nan=False)


def test_a_json_file_is_replaced_whole_and_keeps_its_letters(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"formula": "β·Δπ"})
    assert path.read_text(encoding="utf-8") == '{\n "formula": "β·Δπ"\n}'
    with pytest.raises(TypeError):
        write_json(path, {"formula": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"formula": "β·Δπ"}
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]


def test_a_json_file_has_null_where_there_is_no_number(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"mean": math.nan, "pairs": 3})
    assert (tmp_path / "run.json").read_text() == '{\n "mean": null,\n "pairs": 3\n}'


REFUSED = {
    errno.ENOSPC: ("the disk is full (", " MB free); make room there"),
    errno.EDQUOT: ("the disk quota is used up", "ask for a larger quota"),
    errno.EFBIG: ("a file may not become so large", "ulimit -f"),
    errno.EROFS: ("the disk is read-only", "choose another place"),
    errno.EACCES: ("permission denied", "permit this user"),
    errno.EMFILE: ("this process has too many files open", "ulimit -n"),
    errno.EIO: ("the disk failed (input/output error)", "dmesg"),
    errno.ESTALE: ("stale file handle", "mounted again"),
}


@pytest.mark.parametrize("number", REFUSED)
def test_what_a_disk_refuses_is_one_line_with_the_place_and_what_to_do(tmp_path: Path, number: int) -> None:
    for error, where in ((OSError(number, "?"), tmp_path), (OSError(number, "?", "/x/y.bin"), "/x/y.bin")):
        with pytest.raises(DiskError) as caught, disk_errors_named(tmp_path, advice="`resume` goes on"):
            raise error
        said = str(caught.value)
        assert said.startswith(f"{where}: ") and said.endswith("; `resume` goes on") and "\n" not in said
        assert all(words in said for words in REFUSED[number])


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        RuntimeError("CUDA error: unspecified launch failure"),
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/config.json"),
        DataError("train.jsonl:3: says (os error 28)"),
    ],
)
def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors_named(tmp_path):
        raise error
    assert caught.value is error


def writers() -> dict[str, Callable[[Path], Any]]:
    """Ways in which this package's libraries write some ten thousand bytes."""
    import pyarrow.parquet
    import torch
    from matplotlib.figure import Figure
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    return {
        "Python": lambda path: path.write_text("x" * 10_000),
        "torch": lambda path: torch.save({"a": torch.zeros(10_000)}, path),
        "safetensors": lambda path: save_file({"a": torch.zeros(10_000)}, path),
        "Arrow": lambda path: pyarrow.parquet.write_table(pyarrow.table({"a": list(range(10_000))}), path),
        "tokenizers": lambda path: Tokenizer(models.BPE({f"x{row}": row for row in range(1_000)}, [])).save(str(path)),
        "matplotlib": lambda path: Figure().savefig(path),
    }


def test_the_systems_own_refusal_is_known_through_every_library(tmp_path: Path) -> None:
    """A limit on the size of files, which compiled code meets as Python does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for library, write in writers().items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
        try:
            with pytest.raises(DiskError, match="a file may not become so large"), disk_errors_named(tmp_path):
                write(tmp_path / library)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_gone_is_named_by_what_it_says_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more can be asked of it, neither what lies there nor how much is free."""

    def gone(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "is_dir", lambda path: path == Path("/") or gone())
    monkeypatch.setattr(shutil, "disk_usage", gone)
    for number in (errno.EIO, errno.ENOSPC, errno.ENOENT):
        error = disk_error(OSError(number, "?", str(tmp_path / "run" / "a")), tmp_path / "run")
        assert str(error).startswith(f"{tmp_path / 'run' / 'a'}: ")
    assert str(disk_error(OSError(errno.ENOSPC, "?"), Path("/"), name="the output")) == (
        "the output: the disk is full; make room there"
    )


def test_a_folder_that_was_removed_under_ones_hands_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(DiskError, match=r"metrics\.jsonl: was removed while it was worked in"), disk_errors_named(folder):
        folder.rmdir()
        (folder / "metrics.jsonl").write_text("")


def test_room_is_looked_for_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_can_be_written(tmp_path / "not" / "yet", 1_000, what="it")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10_000_000, free=2_000_000))
    with pytest.raises(DiskError) as caught:
        check_can_be_written(tmp_path / "out", 12_500_000, what="the merged model")
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: the merged model takes 12.5 MB, and 2.0 MB are free there; make room, or choose another place"
    )


def test_what_could_not_be_written_whole_leaves_nothing_beside_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_json(tmp_path / "run.json", {"status": "training"})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_json(tmp_path / "run.json", {"status": "finished"})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "training"}
    assert "the disk is full" in str(disk_error(OSError(errno.ENOSPC, ""), tmp_path))

"""The reference store: what it returns is what was put, to the bit, whatever happened to the file in between."""

import hashlib
import logging
import os
import random
import sqlite3
import struct
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import warm_process
from filelock import FileLock
from recorded import recording

from pe_dpo.errors import StoreUnavailable, UsageError
from pe_dpo.inference import reference_store
from pe_dpo.inference.reference_store import ReferenceStore, StoredLogprob, answer_key, default_store_path, reference_key

ONE, OTHER = "1" * 64, "2" * 64

WRITER = """
import struct, sys
from pathlib import Path
from pe_dpo.inference.reference_store import ReferenceStore, StoredLogprob
path, first, batches, rows = Path(sys.argv[1]), *map(int, sys.argv[2:])
print("ready", flush=True)
while not Path("go").exists():
    pass
store = ReferenceStore(path)
for batch in range(first, first + batches):
    store.put("1" * 64, {struct.pack("<qq16x", batch, row): StoredLogprob(batch + row / 7, row) for row in range(rows)})
    print(batch, flush=True)
"""


def rows_of_batch(batch: int, rows: int) -> dict[bytes, StoredLogprob]:
    """What WRITER stores as one batch."""
    return {struct.pack("<qq16x", batch, row): StoredLogprob(batch + row / 7, row) for row in range(rows)}


def some_rows(count: int, start: int = 0) -> dict[bytes, StoredLogprob]:
    return {hashlib.sha256(b"%d" % row).digest(): StoredLogprob(-row / 7, row) for row in range(start, start + count)}


def writer(path: Path, folder: Path, first: int, batches: int, rows: int) -> BaseProcess:
    """A process that stores batches, ready to begin once there is a file "go" in the folder."""
    process = warm_process.start(WRITER, path, first, batches, rows, folder=folder)
    while not said(process, folder):
        time.sleep(0.001)
    return process


def said(process: BaseProcess, folder: Path) -> list[str]:
    """The whole lines that it has printed."""
    log = warm_process.log(process, folder)
    return log.read_text().split("\n")[:-1] if log.exists() else []


def let_both_write(path: Path, folder: Path, batches: int) -> None:
    processes = [writer(path, folder, first, batches, 30) for first in (0, batches)]
    (folder / "go").touch()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, said(process, folder)


def count(path: Path, reference: str) -> int:
    """How many answers of a reference lie in the file, as any program can see."""
    connection = sqlite3.connect(path)
    try:
        query = "SELECT count(*) FROM answer JOIN reference ON id = reference WHERE name = ?"
        return int(connection.execute(query, (reference.encode(),)).fetchone()[0])
    finally:
        connection.close()


def is_sound(path: Path) -> bool:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "reference.sqlite"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a store with 120 rows of ONE, 40 of OTHER and a fingerprint; a dozen pages."""
    path = tmp_path_factory.mktemp("whole") / "reference.sqlite"
    store = ReferenceStore(path)
    store.put(ONE, some_rows(120))
    store.put(OTHER, some_rows(40, start=60))
    store.remember_fingerprint("base", "f" * 64)
    return path.read_bytes()


def test_what_was_put_comes_back_to_the_bit(path):
    numbers = [-0.0, 0.0, 1e-300, 5e-324, -123.456, 0.1 + 0.2, -1.7976931348623157e308, 3.0]
    rows = {bytes([place]) * 32: StoredLogprob(number, place * 10**9) for place, number in enumerate(numbers)}
    store = ReferenceStore(path)
    store.put(ONE, rows)
    store = ReferenceStore(path)
    found = store.get(ONE, list(rows))
    assert {key: (row.logprob.hex(), row.tokens) for key, row in found.items()} == {
        key: (row.logprob.hex(), row.tokens) for key, row in rows.items()
    }


def test_the_key_is_a_hash_of_length_prompt_and_answer_as_little_endian_integers():
    written = bytes.fromhex("0200000000000000 01000000 00010000 03000000".replace(" ", ""))
    assert answer_key(np.array([1, 256]), np.array([3], dtype=np.int32)) == hashlib.sha256(written).digest()


def test_a_token_that_moves_from_prompt_to_answer_changes_the_key():
    ids = np.arange(6, dtype=np.int32)
    assert len({answer_key(ids[:cut], ids[cut:]) for cut in range(7)}) == 7


def test_the_width_of_the_integers_and_their_layout_do_not_change_the_key():
    wide = np.arange(12, dtype=np.int64)
    narrow = np.arange(6, dtype=np.int32) * 2
    assert answer_key(wide[::2], wide[1:2]) == answer_key(narrow, np.array([1], dtype=np.uint16))


def test_the_reference_key_is_a_hash_of_canonical_json(monkeypatch):
    monkeypatch.setattr(reference_store, "ARITHMETIC", 7)
    written = b'{"arithmetic":7,"dtype":"float32","path":"padded","quantize":"nf4","weights":"ab"}'
    assert reference_key(weights="ab", quantize="nf4", dtype="float32", path="padded") == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize("changed", ["weights", "quantize", "dtype", "path"])
def test_each_thing_that_determines_the_number_changes_the_reference_key(changed):
    facts = {"weights": "ab", "quantize": "nf4", "dtype": "float32", "path": "padded"}
    assert reference_key(**facts) != reference_key(**{**facts, changed: "other"})


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PE_DPO_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/reference.sqlite"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/pe-dpo/reference.sqlite"),
        ({}, "/home/someone/.cache/pe-dpo/reference.sqlite"),
    ],
)
def test_the_store_lies_where_the_environment_says(monkeypatch, variables, expected):
    for name in ("PE_DPO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **variables}.items():
        monkeypatch.setenv(name, value)
    assert default_store_path() == Path(expected)


@pytest.mark.slow
def test_a_hundred_thousand_keys_are_looked_up_at_once(path):
    rows = {struct.pack("<q24x", row): StoredLogprob(-row / 3, row) for row in range(100_000)}
    store = ReferenceStore(path)
    store.put(ONE, rows)
    assert store.get(ONE, [*rows, b"absent".ljust(32), *list(rows)[:5]]) == rows


def test_references_do_not_see_each_other(path):
    store = ReferenceStore(path)
    store.put(ONE, {b"k" * 32: StoredLogprob(-1.0, 1)})
    store.put(OTHER, {b"k" * 32: StoredLogprob(-2.0, 1)})
    assert store.get(ONE, [b"k" * 32]) == {b"k" * 32: (-1.0, 1)}
    assert store.get("3" * 64, [b"k" * 32]) == {}


def test_forgetting_a_reference_removes_its_rows_alone(path):
    store = ReferenceStore(path)
    store.put(ONE, some_rows(7))
    store.put(OTHER, some_rows(3))
    assert (store.forget(ONE), store.forget(ONE)) == (7, 0)
    assert (count(path, ONE), count(path, OTHER)) == (0, 3)


def test_a_second_put_replaces_the_first(path):
    store = ReferenceStore(path)
    store.put(ONE, some_rows(3))
    store.put(ONE, {key: StoredLogprob(9.0, 9) for key in some_rows(2)})
    assert sorted(row.logprob for row in store.get(ONE, list(some_rows(3))).values()) == [-2 / 7, 9.0, 9.0]
    assert count(path, ONE) == 3


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_with_its_key_and_nothing_is_stored(path, number):
    store = ReferenceStore(path)
    with pytest.raises(ValueError, match="6b6b6b"):
        store.put(ONE, {b"a" * 32: StoredLogprob(1.0, 1), b"k" * 32: StoredLogprob(number, 1)})
    assert count(path, ONE) == 0


def test_a_fingerprint_is_remembered_until_it_is_replaced(path):
    store = ReferenceStore(path)
    assert store.remembered_fingerprint("base") is None
    store.remember_fingerprint("base", "a" * 64)
    store.remember_fingerprint("base", "b" * 64)
    store = ReferenceStore(path)
    assert store.remembered_fingerprint("base") == "b" * 64


@pytest.mark.slow
def test_two_processes_write_at_once_and_both_sets_are_whole(path, tmp_path):
    let_both_write(path, tmp_path, 20)
    expected = {key: row for batch in range(40) for key, row in rows_of_batch(batch, 30).items()}
    store = ReferenceStore(path)
    assert store.get(ONE, list(expected)) == expected


@pytest.mark.slow
def test_two_processes_that_find_it_damaged_at_once_keep_what_both_write_into_the_new_one(path, tmp_path):
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    let_both_write(path, tmp_path, 10)
    expected = {key: row for batch in range(20) for key, row in rows_of_batch(batch, 30).items()}
    store = ReferenceStore(path)
    assert store.get(ONE, list(expected)) == expected
    assert [file.name for file in path.parent.glob("*.damaged*")] == ["reference.sqlite.damaged-1"]


def test_a_store_that_another_process_began_anew_is_followed(path, whole):
    first = ReferenceStore(path)
    first.put(ONE, some_rows(5))
    path.rename(path.with_name("elsewhere"))
    second = ReferenceStore(path)
    second.put(ONE, some_rows(2, start=50))
    first.put(ONE, some_rows(2, start=70))
    assert len(first.get(ONE, list(some_rows(100)))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(8))
def test_a_writer_killed_at_any_moment_leaves_whole_passes(path, tmp_path, moment):
    process = writer(path, tmp_path, 0, 10_000, 700)
    (tmp_path / "go").touch()
    while len(said(process, tmp_path)) <= moment % 3:
        time.sleep(0.001)
    time.sleep(random.Random(moment).uniform(0, 0.06))
    process.kill()
    process.join(60)
    finished = said(process, tmp_path)[1 + moment % 3 :]
    store = ReferenceStore(path)
    counts = [len(store.get(ONE, list(rows_of_batch(batch, 700)))) for batch in range(moment % 3 + len(finished) + 2)]
    done = counts.count(700)
    assert counts == [700] * done + [0] * (len(counts) - done)
    assert done >= moment % 3 + len(finished)
    store.put(OTHER, some_rows(3))
    assert is_sound(path)
    assert not list(path.parent.glob("*damaged*"))


def test_a_journal_left_without_its_file_does_no_harm(path):
    """A kill between moving a damaged file aside and moving its journal."""
    path.parent.mkdir()
    path.with_name("reference.sqlite-journal").write_bytes(bytes.fromhex("d9d505f920a163d7") + b"\xff" * 5000)
    store = ReferenceStore(path)
    store.put(ONE, some_rows(3))
    assert store.get(ONE, list(some_rows(3))) == some_rows(3)
    assert is_sound(path)


def use_damaged(path: Path, damaged: bytes) -> list[str]:
    """Use a store whose file is damaged as a run would, and return what it said.

    Never a wrong value, and never an exception.
    """
    path.parent.mkdir()
    path.write_bytes(damaged)
    one, other = some_rows(120), some_rows(40, start=60)
    with recording(logging.WARNING) as said:
        store = ReferenceStore(path)
        assert store.get(ONE, list(one)).items() <= one.items()
        assert store.get(OTHER, list(other)).items() <= other.items()
        assert store.remembered_fingerprint("base") in (None, "f" * 64)
        store.put(ONE, one)
        assert store.get(ONE, list(one)).items() <= one.items()
        store.remember_fingerprint("base", "e" * 64)
        assert store.remembered_fingerprint("base") == "e" * 64
    asides = [path.with_name(f"reference.sqlite.damaged-{number}") for number in (1, 2)]
    moved = [line for line in said if "was moved to reference.sqlite.damaged-" in line]
    assert [aside.exists() for aside in asides] == [len(moved) == 1, False]
    if moved:
        assert store.get(ONE, list(one)) == one
    return said


@pytest.mark.parametrize("left", [2, 50, 99, 100, 512, 4000, 4096, 5000, 8192, 12_288, -4096])
def test_a_truncated_file_is_moved_aside_and_said(path, whole, left):
    said = use_damaged(path, whole[:left])
    assert len(said) == 1
    assert said[0].startswith(f"warning: {path} is damaged (")
    assert path.with_name("reference.sqlite.damaged-1").read_bytes() == whole[:left]


@pytest.mark.parametrize("garbage", [b"\0" * 9000, b"hello", random.Random(0).randbytes(20_000)])
def test_garbage_is_moved_aside_and_said(path, garbage):
    said = use_damaged(path, garbage)
    assert len(said) == 1
    assert path.with_name("reference.sqlite.damaged-1").read_bytes() == garbage


@pytest.mark.slow
@pytest.mark.parametrize("part", ["schema", "anywhere"])
@pytest.mark.parametrize("width", [1, 16])
def test_flipped_bytes_never_give_a_wrong_value(tmp_path, whole, part, width):
    draw = random.Random(f"{part} {width}")
    first, end, count = {"schema": (100, 4096, 30), "anywhere": (4096, len(whole) - 16, 45)}[part]
    said = []
    for place in draw.sample(range(first, end), count):
        damaged = bytearray(whole)
        for offset in range(place, place + width):
            damaged[offset] ^= draw.randrange(1, 256)
        said += use_damaged(tmp_path / str(place) / "reference.sqlite", bytes(damaged))
    assert any("was moved" in line for line in said)


@pytest.mark.slow
def test_a_cut_at_any_byte_never_gives_a_wrong_value(tmp_path, whole):
    for place in random.Random(0).sample(range(len(whole)), 60):
        use_damaged(tmp_path / str(place) / "reference.sqlite", whole[:place])


def test_an_error_message_that_is_not_utf_8_counts_as_damage(path, whole):
    """SQLite quotes the malformed schema in its message, and Python cannot decode it."""
    place = whole.index(b"CREATE TABLE answer") - 8
    said = use_damaged(path, whole[:place] + b"\xd3" * 16 + whole[place + 16 :])
    assert len(said) == 1


def test_a_second_damaged_file_gets_a_name_of_its_own(path):
    path.parent.mkdir()
    for number in (1, 2):
        path.write_bytes(b"garbage %d" % number)
        ReferenceStore(path)
    contents = [path.with_name(f"reference.sqlite.damaged-{number}").read_bytes() for number in (1, 2)]
    assert contents == [b"garbage 1", b"garbage 2"]


@pytest.mark.slow
def test_a_flipped_byte_inside_a_value_is_never_returned_and_begins_the_store_anew(tmp_path, whole):
    row = next(row for row in some_rows(120).values() if row.tokens == 17)
    place = whole.index(struct.pack("<dq", row.logprob, row.tokens))
    for offset in range(24):
        damaged = whole[: place + offset] + bytes([whole[place + offset] ^ 4]) + whole[place + offset + 1 :]
        said = use_damaged(tmp_path / str(offset) / "reference.sqlite", damaged)
        assert len(said) == 1
        assert "is damaged (a row is not what was written)" in said[0]


def test_a_row_under_the_wrong_reference_is_never_returned(path):
    store = ReferenceStore(path)
    store.put(ONE, some_rows(5))
    store.put(OTHER, some_rows(1, start=50))
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE answer SET reference = 3 - reference")
    connection.close()
    assert store.get(OTHER, list(some_rows(5))) == {}


def test_damage_that_appears_while_the_store_is_open_is_noticed(path, whole, warned: list[str]):
    path.parent.mkdir()
    path.write_bytes(whole)
    store = ReferenceStore(path)
    assert count(path, ONE) == 120
    with path.open("r+b") as file:
        file.truncate(5000)
    assert store.get(ONE, list(some_rows(120))) == {}
    store.put(ONE, some_rows(4))
    assert count(path, ONE) == 4
    assert len(warned) == 1


def make_database(path: Path, *statements: str) -> bytes:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["CREATE TABLE bookmarks (url TEXT)", "INSERT INTO bookmarks VALUES ('a')"], "is the database of another program"),
        (["PRAGMA application_id = 252006673", "CREATE TABLE answer (x)"], "is the database of another program"),
        (["PRAGMA journal_mode = WAL", "CREATE TABLE bookmarks (url TEXT)"], "is the database of another program"),
        (["PRAGMA user_version = 1", *reference_store._TABLES, "CREATE TABLE mine (x)"], "is the database of another program"),
        (
            ["PRAGMA application_id = 1885693040", "PRAGMA user_version = 2", "CREATE TABLE later (x)"],
            "is a reference store of layout 2, and this version of pe-dpo reads layout 1",
        ),
    ],
)
def test_the_database_of_another_program_is_refused_untouched(path, statements, message):
    before = make_database(path, *statements)
    with pytest.raises(UsageError, match=rf"reference\.sqlite: {message}; it was left as it is; set PE_DPO_CACHE"):
        ReferenceStore(path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["reference.sqlite", "reference.sqlite.lock"]


@pytest.mark.parametrize("place", ["file/reference.sqlite", "file/below/reference.sqlite", "folder"])
def test_a_store_that_cannot_be_made_is_unavailable_with_the_remedy(tmp_path, place):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreUnavailable, match=rf"{place}: the reference store cannot be used: .*; .*set PE_DPO_CACHE"):
        ReferenceStore(tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_to_write_is_unavailable(path, whole):
    path.parent.mkdir()
    path.write_bytes(whole)
    path.parent.chmod(0o555)
    try:
        with pytest.raises(StoreUnavailable):
            ReferenceStore(path)
    finally:
        path.parent.chmod(0o755)
    assert path.read_bytes() == whole


FULL_DISK = """
import resource, sys
from pathlib import Path
from pe_dpo.errors import StoreUnavailable
from pe_dpo.inference.reference_store import ReferenceStore, StoredLogprob
path = Path(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
few, many = ({b"%032d" % row: StoredLogprob(-1.0, row) for row in range(count)} for count in (9, 20000))
store = ReferenceStore(path)
store.put("1" * 64, few)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100_000, hard))
try:
    store.put("1" * 64, many)
except StoreUnavailable as error:
    print(error)
assert store.get("1" * 64, list(many)) == few
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
store.put("1" * 64, many)
assert store.get("1" * 64, list(many)) == many
"""


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_what_was_there(path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: the reference store cannot be used: ")
    assert not list(path.parent.glob("*damaged*"))


def test_a_store_in_use_for_too_long_is_unavailable(path, monkeypatch):
    monkeypatch.setattr(reference_store, "BUSY_SECONDS", 0.1)
    busy = pytest.raises(StoreUnavailable, match=r"in use by another process for more than 0\.1 s")
    store = ReferenceStore(path)
    with FileLock(f"{path}.lock"), busy:
        store.get(ONE, [])


def test_a_store_locked_by_another_sqlite_program_is_unavailable_and_kept(path, monkeypatch):
    monkeypatch.setattr(reference_store, "BUSY_SECONDS", 0.1)
    store = ReferenceStore(path)
    store.put(ONE, some_rows(3))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreUnavailable, match="database is locked"):
        store.put(ONE, some_rows(9))
    other.close()
    assert store.get(ONE, list(some_rows(9))) == some_rows(3)


@pytest.mark.parametrize("content", [b"alias ls=rm", b"[settings]\n" * 50])
def test_a_file_that_is_none_by_name_and_content_is_left_as_it_was(tmp_path: Path, content: bytes) -> None:
    """As a recipe of somebody else may name one."""
    path = tmp_path / ".bashrc"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no reference store by its name and content; it was left as it was"):
        ReferenceStore(path)
    assert path.read_bytes() == content and not list(tmp_path.glob("*damaged*"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a pipe, and a reference store is a file"):
        ReferenceStore(tmp_path / "pipe")

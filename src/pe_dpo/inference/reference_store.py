"""What the reference made of an answer, kept on disk: a run computes only what no earlier run has.

    (reference, prompt ids, answer ids) → log-prob in nats, tokens

One SQLite file. A row holds 24 bytes: log-prob (float64), tokens (int64) and a checksum. Blobs, because SQLite's own REAL
loses the sign of -0.0. What is damaged is noticed and counts as missing: a wrong number is never returned.

Every use holds a lock file next to the store. SQLite's own locks suffice for reading and writing, but not for moving a
damaged file aside while another process has it open.
"""

import hashlib
import json
import logging
import math
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import numpy as np

from pe_dpo.errors import StoreUnavailable, UsageError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

BUSY_SECONDS = 60.0
"""How long to wait for another process; a put of 100,000 rows takes about a second."""

_APPLICATION = 0x7065_6470  # "pedp"
_LAYOUT = 1
_TABLES = (
    "CREATE TABLE reference (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE)",
    "CREATE TABLE answer (reference INTEGER, key BLOB, value BLOB NOT NULL, PRIMARY KEY (reference, key)) WITHOUT ROWID",
    "CREATE TABLE fingerprint (identity BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
)
_KEYS_PER_QUERY = 900  # SQLite before 3.32 takes 999 parameters
_UNAVAILABLE = frozenset(
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("BUSY", "LOCKED", "PERM", "READONLY", "IOERR", "FULL", "CANTOPEN", "NOLFS", "AUTH", "INTERRUPT", "PROTOCOL")
)


class StoredLogprob(NamedTuple):
    """What the reference made of one answer."""

    logprob: float
    """float64, nats, summed over the answer's tokens."""
    tokens: int


def answer_key(prompt_ids: np.ndarray, answer_ids: np.ndarray) -> bytes:
    """Return 32 bytes that stand for an answer after its prompt: the same tokens, divided otherwise, have another key.

    Args:
        prompt_ids: integers (P,).
        answer_ids: integers (A,).
    """
    prompt, answer = (np.asarray(ids).astype("<i4", casting="same_kind") for ids in (prompt_ids, answer_ids))
    return hashlib.sha256(struct.pack("<Q", prompt.size) + prompt.tobytes() + answer.tobytes()).digest()


ARITHMETIC = 1
"""Of this package: part of every key, to be raised with any change that moves a log-prob or loads a base otherwise."""


def reference_key(*, weights: str, quantize: str, dtype: str, path: str) -> str:
    """Return sha256 (hex) over all that determines a reference's log-prob besides the token ids, and nothing else.

    Args:
        weights: hash of what π0 computes with (`fingerprint.reference_fingerprint`).
        quantize: "nf4", "int8" or "none".
        dtype: of the computation.
        path: name of the way from tokens to log-probs ("padded", say): another way sums in another order.
    """
    facts = {"arithmetic": ARITHMETIC, "weights": weights, "quantize": quantize, "dtype": dtype, "path": path}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def default_store_path() -> Path:
    """Return where the store lies unless told otherwise: in $PE_DPO_CACHE, $XDG_CACHE_HOME/pe-dpo or ~/.cache/pe-dpo."""
    own, shared = os.environ.get("PE_DPO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared) / "pe-dpo" if shared else Path.home() / ".cache" / "pe-dpo"
    return folder / "reference.sqlite"


class ReferenceStore:
    """Log-probs of answers under references, and fingerprints of bases; several processes may use one file at once.

    A kill at any moment leaves every finished put whole and nothing of an unfinished one. A damaged file is moved aside
    (`reference.sqlite.damaged-1`), begun anew, and said.

    Args:
        path: the file; made, with its folder, where it is not there.

    Raises:
        UsageError: the file is a database of another program, or of another version of this one. It is left as it is.
        StoreUnavailable: it cannot be made, read or written, or is in use for longer than BUSY_SECONDS. Every method raises
            both.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self.path = Path(path)
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._has_said_rows = False
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        self._carry_out(lambda connection: None)

    def get(self, reference: str, keys: Sequence[bytes]) -> dict[bytes, StoredLogprob]:
        """Return what is stored and intact of the answers with these keys."""

        def select(connection: sqlite3.Connection) -> list[tuple[bytes, object]]:
            connection.execute("BEGIN")
            return _select(connection, reference, keys)

        rows = self._carry_out(select)
        found = {key: _unpack(reference, key, value) for key, value in rows}
        self._say_damaged_rows(sum(stored is None for stored in found.values()))
        return {key: stored for key, stored in found.items() if stored is not None}

    def put(self, reference: str, rows: Mapping[bytes, StoredLogprob]) -> None:
        """Store answers, all or none; what was stored under their keys is replaced.

        Raises:
            ValueError: a log-prob is not finite; nothing is stored.
        """
        values = [(key, _pack(reference, key, stored)) for key, stored in rows.items()]

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT OR IGNORE INTO reference (name) VALUES (?)", (reference.encode(),))
            number = _number(connection, reference)
            if number is None:
                raise sqlite3.DatabaseError("an index does not find what was just inserted")
            connection.executemany("INSERT OR REPLACE INTO answer VALUES (?, ?, ?)", ((number, *row) for row in values))
            # A flipped byte in a key leaves a tree in disorder, without an error: rows get lost in it again and again.
            found = _select(connection, reference, list(rows))
            if len(found) != len(values) or dict(found) != dict(values):
                raise sqlite3.DatabaseError("it does not return what was just written")

        self._carry_out(insert)

    def forget(self, reference: str) -> int:
        """Remove all answers of one reference and return how many there were."""

        def delete(connection: sqlite3.Connection) -> int:
            connection.execute("BEGIN IMMEDIATE")
            number = _number(connection, reference)
            connection.execute("DELETE FROM reference WHERE id = ?", (number,))
            return connection.execute("DELETE FROM answer WHERE reference = ?", (number,)).rowcount

        return self._carry_out(delete)

    def count(self, reference: str) -> int:
        """Return how many answers of one reference are stored."""

        def count(connection: sqlite3.Connection) -> int:
            query = "SELECT count(*) FROM answer WHERE reference = ?"
            return int(connection.execute(query, (_number(connection, reference),)).fetchone()[0])

        return self._carry_out(count)

    def remembered_fingerprint(self, identity: str) -> str | None:
        """Return the fingerprint that was remembered for a base, None if there is none or it is damaged."""
        query = "SELECT value FROM fingerprint WHERE identity = ?"
        row = self._carry_out(lambda connection: connection.execute(query, (identity.encode(),)).fetchone())
        if row is None:
            return None
        value = row[0] if isinstance(row[0], bytes) else b""
        if value[-8:] == _checksum(identity.encode(), value[:-8]):
            return value[:-8].decode()
        self._say_damaged_rows(1)
        return None

    def remember_fingerprint(self, identity: str, fingerprint: str) -> None:
        """Remember the fingerprint of a base, in place of an earlier one."""
        name, value = identity.encode(), fingerprint.encode()
        row = (name, value + _checksum(name, value))
        self._carry_out(lambda connection: connection.execute("INSERT OR REPLACE INTO fingerprint VALUES (?, ?)", row))

    def close(self) -> None:
        """Close the file; a later use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _carry_out(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Do one piece of work as one transaction; on a damaged file, once more on the new one."""
        with self._locked():
            try:
                try:
                    return self._transact(work)
                except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # messages quote the file, UTF-8 or not
                    self.close()
                    if not self._is_damage(error):
                        raise
                    self._set_aside(error)
                    return self._transact(work)
            except (sqlite3.DatabaseError, OSError) as error:
                self.close()
                raise self._unavailable(str(error)) from error

    def _transact(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        connection = self._open()
        with connection:  # commits or rolls back
            return work(connection)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import Timeout

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=BUSY_SECONDS)
        except Timeout as error:
            raise self._unavailable(f"in use by another process for more than {BUSY_SECONDS:g} s") from error
        except OSError as error:
            raise self._unavailable(error.strerror or str(error)) from error
        try:
            yield
        finally:
            self._lock.release()

    def _open(self) -> sqlite3.Connection:
        """Return a connection to the file that has the name now: another process may have moved ours aside."""
        if self._connection is not None and self._inode == self._found():
            return self._connection
        self.close()
        self._check_ours()
        connection = self._connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.text_factory = bytes  # a flipped type byte makes text of a blob, and it need not be UTF-8
        connection.execute("PRAGMA cell_size_check = ON")
        # A rollback journal rather than a write-ahead log: the log needs memory shared by all processes, which network file
        # systems do not have, and home folders of clusters lie on them.
        connection.execute("PRAGMA journal_mode = DELETE")
        if connection.execute("PRAGMA page_count").fetchone() == (0,):
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                for statement in (f"PRAGMA application_id = {_APPLICATION}", f"PRAGMA user_version = {_LAYOUT}", *_TABLES):
                    connection.execute(statement)
        self._inode = self._found()
        return connection

    def _found(self) -> tuple[int, int] | None:
        if not self.path.exists():
            return None
        stat = self.path.stat()
        return stat.st_dev, stat.st_ino

    def _check_ours(self) -> None:
        """Check whose file it is from its first page alone: SQLite may write into a file that it opens.

        Raises:
            UsageError: of another program or version.
            sqlite3.DatabaseError: ours, with a damaged header.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            page = file.read(4096)
        if len(page) < 100 or not page.startswith(b"SQLite format 3\0"):
            return  # new, or no database at all, which SQLite says
        (layout,), (application,) = struct.unpack(">I", page[60:64]), struct.unpack(">I", page[68:72])
        if (application, layout) == (_APPLICATION, _LAYOUT):
            return
        if page.count(b"CREATE ") == len(_TABLES) and all(statement.encode() in page for statement in _TABLES):
            raise sqlite3.DatabaseError("header and tables contradict each other")
        found = "the database of another program"
        if application == _APPLICATION:
            found = f"a reference store of layout {layout}, and this version of pe-dpo reads layout {_LAYOUT}"
        raise UsageError(f"{self.path}: is {found}; it was left as it is; set PE_DPO_CACHE to another folder, or move the file")

    def _is_damage(self, error: Exception) -> bool:
        if isinstance(error, sqlite3.ProgrammingError):
            raise error
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_READONLY:  # a flipped version byte in the header says so too
            return os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
        return code is None or code & 0xFF not in _UNAVAILABLE

    def _set_aside(self, error: Exception) -> None:
        """Move the damaged file away, journal and all; the lock keeps others from a file that they have just begun anew."""
        names = (self.path.with_name(f"{self.path.name}.damaged-{number}") for number in range(1, 1_000_000))
        aside = next(name for name in names if not name.exists())
        # The file before its journal: SQLite drops a journal without a file, and would apply it to a file of that name.
        for suffix in ("", "-journal", "-wal", "-shm"):
            part = self.path.with_name(self.path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        logger.warning(f"{self.path} is damaged ({error}); it was moved to {aside.name}, and what it held is computed again")

    def _say_damaged_rows(self, rows: int) -> None:
        if rows and not self._has_said_rows:
            self._has_said_rows = True
            logger.warning(f"{self.path}: {rows} rows are damaged; what they held is computed again")

    def _unavailable(self, reason: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self.path}: the reference store cannot be used: {reason}; free space or permit writing there, or set "
            "PE_DPO_CACHE to another folder"
        )


def _select(connection: sqlite3.Connection, reference: str, keys: Sequence[bytes]) -> list[tuple[bytes, object]]:
    number = _number(connection, reference)
    rows: list[tuple[bytes, object]] = []
    for start in range(0, len(keys) if number is not None else 0, _KEYS_PER_QUERY):
        part = keys[start : start + _KEYS_PER_QUERY]
        query = f"SELECT key, value FROM answer WHERE reference = ? AND key IN ({','.join('?' * len(part))})"
        rows += connection.execute(query, (number, *part))
    return rows


def _number(connection: sqlite3.Connection, reference: str) -> int | None:
    row = connection.execute("SELECT id FROM reference WHERE name = ?", (reference.encode(),)).fetchone()
    return None if row is None else row[0]


def _pack(reference: str, key: bytes, stored: StoredLogprob) -> bytes:
    if not math.isfinite(stored.logprob):
        raise ValueError(f"log-prob of answer {key.hex()} is {stored.logprob}")
    number = struct.pack("<dq", stored.logprob, stored.tokens)
    return number + _checksum(reference.encode(), key, number)


def _unpack(reference: str, key: bytes, value: object) -> StoredLogprob | None:
    if not isinstance(value, bytes) or len(value) != 24 or value[16:] != _checksum(reference.encode(), key, value[:16]):
        return None
    return StoredLogprob(*struct.unpack("<dq", value[:16]))


def _checksum(*parts: bytes) -> bytes:
    """Return 8 bytes over the parts and their lengths."""
    return hashlib.sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts)).digest()[:8]

"""What the reference made of an answer, kept on disk: a run computes only what no earlier run has.

    (reference, prompt ids, answer ids, which of them are scored) → log-prob in nats, tokens

One SQLite file. A row holds 24 bytes: log-prob (float64), tokens (int64) and a checksum. Blobs, because SQLite's own REAL
loses the sign of -0.0. A file that cannot be read, or has a row that is not what was written, is set aside and begun anew: a
wrong number is never returned.

Every use opens the file anew and holds a lock file next to it: SQLite's own locks suffice for reading and writing, but not for
setting a file aside while another process has it open. The journal is SQLite's default, not a write-ahead log: that needs
memory shared by all processes, which network file systems do not have, and home folders of clusters lie on them.
"""

import hashlib
import json
import logging
import math
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from pe_dpo.disk import cache_folder, unlike_a_file
from pe_dpo.errors import StoreUnavailable, UsageError
from pe_dpo.model.fingerprint import ARITHMETIC

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


class StoredLogprob(NamedTuple):
    """What the reference made of one answer."""

    logprob: float
    """float64, nats, summed over the answer's tokens."""
    tokens: int


def answer_key(prompt_ids: np.ndarray, answer_ids: np.ndarray, scored: np.ndarray | None = None) -> bytes:
    """Return 32 bytes that stand for an answer after its prompt; the same tokens, divided or scored otherwise, have others.

    Args:
        prompt_ids: integers (P,).
        answer_ids: integers (A,).
        scored: bool (A,), which of its tokens count; None where all do.
    """
    prompt, answer = (np.asarray(ids).astype("<i4", casting="same_kind") for ids in (prompt_ids, answer_ids))
    digest = hashlib.sha256(struct.pack("<Q", prompt.size) + prompt.tobytes() + answer.tobytes())
    if scored is not None:  # a mask may not look like further tokens
        digest = hashlib.sha256(digest.digest() + np.packbits(scored).tobytes())
    return digest.digest()


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
    return cache_folder() / "reference.sqlite"


class ReferenceStore:
    """Log-probs of answers under references, and fingerprints of bases; several processes may use one file at once.

    A kill at any moment leaves every finished put whole and nothing of an unfinished one. A file that cannot be read is set
    aside (`reference.sqlite.damaged-1`), begun anew, and said.

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
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        self._carry_out(lambda connection: None)

    def get(self, reference: str, keys: Sequence[bytes]) -> dict[bytes, StoredLogprob]:
        """Return what is stored of the answers with these keys."""

        def select(connection: sqlite3.Connection) -> dict[bytes, StoredLogprob]:
            found: dict[bytes, StoredLogprob] = {}
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = keys[start : start + _KEYS_PER_QUERY]
                query = (
                    "SELECT key, value FROM answer WHERE reference = (SELECT id FROM reference WHERE name = ?) "
                    f"AND key IN ({','.join('?' * len(part))})"
                )
                for key, value in connection.execute(query, (reference.encode(), *part)):
                    found[key] = StoredLogprob(*struct.unpack("<dq", _checked(value, reference.encode(), key)))
            return found

        return self._carry_out(select)

    def put(self, reference: str, rows: Mapping[bytes, StoredLogprob]) -> None:
        """Store answers, all or none; what was stored under their keys is replaced.

        Raises:
            ValueError: a log-prob is not finite; nothing is stored.
        """
        name, values = reference.encode(), []
        for key, stored in rows.items():
            if not math.isfinite(stored.logprob):
                raise ValueError(f"log-prob of answer {key.hex()} is {stored.logprob}")
            values.append((name, key, _with_checksum(struct.pack("<dq", stored.logprob, stored.tokens), name, key)))

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR IGNORE INTO reference (name) VALUES (?)", (name,))
            query = "INSERT OR REPLACE INTO answer VALUES ((SELECT id FROM reference WHERE name = ?), ?, ?)"
            connection.executemany(query, values)

        self._carry_out(insert)

    def forget(self, reference: str) -> int:
        """Remove all answers of one reference and return how many there were."""
        query = "DELETE FROM answer WHERE reference = (SELECT id FROM reference WHERE name = ?)"
        return self._carry_out(lambda connection: connection.execute(query, (reference.encode(),)).rowcount)

    def remembered_fingerprint(self, identity: str) -> str | None:
        """Return the fingerprint that was remembered for a base, None if there is none."""

        def select(connection: sqlite3.Connection) -> str | None:
            query = "SELECT value FROM fingerprint WHERE identity = ?"
            row = connection.execute(query, (identity.encode(),)).fetchone()
            return None if row is None else _checked(row[0], identity.encode()).decode()

        return self._carry_out(select)

    def remember_fingerprint(self, identity: str, fingerprint: str) -> None:
        """Remember the fingerprint of a base, in place of an earlier one."""
        row = identity.encode(), _with_checksum(fingerprint.encode(), identity.encode())
        self._carry_out(lambda connection: connection.execute("INSERT OR REPLACE INTO fingerprint VALUES (?, ?)", row))

    def _carry_out(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Do one piece of work as one transaction; where the file cannot be read, once more on a new one."""
        with self._locked():
            try:
                try:
                    return self._transact(work)
                except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # messages quote the file, UTF-8 or not
                    # Errors of operation are no damage (locked, full, not permitted), unless a table is not there.
                    is_missing = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
                    if isinstance(error, sqlite3.OperationalError) and not is_missing:
                        raise
                    # The lock keeps others from a file that they have just begun anew.
                    names = (self.path.with_name(f"{self.path.name}.damaged-{number}") for number in range(1, 1_000_000))
                    aside = next(name for name in names if not name.exists())
                    # The file before its journal: SQLite drops a journal without a file, and would apply it to another.
                    for suffix in ("", "-journal"):
                        part = self.path.with_name(self.path.name + suffix)
                        if part.exists():
                            part.rename(aside.with_name(aside.name + suffix))
                    logger.warning(
                        f"{self.path} is damaged ({error}); it was moved to {aside.name}, and what it held is computed again"
                    )
                    return self._transact(work)
            except (sqlite3.DatabaseError, OSError) as error:
                raise self._unavailable(str(error)) from error

    def _transact(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        if self.path.exists():
            self._check_ours()
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        with closing(connection), connection:  # commits or rolls back, then closes
            connection.text_factory = bytes  # a damaged type makes text of a blob, and it need not be UTF-8
            connection.execute("BEGIN IMMEDIATE")
            if connection.execute("PRAGMA application_id").fetchone() == (0,):  # a new file
                for statement in (f"PRAGMA application_id = {_APPLICATION}", f"PRAGMA user_version = {_LAYOUT}", *_TABLES):
                    connection.execute(statement)
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

    def _check_ours(self) -> None:
        """Check whose file it is from its first bytes alone: SQLite may write into a file that it opens.

        Raises:
            UsageError: of another program or version.
        """
        if kind := unlike_a_file(self.path):
            raise UsageError(f"{self.path}: is {kind}, and a reference store is a file; name another, or leave it out")
        with self.path.open("rb") as file:
            header = file.read(100)
        if header and not header.startswith(b"SQLite") and not self.path.name.endswith((".sqlite", ".sqlite3", ".db")):
            raise UsageError(f"{self.path}: is no reference store by its name and content; it was left as it was; name another")
        if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
            return  # new, or no database at all, which SQLite says
        (layout,), (application,) = struct.unpack(">I", header[60:64]), struct.unpack(">I", header[68:72])
        if (application, layout) == (_APPLICATION, _LAYOUT):
            return
        found = "the database of another program"
        if application == _APPLICATION:
            found = f"a reference store of layout {layout}, and this version of pe-dpo reads layout {_LAYOUT}"
        raise UsageError(f"{self.path}: is {found}; it was left as it is; set PE_DPO_CACHE to another folder, or move the file")

    def _unavailable(self, reason: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self.path}: the reference store cannot be used: {reason}; free space or permit writing there, or set "
            "PE_DPO_CACHE to another folder"
        )


def _with_checksum(value: bytes, *names: bytes) -> bytes:
    """Return a value with 8 bytes over what it is stored under and itself, each with its length."""
    parts = b"".join(struct.pack("<Q", len(part)) + part for part in (*names, value))
    return value + hashlib.sha256(parts).digest()[:8]


def _checked(stored: object, *names: bytes) -> bytes:
    """Return a value without its checksum.

    Raises:
        sqlite3.DatabaseError: it is not what was stored under these names.
    """
    if not isinstance(stored, bytes) or stored != _with_checksum(stored[:-8], *names):
        raise sqlite3.DatabaseError("a row is not what was written")
    return stored[:-8]

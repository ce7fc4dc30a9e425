"""Encoded pairs as columns: token ids and names in Arrow, numbers in NumPy; a pair is built when it is asked for.

    tokens    ids      prompt, chosen and rejected one after another      a batch of Arrow, in memory or mapped from a file
              scored   of both answers, 0 or 1; null where all count
              where    the row for people
    numbers   three lengths, margin, β, weight, largest id, prompt key    one array each, (N,)
    rows      of a side, in its order: a pair that counts twice stands there twice, and none is copied

A pair of 250 tokens takes 1.1 kB so, where a list of `EncodedPair` takes 4.3 (measured on HH).
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from pe_dpo.data.pairs import EncodedPair

LENGTHS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
_HAS_CHOSEN_SCORED, _HAS_REJECTED_SCORED, _BEGINS_ALIKE = 1, 2, 4
"""Bits of `flags`."""
DIGESTS = ("prompt_digest", "chosen_digest", "rejected_digest")
"""Columns that only preparing needs: equal for equal token ids alone."""


class Columns(NamedTuple):
    """Some pairs as columns, as one process hands them to another."""

    ids: np.ndarray
    """int32, of all pairs one after another."""
    scored: list[np.ndarray | None]
    """Of each pair uint8 (C + R,), None where all tokens count."""
    where: list[str]
    numbers: dict[str, np.ndarray]
    """By name, (N,); prompt_key and the digests are uint8 (N, 32) and (N, 16), beta and weight there where pairs have some."""


def to_columns(pairs: Sequence[EncodedPair]) -> Columns:
    """Return pairs as columns, with what finding doubles among them takes."""
    parts = [part for pair in pairs for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    lengths = np.array([len(part) for part in parts], dtype=np.int32).reshape(-1, 3)
    ids = np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32, copy=False)
    begins = np.concatenate([[0], lengths.sum(axis=1).cumsum()[:-1]])[: len(pairs)]
    scored: list[np.ndarray | None] = []
    flags = np.zeros(len(pairs), dtype=np.uint8)
    for at, pair in enumerate(pairs):
        masks = pair.chosen_scored, pair.rejected_scored
        flags[at] = _HAS_CHOSEN_SCORED * (masks[0] is not None) + _HAS_REJECTED_SCORED * (masks[1] is not None)
        flags[at] += _BEGINS_ALIKE * _begins_alike(pair)
        whole = [
            np.ones(len(ids_of), np.uint8) if mask is None else mask
            for mask, ids_of in zip(masks, (pair.chosen_ids, pair.rejected_ids), strict=True)
        ]
        scored.append(
            np.concatenate(whole).astype(np.uint8) if flags[at] & (_HAS_CHOSEN_SCORED | _HAS_REJECTED_SCORED) else None
        )
    numbers: dict[str, Any] = {name: lengths[:, at] for at, name in enumerate(LENGTHS)}
    numbers["largest"] = np.maximum.reduceat(ids, begins) if pairs else np.empty(0, np.int32)
    numbers["flags"] = flags
    for name in ("margin", "beta", "weight"):
        values = [getattr(pair, name) for pair in pairs]
        if None not in values:
            numbers[name] = np.array(values, dtype=np.float64)
    keys = b"".join(bytes.fromhex(pair.prompt_key) for pair in pairs)
    numbers["prompt_key"] = np.frombuffer(keys, np.uint8).reshape(-1, 32)
    for at, name in enumerate(DIGESTS):
        joined = b"".join(hashlib.blake2b(part.tobytes(), digest_size=16).digest() for part in parts[at::3])
        numbers[name] = np.frombuffer(joined, np.uint8).reshape(-1, 16)
    return Columns(ids, scored, [pair.where for pair in pairs], numbers)


def _begins_alike(pair: EncodedPair) -> bool:
    """Return whether one answer is the beginning of the other, but for its end token."""
    shorter, longer = sorted((pair.chosen_ids, pair.rejected_ids), key=len)
    size = len(shorter) - (1 if shorter[-1] == longer[-1] else 0)
    return bool((shorter[:size] == longer[:size]).all())


def to_batch(columns: Columns) -> Any:
    """Return the tokens and names of columns as a record batch of Arrow."""
    import pyarrow as pa

    sizes = sum(columns.numbers[name].astype(np.int64) for name in LENGTHS)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    scored_sizes = [0 if mask is None else len(mask) for mask in columns.scored]
    masks = np.concatenate([np.empty(0, np.uint8), *(mask for mask in columns.scored if mask is not None)])
    scored_offsets = np.concatenate([[0], np.cumsum(scored_sizes)]).astype(np.int32)
    return pa.record_batch(
        {
            "ids": pa.ListArray.from_arrays(offsets, columns.ids),
            "scored": pa.ListArray.from_arrays(scored_offsets, masks.astype(np.uint8)),
            "where": pa.array([where.encode("utf-8", "surrogatepass") for where in columns.where], pa.binary()),
        }
    )


def join_columns(parts: Sequence[Columns]) -> Columns:
    """Return the columns of several parts, at least one, as those of one."""
    return Columns(
        np.concatenate([part.ids for part in parts]),
        [mask for part in parts for mask in part.scored],
        [where for part in parts for where in part.where],
        {name: np.concatenate([part.numbers[name] for part in parts]) for name in parts[0].numbers},
    )


class Batches:
    """Record batches as they are made: kept in memory, or written into a file and read from there.

    Args:
        path: The file; None for memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._kept: list[Any] = []
        self._writer: Any = None

    def append(self, batch: Any) -> None:
        """Keep one more."""
        if self.path is None:
            self._kept.append(batch)
            return
        import pyarrow as pa

        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self.path), batch.schema)
        self._writer.write_batch(batch)

    def finish(self) -> Sequence[Any]:
        """Return all of them; none may follow."""
        if self.path is None:
            return self._kept
        self._writer.close()
        return FileBatches(self.path)


class FileBatches(Sequence[Any]):
    """The record batches of a file.

    Args:
        path: The file.
        is_mapped: Whether they are what the system holds of the file, and take no memory of this process's own; else each is
            read anew when it is asked for.
    """

    def __init__(self, path: Path, *, is_mapped: bool = True) -> None:
        import pyarrow as pa

        self.path = path
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)) if is_mapped else pa.OSFile(str(path)))

    def __len__(self) -> int:
        return int(self._reader.num_record_batches)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._reader.get_batch(number)


class _Table:
    """All pairs that were encoded together, by their rows."""

    def __init__(self, batches: Sequence[Any], numbers: Mapping[str, np.ndarray]) -> None:
        self.batches, self.numbers = batches, numbers
        self.starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])]).astype(int).tolist()
        self._views: dict[int, tuple[Any, ...]] = {}

    def batch_of(self, row: int) -> tuple[int, int]:
        """Return the number of a row's batch, and its place there."""
        number = bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]

    def where(self, row: int) -> str:
        number, at = self.batch_of(row)
        name: bytes = self.view(number)[4][at].as_py()
        return name.decode("utf-8", "surrogatepass")

    def view(self, number: int, batches: Sequence[Any] | None = None) -> tuple[Any, ...]:
        """Return a batch as arrays: offsets and values of ids, of scored, and the rows' names."""
        if batches is None and number in self._views:
            return self._views[number]
        ids, scored, where = (self.batches if batches is None else batches)[number].columns
        arrays = (ids.offsets, ids.values, scored.offsets, scored.values)
        found = (*(array.to_numpy(zero_copy_only=True) for array in arrays), where)
        if batches is None:
            self._views[number] = found
        return found

    def pair(self, row: int) -> EncodedPair:
        number, at = self.batch_of(row)
        offsets, ids, scored_offsets, scored, _ = self.view(number)
        numbers = self.numbers
        prompt, chosen = (int(numbers[name][row]) for name in LENGTHS[:2])
        # A copy of some hundred numbers: torch warns of arrays that cannot be written, as mapped ones are.
        own = ids[offsets[at] : offsets[at + 1]].copy()
        flags, masks = int(numbers["flags"][row]), scored[scored_offsets[at] : scored_offsets[at + 1]].astype(bool)
        return EncodedPair(
            prompt_ids=own[:prompt],
            chosen_ids=own[prompt : prompt + chosen],
            rejected_ids=own[prompt + chosen :],
            margin=float(numbers["margin"][row]),
            where=self.where(row),
            prompt_key=numbers["prompt_key"][row].tobytes().hex(),
            chosen_scored=masks[:chosen] if flags & _HAS_CHOSEN_SCORED else None,
            rejected_scored=masks[chosen:] if flags & _HAS_REJECTED_SCORED else None,
            beta=float(numbers["beta"][row]) if "beta" in numbers else None,
            weight=float(numbers["weight"][row]) if "weight" in numbers else None,
        )


class EncodedPairs(Sequence[EncodedPair]):
    """Pairs of a table in some order; slices and selections share its memory.

    Args:
        table: From `pairs_of`.
        rows: Of the table, int64 (N,); a row may stand there several times.
        digest: What `data_hash` makes of them, where that is known.
    """

    def __init__(self, table: Any, rows: np.ndarray, *, digest: str | None = None) -> None:
        self.table, self.rows, self.digest = table, rows, digest

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, at: slice | np.ndarray) -> "EncodedPairs": ...
    def __getitem__(self, at: int | slice | np.ndarray) -> "EncodedPair | EncodedPairs":
        if isinstance(at, slice | np.ndarray):
            return EncodedPairs(self.table, self.rows[at])
        return self.table.pair(int(self.rows[at]))

    def __add__(self, other: "EncodedPairs") -> "EncodedPairs":
        """Return these pairs and then others of the same table."""
        assert other.table is self.table, "pairs that were not prepared together"
        return EncodedPairs(self.table, np.concatenate([self.rows, other.rows]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(EncodedPair.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def numbers(self, name: str) -> np.ndarray | None:
        """Return a column of numbers in the order of the pairs; None where these pairs have none of that name."""
        column = self.table.numbers.get(name)
        return None if column is None else column[self.rows]

    def where(self, at: int) -> str:
        """Return the row of one pair, for people."""
        return self.table.where(int(self.rows[at]))

    def hashed(self) -> "EncodedPairs":
        """Return the pairs with their hash; a file is read and not mapped, which would count as this process's memory."""
        digest, table = hashlib.sha256(), self.table
        source = table.batches
        source = FileBatches(source.path, is_mapped=False) if isinstance(source, FileBatches) else source
        numbers = table.numbers
        sizes = np.stack([numbers[name] for name in LENGTHS], axis=1).astype("<u8")
        last = -1
        view: tuple[Any, ...] = ()
        for row in self.rows.tolist():
            number, at = table.batch_of(row)
            if number != last:
                last, view = number, table.view(number, source)
            offsets, ids, scored_offsets, scored, _ = view
            begin, masks = offsets[at], scored[scored_offsets[at] : scored_offsets[at + 1]]
            for size in sizes[row]:
                digest.update(size.tobytes() + ids[begin : begin + int(size)].tobytes())
                begin += int(size)
            if len(masks):
                chosen, flags = int(sizes[row, 1]), int(numbers["flags"][row])
                for mask, flag in ((masks[:chosen], _HAS_CHOSEN_SCORED), (masks[chosen:], _HAS_REJECTED_SCORED)):
                    digest.update(b"scored" + np.packbits(mask).tobytes() if flags & flag else b"")
            digest.update(numbers["margin"][row].tobytes())
            for name in ("beta", "weight"):
                digest.update(name.encode() + numbers[name][row].tobytes() if name in numbers else b"")
        return EncodedPairs(table, self.rows, digest=digest.hexdigest())

    def distinct(self) -> "EncodedPairs":
        """Return each pair once, in the order in which they come first: without the copies that a weight asks for."""
        _, first = np.unique(self.rows, return_index=True)
        return self[np.sort(first)]


def pairs_of(batches: Sequence[Any], numbers: Mapping[str, np.ndarray]) -> EncodedPairs:
    """Return all pairs of some batches, from `to_batch`, with their numbers joined."""
    table = _Table(batches, numbers)
    return EncodedPairs(table, np.arange(table.starts[-1]))


def data_hash(encoded: Sequence[EncodedPair]) -> str:
    """Return the sha256, in 64 hex digits, over token ids, what of them is scored, and the numbers of all pairs in their order.

    The same data through another file format or row name hashes the same.
    """
    if isinstance(encoded, EncodedPairs) and encoded.digest is not None:
        return encoded.digest
    digest = hashlib.sha256()
    for pair in encoded:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i4").tobytes())
        for scored in (pair.chosen_scored, pair.rejected_scored):
            digest.update(b"" if scored is None else b"scored" + np.packbits(scored).tobytes())
        digest.update(np.float64(pair.margin).tobytes())
        for name, number in (("beta", pair.beta), ("weight", pair.weight)):
            digest.update(b"" if number is None else name.encode() + np.float64(number).tobytes())
    return digest.hexdigest()


def column(pairs: Sequence[EncodedPair], name: str) -> list[Any]:
    """Return one field of every pair in their order, without building the pairs.

    Args:
        pairs: Encoded pairs.
        name: margin, beta, weight, where, prompt_key or largest.
    """
    if not isinstance(pairs, EncodedPairs):
        return [getattr(pair, name) for pair in pairs]
    if name == "where":
        return list(map(pairs.table.where, pairs.rows.tolist()))
    values = pairs.numbers(name)
    if values is None:
        return [None] * len(pairs)
    return [key.tobytes().hex() for key in values] if name == "prompt_key" else values.tolist()


def lengths(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Return the tokens of prompt, chosen and rejected answer of every pair, int64 (N, 3)."""
    if isinstance(pairs, EncodedPairs):
        return np.stack([pairs.table.numbers[name][pairs.rows] for name in LENGTHS], axis=1).astype(np.int64)
    sizes = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    return np.array(sizes, dtype=np.int64).reshape(-1, 3)


def by_length(pairs: Sequence[EncodedPair]) -> list[int]:
    """Return the indices of pairs by `row_length`, the shortest first, those of one length in their order."""
    sizes = lengths(pairs)
    order: list[int] = np.argsort(sizes[:, 0] + sizes[:, 1:].max(axis=1), kind="stable").tolist()
    return order


def take(pairs: Sequence[EncodedPair], indices: np.ndarray) -> Sequence[EncodedPair]:
    """Return the pairs with these indices, in that order."""
    return pairs[indices] if isinstance(pairs, EncodedPairs) else [pairs[index] for index in indices.tolist()]


def with_keys(pairs: Sequence[EncodedPair], keys: Sequence[str]) -> Sequence[EncodedPair]:
    """Return the pairs with other prompt keys."""
    if not isinstance(pairs, EncodedPairs):
        return [
            pair if key == pair.prompt_key else replace(pair, prompt_key=key) for pair, key in zip(pairs, keys, strict=True)
        ]
    array = np.frombuffer(b"".join(map(bytes.fromhex, keys)), np.uint8).reshape(-1, 32)
    return EncodedPairs(_Table(pairs.table.batches, {**pairs.table.numbers, "prompt_key": array}), pairs.rows)


def same_answers(pairs: EncodedPairs) -> tuple[list[int], list[int], list[bool]]:
    """Return numbers of pairs just prepared that are equal for equal answers to one prompt key, and those of the pairs turned.

    The third list says where one answer is the beginning of the other.
    """
    keys, chosen, rejected = (pairs.table.numbers[name][pairs.rows] for name in ("prompt_key", *DIGESTS[1:]))
    count = len(pairs)
    _, prompt = np.unique(_as_bytes(keys), return_inverse=True)
    _, answer = np.unique(np.concatenate([_as_bytes(chosen), _as_bytes(rejected)]), return_inverse=True)
    one, other = answer[:count].astype(np.int64), answer[count:].astype(np.int64)
    _, both = np.unique(np.concatenate([one * 2 * count + other, other * 2 * count + one]), return_inverse=True)
    order, reverse = (prompt.astype(np.int64) * 2 * count + half for half in (both[:count], both[count:]))
    return order.tolist(), reverse.tolist(), (pairs.table.numbers["flags"][pairs.rows] & _BEGINS_ALIKE > 0).tolist()


def same_prompts(pairs: EncodedPairs, others: EncodedPairs) -> np.ndarray:
    """Return the indices of pairs just prepared whose prompt ids some of the others have, too."""
    ids, theirs = (_as_bytes(some.table.numbers[DIGESTS[0]][some.rows]) for some in (pairs, others))
    return np.flatnonzero(np.isin(ids, theirs))


def _as_bytes(rows: np.ndarray) -> np.ndarray:
    """Return each row of bytes as one value; all are of one length, so that zeros at an end make no two alike."""
    return np.ascontiguousarray(rows).view(f"S{rows.shape[1]}")[:, 0]

"""Weights on disk, tensor by tensor: memory is bounded by the largest tensor, whatever the size of the model."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pe_dpo.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in safetensors files; https://huggingface.co/docs/safetensors, format."""

SHARD_BYTES = 5 * 10**9
"""Most bytes of one file, as transformers' save_pretrained."""


class TensorFacts(NamedTuple):
    """One tensor of a model on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class TensorFiles:
    """The safetensors files of a model, read one tensor at a time.

    Args:
        folder: with model.safetensors, or shards and their index.
        stem: of the files' names; "adapter_model" for an adapter.

    Raises:
        ModelError: no such files, a shard is missing, or a file is damaged.
    """

    def __init__(self, folder: str | Path, stem: str = "model") -> None:
        self.folder, self._stem = Path(folder), stem
        self._promised: dict[str, str] = {}
        self._file_of = {name: file for file in self._files() for name in self._names(file)}
        lost = sorted(self._promised.keys() - self._file_of.keys())
        if lost:
            where = self.folder / self._promised[lost[0]]
            raise ModelError(f"{where}: does not have {lost[0]}, which the index says is there; fetch the model again")

    def __iter__(self) -> Iterator[TensorFacts]:
        return (self.facts(name) for name in self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._file_of[name]

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, as it is stored."""
        try:
            with safe_open(self._file_of[name], framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self._file_of[name]}: {name} cannot be read: {error}") from error

    def facts(self, name: str) -> TensorFacts:
        """Return name, shape and dtype of a tensor without reading it."""
        file = self._file_of[name]
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(name)
            return TensorFacts(name, tuple(part.get_shape()), self._dtype(file, name, part.get_dtype()))

    def _files(self) -> list[Path]:
        single = self.folder / f"{self._stem}.safetensors"
        index = self.folder / f"{single.name}.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            raise ModelError(f"{self.folder}: neither {single.name} nor an index of shards there; only safetensors are read")
        try:
            self._promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = self._promised.values()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: is no index of shards ({error!r}); fetch the model again") from error
        if not all(isinstance(name, str) for name in names):
            raise ModelError(f"{index}: is no index of shards (it names files by {names}); fetch the model again")
        return [self.folder / name for name in dict.fromkeys(names)]

    def _names(self, file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read ({error}); fetch the model again") from error

    def _dtype(self, file: Path, name: str, dtype: str) -> torch.dtype:
        if dtype not in DTYPES:
            raise ModelError(f"{file}: {name} has dtype {dtype}, which this version does not know")
        return DTYPES[dtype]


class TensorWriter:
    """Writes safetensors shards and their index, one tensor after the other, in the order announced.

    Args:
        folder: that exists; the files are synced to disk when the writer closes.
        tensors: all that will be written, in their order.
        shard_bytes: most bytes of one file; a larger tensor has a file of its own.
    """

    def __init__(self, folder: str | Path, tensors: Sequence[TensorFacts], *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = Path(folder)
        self._shards = _divide(tensors, shard_bytes)
        self._waiting = iter([(shard, facts) for shard, members in enumerate(self._shards) for facts in members])
        self._open: tuple[int, Any] | None = None
        self._digest = hashlib.sha256()
        self.hashes: dict[str, str] = {}
        """sha256 (hex) of each finished file, of the bytes as they were handed over."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Raises:
            ValueError: it is not the one announced: our own mistake.
        """
        shard, facts = next(self._waiting, (-1, None))
        if facts is None or (name, tuple(tensor.shape), tensor.dtype) != tuple(facts):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} is written where {facts} was announced")
        if self._open is None or self._open[0] != shard:
            self._finish_shard()
            self._open = shard, (self.folder / self._name(shard)).open("wb")
            self._append(_header(self._shards[shard]))
        self._append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.close()
        elif self._open is not None:
            self._open[1].close()

    def close(self) -> None:
        """Finish the last shard and write the index where there are several.

        Raises:
            ValueError: an announced tensor is missing.
        """
        self._finish_shard()
        missing = next(self._waiting, None)
        if missing is not None:
            raise ValueError(f"{missing[1].name} was announced and not written")
        if len(self._shards) > 1:
            where = {facts.name: self._name(shard) for shard, members in enumerate(self._shards) for facts in members}
            size = sum(facts.bytes for members in self._shards for facts in members)
            index = {"metadata": {"total_size": size}, "weight_map": where}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _append(self, data: Any) -> None:
        assert self._open is not None, "a shard was opened"
        self._open[1].write(data)
        self._digest.update(data)

    def _name(self, shard: int) -> str:
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors" if len(self._shards) > 1 else "model.safetensors"

    def _finish_shard(self) -> None:
        if self._open is not None:
            shard, file = self._open
            self.hashes[self._name(shard)] = self._digest.hexdigest()
            self._digest = hashlib.sha256()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._open = None


def _divide(tensors: Sequence[TensorFacts], shard_bytes: int) -> list[list[TensorFacts]]:
    shards: list[list[TensorFacts]] = [[]]
    size = 0
    for facts in tensors:
        if shards[-1] and size + facts.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(facts)
        size += facts.bytes
    return shards


def _header(tensors: Sequence[TensorFacts]) -> bytes:
    """Length as 8 bytes, little-endian, then JSON of where each tensor lies, filled up to a multiple of 8."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for facts in tensors:
        entries[facts.name] = {
            "dtype": names[facts.dtype],
            "shape": list(facts.shape),
            "data_offsets": [offset, offset + facts.bytes],
        }
        offset += facts.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

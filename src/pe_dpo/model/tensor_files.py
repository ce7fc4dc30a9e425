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
from pe_dpo.printable import one_line

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


class TensorInfo(NamedTuple):
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
        self.folder = Path(folder)
        single = self.folder / f"{stem}.safetensors"
        index = self.folder / f"{single.name}.index.json"
        where: dict[str, str] = {}
        if not single.is_file():
            if not index.is_file():
                raise ModelError(f"{folder}: neither {single.name} nor an index of shards there; only safetensors are read")
            try:
                where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                if not all(isinstance(file, str) for file in where.values()):
                    raise ValueError(f"it names files by {where.values()}")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise ModelError(f"{index}: is no index of shards ({one_line(repr(error))}); fetch the model again") from error
        self.file_of: dict[str, Path] = {}
        """The file that holds each tensor."""
        for file in [self.folder / name for name in dict.fromkeys(where.values())] or [single]:
            try:
                with safe_open(file, framework="pt") as opened:
                    self.file_of |= dict.fromkeys(opened.keys(), file)
            except (OSError, SafetensorError, ValueError) as error:  # a name that no file can have
                raise ModelError(f"{one_line(file)}: cannot be read ({one_line(error)}); fetch the model again") from error
        lost = sorted(where.keys() - self.file_of.keys())
        if lost:
            name = one_line(self.folder / where[lost[0]])
            raise ModelError(f"{name}: does not have {one_line(lost[0])}, which the index says is there; fetch the model again")

    def __iter__(self) -> Iterator[TensorInfo]:
        return (self.info(name) for name in self.file_of)

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, as it is stored."""
        return self._read(self.file_of[name], name)

    def _read(self, file: Path, name: str) -> Tensor:
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: {one_line(name)} cannot be read: {one_line(error)}") from error

    def info(self, name: str) -> TensorInfo:
        """Return name, shape and dtype of a tensor without reading it."""
        file = self.file_of[name]
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(name)
            shape, dtype = part.get_shape(), part.get_dtype()
        if dtype not in DTYPES:
            raise ModelError(f"{file}: {one_line(name)} has dtype {dtype}, which this version does not know")
        return TensorInfo(name, tuple(shape), DTYPES[dtype])


class TensorWriter:
    """Writes safetensors shards and their index, one tensor after the other, in the order announced.

    Args:
        folder: that exists; the files are synced to disk when the writer closes.
        tensors: all that will be written, in their order.
        shard_bytes: most bytes of one file; a larger tensor has a file of its own.
    """

    def __init__(self, folder: str | Path, tensors: Sequence[TensorInfo], *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = Path(folder)
        self._shards: list[list[TensorInfo]] = [[]]
        size = 0
        for info in tensors:
            if self._shards[-1] and size + info.bytes > shard_bytes:
                self._shards.append([])
                size = 0
            self._shards[-1].append(info)
            size += info.bytes
        count = len(self._shards)
        self._names = [f"model-{shard:05d}-of-{count:05d}.safetensors" for shard in range(1, count + 1)]
        if count == 1:
            self._names = ["model.safetensors"]
        self._waiting = iter([(shard, info) for shard, members in enumerate(self._shards) for info in members])
        self._open: tuple[int, Any] | None = None
        self._digest = hashlib.sha256()
        self.hashes: dict[str, str] = {}
        """sha256 (hex) of each finished file, of the bytes as they were handed over."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Raises:
            ValueError: it is not the one announced: our own mistake.
        """
        shard, info = next(self._waiting, (-1, None))
        if info is None or (name, tuple(tensor.shape), tensor.dtype) != tuple(info):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} is written where {info} was announced")
        if self._open is None or self._open[0] != shard:
            self._finish_shard()
            self._open = shard, (self.folder / self._names[shard]).open("wb")
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
            shards = list(zip(self._names, self._shards, strict=True))
            where = {info.name: name for name, members in shards for info in members}
            size = sum(info.bytes for members in self._shards for info in members)
            index = {"metadata": {"total_size": size}, "weight_map": where}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _append(self, data: Any) -> None:
        assert self._open is not None, "a shard was opened"
        self._open[1].write(data)
        self._digest.update(data)

    def _finish_shard(self) -> None:
        if self._open is not None:
            shard, file = self._open
            self.hashes[self._names[shard]] = self._digest.hexdigest()
            self._digest = hashlib.sha256()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._open = None


def _header(tensors: Sequence[TensorInfo]) -> bytes:
    """Length as 8 bytes, little-endian, then JSON of where each tensor lies, filled up to a multiple of 8."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in tensors:
        entries[info.name] = {
            "dtype": names[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.bytes],
        }
        offset += info.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

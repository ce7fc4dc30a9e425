"""A base's weights as they lie on disk, whatever they were stored as, read as if each tensor were whole.

safetensors                        TensorFiles, as they are
  name.weight.quant_state.bitsandbytes__nf4, .absmax, …     codes of 4 bits, JSON and scales              FourBitFiles
  name.weight_scale_inv                                     of fp8 codes, by blocks or one for all        Fp8Files
  name_blocks, name_scales                                  codes of 4 bits in blocks of 32 (MXFP4)       Mxfp4Files
pytorch_model.bin                  BinFiles, without running anything that lies in them
"""

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pe_dpo.errors import ModelError
from pe_dpo.model.base import NO_TENSORS
from pe_dpo.model.quantization import coded_shape, dequantized, stored_parameter, stored_quantization
from pe_dpo.model.tensor_files import TensorFiles, TensorInfo

_STATE = ".quant_state.bitsandbytes__"
_MXFP4_BLOCK = 32


def weight_files(folder: str | Path) -> TensorFiles:
    """Return the files of a base that can be read tensor by tensor.

    Args:
        folder: with config.json and the weights.

    Raises:
        ModelError: no weights there, damaged ones, or codes of a library that cannot be read.
    """
    folder = Path(folder)
    if not any(folder.glob("model*.safetensors*")) and any(folder.glob("pytorch_model*.bin")):
        return BinFiles(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = config.get("quantization_config") or {}
        method = str(settings.get("quant_method"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / 'config.json'}: cannot be read ({error!r})") from error
    if not settings or stored_quantization(settings) == "int8":
        return TensorFiles(folder)
    if stored_quantization(settings) is not None:
        return FourBitFiles(folder)
    if method == "fp8":
        return Fp8Files(folder, settings.get("weight_block_size") or None)
    if method == "mxfp4":
        return Mxfp4Files(folder)
    raise ModelError(
        f"{folder}: its weights are {method} codes, which cannot be read here; name the model that they were made of, or one "
        "quantized by bitsandbytes"
    )


class _CodedFiles(TensorFiles):
    """Safetensors some of whose tensors are codes; what belongs to a code is no tensor of its own.

    Args:
        folder: with model.safetensors, or shards and their index.
    """

    parts: Mapping[str, list[str]]
    """Names in the files of all that a tensor with codes is made of, by its own."""

    def _hold(self, parts: Mapping[str, list[str]]) -> None:
        taken = {part for names in parts.values() for part in names}
        self.parts, self._files = parts, dict(self.file_of)
        self.file_of = {name: file for name, file in self._files.items() if name not in taken}
        self.file_of |= {name: self._files[names[0]] for name, names in parts.items()}

    def stored(self, part: str) -> Tensor:
        """Return a tensor of the files as it lies there, on the CPU.

        Raises:
            ModelError: it cannot be read.
        """
        return self._read(self._files[part], part)


class FourBitFiles(_CodedFiles):
    """Codes of 4 bits as bitsandbytes saves them; see its `QuantState.as_dict`."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        parts = {name.partition(_STATE)[0]: [name] for name in self.file_of if _STATE in name}
        for name in self.file_of:
            owner = f"{name.partition('.weight')[0]}.weight"
            if owner in parts and name not in parts[owner]:
                parts[owner].append(name)
        self._hold(parts)

    def codes(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        """Return the 4-bit parameter that loading makes of a tensor.

        Args:
            name: of a tensor with codes.
            dtype: to compute in.
            device: to put it on; the codes are the same everywhere.
        """
        scales = {part.removeprefix(f"{name}."): self.stored(part) for part in self.parts[name] if part != name}
        return stored_parameter(self.stored(name), scales, dtype, device=device)

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, as it is stored; of codes the values that they stand for, float32."""
        return dequantized(self.codes(name, torch.float32)) if name in self.parts else super().read(name)

    def info(self, name: str) -> TensorInfo:
        """Return name, shape and dtype of a tensor; of codes, those of the weight that they were made of.

        Raises:
            ModelError: the file does not say these.
        """
        if name not in self.parts:
            return super().info(name)
        state = self.parts[name][0]
        try:
            return TensorInfo(name, *coded_shape(self.stored(state)))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{self._files[state]}: {state} does not say what {name} is ({error!r})") from error


class Fp8Files(_CodedFiles):
    """Weights in 8-bit floats, each block of them, or all, times a scale (DeepSeek-V3, arXiv 2412.19437, section 3.3).

    Args:
        folder: with model.safetensors, or shards and their index.
        block: rows and columns that share a scale, None where a tensor has one.
    """

    def __init__(self, folder: str | Path, block: list[int] | None) -> None:
        super().__init__(folder)
        self.block, parts = block, {}
        for name in self.file_of:
            owner = name.removesuffix("_scale_inv")
            if owner != name and owner in self.file_of:
                activation = f"{owner.removesuffix('weight')}activation_scale"  # of what flows in, where it is fixed
                parts[owner] = [owner, name, *([activation] if activation in self.file_of else [])]
        self._hold(parts)

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, as it is stored; of codes the values that they stand for, float32."""
        if name not in self.parts:
            return super().read(name)
        codes, scales = (self.stored(part).float() for part in self.parts[name][:2])
        if scales.numel() > 1 and self.block is not None:
            for dim, size in ((-2, self.block[0]), (-1, self.block[1])):
                scales = scales.repeat_interleave(size, dim).narrow(dim, 0, codes.shape[dim])
        return codes * scales

    def info(self, name: str) -> TensorInfo:
        """Return name, shape and dtype of a tensor; of codes, the dtype that their values are kept in."""
        if name not in self.parts:
            return super().info(name)
        with safe_open(self._files[name], framework="pt") as opened:
            return TensorInfo(name, tuple(opened.get_slice(name).get_shape()), torch.bfloat16)


class Mxfp4Files(_CodedFiles):
    """Expert weights in the OCP microscaling format of 4 bits, as gpt-oss has them; transformers unpacks them."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        names = [name.removesuffix("_blocks") for name in self.file_of if name.endswith("_blocks")]
        self._hold({name: [f"{name}_blocks", f"{name}_scales"] for name in names if f"{name}_scales" in self.file_of})

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, as it is stored; of codes the values that they stand for, float32 (experts, in, out)."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        if name not in self.parts:
            return super().read(name)
        return convert_moe_packed_tensors(*map(self.stored, self.parts[name]), dtype=torch.float32)

    def info(self, name: str) -> TensorInfo:
        """Return name, shape and dtype of a tensor; of codes, the dtype that their values are kept in."""
        if name not in self.parts:
            return super().info(name)
        blocks = self.parts[name][0]
        with safe_open(self._files[blocks], framework="pt") as opened:
            *outer, rows, count, _ = opened.get_slice(blocks).get_shape()
        return TensorInfo(name, (*outer, count * _MXFP4_BLOCK, rows), torch.bfloat16)


class BinFiles(TensorFiles):
    """Weights as torch pickles them, unpickled by its reader that makes tensors and nothing else.

    Args:
        folder: with pytorch_model.bin, or shards and their index.

    Raises:
        ModelError: a shard is missing, or is not what torch saves of tensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tensors: dict[str, Tensor] = {}
        self.file_of = {}
        for file in sorted(self.folder.glob("pytorch_model*.bin")):
            try:
                held = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
                raise ModelError(f"{file}: {NO_TENSORS}") from error
            if not isinstance(held, dict) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
                raise ModelError(f"{file}: {NO_TENSORS}")
            self._tensors |= held
            self.file_of |= dict.fromkeys(held, file)
        index = self.folder / "pytorch_model.bin.index.json"
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
            lost = sorted(where.keys() - self.file_of.keys())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: is no index of shards ({error!r}); fetch the model again") from error
        if lost:
            raise ModelError(f"{index}: names {lost[0]}, which no file there has; fetch the model again")

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, as it is stored."""
        return self._tensors[name].contiguous()

    def info(self, name: str) -> TensorInfo:
        """Return name, shape and dtype of a tensor without reading it."""
        tensor = self._tensors[name]
        return TensorInfo(name, tuple(tensor.shape), tensor.dtype)

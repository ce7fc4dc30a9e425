"""Identity of the weights that a reference is made of, as loaded: another base, or another quantization, is another hash.

    tensor → sha256(shape, dtype, bytes)          in a pool of threads; hashlib lets go of the interpreter lock
    base   → sha256(sorted lines "name hex")      adapters left out; names as without PEFT

The base as it lies on disk has an identity too (sizes and times of its files, or the hub's commit), which costs nothing to
read; with it the hash of a large base is remembered from run to run.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pe_dpo.model.adapter_config import REFERENCE
from pe_dpo.model.base import BaseInfo

ARITHMETIC = 3
"""Of this package: part of every key, to be raised with any change that moves a log-prob or loads a base otherwise."""

version = cache(importlib.metadata.version)
"""Of an installed library, read once."""

_PART_BYTES = 64 * 1024 * 1024
"""Of a tensor on a GPU, each thread brings this much to the CPU at a time."""
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")
_NO_ARITHMETIC = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config", "architectures"),
}
_THREADS = 8
"""At most: each holds a part, and the bus to the GPU is busy with fewer."""


def base_fingerprint(model: nn.Module, tensors: Mapping[str, str] | None = None) -> str:
    """Return sha256 (hex) over the weights of a loaded base, adapters left out.

    Quantized weights count with their scales, so the hash stands for exactly what the reference computes with. The same with
    and without PEFT around the base, before and after training and forwards. One pass over the weights.

    Args:
        model: a loaded base, or a PEFT model around it.
        tensors: its `tensor_fingerprints` where they are known, which saves the pass.
    """
    return _sha256_of_lines(tensors or tensor_fingerprints(model))


def tensor_fingerprints(model: nn.Module) -> dict[str, str]:
    """Return sha256 (hex) of each parameter, persistent buffer and quantization state of a base, by name.

    Shape and dtype count. Tied weights appear once, under the first of their names in the alphabet.
    """
    return _hashes(_named_tensors(model))


def parameter_fingerprints(model: nn.Module, tensors: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return sha256 (hex) of each parameter and persistent buffer, codes and scales of a quantized one taken together.

    Arguments are those of `base_fingerprint`.
    """
    whole: dict[str, dict[str, str]] = {}
    found = tensors or tensor_fingerprints(model)
    for name, value in found.items():
        steps = name.split(".")
        owners = (".".join(steps[:count]) for count in range(len(steps) - 1, 0, -1))
        owner = next((owner for owner in owners if owner in found), name)
        whole.setdefault(owner, {})[name.removeprefix(owner).removeprefix(".")] = value
    return {name: _of_parts(parts) for name, parts in whole.items()}


def parameter_fingerprint(parameter: Any) -> str:
    """Return sha256 (hex) of one parameter, quantized or not, as `parameter_fingerprints` has it."""
    state = getattr(parameter, "quant_state", None)
    scales = {} if state is None else state.as_dict(packed=True)
    return _of_parts({part: _sha256(tensor) for part, tensor in {"": parameter.data, **scales}.items()})


def file_fingerprints(folder: str | Path, names: Iterable[str], *, believe_names: bool = False) -> dict[str, str]:
    """Return sha256 (hex) of files, by name.

    Args:
        folder: where they lie.
        names: of the files.
        believe_names: take the name of a file in the hub's cache, which is the sha256 of a large one, without reading it.
    """

    def sha256(name: str) -> str:
        path = (Path(folder) / name).resolve()
        if believe_names and re.fullmatch("[0-9a-f]{64}", path.name):
            return path.name
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    ordered = sorted(names)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(sha256, ordered), strict=True))


def reference_fingerprint(model: nn.Module, *, base: str | None = None) -> str:
    """Return sha256 (hex) over what π0 computes with: the base, and the frozen adapter where the reference is one.

    The trained adapter does not count. Without a frozen adapter this is the base's hash.

    Args:
        model: a loaded base, or a PEFT model around it.
        base: the base's hash where it is known already (see `remembered_fingerprint`), to save the pass over the weights.
    """
    base = base_fingerprint(model) if base is None else base
    if REFERENCE not in getattr(model, "peft_config", {}):
        return base
    frozen = _named_tensors(model, adapter=REFERENCE)
    scaling = {
        f"{plain_name(name)}.scaling": float(module.scaling[REFERENCE]).hex()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and REFERENCE in module.scaling
    }
    return _sha256_of_lines({"base": base, **_hashes(frozen), **scaling})


def arithmetic_config(config: Any) -> dict[str, Any]:
    """Return what a model's configuration says of its arithmetic: rotary base, norms, scales and so on.

    Left out is what names the model, or how it is loaded and run.
    """
    says = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in says.items() if key not in _NO_ARITHMETIC and not key.startswith("_attn")}


def config_fingerprint(config: Any) -> str:
    """Return sha256 (hex) over what a model's configuration says of its arithmetic."""
    return hashlib.sha256(json.dumps(arithmetic_config(config), sort_keys=True).encode()).hexdigest()


def base_identity(info: BaseInfo, device: str) -> str | None:
    """Return what tells the files of a base, and how they are loaded, from all others without reading the weights.

    For a folder that is where it lies, and name, size, times and inode of its configuration and weight files; for a name on
    the hub the commit. The versions count because another library may quantize to other bits, and the device because a CPU and
    a GPU may round differently while they quantize the same files.

    Args:
        info: of the base.
        device: "cpu" or "cuda", on which it is loaded.

    Returns:
        A name, or None if nothing identifies the base (a hub name whose commit is unknown, a folder without weights).
    """
    folder = Path(info.base)
    commit = getattr(info.config, "_commit_hash", None)
    source: list[Any] = [info.base, commit]
    if folder.is_dir():
        weights = [path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)]
        stats = sorted((path.name, path.stat()) for path in (folder / "config.json", *weights))
        # ctime too, as a copying tool may set mtime back.
        files = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats]
        source = [str(folder.resolve()), *files]
        if not weights:
            return None
    elif not commit:
        return None
    versions = [version(library) for library in ("torch", "transformers", "bitsandbytes")]
    codes = [info.quantize, info.quantize_experts, info.quantize_bypassed]
    loaded = json.dumps([ARITHMETIC, source, *codes, str(info.dtype), versions])
    return f"{hashlib.sha256(loaded.encode()).hexdigest()} {device}"


def plain_name(name: str) -> str:
    """Return what a module or tensor of a PEFT model is called in the base."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _named_tensors(model: nn.Module, *, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """Return each tensor that determines what a base computes, or one of its adapters, once, under its plain name.

    These are parameters, persistent buffers and quantization states, named as in the state dict. Not the state dict itself:
    asking for it makes bitsandbytes rewrite weights that it has repacked for the CPU.
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, module in model.named_modules():
        own: list[tuple[str, Any]] = []
        for name, parameter in module.named_parameters(recurse=False):
            own.append((name, parameter))
            state = getattr(parameter, "quant_state", None)
            if state is not None:  # nf4
                own += [(f"{name}.{key}", tensor) for key, tensor in state.as_dict(packed=True).items()]
        own += [buffer for buffer in module.named_buffers(recurse=False) if buffer[0] not in module._non_persistent_buffers_set]
        # int8: the first forward moves the scales from the weight to the layer's state.
        holders = (getattr(module, "weight", None), getattr(module, "state", None))
        scales = (getattr(holder, "SCB", None) for holder in holders)
        own += [("SCB", scale) for scale in scales if isinstance(scale, torch.Tensor)]
        for leaf, tensor in own:
            if tensor.is_meta:
                continue  # in the files
            name = plain_name(f"{path}.{leaf}" if path else leaf)
            found[id(tensor)] = min((name, tensor), found.get(id(tensor), (name, tensor)), key=lambda pair: pair[0])
    parts = {name: name.split(".") for name, _ in found.values()}
    of_adapters = {name for name, steps in parts.items() if any(step.startswith("lora_") for step in steps)}
    if adapter is None:
        return {name: tensor for name, tensor in found.values() if name not in of_adapters}
    return {name: tensor for name, tensor in found.values() if name in of_adapters and adapter in parts[name]}


def _hashes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    # The largest first: an embedding that comes last would keep one thread busy and the others waiting.
    names = sorted(tensors, key=lambda name: (-tensors[name].nbytes, name))
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _sha256(tensors[name]), names)
        return dict(sorted(zip(names, digests, strict=True)))


def _of_parts(parts: dict[str, str]) -> str:
    """The hash of a plain tensor is its own; that of a quantized one is over its parts."""
    return parts[""] if set(parts) == {""} else _sha256_of_lines(parts)


def _sha256(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    flat = tensor.data.contiguous().reshape(-1).view(torch.uint8)
    for part in flat.split(_PART_BYTES):
        digest.update(part.to("cpu").numpy().data)
    return digest.hexdigest()


def _sha256_of_lines(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(hashes.items())).encode()).hexdigest()

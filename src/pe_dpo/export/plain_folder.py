"""A base whose weights cannot be trained on as they lie, fp8 or MXFP4 codes, say, written as plain 16-bit safetensors.

Tensor by tensor from files to files, each under the name it had, so that any architecture goes and memory is bounded by the
largest tensor.
"""

import json
import shutil
from pathlib import Path

import torch

from pe_dpo.errors import UsageError
from pe_dpo.model.provenance import base_folder
from pe_dpo.model.tensor_files import TensorInfo, TensorWriter
from pe_dpo.model.weight_files import weight_files
from pe_dpo.progress import advance, progress
from pe_dpo.runs.staging import staged

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5")


def export_plain(base: str, output: Path, *, revision: str | None = None) -> int:
    """Write a base with plain weights, and all other files that lie beside them; return how many tensors were codes.

    Codes become the values that they stand for, in bfloat16 (bitsandbytes' in the dtype that they were made of); other tensors
    stay what they are.

    Args:
        base: path or hub id.
        output: a new or empty folder.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelError: its files cannot be had or read, or the disk is full.
        UsageError: the output is taken, or the weights are plain safetensors already.
    """
    source = base_folder(base, revision)
    files = weight_files(source)
    coded = set(getattr(files, "parts", {}))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if not coded and any(source.glob("model*.safetensors")):
        raise UsageError(f"{base}: its weights are plain safetensors already; name it in model.base as it is")
    config.pop("quantization_config", None)
    with staged(output) as folder:
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith(".") and not any(path.match(pattern) for pattern in _WEIGHTS):
                shutil.copyfile(path, folder / path.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        tensors: list[TensorInfo] = list(files)
        total, done = sum(tensor.bytes for tensor in tensors), 0
        with torch.no_grad(), progress("writing"), TensorWriter(folder, tensors) as writer:
            for tensor in tensors:
                writer.write(tensor.name, files.read(tensor.name).to(tensor.dtype))
                done += tensor.bytes
                advance(done, total)
    return len(coded)

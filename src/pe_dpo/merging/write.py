"""The merge itself, tensor by tensor from files to files; memory is bounded by the largest tensor, never by the model.

    dequantized   Ŵ = round(dequantize(quantize(W)) + ΔW)      all in float32, rounded once; what was 4-bit in training
    original      Ŵ = round(W + ΔW)

Beside the weights go all files that a server needs, so that it can serve nothing else by mistake.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pe_dpo.errors import ModelError
from pe_dpo.merging.merged_tensor import MergedTensor, merge_tensor
from pe_dpo.merging.plan import Plan
from pe_dpo.merging.source import Source
from pe_dpo.merging.training_base import TrainingBase
from pe_dpo.model.config_file import derived_config
from pe_dpo.model.fingerprint import file_fingerprints
from pe_dpo.model.tensor_files import TensorWriter
from pe_dpo.model.tokenizer_files import save_tokenizer
from pe_dpo.progress import advance, progress

_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def write(plan: Plan, folder: Path, base: TrainingBase | None = None) -> tuple[list[MergedTensor], dict[str, str]]:
    """Write the merged weights and all that belongs to them; return what became of each tensor, and sha256 of each file.

    Args:
        plan: of the merge.
        folder: that exists.
        base: as it was just loaded, where it was; onto the original, and without it, base.json counts.

    Raises:
        ModelError: see `write_tensors`; or a file, or the tokenizer, does not read back as it was written.
    """
    source = plan.source
    with TensorWriter(folder, [tensor.facts for tensor in plan.tensors]) as writer:
        if base is None or plan.onto == "original":
            base = TrainingBase.from_record(source, plan.onto)
        merged = write_tensors(plan, writer, base)
    read_back = file_fingerprints(folder, writer.hashes)
    torn = [name for name, value in writer.hashes.items() if read_back[name] != value]
    if torn:
        raise ModelError(f"{torn[0]}: does not read back from disk as it was written; look at the disk")
    copy_support_files(source, folder, dtype=plan.dtype, config_changes=plan.config_changes)
    return merged, writer.hashes


def write_tensors(plan: Plan, writer: TensorWriter, base: TrainingBase) -> list[MergedTensor]:
    """Write all tensors and return what became of those that the adapter changes.

    Args:
        plan: of the merge.
        writer: that expects the plan's tensors in their order; closed by the caller.
        base: each tensor is checked against it.

    Raises:
        ModelError: a tensor is not the one of training, or has no finite place in the dtype written.
    """
    merged = []
    total, done = sum(tensor.facts.bytes for tensor in plan.tensors), 0
    with torch.no_grad(), progress("merging"):
        for planned in plan.tensors:
            weight = base.read(planned, plan.onto)
            if planned.change is None:
                result = weight.to(planned.facts.dtype)
            else:
                result, report = merge_tensor(plan, planned, weight.to(base.device).float())
                merged.append(report)
            if not bool(result.isfinite().all()):
                raise ModelError(f"{planned.facts.name}: would not be finite in {result.dtype}; write `dtype` bf16 or fp32")
            writer.write(planned.facts.name, result.cpu())
            done += planned.facts.bytes
            advance(done, total)
    return merged


def copy_support_files(source: Source, folder: Path, *, dtype: torch.dtype, config_changes: Mapping[str, Any]) -> None:
    """Write configuration, generation settings, tokenizer with chat template, and the base's licence files beside the weights.

    Args:
        source: that was merged.
        folder: of the merged weights.
        dtype: of the merged weights.
        config_changes: of the text model's configuration; see `plan.Plan`.

    Raises:
        ModelError: the tokenizer does not come back from disk as it was in training.
    """
    config = derived_config(source.base_folder, source.facts.config, dtype=dtype, changes=config_changes)
    (folder / "config.json").write_text(config, encoding="utf-8")
    for pattern in ("generation_config.json", "*processor_config.json", *_LEGAL):
        for path in filter(Path.is_file, source.base_folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    for path in folder.glob("*processor_config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.pop("auto_map", None):  # names code that does not come along
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_tokenizer(source.tokenizer, folder, [source.base_folder, source.folder])

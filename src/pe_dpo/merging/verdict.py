"""The verdict on a merge: what it is held against, and what was found."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pe_dpo.errors import ModelError
from pe_dpo.merging.checks import Onto
from pe_dpo.merging.served import scale_words
from pe_dpo.merging.source import Source
from pe_dpo.merging.stream import BaseAsTrained, MergedTensor, Rounding, faults, mean_kept, mean_noise
from pe_dpo.merging.trained import Trained, measure_merged, measure_trained, noise_words
from pe_dpo.merging.verify import Agreement, agreement, doubts, is_too_vague
from pe_dpo.model.fingerprint import file_fingerprints
from pe_dpo.runs.folder import versions


class Truth(NamedTuple):
    """What a merge is judged by."""

    measured: Trained
    """Base (original if that is merged onto) and adapter, unmerged."""
    as_trained: Trained | None
    """The same on the quantized base, where that is another."""


class Verdict(NamedTuple):
    """What a merge was found to be."""

    tensors: list[MergedTensor]
    held_out: Agreement | None
    """None where no pairs were asked for."""
    floor: Agreement | None
    """The trained model with the noise of the dtype."""
    change: Agreement | None
    """Merged onto the original: how far that is from what was trained on the quantized base."""
    faults: list[str]
    """What is out of its band, in words; empty for a merge that serves what was trained."""
    computed_in: torch.dtype
    """Of what was measured on pairs."""
    is_vague: bool
    """The update is within the noise of rounding, so that the pairs could not have told that it was lost."""
    scale: float = 1.0
    """Of what is served, toward the reference; 1 is what was trained."""

    @property
    def mean_kept(self) -> float | None:
        """Share of ΔW in the files, over all tensors."""
        return mean_kept(self.tensors)

    def words(self, onto: Onto) -> str:
        """Return the verdict in words.

        Args:
            onto: what was merged onto.
        """
        scaled = f", {scale_words(self.scale)}" if self.scale != 1 else ""
        if self.faults:
            return f"written by force{scaled}"
        if self.change is not None or (onto == "original" and self.held_out is None):
            return f"keeps the update{scaled}, on the original weights: not the model that was trained"
        if self.held_out is None:
            return f"has the update in its files{scaled}; not verified on pairs"
        if self.is_vague:
            return f"has the update in its files{scaled}; it is within the noise of rounding, and the pairs cannot tell it"
        return f"serves the update{scaled}: on purpose not what was trained" if scaled else "serves what was trained"


def truth(source: Source, onto: Onto, dtype: torch.dtype, allow_mismatch: bool, say: Callable[[str], None]) -> Truth | None:
    """Return what reference and trained model do, None if there are no pairs to ask them on."""
    if not source.pairs:
        return None
    as_trained = measure_trained(source, source.facts, dtype=dtype, allow_base_mismatch=allow_mismatch, say=say)
    if onto == "dequantized" or source.facts.quantize == "none":
        return Truth(as_trained, None)
    plain = source.facts._replace(quantize="none")
    return Truth(measure_trained(source, plain, dtype=dtype, allow_base_mismatch=allow_mismatch, say=say), as_trained)


def base_as_trained(source: Source, onto: Onto, found: Truth | None, allow_mismatch: bool) -> BaseAsTrained:
    """Return how the base was loaded in training: as it was just loaded, else as the record says.

    Raises:
        ModelError: there is neither.
    """
    if found is not None and onto == "dequantized":
        return found.measured.base
    record = source.record
    if record is None and onto == "dequantized" and source.facts.quantize != "none":
        raise ModelError(
            f"{source.folder}: nothing says which layers of its base were quantized; name pairs with --data, so that the "
            "base is loaded and asked"
        )
    # int8 codes cannot be made again from here; the files were compared instead.
    is_known = not allow_mismatch and source.facts.quantize != "int8"
    was_on_gpu = record is not None and record.get("device") == "cuda"
    return BaseAsTrained(
        quantize=source.facts.quantize,
        dtype=source.facts.dtype,
        quantized_layers=frozenset(record["quantized_layers"] if record else ()),
        tensors=record["tensors"] if record and is_known else {},
        device=torch.device("cuda" if was_on_gpu and torch.cuda.is_available() else "cpu"),
    )


def judge(source: Source, folder: Path, tensors: list[MergedTensor], found: Truth | None) -> Verdict:
    """Return the verdict on a merged model on disk: by tensor, and by what it does on the pairs."""
    wrong = faults(tensors)
    if found is None:
        return Verdict(tensors, None, None, None, wrong, torch.float32, is_vague=False, scale=source.scale)
    measured = found.measured
    merged = measure_merged(folder, source, measured.computed_in)
    held_out = agreement(merged, measured.trained, measured.reference)
    floor = agreement(measured.floor, measured.trained, measured.reference) if measured.floor else None
    served = found.as_trained
    change = agreement(merged, served.trained, served.reference) if served else None
    wrong += doubts(held_out, floor, in_float32=measured.computed_in == torch.float32, scale=source.scale)
    if mean_kept(tensors) is None and held_out.shift_kept is not None:
        wrong.append("no tensor of the adapter changes anything, but the unmerged model does")
    is_vague = is_too_vague(held_out, floor)
    return Verdict(tensors, held_out, floor, change, wrong, measured.computed_in, is_vague, source.scale)


def merge_report(
    source: Source, verdict: Verdict, *, onto: Onto, dtype: torch.dtype, rounding: Rounding, seed: int, files: dict[str, str]
) -> dict[str, Any]:
    """Return what merge_report.json says.

    Args:
        source: that was merged.
        verdict: on it.
        onto: what was merged onto.
        dtype: of the merged weights.
        rounding: as it was asked for.
        seed: of stochastic rounding.
        files: sha256 of the weights' files.
    """
    adapter_file = "adapter_model.safetensors"
    served, given = (
        file_fingerprints(folder, [adapter_file])[adapter_file] for folder in (source.adapter.folder, source.trained)
    )
    return {
        "verdict": verdict.words(onto),
        "faults": verdict.faults,
        "onto": onto,
        "dtype": str(dtype).removeprefix("torch."),
        "rounding": rounding,
        "seed": seed,
        "base": {
            "id": source.facts.base,
            "revision": source.record["revision"] if source.record else source.facts.revision,
            "quantize_in_training": source.facts.quantize,
            "was_checked": source.record is not None,
        },
        "scale": source.scale,
        "adapter_sha256": served,
        "from_adapter_sha256": given,
        "mean_kept": verdict.mean_kept,
        "held_out_pairs": len(source.pairs),
        "held_out": verdict.held_out.to_dict() if verdict.held_out else None,
        "noise_floor": verdict.floor.to_dict() if verdict.floor else None,
        "noise_floor_is": noise_words(verdict.computed_in, dtype),
        "mean_noise": mean_noise(verdict.tensors),
        "against_the_quantized_base": verdict.change.to_dict() if verdict.change else None,
        "computed_in": str(verdict.computed_in).removeprefix("torch."),
        "tensors": [_ready_for_json(tensor) for tensor in verdict.tensors],
        "files": files,
        "versions": versions(),
    }


def _ready_for_json(tensor: MergedTensor) -> dict[str, Any]:
    """JSON knows no infinity, which is the relative size of an update of a tensor of zeros."""
    return {**tensor._asdict(), "relative_size": tensor.relative_size if math.isfinite(tensor.relative_size) else None}

"""The verdict on a merge: what it is held against, and what was found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pe_dpo.disk import json_without_nan
from pe_dpo.hub import public_name
from pe_dpo.merging.behaviour import Agreement, is_inconclusive
from pe_dpo.merging.merged_tensor import MergedTensor, mean_kept, mean_noise, tensor_failures
from pe_dpo.merging.plan import Plan
from pe_dpo.merging.source import describe_scale
from pe_dpo.merging.unmerged import Unmerged, measure_served
from pe_dpo.model.fingerprint import file_fingerprints
from pe_dpo.runs.writing import versions


class Verdict:
    """What a merged model on disk was found to be: by tensor, and by what it does on the pairs.

    Args:
        plan: of the merge.
        folder: with the merged model.
        tensors: what became of each.
        files: sha256 of the weights' files.
        expected: base (original if that is merged onto) and adapter, unmerged; None where no pairs were asked for.
        as_trained: the same on the base as in training.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        tensors: list[MergedTensor],
        files: Mapping[str, str],
        *,
        expected: Unmerged | None,
        as_trained: Unmerged | None,
    ) -> None:
        self.plan, self.folder, self.tensors = plan, folder, tensors
        self.faults = tensor_failures(tensors)
        """What is out of its band, in words; empty for a merge that serves what was trained."""
        self.held_out: Agreement | None = None
        """With what is expected; None where no pairs were asked for."""
        self.change: Agreement | None = None
        """Merged onto the original: how far that is from what was trained on the quantized base."""
        self.floor = expected.floor if expected is not None else None
        """The trained model with the noise of the dtype."""
        self.is_inconclusive = False
        """The update is within the noise of rounding, so that the pairs could not have told that it was lost."""
        if expected is not None and as_trained is not None:
            merged = measure_served(plan.source, merged=folder)
            self.held_out = expected.agreement(merged)
            self.faults += expected.failures(self.held_out)
            self.is_inconclusive = is_inconclusive(self.held_out, self.floor)
            if mean_kept(tensors) is None and self.held_out.shift_kept is not None:
                self.faults.append("no tensor of the adapter changes anything, but the unmerged model does")
            if as_trained is not expected:
                self.change = as_trained.agreement(merged)
        self.report = self._report(files)
        """As in merge_report.json."""

    def describe(self) -> str:
        """Return the verdict in words."""
        is_scaled = self.plan.source.scale != 1
        scaled = f", {describe_scale(self.plan.source.scale)}" if is_scaled else ""
        if self.faults:
            return f"written by force{scaled}"
        if self.change is not None or (self.plan.onto == "original" and self.held_out is None):
            return f"keeps the update{scaled}, on the original weights: not the model that was trained"
        if self.held_out is None:
            return f"has the update in its files{scaled}; not verified on pairs"
        if self.is_inconclusive:
            return f"has the update in its files{scaled}; it is within the noise of rounding, and the pairs cannot tell it"
        if is_scaled:
            return f"serves the update{scaled}: on purpose not what was trained"
        if self.plan.source.record is None:
            return "serves the adapter on this base; nothing shows that it is the one of training"
        return "serves what was trained"

    def _report(self, files: Mapping[str, str]) -> dict[str, Any]:
        plan, source = self.plan, self.plan.source
        weights = "adapter_model.safetensors"
        served, trained = (file_fingerprints(one, [weights])[weights] for one in (source.adapter.folder, source.trained))
        dtype = str(plan.dtype).removeprefix("torch.")
        report = {
            "verdict": self.describe(),
            "faults": self.faults,
            "onto": plan.onto,
            "dtype": dtype,
            "rounding": plan.rounding,
            "seed": plan.seed,
            "base": {
                "id": public_name(source.facts.base),
                "revision": source.record.revision if source.record else source.facts.revision,
                "quantize_in_training": source.facts.quantize,
                "was_checked": source.record is not None,
            },
            "scale": source.scale,
            "adapter_sha256": served,
            "from_adapter_sha256": trained,
            "mean_kept": mean_kept(self.tensors),
            "held_out_pairs": len(source.pairs),
            "held_out": self.held_out.to_dict() if self.held_out else None,
            "noise_floor": self.floor.to_dict() if self.floor else None,
            "noise_floor_is": f"rounded to {dtype}",
            "mean_noise": mean_noise(self.tensors),
            "against_the_quantized_base": self.change.to_dict() if self.change else None,
            "computed_in": "float32",
            "tensors": [tensor._asdict() for tensor in self.tensors],
            "files": dict(files),
            "versions": versions(),
        }
        # A tensor of zeros has an update of infinite relative size, which JSON does not know.
        return dict(json_without_nan(report))

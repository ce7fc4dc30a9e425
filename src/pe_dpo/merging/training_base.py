"""The base as training had it, read from its files one tensor at a time; each is checked by its hash."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pe_dpo.errors import ModelError
from pe_dpo.merging.plan import Onto, PlannedTensor
from pe_dpo.merging.source import Source
from pe_dpo.model.fingerprint import parameter_fingerprint
from pe_dpo.model.quantization import dequantized, quantized_parameter
from pe_dpo.model.weight_files import FourBitFiles
from pe_dpo.quantizations import is_four_bit


class TrainingBase:
    """The base as training had it, read from its files one tensor at a time.

    Args:
        source: that names it.
        quantized_layers: names of the modules whose weights were made 4-bit.
        fingerprints: sha256 of each parameter as loaded, by name; those that are missing are not checked.
        device: that it was loaded on.
    """

    def __init__(
        self, source: Source, quantized_layers: Iterable[str], fingerprints: Mapping[str, str], device: torch.device
    ) -> None:
        self.source, self.device = source, device
        self.quantized_layers, self.fingerprints = frozenset(quantized_layers), fingerprints
        self._apart: tuple[str, dict[str, Tensor]] = "", {}
        """The last tensor of the modules that several of the files make, and these, as training had it."""

    @classmethod
    def from_record(cls, source: Source, onto: Onto) -> "TrainingBase":
        """Return what base.json says of it.

        Raises:
            ModelError: there is none, and codes are to be made again.
        """
        record, quantize = source.record, source.facts.quantize
        if record is None and onto == "dequantized" and quantize != "none":
            raise ModelError(
                f"{source.folder}: nothing says which layers of its base were quantized; name pairs with `data`, so that the "
                "base is loaded and asked"
            )
        if record is None:
            return cls(source, (), {}, torch.device("cpu"))
        # int8 codes cannot be made again from here; the files were compared instead.
        is_known = not source.allow_base_mismatch and quantize != "int8" and source.original is None
        device = "cuda" if record.device == "cuda" and torch.cuda.is_available() else "cpu"
        return cls(source, record.quantized_layers, record.tensors if is_known else {}, torch.device(device))

    def read(self, planned: PlannedTensor, onto: Onto) -> Tensor:
        """Return the values to add an update to: those of the 4-bit codes, or the base's own, rounded as they were loaded.

        Args:
            planned: of the merge.
            onto: "original" for the values in the file, whatever training made of them.

        Raises:
            ModelError: this is not the tensor of training.
        """
        whole, layout = planned.module_name, self.source.layout
        if not layout.is_assembled(whole):
            return self._as_trained(planned, self.source.files.read(planned.source), onto)
        if self._apart[0] != whole:
            made = layout.assemble(whole, self.source.files.read)
            self._apart = whole, layout.take_apart(whole, self._as_trained(planned, made, onto))
        return self._apart[1][planned.source]

    def _as_trained(self, planned: PlannedTensor, stored: Tensor, onto: Onto) -> Tensor:
        files, quantize, dtype = self.source.files, self.source.facts.quantize, self.source.facts.dtype
        codes: Any = None
        is_transposed = planned.module_name in self.source.transposed
        if isinstance(files, FourBitFiles) and planned.source in files.parts:
            codes = files.codes(planned.source, dtype)
        elif is_four_bit(quantize) and planned.module_name.removesuffix(".weight") in self.quantized_layers:
            codes = quantized_parameter((stored.T if is_transposed else stored).to(dtype), quantize, device=self.device)
        expected = self.fingerprints.get(planned.recorded_as)
        usual = dtype if stored.is_floating_point() else stored.dtype
        if expected is None:
            loaded_in: torch.dtype | None = usual
        elif codes is not None:
            loaded_in = usual if expected == parameter_fingerprint(codes) else None
        else:  # a few models keep some weights in float32 whatever they are loaded in
            candidates = dict.fromkeys((usual, torch.float32, stored.dtype))
            loaded_in = next((one for one in candidates if expected == parameter_fingerprint(stored.to(one))), None)
        if loaded_in is None:
            raise ModelError(
                f"{files.file_of[planned.source]}: {planned.source} is not what the adapter was trained on (sha256 of the "
                "loaded weights): another base, a damaged file, or quantized to other bits by another device or version; "
                "restore the base, or merge where it was trained"
            )
        if onto == "original":
            return stored
        if codes is not None:
            return dequantized(codes).T if is_transposed else dequantized(codes)
        return stored.to(loaded_in) if loaded_in.itemsize < stored.dtype.itemsize else stored

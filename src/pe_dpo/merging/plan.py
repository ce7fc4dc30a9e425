"""Which tensors a merge writes, made of what; everything that cannot be merged is refused here, before a weight is read.

Tied embeddings: one tensor of the files serves as embedding and head. An update of only one of them, which is what PEFT trains,
unties them: the other keeps the base's values, and the merged model has two tensors.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pe_dpo.disk import check_can_be_written
from pe_dpo.errors import ModelError
from pe_dpo.merging.source import Source
from pe_dpo.model.adapter_files import Change
from pe_dpo.model.fingerprint import config_fingerprint
from pe_dpo.model.provenance import changed_files
from pe_dpo.model.tensor_files import TensorInfo

logger = logging.getLogger(__name__)

Onto = Literal["dequantized", "original"]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Rounding = Literal["auto", "nearest", "stochastic"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PlannedTensor(NamedTuple):
    """One tensor to write."""

    facts: TensorInfo
    source: str
    """Name of the base's tensor in its files."""
    module_name: str
    """Name of the same tensor in the loaded model."""
    change: Change | None
    recorded_as: str
    """Its name among fingerprints, which have tied tensors once."""


class Plan:
    """How a source is merged: all tensors of the merged model, in the order they are written.

    Args:
        source: with an adapter whose every tensor is used exactly once.
        onto: "dequantized" adds to the values of the 4-bit codes that were trained on, "original" to the base's own weights.
        dtype: of the merged weights, "auto" for that of the base; integers stay what they are.
        rounding: "auto" is to nearest, and stochastic for a tensor on the 16-bit grid that would lose too much of ΔW.
        seed: of stochastic rounding.

    Raises:
        ModelError: a tensor of the adapter has no place in the base, the base's files call their tensors otherwise than its
            modules or are not those of training, or no merged weights can compute what was trained.
    """

    def __init__(
        self, source: Source, *, onto: Onto = "dequantized", dtype: Dtype = "auto", rounding: Rounding = "auto", seed: int = 0
    ) -> None:
        self.source, self.onto, self.rounding, self.seed = source, onto, rounding, seed
        config, adapter, files = source.facts.config, source.adapter, source.files
        self.base_dtype: torch.dtype | None = config.get_text_config().dtype or config.dtype
        is_servable = self.base_dtype in DTYPES.values()
        self.dtype = DTYPES[dtype] if dtype != "auto" else self.base_dtype if is_servable else torch.bfloat16
        names = _BaseNames(source)
        changes = {
            name: change._replace(is_transposed=change.is_transposed or name in source.transposed)
            for name, change in adapter.changes.items()
        }
        head_change = _untie(changes, source, names) if names.is_tied else None
        for name, change in changes.items():
            if names.in_files(name) is None:
                raise ModelError(
                    f"{adapter.folder}: {change.keys[0]} is for {name}, which {files.folder} does not have as a tensor of its "
                    "own: it is not the adapter's base, or that is of a kind that cannot be merged; use `onto` adapter"
                )
        self.tensors: list[PlannedTensor] = []
        head_in_files = names.head and names.in_files(names.head)
        for tensor in names.in_order():
            if names.is_tied and tensor.name == head_in_files:
                continue  # transformers ignores it
            module_name = source.layout.module_of.get(tensor.name, tensor.name)
            self._add(tensor, tensor.name, module_name, changes.get(module_name), names)
        self.config_changes: dict[str, Any] = {} if names.is_tied else {"tie_word_embeddings": False}
        embedding_in_files = names.in_files(names.embedding)
        if head_change is not None and names.head is not None and embedding_in_files is not None:
            self._add(files.info(embedding_in_files), names.head, names.embedding, head_change, names)
            self.config_changes["tie_word_embeddings"] = False
        used = [key for planned in self.tensors if planned.change for key in planned.change.keys]
        # Each once; a whole tensor may serve embedding and head, or be there twice with equal values.
        each = [
            (key, name) for name, one in adapter.changes.items() for key in one.keys if key not in (one.replacement, one.rows)
        ]
        odd = next(((key, name) for key, name in each if used.count(key) != 1), None)
        if odd is not None:
            raise ModelError(
                f"{adapter.folder}: {odd[0]} would be used {used.count(odd[0])} times ({odd[1]}); use `onto` adapter"
            )
        # A few bases have rows in one of the two that the other has not (Mllama's, for images); both grow by the same.
        ends = [one for one in self.tensors if one.module_name in (names.embedding, names.head)]
        growth = {one.facts.shape[0] - files.info(one.source).shape[0] for one in ends}
        if len(growth) > 1:
            rows = sorted({one.facts.shape[0] for one in ends})
            raise ModelError(f"{adapter.folder}: embedding and head would have {' and '.join(map(str, rows))} rows")
        if any(growth):
            self.config_changes["vocab_size"] = config.get_text_config().vocab_size + growth.pop()
        self._check_base()
        self._check_nothing_lacks({names.recorded_as(name) for name in names.parameters})

    def check_space(self, output: Path) -> None:
        """Check that the disk takes files and has room for the merged weights.

        Args:
            output: a folder that need not exist.

        Raises:
            DiskError: it does not, or has not.
        """
        check_can_be_written(output, sum(tensor.facts.bytes for tensor in self.tensors), what="the merged model")

    def _add(self, stored: TensorInfo, name: str, module_name: str, change: Change | None, names: "_BaseNames") -> None:
        shape = stored.shape if change is None else self.source.adapter.shape(change) or stored.shape
        change = change if change is not None and change.keys else None
        # A base of 16 bits that keeps a tensor in float32 has its reasons: the correction of a router, say.
        is_wide = stored.dtype == torch.float32 and self.base_dtype in (torch.bfloat16, torch.float16) and change is None
        dtype = self.dtype if stored.dtype.is_floating_point and not is_wide else stored.dtype
        facts = TensorInfo(name, shape, dtype)
        self.tensors.append(PlannedTensor(facts, stored.name, module_name, change, names.recorded_as(module_name)))

    def _check_base(self) -> None:
        """Check what can be checked of the base without reading it into a model."""
        source, record = self.source, self.source.record
        if source.facts.quantize == "int8" and self.onto == "dequantized":
            raise ModelError(
                "int8 also rounds what flows through a layer, so that no merged weights compute what was trained; merge with "
                "`onto` original, or serve with `onto` adapter"
            )
        self._check_original()
        if self.onto == "original" and source.facts.quantize != "none":
            logger.warning(
                "onto the original weights: their quantization error was part of training, and is not of what is served"
            )
        if record is None:
            return
        if record.config != config_fingerprint(source.facts.config):
            what = f"{source.base_folder / 'config.json'}: says another arithmetic (norms, rotary, scales, …) than in training"
            if not source.allow_base_mismatch:
                raise ModelError(f"{what}; restore it; `allow_base_mismatch` merges all the same")
            logger.warning(what)
        if self.onto == "dequantized" or source.original is not None:
            return  # tensor by tensor as loaded, later
        changed = changed_files(record.model_dump(), source.base_folder)
        if changed and not source.allow_base_mismatch:
            raise ModelError(
                f"{source.base_folder / changed[0]}: is not the file of training (sha256); restore the base, or name it with "
                "`base`; `allow_base_mismatch` merges all the same"
            )
        if changed:
            logger.warning(f"{changed[0]} of the base is not the file of training")

    def _check_original(self) -> None:
        """Check that what is merged onto is there, for a base that came as codes."""
        codes, original = self.source.facts, self.source.original
        if self.onto == "original" and codes.is_prequantized and original is None:
            raise ModelError(
                f"{codes.base}: holds codes, not the weights they were made of; name the base that has those with `base`, or "
                "merge `onto` dequantized"
            )
        if original is None:
            return
        if self.onto == "dequantized":
            raise ModelError(
                f"{original.base}: is not what was trained on, which were the codes of {codes.base}; leave `base` out, or "
                "merge `onto` original"
            )
        logger.warning(f"nothing shows that the codes of {codes.base} were made of {original.base}")

    def _check_nothing_lacks(self, parameters: set[str]) -> None:
        """Where no model will be loaded, check by name that the files have what the model has and what training had.

        Args:
            parameters: names under which the loaded model has its parameters; tied ones once.
        """
        source = self.source
        if source.pairs or source.allow_base_mismatch:
            return
        has_hashes = source.record is not None and source.facts.quantize != "int8"
        expected = set(source.record.tensors) if source.record is not None and has_hashes else parameters
        planned = {tensor.recorded_as for tensor in self.tensors}
        if expected - planned:
            raise ModelError(
                f"{source.base_folder}: its files do not have {min(expected - planned)}, or under another name, and without "
                "pairs that cannot be told: ask for pairs"
            )
        unknown = (planned - expected) & parameters if has_hashes else set()
        if unknown:
            raise ModelError(f"{source.folder / 'base.json'}: says nothing of {min(unknown)}; take another copy of the run")


class _BaseNames:
    """How the modules of a base are called, and how its files call them."""

    def __init__(self, source: Source) -> None:
        facts, model = source.facts, source.modules
        self._files, self._layout = source.files, source.layout
        self.parameters = {name for name, _ in model.named_parameters()}
        by_module = {id(module): name for name, module in model.named_modules()}
        head = model.get_output_embeddings()
        self.embedding = f"{by_module[id(model.get_input_embeddings())]}.weight"
        self.head = None if head is None else f"{by_module[id(head)]}.weight"
        self.is_tied = bool(facts.config.get_text_config().tie_word_embeddings)
        both = [self.in_files(name) for name in (self.embedding, self.head) if name is not None]
        if self.is_tied and len(both) == 2 and both[0] is not None and both[1] is not None:
            # transformers does not tie two that differ, whatever it was told.
            self.is_tied = torch.equal(self._files.read(both[0]), self._files.read(both[1]))

    def in_files(self, name: str) -> str | None:
        """Return the files' name of a tensor; None where they have no such one, or in parts."""
        found = [] if self._layout.is_assembled(name) else self._layout.files_of(name)
        return found[0] if len(found) == 1 else None

    def in_order(self) -> Iterator[TensorInfo]:
        """Yield all tensors of the files, those that make one of the modules together.

        Raises:
            ModelError: they could not be told from that again.
        """
        done: set[str] = set()
        for name in self._files.file_of:
            whole = self._layout.module_of.get(name, name)
            if name in done or not self._layout.is_assembled(whole):
                if name not in done:
                    yield self._files.info(name)
                continue
            parts = {part: self._files.info(part) for part in self._layout.files_of(whole)}
            empty = {part: torch.empty(info.shape, dtype=info.dtype, device="meta") for part, info in parts.items()}
            try:
                back = self._layout.take_apart(whole, self._layout.assemble(whole, empty.__getitem__))
                is_same = all(back[part].shape == empty[part].shape for part in parts)
            except ValueError as error:
                raise ModelError(f"{self._files.folder}: {error}, so that it cannot be merged; use `onto` adapter") from error
            if not is_same:
                raise ModelError(f"{self._files.folder}: {whole} comes apart in other shapes; it cannot be merged")
            yield from parts.values()
            done |= parts.keys()

    def recorded_as(self, module_name: str) -> str:
        """Return the name of a tensor among fingerprints, which have tied tensors once, under the first of their names."""
        tied = {self.embedding, self.head or self.embedding} if self.is_tied else set()
        return min(tied) if module_name in tied else module_name


def _untie(changes: dict[str, Change], source: Source, names: _BaseNames) -> Change | None:
    """Take the head's change out of those of a tied base, and return it if it is not the embedding's.

    A whole tensor that was saved because the vocabulary was resized is both; one in modules_to_save is its own module's only.
    """
    adapter = source.adapter
    if names.head is None or not {names.embedding, names.head} & changes.keys():
        return None
    embedding, head = changes.pop(names.embedding, Change()), changes.pop(names.head, Change())
    if adapter.config.ensure_weight_tying:
        if embedding.a or head.a:
            raise ModelError(
                f"{adapter.folder}: LoRA on embedding or head with ensure_weight_tying cannot be merged; use `onto` adapter"
            )
        changes[names.embedding] = embedding if embedding.replacement else head
        return None
    if embedding.rows and not head.rows:  # PEFT ties the rows that it trains
        head = head._replace(rows=embedding.rows, indices=embedding.indices)
    both = None
    for change, name in ((head, names.head), (embedding, names.embedding)):
        module, saved = name.removesuffix(".weight"), adapter.config.modules_to_save or ()
        if change.replacement and not any(f".{module}".endswith(f".{one}") for one in saved):
            both = change.replacement
    embedding = embedding._replace(replacement=embedding.replacement or both)
    head = head._replace(replacement=head.replacement or both)
    if embedding.keys:
        changes[names.embedding] = embedding
    if embedding == head:
        return None
    if embedding.a or head.a or not (embedding.replacement and head.replacement):
        return head
    is_same = torch.equal(*(adapter.updated(one, torch.empty(0)) for one in (embedding, head)))
    return None if is_same else head

"""What a saved LoRA adapter does to each tensor of its base, read from its files; no model is built.

    LoRA          W ← W + s·B·A                        s = alpha / r, or alpha / √r (rsLoRA), r and alpha by pattern
    DoRA          W ← m · (W + s·B·A) / ‖W + s·B·A‖     norms of rows, so that ΔW depends on W
    embedding     W ← W + s·(B·A)ᵀ
    bias          b ← b + s·b_B
    tokens        W[i] ← saved rows                     trainable_token_indices
    whole module  W ← saved W                          modules_to_save, trained biases, resized embeddings

Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA); tests hold the formulas against PEFT's layers.
"""

import json
import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter_config import (
    check_adapter,
    check_base_was_kept,
    merge_first,
    read_adapter_config,
    write_adapter_config,
)
from pe_dpo.model.tensor_files import TensorFiles
from pe_dpo.printable import one_line

_PREFIX = "base_model.model."
_UNDERSTOOD = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout"),
    *("init_lora_weights", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying", "loftq_config"),
    *("trainable_token_indices", "eva_config"),
}
"""Fields of PEFT's LoraConfig that change nothing here, or are followed; any other that is set is refused. EVA begins with an A
of its own, and the ranks that it gives stand in rank_pattern."""
_OF_OTHERS = {"unsloth_fixed", "lora_dtype", "lorap_lr_ratio", "merge_weights"}
"""Fields that other tools and old versions write (Unsloth, ms-swift), of which a finished adapter's update does not depend."""


class Change(NamedTuple):
    """What happens to one tensor of the base; names of tensors of the adapter's file, or None."""

    replacement: str | None = None
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    addition: str | None = None
    """Of a bias, times the scaling."""
    rows: str | None = None
    """New rows of an embedding or the head."""
    indices: tuple[int, ...] = ()
    """Which rows these are."""
    scaling: float = 1.0
    is_transposed: bool = False
    """Whether the weight lies (in, out): embeddings, and layers of the Conv1D kind."""

    @property
    def keys(self) -> list[str]:
        """Names of the adapter's tensors that this change uses."""
        keys = self.replacement, self.a, self.b, self.magnitude, self.addition, self.rows
        return [key for key in keys if key is not None]


class AdapterFiles:
    """A saved LoRA adapter: its configuration, and what it changes.

    Args:
        folder: as PEFT saves it.

    Raises:
        ModelError: no LoRA adapter with safetensors there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_adapter_config(folder)
        self.tensors = TensorFiles(folder, "adapter_model")

    @cached_property
    def changes(self) -> dict[str, Change]:
        """What it does, by name of the base's tensor, as its modules are called.

        Raises:
            ModelError: it asks for what is not supported, or a tensor has no partner.
        """
        plain = type(self.config)()
        written = json.loads((self.folder / "adapter_config.json").read_text(encoding="utf-8"))
        unknown = sorted(key for key, value in written.items() if not hasattr(plain, key) and value and key not in _OF_OTHERS)
        if unknown:
            raise ModelError(
                f"{self.folder / 'adapter_config.json'}: has {one_line(', '.join(unknown))}, which the installed peft does not "
                "know; install a newer one, or merge where the adapter was trained"
            )
        for name, value in vars(self.config).items():
            if name in _UNDERSTOOD or not hasattr(plain, name) or value == getattr(plain, name) or not value:
                continue
            raise ModelError(
                f"{self.folder}: was trained with {name} = {one_line(repr(value))}, which this version cannot merge; "
                "`onto` adapter packages it for PEFT"
            )
        check_base_was_kept(self.folder, self.config)
        if self.config.use_dora and self.config.fan_in_fan_out:
            raise ModelError(
                f"{self.folder}: is DoRA on transposed layers (Conv1D), which cannot be merged here; use `onto` adapter"
            )
        return self._changes()

    @property
    def whole(self) -> list[str]:
        """Names of the base's tensors of which it has values, rather than an update; in the order of the alphabet."""
        return sorted(name for name, change in self.changes.items() if change.replacement or change.rows)

    def updated(self, change: Change, weight: Tensor) -> Tensor:
        """Return a tensor of the base with its change, float32, on the device of `weight`.

        Args:
            change: of this tensor.
            weight: float32, as it is in the base.

        Raises:
            ModelError: shapes do not fit.
        """
        if change.replacement is not None:
            weight = self._read(change.replacement, weight.device)
        if change.rows is not None:
            indices = torch.tensor(change.indices, device=weight.device)
            weight = weight.index_copy(0, indices, self._read(change.rows, weight.device))
        if change.addition is not None:
            weight = weight + change.scaling * self._read(change.addition, weight.device)
        update = self.low_rank_update(change, weight.device)
        if update is None:
            return weight
        if update.shape != weight.shape:
            raise ModelError(
                f"{self.folder}: {change.a} makes an update of shape {tuple(update.shape)} for a weight of "
                f"{tuple(weight.shape)}; this is not the adapter's base"
            )
        moved = weight + update
        if change.magnitude is None:
            return moved
        length = moved.norm(dim=1)
        magnitude: Tensor = self._read(change.magnitude, weight.device) / length
        return magnitude[:, None] * moved

    def low_rank_update(self, change: Change, device: torch.device) -> Tensor | None:
        """Return s·B·A, float32 as the weight lies in its file; None for a change without one."""
        if change.a is None or change.b is None:
            return None
        update = (self._read(change.b, device) @ self._read(change.a, device)).mul_(change.scaling)
        return update.T if change.is_transposed else update

    def shape(self, change: Change) -> tuple[int, ...] | None:
        """Return the shape of a replaced tensor, None for one that is only moved."""
        return None if change.replacement is None else self.tensors.info(change.replacement).shape

    def _read(self, name: str, device: torch.device) -> Tensor:
        return self.tensors.read(name).to(device, torch.float32)

    @property
    def keys(self) -> set[str]:
        """Names of its tensors, each once: PEFT saves whole modules twice where the vocabulary was resized."""
        doubled = (".modules_to_save.", ".original_module.")
        plain = {facts.name: facts.name.replace(doubled[0], ".").replace(doubled[1], ".") for facts in self.tensors}
        return {key for key, name in plain.items() if name == key or name not in plain}

    def _changes(self) -> dict[str, Change]:
        changes: dict[str, Change] = {}
        for key in sorted(self.keys):
            name, part = _target(key)
            if name is None:
                raise ModelError(f"{self.folder}: {key} is no tensor of a LoRA adapter that can be merged; use `onto` adapter")
            old = changes.get(name, Change())
            if getattr(old, part) is not None:
                raise ModelError(f"{self.folder}: two tensors are the {part} of {name}; take another copy of the adapter")
            fields: dict[str, Any] = {part: key}
            if part == "rows":
                fields["indices"] = self._trained_rows(name)
            if part in ("a", "addition"):
                fields |= {"scaling": self._scaling(name.rsplit(".", 1)[0]), "is_transposed": "lora_embedding" in key}
            changes[name] = old._replace(**fields)
        for name, change in changes.items():
            if change.magnitude and change.is_transposed:
                raise ModelError(f"{self.folder}: {name} is DoRA on an embedding, which cannot be merged; use `onto` adapter")
            if (change.a is None) != (change.b is None) or (change.magnitude and not change.a):
                raise ModelError(
                    f"{self.folder}: the update of {name} is incomplete, there is only {', '.join(change.keys)}; take another "
                    "copy of the adapter"
                )
        if not changes:
            raise ModelError(f"{self.folder}: the adapter is empty: no tensors in its file")
        return changes

    def _trained_rows(self, name: str) -> tuple[int, ...]:
        """The indices of the tokens whose rows of a tensor are trained; of a list they are those of the embedding."""
        asked = self.config.trainable_token_indices
        by_module = asked.items() if isinstance(asked, dict) else ()
        module = f".{name.removesuffix('.weight')}"
        return tuple(next((rows for end, rows in by_module if module.endswith(f".{end}")), asked))

    def _scaling(self, module: str) -> float:
        rank = _by_pattern(self.config.rank_pattern, module, self.config.r)
        alpha = _by_pattern(self.config.alpha_pattern, module, self.config.lora_alpha)
        return float(alpha / rank**0.5 if self.config.use_rslora else alpha / rank)


def save_scaled_adapter(adapter: AdapterFiles, scale: float, folder: Path) -> None:
    """Write an adapter whose every update is times a factor as PEFT saves it; its configuration stays as it is.

        W + scale·s·B·A,  b + scale·s·b_B

    B and b_B are scaled, in float32; the others stay as they are stored.

    Args:
        adapter: LoRA that only adds.
        scale: any number.
        folder: that exists.

    Raises:
        ModelError: it has DoRA, or whole tensors (modules_to_save, trained biases).
    """
    for name, change in adapter.changes.items():
        if change.magnitude is not None:
            raise ModelError(f"{adapter.folder}: {name} has DoRA, which sets W's norms and adds no ΔW that could be scaled")
        if change.replacement is not None or change.rows is not None:
            raise ModelError(
                f"{adapter.folder}: {name} is saved whole (modules_to_save, trained biases, embeddings); only LoRA updates can "
                "be scaled"
            )
    is_scaled = {key for change in adapter.changes.values() for key in (change.b, change.addition)}
    tensors = {facts.name: adapter.tensors.read(facts.name) for facts in adapter.tensors}
    tensors |= {name: tensor.float() * scale for name, tensor in tensors.items() if name in is_scaled}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(adapter.folder / "adapter_config.json", folder / "adapter_config.json")


def save_fused_adapter(adapters: tuple[AdapterFiles, AdapterFiles], weights: tuple[float, float], folder: Path) -> None:
    """Write one adapter that does what two do together, for servers that load only one; float32, all its scalings are 1.

        w₁·s₁·B₁·A₁ + w₂·s₂·B₂·A₂ = [w₁·s₁·B₁ | w₂·s₂·B₂] · [A₁; A₂]

    Args:
        adapters: plain LoRA on the same base; they may have different targets, ranks and scalings.
        weights: w₁ and w₂.
        folder: that exists.

    Raises:
        ModelError: one of them is not plain LoRA, whose sum is no LoRA adapter.
    """
    for adapter in adapters:
        check_is_plain(adapter)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in sorted({*adapters[0].changes, *adapters[1].changes}):
        rows, columns = [], []
        for adapter, weight in zip(adapters, weights, strict=True):
            if name in adapter.changes:
                change = adapter.changes[name]
                assert change.a is not None and change.b is not None, "checked above"
                rows.append(adapter.tensors.read(change.a).float())
                columns.append(adapter.tensors.read(change.b).float() * (weight * change.scaling))
                keys = change.a, change.b
        tensors[keys[0]], tensors[keys[1]] = torch.cat(rows), torch.cat(columns, dim=1)
        ranks[name.removesuffix(".weight")] = sum(len(part) for part in rows)
    largest = max(ranks.values())
    odd_ranks = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != largest}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_adapter_config(
        folder, base=adapters[1].config.base_model_name_or_path, r=largest, lora_alpha=largest, rank_pattern=odd_ranks,
        alpha_pattern=dict(odd_ranks), target_modules=sorted(ranks), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        fan_in_fan_out=any(adapter.config.fan_in_fan_out for adapter in adapters),
    )  # fmt: skip


def check_is_plain(adapter: AdapterFiles) -> None:
    """Check that an adapter is plain LoRA, which servers load, and whose sum with another one is a LoRA adapter, too.

    Raises:
        ModelError: it has DoRA, LoRA biases, or whole tensors (modules_to_save, trained biases, embeddings).
    """
    odd = [name for name, change in adapter.changes.items() if len(change.keys) != 2 or change.a is None]
    if odd:
        raise ModelError(f"{adapter.folder}: {odd[0]} is not plain LoRA; only that can be fused")


def check_can_be_trained_on(folder: str | Path) -> AdapterFiles:
    """Return a finished adapter from which training can start, or that it can be over: what comes of it can be merged.

    Args:
        folder: as PEFT saves it.

    Raises:
        ModelError: it is none, or what would be trained on it could not be merged; says what to do first.
    """
    check_adapter(folder)
    adapter = AdapterFiles(folder)
    try:
        whole = adapter.whole
    except ModelError as error:
        raise ModelError(
            f"{str(error).partition(';')[0]}: it could be trained on, and not merged after that. Merge it into its base first "
            "with PEFT (merge_and_unload), where that can, and take what it saves as model.base; else take another adapter"
        ) from error
    if whole:
        raise ModelError(
            f"{folder}: has values of {', '.join(whole)} besides LoRA (added or trained tokens, or LoRA on embedding or head), "
            f"which would not be off in the reference; {merge_first(folder)}"
        )
    return adapter


def _target(key: str) -> tuple[str | None, str]:
    """Name of the base's tensor that a tensor of the adapter is for, and what it is of its change."""
    name = key.removeprefix(_PREFIX).replace(".token_adapter.", ".")
    for ending, suffix, part in (
        (".lora_A.weight", ".weight", "a"),
        (".lora_B.weight", ".weight", "b"),
        (".lora_B.bias", ".bias", "addition"),
        (".lora_embedding_A", ".weight", "a"),
        (".lora_embedding_B", ".weight", "b"),
        (".lora_magnitude_vector", ".weight", "magnitude"),
        (".trainable_tokens_delta", ".weight", "rows"),
        (".base_layer.weight", ".weight", "replacement"),
        (".base_layer.bias", ".bias", "replacement"),
    ):
        if name.endswith(ending):
            return name.removesuffix(ending) + suffix, part
    if not key.startswith(_PREFIX) or "lora_" in name or not name.endswith((".weight", ".bias")):
        return None, ""
    return name, "replacement"


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default

"""Mixout in its original form: while training, a LoRA layer takes each input unit from the reference with chance p.

    W̃ = W0 + ΔW · diag(m) / (1−p),   m_j ~ Bernoulli(1−p)      so that E[W̃] = W0 + ΔW

A column of ΔW is all that leaves one input unit of the layer. One m per layer and draw: it is shared by all tokens, both
answers, all micro-batches and what checkpointing recomputes, and 1/(1−p) is in the gradient as in the output. m multiplies the
columns of A, so that W0 may be 4-bit and no token pays for it. A mask is a pure function of seed, draw and the layer's name:
it is the same on every device, nothing is stored, and torch's random state is neither read nor moved.

Source: Lee, Cho & Kang, "Mixout" (ICLR 2020, arXiv 1909.11299); their code draws one variable per input unit as well, but its
gradient lacks the 1/(1−p).
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import POLICY, REFERENCE
from pe_dpo.model.lora import InBaseDtype, add_update, compute_in_base_dtype
from pe_dpo.model.random_bits import random_bits


class MixedLayer(NamedTuple):
    """One adapter of one LoRA layer under mixout."""

    module: Any
    adapter: str

    @property
    def width(self) -> int:
        """Input units."""
        return int(self.module.lora_A[self.adapter].weight.shape[1])


class Mixout:
    """The masks of a model.

    Args:
        p: share of the input units that are taken from the reference, 0 ≤ p < 1.
        seed: of the masks.
        layers: by name.
    """

    def __init__(self, p: float, seed: int, layers: Mapping[str, MixedLayer]) -> None:
        self.p, self.seed, self.layers = p, seed, dict(layers)
        self._draw = 0
        self._masks: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        self._unseen = set(self.layers)

    @property
    def draw(self) -> int:
        """The number of the sampled model; set it between optimizer steps, when the backward is done, never within one."""
        return self._draw

    @draw.setter
    def draw(self, number: int) -> None:
        if number != self._draw:
            self._draw = number
            self._masks.clear()

    def columns(self, layer: str) -> Tensor:
        """Return this draw's factors of a layer's input units, (d_in,) in the adapter's dtype: 0 or 1/(1−p)."""
        self._unseen.discard(layer)
        module, adapter = self.layers[layer]
        weight = module.lora_A[adapter].weight
        place = weight.device, weight.dtype
        if place not in self._masks:
            with torch.no_grad(), torch.inference_mode(False):
                self._masks[place] = self._all_columns(*place)
        return self._masks[place][layer]

    def check_reached(self) -> None:
        """Check after a step's backward that no layer learned without mixout.

        Raises:
            ModelError: a layer was trained, but what computed it passed over mixout.
        """
        missed = [name for name in sorted(self._unseen) if _has_gradient(self.layers[name])]
        if missed:
            raise ModelError(
                f"mixout.p: {len(missed)} layers were trained without mixout ({missed[0]}, …): something computes their update "
                "past PEFT's layer, say, a fused kernel. Switch that off, name other adapter.targets, or set mixout.p: 0"
            )

    def _all_columns(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        widths = [layer.width for layer in self.layers.values()]
        keys = torch.tensor([self._key(name) for name in self.layers], device=device)
        index = torch.cat([torch.arange(width, device=device) for width in widths])
        kept = random_bits(keys.repeat_interleave(torch.tensor(widths, device=device)), index) >= round(self.p * 2**53)
        factors = kept.to(dtype) / (1 - self.p)
        return dict(zip(self.layers, factors.split(widths), strict=True))

    def _key(self, layer: str) -> int:
        digest = hashlib.sha256(f"{self.seed} {self.draw} {layer}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)


class MixedInBaseDtype(InBaseDtype):
    """LoRA in the base's dtype whose training runs on the mixed weight.

    Args:
        mixout: has the masks.
        layer: the layer's name there.
        anchor: the adapter, if any, that is part of the reference: W̃ is then mixed with W0 + ΔW of that adapter.
    """

    def __init__(self, mixout: Mixout, layer: str, anchor: str | None = None) -> None:
        self.mixout, self.layer, self.anchor = mixout, layer, anchor

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the layer's output with the update added: mixed in training mode, whole in eval mode."""
        if not module.training:
            return super().forward(module, active_adapter, x, result, **kwargs)
        columns, x = self.mixout.columns(self.layer), x.to(result.dtype)
        result = add_update(module, active_adapter, x, result, columns)
        return result if self.anchor is None else add_update(module, self.anchor, x, result, 1 - columns)


def attach_mixout(model: Any, p: float, *, seed: int) -> Mixout:
    """Return the mixout of a PEFT model, on in training mode; its `draw` is 0. With p = 0 the model is left as it is.

    Evaluation, generation, adapters off, merging and what is saved are those of plain LoRA.

    Args:
        model: from `model.adapter`, ready to train.
        p: share of the input units of each layer that are taken from the reference.
        seed: of the masks.

    Raises:
        ModelError: p is not in [0, 1), or something is trained that mixout does not cover.
    """
    if not 0 <= p < 1:
        raise ModelError(f"mixout.p is {p:g}: it must be at least 0 and less than 1, where nothing is left to train")
    if p:
        compute_in_base_dtype(model)
    layers = _trained_layers(model) if p else {}
    mixout = Mixout(p, seed, layers)
    for name, (module, adapter) in layers.items():
        anchor = REFERENCE if adapter == POLICY and REFERENCE in module.lora_A else None
        module.lora_variant[adapter] = MixedInBaseDtype(mixout, name, anchor)
    return mixout


def _trained_layers(model: nn.Module) -> dict[str, MixedLayer]:
    """Return every adapter that is trained, by the name of layer and adapter.

    Raises:
        ModelError: something is trained that is no plain LoRA on a linear layer.
    """
    layers: dict[str, MixedLayer] = {}
    left = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, module in model.named_modules():
        for adapter in _trained_adapters(module):
            _check_plain(name, module, adapter)
            layers[f"{name}.{adapter}"] = MixedLayer(module, adapter)
            for part in (module.lora_A[adapter], module.lora_B[adapter]):
                left.pop(id(part.weight), None)
    if left or not layers:
        found = f"{next(iter(left.values()))} is trained" if left else "no layer has a trained LoRA adapter"
        raise ModelError(
            f"mixout.p: {found}, and mixout covers LoRA on linear layers alone; name those in adapter.targets "
            "(q_proj, v_proj, …), or set mixout.p: 0"
        )
    return layers


def _trained_adapters(module: Any) -> list[str]:
    """Names of a LoRA layer's adapters with a trained A or B; none for other modules, and for bare parameters."""
    pairs = {name: (a, module.lora_B[name]) for name, a in getattr(module, "lora_A", {}).items() if name in module.lora_B}
    return [name for name, parts in pairs.items() if any(p.requires_grad for part in parts for p in part.parameters())]


def _check_plain(name: str, module: Any, adapter: str) -> None:
    """Check that a layer computes its adapter through our plain variant, without dropout.

    Raises:
        ModelError: it does not.
    """
    reason = None
    if getattr(module.lora_dropout[adapter], "p", 0):
        reason = "it has dropout, which is a second mask of the same input; set adapter.dropout: 0"
    elif module.lora_bias.get(adapter):
        reason = "its adapter has a bias (lora_bias), which is no part of ΔW; make the adapter without one"
    elif module.use_dora.get(adapter):
        reason = "it is a DoRA layer, whose weight is not W0 + ΔW; use plain LoRA"
    elif type(module.lora_variant.get(adapter)) is not InBaseDtype:
        kind = type(module.lora_variant.get(adapter) or module)
        reason = f"it is computed by PEFT's {kind.__name__}; mixout covers plain LoRA on linear layers, full, 8-bit or 4-bit"
    if reason:
        raise ModelError(f"mixout.p: {name} cannot be mixed: {reason}, or set mixout.p: 0")


def _has_gradient(layer: MixedLayer) -> bool:
    gradients = [part[layer.adapter].weight.grad for part in (layer.module.lora_A, layer.module.lora_B)]
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)

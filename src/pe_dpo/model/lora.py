"""A LoRA layer's own part, added into the base layer's output in one product and in the base's dtype.

    y ← y + s · (x Aᵀ) Bᵀ

PEFT computes it in the adapter's dtype, float32 here, for which a bfloat16 base's inputs are copied, and in three passes over
the output. Here the parameters stay float32, and so do their gradients and the optimizer; the products are in the dtype of
the base, as the base's own. It comes in through PEFT's LoRA variants, so that everything else of PEFT goes on working.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from pe_dpo.model.fixed import kept


def _cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if parameter.dtype == dtype or not isinstance(parameter, nn.Parameter):
        return parameter.to(dtype)
    return kept(parameter, dtype, lambda: parameter.detach().to(dtype))


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        narrow = x.reshape(-1, x.shape[-1]) @ _cast(a, x.dtype).T
        ctx.save_for_backward(x, a, b, narrow)
        ctx.scaling = scaling
        ctx.mark_dirty(result)
        result.view(-1, result.shape[-1]).addmm_(narrow, _cast(b, x.dtype).T, alpha=scaling)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        x, a, b, narrow = ctx.saved_tensors
        flat = gradients[0].reshape(-1, gradients[0].shape[-1])
        pull = flat @ (_cast(b, x.dtype) * ctx.scaling)
        for_x, for_a, for_b = ctx.needs_input_grad[1:4]
        return (
            gradients[0],
            (pull @ _cast(a, x.dtype)).view(x.shape) if for_x else None,
            (pull.T @ x.reshape(-1, x.shape[-1])).to(a.dtype) if for_a else None,
            (flat.T @ narrow).to(b.dtype).mul_(ctx.scaling) if for_b else None,
            None,
        )


class InBaseDtype(LoraVariant):
    """PEFT's plain LoRA, computed in the dtype of the base."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to make: A and B are PEFT's."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Return the layer's output with the update added."""
        return add_update(module, active_adapter, module.lora_dropout[active_adapter](x.to(result.dtype)), result)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the update added."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the update to the weight."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the update taken off."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def compute_in_base_dtype(model: nn.Module) -> None:
    """Let every plain linear LoRA layer of a PEFT model compute in its base's dtype; other kinds of layers stay PEFT's.

    Plain is one around a linear layer, quantized or not, without a bias or variant of its own.
    """
    import peft.tuners.lora.bnb as quantized

    kinds = [Linear, *(getattr(quantized, name) for name in ("Linear4bit", "Linear8bitLt") if hasattr(quantized, name))]
    layers: list[Any] = [module for module in model.modules() if type(module) in kinds]
    for layer in layers:
        if any(layer.lora_B[adapter].bias is not None for adapter in layer.lora_B):
            continue
        if not all(isinstance(variant, InBaseDtype) for variant in layer.lora_variant.values()):
            continue
        layer.cast_input_dtype_enabled = False
        layer.lora_variant.update({name: InBaseDtype() for name in layer.lora_A if name not in layer.lora_variant})


def add_update(module: Any, adapter: str, x: Tensor, result: Tensor, a: Tensor | None = None) -> Tensor:
    """Return a layer's output with the update s · B · A of an adapter added.

    Args:
        module: the LoRA layer.
        adapter: the name of one of its adapters.
        x: (…, d_in), the layer's input.
        result: (…, d_out), its output so far, in x's dtype; may be written over.
        a: (r, d_in), instead of the adapter's own A.
    """
    a = module.lora_A[adapter].weight if a is None else a
    updated: Tensor = _AddUpdate.apply(adds_to(result), x, a, module.lora_B[adapter].weight, module.scaling[adapter])
    return updated


def adds_to(result: Tensor) -> Tensor:
    """Return a layer's output as something that may be added to in place."""
    return result.clone() if result._base is not None else result.contiguous()  # int8 layers return a view

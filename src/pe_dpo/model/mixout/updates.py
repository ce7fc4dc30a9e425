"""Mixout of LoRA layers: inverted dropout on ΔW = s·B·A, with one mask for all tokens. W0 is never touched, and may be 4-bit.

    column     y = W0 x + s · B · (A · diag(m)/(1−p)) x        m multiplies the columns of A; no token pays for it
    element    y = W0 x + (M ⊙ s·B·A)/(1−p) · x                made and forgotten in blocks of rows, forward and backward

Where the reference is a frozen copy, ΔW is mixed with its update instead of 0. One that acts under ΔW is not in the mixture.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pe_dpo.model.lora import InBaseDtype, add_update, adds_to
from pe_dpo.model.mixout.masks import MaskKey, Mixout
from pe_dpo.model.mixout.weights import blocks


class MixedUpdate(InBaseDtype):
    """LoRA in the base's dtype, which is mixed in training mode and whole in eval mode.

    Args:
        mixout: has the masks.
        layer: the layer's name there.
        anchor: the adapter, if any, that is part of the reference: W̃ is then mixed with W0 + ΔW of that adapter.
    """

    def __init__(self, mixout: Mixout, layer: str, anchor: str | None = None) -> None:
        self.mixout, self.layer, self.anchor = mixout, layer, anchor

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the layer's output with the update added."""
        if not module.training and not self.mixout.is_sampling:
            return super().forward(module, active_adapter, x, result, **kwargs)
        x = x.to(result.dtype)
        a = module.lora_A[active_adapter].weight
        if self.mixout.form == "element":
            frozen = None if self.anchor is None else _Factors(module, self.anchor)
            own, mask = _Factors(module, active_adapter), self.mixout.mask_key(self.layer, a)
            mixed: Tensor = _AddMixedUpdate.apply(
                adds_to(result), x, own.a, own.b, own.scaling, frozen, self.mixout.opened(), *mask
            )
            return mixed
        factors = self.mixout.factors(self.layer, a)
        result = add_update(module, active_adapter, x, result, self.mixout.held(a * factors))
        if self.anchor is None:
            return result
        return add_update(module, self.anchor, x, result, module.lora_A[self.anchor].weight * (1 - factors))


class _Factors:
    """A and B of one adapter of a layer, and its scale."""

    def __init__(self, module: Any, adapter: str) -> None:
        self.a: Tensor = module.lora_A[adapter].weight
        self.b: Tensor = module.lora_B[adapter].weight
        self.scaling: float = module.scaling[adapter]


class _AddMixedUpdate(torch.autograd.Function):
    """Adds x · (M ⊙ ΔW)ᵀ/(1−p); the mask and the mixed rows are made again in the backward, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        frozen: _Factors | None,
        check: Callable[[], None] | None,
        *mask: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, *mask)
        ctx.scaling, ctx.frozen, ctx.check = scaling, frozen, check
        ctx.mark_dirty(result)
        flat, out = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
        for start, end, _, mixed in _mixed_rows(a, b, scaling, frozen, MaskKey(*mask), x.dtype):
            out[:, start:end].addmm_(flat, mixed.T)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.check:  # before torch finds, in its own words, that the mask was written over
            ctx.check()
        x, a, b, *mask = ctx.saved_tensors
        flat, pull = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, gradients[0].shape[-1])
        wanted = zip((flat, a, b), ctx.needs_input_grad[1:4], strict=True)
        for_x, for_a, for_b = (torch.zeros_like(part) if is_wanted else None for part, is_wanted in wanted)
        for start, end, factors, mixed in _mixed_rows(a, b, ctx.scaling, ctx.frozen, MaskKey(*mask), x.dtype):
            if for_x is not None:
                for_x.addmm_(pull[:, start:end], mixed)
            if for_a is None and for_b is None:
                continue
            rows = (pull[:, start:end].T @ flat).to(a.dtype).mul_(factors)
            if for_a is not None:
                for_a.addmm_(b[start:end].T, rows, alpha=ctx.scaling)
            if for_b is not None:
                torch.mm(rows, a.T, out=for_b[start:end]).mul_(ctx.scaling)
        return gradients[0], None if for_x is None else for_x.view(x.shape), for_a, for_b, *[None] * 6


def _mixed_rows(
    a: Tensor, b: Tensor, scaling: float, frozen: _Factors | None, mask: MaskKey, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield first row of each block, the row after its last, its factors, and the mixed update's rows, in a dtype."""
    width = a.shape[1]
    for start, end in blocks(b.shape[0], width, a.device):
        factors = mask.factors(start * width, (end - start, width))
        rows = (b[start:end] @ a).mul_(scaling)
        if frozen is None:
            yield start, end, factors, rows.mul_(factors).to(dtype)
        else:
            kept = (frozen.b[start:end] @ frozen.a).mul_(frozen.scaling)
            yield start, end, factors, rows.sub_(kept).mul_(factors).add_(kept).to(dtype)

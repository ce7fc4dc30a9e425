"""Log-probs of tokens from hidden states, without a matrix of all logits.

For a frozen head the gradient of a token's log-prob depends on that token alone, so it is formed in the forward:

    z_v = transform(h·W_v + b_v)      log p = z_y − log Σ_v exp z_v      ∂ log p / ∂h = z'_y W_y − Σ_v softmax(z)_v z'_v W_v

Both sums run over the vocabulary in chunks, rescaled when a larger logit comes along (as in online softmax, Milakov &
Gimelshein 2018). That is two products with W where recomputing logits in the backward takes three, it keeps N×H numbers
instead of N×V, and the backward is one scaling of rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pe_dpo.objective.logprobs import token_logprobs

CHUNKS = {"cpu": (1024, 2048), "cuda": (4096, 16384)}
"""Tokens and vocabulary entries of one tile of logits: 8 MB, near a CPU core's cache, and 256 MB on a GPU. Never a function of
the batch: then a token's number would depend on its company."""

SMALLEST = 16
"""Fewer tokens than this go through other kernels on the CPU, which sum in another order: 4 on one thread, 12 on two."""


class LogitTransform(NamedTuple):
    """What a model does to its logits after the head: softcap · tanh(scale · logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None
    """None for no cap."""

    def apply(self, logits: Tensor) -> Tensor:
        """Return the transformed logits, same shape and dtype."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Return the derivative with respect to the logits, at the transformed values."""
        return self.scale if self.softcap is None else self.scale * (1 - (transformed / self.softcap) ** 2)


PLAIN = LogitTransform()


def head_logprobs(hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform = PLAIN) -> Tensor:
    """Return log softmax(transform(head(hidden)))[target] of each token, differentiable in `hidden`.

    A plain frozen linear head takes the fused path; a trained, adapted or unusual one the general path, which recomputes its
    tiles of logits in the backward.

    Args:
        hidden: (N, H) of any floating dtype.
        targets: (N,) int64.
        head: maps (n, H) to (n, V).
        transform: what the model does to its logits.

    Returns:
        (N,) nats, float32, or float64 where `hidden` is.
    """
    if is_frozen_linear(head):
        return _FrozenHead.apply(hidden, targets, head.weight, head.bias, transform)

    def tile(states: Tensor, ids: Tensor) -> Tensor:
        with wide_logits(head):
            return token_logprobs(transform.apply(_wide(head(states))), ids)

    size = _chunks(hidden)[0]
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(tile, states, ids, use_reentrant=False) for states, ids in pieces])


def is_frozen_linear(head: nn.Module) -> bool:
    """Return whether a head is a plain linear layer without trained parameters, hooks or adapters."""
    return (
        type(head) is nn.Linear
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not head._forward_hooks
        and not head._forward_pre_hooks
    )


@contextmanager
def wide_logits(head: nn.Module | None) -> Iterator[None]:
    """Within the block a linear head of a 16-bit model, under an adapter or not, returns its logits in float32.

    Args:
        head: any module, or None; other kinds of heads, and trained ones, are left as they are.
    """
    head = getattr(head, "base_layer", head)
    if head is None or not is_frozen_linear(head) or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    layer, before = head, vars(head).get("forward")
    vars(layer)["forward"] = lambda hidden: _WideLinear.apply(hidden, layer.weight, layer.bias)
    try:
        yield
    finally:
        if before is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = before


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = hidden.dtype
        logits = wide_product(hidden.reshape(-1, hidden.shape[-1]), weight)
        if bias is not None:
            logits += bias
        return logits.view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0].to(ctx.dtype) @ weight, None, None


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        size = _chunks(hidden)[0]
        tokens = len(hidden)
        if tokens % size < SMALLEST:
            hidden = torch.cat([hidden, hidden.new_zeros(SMALLEST, hidden.shape[1])])
            targets = torch.cat([targets, targets.new_zeros(SMALLEST)])
        tiles = zip(hidden.split(size), targets.split(size), strict=True)
        parts = [_tile(states, ids, weight, bias, transform, wants_gradient) for states, ids in tiles]
        if wants_gradient:
            ctx.save_for_backward(torch.cat([gradient for _, gradient in parts])[:tokens])
        return torch.cat([logprob for logprob, _ in parts])[:tokens]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * slope).to(slope.dtype), None, None, None, None


def _tile(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return log-probs (n,) and, if wanted, their gradients with respect to the hidden states (n, H)."""
    target = torch.zeros(len(targets), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
    peak = torch.full_like(target, -torch.inf)
    total = torch.zeros_like(target)
    pull = torch.zeros_like(hidden, dtype=target.dtype) if wants_gradient else hidden
    for start in range(0, weight.shape[0], _chunks(hidden)[1]):
        block = weight[start : start + _chunks(hidden)[1]]
        logits = wide_product(hidden, block)
        if bias is not None:
            logits += _wide(bias[start : start + block.shape[0]])
        logits = transform.apply(logits)
        inside = (targets >= start) & (targets < start + block.shape[0])
        own_column = (targets - start).clamp(0, block.shape[0] - 1).unsqueeze(1)
        target = torch.where(inside, logits.gather(1, own_column).squeeze(1), target)
        higher = torch.maximum(peak, logits.amax(dim=1))
        fade = torch.exp(peak - higher)
        slope = transform.slope(logits) if wants_gradient else 1.0
        mass = logits.sub_(higher.unsqueeze(1)).exp_()
        total = total * fade + mass.sum(dim=1)
        if wants_gradient:
            pull *= fade.unsqueeze(1)
            push = mass if isinstance(slope, float) else mass * slope
            if block.dtype == pull.dtype:
                pull.addmm_(push, block)
            else:  # the product in the dtype of the head
                pull += push.to(block.dtype) @ block
        peak = higher
    logprob = target - peak - total.log()
    if not wants_gradient:
        return logprob, hidden
    at_target, factor = transform.slope(target), transform.scale if transform.softcap is None else 1.0
    own = _wide(weight[targets]) * (at_target if isinstance(at_target, float) else at_target.unsqueeze(1))
    return logprob, (own - pull * (factor / total).unsqueeze(1)).to(hidden.dtype)


def wide_product(rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows · columnsᵀ of (n, H) and (m, H) in float32, summed and never rounded to 16 bits; float64 stays float64."""
    if rows.device.type == "cuda" and rows.dtype == columns.dtype and rows.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(rows, columns.T, out_dtype=torch.float32)
    return _wide(rows) @ _wide(columns).T


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(tensor: Tensor) -> tuple[int, int]:
    return CHUNKS.get(tensor.device.type, CHUNKS["cuda"])

"""Mixout of a weight toward its pretrained value, for modules that are trained whole and for anyone's own loop.

    W̃ = W0 + M ⊙ (W − W0) / (1−p)

With W = W0 this is W0 to the bit, in every dtype. 1/(1−p) is in the gradient as in the value; the code that Lee, Cho & Kang
published leaves it out of the gradient. Nothing of the weight's size is kept for the backward: masks are made again.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_dpo.model.mixout.masks import Draw, Form, MaskKey, check, cut, mask_seed
from pe_dpo.model.random_bits import random_bits

_BLOCK = {"cpu": 2**20}
"""Elements of a matrix whose mask is made at once; the numbers that it is made from take 8 bytes each, several times."""
_BLOCK_ON_GPU = 2**24


def mixout(
    weight: Tensor,
    target: Tensor,
    p: float,
    *,
    form: Form = "column",
    seed: int | None = None,
    draw: Draw = 0,
    name: str = "",
    training: bool = True,
) -> Tensor:
    """Return a weight of which a random share p is that of `target`, the rest scaled so that its mean is `weight`.

    Args:
        weight: (d_out, d_in) as in nn.Linear, or (d,): a bias, a gain, each entry on its own.
        target: the same shape; the pretrained weight. Zeros make it inverted dropout of the weight (DropConnect).
        p: 0 ≤ p ≤ 1; 0 returns `weight` itself, 1 `target`.
        form: "column": one variable per input unit (the paper's mixout, and its code); "element": per weight (its mixconnect).
        seed: the mask is a function of it, `draw` and `name` alone; None: it is drawn from torch's generator for the CPU, so
            that each call has another mask and torch.manual_seed repeats them.
        draw: of the sampled model, say, the number of the optimizer step.
        name: of the weight, so that weights of one model have masks of their own.
        training: False returns `weight` itself.

    Returns:
        As `weight`. Gradients: M/(1−p) of what comes in for `weight`, the rest for `target`.

    Raises:
        ModelError: p is not in [0, 1], or there is no such form.
        ValueError: shapes differ, or have more than two dimensions.

    Source: Lee, Cho & Kang, "Mixout", ICLR 2020 (arXiv 1909.11299), equation 5.
    """
    check(p, form)
    if weight.shape != target.shape or weight.dim() not in (1, 2):
        raise ValueError(
            f"mixout: weight is {tuple(weight.shape)} and target {tuple(target.shape)}; both are (d_out, d_in), or both (d,)"
        )
    if not training or p == 0:
        return weight
    start = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
    key = torch.tensor(mask_seed(start, draw, name), device=weight.device)
    threshold, factor = cut(p)
    limit = torch.tensor(threshold, device=weight.device)
    mask = MaskKey(key, limit, torch.tensor(factor, dtype=weight.dtype, device=weight.device))
    if weight.dim() == 1 or form == "column":
        index = torch.arange(weight.shape[-1], device=weight.device)
        return mix_units(weight, target, (random_bits(key, index) >= limit) * mask.factor)
    return mix_elements(weight, target, mask)


def mix_units(weight: Tensor, target: Tensor, factors: Tensor) -> Tensor:
    """Return target + (weight − target) · factors, which have a shape that goes with theirs."""
    return target + (weight - target) * factors


def mix_elements(weight: Tensor, target: Tensor, mask: MaskKey) -> Tensor:
    """Return target + (weight − target) ⊙ the mask's factors, all (d_out, d_in)."""
    mixed: Tensor = _MixElements.apply(weight, target, *mask)
    return mixed


class MixLinear(nn.Linear):
    """A linear layer that is trained whole, under mixout toward the weight and bias that it was made with.

    Its state dict is that of nn.Linear: make it from the pretrained layer first, then load what was trained. The pretrained
    values follow the layer to other devices and dtypes. Set `draw` for every optimizer step; in eval mode the layer is plain.

    Args:
        linear: the pretrained layer; its parameters become those of this one.
        p: share that is taken from the pretrained layer.
        form: "column" or "element", see `mixout`.
        seed: of the masks.
        name: of the layer, so that layers of one model have masks of their own.

    Raises:
        ModelError: p is not in [0, 1], or there is no such form.
    """

    target: Tensor
    target_bias: Tensor | None

    def __init__(self, linear: nn.Linear, p: float, *, form: Form = "column", seed: int = 0, name: str = "") -> None:
        check(p, form)
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("target", linear.weight.detach().clone(), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("target_bias", bias, persistent=False)
        self.p, self.form, self.seed, self.name = p, form, seed, name
        self.draw: Draw = 0

    def forward(self, input: Tensor) -> Tensor:
        """Return (…, d_out) of (…, d_in)."""
        mixed: dict[str, Tensor] = {}
        for part, own, target in (("weight", self.weight, self.target), ("bias", self.bias, self.target_bias)):
            if target is not None:
                mixed[part] = mixout(
                    own,
                    target,
                    self.p,
                    form=self.form,
                    seed=self.seed,
                    draw=self.draw,
                    name=f"{self.name}.{part}",
                    training=self.training,
                )
        return F.linear(input, mixed["weight"], mixed.get("bias"))


def blocks(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield the first row, and the row after the last, of blocks that are small enough to make their masks at once."""
    step = max(1, _BLOCK.get(device.type, _BLOCK_ON_GPU) // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class _MixElements(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, target: Tensor, *mask: Tensor) -> Tensor:
        ctx.save_for_backward(*mask)
        mixed = torch.empty_like(weight)
        for start, end in blocks(len(weight), weight.shape[1], weight.device):
            factors = MaskKey(*mask).factors(start * weight.shape[1], (end - start, weight.shape[1]))
            torch.addcmul(target[start:end], weight[start:end] - target[start:end], factors, out=mixed[start:end])
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        mask, gradient = MaskKey(*ctx.saved_tensors), gradients[0]
        part = torch.empty_like(gradient)
        for start, end in blocks(len(gradient), gradient.shape[1], gradient.device):
            factors = mask.factors(start * gradient.shape[1], (end - start, gradient.shape[1]))
            torch.mul(gradient[start:end], factors, out=part[start:end])
        of_weight, of_target = ctx.needs_input_grad[:2]
        return part if of_weight else None, gradient - part if of_target else None, None, None, None

"""The masks of mixout: which units are taken from the reference, a pure function of seed, draw and the layer's name.

A mask is the same on every device and needs no state, so that resumed runs, recomputed activations, any split of a step into
micro-batches and any number of processes see one sampled model; torch's random state is neither read nor moved. Masks are
tensors that are written anew, in place, when the draw changes: to a compiled model they are inputs like any other.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_dpo.errors import ModelError
from pe_dpo.model.fixed import is_fixed, kept
from pe_dpo.model.random_bits import random_bits

Form = Literal["column", "element"]
"""One variable for each input unit of a layer (the paper's mixout, and its code), or for each weight (its mixconnect)."""
Draw = int | tuple[int, ...]


class MaskKey(NamedTuple):
    """What a mask of a whole matrix is made from, wherever it is needed; tensors without dimensions.

    Args:
        key: int64.
        threshold: int64; an element whose random bits reach it is kept.
        factor: of what is kept, 1/(1−p); in the dtype of the parameters.
    """

    key: Tensor
    threshold: Tensor
    factor: Tensor

    def factors(self, start: int, shape: tuple[int, int]) -> Tensor:
        """Return the factors 0 or 1/(1−p) of the elements start, start + 1, … of the matrix, in a shape.

        While weights are fixed, that is for all rows of a step and their backward, the mask is kept, a bit for each element:
        the random numbers take some 200 bytes of traffic for each, the bits eight. Other numbers in the place are another mask.
        """
        size = shape[0] * shape[1]

        def drawn() -> Tensor:
            index = torch.arange(start, start + size, device=self.key.device)
            return random_bits(self.key, index) >= self.threshold

        if torch.compiler.is_compiling() or not is_fixed():
            return (drawn() * self.factor).view(shape)
        place = torch.arange(8, dtype=torch.uint8, device=self.key.device)
        written = self.key.data_ptr(), self.key._version, self.threshold._version
        bits = kept(self._owner, (*written, start, size), lambda: _as_bits(drawn(), place))
        is_kept = (bits[:, None] >> place).bitwise_and_(1).view(-1)[:size].bool()
        return (is_kept * self.factor).view(shape)

    @property
    def _owner(self) -> Tensor:
        """The tensor whose place it is: of a saved tensor there is a new object at each reading."""
        return self.key if self.key._base is None else self.key._base


def _as_bits(mask: Tensor, place: Tensor) -> Tensor:
    """Return (⌈n/8⌉,) uint8 of (n,) bool."""
    return (F.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8) << place).sum(dim=1, dtype=torch.uint8)


@dataclass
class Layer:
    """What has a mask of its own.

    Args:
        units: how many variables; None for a matrix in the form "element", whose mask is never held.
        parameters: that are trained in it.
        is_reached: whether it was ever computed with its mask and with gradients.
    """

    units: int | None
    parameters: tuple[Tensor, ...]
    is_reached: bool = False


class Mixout:
    """The masks of a model.

    Args:
        p: share that is taken from the reference, 0 ≤ p ≤ 1; at 1 the model is the reference.
        seed: of the masks.
        form: "column" or "element".
        layers: by name.

    Raises:
        ModelError: p is not in [0, 1], or there is no such form.
    """

    def __init__(self, p: float, seed: int, form: Form, layers: Mapping[str, Layer]) -> None:
        check(p, form)
        self.seed, self.form, self.layers = seed, form, dict(layers)
        self.is_sampling = False
        """Whether layers are mixed in eval mode too."""
        self._p = p
        self._draw: Draw = 0
        self._forward = self._sample
        self._placed: dict[tuple[torch.device, torch.dtype], _Masks] = {}
        for layer in self.layers.values():  # now, since a compiled model may read masks and not make them
            self._masks(layer.parameters[0])

    @property
    def p(self) -> float:
        """Share that is taken from the reference; set it where `draw` may be set."""
        return self._p

    @p.setter
    def p(self, p: float) -> None:
        check(p)
        if p and not self.layers:
            raise ModelError(f"mixout: p is {p:g}, and no layer is mixed: it was attached with p = 0; attach it with p > 0")
        if p != self._p:
            self._p = p
            self._write()

    @property
    def draw(self) -> Draw:
        """The number, or numbers, of the sampled model; set it when the backward is done, never between it and its forward."""
        return self._draw

    @draw.setter
    def draw(self, number: Draw) -> None:
        if number != self._draw:
            self._draw = number
            self._write()

    def factors(self, layer: str, like: Tensor) -> Tensor:
        """Return this draw's factors of a layer's units, (units,) in the device and dtype of `like`: 0 or 1/(1−p)."""
        self._note(layer)
        return self._masks(like).factors[layer]

    def mask_key(self, layer: str, like: Tensor) -> MaskKey:
        """Return what this draw's mask of a whole matrix is made from, on the device of `like`."""
        self._note(layer)
        masks = self._masks(like)
        return MaskKey(masks.keys[layer], masks.threshold, masks.factor)

    @contextmanager
    def sampled(self, draw: Draw) -> Iterator[None]:
        """Within the block the model is the sampled one in eval mode too; afterwards all is as before."""
        before = self.is_sampling, self._draw
        self.is_sampling, self.draw = True, draw
        try:
            yield
        finally:
            self.is_sampling, self.draw = before

    def check_reached(self) -> None:
        """Check after a step's backward that no layer learned without mixout.

        Raises:
            ModelError: a layer was trained, but what computed it passed over mixout.
        """
        missed = [
            name
            for name, layer in self.layers.items()
            if not layer.is_reached and any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters)
        ]
        if missed:
            raise ModelError(
                f"mixout.p: {len(missed)} layers were trained without mixout ({missed[0]}, …): something computes their update "
                "past PEFT's layer, say, a fused kernel. Switch that off, name other adapter.targets, or set mixout.p: 0"
            )

    def held(self, part: Tensor) -> Tensor:
        """Return a tensor of a forward, whose backward begins with the check of `opened`."""
        check = self.opened()
        held: Tensor = part if check is None else _Held.apply(part, check)
        return held

    def opened(self) -> Callable[[], None] | None:
        """Return what a forward's backward begins with: a check that draw and p are still those of the forward.

        It raises ModelError where they are not, since masks and activations would be those of another model. None in a compiled
        graph, where masks are saved inputs and torch finds that they were written over.
        """
        return None if torch.compiler.is_compiling() else partial(self._check_open, self._sample)

    @property
    def _sample(self) -> tuple[Draw, float]:
        """Draw and p: with the seed, which model is sampled."""
        return self._draw, self._p

    def _check_open(self, sample: tuple[Draw, float]) -> None:
        if sample != self._sample:
            (draw, p), (draw_now, p_now) = sample, self._sample
            raise ModelError(
                f"mixout: this backward belongs to draw {draw} with p = {p:g}, and by now the draw is {draw_now} and p is "
                f"{p_now:g}; set `draw` and `p` only after the backward"
            )

    def _note(self, layer: str) -> None:
        if torch.is_grad_enabled():  # what is only measured is no training
            self.layers[layer].is_reached = True
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:  # no backward is running: this is the forward itself
            self._forward = self._sample
        else:
            self._check_open(self._forward)

    def _masks(self, like: Tensor) -> "_Masks":
        place = like.device, like.dtype
        if place not in self._placed:
            self._placed[place] = _Masks(self.layers, *place)
            self._placed[place].write(self.seed, self._draw, self._p)
        return self._placed[place]

    def _write(self) -> None:
        for masks in self._placed.values():
            masks.write(self.seed, self._draw, self._p)


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, check: Callable[[], None]) -> Tensor:
        ctx.check = check
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.check()
        return gradients[0], None


class _Masks:
    """All masks on one device in one dtype, in tensors that keep their place."""

    @torch.inference_mode(False)
    def __init__(self, layers: Mapping[str, Layer], device: torch.device, dtype: torch.dtype) -> None:
        units = [layer.units or 0 for layer in layers.values()]
        self._units = torch.tensor(units, device=device)
        self._index = torch.cat([torch.arange(count, device=device) for count in units])
        self._keys = torch.zeros(len(units), dtype=torch.int64, device=device)
        self._factors = torch.zeros(sum(units), dtype=dtype, device=device)
        self.threshold = torch.zeros((), dtype=torch.int64, device=device)
        self.factor = torch.zeros((), dtype=dtype, device=device)
        self.keys = dict(zip(layers, self._keys.unbind(), strict=True))
        self.factors = dict(zip(layers, self._factors.split(units), strict=True))

    @torch.no_grad()
    def write(self, seed: int, draw: Draw, p: float) -> None:
        """Write the masks of a draw, all in one pass."""
        self._keys.copy_(torch.tensor([mask_seed(seed, draw, name) for name in self.keys], dtype=torch.int64))
        threshold, factor = cut(p)
        self.threshold.fill_(threshold)
        self.factor.fill_(factor)
        of_units = self._keys.repeat_interleave(self._units, output_size=len(self._index))
        kept = random_bits(of_units, self._index) >= self.threshold
        self._factors.copy_(kept * self.factor)


def mask_seed(seed: int, draw: Draw, name: str) -> int:
    """Return the int64 that a layer's mask is made from."""
    digest = hashlib.sha256(f"{seed} {draw} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def cut(p: float) -> tuple[int, float]:
    """Return which random bits of 53 keep a unit, these and larger ones; and 1/(1−p), by which what is kept is multiplied.

    The factor is 0 at p = 1, where nothing is kept.
    """
    return round(p * 2**53), 1 / (1 - p) if p < 1 else 0.0


def check(p: float, form: str = "column") -> None:
    """Check a share and the name of a form.

    Raises:
        ModelError: the share is not in [0, 1], or there is no form of this name.
    """
    if not 0 <= p <= 1:
        raise ModelError(f"mixout: p is {p:g}: it is the share that is taken from the reference, from 0 to 1")
    if form not in get_args(Form):
        raise ModelError(f"mixout: form is {form!r}: it is {' or '.join(get_args(Form))}")

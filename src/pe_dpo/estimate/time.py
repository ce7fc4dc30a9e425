"""Seconds of an optimizer step on a card, counted: products, what is moved through memory beside them, 4-bit codes turned to
values.

    forward 2, backward 2       floating-point operations a weight and token: frozen weights have no gradient of their own
    recomputed, the reference   2 more each
    head                        4 a weight of it and scored token, in one pass

A moment has one limit or the other: large products are bound by arithmetic, what lies between them by memory, one after the
other, so that their times add up. A row of few tokens is bound by the 222 kernels that a layer launches.
"""

from typing import NamedTuple

from pe_dpo.estimate.cards import Card
from pe_dpo.estimate.memory import Row, Setup
from pe_dpo.quantizations import bytes_per_weight, is_four_bit

BANDWIDTH_REACHED = 0.9
KERNELS_A_LAYER = 222
"""Forward and backward of one row, counted by torch's profiler on an 8B shape (7,109 in all)."""
KERNEL_SECONDS = 8e-6
"""To launch one from Python."""


class StepTime(NamedTuple):
    """Seconds of forward and backward over some rows, by what takes them."""

    products: float
    moving: float
    """Norms, activations, rotations, adapters: read and written in memory."""
    codes: float
    """4-bit or 8-bit codes turned into values for each product."""
    launching: float
    """Where launching kernels takes longer than what they do: the rest of that."""

    @property
    def seconds(self) -> float:
        """All together."""
        return sum(self)

    def __add__(self, other: "StepTime") -> "StepTime":  # type: ignore[override]
        return StepTime(*(one + another for one, another in zip(self, other, strict=True)))


NOTHING = StepTime(0.0, 0.0, 0.0, 0.0)


def operations(setup: Setup, row: Row, *, is_reference: bool = False) -> float:
    """Return the floating-point operations of a row's forward and backward; of the reference its forward."""
    shape = setup.shape
    passes = 1 if is_reference else 3 if setup.recomputes(row) else 2
    body = 2.0 * shape.body * row.tokens * passes
    attention = 4.0 * shape.heads * shape.head_size * row.scores * (shape.layers - shape.delta_layers)
    attention *= 0.5 * (
        1 if is_reference else 4.5 if setup.recomputes(row) else 3.5
    )  # causal: half; backward 2.5 times a forward
    adapters = 0.0 if is_reference else 2.0 * (setup.trained + setup.frozen) * row.tokens * (4 if setup.recomputes(row) else 3)
    head = 2.0 * shape.vocabulary * shape.hidden * row.scored * (1 if is_reference else 2)
    return body + attention + adapters + head


def moved(setup: Setup, row: Row, *, is_reference: bool = False) -> float:
    """Return the bytes that a row's forward and backward read and write outside of large products' own tiles.

    Of every layer and token, in numbers of the compute width: a linear layer's input and output once (forward) or once again
    (backward), an adapter's reading and adding; norms in float32 step by step as transformers writes them; gate, activation and
    up. For Llama-3.1-8B that comes to 2.8 MB a layer and token, as the kernels of a profile add up to.
    """
    shape, width = setup.shape, setup.width / 2
    queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    forwards = 2 if setup.recomputes(row) and not is_reference else 1
    backward = 0 if is_reference else 1
    adapted = {weight.path for weight, _ in setup.adapted} if not is_reference else set()
    total = 0.0
    inner = 0.0
    for weight in shape.of_text:
        layers = len(weight.layers) * (shape.experts_a_token if weight.role == "experts" else 1)
        forward, back = 2 * (weight.inputs + weight.outputs), 2 * (weight.inputs + weight.outputs)
        if weight.path in adapted:
            forward, back = 4 * weight.inputs + 6 * weight.outputs, 12 * weight.inputs + 6 * weight.outputs
        total += layers * (forwards * forward + backward * back)
        inner += layers * weight.inputs if weight.path.endswith("down_proj") else 0
    norms = shape.norms * shape.hidden + (queries + keys if shape.has_query_norm else 0)
    total += shape.layers * (forwards * 36 + backward * 60) * norms
    total += shape.layers * (forwards * 12 + backward * 12) * shape.hidden
    total += (forwards * 10 + backward * 18) * inner
    total += shape.layers * (forwards * 18 + backward * 20) * (queries + keys)
    total += shape.layers * (forwards * 8 + backward * 22) * queries
    return total * width * row.tokens


def row_time(setup: Setup, row: Row, card: Card, *, is_reference: bool = False) -> StepTime:
    """Return the seconds of one row."""
    shape = setup.shape
    passes = 1 if is_reference else 3 if setup.recomputes(row) else 2
    per_weight = bytes_per_weight(setup.quantize) + 2 * setup.width if setup.coded else 0.0
    bandwidth = BANDWIDTH_REACHED * card.bandwidth * 1e9
    products = operations(setup, row, is_reference=is_reference) / (card.reached * card.tflops * 1e12)
    # A frozen weight of 16 bits is read by the product itself, which large rows hide.
    found = StepTime(
        products, moved(setup, row, is_reference=is_reference) / bandwidth, passes * setup.coded * per_weight / bandwidth, 0
    )
    launching = KERNEL_SECONDS * KERNELS_A_LAYER * shape.layers * (1 / 3 if is_reference else passes / 2)
    if is_four_bit(setup.quantize):
        launching *= 1.15
    return found._replace(launching=max(0.0, launching - found.seconds))


def rows_time(setup: Setup, rows: list[Row], card: Card, *, is_reference: bool = False) -> StepTime:
    """Return the seconds of several rows one after another."""
    return sum((row_time(setup, row, card, is_reference=is_reference) for row in rows), NOTHING)

"""What is made once for all rows of a step, while adapters and masks stand still: 16-bit copies, masks of whole matrices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_KEPT: list[dict[Any, tuple[Tensor, Tensor]]] = []
"""Of the blocks that are open; for all threads, as CUDA's backward runs in one of its own."""


@contextmanager
def fixed_weights() -> Iterator[None]:
    """Within the block no adapter changes, and what `kept` makes of it is made once; blocks within it share that.

    Whether one has changed cannot be asked: bitsandbytes' optimizers write through bare pointers.
    """
    _KEPT.append(_KEPT[-1] if _KEPT else {})
    try:
        yield
    finally:
        _KEPT.pop()


def is_fixed() -> bool:
    """Return whether a block is open."""
    return bool(_KEPT)


def kept(source: Tensor, what: Any, make: Callable[[], Tensor]) -> Tensor:
    """Return what is made of a tensor, the first one that was made of it in the block; outside of one make it now.

    Args:
        source: stays alive with it, so that its id stays its own.
        what: tells it from others that are made of the same tensor.
        make: returns it, without a gradient.
    """
    if not _KEPT:
        return make()
    name = id(source), what
    if name not in _KEPT[-1]:
        _KEPT[-1][name] = source, make()
    return _KEPT[-1][name][1]

"""Several forwards of one model that take its layers one after the other together, so that each is loaded once for all.

                layer 1       layer 2       layer 3
    forward 1   compute ─┐  ┌ compute ─┐  ┌ compute …
    forward 2   compute ─┤  ├ compute ─┤  ├ compute …       one layer in memory at a time, and the inputs of all forwards
    forward 3   compute ─┘  └ compute ─┘  └ compute …

Each forward runs in a thread of its own, only so that it can rest in the middle: one of them runs at a time, and the layers
compute in the caller's thread, to the same bits as in a forward by itself. What a model does between its layers (masks, rotary
embeddings, states that it hands around) stays its own affair.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from threading import Semaphore, local
from typing import Any, Generic, TypeVar

import torch
from torch import nn

_Result = TypeVar("_Result")
_THREAD = local()


class _Forward(Generic[_Result]):
    """Work in a thread of its own that rests wherever it needs a layer, until it is told to go on."""

    def __init__(self, work: Callable[[], _Result]) -> None:
        self._work, self._turn, self._rests = work, Semaphore(0), Semaphore(0)
        self.layer: str | None = None
        """That it needs to go on; None before the first and after the last."""
        self._call: Callable[[], Any] | None = None
        self._output: Any = None
        self._is_abandoned = False

    def run(self) -> _Result:
        """Return the result of the work; called in the thread."""
        _THREAD.forward = self
        try:
            self._wait()
            torch.set_num_threads(1)  # in this thread: there is little between layers, and each would keep a pool
            return self._work()
        finally:
            self.layer = None
            self._rests.release()

    def hand_over(self, layer: str, call: Callable[[], Any]) -> Any:
        """Rest, and return what the layer gives; called in the thread in the layer's place."""
        self.layer, self._call = layer, call
        self._rests.release()
        self._wait()
        output, self._output = self._output, None
        return output

    def go_on(self) -> None:
        """Compute the layer that is needed, if one is, and let the thread run to the next; called where that is loaded."""
        if self._call is not None:
            self._output, self._call = self._call(), None
        self._turn.release()
        self._rests.acquire()

    def abandon(self) -> None:
        """Let the thread end."""
        self._is_abandoned = True
        self._turn.release()

    def _wait(self) -> None:
        self._turn.acquire()
        if self._is_abandoned:
            raise RuntimeError("another forward failed")


def layer_by_layer(
    work: Sequence[Callable[[], _Result]],
    layers: Mapping[str, nn.Module],
    loaded: Callable[[str], AbstractContextManager[Any]],
) -> list[_Result]:
    """Return what each piece of work returns, in its order.

    Args:
        work: each a forward of the same model, without gradients.
        layers: modules of it, by a name.
        loaded: by its name, in which block a layer has its weights.
    """
    forwards = [_Forward(piece) for piece in work]
    threads = torch.get_num_threads()
    before: dict[str, Any] = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.forward = partial(_stand_in, name, layer.forward)
    try:
        with ThreadPoolExecutor(len(forwards)) as pool, torch.no_grad():
            results = [pool.submit(forward.run) for forward in forwards]
            try:
                for forward in forwards:
                    forward.go_on()
                while needed := next((forward.layer for forward in forwards if forward.layer is not None), None):
                    with loaded(needed):
                        for forward in [forward for forward in forwards if forward.layer == needed]:
                            forward.go_on()
            finally:
                for forward in forwards:
                    forward.abandon()
            return [result.result() for result in results]
    finally:
        torch.set_num_threads(threads)
        for name, layer in layers.items():
            del layer.forward
            if before[name] is not None:
                layer.forward = before[name]


def _stand_in(name: str, computes: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """What stands in a layer's place while forwards go through it together."""
    return _THREAD.forward.hand_over(name, partial(computes, *args, **more))

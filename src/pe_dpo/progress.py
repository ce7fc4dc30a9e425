"""How far long work is: whoever does it reports here, and whoever wants to show it listens here.

    with showing(bar):                      # once, at the top: the command line, a notebook
        with progress("scoring, policy"):   # what is being done, named by whoever begins it
            advance(128, 2000)              # how far it is, said by whoever does it

Without a listener, or outside a named piece of work, a report goes nowhere. Both are context variables, so that two threads do
not report into each other's bars.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
"""Called with what is being done, how many parts of it are done, and how many there are."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_work: ContextVar[str | None] = ContextVar("work", default=None)


@contextmanager
def showing(listener: Listener | None) -> Iterator[None]:
    """Within the block, progress is reported to this listener; None is for nobody."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def progress(what: str | None) -> Iterator[None]:
    """Within the block, `advance` speaks of this piece of work; None keeps what happens inside to itself."""
    token = _work.set(what)
    try:
        yield
    finally:
        _work.reset(token)


def current_work() -> str | None:
    """Return the name of the current piece of work; None outside of a named one."""
    return _work.get()


def advance(done: int, total: int) -> None:
    """Report that so many of all parts of the current piece of work are done; 0 are all where nobody knows their number."""
    listener, what = _listener.get(), _work.get()
    if listener is not None and what is not None:
        listener(what, done, total)

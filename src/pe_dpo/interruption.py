"""Signals that ask a process to end: an exception wherever it is, a word where work must first come to a good end.

    with listening():                         # at the top: a command, a run
        …                                     # the first signal raises Interrupted here
        with finishing() as signals:          # the steps of a run
            …                                 # here it is noted in signals.received, and whoever works there ends well

A second SIGTERM or SIGINT waits for no step and raises Interrupted there, too. One that comes while an exception is on its way
ends the process at once, as it does where nobody listens.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pe_dpo.progress import current_work

STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
"""Asked to end, Ctrl-C, the terminal is gone, and the notice that a job scheduler gives before it ends a job."""
PERSISTING = ("SIGHUP", "SIGUSR1")
"""These come more than once without meaning more: kernel and shell both tell that a terminal is gone."""


class Interrupted(KeyboardInterrupt):
    """A signal that asked the process to end; like Ctrl-C it is no `Exception`, and libraries let it through.

    Its notes say what is kept and how to go on; whoever knows adds one (`add_note`).

    Args:
        number: Of the signal.
        work: What was being done, see `progress`; None where that has no name.
    """

    def __init__(self, number: int, work: str | None = None) -> None:
        self.number, self.work = number, work
        super().__init__(f"stopped by {signal.Signals(number).name}{f' while {work}' if work else ''}")


class Signals:
    """Who hears the signals of `STOPPING` in this process, and the first that came."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_deferred = False
        """Whether the first signal is only noted."""
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Begin to listen, anew if a signal came and was dealt with; outside the main thread signals are somebody else's."""
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            return
        for name in STOPPING:
            number = getattr(signal, name, None)  # not every system has all of them
            before = None if number is None else signal.getsignal(number)
            if number is None or number in self._previous or before is None:  # None: somebody's who could not get it back
                continue
            if name == "SIGHUP" and before == signal.SIG_IGN:  # nohup: it is to outlive its terminal
                continue
            self._previous[number] = signal.signal(number, self._receive)

    def restore(self, but: Sequence[str] = ()) -> None:
        """Give the signals back to whoever handled them before, all `but` some."""
        for number, handler in list(self._previous.items()):
            if signal.Signals(number).name not in but:
                signal.signal(number, handler)
                del self._previous[number]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and signal.Signals(number).name in PERSISTING:
            return
        is_noted = self.is_deferred and self.received is None
        self.received = self.received or number
        if not is_noted:
            self.restore(but=PERSISTING)
            raise Interrupted(number, current_work())


_listening: list[Signals] = []


@contextmanager
def listening() -> Iterator[Signals]:
    """Within the block the first signal raises Interrupted; within another such block it is that one's."""
    if _listening:
        yield _listening[-1]
        return
    signals = Signals()
    _listening.append(signals)
    try:
        signals.listen()
        yield signals
    finally:
        _listening.remove(signals)
        signals.restore()


@contextmanager
def finishing() -> Iterator[Signals]:
    """Within the block the first signal is noted and only a second one is raised; what came before the block counts, too."""
    with listening() as signals:
        before, signals.is_deferred = signals.is_deferred, True
        try:
            yield signals
        finally:
            signals.is_deferred = before

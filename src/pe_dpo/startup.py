"""Python's cycle collector at the start and the end of a command, where it finds nothing and takes a third of the time.

While torch and transformers are imported, half a million objects come that stay: the collector looks through them again and
again (0.9 of 5.1 CPU s of `pe-dpo check`), and through all of them once more when the process ends (0.9 s).
"""

import atexit
import gc

_THRESHOLDS = (20_000, 10, 10)
"""Of the collector while a command starts; Python's own are (700, 10, 10) up to 3.13."""
_usual: list[tuple[int, int, int]] = []


def begin() -> None:
    """Let the collector look seldom until `is_over`, and not at all when the process ends; for a process of its own."""
    if not _usual:
        _usual.append(gc.get_threshold())
        atexit.register(gc.freeze)
        gc.set_threshold(*_THRESHOLDS)


def is_over() -> None:
    """Let the collector look as often as before `begin`, where that was called, and only at what comes from now on.

    To be called before models are loaded: tensors may lie in cycles.
    """
    if _usual and gc.get_threshold() == _THRESHOLDS:
        gc.set_threshold(*_usual[0])
        gc.freeze()

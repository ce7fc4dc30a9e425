"""What this package has to say, through Python's logging under the name "pe_dpo": facts are infos, what looks off is a warning.

The command line prints it; a sweep keeps one log per run; of several processes of one run only the first speaks.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from pe_dpo.printable import printable
from pe_dpo.progress import showing

PACKAGE = logging.getLogger("pe_dpo")


class LineFormatter(logging.Formatter):
    """A record as a line for a person: an info as it is, anything graver with its level in front ("warning: …")."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = printable(super().format(record))
        return line if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {line}"


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block nothing below an error is logged and no progress is shown: another process says the same."""
    before = PACKAGE.level
    PACKAGE.setLevel(logging.ERROR)
    try:
        with showing(None):
            yield
    finally:
        PACKAGE.setLevel(before)


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Within the block all is logged for this file and nowhere else, and no progress is shown: there is a table of runs.

    The file is written at the end, if its folder is there then; that it cannot be is a warning.
    """
    kept = MemoryHandler(capacity=1_000_000, flushLevel=logging.CRITICAL + 1)
    handlers, level, propagate = PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate
    PACKAGE.handlers, PACKAGE.propagate = [kept], False
    PACKAGE.setLevel(logging.INFO)
    try:
        with showing(None):
            yield
    finally:
        PACKAGE.handlers, PACKAGE.propagate = handlers, propagate
        PACKAGE.setLevel(level)
        if file.parent.is_dir():
            try:
                lines = logging.FileHandler(file, encoding="utf-8")
                lines.setFormatter(LineFormatter())
                kept.setTarget(lines)
                kept.flush()
                lines.close()
            except OSError as error:  # an error of the block says more than this one
                PACKAGE.warning(f"{file}: the log cannot be written: {error.strerror}; the rest of its run is not concerned")

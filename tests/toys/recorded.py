"""What the package logs, as lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pe_dpo.log import PACKAGE, LineFormatter


@contextmanager
def recording(level: int = logging.INFO) -> Iterator[list[str]]:
    """Within the block, a list of all that the package logs, as the lines that a person would see."""
    lines: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, before = Recorder(level), PACKAGE.level
    handler.setFormatter(LineFormatter())
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        PACKAGE.removeHandler(handler)
        PACKAGE.setLevel(before)

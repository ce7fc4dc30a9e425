"""What the package, or another, logs, as lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pe_dpo.log import PACKAGE, LineFormatter


@contextmanager
def recording(level: int = logging.INFO, logger: logging.Logger = PACKAGE) -> Iterator[list[str]]:
    """Within the block, a list of all that the package (or another logger) logs, as the lines that a person would see."""
    lines: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, before = Recorder(level), logger.level
    handler.setFormatter(LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)

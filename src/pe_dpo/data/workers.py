"""Pairs encoded part by part, in the order of their rows: a few in this process, many in processes beside it.

    rows ── read here, one after the other ── parts ──┬── process 1 ──┬── in order ── columns
                                                      └── process 2 ──┘

Reading rows is a fifth of the work and has one order; rendering and tokenizing has none. Never more than a few parts are under
way, so that memory does not grow with the data.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from pe_dpo.data.encoded import Columns, to_columns
from pe_dpo.data.encoding import EncodedPart, Encoder
from pe_dpo.data.pairs import Pair
from pe_dpo.errors import DataError

logger = logging.getLogger(__name__)

PARTS_HERE = 8
"""So many are encoded before other processes are begun, if half as many follow: two thousand pairs take about a second."""
MOST_PROCESSES = 6
"""Of which reading keeps about five busy."""

Encoded = tuple[EncodedPart, Columns]
"""What became of a part, and its pairs as columns."""


def encode_parts(encoder: Encoder, parts: Iterator[Sequence[Pair]]) -> Iterator[Encoded]:
    """Yield what becomes of each part, in their order.

    Where a pair cannot be encoded, the others are read to their end first: what is wrong with a row is said before.

    Raises:
        DataError: As `Encoder.part`; and what reading raises.
    """
    try:
        for part in islice(parts, PARTS_HERE):
            yield _encode(encoder, part)
        following = list(islice(parts, PARTS_HERE // 2))
        parts = chain(following, parts)
        may_copy = sys.platform == "linux" and not multiprocessing.current_process().daemon
        is_worth = len(following) == PARTS_HERE // 2
        cores = len(os.sched_getaffinity(0)) if may_copy and is_worth else 1
        if cores > 1:
            yield from _encode_beside(encoder, parts, min(cores, MOST_PROCESSES))
        else:
            yield from (_encode(encoder, part) for part in parts)
    except DataError:
        for _ in parts:
            pass
        raise


def _encode(encoder: Encoder, pairs: Sequence[Pair]) -> Encoded:
    part = encoder.part(pairs)
    return part._replace(pairs=[]), to_columns(part.pairs)


def _encode_beside(encoder: Encoder, parts: Iterator[Sequence[Pair]], processes: int) -> Iterator[Encoded]:
    """Yield what becomes of each part in processes that are copies of this one: new ones would import torch, for 2 seconds."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=_begin, initargs=(encoder,))
    under_way: deque[Sequence[Pair]] = deque()
    encoded: deque[Future[Encoded]] = deque()
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of threads, which a copy has not; tokenizers warns of its own unless it is told to use none.
            warnings.simplefilter("ignore", DeprecationWarning)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            pool.submit(int).result()
            if before is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before
        for part in parts:
            under_way.append(part)
            encoded.append(pool.submit(_encode_here, part))
            if len(encoded) > 3 * processes:
                yield encoded.popleft().result()
                under_way.popleft()
        while encoded:
            yield encoded.popleft().result()
            under_way.popleft()
    except BrokenProcessPool:
        logger.warning("a process that encodes pairs was ended from outside, as where memory runs out; going on without it")
        yield from (_encode(encoder, part) for part in chain(under_way, parts))
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None
"""Of a process that does nothing but encode."""


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # which a terminal or a cluster sends to all
        signal.signal(number, signal.SIG_IGN)  # the one that reads the rows ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process beside another one"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()  # also where the other one was killed


def _encode_here(pairs: Sequence[Pair]) -> Encoded:
    assert _encoder is not None, "begun by `_begin`"
    return _encode(_encoder, pairs)

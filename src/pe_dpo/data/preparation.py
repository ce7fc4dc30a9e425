"""From a path to the two sides of a run: read, encode, hold out by prompt, and report.

files -> pairs -> token ids -+-> train
                             +-> held out   (no prompt is on both sides)
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pe_dpo.data.encoding import Overlong, encode_pairs
from pe_dpo.data.loading import read_pairs
from pe_dpo.data.pairs import EncodedPair, Pair
from pe_dpo.data.rendering import Template
from pe_dpo.data.report import OVERLONG, PROMPT_IN_TRAINING, BadRows, DataReport
from pe_dpo.data.sources import Part, Sources, find_sources
from pe_dpo.errors import DataError

_Kind = TypeVar("_Kind", Pair, EncodedPair)

HELD_OUT_SHARE = 0.05  # of the pairs, where the data brings no held-out side of its own


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The pairs to train on, the pairs held out, and what happened on the way."""

    train: list[EncodedPair]
    held_out: list[EncodedPair]
    report: DataReport


def prepare_pairs(
    train: str | Path,
    *,
    tokenizer: Any,
    max_length: int,
    held_out: float | str | None = None,
    columns: Mapping[str, str] | None = None,
    template: Template = "auto",
    overlong: Overlong = "drop",
    bad_rows: BadRows = "error",
    end_token_ids: Collection[int] = (),
    limit: int | None = None,
) -> PreparedData:
    """Both sides of a run as token ids.

    Args:
        train: A file, a folder, or a Hub name; see `pe_dpo.data.sources`.
        tokenizer: A transformers tokenizer.
        max_length: Most tokens of a prompt with its longer answer.
        held_out: A path to held-out pairs; a share of the pairs in (0, 1), split off by prompt; 0 for none; None for
            the held-out file or split that `train` brings, else a share of 0.05.
        columns: From `prompt`, `chosen`, `rejected`, ... to the names of the columns that hold them.
        template: `chat`, `plain`, or `auto`: the chat template where the tokenizer has one.
        overlong: `drop`, `truncate_prompt` or `error`, for pairs longer than `max_length`.
        bad_rows: `error` stops at the first malformed row, `drop` leaves such rows out and counts them.
        end_token_ids: Further ids that end an answer, beside the tokenizer's EOS.
        limit: Read at most so many rows of each side.

    Returns:
        The two sides and the report.

    Raises:
        DataError: When the data cannot be found, read, understood or encoded, or nothing of it is left.
    """
    report = DataReport()
    sources = find_sources(train)
    read = partial(read_pairs, columns=columns, bad_rows=bad_rows, limit=limit, report=report)
    encode = partial(
        encode_pairs,
        tokenizer=tokenizer,
        max_length=max_length,
        report=report,
        template=template,
        overlong=overlong,
        bad_rows=bad_rows,
        end_token_ids=end_token_ids,
    )
    parts = _held_out_parts(sources, held_out)
    report.unused_files = sources.unused + ([] if parts else [part.name for part in sources.held_out])
    share = 0.0 if parts else _held_out_share(held_out)
    encoded = _some(encode(read(sources.train)), train, max_length, report)
    kept, held = split_by_prompt(encoded, share)
    if share:
        report.held_out_from = f"{share:.1%} of the pairs, split by prompt"
    if parts:
        held = _unseen(encode(_some(read(parts), held_out, max_length, report)), kept, report)
        report.held_out_from = ", ".join(part.name for part in parts)
    if not held and (share or parts):
        report.remark(
            "no pair is held out: "
            + ("every prompt of the held-out data is in training or was dropped" if parts else "all pairs have one prompt")
            + "; name other held-out data to measure what is learned"
        )
    report.kept, report.held_out = len(kept), len(held)
    _note_oddities([*kept, *held], report)
    report.measure(kept)
    return PreparedData(kept, held, report)


def split_by_prompt(encoded: Sequence[EncodedPair], share: float) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Pairs to train on and pairs held out, with no prompt on both sides.

    Args:
        encoded: All pairs.
        share: Of the pairs to hold out, in [0, 1). Prompts are taken in the order of their hashes until it is reached,
            so the split depends on no seed and no row order. A prompt with so many pairs that it would take more than
            twice the share, and more than half of what is left, stays to train on; one prompt always does.

    Returns:
        (train, held out), each in the order of the rows.
    """
    counts: dict[str, int] = {}
    for pair in encoded:
        counts[pair.prompt_key] = counts.get(pair.prompt_key, 0) + 1
    taken: set[str] = set()
    pairs_taken = 0
    for key in sorted(counts):
        if pairs_taken >= share * len(encoded) or len(taken) == len(counts) - 1:
            break
        if pairs_taken + counts[key] > max(2 * share * len(encoded), 1) and 2 * counts[key] > len(encoded) - pairs_taken:
            continue
        taken.add(key)
        pairs_taken += counts[key]
    return ([pair for pair in encoded if pair.prompt_key not in taken], [pair for pair in encoded if pair.prompt_key in taken])


def _held_out_parts(sources: Sources, held_out: float | str | None) -> list[Part]:
    if isinstance(held_out, str | Path):
        named = find_sources(held_out)
        return named.held_out or named.train
    return sources.held_out if held_out is None else []


def _held_out_share(held_out: float | str | None) -> float:
    share = HELD_OUT_SHARE if held_out is None else float(held_out)
    if not 0 <= share < 1:
        raise DataError(f"data.eval: {held_out}: a share of the pairs, at least 0 and less than 1, or a path is due")
    return share


def _some(pairs: list[_Kind], source: object, max_length: int, report: DataReport) -> list[_Kind]:
    if pairs:
        return pairs
    reasons = ", ".join(f"{tally.count} {reason}" for reason, tally in report.dropped.items())
    first = next((tally.rows[0] for tally in report.dropped.values()), "none")
    remedy = (
        f"raise data.max_length ({max_length}) or set data.overlong: truncate_prompt"
        if OVERLONG in report.dropped
        else f"look at the first of them: {first}"
    )
    raise DataError(f"{source}: no pair is left of {report.rows_read} rows: {reasons}; {remedy}")


def _unseen(held: Sequence[EncodedPair], train: Sequence[EncodedPair], report: DataReport) -> list[EncodedPair]:
    """The held-out pairs whose prompt is not trained on."""
    trained = {pair.prompt_key for pair in train}
    for pair in held:
        if pair.prompt_key in trained:
            report.drop(PROMPT_IN_TRAINING, pair.where)
    return [pair for pair in held if pair.prompt_key not in trained]


def _note_oddities(encoded: Sequence[EncodedPair], report: DataReport) -> None:
    """Note duplicates, contradictory pairs, and answers that begin with the whole other answer."""
    seen: set[tuple[str, bytes, bytes]] = set()
    for pair in encoded:
        chosen, rejected = pair.chosen_ids.tobytes(), pair.rejected_ids.tobytes()
        if (pair.prompt_key, chosen, rejected) in seen:
            report.note("exact duplicate", pair.where)
        if (pair.prompt_key, rejected, chosen) in seen:
            report.note("contradicts an earlier pair (a over b, b over a)", pair.where)
        seen.add((pair.prompt_key, chosen, rejected))
        shorter, longer = sorted((pair.chosen_ids, pair.rejected_ids), key=len)
        size = len(shorter) - (1 if shorter[-1] == longer[-1] else 0)  # without the end token
        if (shorter[:size] == longer[:size]).all():
            report.note("one answer is the beginning of the other", pair.where)

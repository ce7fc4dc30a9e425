"""Pairs as token ids: tokenized as a whole, cut where prompt and both answers part, ended once.

    prompt ids            1 5 8 9 | 7          tokenized alone
    prompt + chosen       1 5 8 9 | 4 2        the cut lies after the longest token prefix that all three share;
    prompt + rejected     1 5 8 9 | 6 6 2      here the prompt's last token merged with the answers

Cutting an answer out by searching for its text, or tokenizing it alone, gives ids that the model never meets.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from pe_dpo.data.pairs import EncodedPair, Pair, RowFlaw, prompt_key
from pe_dpo.data.rendering import (
    Rendered,
    Template,
    check_control_tokens,
    control_tokens,
    count_turns,
    describe_template,
    is_blank,
    render_pair,
    uses_chat_template,
)
from pe_dpo.data.report import ANSWERS_TOO_LONG, EMPTY, IDENTICAL, NAMED_ROWS, OVERLONG, BadRows, DataReport
from pe_dpo.errors import DataError
from pe_dpo.progress import advance, progress

Overlong = Literal["drop", "truncate_prompt", "error"]
Progress = Callable[[str, int, int], None]
_PAIRS_PER_CALL = 256


class _Ends(NamedTuple):
    """The tokens that begin and end a row, and those that may end an answer."""

    begin: int | None  # prepended to plain text; None when the tokenizer adds no BOS or a chat template is in charge
    bos: int | None
    append: int | None
    may_end: frozenset[int]


def encode_pairs(
    pairs: Sequence[Pair],
    *,
    tokenizer: Any,
    max_length: int,
    report: DataReport,
    template: Template = "auto",
    overlong: Overlong = "drop",
    bad_rows: BadRows = "error",
    end_token_ids: Collection[int] = (),
) -> list[EncodedPair]:
    """The pairs as token ids, in order, without those that cannot or must not be scored.

    Args:
        pairs: Pairs before tokenization.
        tokenizer: A transformers tokenizer.
        max_length: Most tokens of a prompt with its longer answer.
        report: What is dropped or odd is added to it.
        template: `chat`, `plain`, or `auto`: the chat template where the tokenizer has one.
        overlong: What happens to longer pairs: `drop`, `truncate_prompt` (its beginning is cut, after the BOS; answers
            stay whole), or `error`.
        bad_rows: What happens to rows that cannot be encoded: `error` or `drop`.
        end_token_ids: Further ids that end an answer, beside the tokenizer's EOS.

    Returns:
        The encoded pairs; empty and identical answers are never among them.

    Raises:
        DataError: At a row that cannot be encoded, at overlong pairs with `overlong` at `error`, and for messages
            without a chat template.
    """
    is_chat = uses_chat_template(tokenizer, template)
    ends = _find_ends(tokenizer, end_token_ids, is_chat=is_chat)
    _describe(tokenizer, ends, report, is_chat=is_chat)
    encoded: list[EncodedPair] = []
    done = 0
    remaining = iter(_renderable(pairs, tokenizer, report, bad_rows, is_chat=is_chat))
    with progress("encoding"):
        while batch := list(islice(remaining, _PAIRS_PER_CALL)):
            ids = _tokenize([text for _, texts in batch for text in texts], tokenizer)
            for row, (pair, texts) in enumerate(batch):
                try:
                    sides = _cut(pair, texts, ids[3 * row : 3 * row + 3], ends, report)
                    encoded.append(_finish(pair, sides, tokenizer, ends))
                except RowFlaw as flaw:
                    report.refuse(pair.where, flaw, bad_rows)
            done += len(batch)
            advance(done, len(pairs))
        if done < len(pairs):
            advance(len(pairs), len(pairs))
    return _fit(_distinct(encoded, report), max_length, ends, overlong, report)


def begin_token(tokenizer: Any) -> int | None:
    """Return the id of the BOS token that a tokenizer puts before plain text, None where it puts none."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _find_ends(tokenizer: Any, end_token_ids: Collection[int], *, is_chat: bool) -> _Ends:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    may_end = frozenset(end_token_ids) | ({eos} if eos is not None else set())
    append = eos if eos is not None else min(may_end, default=None)
    return _Ends(None if is_chat else begin_token(tokenizer), bos, append, may_end)


def _describe(tokenizer: Any, ends: _Ends, report: DataReport, *, is_chat: bool) -> None:
    begin = f"beginning with {tokenizer.bos_token}" if ends.begin is not None else "without a BOS token"
    report.template = "the tokenizer's chat template" if is_chat else f"plain text {begin}"
    if ends.append is None:
        report.remark(
            "the tokenizer has no EOS token, so answers have no end token: the model will not learn to stop; "
            "set eos_token in the tokenizer"
        )
    for fact in describe_template(tokenizer) if is_chat else []:
        report.remark(fact)


def _renderable(
    pairs: Sequence[Pair], tokenizer: Any, report: DataReport, bad_rows: BadRows, *, is_chat: bool
) -> Iterator[tuple[Pair, Rendered]]:
    pattern = control_tokens(tokenizer) if is_chat else None
    for pair in pairs:
        if is_blank(pair.chosen) or is_blank(pair.rejected):
            report.drop(EMPTY, pair.where)
            continue
        try:
            check_control_tokens(pair, pattern)
            rendered = render_pair(pair, tokenizer, is_chat=is_chat)
        except RowFlaw as flaw:
            report.refuse(pair.where, flaw, bad_rows)
            continue
        if count_turns(pair) > 1:
            report.note("an answer of several turns, all of them scored", pair.where)
        yield pair, rendered


def _tokenize(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array(row, dtype=np.int32) for row in ids]


def _cut(
    pair: Pair, texts: Rendered, ids: Sequence[np.ndarray], ends: _Ends, report: DataReport
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt and answer ids, cut at the longest token prefix that the prompt and both whole texts share."""
    prompt, chosen, rejected = (_begin(row, ends) for row in ids)
    if ends.bos is not None and list(chosen[:2]) == [ends.bos, ends.bos]:
        raise RowFlaw("begins with two BOS tokens; remove the one in the text of the prompt or template")
    length = min(_shared(prompt, chosen), _shared(prompt, rejected))
    if not length:
        raise RowFlaw("has no prompt token before the answers; write a prompt")
    if not (texts.chosen.startswith(texts.prompt) and texts.rejected.startswith(texts.prompt)):
        report.note("rendered answer that does not begin with the rendered prompt", pair.where)
    elif length < len(prompt):
        report.note("token that spans the border of prompt and answer", pair.where)
    return chosen[:length], chosen[length:], rejected[length:]


def _begin(ids: np.ndarray, ends: _Ends) -> np.ndarray:
    if ends.begin is None or (len(ids) and ids[0] == ends.begin):
        return ids
    return np.concatenate([np.array([ends.begin], dtype=np.int32), ids])


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size


def _finish(pair: Pair, sides: tuple[np.ndarray, np.ndarray, np.ndarray], tokenizer: Any, ends: _Ends) -> EncodedPair:
    prompt, chosen, rejected = sides
    chosen, rejected = _end(chosen, tokenizer, ends), _end(rejected, tokenizer, ends)
    return EncodedPair(prompt, chosen, rejected, pair.margin or 0.0, pair.where, prompt_key(pair.prompt))


def _end(answer: np.ndarray, tokenizer: Any, ends: _Ends) -> np.ndarray:
    """The answer up to its end token (ChatML writes a line break after it), or with one appended."""
    found = [index for index, token in enumerate(answer.tolist()) if token in ends.may_end]
    if found:
        tail = answer[found[-1] + 1 :]
        if not len(tail) or not tokenizer.decode(tail.tolist()).strip():
            return answer[: found[-1] + 1]
    if ends.append is None:
        return answer
    return np.append(answer, np.int32(ends.append))


def _distinct(encoded: Sequence[EncodedPair], report: DataReport) -> list[EncodedPair]:
    """The pairs whose answers differ; two equal answers have a gradient of zero and a loss that only adds noise."""
    distinct = []
    for pair in encoded:
        if np.array_equal(pair.chosen_ids, pair.rejected_ids):
            report.drop(IDENTICAL, pair.where)
        else:
            distinct.append(pair)
    return distinct


def _fit(
    encoded: Sequence[EncodedPair], max_length: int, ends: _Ends, overlong: Overlong, report: DataReport
) -> list[EncodedPair]:
    fitting, longer = [], []
    for pair in encoded:
        if pair_length(pair) <= max_length:
            fitting.append(pair)
            continue
        longer.append(pair)
        if overlong == "drop":
            report.drop(OVERLONG, pair.where)
        elif overlong == "truncate_prompt":
            shorter = _truncate_prompt(pair, max_length, ends)
            if shorter is None:
                report.drop(ANSWERS_TOO_LONG, pair.where)
            else:
                report.note("prompt cut at its beginning", pair.where)
                fitting.append(shorter)
    if longer and overlong == "error":
        names = ", ".join(pair.where for pair in longer[:NAMED_ROWS]) + (", ..." if len(longer) > NAMED_ROWS else "")
        raise DataError(
            f"data.max_length: {max_length}: {len(longer)} pairs are longer (up to "
            f"{max(map(pair_length, longer))} tokens): {names}; raise it, or set data.overlong to drop or "
            "truncate_prompt"
        )
    return fitting


def pair_length(pair: EncodedPair) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _truncate_prompt(pair: EncodedPair, max_length: int, ends: _Ends) -> EncodedPair | None:
    """The pair with its prompt's beginning cut; None when no prompt token besides the BOS would be left."""
    kept = 1 if ends.bos is not None and pair.prompt_ids[0] == ends.bos else 0
    room = max_length - pair_length(pair) + len(pair.prompt_ids) - kept
    if room < 1 or kept + room >= len(pair.prompt_ids):
        return None
    prompt = np.concatenate([pair.prompt_ids[:kept], pair.prompt_ids[-room:]])
    return EncodedPair(prompt, pair.chosen_ids, pair.rejected_ids, pair.margin, pair.where, pair.prompt_key)

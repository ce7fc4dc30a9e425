"""A pair of token ids as a person reads it: prompt and answers as the text that the model meets, and which of it is scored."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.data.encoded import by_length
from pe_dpo.data.pairs import EncodedPair


class DecodedPair(NamedTuple):
    """One pair, decoded."""

    where: str
    prompt: str
    prompt_tokens: int
    chosen: dict[str, Any]
    """`parts` (each with its text and whether it is scored), `tokens`, how many of them are `scored`, and the `end` token."""
    rejected: dict[str, Any]
    """As `chosen`."""


def special_ids(tokenizer: Any) -> set[int | None]:
    """Return the ids of a tokenizer's special tokens; None is among them where it has no EOS."""
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}


def middle_pair(pairs: Sequence[EncodedPair]) -> EncodedPair:
    """Return the pair of middle length."""
    return pairs[by_length(pairs)[len(pairs) // 2]]


def decode_pair(pair: EncodedPair, tokenizer: Any) -> DecodedPair:
    """Return a pair as text.

    Args:
        pair: One of `prepare_pairs`.
        tokenizer: The one that made it.
    """
    special = special_ids(tokenizer)

    def decode_answer(ids: np.ndarray, mask: np.ndarray | None) -> dict[str, Any]:
        scored = np.ones(len(ids), dtype=bool) if mask is None else mask
        borders = [0, *(np.flatnonzero(scored[1:] != scored[:-1]) + 1).tolist(), len(ids)]
        parts = [
            {"text": tokenizer.decode(ids[start:stop].tolist()), "scored": bool(scored[start])}
            for start, stop in pairwise(borders)
        ]
        end = tokenizer.decode([int(ids[-1])]) if int(ids[-1]) in special else None
        return {"parts": parts, "tokens": len(ids), "scored": int(scored.sum()), "end": end}

    return DecodedPair(
        pair.where,
        tokenizer.decode(pair.prompt_ids.tolist()),
        len(pair.prompt_ids),
        decode_answer(pair.chosen_ids, pair.chosen_scored),
        decode_answer(pair.rejected_ids, pair.rejected_scored),
    )

"""The file of golden prompts, and whether an answer is the golden one; no model is needed for either."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pe_dpo.data.dialogues import shared_length
from pe_dpo.data.files import read_rows
from pe_dpo.data.pairs import RowError
from pe_dpo.errors import DataError

NEAR_TIE = 0.3
"""Nats of lead below which another choice is no error, where it is not measured; bfloat16 moved leads of three small models by
0.08 to 0.19 at most, a KV cache in f16 by 0.003 to 0.014 and in q8_0 by 0.06 to 0.13, llama.cpp's q8_0 by 0.19."""


class GoldenPrompt(NamedTuple):
    """One prompt and what the model answers to it."""

    prompt: str
    rendered: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    text_ends: list[int]
    """How many characters of the text are there after each token of the answer."""
    ended: bool
    """Whether the last token ended the answer; else it was cut."""
    log_probs: list[float]
    """Log-prob of each token of the answer; of a file in 8 or 4 bits, what it is in these bits."""
    leads: list[float]
    """By how much each token is more likely than the best other, in nats; of a file in 8 or 4 bits, what it is in these bits,
    and below zero where they choose otherwise."""
    near_tie: float = NEAR_TIE
    """By how many nats a server may move a lead or a log-prob; where a lead is smaller, it may choose otherwise."""


class GoldenMatch(NamedTuple):
    """What a server answers to a golden prompt, beside the golden answer."""

    verdict: Literal["equal", "near tie", "other"]
    """A near tie is no error, another answer is."""
    why: str
    """Where and by how much, empty for equal answers."""
    compared: int
    """Tokens of the golden answer up to where the other leaves it."""


def compare_answer(
    golden: GoldenPrompt,
    *,
    prompt_ids: Sequence[int] | None = None,
    token_ids: Sequence[int] | None = None,
    log_probs: Sequence[float] = (),
    text: str | None = None,
) -> GoldenMatch:
    """Return whether an answer is the golden one, leaves it at a near tie, or is another.

    Ids are compared where they are given, texts where they are not, without the spaces around them: some tokenizers put one
    before a text, and some servers take them off. What comes behind the golden answer is not compared, nor whether an end token
    is shown. Log-probs find what greedy answers do not: a small adapter, or other positions, seldom change a token.

    Args:
        golden: the prompt and its answer.
        prompt_ids: what a server made of the rendered prompt.
        token_ids: of its greedy answer.
        log_probs: of these tokens.
        text: of its greedy answer.
    """
    if prompt_ids is not None and list(prompt_ids) != golden.prompt_ids:
        at = shared_length(prompt_ids, golden.prompt_ids)
        return GoldenMatch("other", f"the prompt has other token ids from the {at + 1}. on: {list(prompt_ids[at : at + 8])}", 0)
    if token_ids is not None:
        shared = shared_length(token_ids, golden.token_ids)
        for at, (mine, theirs) in enumerate(zip(log_probs[:shared], golden.log_probs, strict=False)):
            if abs(mine - theirs) > golden.near_tie:
                why = f"token {at + 1} of {len(golden.token_ids)} has the log-prob {mine:.3f}, not {theirs:.3f}"
                return GoldenMatch("other", why, at)
        if shared == len(golden.token_ids) or (golden.ended and shared == len(token_ids) == len(golden.token_ids) - 1):
            return GoldenMatch("equal", "", len(golden.token_ids))
        places = [shared]
        found, expected = (str(ids[shared]) if shared < len(ids) else "the end" for ids in (token_ids, golden.token_ids))
    elif text is not None:
        found, expected = (one.rstrip("\ufffd").strip() for one in (text, golden.text))
        shared = shared_length(found, expected)
        if found == expected or (shared == len(expected) and not golden.ended):
            return GoldenMatch("equal", "", len(golden.token_ids))
        place = shared + len(golden.text) - len(golden.text.lstrip())
        # The token that goes on here, and those that end here: another token may begin with the same characters.
        starts = [0, *golden.text_ends[:-1]]
        places = [at for at, (start, end) in enumerate(zip(starts, golden.text_ends, strict=True)) if start <= place <= end]
        places = places or list(range(len(starts)))  # a text whose broken characters do not add up
        found, expected = (repr(one[shared : shared + 20]) if shared < len(one) else "the end" for one in (found, expected))
    else:
        return GoldenMatch("equal", "", 0)
    least = min(places, key=lambda at: golden.leads[at])
    lead = golden.leads[least]
    why = f"token {least + 1} of {len(golden.token_ids)} is {found}, not {expected}, which leads by {lead:.3g} nats"
    return GoldenMatch("near tie" if lead < golden.near_tie else "other", why, places[0])


def save_golden(golden: Sequence[GoldenPrompt], file: Path) -> None:
    """Write golden prompts, one JSON object a line."""
    lines = [json.dumps(one._asdict(), ensure_ascii=False) for one in golden]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_golden(file: Path) -> list[GoldenPrompt]:
    """Return the golden prompts of a file.

    Raises:
        DataError: a row cannot be read or lacks a field.
    """
    golden = []
    for where, values in read_rows(file):
        if isinstance(values, RowError):
            raise DataError(f"{where}: {values}")
        missing = set(GoldenPrompt._fields) - set(values)
        if missing:
            raise DataError(f"{where}: no golden prompt, {', '.join(sorted(missing))} is missing")
        golden.append(GoldenPrompt(**{key: values[key] for key in GoldenPrompt._fields}))
    return golden

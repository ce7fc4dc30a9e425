"""Pairs as token ids: tokenized as a whole, cut where prompt and both answers part, ended once.

    prompt ids            1 5 8 9 | 7          tokenized alone
    prompt + chosen       1 5 8 9 | 4 2        the cut lies after the longest token prefix that all three share;
    prompt + rejected     1 5 8 9 | 6 6 2      here the prompt's last token merged with the answers

Cutting an answer out by searching for its text, or tokenizing it alone, gives ids that the model never meets.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pe_dpo.data.pairs import EncodedPair, Pair, RowError, common_start, prompt_key, row_length
from pe_dpo.data.rendering import (
    answer_turns,
    control_tokens,
    describe_template,
    is_blank,
    render_pair,
    uses_chat_template,
)
from pe_dpo.data.report import ANSWERS_TOO_LONG, EMPTY, IDENTICAL, NAMED_ROWS, OVERLONG, DataReport
from pe_dpo.errors import DataError
from pe_dpo.progress import advance, progress
from pe_dpo.recipe.schema import DataSection

_PAIRS_PER_CALL = 256


def begin_token(tokenizer: Any) -> int | None:
    """Return the id of the BOS token that a tokenizer puts before plain text, None where it puts none."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def with_begin(ids: list[int], begin: int | None) -> list[int]:
    """Return token ids that begin with this token once, whether or not their text had it; None for no such token."""
    return ids if begin is None or ids[:1] == [begin] else [begin, *ids]


class Encoder:
    """What one tokenizer makes of pairs, as the data section of a recipe asks."""

    def __init__(
        self,
        tokenizer: Any,
        settings: DataSection,
        *,
        max_length: int,
        report: DataReport,
        end_token_ids: Collection[int] = (),
    ) -> None:
        """Find out how texts are written, begun and ended, and note it in the report.

        Args:
            tokenizer: A transformers tokenizer.
            settings: Its `template`, `overlong` and `bad_rows` count here.
            max_length: Most tokens of a prompt with its longer answer.
            report: What is dropped or suspicious is added to it.
            end_token_ids: Further ids that end an answer, beside the tokenizer's EOS.

        Raises:
            DataError: A chat template is asked for and the tokenizer has none.
        """
        self.tokenizer, self.settings, self.max_length, self.report = tokenizer, settings, max_length, report
        self.is_chat = uses_chat_template(tokenizer, settings.template)
        self.control_tokens = control_tokens(tokenizer) if self.is_chat else None
        self.bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.begin = None if self.is_chat else begin_token(tokenizer)  # a chat template writes its own
        self.ends = frozenset(end_token_ids) | ({eos} if eos is not None else set())
        self.lengths: list[int] = []
        """Tokens of every pair so far, before those that are too long were left out or cut."""
        self.end = eos if eos is not None else min(self.ends, default=None)
        begin = f"beginning with {tokenizer.bos_token}" if self.begin is not None else "without a BOS token"
        report.template = "the tokenizer's chat template" if self.is_chat else f"plain text {begin}"
        if self.end is None:
            report.remarks.append(
                "the tokenizer has no EOS token, so answers have no end token: the model will not learn to stop; "
                "set eos_token in the tokenizer"
            )
        report.remarks += describe_template(tokenizer) if self.is_chat else []

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """Return the pairs as token ids, in order, without those that cannot or must not be scored.

        Empty and identical answers are never among them: two equal answers have a gradient of zero and a loss that only
        adds noise.

        Raises:
            DataError: A row cannot be encoded and `bad_rows` is "error", a pair is too long and `overlong` is "error", or
                there are messages and no chat template.
        """
        encoded: list[EncodedPair] = []
        with progress("encoding"):
            for start in range(0, len(pairs), _PAIRS_PER_CALL):
                rendered = [(pair, texts) for pair in pairs[start : start + _PAIRS_PER_CALL] if (texts := self._render(pair))]
                whole = [text for _, texts in rendered for text in texts]
                options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
                ids = self.tokenizer(whole, **options)["input_ids"] if whole else []
                for row, (pair, texts) in enumerate(rendered):
                    try:
                        encoded.append(self._cut(pair, texts, ids[3 * row : 3 * row + 3]))
                    except RowError as error:
                        self.report.refuse(pair.where, error, self.settings.bad_rows)
                advance(min(start + _PAIRS_PER_CALL, len(pairs)), len(pairs))
        distinct = []
        for one in encoded:
            if np.array_equal(one.chosen_ids, one.rejected_ids):
                self.report.dropped[IDENTICAL].append(one.where)
            else:
                distinct.append(one)
        return self._fit(distinct)

    def _render(self, pair: Pair) -> tuple[str, str, str] | None:
        """Return the prompt and the prompt with each answer as text; None for a pair that is left out."""
        if is_blank(pair.chosen) or is_blank(pair.rejected):
            self.report.dropped[EMPTY].append(pair.where)
            return None
        try:
            for column in ("prompt", "chosen", "rejected"):
                side = getattr(pair, column)
                text = side if isinstance(side, str) else json.dumps(side, ensure_ascii=False)
                found = self.control_tokens.search(text) if self.control_tokens else None
                if found:  # it would become a control id, and so fake a turn, inside the chat template
                    raise RowError(
                        f"column '{column}' holds the control token {found[0]!r} as text, which the tokenizer would take "
                        "for a turn of its own; remove it, or, if the texts already are rendered with the chat "
                        "template, write data.template: plain"
                    )
            texts = render_pair(pair, self.tokenizer, is_chat=self.is_chat)
        except RowError as error:
            self.report.refuse(pair.where, error, self.settings.bad_rows)
            return None
        if any(len(answer_turns(pair.prompt, answer)) > 1 for answer in (pair.chosen, pair.rejected)):
            self.report.noted["an answer of several turns, all of them scored"].append(pair.where)
        return texts

    def _cut(self, pair: Pair, texts: tuple[str, str, str], ids: Sequence[list[int]]) -> EncodedPair:
        """Return a pair begun, cut at the longest token prefix that the prompt and both whole texts share, and ended.

        Raises:
            RowError: It begins with two BOS tokens, or has no prompt token.
        """
        rows = [np.array(with_begin(row, self.begin), dtype=np.int32) for row in ids]
        prompt, chosen, rejected = rows
        if self.bos is not None and list(chosen[:2]) == [self.bos, self.bos]:
            raise RowError("begins with two BOS tokens; remove the one in the text of the prompt or template")
        length = common_start(rows)
        if not length:
            raise RowError("has no prompt token before the answers; write a prompt")
        if not all(text.startswith(texts[0]) for text in texts):
            self.report.noted["rendered answer that does not begin with the rendered prompt"].append(pair.where)
        elif length < len(prompt):
            self.report.noted["token that spans the border of prompt and answer"].append(pair.where)
        answers = self._end(chosen[length:]), self._end(rejected[length:])
        return EncodedPair(chosen[:length], *answers, pair.margin or 0.0, pair.where, prompt_key(pair.prompt))

    def _end(self, answer: np.ndarray) -> np.ndarray:
        """Return the answer up to its end token (ChatML writes a line break after it), or with one appended."""
        found = [index for index, token in enumerate(answer.tolist()) if token in self.ends]
        if found:
            tail = answer[found[-1] + 1 :]
            if not len(tail) or not self.tokenizer.decode(tail.tolist()).strip():
                return answer[: found[-1] + 1]
        return answer if self.end is None else np.append(answer, np.int32(self.end))

    def _fit(self, encoded: Sequence[EncodedPair]) -> list[EncodedPair]:
        """Return the pairs that fit `max_length`, some of them with the beginning of their prompt cut after the BOS."""
        overlong, fitting, longer = self.settings.overlong, [], []
        self.lengths += map(row_length, encoded)
        for pair in encoded:
            if row_length(pair) <= self.max_length:
                fitting.append(pair)
                continue
            longer.append(pair)
            if overlong == "truncate_prompt":
                prompt = pair.prompt_ids
                kept = 1 if self.bos is not None and prompt[0] == self.bos else 0
                room = self.max_length - row_length(pair) + len(prompt) - kept
                if room < 1 or kept + room >= len(prompt):
                    self.report.dropped[ANSWERS_TOO_LONG].append(pair.where)
                else:
                    self.report.noted["prompt cut at its beginning"].append(pair.where)
                    fitting.append(replace(pair, prompt_ids=np.concatenate([prompt[:kept], prompt[-room:]])))
            elif overlong == "drop":
                self.report.dropped[OVERLONG].append(pair.where)
        if longer and overlong == "error":
            names = ", ".join(pair.where for pair in longer[:NAMED_ROWS]) + (", ..." if len(longer) > NAMED_ROWS else "")
            raise DataError(
                f"data.max_length: {self.max_length}: {len(longer)} pairs are longer (up to "
                f"{max(map(row_length, longer))} tokens): {names}; raise it, or set data.overlong to drop or "
                "truncate_prompt"
            )
        return fitting

"""Pairs as token ids: tokenized as a whole, cut where prompt and both answers part, ended once.

    prompt ids            1 5 8 9 | 7          tokenized alone
    prompt + chosen       1 5 8 9 | 4 2        the cut lies after the longest token prefix that all three share;
    prompt + rejected     1 5 8 9 | 6 6 2      here the prompt's last token merged with the answers

Cutting an answer out by searching for its text, or tokenizing it alone, gives ids that the model never meets.
"""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.data.arrival import KNOWN_KEYS
from pe_dpo.data.cuts import safe_cut
from pe_dpo.data.pairs import EncodedPair, Pair, RowError, common_start, prompt_key, row_length
from pe_dpo.data.rendering import Rendered, Spans, answer_turns, as_messages, is_blank, render_pair
from pe_dpo.data.report import ANSWERS_TOO_LONG, EMPTY, IDENTICAL, NAMED_ROWS, OVERLONG, DataReport, first_of_each
from pe_dpo.data.template import Template, control_tokens, describe_template, foreign_template, unknown_arguments
from pe_dpo.errors import DataError
from pe_dpo.progress import advance, progress
from pe_dpo.recipe.data_section import DataSection

PAIRS_PER_PART = 256
"""So many are tokenized in one call; of several that cannot be encoded the first in a part is named that cannot be rendered."""


def begin_tokens(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts before plain text: often BOS, for some more (`[gMASK]<sop>`), for some nothing."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for length in range(len(whole) - len(bare) + 1):
        if whole[length : length + len(bare)] == bare:
            return list(whole[:length])
    return []


def with_begin(ids: list[int], begin: Sequence[int]) -> list[int]:
    """Return token ids that begin with these tokens once, whether or not their text had them, or the last of them."""
    there = next((count for count in range(len(begin), 0, -1) if ids[:count] == list(begin[-count:])), 0)
    return [*begin[: len(begin) - there], *ids]


class EncodedPart(NamedTuple):
    """What became of some pairs that follow each other."""

    pairs: list[EncodedPair]
    found: DataReport
    """What was dropped and noted while they were rendered and tokenized."""
    lost: dict[str, list[str]]
    """Rows of whose answers the chat template leaves something out, by what that is."""
    later: DataReport
    """What was dropped and noted once that was done: identical answers, and lengths."""
    lengths: list[int]
    """Tokens of every pair, of those that are too long too."""
    longer: list[tuple[int, str]]
    """Tokens and rows of those that are longer than they may be."""


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
        accepts_losses: bool = False,
    ) -> None:
        """Find out how texts are written, begun and ended, and note it in the report.

        Args:
            tokenizer: A transformers tokenizer.
            settings: Its `template`, `template_date`, `score`, `overlong` and `bad_rows` count here.
            max_length: Most tokens of a prompt with its longer answer.
            report: How texts are written is added to it, and by `finish` what is dropped or suspicious.
            end_token_ids: Further ids that end an answer, beside the tokenizer's EOS.
            accepts_losses: Whether answers of which the template leaves something out are used and counted.

        Raises:
            DataError: A chat template is asked for and the tokenizer has none.
        """
        self.tokenizer, self.settings, self.max_length, self.report = tokenizer, settings, max_length, report
        self.template = Template(tokenizer, settings)
        self.control_tokens = control_tokens(tokenizer)
        self.bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.prefix = begin_tokens(tokenizer)
        self.begin = [] if self.template.is_chat else self.prefix  # a chat template writes its own
        self.ends = frozenset(end_token_ids) | ({eos} if eos is not None else set())
        self.lengths: list[int] = []
        """Tokens of every pair so far, before those that are too long were left out or cut."""
        self.end = eos if eos is not None else min(self.ends, default=None)
        self._borders = [tokenizer.decode(ids) for ids in (self.prefix, *([end] for end in self.ends))]
        """The text with which another begins, and those with which an answer ends."""
        begin = f"beginning with {tokenizer.decode(self.begin)}" if self.begin else "without a BOS token"
        own = settings.template not in ("auto", "chat", "plain")
        chat = f"the chat template {settings.template}" if own else "the tokenizer's chat template"
        report.template = chat if self.template.is_chat else f"plain text {begin}"
        if self.end is None:
            report.remarks.append(
                "the tokenizer has no EOS token, so answers have no end token: the model will not learn to stop; "
                "set eos_token in the tokenizer"
            )
        report.remarks += describe_template(self.template) if self.template.is_chat else []
        self._find_cut, self._is_cut_tried = safe_cut(tokenizer), False
        self.accepts_losses = accepts_losses
        self._of_part = DataReport()
        """What was dropped and noted of the part that is being encoded."""
        self._lost: defaultdict[str, list[str]] = defaultdict(list)
        """Of that part."""
        self._parts: list[EncodedPart] = []
        """All since the last `finish`, without their pairs."""

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """Return the pairs as token ids, in order, without those that cannot or must not be scored.

        Empty and identical answers are never among them: two equal answers have a gradient of zero and a loss that only
        adds noise. Nor are answers of which the chat template leaves something out.

        Raises:
            DataError: A row cannot be encoded, or loses a part of its answers, and `bad_rows` is "error"; a pair is too long
                and `overlong` is "error"; or there are messages and no chat template.
        """
        encoded: list[EncodedPair] = []
        with progress("encoding"):
            for start in range(0, len(pairs), PAIRS_PER_PART):
                part = self.part(pairs[start : start + PAIRS_PER_PART])
                self.add(part)
                encoded += part.pairs
                advance(min(start + PAIRS_PER_PART, len(pairs)), len(pairs))
        self.finish()
        return encoded

    def part(self, pairs: Sequence[Pair]) -> EncodedPart:
        """Return what becomes of some of the pairs; parts may be encoded in any order and in other processes.

        Raises:
            DataError: A row cannot be encoded and `bad_rows` is "error", or there are messages and no chat template.
        """
        self._of_part, self._lost = DataReport(), defaultdict(list)
        rendered = [(pair, texts) for pair in pairs if (texts := self._render(pair))]
        ids = self._tokenize_together([texts for _, texts in rendered])
        encoded = []
        for row, (pair, texts) in enumerate(rendered):
            try:
                one = self._cut(pair, texts, ids[row])
                lost = self._look_for_losses(pair, texts, is_same=_is_same(one))
            except RowError as error:
                self._of_part.refuse(pair.where, error, self.settings.bad_rows)
            else:
                encoded += [] if lost and not self.accepts_losses else [one]
        later = DataReport()
        distinct = []
        for one in encoded:
            if _is_same(one):
                later.dropped[IDENTICAL].append(one.where)
            else:
                distinct.append(one)
        sizes = list(map(row_length, distinct))
        longer = [(size, pair.where) for size, pair in zip(sizes, distinct, strict=True) if size > self.max_length]
        return EncodedPart(self._fit(distinct, later), self._of_part, dict(self._lost), later, sizes, longer)

    def add(self, part: EncodedPart) -> None:
        """Take note of a part, in the order of the rows."""
        self._parts.append(part._replace(pairs=[]))

    def finish(self) -> None:
        """Add to the report what was dropped or suspicious in the parts that were added.

        Raises:
            DataError: A row loses a part of its answers and `bad_rows` is "error", or is too long and `overlong` is "error".
        """
        parts, self._parts = self._parts, []
        lost: defaultdict[str, list[str]] = defaultdict(list)
        for part in parts:
            self.report.add(part.found)
            for what, names in part.lost.items():
                lost[what] += names
        if lost and self.settings.bad_rows == "error" and not self.accepts_losses:
            raise DataError(
                f"{first_of_each(lost)}; take a template that writes them (data.template: file.jinja), or leave such "
                "rows out with data.bad_rows: drop"
            )
        for what, names in lost.items():
            (self.report.noted if self.accepts_losses else self.report.dropped)[what] += names
        if self.template.has_clock:
            self.report.template_date = self.template.today.isoformat()
        if any(IDENTICAL in part.later.dropped for part in parts):
            self.report.dropped[IDENTICAL] += []  # it stands before those that are too long
        for part in parts:
            self.report.add(part.later)
            self.lengths += part.lengths
        longer = [one for part in parts for one in part.longer]
        if longer and self.settings.overlong == "error":
            first = ", ".join(where for _, where in longer[:NAMED_ROWS]) + (", ..." if len(longer) > NAMED_ROWS else "")
            raise DataError(
                f"data.max_length: {self.max_length}: {len(longer)} pairs are longer (up to {max(longer)[0]} tokens): {first}; "
                "raise it, or set data.overlong to drop or truncate_prompt"
            )

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts; one that stands there several times, as the prompt of several answers, is tokenized once."""
        once = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids = self.tokenizer(list(once), **options)["input_ids"] if texts else []
        return [ids[once[text]] for text in texts]

    def _tokenize_together(self, rendered: Sequence[Rendered]) -> list[list[list[int]]]:
        """Return the ids of each prompt and of both texts that go on with it, what they have in common tokenized once."""
        cuts = [
            self._find_cut(texts.opened) if all(text.startswith(texts.opened) for text in texts.answered) else 0
            for texts in rendered
        ]
        texts_of = [(texts.opened, *texts.answered) for texts in rendered]
        parts = [[texts[0][:cut], *(text[cut:] for text in texts)] for cut, texts in zip(cuts, texts_of, strict=True)]
        ids = self._tokenize([part for four in parts for part in four])
        joined = [[ids[at] + tail for tail in ids[at + 1 : at + 4]] for at in range(0, len(ids), 4)]
        if not self._is_cut_tried and joined:  # once, against a tokenizer of a kind that `safe_cut` does not know
            self._is_cut_tried = True
            if self._tokenize([text for texts in texts_of[:8] for text in texts]) != [
                row for three in joined[:8] for row in three
            ]:
                self._find_cut = lambda text: 0
                return self._tokenize_together(rendered)
        return joined

    def _render(self, pair: Pair) -> Rendered | None:
        """Return the prompt and the prompt with each answer as text; None for a pair that is left out."""
        if is_blank(pair.chosen) or is_blank(pair.rejected):
            self._of_part.dropped[EMPTY].append(pair.where)
            return None
        sides = {
            column: side if isinstance(side, str) else json.dumps(side, ensure_ascii=False)
            for column in ("prompt", "chosen", "rejected", "tools")
            if (side := getattr(pair, column)) is not None
        }
        try:
            if self.template.is_chat:
                self._check_control_tokens(sides)
                unknown = unknown_arguments(self.tokenizer, pair.template_args)
                if unknown:
                    raise RowError(f"column 'chat_template_kwargs': {unknown}")
            texts = render_pair(pair, self.template, score=self.settings.score)
        except RowError as error:
            self._of_part.refuse(pair.where, error, self.settings.bad_rows)
            return None
        self._note_what_is_foreign(pair)
        if not self.template.is_chat and self._control_tokens_in_plain_text(pair):
            self._of_part.noted["control token within plain text, read as that token"].append(pair.where)
        if any(spans is not None for spans in texts.spans) or any(
            len(answer_turns(pair.prompt, answer)) > 1 for answer in (pair.chosen, pair.rejected)
        ):
            scored = {"all": "the assistant's", "last": "the last of them", "everything": "all of them"}[self.settings.score]
            self._of_part.noted[f"an answer of several turns, {scored} scored"].append(pair.where)
        return texts

    def _note_what_is_foreign(self, pair: Pair) -> None:
        """Count texts of another chat template, and name the keys of messages that this one never reads."""
        asked: list[str] = [str(pair.prompt)]
        said: list[str] = [str(pair.chosen), str(pair.rejected)]
        own = str(self.tokenizer.chat_template or "")
        if self.template.is_chat:
            turns = as_messages(pair.prompt)
            answers = [turn for side in (pair.chosen, pair.rejected) for turn in answer_turns(pair.prompt, side)]
            asked, said = [turn["content"] for turn in turns], [turn["content"] for turn in answers]
            keys = {key for turn in (*turns, *answers) for key, value in turn.items() if value not in ("", [], {})}
            unread = sorted(key for key in keys - {*KNOWN_KEYS, *self.settings.ignore} if key not in own)
            named = [f"{key} (of messages)" for key in unread]
            self._of_part.unread_columns += [name for name in named if name not in self._of_part.unread_columns]
        foreign = foreign_template(asked, said, own, is_chat=self.template.is_chat)
        if foreign:
            self._of_part.noted[f"text that is already written with a chat template ({foreign})"].append(pair.where)

    def _check_control_tokens(self, sides: dict[str, str]) -> None:
        """Refuse control tokens as text: in a chat template they would fake a turn.

        Raises:
            RowError: There is one.
        """
        for column, text in sides.items():
            found = self.control_tokens.search(text) if self.control_tokens else None
            if found:
                raise RowError(
                    f"column '{column}' holds the control token {found[0]!r} as text, which the tokenizer would take "
                    "for a turn of its own; remove it, or, if the texts already are rendered with the chat "
                    "template, write data.template: plain"
                )

    def _control_tokens_in_plain_text(self, pair: Pair) -> bool:
        """Return whether there are control tokens where none is expected in texts without a chat template of their own.

        The tokens that begin a text and the one that ends an answer are; so is everything in texts that are rendered already.
        """
        own = self.tokenizer.chat_template
        if self.control_tokens is None or own:
            return False
        begin, *ends = self._borders
        texts = [str(pair.prompt).removeprefix(begin)]
        for answer in (str(pair.chosen).rstrip(), str(pair.rejected).rstrip()):
            texts.append(next((answer.removesuffix(end) for end in ends if answer.endswith(end)), answer))
        return any(self.control_tokens.search(text) for text in texts)

    def _look_for_losses(self, pair: Pair, texts: Rendered, *, is_same: bool) -> bool:
        """Count what the chat template left out of a pair; return whether its answers lost something."""
        for what in sorted(texts.lost_before):
            self._of_part.noted[f"{what} that the chat template does not write"].append(pair.where)
        if not texts.begins_alike:
            self._of_part.noted["answers before which the chat template writes different text"].append(pair.where)
        if texts.is_whole_alone:
            what = "prompt of which the chat template writes a part only before an answer, trained on as it is served"
            self._of_part.noted[what].append(pair.where)
        if texts.lost:
            kinds = " and ".join(sorted(texts.lost))
            with_lost = f"that differ only in their {kinds}, which" if is_same else f"with {kinds} that"
            self._lost[f"answers {with_lost} the chat template does not write"].append(pair.where)
        return bool(texts.lost)

    def _cut(self, pair: Pair, texts: Rendered, ids: Sequence[list[int]]) -> EncodedPair:
        """Return a pair begun, cut at the longest token prefix that the prompt and both whole texts share, and ended.

        Raises:
            RowError: It begins with two BOS tokens, or has no prompt token.
        """
        rows = [np.array(with_begin(row, self.begin), dtype=np.int32) for row in ids]
        prompt, chosen, rejected = rows
        if self.bos is not None and list(chosen[:2]) == [self.bos, self.bos]:
            raise RowError("begins with two BOS tokens; remove the one in the text of the prompt or template")
        unknown = self.tokenizer.unk_token_id
        is_there = unknown is not None and any((row == unknown).any() for row in rows)
        if is_there and self.tokenizer.unk_token not in "".join(texts.answered):
            self._of_part.noted["text that the tokenizer does not know, read as its unknown token"].append(pair.where)
        length = common_start(rows)
        if not length:
            raise RowError("has no prompt token before the answers; write a prompt")
        if not all(text.startswith(texts.opened) for text in texts.answered):
            self._of_part.noted["rendered answer that does not begin with the rendered prompt"].append(pair.where)
        elif length < len(prompt):
            self._of_part.noted["token that spans the border of prompt and answer"].append(pair.where)
        answers = self._end(chosen[length:]), self._end(rejected[length:])
        scored = [
            None if spans is None else self._scored(text, spans, row, len(row) - len(ids_alone))[length : length + len(answer)]
            for text, spans, row, ids_alone, answer in zip(
                texts.answered, texts.spans, (chosen, rejected), ids[1:], answers, strict=True
            )
        ]
        # The end token that was appended is the last turn's.
        masks = [
            None if mask is None else np.append(mask, np.ones(len(answer) - len(mask), dtype=bool))
            for mask, answer in zip(scored, answers, strict=True)
        ]
        if any(mask is not None and not mask.any() for mask in masks):
            raise RowError("has an answer without a token of the assistant; write data.score: all")
        named = self.settings.pair_columns  # of another place, if not of this pair's
        beta = pair.beta if pair.beta is not None or "beta" not in named else math.nan
        weight = pair.weight if pair.weight is not None or "weight" not in named else 1.0
        return EncodedPair(
            prompt_ids=chosen[:length],
            chosen_ids=answers[0],
            rejected_ids=answers[1],
            margin=pair.margin or 0.0,
            where=pair.where,
            prompt_key=prompt_key(pair.prompt),
            chosen_scored=masks[0],
            rejected_scored=masks[1],
            beta=beta,
            weight=weight,
        )

    def _scored(self, text: str, spans: Spans, row: np.ndarray, offset: int) -> np.ndarray:
        """Return which tokens of a whole row lie in some spans of its text, each up to its end token.

        An end token right behind a span belongs to it, and the line break that ChatML writes behind the end token does not.

        Args:
            text: What was tokenized.
            spans: [start, end) in it.
            row: The token ids, those before the text included.
            offset: How many come before the text.
        """
        borders = [border for span in spans for border in span]
        before = self._tokenize([text[:border] for border in borders])
        counts = [offset + common_start([row[offset:], np.array(ids, dtype=np.int32)]) if ids else offset for ids in before]
        mask = np.zeros(len(row), dtype=bool)
        for start, end in zip(counts[::2], counts[1::2], strict=True):
            stop = end + (end < len(row) and int(row[end]) in self.ends)
            last = max((index for index in range(start, stop) if int(row[index]) in self.ends), default=stop - 1) + 1
            if last < stop and not self.tokenizer.decode(row[last:stop].tolist()).strip():
                stop = last
            mask[start:stop] = True
        return mask

    def _end(self, answer: np.ndarray) -> np.ndarray:
        """Return the answer up to its end token (ChatML writes a line break after it), or with one appended."""
        places = [np.flatnonzero(answer == end) for end in self.ends]
        last = max((int(found[-1]) for found in places if len(found)), default=None)
        if last is not None:
            tail = answer[last + 1 :]
            if not len(tail) or not self.tokenizer.decode(tail.tolist()).strip():
                return answer[: last + 1]
        return answer if self.end is None else np.concatenate((answer, np.array([self.end], dtype=np.int32)))

    def _fit(self, encoded: Sequence[EncodedPair], report: DataReport) -> list[EncodedPair]:
        """Return the pairs that fit `max_length`, some of them with the beginning of their prompt cut after the BOS."""
        overlong, fitting = self.settings.overlong, []
        for pair in encoded:
            if row_length(pair) <= self.max_length:
                fitting.append(pair)
            elif overlong == "truncate_prompt":
                prompt = pair.prompt_ids
                begins = bool(self.prefix) and list(prompt[: len(self.prefix)]) == self.prefix
                kept = len(self.prefix) if begins else 1 if self.bos is not None and prompt[0] == self.bos else 0
                room = self.max_length - row_length(pair) + len(prompt) - kept
                if room < 1 or kept + room >= len(prompt):
                    report.dropped[ANSWERS_TOO_LONG].append(pair.where)
                else:
                    report.noted["prompt cut at its beginning"].append(pair.where)
                    fitting.append(replace(pair, prompt_ids=np.concatenate([prompt[:kept], prompt[-room:]])))
            elif overlong == "drop":
                report.dropped[OVERLONG].append(pair.where)
        return fitting


def _is_same(pair: EncodedPair) -> bool:
    """Return whether both answers of a pair are the same tokens, and the same of them are scored."""
    one, other = pair.chosen_scored, pair.rejected_scored
    same_scored = one is other is None or (one is not None and other is not None and np.array_equal(one, other))
    return bool(np.array_equal(pair.chosen_ids, pair.rejected_ids) and same_scored)

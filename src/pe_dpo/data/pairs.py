"""A preference pair as its row says it, and as the token ids that are scored.

row  --row_reader-->  Pair(prompt, chosen, rejected)  --encoding-->  EncodedPair(prompt_ids, chosen_ids, rejected_ids)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from pe_dpo.errors import DataError

Message = Mapping[str, Any]
Turns = tuple[Message, ...]
Text = str | Turns
Cut = Literal["prompt", "words"] | None
"""Where answers were cut off from whole texts: behind the prompt that they repeat, or between words that both share."""


class RowError(DataError):
    """One row cannot be used; the message says what was found and what to do, its reader adds where."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One row understood, before tokenization.

    Args:
        prompt: Plain text, or the messages before the answers.
        chosen: The preferred answer, of the same kind as the prompt.
        rejected: The other answer, of the same kind as the prompt.
        margin: How much better the chosen answer is, from the `margin` column or as the difference of two scores;
            None when the row does not say.
        tools: Function descriptions in OpenAI's form, handed to the chat template; None without.
        where: The row for people: `train.jsonl:17` (a line) or `x.parquet row 3` (counted from 1).
        template_args: Arguments of the chat template for this row alone, from its column `chat_template_kwargs`.
        cut: Where the answers were cut off from whole texts; None where they were not, or at a line break or tag.
        beta: The pair's own β, > 0, from the column that `data.columns` names so; None without such.
        weight: What its loss is multiplied by, >= 0, from the column that `data.columns` names so; None without such.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None
    tools: list[Any] | None
    where: str
    template_args: Mapping[str, Any] = field(default_factory=dict)
    cut: Cut = None
    beta: float | None = None
    weight: float | None = None


class Answer(NamedTuple):
    """One answer as token ids, and what of it counts."""

    ids: np.ndarray
    """int32 (A,)."""
    scored: np.ndarray | None
    """bool (A,); None where all tokens are."""

    @property
    def key(self) -> bytes:
        """Bytes that are equal for equal answers alone."""
        return self.ids.tobytes() + (b"" if self.scored is None else b"scored" + np.packbits(self.scored).tobytes())

    @property
    def scored_tokens(self) -> int:
        """How many tokens count."""
        return len(self.ids) if self.scored is None else int(self.scored.sum())


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One pair as token ids; prompt + answer is what the model reads.

    Args:
        prompt_ids: int32 (P,), P >= 1; begins with exactly one BOS when plain text is read by a tokenizer that adds one.
        chosen_ids: int32 (C,), C >= 1; ends with an end token when the tokenizer has one.
        rejected_ids: int32 (R,), as `chosen_ids`.
        margin: The pair's margin, 0.0 when its row gives none.
        where: The row for people.
        prompt_key: The sha256 of the prompt as the row says it; equal for all pairs of one prompt.
        chosen_scored: bool (C,), which tokens of the chosen answer are the assistant's and count; None where all are, as in an
            answer of one turn.
        rejected_scored: bool (R,), as `chosen_scored`.
        beta: The pair's own β, > 0; NaN where others have one and it has the loss's, None where no pair has its own.
        weight: What its loss is multiplied by, >= 0; None where no pair has a weight.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    margin: float
    where: str
    prompt_key: str
    chosen_scored: np.ndarray | None = None
    rejected_scored: np.ndarray | None = None
    beta: float | None = None
    weight: float | None = None

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max(int(ids.max()) for ids in (self.prompt_ids, self.chosen_ids, self.rejected_ids))

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """The chosen and the rejected answer."""
        return Answer(self.chosen_ids, self.chosen_scored), Answer(self.rejected_ids, self.rejected_scored)


def row_length(pair: EncodedPair) -> int:
    """Return the tokens of the prompt with the longer answer."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def common_start(rows: Sequence[np.ndarray]) -> int:
    """Return how many tokens all rows have in common at their start."""
    first, shortest = rows[0], min(map(len, rows))
    for ids in rows[1:]:
        differs = np.flatnonzero(first[:shortest] != ids[:shortest])
        shortest = int(differs[0]) if len(differs) else shortest
    return shortest


def prompt_key(prompt: Text) -> str:
    """Return the sha256, in hex, of a prompt's canonical form: the text itself, or its messages as sorted JSON."""
    canonical = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def describe_value(value: Any) -> str:
    """Return what a cell is, for people: `text`, `a list`, `the number 5`."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, bytes):
        return "bytes that are not text in UTF-8"
    return "text" if isinstance(value, str) else "an object" if isinstance(value, dict) else f"a {type(value).__name__}"

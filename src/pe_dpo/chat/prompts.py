"""A file of prompts in, a file of both models' answers out.

questions.jsonl  {"prompt": "…"} or {"prompt": [messages]} or {"messages": […]}     answers.jsonl  a line per prompt
questions.txt    a prompt a line                                                    answers.md     to read
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pe_dpo.chat.side_by_side import (
    SIDES,
    AnswerScores,
    Side,
    SideBySide,
    encode_prompt,
    implicit_reward,
    room_for_answer,
    score_answer,
    stream_both,
)
from pe_dpo.data.dialogues import read_messages, read_text
from pe_dpo.data.files import SUFFIXES, read_rows
from pe_dpo.data.pairs import RowError, Text, describe_value
from pe_dpo.disk import write_atomically
from pe_dpo.errors import DataError
from pe_dpo.inference.decoding import GREEDY, Answer, Sampling
from pe_dpo.progress import advance, progress
from pe_dpo.recipe.loss_section import LossSection


class Prompt(NamedTuple):
    """One prompt and where it stands: `questions.jsonl:3`."""

    where: str
    prompt: Text


class Compared(NamedTuple):
    """What both models answered to one prompt, and what they think of both answers."""

    where: str
    prompt: Text
    answers: Mapping[Side, Answer]
    scores: Mapping[Side, AnswerScores]


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file in their order.

    Args:
        path: rows with `prompt` (text or messages) or `messages`, in a format of `data.files.SUFFIXES`; of any other suffix
            plain text, a prompt a line. Blank lines do not count, other columns neither.

    Raises:
        DataError: the file cannot be read or has no prompt, or a line of it is bad; with file and line.
    """
    found = list(_from_rows(path) if path.suffix.lower() in SUFFIXES else _from_lines(path))
    if not found:
        raise DataError(f"{path}: has no prompt; write one a line, or JSON lines with 'prompt' or 'messages'")
    return found


def answer_prompts(
    pair: SideBySide,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[Compared]:
    """Yield what both models answer to each prompt; all prompts are checked before the first is answered.

    Args:
        pair: both models.
        prompts: from `read_prompts`.
        max_new_tokens: where to cut an answer that does not end; less where the context ends before.
        sampling: how tokens are chosen; the seed grows by one a prompt.

    Raises:
        DataError: a prompt cannot be encoded, or fills the context; with file and line.
    """
    encoded = [_encode(pair, prompt, max_new_tokens) for prompt in prompts]
    for number, (prompt, prompt_ids) in enumerate(zip(prompts, encoded, strict=True)):
        noise = sampling._replace(seed=sampling.seed + number)
        both = dict.fromkeys(SIDES, prompt_ids)
        *_, answers = stream_both(pair, both, max_new_tokens=max_new_tokens, sampling=noise)
        scores = {side: score_answer(pair, prompt_ids, answers[side].ids) for side in SIDES}
        with progress("answering"):
            advance(number + 1, len(prompts))
        yield Compared(prompt.where, prompt.prompt, answers, scores)


def save_answers(compared: Sequence[Compared], path: Path, *, loss: LossSection | None) -> tuple[Path, Path]:
    """Write `path`.jsonl and `path`.md, each whole or not at all, and return where they lie.

    Args:
        compared: from `answer_prompts`.
        path: without a suffix; `.jsonl` or `.md` at its end is dropped.
        loss: of the run, for the implicit rewards; None leaves them out.
    """
    stem = path.name.removesuffix(".jsonl").removesuffix(".md")
    lines, text = path.with_name(f"{stem}.jsonl"), path.with_name(f"{stem}.md")
    records = (json.dumps(_record(one, loss), ensure_ascii=False) for one in compared)
    write_atomically(lines, "".join(f"{record}\n" for record in records))
    write_atomically(text, as_markdown(compared, loss=loss))
    return lines, text


def as_markdown(compared: Sequence[Compared], *, loss: LossSection | None) -> str:
    """Return the answers as Markdown in which no answer can end its block; arguments as `save_answers`."""
    parts = [
        "# Base and tuned model, side by side",
        "log π is the tuned model's log-prob of an answer and log π0 the base's, in nats, the end token included; "
        "gap = log π − log π0.",
    ]
    for number, one in enumerate(compared, start=1):
        parts += [f"## {number}", "prompt", _fenced(as_text(one.prompt))]
        for side in SIDES:
            parts += [f"{side}{'' if one.answers[side].is_whole else ' (cut)'}", _fenced(one.answers[side].text)]
        parts.append("\n".join(_table(one, loss)))
    return "\n\n".join(parts) + "\n"


def score_header(loss: LossSection | None) -> list[str]:
    """Return the columns of `score_row`."""
    return ["tokens", "log π", "log π0", "gap", "gap/token", *(["reward"] if loss else [])]


def score_row(scores: AnswerScores, loss: LossSection | None) -> list[str]:
    """Return what both models think of an answer as cells; the reward where there is a loss."""
    cells = [f"{scores.tokens}", f"{scores.policy:.2f}", f"{scores.reference:.2f}"]
    cells += [f"{scores.gap:+.2f}", f"{scores.gap_per_token:+.3f}"]
    return [*cells, f"{implicit_reward(loss, scores):+.3f}"] if loss else cells


def as_text(prompt: Text) -> str:
    """Return a prompt for people: itself, or its turns with their roles."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _from_rows(path: Path) -> Iterator[Prompt]:
    for where, values in read_rows(path):
        try:
            if isinstance(values, RowError):
                raise values
            yield Prompt(where, _read_prompt(values))
        except RowError as error:
            raise DataError(f"{where}: {error}") from error


def _read_prompt(values: dict[str, Any]) -> Text:
    column = next((name for name in ("prompt", "messages") if name in values), None)
    if column is None:
        raise RowError(f"has neither 'prompt' nor 'messages'; its columns are {', '.join(values) or 'none'}")
    value = values[column]
    if isinstance(value, list | dict):
        return read_messages(value, column)
    if column == "messages" or not isinstance(value, str):
        wanted = "a list of messages" if column == "messages" else "text or a list of messages"
        raise RowError(f"column '{column}' is {describe_value(value)}; {wanted} is expected")
    return read_text(value, column)


def _from_lines(path: Path) -> Iterator[Prompt]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path.name}:{number}"
        try:
            text = read_text(line.decode("utf-8"), "prompt")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: is not valid UTF-8 at byte {error.start}; save the file as UTF-8") from error
        except RowError as error:
            raise DataError(f"{where}: {error}") from error
        if text.strip():
            yield Prompt(where, text)


def _encode(pair: SideBySide, prompt: Prompt, max_new_tokens: int) -> list[int]:
    try:
        ids = encode_prompt(pair, prompt.prompt)
        room_for_answer(pair, ids, max_new_tokens)
    except RowError as error:
        raise DataError(f"{prompt.where}: {error}") from error
    return ids


def _record(one: Compared, loss: LossSection | None) -> dict[str, Any]:
    record: dict[str, Any] = {"where": one.where, "prompt": one.prompt}
    for side in SIDES:
        answer, scores = one.answers[side], one.scores[side]
        record[side] = {
            "answer": answer.text,
            "is_whole": answer.is_whole,
            "tokens": scores.tokens,
            "logprob_tuned": scores.policy,
            "logprob_base": scores.reference,
            "gap": scores.gap,
            "gap_per_token": scores.gap_per_token,
            **({"reward": implicit_reward(loss, scores)} if loss else {}),
        }
    return record


def _table(one: Compared, loss: LossSection | None) -> list[str]:
    header = ["answer of", *score_header(loss)]
    rows = [[side, *score_row(one.scores[side], loss)] for side in SIDES]
    cells = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def _fenced(text: str) -> str:
    """The text in a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"

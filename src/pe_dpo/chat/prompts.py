"""A file of prompts in, a file of both models' answers out.

questions.jsonl  {"prompt": "…"} or {"prompt": [messages]} or {"messages": […]}     answers.jsonl  a line per prompt
questions.txt    a prompt a line                                                    answers.md     to read
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pe_dpo.chat.side_by_side import SIDES, AnswerScores, Side, SideBySide
from pe_dpo.data.files import data_format, read_rows
from pe_dpo.data.messages import read_messages, read_text
from pe_dpo.data.pairs import RowError, Text, describe_value
from pe_dpo.disk import write_atomically
from pe_dpo.errors import DataError
from pe_dpo.inference.sampling import Growing
from pe_dpo.progress import advance, progress
from pe_dpo.recipe.loss_section import LossSection


class Compared:
    """What both models answered to one prompt, and what they think of both answers.

    Args:
        where: the prompt stands: `questions.jsonl:3`.
        prompt: text or messages.
        answers: of each side.
        scores: of each side's answer.
    """

    def __init__(self, where: str, prompt: Text, answers: Mapping[Side, Growing], scores: Mapping[Side, AnswerScores]) -> None:
        self.where, self.prompt, self.answers, self.scores = where, prompt, answers, scores

    def record(self, loss: LossSection | None) -> dict[str, Any]:
        """Return it as a line of answers.jsonl; with the implicit rewards where there is a loss."""
        record: dict[str, Any] = {"where": self.where, "prompt": self.prompt}
        for side in SIDES:
            answer, scores = self.answers[side], self.scores[side]
            record[side] = {
                "answer": answer.text,
                "is_whole": answer.ended,
                "tokens": scores.tokens,
                "logprob_tuned": scores.policy,
                "logprob_base": scores.reference,
                "gap": scores.gap,
                "gap_per_token": scores.gap / scores.tokens,
                **({"reward": scores.reward(loss)} if loss else {}),
            }
        return record

    def sections(self, loss: LossSection | None) -> list[str]:
        """Return it as the paragraphs of answers.md, in which no answer can end its block."""
        parts = ["prompt", _fenced(as_text(self.prompt))]
        for side in SIDES:
            parts += [f"{side}{'' if self.answers[side].ended else ' (cut)'}", _fenced(self.answers[side].text)]
        rows = [["answer of", *score_cells(self.scores["base"], loss)]]
        rows += [["---", *["---:"] * (len(rows[0]) - 1)]]
        rows += [[side, *score_cells(self.scores[side], loss).values()] for side in SIDES]
        return [*parts, "\n".join(f"| {' | '.join(row)} |" for row in rows)]


def read_prompts(path: Path) -> list[tuple[str, Text]]:
    """Return the prompts of a file in their order, each with where it stands: `questions.jsonl:3`.

    Args:
        path: rows with `prompt` (text or messages) or `messages`, in a format of `data.files.SUFFIXES`; of any other suffix
            plain text, a prompt a line. Blank lines do not count, other columns neither.

    Raises:
        DataError: the file cannot be read or has no prompt, or a line of it is bad; with file and line.
    """
    found: list[tuple[str, Text]] = []
    if data_format(path):
        for where, values in read_rows(path):
            try:
                found.append((where, _read_prompt(values)))
            except RowError as error:
                raise DataError(f"{where}: {error}") from error
    else:
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
                found.append((where, text))
    if not found:
        raise DataError(f"{path}: has no prompt; write one a line, or JSON lines with 'prompt' or 'messages'")
    return found


def answer_prompts(pair: SideBySide, prompts: Sequence[tuple[str, Text]]) -> Iterator[Compared]:
    """Yield what both models answer to each prompt; all prompts are checked before the first is answered.

    Args:
        pair: both models.
        prompts: from `read_prompts`.

    Raises:
        DataError: a prompt cannot be encoded, or fills the context; with file and line.
    """
    encoded = []
    for where, prompt in prompts:
        try:
            encoded.append(pair.encode(prompt))
            pair.room(encoded[-1])
        except RowError as error:
            raise DataError(f"{where}: {error}") from error
    for number, ((where, prompt), prompt_ids) in enumerate(zip(prompts, encoded, strict=True)):
        *_, answers = pair.stream(dict.fromkeys(SIDES, prompt_ids), number=number)
        scores = {side: pair.score(prompt_ids, answers[side].ids) for side in SIDES}
        with progress("answering"):
            advance(number + 1, len(prompts))
        yield Compared(where, prompt, answers, scores)


def save_answers(compared: Sequence[Compared], path: Path, *, loss: LossSection | None) -> tuple[Path, Path]:
    """Write `path`.jsonl and `path`.md, each whole or not at all, and return where they lie.

    Args:
        compared: from `answer_prompts`.
        path: without a suffix; `.jsonl` or `.md` at its end is dropped.
        loss: of the run, for the implicit rewards; None leaves them out.
    """
    stem = path.name.removesuffix(".jsonl").removesuffix(".md")
    lines, text = path.with_name(f"{stem}.jsonl"), path.with_name(f"{stem}.md")
    records = (json.dumps(one.record(loss), ensure_ascii=False) for one in compared)
    write_atomically(lines, "".join(f"{record}\n" for record in records))
    parts = [
        "# Base and tuned model, side by side",
        "log π is the tuned model's log-prob of an answer and log π0 the base's, in nats, the end token included; "
        "gap = log π − log π0.",
    ]
    for number, one in enumerate(compared, start=1):
        parts += [f"## {number}", *one.sections(loss)]
    write_atomically(text, "\n\n".join(parts) + "\n")
    return lines, text


def score_cells(scores: AnswerScores, loss: LossSection | None) -> dict[str, str]:
    """Return what both models think of an answer as cells, by their titles; the reward where there is a loss."""
    return {
        "tokens": f"{scores.tokens}",
        "log π": f"{scores.policy:.2f}",
        "log π0": f"{scores.reference:.2f}",
        "gap": f"{scores.gap:+.2f}",
        "gap/token": f"{scores.gap / scores.tokens:+.3f}",
        **({"reward": f"{scores.reward(loss):+.3f}"} if loss else {}),
    }


def as_text(prompt: Text) -> str:
    """Return a prompt for people: itself, or its turns with their roles."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _read_prompt(values: dict[str, Any] | RowError) -> Text:
    if isinstance(values, RowError):
        raise values
    column = next((name for name in ("prompt", "messages") if name in values), None)
    if column is None:
        raise RowError(f"has neither 'prompt' nor 'messages'; its columns are {', '.join(values) or 'none'}")
    value = values[column]
    if isinstance(value, list | dict):
        return read_messages(value, column)
    if column == "messages" or not isinstance(value, str):
        expected = "a list of messages" if column == "messages" else "text or a list of messages"
        raise RowError(f"column '{column}' is {describe_value(value)}; {expected} is expected")
    return read_text(value, column)


def _fenced(text: str) -> str:
    """The text in a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"

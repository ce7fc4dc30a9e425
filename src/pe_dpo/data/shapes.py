"""The shapes in which preference data comes, told apart by their columns, and how a row of each becomes a pair.

input, preferred_output, non_preferred_output  OpenAI's preference fine-tuning
messages, rejected_response                    the last assistant turn of messages is the chosen answer
conversations, chosen, rejected                ShareGPT {from, value}
prompt, chosen, rejected                       text, or lists of messages (the answers may repeat the prompt)
instruction (input, system), chosen, rejected  Alpaca; `output` is ignored
chosen, rejected                               whole dialogues, as messages or Human/Assistant transcripts
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pe_dpo.data.dialogues import (
    describe_difference,
    is_transcript,
    read_messages,
    read_text,
    split_dialogues,
    split_transcripts,
)
from pe_dpo.data.pairs import Pair, RowError, Text, Turns, describe_value
from pe_dpo.errors import DataError
from pe_dpo.recipe.schema import Column

Values = Mapping[str, Any]

_SHAPES = {
    ("input", "preferred_output", "non_preferred_output"): (
        "OpenAI preference data (input, preferred_output, non_preferred_output)"
    ),
    ("messages", "rejected_response"): "messages whose last assistant turn is chosen, and rejected_response",
    ("conversations", "chosen", "rejected"): "ShareGPT conversations with a chosen and a rejected answer",
    ("prompt", "chosen", "rejected"): "prompt ({prompt}), chosen and rejected ({chosen})",
    ("instruction", "chosen", "rejected"): "instruction with optional input and system, chosen, rejected",
    ("chosen", "rejected"): "whole dialogues (messages); the prompt is what chosen and rejected share",
}
"""The columns of each shape, and the shape in words; the first whose columns are there is taken."""

_HINTS = {
    "rejected": "rejected dispreferred nonpreferred loser losing lose worse worst bad negative neg l k",
    "chosen": "chosen preferred accepted winner winning win better best good positive pos w j",
    "prompt": "prompt question instruction query problem post context input user",
}
"""Words in the names of other people's columns that hint at ours, the likeliest first."""
_NO_TEXT = {"id", "score", "model", "source", "rating", "logps", "system", "metadata"}


class Shape:
    """How every row of a data set is read.

    Attributes:
        words: What it is, for people.
        required: The columns that every row must have.
        kinds: For each column with an answer or prompt, `text` or `messages`, as in the first rows.
    """

    def __init__(self, rows: Sequence[Values], *, where: str, columns: Mapping[Column, str] | None = None) -> None:
        """Recognise the shape of a data set from its first rows; all rows are then held to it.

        Args:
            rows: The columns of the first rows, at least one.
            where: The file, for messages.
            columns: From names that pe-dpo knows to the names of the columns that hold them.

        Raises:
            DataError: The columns are those of no shape (the message shows the column map to write), of unpaired
                data, or the column map names what is not there.
        """
        self.columns: dict[str, str] = {str(ours): theirs for ours, theirs in (columns or {}).items()}
        names = list(dict.fromkeys(name for row in rows for name in row))
        for key, column in self.columns.items():
            if column not in names:
                raise DataError(f"data.columns.{key}: {where} has no column '{column}'; found {', '.join(names)}")
        renamed = [self._rename(row) for row in rows]
        found = {name for row in renamed for name in row}
        fitting = (shape for shape in _SHAPES if found.issuperset(shape))
        if "chosen" in found:
            fitting = (shape for shape in fitting if shape != ("messages", "rejected_response"))
        required = next(fitting, None)
        if required is None:
            raise DataError(_explain_columns(names, rows, self.columns, where=where))
        self.required: tuple[str, ...] = required
        self.kinds: dict[str, str] = {}
        for name in required:
            kind = next(filter(None, (_kind(row[name]) for row in renamed if name in row)), None)
            if kind and name != "input":
                self.kinds[name] = kind
        self.words = _SHAPES[required].format(prompt=self.kinds.get("prompt", "text"), chosen=self.kinds.get("chosen", "text"))
        if required == ("chosen", "rejected") and self.kinds.get("chosen") != "messages":
            if not any(isinstance(row.get("chosen"), str) and is_transcript(row["chosen"]) for row in renamed):
                raise DataError(_explain_columns(names, rows, self.columns, where=where))
            self.words = (
                "whole Human/Assistant transcripts; the prompt ends at the last Assistant tag that chosen and rejected share"
            )

    def read(self, values: Values, *, where: str) -> Pair:
        """Return one row as a pair; prompt and answers are all text or all messages.

        Args:
            values: The row's columns.
            where: The row, for people.

        Raises:
            RowError: The row is not of the shape; its message lacks `where`.
        """
        values = self._rename(values)
        missing = [name for name in self.required if name not in values]
        if missing:
            raise RowError(f"has no column '{missing[0]}'; found {', '.join(values) or 'none'}")
        for name, kind in self.kinds.items():
            if _kind(values[name]) != kind:
                raise RowError(f"column '{name}' is {describe_value(values[name])}; {kind}, as in the first rows, is expected")
        prompt, chosen, rejected = _with_system(*_read_sides(*self._cells(values)), values.get("system"))
        for column, answer in (("chosen", chosen), ("rejected", rejected)):
            if isinstance(prompt, str) or isinstance(answer, str):
                break  # they are of one kind
            if prompt and prompt[-1]["role"] == "assistant":
                raise RowError("the prompt ends with an assistant turn; the turn before the answers is a user or tool turn")
            for place, turn in (("begins", answer[0]), ("ends", answer[-1])):
                if turn["role"] != "assistant":
                    raise RowError(
                        f"the answer in column '{column}' {place} with a turn of the role '{turn['role']}'; "
                        "an assistant turn is expected"
                    )
        return Pair(prompt, chosen, rejected, _read_margin(values), _read_tools(values), where)

    def _rename(self, values: Values) -> Values:
        if not self.columns:
            return values
        taken = {*self.columns.values()}
        kept = {name: cell for name, cell in values.items() if name in (*get_args(Column), "tools") and name not in taken}
        return kept | {name: values[column] for name, column in self.columns.items() if column in values}

    def _cells(self, values: Values) -> tuple[Any, Any, Any]:
        """Return the cells that make a pair, before they are read; the prompt is None when the answers hold it."""
        match self.required[0]:
            case "input":
                given = values["input"]
                if not isinstance(given, Mapping) or "messages" not in given:
                    raise RowError(f"column 'input' is {describe_value(given)}; an object with messages is expected")
                return given["messages"], values["preferred_output"], values["non_preferred_output"]
            case "messages":
                turns = list(read_messages(values["messages"], "messages"))
                if turns[-1]["role"] != "assistant" or len(turns) < 2:
                    raise RowError(
                        f"column 'messages' ends with a {turns[-1]['role']} turn after {len(turns) - 1} others; "
                        "a prompt and then the chosen assistant turn are expected"
                    )
                return turns[:-1], turns[-1:], values["rejected_response"]
            case "conversations":
                prompt: Any = list(read_messages(values["conversations"], "conversations"))
            case "prompt":
                prompt = values["prompt"]
            case "instruction":
                pieces = [read_text(values["instruction"], "instruction"), read_text(values.get("input") or "", "input")]
                prompt = "\n\n".join(piece for piece in pieces if piece)
            case _:
                prompt = None
        return prompt, values["chosen"], values["rejected"]


def _read_sides(prompt_cell: Any, chosen_cell: Any, rejected_cell: Any) -> tuple[Text, Text, Text]:
    """Return prompt and answers of one kind, whatever mixture of text, messages and whole dialogues the row had."""
    cells = {"chosen": chosen_cell, "rejected": rejected_cell} | ({} if prompt_cell is None else {"prompt": prompt_cell})
    sides: dict[str, Text] = {}
    for column, cell in cells.items():
        sides[column] = read_messages(cell, column) if isinstance(cell, list | Mapping) else read_text(cell, column)
    chosen, rejected, prompt = sides["chosen"], sides["rejected"], sides.get("prompt")
    if isinstance(prompt, tuple):
        return prompt, _after_prompt(prompt, chosen), _after_prompt(prompt, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return split_transcripts(chosen, rejected) if prompt is None else (prompt, chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError(
            f"column 'chosen' is {describe_value(chosen_cell)} and 'rejected' {describe_value(rejected_cell)}; make them alike"
        )
    if prompt is None:
        return split_dialogues(chosen, rejected)
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return ({"role": "user", "content": prompt},), chosen, rejected
    turns, chosen, rejected = split_dialogues(chosen, rejected)
    if all(prompt.strip() != turn["content"].strip() for turn in turns):
        difference = describe_difference(({"role": "user", "content": prompt},), turns[-1:], "prompt", "chosen")
        raise RowError(f"column 'prompt' is no turn of the dialogue in 'chosen': {difference}; make them equal")
    return turns, chosen, rejected


def _with_system(prompt: Text, chosen: Text, rejected: Text, system: Any) -> tuple[Text, Text, Text]:
    if system is None or not read_text(system, "system").strip():
        return prompt, chosen, rejected
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
        chosen, rejected = _after_prompt(prompt, chosen), _after_prompt(prompt, rejected)
    return (prompt if prompt[0]["role"] == "system" else ({"role": "system", "content": system}, *prompt)), chosen, rejected


def _after_prompt(prompt: Turns, answer: Text) -> Turns:
    """Return an answer as messages, without the prompt where it repeats it."""
    if isinstance(answer, str):
        return ({"role": "assistant", "content": answer},)
    repeats_prompt = answer[: len(prompt)] == prompt and len(answer) > len(prompt)
    return answer[len(prompt) :] if repeats_prompt else answer


def _read_margin(values: Values) -> float | None:
    """Return the margin column, or the difference of two scores; numbers may be text, which is all that CSV has."""

    def read(column: str) -> float | None:
        value = values[column]
        if value is None or value == "":
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RowError(f"column '{column}' is {value!r}; a finite number is expected (null where there is none)")
        return number

    if "margin" in values:
        return read("margin")
    for chosen, rejected in (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")):
        if chosen in values and rejected in values:
            better, worse = read(chosen), read(rejected)
            return None if better is None or worse is None else better - worse
    return None


def _read_tools(values: Values) -> list[Any] | None:
    given = values.get("input")
    tools = values.get("tools") or (given.get("tools") if isinstance(given, Mapping) else None)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(f"column 'tools' is not JSON ({error.msg}); a list of function descriptions is expected") from error
    if tools and not isinstance(tools, list):
        raise RowError(f"column 'tools' is {describe_value(tools)}; a list of function descriptions is expected")
    return tools or None


def _kind(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list | dict) else None


def _explain_columns(names: Sequence[str], rows: Sequence[Values], columns: Mapping[str, str], *, where: str) -> str:
    """Return the message for data of no known shape: what it is, and the column map to write, guessed where possible.

    Args:
        names: The columns found.
        rows: The first rows.
        columns: The column map that was given.
        where: The file.
    """
    found = f"{where}: the columns are {', '.join(names) or 'none'}"
    to_do = "put two answers to one prompt into each row, as prompt, chosen, rejected"
    if "label" in names and not {"chosen", "rejected"} <= set(names):
        return f"{found}: this is unpaired (KTO-style) data, one answer with one label a row; pairs are needed: {to_do}"
    parts = {name: re.findall(r"[a-z]+", re.sub(r"non[^a-z]?preferred", "nonpreferred", name.lower())) for name in names}
    texts = [name for name in names if any(isinstance(row.get(name), str | list | dict) for row in rows)]
    free = [name for name in texts if not _NO_TEXT & set(parts[name])]
    guess: dict[str, str] = {}
    for key, hints in _HINTS.items():
        match = next((name for hint in hints.split() for name in free if hint in parts[name]), None)
        if match is not None:
            guess[key] = match
            free.remove(match)
    guess |= columns
    if "chosen" not in guess and "rejected" not in guess and {"completion", "output", "messages"} & set(names):
        return f"{found}: there is one answer a row and nothing to prefer it to; pairs are needed: {to_do}"
    entries = []
    for key in dict.fromkeys(("prompt", "chosen", "rejected", *columns)):
        name = guess.get(key, "<column>")
        is_plain = re.fullmatch(r"[A-Za-z_<][\w.\->]*", name)
        entries.append(f"{key}: {name if is_plain else json.dumps(name)}")
    return (
        f"{found}; which of them are prompt, chosen and rejected is not clear. Say it in the recipe:\n"
        f"data: {{columns: {{{', '.join(entries)}}}}}"
    )

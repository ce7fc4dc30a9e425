"""The shapes in which preference data comes, told apart by their columns, and how a row of each becomes a pair.

prompt, chosen, rejected                       text, or lists of messages (the answers may repeat the prompt)
chosen, rejected                               whole dialogues, as messages or Human/Assistant transcripts
instruction (input, system), chosen, rejected  Alpaca; `output` is ignored
conversations, chosen, rejected                ShareGPT {from, value}
messages, rejected_response                    the last assistant turn of messages is the chosen answer
input, preferred_output, non_preferred_output  OpenAI's preference fine-tuning
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pe_dpo.data.columns import MAPPABLE, explain_columns, explain_map
from pe_dpo.data.dialogues import (
    check_dialogue,
    describe_difference,
    is_transcript,
    read_messages,
    read_text,
    split_dialogues,
    split_transcripts,
)
from pe_dpo.data.pairs import Pair, RowFlaw, Text, Turns, kind_words
from pe_dpo.errors import DataError

Values = Mapping[str, Any]


class Sides(NamedTuple):
    """The cells of one row that make a pair, before they are read; prompt is None when the answers hold it."""

    prompt: Any
    chosen: Any
    rejected: Any


class Shape(NamedTuple):
    """How every row of a data set is read.

    Args:
        words: What it is, for people.
        required: The columns that every row must have.
        kinds: For each column with an answer or prompt, `text` or `messages`.
        sides: Picks the cells of a pair out of a row.
        columns: The user's column map.
    """

    words: str
    required: tuple[str, ...]
    kinds: Mapping[str, str]
    sides: Callable[[Values], Sides]
    columns: Mapping[str, str]


def recognise_shape(rows: Sequence[Values], *, where: str, columns: Mapping[str, str] | None = None) -> Shape:
    """The shape of a data set, from its first rows.

    Args:
        rows: The columns of the first rows, at least one.
        where: The file, for messages.
        columns: From the names that pe-dpo knows (`MAPPABLE`) to the names of the columns that hold them.

    Returns:
        The shape; all rows are then held to it.

    Raises:
        DataError: When the columns are those of no shape (the message shows the column map to write), of unpaired
            data, or when the column map names what is not there.
    """
    columns = dict(columns or {})
    names = list(dict.fromkeys(name for row in rows for name in row))
    explain_map(columns, names, where=where)
    renamed = [_rename(row, columns) for row in rows]
    has = {name for row in renamed for name in row}.issuperset
    if has(("input", "preferred_output", "non_preferred_output")):
        return _shape(
            "OpenAI preference data (input, preferred_output, non_preferred_output)",
            ("input", "preferred_output", "non_preferred_output"),
            _openai_sides,
            renamed,
            columns,
        )
    if has(("messages", "rejected_response")) and not has(("chosen",)):
        return _shape(
            "messages whose last assistant turn is chosen, and rejected_response",
            ("messages", "rejected_response"),
            _last_turn_sides,
            renamed,
            columns,
        )
    if not has(("chosen", "rejected")):
        raise DataError(explain_columns(names, rows, columns, where=where))
    if has(("conversations",)):
        return _shape(
            "ShareGPT conversations with a chosen and a rejected answer",
            ("conversations", "chosen", "rejected"),
            _sharegpt_sides,
            renamed,
            columns,
        )
    if has(("prompt",)):
        shape = _shape("", ("prompt", "chosen", "rejected"), _prompt_sides, renamed, columns)
        return shape._replace(
            words=f"prompt ({shape.kinds.get('prompt', 'text')}), chosen and rejected ({shape.kinds.get('chosen', 'text')})"
        )
    if has(("instruction",)):
        return _shape(
            "instruction with optional input and system, chosen, rejected",
            ("instruction", "chosen", "rejected"),
            _instruction_sides,
            renamed,
            columns,
        )
    shape = _shape("", ("chosen", "rejected"), _whole_sides, renamed, columns)
    if shape.kinds.get("chosen") == "messages":
        return shape._replace(words="whole dialogues (messages); the prompt is what chosen and rejected share")
    if any(isinstance(row.get("chosen"), str) and is_transcript(row["chosen"]) for row in renamed):
        return shape._replace(
            words="whole Human/Assistant transcripts; the prompt ends at the last Assistant tag that chosen and rejected share"
        )
    raise DataError(explain_columns(names, rows, columns, where=where))


def read_pair(values: Values, shape: Shape, *, where: str) -> Pair:
    """One row as a pair.

    Args:
        values: The row's columns.
        shape: From `recognise_shape`.
        where: The row, for people.

    Returns:
        The pair; prompt and answers are all text or all messages.

    Raises:
        RowFlaw: When the row is not of the shape; its message lacks `where`.
    """
    values = _rename(values, shape.columns)
    missing = [name for name in shape.required if name not in values]
    if missing:
        raise RowFlaw(f"has no column '{missing[0]}'; found {', '.join(values) or 'none'}")
    for name, kind in shape.kinds.items():
        found = values[name]
        if _kind(found) != kind:
            raise RowFlaw(f"column '{name}' is {kind_words(found)}; {kind}, as in the first rows, is due")
    sides = shape.sides(values)
    prompt, chosen, rejected = _with_system(*_read_sides(sides), values.get("system"))
    if not isinstance(chosen, str) and not isinstance(rejected, str) and not isinstance(prompt, str):
        check_dialogue(prompt, chosen, "chosen")
        check_dialogue(prompt, rejected, "rejected")
    return Pair(prompt, chosen, rejected, _read_margin(values), _read_tools(values), where)


def _shape(
    words: str, required: tuple[str, ...], sides: Callable[[Values], Sides], rows: Sequence[Values], columns: Mapping[str, str]
) -> Shape:
    kinds = {}
    for name in required:
        found = (_kind(row[name]) for row in rows if name in row)
        kind = next((kind for kind in found if kind), None)
        if kind and name != "input":
            kinds[name] = kind
    return Shape(words, required, kinds, sides, columns)


def _kind(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list | dict) else None


def _rename(values: Values, columns: Mapping[str, str]) -> Values:
    if not columns:
        return values
    taken = {*columns.values()}
    kept = {name: cell for name, cell in values.items() if name in (*MAPPABLE, "tools") and name not in taken}
    return kept | {name: values[column] for name, column in columns.items() if column in values}


def _prompt_sides(values: Values) -> Sides:
    return Sides(values["prompt"], values["chosen"], values["rejected"])


def _whole_sides(values: Values) -> Sides:
    return Sides(None, values["chosen"], values["rejected"])


def _sharegpt_sides(values: Values) -> Sides:
    return Sides(list(read_messages(values["conversations"], "conversations")), values["chosen"], values["rejected"])


def _last_turn_sides(values: Values) -> Sides:
    turns = list(read_messages(values["messages"], "messages"))
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise RowFlaw(
            f"column 'messages' ends with a {turns[-1]['role']} turn after {len(turns) - 1} others; "
            "a prompt and then the chosen assistant turn are due"
        )
    return Sides(turns[:-1], turns[-1:], values["rejected_response"])


def _openai_sides(values: Values) -> Sides:
    given = values["input"]
    if not isinstance(given, Mapping) or "messages" not in given:
        raise RowFlaw(f"column 'input' is {kind_words(given)}; an object with messages is due")
    return Sides(given["messages"], values["preferred_output"], values["non_preferred_output"])


def _instruction_sides(values: Values) -> Sides:
    pieces = [read_text(values["instruction"], "instruction"), read_text(values.get("input") or "", "input")]
    return Sides("\n\n".join(piece for piece in pieces if piece), values["chosen"], values["rejected"])


def _read_sides(sides: Sides) -> tuple[Text, Text, Text]:
    """Prompt and answers of one kind, whatever mixture of text, messages and whole dialogues the row had."""
    chosen, rejected = _read_side(sides.chosen, "chosen"), _read_side(sides.rejected, "rejected")
    prompt = None if sides.prompt is None else _read_side(sides.prompt, "prompt")
    if isinstance(prompt, tuple):
        return prompt, _after_prompt(prompt, chosen), _after_prompt(prompt, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return split_transcripts(chosen, rejected) if prompt is None else (prompt, chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowFlaw(
            f"column 'chosen' is {kind_words(sides.chosen)} and 'rejected' {kind_words(sides.rejected)}; make them alike"
        )
    if prompt is None:
        return split_dialogues(chosen, rejected)
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return ({"role": "user", "content": prompt},), chosen, rejected
    turns, chosen, rejected = split_dialogues(chosen, rejected)
    if all(prompt.strip() != turn["content"].strip() for turn in turns):
        difference = describe_difference(({"role": "user", "content": prompt},), turns[-1:], "prompt", "chosen")
        raise RowFlaw(f"column 'prompt' is no turn of the dialogue in 'chosen': {difference}; make them equal")
    return turns, chosen, rejected


def _read_side(value: Any, column: str) -> Text:
    return read_messages(value, column) if isinstance(value, list | Mapping) else read_text(value, column)


def _after_prompt(prompt: Turns, answer: Text) -> Turns:
    if isinstance(answer, str):
        return ({"role": "assistant", "content": answer},)
    repeats_prompt = answer[: len(prompt)] == prompt and len(answer) > len(prompt)
    return answer[len(prompt) :] if repeats_prompt else answer


def _with_system(prompt: Text, chosen: Text, rejected: Text, system: Any) -> tuple[Text, Text, Text]:
    if system is None or not read_text(system, "system").strip():
        return prompt, chosen, rejected
    turn = {"role": "system", "content": system}
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
        chosen, rejected = _after_prompt(prompt, chosen), _after_prompt(prompt, rejected)
    return (prompt if prompt[0]["role"] == "system" else (turn, *prompt)), chosen, rejected


def _read_margin(values: Values) -> float | None:
    if "margin" in values:
        return _read_number(values["margin"], "margin")
    for chosen, rejected in (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")):
        if chosen in values and rejected in values:
            better, worse = _read_number(values[chosen], chosen), _read_number(values[rejected], rejected)
            return None if better is None or worse is None else better - worse
    return None


def _read_number(value: Any, column: str) -> float | None:
    """The number in a cell, also when written as text, which is all that CSV has; None for an empty cell."""
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowFlaw(f"column '{column}' is {value!r}; a finite number is due (null where there is none)")
    return number


def _read_tools(values: Values) -> list[Any] | None:
    given = values.get("input")
    tools = values.get("tools") or (given.get("tools") if isinstance(given, Mapping) else None)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowFlaw(f"column 'tools' is not JSON ({error.msg}); a list of function descriptions is due") from error
    if tools and not isinstance(tools, list):
        raise RowFlaw(f"column 'tools' is {kind_words(tools)}; a list of function descriptions is due")
    return tools or None

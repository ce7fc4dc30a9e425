"""Prompt and two answers of one kind, from whatever mixture of text, messages and whole dialogues a row has.

prompt  "Hi"      [system, user]      [user]              none
answer  "yes"     [assistant]         [user, assistant]   [system, user, assistant]

The answers lose what they repeat of the prompt; the system turn may stand on either side; history goes before the prompt.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pe_dpo.data.columns import carries
from pe_dpo.data.dialogues import describe_difference, read_history, split_dialogues
from pe_dpo.data.messages import list_names, read_content, read_messages, read_text
from pe_dpo.data.pairs import RowError, Text, Turns
from pe_dpo.data.rendering import answer_turns, as_messages, is_open_transcript
from pe_dpo.data.scores import OBJECT_SCORES

Sides = tuple[Text, Text, Text]
Names = tuple[str, str, str]
"""Of prompt, chosen and rejected."""

_ANSWERS = ("chosen", "rejected", "preferred_output", "non_preferred_output", "rejected_response")
_TEXT_KEYS = ("answer", "text", "content", "response", "output", "completion", "value")
"""Where an answer that is an object without a role has its text."""
_READ_KEYS = (*_TEXT_KEYS, *OBJECT_SCORES, "messages", "tools", "parallel_tool_calls")
_MISSING = ("nan", "NaN", "None", "null", "<NA>")
"""What is left of a missing value when data were written as text."""
_MISSING_PROMPTS = ("nan", "NaN", "<NA>")
"""Of these, what nobody asks."""


def read_prompt(required: Sequence[str], prompt: Any, chosen: Text, row: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """Return the prompt's text or messages; None where the answers are whole dialogues.

    The input follows a prompt of text after a blank line, as in Alpaca, unless the prompt already is made of both. A column of
    messages beside the answers may be the whole dialogue of the chosen one.

    Args:
        required: The columns of the shape.
        prompt: The cell of the first of them.
        chosen: The preferred answer, from `read_answer`.
        row: All columns, under our names.
        names: From our names to those of the columns, for messages.

    Raises:
        RowError: The prompt or the input cannot be read.
    """
    first = required[0]
    if required == ("chosen", "rejected"):
        return None
    if first in ("conversations", "messages") and "chosen" in required:
        dialogue = read_messages(prompt, names[first])
        *turns, last = dialogue
        answer = chosen if isinstance(chosen, str) else chosen[0]["content"] if len(chosen) == 1 else None
        if turns and last["role"] == "assistant" and answer is not None and answer.strip() == last["content"].strip():
            return turns
        return None if chosen == dialogue else [*dialogue]
    further = row.get("input")
    is_made_of_both = first == "prompt" and (carries(row.get("instruction")) or not carries(further))
    if first not in ("prompt", "instruction") or not isinstance(prompt, str) or is_made_of_both:
        return prompt
    prompt = read_text(prompt, names[first])
    is_given = further is not None and further == further and not (isinstance(further, str) and is_missing(further))
    if not is_given or prompt.strip() in _MISSING_PROMPTS:
        return prompt
    further = read_text(further, names["input"])
    return f"{prompt}\n\n{further}" if prompt.strip() else further


def read_sides(prompt_cell: Any, chosen: Text, rejected: Text, names: Names) -> Sides:
    """Return prompt and answers of one kind, whatever mixture of text, messages and whole dialogues the row had.

    Args:
        prompt_cell: Text or messages; None where the answers are whole dialogues.
        chosen: The preferred answer, from `read_answer`.
        rejected: The other one.
        names: The columns of the three, for messages.

    Raises:
        RowError: They do not fit together.
    """
    prompt: Text | None = None
    if isinstance(prompt_cell, list | Mapping):
        prompt = read_messages(prompt_cell, names[0])
    elif prompt_cell is not None:
        prompt = read_text(prompt_cell, names[0])
    if isinstance(prompt, tuple):
        return _without_prompt(prompt, _as_turns(chosen), _as_turns(rejected), names)
    if prompt is not None and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        found = ["text" if isinstance(answer, str) else "a list" for answer in (chosen, rejected)]
        raise RowError(f"column '{names[1]}' is {found[0]} and '{names[2]}' {found[1]}; make them alike")
    if prompt is None:
        return split_dialogues(chosen, rejected, (names[1], names[2]))
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return as_messages(prompt), chosen, rejected
    turns, chosen, rejected = split_dialogues(chosen, rejected, (names[1], names[2]))
    if all(prompt.strip() != turn["content"].strip() for turn in turns):
        difference = describe_difference(({"role": "user", "content": prompt},), turns[-1:], names[0], names[1])
        raise RowError(f"column '{names[0]}' is no turn of the dialogue in '{names[1]}': {difference}; make them equal")
    return turns, chosen, rejected


def _without_prompt(prompt: Turns, chosen: Turns, rejected: Turns, names: Names) -> tuple[Turns, Turns, Turns]:
    """Return the answers without the prompt where they repeat it; the system turn may stand on either side, or on both."""
    head, turns = _divide_system(prompt)
    heads, answers = [head], []
    for answer in (chosen, rejected):
        own, body = _divide_system(answer)
        repeats = body[: len(turns)] == turns and len(body) > len(turns) and (own == head or not own or not head)
        answers.append(body[len(turns) :] if repeats else answer)
        heads += [own] if repeats and own else []
    systems = [one for one in heads if one]
    if any(one != systems[0] for one in systems):
        raise RowError(f"columns '{names[1]}' and '{names[2]}' begin with two different system turns; make them equal")
    return (*(systems[0] if systems else ()), *turns), answers[0], answers[1]


def _divide_system(turns: Turns) -> tuple[Turns, Turns]:
    """Return the system turn that a dialogue begins with, if it does, and the other turns."""
    return (turns[:1], turns[1:]) if turns and turns[0]["role"] in ("system", "developer") else ((), turns)


def add_context(sides: Sides, row: Mapping[str, Any], names: Mapping[str, str]) -> Sides:
    """Return the sides with the turns of the history before the prompt, and the system turn before them.

    Args:
        sides: Prompt, chosen and rejected answer.
        row: Its `history` and `system` are read.
        names: From our names to those of the columns, for messages.

    Raises:
        RowError: One of them cannot be read.
    """
    history = read_history(row["history"], names["history"]) if carries(row.get("history")) else ()
    system = read_content(row["system"], names["system"]) if carries(row.get("system")) else ""
    if not history and not system:
        return sides
    prompt, chosen, rejected = sides
    head, turns = _divide_system(as_messages(prompt))
    earlier_head, history = _divide_system(history)
    if head and earlier_head and head != earlier_head:
        raise RowError(f"column '{names['history']}' begins with another system turn than the prompt; leave one of them out")
    if _bare(turns[: len(history)]) != _bare(history):
        turns = (*_without_overlap(history, turns), *turns)
    head = head or earlier_head or (({"role": "system", "content": system},) if system else ())
    return (*head, *turns), answer_turns(prompt, chosen), answer_turns(prompt, rejected)


def _without_overlap(history: Turns, turns: Turns) -> Turns:
    """Return a history without its end, where the turns begin with that: a question still without an answer, or exchanges."""
    asked = history
    while asked and asked[-1]["role"] == "assistant" and not any(asked[-1][key] for key in asked[-1] if key != "role"):
        asked = asked[:-1]  # an exchange whose answer is an empty text
    shortest = 2 if asked and asked[-1]["role"] == "assistant" else 1
    lengths = range(len(asked), shortest - 1, -1)
    overlap = next((length for length in lengths if _bare(asked[-length:]) == _bare(turns[:length])), 0)
    return asked[:-overlap] if overlap else history


def _bare(turns: Turns) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in turns]


def _as_turns(answer: Text) -> Turns:
    return ({"role": "assistant", "content": answer},) if isinstance(answer, str) else answer


def drop_keys(sides: Sides, keys: Collection[str]) -> Sides:
    """Return the sides without some keys of their messages; role and content stay."""
    keys = {*keys} - {"role", "content"}
    prompt, chosen, rejected = (
        side if isinstance(side, str) else tuple({key: turn[key] for key in turn if key not in keys} for turn in side)
        for side in sides
    )
    return prompt, chosen, rejected


def read_answer(cell: Any, column: str) -> Text:
    """Return an answer from text, messages, a list with one text, or an object with the text under one of its usual names.

    Args:
        cell: The cell.
        column: Its name, for messages.

    Raises:
        RowError: It is something else.
    """
    if isinstance(cell, list) and cell and all(isinstance(text, str) for text in cell):
        if len(cell) > 1:
            raise RowError(
                f"column '{column}' is a list of {len(cell)} texts; one answer is expected: write a row for each pair"
            )
        return read_text(cell[0], column)
    if isinstance(cell, Mapping) and not {"role", "from", "speaker", "messages"} & cell.keys():
        texts = [key for key in _TEXT_KEYS if isinstance(cell.get(key), str)]
        if len(texts) != 1:
            raise RowError(
                f"column '{column}' is an object with {list_names(cell)}; text, messages, or an object with the "
                "text under 'answer', 'text' or 'content' are expected"
            )
        return read_text(cell[texts[0]], column)
    return read_messages(cell, column) if isinstance(cell, list | Mapping) else read_text(cell, column)


def unread_keys(cell: Any) -> list[str]:
    """Return the keys with content of an object with text or messages that nobody reads; none for a message or another cell."""
    if not isinstance(cell, Mapping) or {"role", "from", "speaker"} & cell.keys():
        return []
    return [key for key in cell if key not in _READ_KEYS and carries(cell[key])]


def check_sides(prompt: Text, chosen: Text, rejected: Text, names: Names) -> None:
    """Refuse answers that are what is left of a missing value, and turns that do not follow each other as they must.

    Args:
        prompt: Text or messages.
        chosen: The preferred answer, of the same kind.
        rejected: The other one.
        names: The columns of the three, for messages.

    Raises:
        RowError: One of the sides is to be refused.
    """
    _check_prompt(prompt, (chosen, rejected), names[0])
    for column, answer in zip(names[1:], (chosen, rejected), strict=True):
        turns = _as_turns(answer)
        if turns[0]["content"].strip() in _MISSING and len(turns) == 1 and "tool_calls" not in turns[0]:
            raise RowError(
                f"column '{column}' is the text {turns[0]['content'].strip()!r}, which stands where a value was missing; write "
                "the answer, or take the row out"
            )
        if isinstance(prompt, str):
            if is_open_transcript(prompt) and answer_turns(prompt, answer)[-1]["role"] != "assistant":
                raise RowError(f"the answer in column '{column}' ends with a Human turn; an Assistant turn is expected")
            continue
        for place, turn in (("begins", turns[0]), ("ends", turns[-1])):
            if turn["role"] != "assistant":
                raise RowError(
                    f"the answer in column '{column}' {place} with a turn of the role '{turn['role']}'; "
                    "an assistant turn is expected"
                )


def _check_prompt(prompt: Text, answers: tuple[Text, Text], name: str) -> None:
    """Refuse a prompt that is missing, or ends with what the answers bring or a tool was asked."""
    last = as_messages(prompt)[-1]
    asked = last["content"] if last["role"] == "user" else "said elsewhere"
    if asked.strip() in ("", *_MISSING_PROMPTS):
        found = f"the text {asked.strip()!r}, which stands where a value was missing" if asked.strip() else "blank"
        in_turn = "" if isinstance(prompt, str) and not is_open_transcript(prompt) else "the last user turn in "
        raise RowError(f"{in_turn}column '{name}' is {found}; write the prompt, or take the row out")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":  # the answers go on with it
        begun = prompt[-1]["content"].strip()
        if "tool_calls" in prompt[-1]:
            raise RowError(f"column '{name}' ends with a tool call; the tool's turn is expected before the answers")
        begins = [_as_turns(answer)[0]["content"].strip() for answer in answers]
        if begun and (begun in begins or all(answer.startswith(begun) for answer in begins)):
            raise RowError(
                f"column '{name}' ends with the assistant turn {begun[:40]!r}, which the answers bring once more; leave it "
                "out of the prompt"
            )


def is_missing(text: str) -> bool:
    """Return whether a text is blank, or what is left of a missing value."""
    return text.strip() in ("", *_MISSING)


def kind_of(value: Any, name: str) -> str | None:
    """Return what kind of cell this is, for people; None for what neither a prompt nor an answer may be.

    Args:
        value: The cell.
        name: The column, as we call it.
    """
    if isinstance(value, str):
        return "text"
    if name in _ANSWERS and isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return "a list with one text"
    if name in _ANSWERS and isinstance(value, Mapping) and not {"role", "from", "speaker", "messages"} & value.keys():
        return "an object with the text"
    return "messages" if isinstance(value, list | dict) else None

"""Dialogues: messages in their common spellings, and where the prompt of two whole dialogues ends.

    chosen    [user, assistant, user | assistant: yes]          the prompt is what both share before
    rejected  [user, assistant, user | assistant: no ]          the first assistant turn that differs

Transcripts (`\\n\\nHuman: ... \\n\\nAssistant: ...`) follow the same rule: the prompt ends at the last Assistant tag that
both texts share, never at the last character that they share, which may lie inside an answer or a word.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pe_dpo.data.pairs import Message, RowError, Turns, describe_value

ASSISTANT_TAG = "\n\nAssistant:"
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
TAG = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def read_text(value: Any, column: str) -> str:
    """Return a cell that must be text which a tokenizer can read.

    Args:
        value: The cell.
        column: Its name, for messages.

    Raises:
        RowError: It is not text, or holds a NUL or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RowError(f"column '{column}' is {describe_value(value)}; text is expected")
    if "\0" in value:
        raise RowError(f"column '{column}' holds a NUL character at {value.index(chr(0)) + 1}; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        raise RowError(
            f"column '{column}' holds half a surrogate pair ({half}) at {error.start + 1}; "
            "remove it or write the whole character"
        ) from error
    return value


def read_messages(value: Any, column: str) -> Turns:
    """Return the messages of one cell with `role` and `content`, whatever their spelling was.

    Args:
        value: A list of messages or one message, as {role, content} or ShareGPT's {from, value}.
        column: Its name, for messages.

    Returns:
        The messages; keys without a value are left out.

    Raises:
        RowError: It is empty, or something in it is not a message.
    """
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list) or not turns:
        raise RowError(f"column '{column}' is {describe_value(value)}; a list of messages is expected")
    return tuple(_read_message(turn, f"{column}[{number}]") for number, turn in enumerate(turns))


def _read_message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"column '{place}' is {describe_value(turn)}; a message with role and content is expected")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"column '{place}' has the {role_key} {role!r}; one of {', '.join(ROLES)} is expected")
    message = {key: value for key, value in turn.items() if value is not None and key not in (role_key, content_key)}
    if role == "function_call":  # ShareGPT's turn whose value is JSON with name and arguments
        try:
            function = json.loads(read_text(content, place))
        except json.JSONDecodeError as error:
            raise RowError(
                f"column '{place}' is a function call that is not JSON ({error.msg}); "
                "write name and arguments as one JSON object"
            ) from error
        message["tool_calls"], content = [_read_call({"type": "function", "function": function}, place)], None
    elif "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise RowError(f"column '{place}' has tool_calls that are {describe_value(calls)}; a list is expected")
        message["tool_calls"] = [_read_call(call, place) for call in calls]
    place = f"{place}.{content_key}"
    if content is None and "tool_calls" in message:
        text = ""
    elif isinstance(content, list) and content:  # OpenAI's content parts
        kinds = [part.get("type") if isinstance(part, Mapping) else describe_value(part) for part in content]
        if set(kinds) != {"text"}:
            raise RowError(f"column '{place}' has a part that is not text ({', '.join(map(str, kinds))}); only text is read")
        text = "".join(read_text(part.get("text"), place) for part in content)
    else:
        text = read_text(content, place)
    return {"role": ROLES[role], "content": text, **message}


def _read_call(call: Any, place: str) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, which chat templates expect, rather than OpenAI's JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise RowError(f"column '{place}' has a tool call without function and name; found {str(call)[:60]!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise RowError(f"column '{place}' has tool call arguments that are not JSON ({error.msg}); correct them") from error
    return {**call, "function": {**function, "arguments": arguments if arguments is not None else {}}}


def split_dialogues(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Return the prompt that two whole dialogues share, and the answer of each.

    The prompt is the longest shared beginning after which both go on with an assistant turn.

    Raises:
        RowError: There is none; the message shows where the prompts differ.
    """
    shared = shared_length(chosen, rejected)
    for end in range(min(shared, len(chosen) - 1, len(rejected) - 1), 0, -1):
        if chosen[end]["role"] == rejected[end]["role"] == "assistant" != chosen[end - 1]["role"]:
            return chosen[:end], chosen[end:], rejected[end:]
    if shared == 0 and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        raise RowError("columns 'chosen' and 'rejected' begin with the answer and there is no prompt; add column 'prompt'")
    difference = describe_difference(chosen[: shared + 1], rejected[: shared + 1], "chosen", "rejected")
    raise RowError(f"the prompts inside columns 'chosen' and 'rejected' differ: {difference}; make them equal")


def describe_difference(one: Turns, other: Turns, one_name: str, other_name: str) -> str:
    """Return where two dialogues differ first, for people."""
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if left["role"] != right["role"]:
            return f"turn {number + 1} is a {left['role']} turn in {one_name}, a {right['role']} turn in {other_name}"
        if left != right:
            start = shared_length(left["content"], right["content"])
            left_text, right_text = (repr(turn["content"][max(0, start - 20) : start + 20]) for turn in (left, right))
            return (
                f"turn {number + 1} ({left['role']}) at character {start + 1} is {left_text} in {one_name}, "
                f"{right_text} in {other_name}"
            )
    return f"{one_name} has {len(one)} turns, {other_name} {len(other)}"


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return the prompt that two whole transcripts share, and the answer of each, as raw text.

    The prompt goes up to and with the last Assistant tag that both share; answers keep their leading space.

    Raises:
        RowError: The texts share no Assistant tag.
    """
    start = shared_length(chosen, rejected)
    end = chosen.rfind(ASSISTANT_TAG, 0, start)
    if end < 0:
        raise RowError(
            f"columns 'chosen' and 'rejected' share no Assistant tag: they differ from character {start + 1}, "
            f"{chosen[start : start + 20]!r} against {rejected[start : start + 20]!r}; make the prompts equal, "
            "or add column 'prompt'"
        )
    end += len(ASSISTANT_TAG)
    return chosen[:end], chosen[end:], rejected[end:]


def is_transcript(text: str) -> bool:
    """Return whether a text begins with a Human tag and has an Assistant tag."""
    return text.lstrip().startswith("Human:") and ASSISTANT_TAG in text


def messages_from_transcript(prompt: str, answer: str) -> Turns:
    """Return the messages of a transcript and its answer, without the spaces around the texts.

    Args:
        prompt: A text for which `is_transcript` holds and that ends with the Assistant tag.
        answer: What follows; may go on with further turns. Empty for the prompt alone.

    Returns:
        User and assistant messages by turns; an empty assistant turn at the end of the prompt alone is left out.
    """
    _, *pieces = TAG.split(prompt + answer)
    roles = ("user" if tag == "Human" else "assistant" for tag in pieces[::2])
    turns = tuple({"role": role, "content": text.strip()} for role, text in zip(roles, pieces[1::2], strict=True))
    return turns if answer else turns[:-1]


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items (characters, turns) two sequences share from their beginning."""
    differences = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differences, min(len(one), len(other)))

"""Messages in the spellings that people write, each read as {role, content}; and texts that a tokenizer can read."""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from pe_dpo.data.pairs import Message, RowError, Turns, describe_value

_SPELLINGS = {
    "system": "system",
    "developer": "developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt model bot chatbot ai agent claude bard bing function_call tool_call",
    "tool": "tool observation function ipython tool_response tool_result function_response",
}
ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings.split()}
"""From the names of roles that people write, in small letters, to those of chat templates."""
CALLS = ("function_call", "tool_call")
"""Roles of turns whose content is JSON with the name and arguments of one call, or a list of such."""
_KEYS = {"from": "value", "role": "content", "speaker": "text"}
"""Where the role stands, and where the content stands beside it."""
_CONTENTS = ("content", "value", "text", "parts", "message")
"""Where else it may stand: in Gemini's parts, in Cohere's message."""
_MEDIA = ("image", "image_url", "images", "video", "audio", "input_audio", "file", "source")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_ROLE_IN_TEXT = re.compile(rf"""['"](?:role|from|speaker)['"]\s*:\s*['"](?:{"|".join(ROLES)})['"]""", re.IGNORECASE)


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


def list_names(names: Iterable[str]) -> str:
    """Return names of columns or keys with commas; of many those that fit into a few lines, and how many more there are."""
    names = [name if len(name) <= 200 else f"{name[:200]} …" for name in names]
    ends = accumulate(len(name) + 2 for name in names)
    shown = sum(end <= 600 for end in ends)
    more = f" and {len(names) - shown:,} more" if shown < len(names) else ""
    return (", ".join(names[:shown]) or "none") + more


def read_messages(value: Any, column: str) -> Turns:
    """Return the messages of one cell with `role` and `content`, whatever their spelling was.

    Args:
        value: A list of messages, an object with such under `messages`, or one message; as {role, content}, ShareGPT's
            {from, value} or {speaker, text}.
        column: Its name, for messages.

    Returns:
        The messages. Keys without a value are left out, at every depth, because Arrow invents them; an empty list of tool calls
        is none; calls that are turns of their own are one turn with each other, and with what the assistant says before them.

    Raises:
        RowError: It is empty, or something in it is not a message.
    """
    given = [value] if isinstance(value, Mapping) else value
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list) and not _KEYS.keys() & value.keys():
        given = value["messages"]
    if not isinstance(given, list) or not given:
        raise RowError(f"column '{column}' is {describe_value(value)}; a list of messages is expected")
    turns: list[Message] = []
    follows_call = False
    for number, turn in enumerate(given):
        message, is_call = _read_message(turn, f"{column}[{number}]")
        if is_call and (follows_call or (turns and turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1])):
            turns[-1] = {**turns[-1], "tool_calls": [*turns[-1].get("tool_calls", ()), *message["tool_calls"]]}
        else:
            turns.append(message)
        follows_call = is_call
    return tuple(turns)


def _read_message(turn: Any, place: str) -> tuple[Message, bool]:
    """Return a message, and whether it is a turn whose content was a call."""
    if not isinstance(turn, Mapping):
        raise RowError(f"column '{place}' is {describe_value(turn)}; a message with role and content is expected")
    turn = without_nulls(turn)
    role_key = next((key for key in _KEYS if key in turn), None)
    if role_key is None:
        raise RowError(f"column '{place}' has the keys {list_names(turn)}; a message with role and content is expected")
    content_key = next((key for key in (_KEYS[role_key], *_CONTENTS) if key in turn), _KEYS[role_key])
    if content_key not in turn and len(turn) > 1 and not {"tool_calls", "function_call"} & turn.keys():
        raise RowError(f"column '{place}' has no content, only {list_names(turn)}; a message with role and content is expected")
    role, content = turn[role_key], turn.get(content_key)
    spelling = role.strip().lower() if isinstance(role, str) else ""
    spelling = "gpt" if spelling.startswith("gpt") else spelling  # gpt-4 and the like
    if spelling not in ROLES:
        raise RowError(f"column '{place}' has the role {str(role)[:40]!r}; write one of {', '.join(ROLES)} in its place")
    message = {key: value for key, value in turn.items() if key not in (role_key, content_key)}
    older = _read_calls(message.pop("function_call", None), place)  # OpenAI's older name for a single call
    calls = message.pop("tool_calls", None)
    if spelling in CALLS:
        calls, content = content, None
    calls = _read_calls(calls, place)
    if older and calls and all(call["function"] != older[0]["function"] for call in calls):
        raise RowError(f"column '{place}' has tool_calls and another function_call; write all calls into tool_calls")
    calls = calls or older
    if calls:
        message["tool_calls"] = calls
    if ROLES[spelling] == "tool" and _is_result(content):
        content = json.dumps(content, ensure_ascii=False)
    text = "" if not content and calls else read_content(content, f"{place}.{content_key}")
    return {"role": ROLES[spelling], "content": text, **message}, spelling in CALLS


def _is_result(content: Any) -> bool:
    """Return whether the content of a tool's turn is what the tool returned, as JSON, and no typed parts."""
    parts = content if isinstance(content, list) else [content]
    return bool(parts) and all(isinstance(part, Mapping) and not {"type", "text", "value"} & part.keys() for part in parts)


def _read_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return tool calls from a list, a single one, or either as JSON text."""
    if isinstance(calls, str) and calls.strip():
        calls = _read_json(calls, place, what="a function call that is", remedy="write name and arguments as JSON")
    if not isinstance(calls, list | Mapping) and calls:
        raise RowError(f"column '{place}' has tool_calls that are {describe_value(calls)}; a list is expected")
    return [_read_call(call, place) for call in ([calls] if isinstance(calls, Mapping) else calls or ())]


def read_content(content: Any, place: str) -> str:
    """Return text, or the texts of typed parts joined: under `text` or `value`, with a type or, as Bedrock's, without.

    Args:
        content: The cell or the content of a message.
        place: The column, for messages.

    Raises:
        RowError: It is neither, or a part is no text.
    """
    if not isinstance(content, list) or not content:
        return read_text(content, place)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind, text = (part.get("type"), part.get("text", part.get("value"))) if isinstance(part, Mapping) else (None, None)
        media = next((key for key in _MEDIA if isinstance(part, Mapping) and part.get(key)), None)
        if isinstance(text, Mapping):  # OpenAI's assistants write {"text": {"value": …}}
            text = text.get("value")
        if kind not in _TEXT_PARTS or media or not isinstance(text, str):
            names = list_names(part) if isinstance(part, Mapping) else describe_value(part)
            found = kind if kind not in _TEXT_PARTS else media or names
            raise RowError(f"column '{place}' has a part that is not text ({found}); only text is read, take the row out")
        texts.append(text)
    return read_text("".join(texts), place)


def _read_call(call: Any, place: str) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, with arguments that are an object, which chat templates expect, not JSON text."""
    call = _read_json(call, place, what="a tool call that is", remedy="write name and arguments")
    flat = {"name", "arguments", "parameters"}
    if isinstance(call, Mapping) and call.get("function") is None and "name" in call:
        kept = {key: value for key, value in call.items() if key not in (*flat, "function")}
        call = {"type": "function", **kept, "function": {key: value for key, value in call.items() if key in flat}}
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"column '{place}' has a tool call without function and name; found {str(call)[:60]!r}")
    function = dict(function)
    if "arguments" not in function and "parameters" in function:
        function["arguments"] = function.pop("parameters")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _read_json(arguments, place, what="tool call arguments that are", remedy="correct them")
    return {**call, "function": {**function, "arguments": arguments or {}}}


def read_tools(value: Any, column: str) -> list[Any] | None:
    """Return function descriptions, from a list, its JSON text, or a list of JSON texts; None for none.

    Raises:
        RowError: It is something else.
    """
    if not isinstance(value, str):
        value = without_nulls(value)
    elif value.strip() in ("", "nan", "NaN", "None"):
        return None
    else:
        value = _read_json(value, column, what="text that is", remedy="a list of function descriptions is expected")
    if not value or value != value:  # pandas writes NaN for a missing cell
        return None
    if not isinstance(value, list):
        raise RowError(f"column '{column}' is {describe_value(value)}; a list of function descriptions is expected")
    tools = [
        _read_json(tool, f"{column}[{number}]", what="text that is", remedy="a function description is expected")
        if isinstance(tool, str)
        else tool
        for number, tool in enumerate(value)
    ]
    for number, tool in enumerate(tools):
        function = tool.get("function", {}) if isinstance(tool, Mapping) else {}
        if function is None:  # a description without an envelope
            tools[number], function = {key: part for key, part in tool.items() if key != "function"}, {}
        if not isinstance(function, Mapping):
            raise RowError(
                f"column '{column}[{number}].function' is {describe_value(function)}; an object with name, description and "
                "parameters is expected"
            )
    return tools


def _read_json(value: Any, place: str, *, what: str, remedy: str) -> Any:
    """Return a value that may come as text, as JSON or as Python prints it."""
    if not isinstance(value, str):
        return value
    try:
        return _parse(value)
    except ValueError as error:
        raise RowError(f"column '{place}' has {what} not JSON ({error}); {remedy}") from error


def _parse(text: str) -> Any:
    """Return the value that a text holds as JSON or as Python prints it.

    Raises:
        ValueError: It holds none; the message is that of JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # for backslashes in texts
                return without_nulls(ast.literal_eval(text.strip()))  # printed from Arrow, with the nulls that it invents
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(getattr(error, "msg", str(error))) from error


def without_nulls(value: Any) -> Any:
    """Return a record without the keys that are null, at every depth: in Arrow all rows of a column have the same keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def holds_messages(text: str) -> bool:
    """Return whether a text looks like messages written out, as JSON, as Python prints them or as NumPy prints them."""
    return text.lstrip()[:6].startswith(("[", "{", "array(")) and _ROLE_IN_TEXT.search(text) is not None


def parse_written(text: str, column: str) -> Any:
    """Return the list or object that a text holds, as JSON or as Python prints it.

    Raises:
        RowError: It holds none.
    """
    try:
        value = _parse(text)
    except ValueError:
        value = None
    if isinstance(value, Mapping | list):
        return value
    found = f"column '{column}' is text ({text.strip()[:40]!r} …)" if len(text) > 40 else f"column '{column}' is {text!r}"
    raise RowError(
        f"{found}: neither JSON nor a Python list, perhaps as NumPy and pandas print it; save the data as JSON lines or Parquet"
    )

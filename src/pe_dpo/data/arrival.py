"""What of a pair's messages arrived in the text that a chat template made of them.

Templates leave out what they have no words for: tool calls, `tools`, reasoning, a system turn. An answer that lost something
trains another answer, so every text that a row brings is looked up in what was rendered, in the order of the turns.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pe_dpo.data.pairs import Message

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Under which messages carry their reasoning beside the content."""

TEXT, SYSTEM, REASONING, CALLS, TOOLS = "text", "system turn", "reasoning", "tool calls", "tools"
_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)


def lost_parts(turns: Sequence[Message], rendered: str) -> list[tuple[int, str]]:
    """Return what of some messages is not found in a rendered text, as index of the turn and kind of the part.

    Args:
        turns: Messages as a chat template got them.
        rendered: The part of the rendered text that they must be in.
    """
    lost, cursor = [], 0
    for index, turn in enumerate(turns):
        # Within a turn the template decides the order; a system turn may be written anywhere (Mistral: before the last user).
        start, ends = 0 if turn["role"] in ("system", "developer") else cursor, [cursor]
        for kind, text in _parts(turn):
            end = _find(text, rendered, start)
            if end is None:
                lost.append((index, kind))
            elif turn["role"] not in ("system", "developer"):
                ends.append(end)
        cursor = max(ends)
    return list(dict.fromkeys(lost))


def loses_tools(tools: Sequence[Any], rendered: str) -> bool:
    """Return whether names or descriptions of functions are not found in a rendered text."""
    functions = [tool.get("function", tool) if isinstance(tool, Mapping) else {} for tool in tools]
    texts = [function[key] for function in functions for key in ("name", "description") if isinstance(function.get(key), str)]
    return any(text.strip() and _find(text, rendered, 0) is None for text in texts)


def _parts(turn: Message) -> Iterator[tuple[str, Any]]:
    """Yield kind and value of each thing that a message says."""
    content = turn.get("content") or ""
    if turn["role"] == "assistant" and "<think>" in content:
        thoughts, said = _THOUGHT.findall(content), _THOUGHT.sub("", content)
        yield from ((REASONING, thought) for thought in thoughts if thought.strip())
    else:
        said = content
    if said.strip():
        yield SYSTEM if turn["role"] in ("system", "developer") else TEXT, said
    for key in REASONING_KEYS:
        if isinstance(turn.get(key), str) and turn[key].strip():
            yield REASONING, turn[key]
    for call in turn.get("tool_calls") or ():
        function = call["function"]
        yield CALLS, function["name"]
        arguments = function["arguments"]
        yield from ((CALLS, leaf) for leaf in _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield keys and values of a JSON value, whatever their nesting."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None and value != "":
        yield value


def _find(value: Any, rendered: str, start: int) -> int | None:
    """Return where a value ends in a text, whether it is written plainly or as part of JSON or of a Python literal."""
    if isinstance(value, str):
        text = value.strip()
        forms = [text]
        if not text.isalnum():
            forms += [json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], repr(text)[1:-1]]
    else:
        forms = [json.dumps(value), str(value)]
    ends = [place + len(form) for form in forms if (place := rendered.find(form, start)) >= 0]
    if not ends and isinstance(value, str) and len(value.split()) > 1:  # white space inside it written otherwise
        found = re.compile(r"\s+".join(map(re.escape, value.split()))).search(rendered, start)
        ends = [found.end()] if found else []
    return min(ends, default=None)

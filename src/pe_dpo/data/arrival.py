"""What of a pair's messages arrived in the text that a chat template made of them.

Templates leave out what they have no words for: tool calls, `tools`, reasoning, a system turn. An answer that lost something
trains another answer, so every text that a row brings is looked up in what was rendered, in the order of the turns.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pe_dpo.data.pairs import Message

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
"""Under which messages carry their reasoning beside the content, as text."""
KNOWN_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS)
ANY_REASONING = re.compile(r"reason|think|thought", re.IGNORECASE)
"""Finds keys of messages that hold reasoning, whatever they are called."""

TEXT, SYSTEM, REASONING, CALLS, TOOLS = "text", "system turn", "reasoning", "tool calls", "tools"
_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)


def lost_parts(turns: Sequence[Message], rendered: str) -> list[tuple[int, str]]:
    """Return what of some messages is not found in a rendered text, as index of the turn and kind of the part.

    The texts of the turns are found one after the other. What else a turn says is looked for between that of the turn before
    and that of the turn after, wherever those may lie; a system turn anywhere (Mistral writes it before the last user turn).

    Args:
        turns: Messages as a chat template got them.
        rendered: The part of the rendered text that they must be in.
    """
    parts = [[(kind, value, _forms(value)) for kind, value in _parts(turn)] for turn in turns]
    texts = [next(((said, forms) for kind, said, forms in own if kind == TEXT), None) for own in parts]
    lost: list[tuple[int, str]] = []
    after, before = [0], [len(rendered)]  # the earliest end of the texts so far, the latest start of those that follow
    for index, text in enumerate(texts):
        found = None if text is None else _find(text[0], text[1], rendered, after[-1], len(rendered))
        if text is not None and found is None:
            lost.append((index, TEXT))
        after.append(after[-1] if found is None else found[1])
    for text in reversed(texts):
        found = None if text is None else _find(text[0], text[1], rendered, 0, before[-1], last=True)
        before.append(before[-1] if found is None else found[0])
    before.reverse()
    for index, own in enumerate(parts):
        text = texts[index]
        said = "" if text is None or (index, TEXT) in lost else text[0].strip()
        for kind, value, forms in own:
            if kind == TEXT:
                continue
            part = rendered if kind == SYSTEM else rendered[after[index] : before[index + 1]]
            # What stands in the turn's own text, too, must be there once more.
            is_there = any(part.count(form) > said.count(form) for form in forms)
            if is_there or (_find(value, forms, said, 0, len(said)) is None and _find(value, forms, part, 0, len(part))):
                continue
            lost.append((index, kind))
    return sorted(dict.fromkeys(lost))


def loses_tools(tools: Sequence[Any], rendered: str) -> bool:
    """Return whether names or descriptions of functions are not found in a rendered text."""
    functions = [tool.get("function", tool) if isinstance(tool, Mapping) else {} for tool in tools]
    texts = [function[key] for function in functions for key in ("name", "description") if isinstance(function.get(key), str)]
    return any(text.strip() and _find(text, _forms(text), rendered, 0, len(rendered)) is None for text in texts)


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
    for key, value in turn.items():
        if key not in ("role", "content") and ANY_REASONING.search(key):
            yield from ((REASONING, leaf) for leaf in _leaves(value) if not isinstance(leaf, str) or leaf.strip())
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


def _forms(value: Any) -> list[str]:
    """Return how a value may be written: plainly, as part of JSON, or of a Python literal."""
    if not isinstance(value, str):
        return [json.dumps(value), str(value)]
    text = value.strip()
    if text.isalnum() or (text.isascii() and text.isprintable() and '"' not in text and "\\" not in text):
        return [text]
    forms = [text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], repr(text)[1:-1]]
    return list(dict.fromkeys(forms))


def _find(
    value: Any, forms: Sequence[str], rendered: str, start: int, end: int, *, last: bool = False
) -> tuple[int, int] | None:
    """Return where a value, in one of its forms, stands in [start, end) of a text, in the first or the last place, as asked."""
    find = rendered.rfind if last else rendered.find
    places = [(place, place + len(form)) for form in forms if (place := find(form, start, end)) >= 0]
    if not places and isinstance(value, str) and len(value.split()) > 1:  # white space inside it written otherwise
        spaced = re.compile(r"\s+".join(map(re.escape, value.split())))
        places = [found.span() for found in spaced.finditer(rendered, start, end)]
    return (max if last else min)(places, default=None)

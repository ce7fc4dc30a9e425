"""Pairs as text: by the tokenizer's chat template, or as the plain text that they are.

chat    render(prompt, generation prompt)   and   render(prompt + answer)
plain   prompt                              and   prompt + answer
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pe_dpo.data.dialogues import is_transcript, messages_from_transcript, shared_length
from pe_dpo.data.pairs import Pair, RowFlaw, Text, Turns
from pe_dpo.errors import DataError

Template = Literal["auto", "chat", "plain"]
_PROBE = "zqxjkv"  # an answer that no template contains


class Rendered(NamedTuple):
    """The texts of one pair that are tokenized; `chosen` and `rejected` begin with the prompt."""

    prompt: str
    chosen: str
    rejected: str


def uses_chat_template(tokenizer: Any, template: Template) -> bool:
    """Are pairs rendered by the tokenizer's chat template?

    Args:
        tokenizer: A transformers tokenizer.
        template: `auto` takes the chat template where there is one.

    Returns:
        True for the chat template, False for plain text.

    Raises:
        DataError: When `chat` is asked for and the tokenizer has none.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise DataError(
            "data.template: chat: the tokenizer has no chat template; take an instruct model, or write data.template: plain"
        )
    return template != "plain" and bool(tokenizer.chat_template)


def render_pair(pair: Pair, tokenizer: Any, *, is_chat: bool) -> Rendered:
    """The texts of one pair.

    Args:
        pair: A pair of texts or of messages.
        tokenizer: A transformers tokenizer.
        is_chat: From `uses_chat_template`.

    Returns:
        The prompt as it stands before an answer, and the prompt with each answer.

    Raises:
        DataError: When there are messages and no chat template.
        RowFlaw: When the template refuses the messages.
    """
    if not is_chat:
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
            raise DataError(
                f"{pair.where}: this pair is a list of messages, and the tokenizer has no chat template, or "
                "plain text was asked for; take an instruct model with data.template: chat, or data "
                "whose prompt, chosen and rejected are text (data.template: plain)"
            )
        return Rendered(prompt, prompt + chosen, prompt + rejected)
    from jinja2 import TemplateError

    try:
        return Rendered(
            _render(as_messages(pair.prompt), pair, tokenizer, add_generation_prompt=True),
            _render(_with_answer(pair.prompt, pair.chosen), pair, tokenizer),
            _render(_with_answer(pair.prompt, pair.rejected), pair, tokenizer),
        )
    except (TemplateError, TypeError) as error:
        raise RowFlaw(f"is refused by the chat template ({error}); see which roles and turns it wants") from error


def as_messages(prompt: Text) -> Turns:
    """A prompt as messages: itself, the turns of a Human/Assistant transcript, or one user turn."""
    if not isinstance(prompt, str):
        return prompt
    if _is_open_transcript(prompt):
        return messages_from_transcript(prompt, "")
    return ({"role": "user", "content": prompt},)


def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds the tokenizer's special tokens in a text; None when it has none."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {*tokenizer.all_special_tokens, *added} - {""}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def check_control_tokens(pair: Pair, pattern: re.Pattern[str] | None) -> None:
    """Raise when a text of the pair would become control ids, and so fake a turn, inside the chat template.

    Args:
        pair: The pair.
        pattern: From `control_tokens`.

    Raises:
        RowFlaw: Naming the column and the token.
    """
    for column, text in _texts(pair):
        found = pattern.search(text) if pattern else None
        if found:
            raise RowFlaw(
                f"column '{column}' holds the control token {found[0]!r} as text, which the tokenizer would take "
                "for a turn of its own; remove it, or, if the texts already are rendered with the chat "
                "template, write data.template: plain"
            )


def is_blank(answer: Text) -> bool:
    """Has the answer nothing but white space, and no tool call?"""
    if isinstance(answer, str):
        return not answer.strip()
    return not any(turn["content"].strip() or turn.get("tool_calls") for turn in answer)


def count_turns(pair: Pair) -> int:
    """The turns of the longer answer; 1 for an ordinary pair."""
    return max(len(_answer_turns(pair.prompt, answer)) for answer in (pair.chosen, pair.rejected))


def describe_template(tokenizer: Any) -> list[str]:
    """What the chat template does around an answer, measured on one probe.

    Args:
        tokenizer: A transformers tokenizer with a chat template.

    Returns:
        Facts worth telling: the generation prompt that rendered answers do not have, and text of the template that is
        scored as part of the answers. Empty for an ordinary template.
    """
    from jinja2 import TemplateError

    prompt: Turns = ({"role": "user", "content": "Hello"},)
    probe = Pair(prompt, ({"role": "assistant", "content": _PROBE},), (), None, None, "probe")
    try:
        opened = _render(prompt, probe, tokenizer, add_generation_prompt=True)
        answered = _render(_with_answer(prompt, probe.chosen), probe, tokenizer)
    except (TemplateError, TypeError):
        return []  # the template wants other turns; the rows will show
    head = answered[: max(answered.find(_PROBE), 0)]
    shared = shared_length(opened, head)
    facts = []
    if shared < len(opened):
        facts.append(
            f"the chat template is not prefix-preserving: its generation prompt ends with {opened[shared:]!r} "
            f"({len(opened) - shared} characters), which rendered answers do not have; it is left out"
        )
    if head[shared:].strip():
        facts.append(
            f"the chat template writes {head[shared:]!r} ({len(head) - shared} characters) between the generation "
            "prompt and the answer; they are scored as part of both answers"
        )
    return facts


def _render(turns: Turns, pair: Pair, tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(
        list(turns), tools=pair.tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _with_answer(prompt: Text, answer: Text) -> Turns:
    if isinstance(prompt, str) and isinstance(answer, str) and _is_open_transcript(prompt):
        return messages_from_transcript(prompt, answer)
    return (*as_messages(prompt), *_answer_turns(prompt, answer))


def _answer_turns(prompt: Text, answer: Text) -> Turns:
    if not isinstance(answer, str):
        return answer
    if isinstance(prompt, str) and _is_open_transcript(prompt) and answer:
        return messages_from_transcript(prompt, answer)[len(messages_from_transcript(prompt, "")) :]
    return ({"role": "assistant", "content": answer},)


def _is_open_transcript(prompt: str) -> bool:
    return is_transcript(prompt) and prompt.rstrip().endswith("\n\nAssistant:")


def _texts(pair: Pair) -> Iterator[tuple[str, str]]:
    for column, side in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        yield column, side if isinstance(side, str) else json.dumps(side, ensure_ascii=False)

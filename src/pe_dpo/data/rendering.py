"""Pairs as text: by the tokenizer's chat template, or as the plain text that they are.

chat    render(prompt, generation prompt)   and   render(prompt + answer)
plain   prompt                              and   prompt + answer
"""

import re
from typing import Any, Literal

from pe_dpo.data.dialogues import ASSISTANT_TAG, is_transcript, messages_from_transcript, shared_length
from pe_dpo.data.pairs import Pair, RowError, Text, Turns
from pe_dpo.errors import DataError

_PROBE = "zqxjkv"  # an answer that no template contains


def uses_chat_template(tokenizer: Any, template: Literal["auto", "chat", "plain"]) -> bool:
    """Return whether pairs are rendered by the tokenizer's chat template; "auto" takes it where there is one.

    Raises:
        DataError: `chat` is asked for and the tokenizer has none.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise DataError(
            "data.template: chat: the tokenizer has no chat template; take an instruct model, or write data.template: plain"
        )
    return template != "plain" and bool(tokenizer.chat_template)


def render_pair(pair: Pair, tokenizer: Any, *, is_chat: bool) -> tuple[str, str, str]:
    """Return the prompt as it stands before an answer, and the prompt with each answer.

    Args:
        pair: A pair of texts or of messages.
        tokenizer: A transformers tokenizer.
        is_chat: Whether its chat template is used, see `uses_chat_template`.

    Raises:
        DataError: There are messages and no chat template.
        RowError: The template refuses the messages.
    """
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if not is_chat:
        if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
            raise DataError(
                f"{pair.where}: this pair is a list of messages, and the tokenizer has no chat template, or "
                "plain text was asked for; take an instruct model with data.template: chat, or data "
                "whose prompt, chosen and rejected are text (data.template: plain)"
            )
        return prompt, prompt + chosen, prompt + rejected
    from jinja2 import TemplateError

    try:
        opened = _render(as_messages(prompt), pair.tools, tokenizer, add_generation_prompt=True)
        whole = [(*as_messages(prompt), *answer_turns(prompt, answer)) for answer in (chosen, rejected)]
        return opened, _render(whole[0], pair.tools, tokenizer), _render(whole[1], pair.tools, tokenizer)
    except (TemplateError, TypeError) as error:
        raise RowError(f"is refused by the chat template ({error}); see which roles and turns it wants") from error


def as_messages(prompt: Text) -> Turns:
    """Return a prompt as messages: itself, the turns of a Human/Assistant transcript, or one user turn."""
    if not isinstance(prompt, str):
        return prompt
    if _is_open_transcript(prompt):
        return messages_from_transcript(prompt, "")
    return ({"role": "user", "content": prompt},)


def answer_turns(prompt: Text, answer: Text) -> Turns:
    """Return an answer as messages: itself, the turns that go on with a transcript, or one assistant turn."""
    if not isinstance(answer, str):
        return answer
    if isinstance(prompt, str) and _is_open_transcript(prompt) and answer:
        return messages_from_transcript(prompt, answer)[len(messages_from_transcript(prompt, "")) :]
    return ({"role": "assistant", "content": answer},)


def is_blank(answer: Text) -> bool:
    """Return whether an answer has nothing but white space, and no tool call."""
    if isinstance(answer, str):
        return not answer.strip()
    return not any(turn["content"].strip() or turn.get("tool_calls") for turn in answer)


def _is_open_transcript(prompt: str) -> bool:
    return is_transcript(prompt) and prompt.rstrip().endswith(ASSISTANT_TAG)


def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Return what finds the tokenizer's special tokens in a text; None when it has none."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {*tokenizer.all_special_tokens, *added} - {""}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def describe_template(tokenizer: Any) -> list[str]:
    """Return what the chat template does around an answer, measured on one probe.

    Args:
        tokenizer: A transformers tokenizer with a chat template.

    Returns:
        What is worth telling: the generation prompt that rendered answers do not have, and text of the template that is
        scored as part of the answers. Empty for an ordinary template.
    """
    from jinja2 import TemplateError

    prompt: Turns = ({"role": "user", "content": "Hello"},)
    try:
        opened = _render(prompt, None, tokenizer, add_generation_prompt=True)
        answered = _render((*prompt, {"role": "assistant", "content": _PROBE}), None, tokenizer)
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


def _render(turns: Turns, tools: list[Any] | None, tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)

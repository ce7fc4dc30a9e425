"""Pairs as text: by the tokenizer's chat template, or as the plain text that they are.

chat    render(prompt, generation prompt)   and   render(prompt + answer)
plain   prompt                              and   prompt + answer
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

from pe_dpo.data.arrival import REASONING_KEYS, lost_parts
from pe_dpo.data.dialogues import ASSISTANT_TAG, TAG, is_transcript, messages_from_transcript, shared_length
from pe_dpo.data.pairs import Message, Pair, RowError, Text, Turns
from pe_dpo.errors import DataError
from pe_dpo.recipe.schema import DataSection

_PROBES = ("zqxjkv", "wvkjxq")  # answers that no template contains; two, because an answer may begin or end like one of them
_CALL = {"type": "function", "id": "aBcDeFgHi", "function": {"name": "zqxjkv", "arguments": {"wvkjxq": "kvjxzq"}}}

Spans = list[tuple[int, int]]
"""[start, end) of the assistant's turns in a text."""


class Rendered(NamedTuple):
    """A pair as text."""

    opened: str
    """The prompt as it stands before an answer."""
    answered: tuple[str, str]
    """The prompt with the chosen and with the rejected answer."""
    spans: tuple[Spans | None, Spans | None]
    """What of each answered text is scored; None where all after the prompt is."""


def uses_chat_template(tokenizer: Any, template: str) -> bool:
    """Return whether pairs are rendered by the tokenizer's chat template; "auto" takes it where there is one.

    Raises:
        DataError: `chat` is asked for and the tokenizer has none.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise DataError(
            "data.template: chat: the tokenizer has no chat template; take an instruct model, or write data.template: plain"
        )
    return template != "plain" and bool(tokenizer.chat_template)


def set_template(tokenizer: Any, settings: DataSection) -> None:
    """Give a tokenizer the chat template that a recipe names, with the arguments that it sets.

    The arguments are written into the template as its defaults, so that everything that is made of the tokenizer (run, adapter,
    merged model, GGUF) renders as in training without knowing them.

    Args:
        tokenizer: A transformers tokenizer as its base has it; changed in place.
        settings: Its `template` and `template_args` count here.

    Raises:
        DataError: The file of the template cannot be read, or there are arguments and no template.
    """
    if settings.template not in ("auto", "chat", "plain"):
        try:
            tokenizer.chat_template = Path(settings.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"data.template: {settings.template} cannot be read ({error}); name a file with a Jinja chat template, "
                "or write auto, chat or plain"
            ) from error
    if not settings.template_args:
        return
    if not uses_chat_template(tokenizer, settings.template):
        raise DataError("data.template_args: there is no chat template that could take them; leave them out")
    # The empty expression keeps Jinja from trimming a line break at the start of the template after a block.
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}"
        for name, value in settings.template_args.items()
    ) + "{{ '' }}"  # fmt: skip
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: defaults + text for name, text in template.items()}
    else:
        tokenizer.chat_template = defaults + template


class Template:
    """How pairs become text.

    Attributes:
        is_chat: Whether the tokenizer's chat template writes them, else they are plain text.
        today: The date for a template that writes it.
        has_clock: Whether the template asked for it in something rendered so far.
    """

    def __init__(self, tokenizer: Any, settings: DataSection) -> None:
        """Find out how the template wants reasoning and the arguments of tool calls.

        Args:
            tokenizer: A transformers tokenizer.
            settings: Its `template`, `template_date` and `score` count here.

        Raises:
            DataError: A chat template is asked for and the tokenizer has none.
        """
        self._tokenizer, self._last_turn_alone = tokenizer, settings.score == "last"
        self.is_chat = uses_chat_template(tokenizer, settings.template)
        self.today = settings.template_date or date.today()
        self.has_clock = False
        self._reasoning_key: str | None = None
        self._calls_as_text = False
        if not self.is_chat:
            return
        question, answer = {"role": "user", "content": _PROBES[0]}, {"role": "assistant", "content": _PROBES[0]}
        for key in REASONING_KEYS:
            if self._arrives((question, answer | {key: _PROBES[1]})):
                self._reasoning_key = key
                break
        if not self._arrives((question, answer | {"tool_calls": [_CALL]})):
            as_text = [_with_arguments_as_text(_CALL)]
            self._calls_as_text = self._arrives((question, answer | {"tool_calls": as_text}))

    def _arrives(self, turns: Turns) -> bool:
        """Return whether a template writes all of some turns."""
        try:
            return not lost_parts(turns, self.render(turns))
        except RowError:
            return False

    def render(
        self,
        turns: Sequence[Message],
        *,
        opens: bool = False,
        tools: list[Any] | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> str:
        """Return messages as the chat template writes them.

        Args:
            turns: The messages.
            opens: Whether the generation prompt follows, which opens an answer.
            tools: Descriptions of functions.
            args: Arguments of the template for these messages alone.

        Raises:
            RowError: The template refuses them.
        """
        from jinja2 import TemplateError

        def strftime_now(form: str) -> str:
            self.has_clock = True
            return datetime.combine(self.today, time()).strftime(form)

        arguments = {"strftime_now": strftime_now, **(args or {})}
        messages = [self._as_the_template_wants(turn) for turn in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=opens, **arguments
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise RowError(f"is refused by the chat template ({what}); see which roles and turns it wants") from error
        return text

    def _as_the_template_wants(self, turn: Message) -> dict[str, Any]:
        message = dict(turn)
        given = [key for key in REASONING_KEYS if key in message]
        if given and self._reasoning_key and self._reasoning_key not in message:
            message[self._reasoning_key] = message.pop(given[0])
        if self._calls_as_text and message.get("tool_calls"):
            message["tool_calls"] = [_with_arguments_as_text(call) for call in message["tool_calls"]]
        return message

    def render_pair(self, pair: Pair) -> Rendered:
        """Return a pair as text, and what of it is scored.

        Raises:
            DataError: There are messages and no chat template.
            RowError: The template refuses the messages, or which part of its text is the assistant's cannot be told.
        """
        prompt, answers = pair.prompt, (pair.chosen, pair.rejected)
        if not self.is_chat:
            if not (isinstance(prompt, str) and isinstance(answers[0], str) and isinstance(answers[1], str)):
                raise DataError(
                    f"{pair.where}: this pair is a list of messages, and the tokenizer has no chat template, or "
                    "plain text was asked for; take an instruct model with data.template: chat, or data "
                    "whose prompt, chosen and rejected are text (data.template: plain)"
                )
            chosen, rejected = (self._transcript_spans(prompt, str(answer)) for answer in answers)
            return Rendered(prompt, (prompt + answers[0], prompt + answers[1]), (chosen, rejected))
        turns = as_messages(prompt)
        chosen_turns, rejected_turns = (answer_turns(prompt, answer) for answer in answers)
        if turns[-1]["role"] != "assistant":
            opened = self.render(turns, opens=True, tools=pair.tools, args=pair.template_args)
            start, prefill = turns, None
        else:  # the answers go on with its text
            start, prefill = turns[:-1], turns[-1]
            chosen_turns, rejected_turns = (_continue(prefill, answer) for answer in (chosen_turns, rejected_turns))
            opened = ""
        sides = []
        for answer in (chosen_turns, rejected_turns):
            text = self.render((*start, *answer), tools=pair.tools, args=pair.template_args)
            sides.append((text, self._spans(pair, start, answer, text) if len(answer) > 1 else None))
        if prefill is not None:
            opened = self._opened_with(prefill, pair, start, sides[0][0])
        (chosen_text, chosen), (rejected_text, rejected) = sides
        return Rendered(opened, (chosen_text, rejected_text), (chosen, rejected))

    def _opened_with(self, prefill: Message, pair: Pair, start: Turns, answered: str) -> str:
        """Return the rendered text up to the end of an answer's beginning that the prompt brings."""
        opened = self.render(start, opens=True, tools=pair.tools, args=pair.template_args)
        place = answered.find(prefill["content"].lstrip(), shared_length(opened, answered))
        if place < 0:
            raise RowError(
                "the chat template does not write the assistant turn that ends the prompt as it is; write the whole answers "
                "into chosen and rejected instead"
            )
        return answered[: place + len(prefill["content"].lstrip())]

    def _spans(self, pair: Pair, start: Turns, answer: Turns, text: str) -> Spans:
        """Return which parts of a rendered text the assistant's turns of an answer of several turns are.

        A turn lies where the text changes when it says something else: that holds for templates, too, that write a turn
        otherwise when others follow. It begins after the generation prompt.

        Raises:
            RowError: They cannot be told apart.
        """
        options: dict[str, Any] = {"tools": pair.tools, "args": pair.template_args}
        before = self.render(start, **options)
        opened = self.render(start, opens=True, **options)
        generation_prompt = opened[len(before) :] if opened.startswith(before) else ""
        spans: Spans = []
        cursor = shared_length(before, text)
        for index, turn in enumerate(answer):
            if turn["role"] != "assistant" or (self._last_turn_alone and index < len(answer) - 1):
                continue
            said = turn["content"].strip()
            probe = next((probe for probe in _PROBES if said[:1] != probe[0] and said[-1:] != probe[-1]), "jxq")
            others = (*answer[:index], {"role": "assistant", "content": probe}, *answer[index + 1 :])
            other = self.render((*start, *others), **options)
            begin = shared_length(text, other)
            end = len(text) - shared_length(text[begin:][::-1], other[begin:][::-1])
            header = text.rfind(generation_prompt, cursor, begin) if generation_prompt else -1
            if header >= 0:
                begin = header + len(generation_prompt)
            if not cursor <= begin < end or (said and said.split()[-1] not in text[begin:end]):
                raise RowError(
                    f"which part of its answer's turn {index + 1} is the assistant's cannot be told under this chat template; "
                    "write data.score: last, or one turn a pair"
                )
            spans.append((begin, end))
            cursor = end
        return spans

    def _transcript_spans(self, prompt: str, answer: str) -> Spans | None:
        """Return the assistant's parts of a raw transcript that goes on after its first answer."""
        text = prompt + answer
        tags = [tag for tag in TAG.finditer(text) if tag.start() >= len(prompt)] if is_open_transcript(prompt) else []
        if not tags:
            return None
        starts = [len(prompt), *(tag.end() for tag in tags)]
        ends = [*(tag.start() for tag in tags), len(text)]
        speakers = ["Assistant", *(tag[1] for tag in tags)]
        parts = zip(speakers, starts, ends, strict=True)
        spans = [(start, end) for speaker, start, end in parts if speaker == "Assistant" and start < end]
        return spans[-1:] if self._last_turn_alone else spans


def _continue(prefill: Message, answer: Turns) -> Turns:
    """Return an answer's turns whose first begins with the text that the prompt already has of it."""
    return ({**answer[0], "content": prefill["content"] + answer[0]["content"]}, *answer[1:])


def _with_arguments_as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as JSON text, which some templates (DeepSeek-V3) put together with other text."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def as_messages(prompt: Text) -> Turns:
    """Return a prompt as messages: itself, the turns of a Human/Assistant transcript, or one user turn."""
    if not isinstance(prompt, str):
        return prompt
    if is_open_transcript(prompt):
        return messages_from_transcript(prompt, "")
    return ({"role": "user", "content": prompt},)


def answer_turns(prompt: Text, answer: Text) -> Turns:
    """Return an answer as messages: itself, the turns that go on with a transcript, or one assistant turn."""
    if not isinstance(answer, str):
        return answer
    if isinstance(prompt, str) and is_open_transcript(prompt) and answer:
        return messages_from_transcript(prompt, answer)[len(messages_from_transcript(prompt, "")) :]
    return ({"role": "assistant", "content": answer},)


def is_blank(answer: Text) -> bool:
    """Return whether an answer has nothing but white space, and no tool call."""
    if isinstance(answer, str):
        return not answer.strip()
    return not any(turn["content"].strip() or turn.get("tool_calls") for turn in answer)


def is_open_transcript(prompt: str) -> bool:
    """Return whether a prompt is a Human/Assistant transcript that ends where an answer begins."""
    return is_transcript(prompt) and prompt.rstrip().endswith(ASSISTANT_TAG)


def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Return what finds the tokenizer's special tokens in a text; None when it has none."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {*tokenizer.all_special_tokens, *added} - {""}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


_FOREIGN = {
    "Llama 2's [INST]": re.compile(r"\[INST\]|<<SYS>>"),
    "ChatML's <|im_start|>": re.compile(r"<\|im_start\|>"),
    "Llama 3's <|start_header_id|>": re.compile(r"<\|start_header_id\|>"),
    "Gemma's <start_of_turn>": re.compile(r"<start_of_turn>"),
    "Zephyr's <|user|>": re.compile(r"<\|(?:user|assistant)\|>"),
    "DeepSeek's <｜User｜>": re.compile(r"<｜User｜>"),
    "Alpaca's ### Response:": re.compile(r"^### ?(?:Response|Instruction|Input):", re.MULTILINE),
    "Vicuna's USER: … ASSISTANT:": re.compile(r"(?:^|\s)USER: .*\sASSISTANT:", re.DOTALL),
}


def foreign_template(texts: Sequence[str], own: str | None) -> str | None:
    """Return the name of the chat template that texts are already written with, None for none.

    Args:
        texts: Prompt and answers as the row has them.
        own: The chat template's source under which they are meant to be; what it has itself is not foreign.
    """
    for name, mark in _FOREIGN.items():
        if any(mark.search(text) for text in texts) and not (own and mark.search(own)):
            return name
    return None


def describe_template(template: Template) -> list[str]:
    """Return what a chat template does around an answer, measured on one probe.

    Returns:
        What is worth telling: the generation prompt that rendered answers do not have, and text of the template that is
        scored as part of the answers. Empty for an ordinary template.
    """
    prompt: Turns = ({"role": "user", "content": "Hello"},)
    try:
        opened = template.render(prompt, opens=True)
        answered = template.render((*prompt, {"role": "assistant", "content": _PROBES[0]}))
    except RowError:
        return []  # the template wants other turns; the rows will show
    head = answered[: max(answered.find(_PROBES[0]), 0)]
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

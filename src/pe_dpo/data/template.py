"""The chat template of a tokenizer: with a recipe's own text and arguments, its date held, its wishes found out on probes."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pe_dpo.data.arrival import REASONING_KEYS, lost_parts
from pe_dpo.data.dialogues import shared_length
from pe_dpo.data.pairs import Message, RowError, Turns
from pe_dpo.errors import DataError
from pe_dpo.recipe.data_section import DataSection

PROBES = ("zqxjkv", "wvkjxq")  # answers that no template contains; two, because an answer may begin or end like one of them
"""Answers that no template contains; two, because an answer may begin or end like one of them."""
_CALL = {"type": "function", "id": "aBcDeFgHi", "function": {"name": "zqxjkv", "arguments": {"wvkjxq": "kvjxzq"}}}


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
    unknown = unknown_arguments(tokenizer, settings.template_args)
    if unknown:
        raise DataError(f"data.template_args: {unknown}")
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
        has_clock: Whether the template writes a date.
    """

    def __init__(self, tokenizer: Any, settings: DataSection) -> None:
        """Find out how the template wants reasoning and the arguments of tool calls.

        Args:
            tokenizer: A transformers tokenizer.
            settings: Its `template` and `template_date` count here.

        Raises:
            DataError: A chat template is asked for and the tokenizer has none.
        """
        self._tokenizer = tokenizer
        self.is_chat = uses_chat_template(tokenizer, settings.template)
        self.today = settings.template_date or date.today()
        self.has_clock = self.is_chat and "strftime_now" in str(tokenizer.chat_template)
        self._content_as_parts = self._calls_as_text = False
        self._reasoning_key: str | None = None
        if not self.is_chat:
            return
        question, answer = {"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": PROBES[0]}
        if not self._arrives((question, answer)):
            self._content_as_parts = True
            self._content_as_parts = self._arrives((question, answer))
        self._reasoning_key = next(
            (key for key in REASONING_KEYS if self._arrives((question, answer | {key: PROBES[1]}))), None
        )
        with_call = (question, answer | {"content": "", "tool_calls": [_CALL]})
        if not self._arrives(with_call):
            self._calls_as_text = True
            self._calls_as_text = self._arrives(with_call)

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
            DataError: It takes more time or memory than a chat can need.
        """
        from pe_dpo.data.sandbox import TEMPLATE_ERRORS, apply_chat_template

        messages = [self._as_the_template_wants(turn) for turn in turns]
        source = self._tokenizer.get_chat_template(tools=tools)
        try:
            return apply_chat_template(
                self._tokenizer,
                messages,
                tools=tools,
                chat_template=self._frozen_clock() + source if self.has_clock else source,
                add_generation_prompt=opens,
                **(args or {}),
            )
        except TEMPLATE_ERRORS as error:
            raise RowError(refusal(error)) from error

    def _frozen_clock(self) -> str:
        """Return Jinja that stands before a template and replaces its clock, which in transformers is the real one."""
        written = set(re.findall(r"%[-_0^#]?[A-Za-z]", str(self._tokenizer.chat_template)))
        directives = {name: self.today.strftime(name) for name in sorted(written)} | {"%%": "%"}
        replaced = "format" + "".join(f".replace({name!r}, {value!r})" for name, value in directives.items())
        return f"{{% macro strftime_now(format) %}}{{{{ {replaced} }}}}{{% endmacro %}}{{{{ '' }}}}"

    def _as_the_template_wants(self, turn: Message) -> dict[str, Any]:
        message = dict(turn)
        if self._content_as_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        given = [key for key in REASONING_KEYS if key in message]
        if given and self._reasoning_key and self._reasoning_key not in message:
            message[self._reasoning_key] = message.pop(given[0])
        if self._calls_as_text and message.get("tool_calls"):  # put together with other text (DeepSeek-V3)
            functions = [
                call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
                for call in message["tool_calls"]
            ]
            calls = zip(message["tool_calls"], functions, strict=True)
            message["tool_calls"] = [{**call, "function": function} for call, function in calls]
        return message


def refusal(error: Exception) -> str:
    """Return what is said of messages that a chat template refuses.

    Args:
        error: What it raised; its words are the template's, which are cut where they are long.
    """
    from jinja2 import TemplateError

    what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    short = what if len(what) <= 300 else f"{what[:300]} […]"
    return f"is refused by the chat template ({' '.join(short.split())}); see which roles and turns it wants"


def describe_template(template: Template) -> list[str]:
    """Return what a chat template does around an answer, measured on one probe.

    Returns:
        What is worth telling: the generation prompt that rendered answers do not have, and text of the template that is
        scored as part of the answers. Empty for an ordinary template.
    """
    prompt: Turns = ({"role": "user", "content": "Hello"},)
    try:
        opened = template.render(prompt, opens=True)
        answered = template.render((*prompt, {"role": "assistant", "content": PROBES[0]}))
    except RowError:
        return []  # the template wants other turns; the rows will show
    head = answered[: max(answered.find(PROBES[0]), 0)]
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


_SET_HERE = ("add_generation_prompt", "continue_final_message", "messages", "conversation", "tools", "tokenize",
             "chat_template", "return_dict", "return_tensors", "return_assistant_tokens_mask", "strftime_now")  # fmt: skip


def unknown_arguments(tokenizer: Any, args: Mapping[str, Any]) -> str:
    """Return what is wrong with arguments for a chat template, such as that it never reads one; empty for nothing."""
    for name, value in args.items():
        if name in _SET_HERE:
            return f"{name} is set by the program; leave it out"
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            return f"{name} is the text {value!r}, which a template takes for true; write {value.strip().lower()}"
    words = set(re.findall(r"[A-Za-z_]\w*", str(tokenizer.chat_template)))
    for name in args:
        if name not in words:
            close = difflib.get_close_matches(name, words, n=1)
            return f"the chat template never reads {name}; " + (f"did you mean {close[0]}?" if close else "leave it out")
    return ""


def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Return what finds the tokenizer's control tokens in a text; None when it has none.

    They are the special ones, and those that the chat template writes between bars (DeepSeek's `<｜User｜>` is not special).
    """
    own, bars = str(tokenizer.chat_template or ""), re.compile(r"<[|｜].*[|｜]>")
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    between = {text for text in added if bars.fullmatch(text) and text in own}
    tokens = {*tokenizer.all_special_tokens, *(text for text, special in added.items() if special), *between} - {""}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


_FOREIGN = {
    "Llama 2's [INST]": re.compile(r"\[INST\]|<<SYS>>"),
    "ChatML's <|im_start|>": re.compile(r"<\|im_start\|>"),
    "Llama 3's <|start_header_id|>": re.compile(r"<\|start_header_id\|>"),
    "Gemma's <start_of_turn>": re.compile(r"<start_of_turn>"),
    "Zephyr's <|user|>": re.compile(r"<\|(?:user|assistant)\|>"),
    "DeepSeek's <｜User｜>": re.compile(r"<｜User｜>"),
    "Alpaca's ### Response:": re.compile(r"^### ?(?:Response|Instruction|Input):", re.MULTILINE),
    # The first USER: alone is tried (?>), since time would grow with the square of a text of many.
    "Vicuna's USER: … ASSISTANT:": re.compile(r"\A(?>.*?(?:\A|\s)USER: ).*\sASSISTANT:", re.DOTALL),
}
_ASSISTANT = r"^(?:#+ ?)?(?:Assistant|ASSISTANT|AI|Bot):"
_TAGS = re.compile(rf"\A\s*(?:#+ ?)?(?:Human|User|USER): .*{_ASSISTANT}|{_ASSISTANT}\s*\Z", re.MULTILINE | re.DOTALL)
_ANSWER_TAG = re.compile(r"\A\s*(?:#+ ?)?(?:Assistant|ASSISTANT|AI|Bot): ")
_FOREIGN_END = re.compile(
    r"(?:</s>|<eos>|<end_of_turn>|<\|(?:eot_id|im_end|endoftext|end|end_of_text|eot)\|>|<｜end▁of▁sentence｜>)\s*\Z"
)


def foreign_template(asked: Sequence[str], said: Sequence[str], own: str, *, is_chat: bool = True) -> str | None:
    """Return what shows that texts are already written with a chat template, None for nothing.

    Args:
        asked: Texts of the prompt, as the row has them.
        said: Texts of the answers.
        own: The source of the tokenizer's chat template.
        is_chat: Whether that template will write them: then its own tags, too, would be there twice. Plain text may have them,
            end as they do, and have the tags of a dialogue.
    """
    for name, mark in _FOREIGN.items():
        if any(mark.search(text) for text in (*asked, *said)) and (is_chat or not mark.search(own)):
            return name
    if not is_chat:
        return None
    ends = (found[0].strip() for text in said if (found := _FOREIGN_END.search(text)) and "<s>" not in text)
    end = next((end for end in ends if end not in own), None)
    has_tags = any(map(_TAGS.search, asked)) or any(map(_ANSWER_TAG.search, said))
    return end or ("tags such as Human: and Assistant:" if has_tags else None)

"""An Ollama Modelfile that renders chats as the model's own chat template does.

The Jinja template is rendered on probe conversations whose contents are recognisable; the text between them is all there is to
know of a template of the form prefix + content + suffix:

    first "U" opening                    SYSTEM before_system "S" after_system "U" opening
    first "U" answer "A" next "U" opening

From these a Go template is written, and then run on further conversations, by a small interpreter here, and compared with the
chat template. A template that does more (dates, tools, trimmed thoughts) gives another text and is refused.

Source: https://github.com/ollama/ollama, docs/modelfile.md and docs/template.md; Ollama joins neighbours of one role.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pe_dpo.errors import UsageError
from pe_dpo.export.gguf_tokenizer import Vocabulary
from pe_dpo.model.base import answer_end_tokens, load_tokenizer

Messages = Sequence[dict[str, str]]

_SYSTEM, _USER, _ANSWER = "zqSYSTEMzq", "zqUSERzq", "zqANSWERzq"
_MARKS = ("{{", '"""')
"""What the text of a Modelfile's template cannot hold."""


class ChatForm:
    """The texts around the contents of a chat, checked on conversations of several turns.

    Args:
        tokenizer: with a chat template.
        strips_bos: the file says that BOS is added to every text, so the template must not write it again.

    Raises:
        UsageError: the template does not have this form.
    """

    def __init__(self, tokenizer: Any, *, strips_bos: bool) -> None:
        from jinja2 import TemplateError

        self._tokenizer, self._bos = tokenizer, (tokenizer.bos_token or "") if strips_bos else ""
        user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
        self.first, self.opening = _between(self._chat([user]), _USER)
        """Before the first user message when there is no system message, with the template's own system prompt, if any; and
        after the last user message, where the answer follows."""
        _, self.answer, self.next, _ = _between(self._chat([user, answer, user]), _USER, _ANSWER, _USER)
        """Between a user message and its answer, and between an answer and the next user message."""
        self.before_system: str | None = None
        """None when the template takes no system message: it refuses one, or leaves it out."""
        self.after_system = ""
        self.default_system: str | None = None
        """The system prompt that the template writes when none is given."""
        try:
            chat = self._render([{"role": "system", "content": _SYSTEM}, user])
        except TemplateError:
            chat = ""
        if _SYSTEM in chat:
            before, after, _ = _between(chat, _SYSTEM, _USER)
            self.before_system, self.after_system = before, after
            inside = self.first.removeprefix(before).removesuffix(after)
            if before and inside and before + inside + after == self.first:
                self.default_system = inside
        # And now conversations of which the form was not derived.
        texts = ["What is a tide?", "The sea's rise and fall.\n\nTwice a day.", "Why?", "The moon pulls: 1 + 1.", "Thanks!"]
        turns = [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(texts)]
        chats = [turns[:1], turns[:3], turns]
        if self.before_system is not None:
            chats += [[{"role": "system", "content": "Answer briefly.\nBe kind."}, *messages] for messages in chats]
        template = self.go_template()
        for messages in chats:
            expected, written = self._chat(messages), run_go_template(template, messages)
            if expected != written:
                raise _other_form(f"a chat of {len(messages)} messages would be {written!r}, not {expected!r}")

    def go_template(self) -> str:
        """Return the Go template of this form."""
        before, after = self.before_system, self.after_system
        if any(
            mark in text for text in (self.first, before or "", after, self.answer, self.next, self.opening) for mark in _MARKS
        ):
            raise _other_form('it writes {{ or """ into the text')
        system, second = "", self.first
        if before is not None:
            system, second = '{{ if eq .Role "system" }}' + before + "{{ .Content }}" + after + "{{ end }}", ""
        user = '{{ if eq .Role "user" }}{{ if eq $i 0 }}' + self.first + "{{ else if and (eq $i 1) $.System }}" + second
        user += "{{ else }}" + self.next + "{{ end }}{{ .Content }}{{ end }}"
        answer = '{{ if eq .Role "assistant" }}' + self.answer + "{{ .Content }}{{ end }}"
        return "{{ range $i, $m := .Messages }}" + system + user + answer + "{{ end }}" + self.opening

    def _chat(self, messages: Messages) -> str:
        from jinja2 import TemplateError

        try:
            return self._render(messages)
        except TemplateError as error:
            raise _other_form(f"it refuses a chat of {len(messages)} messages: {error}") from error

    def _render(self, messages: Messages) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(self._bos)


def modelfile(model: Path, gguf_name: str) -> str:
    """Return the Modelfile of a model.

    Args:
        model: folder of the model with its tokenizer and chat template.
        gguf_name: name of the GGUF file, which lies beside the Modelfile.

    Raises:
        UsageError: the chat template is not of the form that a Go template can follow, or llama.cpp has no such tokenizer.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(str(model))
    ids = answer_end_tokens(tokenizer, str(model))
    stops = [tokenizer.convert_ids_to_tokens(index) for index in sorted(ids)]
    lines = [f"FROM ./{gguf_name}"]
    if tokenizer.chat_template:
        size = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False).vocab_size
        form = ChatForm(tokenizer, strips_bos=Vocabulary(model, size).adds_bos)
        lines.append(f"TEMPLATE {_quoted(form.go_template())}")
        if form.default_system:
            lines.append(f"SYSTEM {_quoted(form.default_system)}")
        if form.before_system is None:
            lines.append("# The chat template takes no system message; one that is given is left out.")
        # What ends an answer: the special token behind it, or else the text that begins the next turn.
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()} - {tokenizer.bos_token}
        by_length = sorted(special, key=len, reverse=True)
        stops.append(next((token for token in by_length if form.next.lstrip().startswith(token)), form.next.rstrip()))
    else:
        lines.append("TEMPLATE {{ .Prompt }}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(stops) if stop]
    return "\n".join(lines) + "\n"


def run_go_template(template: str, messages: Messages) -> str:
    """Return what Ollama makes of messages with a template of `go_template`; knows the actions that occur there only.

    Args:
        template: literal text and actions: range, if, else if, else, end, .Content.
        messages: with role and content.
    """
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    # Text before the loop, the pieces inside it (texts at even places, actions at odd), text behind it.
    assert pieces[1].startswith("range ") and pieces[-2] == "end", "a template is one loop"
    head, body, tail = pieces[0], pieces[2:-2], pieces[-1]
    has_system = any(message["role"] == "system" for message in messages)
    text = head
    for index, message in enumerate(messages):
        stack: list[tuple[bool, bool]] = []  # for each open if, whether its branch runs and whether one has run
        for place, piece in enumerate(body):
            runs = all(branch for branch, _ in stack)
            if place % 2 == 0:
                text += piece if runs else ""
            elif piece == ".Content":
                text += message["content"] if runs else ""
            elif piece == "end":
                stack.pop()
            elif piece.startswith("if "):
                holds = _holds(piece.removeprefix("if "), index, message, has_system)
                stack.append((holds, holds))
            else:
                _, had = stack.pop()
                holds = not had and (piece == "else" or _holds(piece.removeprefix("else if "), index, message, has_system))
                stack.append((holds, had or holds))
    return text + tail


def _holds(condition: str, index: int, message: dict[str, str], has_system: bool) -> bool:
    """Whether `eq .Role "…"`, `eq $i N` or `and (eq $i N) $.System` holds."""
    number = re.fullmatch(r"eq \$i (\d)|and \(eq \$i (\d)\) \$\.System", condition)
    if number:
        return index == int(number[1] or number[2]) and (number[1] is not None or has_system)
    role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    assert role, f"the condition {condition} is written here"
    return message["role"] == role[1]


def _between(text: str, *contents: str) -> list[str]:
    """The texts before, between and after contents that occur once each, in this order."""
    found = re.fullmatch("(.*)" + "(.*)".join(map(re.escape, contents)) + "(.*)", text, re.DOTALL)
    if found is None or sum(text.count(content) for content in set(contents)) != len(contents):
        raise _other_form(f"the contents are not found once each, in order, in {text!r}")
    return list(found.groups())


def _quoted(text: str) -> str:
    if '"""' in text:
        raise _other_form('it writes """ into the text')
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def _other_form(why: str) -> UsageError:
    return UsageError(
        f"the chat template cannot be written as an Ollama template: {why}; serve the GGUF file with llama-server, "
        "which runs the chat template itself, or write the TEMPLATE of a Modelfile by hand"
    )

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
from typing import Any, NamedTuple

from pe_dpo.errors import UsageError
from pe_dpo.export.gguf_tokenizer import read_vocabulary
from pe_dpo.model.base import end_token_ids, load_tokenizer

Messages = Sequence[dict[str, str]]

_SYSTEM, _USER, _ANSWER = "zqSYSTEMzq", "zqUSERzq", "zqANSWERzq"


class ChatForm(NamedTuple):
    """The texts around the contents of a chat."""

    first: str
    """Before the first user message when there is no system message; holds the template's own system prompt, if any."""
    before_system: str | None
    """None when the template takes no system message."""
    after_system: str
    answer: str
    """Between a user message and its answer."""
    next: str
    """Between an answer and the next user message."""
    opening: str
    """After the last user message; the answer follows."""
    default_system: str | None


def modelfile(model: Path, gguf_name: str) -> str:
    """Return the Modelfile of a model.

    Args:
        model: folder of the model with its tokenizer and chat template.
        gguf_name: name of the GGUF file, which lies beside the Modelfile.

    Raises:
        UsageError: the chat template is not of the form that a Go template can follow, or llama.cpp has no such tokenizer.
    """
    tokenizer = load_tokenizer(str(model))
    lines = [f"FROM ./{gguf_name}"]
    if not tokenizer.chat_template:
        return "\n".join([*lines, "TEMPLATE {{ .Prompt }}", *_stops(model, tokenizer, None)]) + "\n"
    form = chat_form(tokenizer, strips_bos=_adds_bos(model))
    lines.append(f"TEMPLATE {_quoted(go_template(form))}")
    if form.default_system:
        lines.append(f"SYSTEM {_quoted(form.default_system)}")
    if form.before_system is None:
        lines.append("# The chat template takes no system message; one that is given is left out.")
    return "\n".join([*lines, *_stops(model, tokenizer, form)]) + "\n"


def chat_form(tokenizer: Any, *, strips_bos: bool) -> ChatForm:
    """Return the texts around the contents, checked on conversations of several turns.

    Args:
        tokenizer: with a chat template.
        strips_bos: the file says that BOS is added to every text, so the template must not write it again.

    Raises:
        UsageError: the template does not have this form.
    """
    form = _derive(tokenizer, strips_bos=strips_bos)
    written = go_template(form)
    for messages in _conversations(has_system=form.before_system is not None):
        wanted = _chat(tokenizer, messages, strips_bos=strips_bos)
        found = run_go_template(written, messages)
        if wanted != found:
            raise _other_form(f"a chat of {len(messages)} messages would be {found!r}, not {wanted!r}")
    return form


def go_template(form: ChatForm) -> str:
    """Return the Go template of a form."""
    texts = [text for text in form if text is not None]
    if any("{{" in text or '"""' in text for text in texts):
        raise _other_form('it writes {{ or """ into the text')
    system, second = "", form.first
    if form.before_system is not None:
        system = '{{ if eq .Role "system" }}' + form.before_system + "{{ .Content }}" + form.after_system + "{{ end }}"
        second = ""
    user = '{{ if eq .Role "user" }}{{ if eq $i 0 }}' + form.first + "{{ else if and (eq $i 1) $.System }}" + second
    user += "{{ else }}" + form.next + "{{ end }}{{ .Content }}{{ end }}"
    answer = '{{ if eq .Role "assistant" }}' + form.answer + "{{ .Content }}{{ end }}"
    return "{{ range $i, $m := .Messages }}" + system + user + answer + "{{ end }}" + form.opening


def run_go_template(template: str, messages: Messages) -> str:
    """Return what Ollama makes of messages with a template of `go_template`; knows the actions that occur there only.

    Args:
        template: literal text and actions: range, if, else if, else, end, .Content.
        messages: with role and content.
    """
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    head, body, tail = _range_parts(pieces)
    has_system = any(message["role"] == "system" for message in messages)
    texts = [_run(body, index, message, has_system) for index, message in enumerate(messages)]
    return head + "".join(texts) + tail


def _range_parts(pieces: Sequence[str]) -> tuple[str, list[str], str]:
    """Text before the loop, the pieces inside it (texts at even places, actions at odd), text behind it."""
    assert pieces[1].startswith("range ") and pieces[-2] == "end", "a template is one loop"
    return pieces[0], list(pieces[2:-2]), pieces[-1]


def _run(pieces: Sequence[str], index: int, message: dict[str, str], has_system: bool) -> str:
    """One pass of the loop; the stack holds, for each open if, whether its branch runs and whether one has run."""
    text = ""
    stack: list[tuple[bool, bool]] = []
    for place, piece in enumerate(pieces):
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
    return text


def _holds(condition: str, index: int, message: dict[str, str], has_system: bool) -> bool:
    """Whether `eq .Role "…"`, `eq $i N` or `and (eq $i N) $.System` holds."""
    number = re.fullmatch(r"eq \$i (\d)|and \(eq \$i (\d)\) \$\.System", condition)
    if number:
        return index == int(number[1] or number[2]) and (number[1] is not None or has_system)
    role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    assert role, f"the condition {condition} is written here"
    return message["role"] == role[1]


def _derive(tokenizer: Any, *, strips_bos: bool) -> ChatForm:
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    alone = _between(_chat(tokenizer, [user], strips_bos=strips_bos), _USER)
    turns = _between(_chat(tokenizer, [user, answer, user], strips_bos=strips_bos), _USER, _ANSWER, _USER)
    system = _system_parts(tokenizer, user, strips_bos=strips_bos)
    before, after = system or (None, "")
    return ChatForm(
        first=alone[0],
        before_system=before,
        after_system=after,
        answer=turns[1],
        next=turns[2],
        opening=alone[1],
        default_system=_inside(alone[0], before, after) if before is not None else None,
    )


def _system_parts(tokenizer: Any, user: dict[str, str], *, strips_bos: bool) -> tuple[str, str] | None:
    """Text before and after a system message; None when the template refuses or leaves it out."""
    from jinja2 import TemplateError

    try:
        chat = _render(tokenizer, [{"role": "system", "content": _SYSTEM}, user], strips_bos=strips_bos)
    except TemplateError:
        return None
    if _SYSTEM not in chat:
        return None
    before, after, _ = _between(chat, _SYSTEM, _USER)
    return before, after


def _inside(first: str, before: str, after: str) -> str | None:
    """The system prompt that the template writes when none is given."""
    is_written = first.startswith(before) and first.endswith(after) and len(first) > len(before) + len(after)
    return first[len(before) : len(first) - len(after)] if is_written and before else None


def _conversations(*, has_system: bool) -> list[Messages]:
    """Conversations of which the form was not derived, besides the shortest."""
    texts = ["What is a tide?", "The sea's rise and fall.\n\nTwice a day.", "Why?", "The moon pulls: 1 + 1.", "Thanks!"]
    roles = ["user", "assistant"] * 3
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    system = {"role": "system", "content": "Answer briefly.\nBe kind."}
    plain: list[Messages] = [turns[:1], turns[:3], turns]
    return plain + ([[system, *turns[:1]], [system, *turns[:3]], [system, *turns]] if has_system else [])


def _chat(tokenizer: Any, messages: Messages, *, strips_bos: bool) -> str:
    from jinja2 import TemplateError

    try:
        return _render(tokenizer, messages, strips_bos=strips_bos)
    except TemplateError as error:
        raise _other_form(f"it refuses a chat of {len(messages)} messages: {error}") from error


def _render(tokenizer: Any, messages: Messages, *, strips_bos: bool) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if strips_bos and tokenizer.bos_token else text


def _between(text: str, *contents: str) -> list[str]:
    """The texts before, between and after contents that occur once each, in this order."""
    found = re.fullmatch("(.*)" + "(.*)".join(map(re.escape, contents)) + "(.*)", text, re.DOTALL)
    if found is None or sum(text.count(content) for content in set(contents)) != len(contents):
        raise _other_form(f"the contents are not found once each, in order, in {text!r}")
    return list(found.groups())


def _adds_bos(model: Path) -> bool:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return read_vocabulary(model, config.vocab_size).adds_bos


def _stops(model: Path, tokenizer: Any, form: ChatForm | None) -> list[str]:
    """PARAMETER lines: the ends that the generation config names, EOS, and what follows an answer in a chat."""
    ids = {*end_token_ids(str(model)), tokenizer.eos_token_id} - {None}
    stops = [tokenizer.convert_ids_to_tokens(index) for index in sorted(ids)]
    if form is not None:
        stops.append(_turn_end(tokenizer, form))
    return [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(stops) if stop]


def _turn_end(tokenizer: Any, form: ChatForm) -> str:
    """What ends an answer: the special token behind it, or else the text that begins the next turn."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} - {tokenizer.bos_token}
    after = form.next.lstrip()
    token = next((token for token in sorted(special, key=len, reverse=True) if after.startswith(token)), None)
    return token or form.next.rstrip()


def _quoted(text: str) -> str:
    if '"""' in text:
        raise _other_form('it writes """ into the text')
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def _other_form(why: str) -> UsageError:
    return UsageError(
        f"the chat template cannot be written as an Ollama template: {why}; serve the GGUF file with llama-server, "
        "which runs the chat template itself, or write the TEMPLATE of a Modelfile by hand"
    )

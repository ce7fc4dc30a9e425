"""A chat template as blocks of text around its messages, which Ollama's kind of template can write.

    start block        block      block       opening
    <s>[user "U" end]  [ "A" end]  [user "U" end]  [answer…

Each message has a text before it, another one where it is the first of the chat (BOS and a default system prompt stand there
only), and a text behind it that closes its block, whatever comes next. A system message is a block of its own, or stands inside
the first or the last user message (Llama 2, Gemma 3; Mistral). The texts are found by rendering chats whose contents can be
recognised. From the same blocks come the Go template and what it renders to; tests hold the one against the other with Go.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pe_dpo.data.dialogues import shared_length
from pe_dpo.data.pairs import RowError

Messages = Sequence[dict[str, str]]
Render = Callable[[Messages, bool], str]
"""From messages, and whether an answer is opened behind them, to their text; raises RowError where they are refused."""

_SYSTEM, _USER, _ANSWER, _NEXT = ({"role": role, "content": f"zq{name}zq"} for role, name in (
    ("system", "SYSTEM"), ("user", "USER"), ("assistant", "ANSWER"), ("user", "NEXT")
))  # fmt: skip


class Block(NamedTuple):
    """The texts around one message."""

    first: str
    """Before the first message of a chat."""
    later: str | None
    """Before any other; None where it is left out."""
    end: str


@dataclass(frozen=True)
class ChatBlocks:
    """The texts around the messages of a chat.

    Args:
        user: around a user message.
        assistant: around an answer.
        opening: behind the last message, where the answer follows.
        system: around a system message; None where it has no block of its own.
        place: the user message that holds the system message, if one does.
        inside: the texts before and after the system message there, behind the user block's own first text.
        skips_empty_system: whether an empty system message counts as none.
    """

    user: Block
    assistant: Block
    opening: str
    system: Block | None = None
    place: Literal["first", "last"] | None = None
    inside: tuple[str, str] = ("", "")
    skips_empty_system: bool = False

    def render(self, messages: Messages) -> str:
        """Return what Ollama makes of messages with `go_template`, neighbours of one role joined as it joins them."""
        turns: list[dict[str, str]] = []
        for message in messages:
            if turns and turns[-1]["role"] == message["role"]:
                turns[-1] = message | {"content": turns[-1]["content"] + "\n\n" + message["content"]}
            else:
                turns.append(message)
        told = [message["content"] for message in messages if message["role"] == "system"]
        system = "\n\n".join(told)
        users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
        holder = users[0 if self.place == "first" else -1] if self.place and users else None
        has_system = bool(system) if self.skips_empty_system else bool(told)
        blocks = {"system": self.system, "user": self.user, "assistant": self.assistant}
        text, is_first = "", True
        for index, turn in enumerate(turns):
            block, content = blocks.get(turn["role"]), turn["content"]
            before = block and (block.first if is_first else block.later)
            if block is None or before is None or (turn["role"] == "system" and self.skips_empty_system and not content):
                continue
            if index == holder and has_system:
                before += self.inside[0] + system + self.inside[1]
            text, is_first = text + before + content + block.end, False
        return text + self.opening

    def go_template(self) -> str:
        """Return the Go template that writes these blocks."""
        blocks = {"system": self.system, "user": self.user, "assistant": self.assistant}
        has_first = any(block and block.first != block.later for block in blocks.values())
        branches = []
        for role, block in blocks.items():
            if block is None:
                continue
            before, later = _literal(block.first), _literal(block.later or "")
            if later and block.first.endswith(block.later or ""):
                start = _literal(block.first.removesuffix(block.later or ""))
                before = ("{{ if $first }}" + start + "{{ end }}" if start else "") + later
            elif block.first != block.later:
                before = "{{ if $first }}" + before + ("{{ else }}" + later if later else "") + "{{ end }}"
            if role == "user" and self.place:
                condition = f"and {'$.System' if self.skips_empty_system else '$told'} (eq $i $at)"
                inside = f"{_literal(self.inside[0])}{{{{ $.System }}}}{_literal(self.inside[1])}"
                before += f"{{{{ if {condition} }}}}{inside}{{{{ end }}}}"
            text = f"{before}{{{{ .Content }}}}{_literal(block.end)}" + ("{{ $first = false }}" if has_first else "")
            if block.later is None:
                text = "{{ if $first }}" + text + "{{ end }}"
            if role == "system" and self.skips_empty_system:
                text = "{{ if .Content }}" + text + "{{ end }}"
            branches.append(f'if eq .Role "{role}" }}}}{text}')
        variables = "{{ $first := true }}" if has_first else ""
        if self.place:
            at = "{{ $at = $i }}" if self.place == "last" else "{{ if lt $at 0 }}{{ $at = $i }}{{ end }}"
            variables += "{{ $at := -1 }}{{ $told := false }}{{ range $i, $m := .Messages }}"
            variables += f'{{{{ if eq .Role "user" }}}}{at}{{{{ else if eq .Role "system" }}}}{{{{ $told = true }}}}'
            variables += "{{ end }}{{ end }}"
        loop = "{{ range $i, $m := .Messages }}" if self.place else "{{ range .Messages }}"
        return variables + loop + "{{ " + "{{ else ".join(branches) + "{{ end }}{{ end }}" + _literal(self.opening)


def find_blocks(render: Render, bos: str) -> ChatBlocks:
    """Return the blocks of a chat template, found on the simplest chats; whether they hold on others is to be compared.

    Args:
        render: by the chat template.
        bos: the text of the BOS token, or nothing.

    Raises:
        RowError: a simple chat is refused, or its contents are not found once each, in order.
    """
    first, closing = _between(render([_USER], True), _USER)
    _, middle, between, _ = _between(render([_USER, _ANSWER, _NEXT], True), _USER, _ANSWER, _NEXT)
    end = _between(render([_USER], False), _USER)[1]
    end = end[: min(shared_length(end, closing), shared_length(end, middle))]
    try:
        answer_end = between[: shared_length(between, _between(render([_USER, _ANSWER], False), _USER, _ANSWER)[2])]
    except RowError:
        answer_end = between
    user = Block(first, between[len(answer_end) :], end)
    start = first.removesuffix(user.later or "")
    try:
        answer_first = _between(render([_ANSWER, _NEXT], True), _ANSWER, _NEXT)[0]
    except RowError:
        answer_first = start + middle[len(end) :]
    blocks = ChatBlocks(user, Block(answer_first, middle[len(end) :], answer_end), closing[len(end) :])
    try:
        before, after, _ = _between(render([_SYSTEM, _USER], True), _SYSTEM, _USER)
    except RowError:
        return blocks  # the template takes no system message: it refuses one, or leaves it out
    if after.endswith(user.later or ""):
        system_end = after.removesuffix(user.later or "")
        blocks = replace(blocks, system=Block(before, _later_system(render, blocks, before.removeprefix(bos)), system_end))
    elif before.startswith(first):
        text = render([_SYSTEM, _USER, _ANSWER, _NEXT], True)
        is_first = text.find(_SYSTEM["content"]) < text.find(_USER["content"])
        inside = before.removeprefix(first), after
        blocks = replace(blocks, place="first" if is_first else "last", inside=inside)
    else:
        raise RowError("a system message changes the texts around the first user message")
    empty = [{"role": "system", "content": ""}, _USER]
    try:
        is_written = render(empty, True) == blocks.render(empty)
    except RowError:
        return blocks
    return blocks if is_written else replace(blocks, skips_empty_system=True)


def _later_system(render: Render, blocks: ChatBlocks, refused: str) -> str | None:
    """The text before a system message that is not the first; None where that is left out, `refused` where it is refused."""
    try:
        text = render([_USER, _ANSWER, _SYSTEM, _NEXT], True)
        between = _between(text, _USER, _ANSWER, _SYSTEM, _NEXT)[2] if _SYSTEM["content"] in text else None
    except RowError:
        return refused
    return between and between.removeprefix(blocks.assistant.end)


def _between(text: str, *messages: dict[str, str]) -> list[str]:
    """The texts before, between and after contents that occur once each, in this order."""
    contents = [message["content"] for message in messages]
    found = re.fullmatch("(.*)" + "(.*)".join(map(re.escape, contents)) + "(.*)", text, re.DOTALL)
    if found is None or any(text.count(content) != 1 for content in contents):
        raise RowError(f"the contents are not found once each, in order, in {text!r}")
    return list(found.groups())


def _literal(text: str) -> str:
    """The text in a Go template in a Modelfile; what would end it there, or does not print, becomes a string in an action."""

    def quoted(found: re.Match[str]) -> str:
        part = found[0]
        if not found["mark"] and (part.isprintable() or part in "\n\r\t"):
            return part
        inner = "".join(f"\\U{ord(one):08x}" if not one.isprintable() else "\\" + one if one == '"' else one for one in part)
        return f'{{{{ "{inner}" }}}}'

    return re.sub(r'(?P<mark>\{\{+|\{\Z|"""+)|.', quoted, text, flags=re.DOTALL)

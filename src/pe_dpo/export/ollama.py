"""An Ollama Modelfile whose template renders chats as the model's own chat template does, and in which chats it does not.

The template is made of the blocks that `chat_blocks` finds, and what it renders is compared with the chat template: on ordinary
chats, where they must be equal, and on such as a server meets too, where a difference is told. Ollama's templates have no
functions on texts, so that they cannot trim; and Ollama itself changes chats before it renders them.

Source: https://github.com/ollama/ollama of August 2026: docs/modelfile.mdx; template/template.go (neighbours of one role are
joined by an empty line); server/prompt.go (the oldest messages but system messages are dropped until a chat fits the context);
server/routes.go (`filterThinkTags`; from 0.30 on a model without TEMPLATE is asked through the chat template in its GGUF file).
"""

import re
from pathlib import Path

from pe_dpo.data.pairs import RowError
from pe_dpo.data.template import Template
from pe_dpo.export.chat_blocks import ChatBlocks, Messages, find_blocks
from pe_dpo.export.gguf_tokenizer import Vocabulary
from pe_dpo.model.base import answer_end_tokens, load_tokenizer
from pe_dpo.recipe.data_section import DataSection

NATIVE = "0.30"
"""The first version of Ollama that runs the chat template of a GGUF file itself (May 2026)."""

_ASK, _SAY, _ON = (
    {"role": role, "content": text}
    for role, text in (
        ("user", "What is a tide?"),
        ("assistant", "The sea's rise.\n\nTwice a day."),
        ("user", "Why? 1 + 1 = {2}"),
    )
)
_TELL = {"role": "system", "content": "Answer briefly.\nBe kind."}
ORDINARY: tuple[Messages, ...] = ([_ASK], [_ASK, _SAY, _ON], [_ASK, _SAY, _ON, _SAY, _ASK])
OTHERS: dict[str, tuple[str, tuple[Messages, ...]]] = {
    "an empty system message": ("", ([_TELL | {"content": ""}, _ASK],)),
    "a system message in the middle": ("", ([_ASK, _SAY, _TELL, _ON], [_TELL, _ASK, _SAY, _TELL, _ON])),
    "an answer first": ("Ollama drops the oldest turns of a long chat", ([_SAY, _ON], [_TELL, _SAY, _ON])),
    "an answer last": ("", ([_ASK, _SAY],)),
    "spaces or line breaks around a message": (
        "Ollama cannot trim them", ([_ASK | {"content": " a \n"}], [_ASK, _SAY | {"content": "\n b "}, _ON])
    ),
    "messages of one role in a row": ("Ollama joins them by an empty line", ([_ASK, _ON], [_ASK, _SAY, _SAY, _ON])),
    "thoughts in an earlier answer": (
        "Ollama cannot cut them out", ([_ASK, _SAY | {"content": "<think>\nHm.\n</think>\n\nTwice a day."}, _ON],)
    ),
}  # fmt: skip
"""What a server meets besides ordinary chats, why that may be rendered otherwise, and examples."""

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)


def modelfile(model: Path, gguf_name: str) -> tuple[str, list[str]]:
    """Return the Modelfile of a model, and what its user has to know of it.

    A chat template that cannot be written as Ollama's is left to Ollama, which then has to run the one in the GGUF file.

    Args:
        model: folder of the model with its tokenizer and chat template.
        gguf_name: name of the GGUF file, which lies beside the Modelfile.

    Raises:
        UsageError: llama.cpp has no such tokenizer.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(str(model))
    stops = [tokenizer.convert_ids_to_tokens(index) for index in sorted(answer_end_tokens(tokenizer, str(model)))]
    lines, remarks = [f"FROM ./{gguf_name}"], []
    if tokenizer.chat_template:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        adds_bos = Vocabulary(model, config.vocab_size).adds_bos
        template = Template(tokenizer, DataSection(train="-", template="chat"))
        try:
            blocks = checked_blocks(template, tokenizer.bos_token or "", adds_bos=adds_bos)
        except RowError as error:
            remarks.append(
                f"no TEMPLATE in the Modelfile: the chat template cannot be written as one of Ollama ({error}); take Ollama "
                f"{NATIVE} or newer, which runs the chat template of the GGUF file, or llama-server"
            )
            lines += [
                f"# Needs Ollama {NATIVE}, which runs the chat template of the GGUF file; older ones send bare prompts.",
                '# Where `ollama create` says "autodetected template", start the server with OLLAMA_GO_TEMPLATE=0.',
                f"REQUIRES {NATIVE}.0",
            ]
        else:
            cuts = config.model_type == "qwen3"
            told = differences(blocks, template, tokenizer.bos_token if adds_bos else "", cuts_thoughts=cuts)
            if told:
                remarks.append(
                    f"{'; '.join(told)}; without TEMPLATE in the Modelfile Ollama {NATIVE} runs the chat template itself"
                )
            lines += [f"# {line}" for line in told]
            lines.append(f'TEMPLATE """{blocks.go_template()}"""')
            # What ends an answer: the special token behind it, or else the text that begins the next turn.
            following = blocks.assistant.end + (blocks.user.later or "")
            special = {str(token) for token in tokenizer.added_tokens_decoder.values()} - {tokenizer.bos_token}
            by_length = sorted(special, key=len, reverse=True)
            begins = (token for token in by_length if following.lstrip().startswith(token))
            stops.append(next(begins, following.rstrip()))
    else:
        lines.append("TEMPLATE {{ .Prompt }}")
    quotes = {stop: '"""' if "\n" in stop or '"' in stop else '"' for stop in stops}
    lines += [f"PARAMETER stop {quote}{stop}{quote}" for stop, quote in quotes.items() if stop and '"""' not in stop]
    return "\n".join(lines) + "\n", remarks


def checked_blocks(template: Template, bos: str, *, adds_bos: bool) -> ChatBlocks:
    """Return the blocks of a chat template that render ordinary chats as it does.

    Args:
        template: of a tokenizer.
        bos: the text of its BOS token, or nothing.
        adds_bos: the GGUF file says that BOS is put before every text, so the blocks must not write it.

    Raises:
        RowError: it has no such blocks.
    """
    added = bos if adds_bos else ""
    blocks = find_blocks(lambda messages, opens: template.render(tuple(messages), opens=opens).removeprefix(added), bos)
    chats = list(ORDINARY)
    if blocks.system or blocks.place:
        chats += [[_TELL, *messages] for messages in ORDINARY]
    for messages in chats:
        expected, written = template.render(tuple(messages), opens=True), added + blocks.render(messages)
        if expected != written:
            raise RowError(f"a chat of {len(messages)} messages would be {written!r}, not {expected!r}")
    return blocks


def differences(blocks: ChatBlocks, template: Template, added: str, *, cuts_thoughts: bool) -> list[str]:
    """Return in which chats Ollama sends another prompt than the chat template writes, and which only Ollama takes.

    Args:
        blocks: of the template that Ollama renders.
        template: of the tokenizer.
        added: the text of the BOS token where llama.cpp puts it before every text, or nothing.
        cuts_thoughts: Ollama cuts thoughts out of earlier answers, which it does for the architecture qwen3.
    """
    others = dict(OTHERS)
    if not (blocks.system or blocks.place):
        others["a system message"] = ("Ollama leaves it out", ([_TELL, _ASK],))
    other_prompt: list[str] = ["another day (TEMPLATE has the date of the export)"] if template.has_clock else []
    refused: list[str] = []
    for name, (why, chats) in others.items():
        for messages in chats:
            sent = [message | {"content": _THOUGHTS.sub("", message["content"])}
                    if cuts_thoughts and message["role"] == "assistant" else message for message in messages]  # fmt: skip
            try:
                is_equal = template.render(tuple(messages), opens=True) == added + blocks.render(sent)
                kind = None if is_equal else other_prompt
            except RowError:
                kind = refused
            if kind is not None:
                kind.append(f"{name} ({why})" if why else name)
                break
    lines = []
    if other_prompt:
        lines.append(f"Ollama's prompt is not the chat template's for: {', '.join(other_prompt)}")
    if refused:
        lines.append(f"refused by the chat template and answered by Ollama: {', '.join(refused)}")
    return lines

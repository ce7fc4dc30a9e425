"""Modelfiles: what Ollama would send must be what the chat template says, or the difference is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_templates import STYLES, styled

import pe_dpo
from pe_dpo.data.pairs import RowError
from pe_dpo.data.template import Template
from pe_dpo.export.chat_blocks import Block, ChatBlocks
from pe_dpo.export.ollama import checked_blocks, differences, modelfile
from pe_dpo.recipe.data_section import DataSection

BASE = Path(pe_dpo.__file__).parent / "quickstart" / "base"
JOINED = "messages of one role in a row (Ollama joins them by an empty line)"
TRIMMED = "spaces or line breaks around a message (Ollama cannot trim them)"
DROPPED = "an answer first (Ollama drops the oldest turns of a long chat)"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK, SAY, TELL, ON = turn("user", "Hi {there}"), turn("assistant", "Ho!"), turn("system", "Be kind."), turn("user", "So?")


def template_of(style: str) -> Template:
    return Template(styled(style), DataSection(train="-", template="chat"))


def blocks_of(style: str, *, adds_bos: bool = False) -> ChatBlocks:
    return checked_blocks(template_of(style), "<s>", adds_bos=adds_bos)


def told(style: str, *, adds_bos: bool = False, cuts_thoughts: bool = False) -> list[str]:
    added = "<s>" if adds_bos else ""
    return differences(blocks_of(style, adds_bos=adds_bos), template_of(style), added, cuts_thoughts=cuts_thoughts)


def test_chatml_is_closed_message_by_message() -> None:
    """By hand: each message with its own end, and the opening of the answer behind all."""
    assert blocks_of("chatml").go_template() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_bos_is_at_the_very_start_whatever_message_is_first() -> None:
    """The blocks of Llama 3 by hand; the template begins every chat with BOS, and no message in the middle."""
    blocks, head = blocks_of("llama3"), "<|start_header_id|>{}<|end_header_id|>\n\n".format
    for role, block in (("system", blocks.system), ("user", blocks.user), ("assistant", blocks.assistant)):
        assert block == Block("<s>" + head(role), head(role), "<|eot_id|>")
    assert blocks.render([ASK, SAY, TELL, ON]) == (
        f"<s>{head('user')}Hi {{there}}<|eot_id|>{head('assistant')}Ho!<|eot_id|>"
        f"{head('system')}Be kind.<|eot_id|>{head('user')}So?<|eot_id|>{head('assistant')}"
    )
    assert blocks.render([SAY, ON]).startswith(f"<s>{head('assistant')}Ho!<|eot_id|>{head('user')}So?")
    assert "{{ if $first }}<s>{{ end }}<|start_header_id|>assistant" in blocks.go_template()


def test_bos_is_left_to_llama_cpp_where_the_tokenizer_adds_it() -> None:
    assert "<s>" not in blocks_of("llama3", adds_bos=True).go_template()
    # Llama 2 begins each user message with it
    assert blocks_of("llama2", adds_bos=True).user == Block("[INST] ", "<s>[INST] ", " [/INST]")


@pytest.mark.parametrize("style", ["chatml", "qwen", "qwen3", "llama3", "zephyr"])
@pytest.mark.parametrize("chat", [
    [turn("system", ""), ASK], [SAY, ON], [TELL, SAY, ON], [ASK, SAY, TELL, ON], [ASK, SAY],
], ids=["empty system", "answer first", "system, then answer", "system in the middle", "answer last"])  # fmt: skip
def test_chats_as_servers_meet_them_are_rendered_as_by_the_chat_template(style: str, chat: Any) -> None:
    assert blocks_of(style).render(chat) == template_of(style).render(tuple(chat), opens=True)


def test_a_system_message_inside_the_user_message_stays_there_when_the_first_turn_was_dropped() -> None:
    """By hand; the blocks of Llama 2 are closed also where the template itself has no right text."""
    blocks = blocks_of("llama2")
    system = "<<SYS>>\nBe kind.\n<</SYS>>\n\n"
    assert blocks.render([TELL, ASK]) == f"<s>[INST] {system}Hi {{there}} [/INST]"
    assert blocks.render([TELL, SAY, ON]) == f" Ho! </s><s>[INST] {system}So? [/INST]"
    assert blocks.render([turn("system", ""), ASK]) == "<s>[INST] Hi {there} [/INST]"
    assert (
        blocks_of("mistral3").render([TELL, ASK, SAY, ON])
        == "<s>[INST] Hi {there} [/INST]Ho!</s>[INST] Be kind.\n\nSo? [/INST]"
    )


def test_neighbours_of_one_role_are_joined_as_ollama_joins_them() -> None:
    assert blocks_of("dialogue").render([TELL, TELL, ASK, ON]) == (
        "Be kind.\n\nBe kind.\n\nHuman: Hi {there}\n\nSo?\n\nAssistant:"
    )


def test_a_default_system_prompt_begins_chats_without_one() -> None:
    blocks, default = blocks_of("qwen"), "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert blocks.render([SAY, ON]).startswith(default + "<|im_start|>assistant\nHo!")
    assert default not in blocks.render([TELL, SAY, ON])


def test_what_a_go_template_or_a_modelfile_would_read_otherwise_is_written_as_strings() -> None:
    go = blocks_of("hostile").go_template()
    start = go[: go.index("{{ .Content }}")]
    assert start.removeprefix('{{ range .Messages }}{{ if eq .Role "system" }}') == (
        '{{ "{{" }} {{ "\\"\\"\\"" }} }}{{ "\\U00003000" }}\U0001f600 {system{\n- '
    )


@pytest.mark.parametrize(("style", "lines"), [
    ("chatml", [f"Ollama's prompt is not the chat template's for: {JOINED}"]),
    ("llama3", [f"Ollama's prompt is not the chat template's for: {TRIMMED}, {JOINED}"]),
    ("mistral", ["refused by the chat template and answered by Ollama: an empty system message, "
                 f"a system message in the middle, {DROPPED}, {JOINED}, a system message (Ollama leaves it out)"]),
    ("gemma3", [f"Ollama's prompt is not the chat template's for: {TRIMMED}",
                f"refused by the chat template and answered by Ollama: a system message in the middle, {DROPPED}, {JOINED}"]),
    ("dialogue", [f"Ollama's prompt is not the chat template's for: an answer last, {JOINED}"]),
])  # fmt: skip
def test_what_cannot_be_matched_is_told(style: str, lines: list[str]) -> None:
    assert told(style) == lines


def test_thoughts_that_ollama_does_not_cut_are_told() -> None:
    cut = "thoughts in an earlier answer (Ollama cannot cut them out)"
    assert told("qwen3") == [f"Ollama's prompt is not the chat template's for: {JOINED}, {cut}"]
    assert told("qwen3", cuts_thoughts=True) == [f"Ollama's prompt is not the chat template's for: {JOINED}"]
    # and where Ollama cuts what the chat template keeps
    assert cut in told("chatml", cuts_thoughts=True)[0]


def test_the_date_of_the_export_is_told() -> None:
    assert "another day (TEMPLATE has the date of the export)" in told("llama3-dated")[0]


def test_a_bos_that_only_llama_cpp_writes_is_told() -> None:
    """Llama 2 writes BOS before user messages only, so that a chat that begins with an answer has none there."""
    assert DROPPED in told("llama2", adds_bos=True)[0]


@pytest.mark.parametrize("template", [
    STYLES["llama3"].replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }}"),
    "{{ messages[-1]['content'] }}",
])  # fmt: skip
def test_templates_without_blocks_are_refused(template: str) -> None:
    tokenizer = styled("chatml")
    tokenizer.chat_template = template
    with pytest.raises(RowError, match=r"messages would be|are not found once each"):
        checked_blocks(Template(tokenizer, DataSection(train="-", template="chat")), "<s>", adds_bos=False)


def test_the_modelfile_of_the_quickstart_writes_the_bos_that_no_tokenizer_adds() -> None:
    text, told = modelfile(BASE, "x.gguf")
    lines = text.splitlines()
    assert lines[0] == "FROM ./x.gguf"
    assert lines[1] == f"# Ollama's prompt is not the chat template's for: {JOINED}" and lines[1][2:] in told[0]
    assert lines[2].startswith('TEMPLATE """') and "{{ if $first }}<bos>{{ end }}<|user|>{{" in lines[2]
    assert lines[3:] == ['PARAMETER stop "<|end|>"']


@pytest.fixture
def model(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, whose template a test replaces."""
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def test_a_model_without_chat_template_gets_the_prompt_as_it_is(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert modelfile(model, "x.gguf") == ('FROM ./x.gguf\nTEMPLATE {{ .Prompt }}\nPARAMETER stop "<|im_end|>"\n', [])


def test_a_template_without_blocks_is_left_to_an_ollama_that_runs_it(model: Path) -> None:
    (model / "chat_template.jinja").write_text(STYLES["chatml"] + "{{ messages | length }}", encoding="utf-8")
    text, told = modelfile(model, "x.gguf")
    assert text == (
        "FROM ./x.gguf\n"
        "# Needs Ollama 0.30, which runs the chat template of the GGUF file; older ones send bare prompts.\n"
        '# Where `ollama create` says "autodetected template", start the server with OLLAMA_GO_TEMPLATE=0.\n'
        'REQUIRES 0.30.0\nPARAMETER stop "<|im_end|>"\n'
    )
    assert len(told) == 1 and told[0].startswith("no TEMPLATE in the Modelfile: the chat template cannot be written")
    assert "take Ollama 0.30 or newer" in told[0]


def test_thoughts_are_known_to_be_cut_for_a_qwen3(model: Path) -> None:
    (model / "chat_template.jinja").write_text(STYLES["qwen3"], encoding="utf-8")
    assert "thoughts" in modelfile(model, "x.gguf")[1][0]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}), encoding="utf-8")
    assert "thoughts" not in modelfile(model, "x.gguf")[1][0]


@pytest.mark.real
def test_the_text_of_the_next_turn_stops_a_model_whose_turns_have_no_end_token(shared: Path) -> None:
    text, _ = modelfile(shared / "models" / "hh-dialogue-4m", "x.gguf")
    assert text.endswith('PARAMETER stop "<|endoftext|>"\nPARAMETER stop """\n\nHuman:"""\n')

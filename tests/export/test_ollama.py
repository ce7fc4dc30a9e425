"""Modelfiles: what Ollama would send must be what the chat template says, text by text."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import pe_dpo
from pe_dpo.errors import UsageError
from pe_dpo.export.ollama import ChatForm, modelfile, run_go_template

BASE = Path(pe_dpo.__file__).parent / "quickstart" / "base"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] if loop.first and system else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text + ' [/INST]' }}"
    "{% else %}{{ ' ' + text + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DATED = LLAMA_3.replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }}")
LAST_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "Hi {there}"},
    {"role": "assistant", "content": "Hello!\n\n- one"},
    {"role": "user", "content": '"Why?"'},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "So?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def make_tokenizer(tiny_base: Path) -> Any:
    """The tiny tokenizer with another chat template and a BOS token."""

    def make(template: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tiny_base, chat_template=template, bos_token="<s>", eos_token="</s>")

    return make


@pytest.mark.parametrize("strips_bos", [True, False])
@pytest.mark.parametrize("template", [CHATML, QWEN, LLAMA_3, LLAMA_2, MISTRAL, ZEPHYR])
def test_the_go_template_renders_as_the_chat_template(make_tokenizer: Any, template: str, strips_bos: bool) -> None:
    tokenizer = make_tokenizer(template)
    written = ChatForm(tokenizer, strips_bos=strips_bos).go_template()
    for system in [[], [SYSTEM]] if template != MISTRAL else [[]]:
        for turns in (TURNS[:1], TURNS[:3], TURNS):
            wanted = tokenizer.apply_chat_template([*system, *turns], tokenize=False, add_generation_prompt=True)
            wanted = wanted.removeprefix("<s>") if strips_bos else wanted
            assert run_go_template(written, [*system, *turns]) == wanted


def test_the_written_chatml_reads_as_one_writes_it(make_tokenizer: Any) -> None:
    """By hand: system, then the first user message, later ones, answers, and the opening of the next answer."""
    assert ChatForm(make_tokenizer(CHATML), strips_bos=True).go_template() == (
        "{{ range $i, $m := .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n<|im_start|>user\n{{ end }}'
        '{{ if eq .Role "user" }}{{ if eq $i 0 }}<|im_start|>user\n{{ else if and (eq $i 1) $.System }}'
        "{{ else }}<|im_end|>\n<|im_start|>user\n{{ end }}{{ .Content }}{{ end }}"
        '{{ if eq .Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n{{ .Content }}{{ end }}'
        "{{ end }}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("condition", "index", "role", "has_system", "runs"),
    [
        ("eq $i 0", 0, "user", False, True),
        ("eq $i 0", 1, "user", False, False),
        ("and (eq $i 1) $.System", 1, "user", True, True),
        ("and (eq $i 1) $.System", 1, "user", False, False),
        ('eq .Role "user"', 0, "assistant", False, False),
    ],
)
def test_the_interpreter_follows_conditions_as_go_does(
    condition: str, index: int, role: str, has_system: bool, runs: bool
) -> None:
    before = [SYSTEM] if has_system else [{"role": "user", "content": "-"}]
    messages = [*before[:index], {"role": role, "content": "x"}]
    template = "a{{ range $i, $m := .Messages }}{{ if " + condition + " }}<{{ .Content }}>{{ else }}!{{ end }}{{ end }}z"
    assert run_go_template(template, messages)[1:-1].endswith("<x>") is runs


def test_a_prompt_that_the_template_inserts_becomes_the_system_line(make_tokenizer: Any) -> None:
    assert ChatForm(make_tokenizer(QWEN), strips_bos=True).default_system == "You are a helpful assistant."
    assert ChatForm(make_tokenizer(CHATML), strips_bos=True).default_system is None


@pytest.mark.parametrize("template", [DATED, LAST_SYSTEM, "{{ messages[-1]['content'] }}", ZEPHYR.replace("'<|'", "'{{'")])
def test_templates_of_another_form_are_refused(make_tokenizer: Any, template: str) -> None:
    with pytest.raises(UsageError, match="cannot be written as an Ollama template"):
        ChatForm(make_tokenizer(template), strips_bos=True)


def test_the_modelfile_of_the_quickstart_writes_the_bos_that_no_tokenizer_adds() -> None:
    lines = modelfile(BASE, "x.gguf").splitlines()
    assert lines[0] == "FROM ./x.gguf"
    assert lines[1].startswith('TEMPLATE """') and "{{ if eq $i 0 }}<bos><|user|>{{" in lines[1]
    assert lines[2:] == ['PARAMETER stop "<|end|>"']


def test_bos_is_left_to_llama_cpp_where_the_tokenizer_adds_it(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(LLAMA_3)
    assert "<s>" not in ChatForm(tokenizer, strips_bos=True).go_template()
    assert ChatForm(tokenizer, strips_bos=False).go_template().count("<s>") == 2  # with and without a system message


def test_a_model_without_chat_template_gets_the_prompt_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    model = tmp_path / "plain"
    shutil.copytree(tiny_base, model)
    (model / "chat_template.jinja").unlink()
    assert modelfile(model, "x.gguf") == 'FROM ./x.gguf\nTEMPLATE {{ .Prompt }}\nPARAMETER stop "<|im_end|>"\n'


def test_a_template_without_system_messages_says_so(tiny_base: Path, tmp_path: Path) -> None:
    model = tmp_path / "mistral"
    shutil.copytree(tiny_base, model)
    (model / "chat_template.jinja").write_text(MISTRAL, encoding="utf-8")
    text = modelfile(model, "x.gguf")
    assert "# The chat template takes no system message" in text
    messages = [SYSTEM, *TURNS[:1]]
    assert run_go_template(text.split('TEMPLATE """')[1].split('"""')[0], messages) == "[INST] Hi {there} [/INST]"


@pytest.mark.real
def test_the_text_of_the_next_turn_stops_a_model_whose_turns_have_no_end_token(shared: Path) -> None:
    text = modelfile(shared / "models" / "hh-dialogue-4m", "x.gguf")
    assert text.endswith('PARAMETER stop "<|endoftext|>"\nPARAMETER stop """\n\nHuman:"""\n')

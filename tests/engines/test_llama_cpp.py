"""What `export --gguf` writes, in the real llama.cpp: log-probs, tokens, rendered chats and answers against transformers."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import byte_level, save_random_model, save_tokenizer, sentence_piece, with_words

import pe_dpo
from benchmarks.engines.compare import expected_answer, largest_difference
from benchmarks.engines.texts import CHATS, varied_texts
from benchmarks.engines.worker import EngineError, ask
from pe_dpo.errors import UsageError
from pe_dpo.export import gguf_file
from pe_dpo.export.gguf_file import load_gguf, write_gguf
from pe_dpo.export.gguf_folder import export_gguf
from pe_dpo.export.gguf_tokenizer import LLAMA_3, QWEN_2, TEKKEN
from pe_dpo.export.golden_file import load_golden

BASE = Path(pe_dpo.__file__).parent / "quickstart" / "base"
IDS = [*range(3, 30), *range(40, 3, -3)]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n\n' + m.content | trim + eos_token }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
)
QWEN_CHAT = (
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n' }}{%- else %}{{- 'You are helpful.\n' }}{%- endif %}"
    "{%- set ns = namespace(last=messages | length - 1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' or loop.index0 == ns.last %}"
    "{{- '[' ~ m.role ~ ']' ~ m.content.strip() ~ ('' if loop.last else '\n') }}"
    "{%- elif m.role == 'assistant' %}{{- m.content.split('?')[-1].lstrip('\n') }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '[SYS] ' + m['content'] + ' [/SYS]' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)


def llama_3(folder: Path) -> None:
    save_tokenizer(folder, byte_level(LLAMA_3, ignores_merges=True), template=LLAMA_CHAT, bos_token="<s>")


def qwen(folder: Path) -> None:
    save_tokenizer(folder, byte_level(QWEN_2), template=QWEN_CHAT)


def tekken(folder: Path) -> None:
    save_tokenizer(folder, byte_level(TEKKEN, ignores_merges=True), template=MISTRAL_CHAT, bos_token="<s>")


def smollm(folder: Path) -> None:
    save_tokenizer(folder, byte_level(None, digits=True))


MODELS: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
    "llama, scaled as Llama 3, biases": (
        "llama",
        llama_3,
        {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, tied, of SentencePiece": ("llama", sentence_piece, {"tie_word_embeddings": True}),
    "mistral, yarn": ("mistral", tekken, {"rope_parameters": YARN}),
    "qwen2, tied, yarn": ("qwen2", qwen, {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3, yarn": ("qwen3", qwen, {"rope_parameters": YARN}),
    "qwen3, tied": ("qwen3", smollm, {"tie_word_embeddings": True}),
}


def is_named(text: str, save: Callable[[Path], None]) -> bool:
    """Whether the export says that llama.cpp reads a text as other tokens."""
    if save is tekken:
        return any(unicodedata.category(letter).startswith("M") for letter in text)
    return save is qwen and not unicodedata.is_normalized("NFC", text)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_in_llama_cpp_what_it_is_in_transformers(tmp_path: Path, name: str) -> None:
    """Measured: log-probs differ by 1e-5 to 4e-5 nats where all is computed in float32."""
    family, save, settings = MODELS[name]
    save(tmp_path / "model")
    save_random_model(tmp_path / "model", family, **settings)
    facts = write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind="f32")
    texts = [text for text in varied_texts(400) if not is_named(text, save)]
    request: dict[str, Any] = {"ids": [IDS], "texts": texts, "greedy": [IDS[:9]], "new_tokens": 6}
    request |= {"chats": CHATS} if save in (llama_3, qwen, tekken) else {}
    expected, found = expected_answer(tmp_path / "model", request), ask("xllamacpp", facts.path, request)
    assert largest_difference(found, expected) < 1e-4
    assert len(texts) > 300
    assert [text for text, a, b in zip(texts, found["tokens"], expected["tokens"], strict=True) if a != b] == []
    assert found["rendered"] == expected["rendered"]
    assert found["greedy"] == expected["greedy"]


@pytest.mark.parametrize(
    ("save", "text", "alike", "remark"),
    [
        (qwen, "cafe\u0301", "café", "normalizes text (NFC)"),
        (qwen, "a</s>b", "a</b>b", "llama.cpp takes </s> in a text for one special token"),
        (tekken, "мосКва", "москва", "words with capitals in the middle"),
        (tekken, "नमस्ते", "नमस", "those with combining marks"),
    ],
)
def test_what_llama_cpp_reads_as_other_tokens_is_what_the_export_names(
    tmp_path: Path, save: Callable[[Path], None], text: str, alike: str, remark: str
) -> None:
    model = tmp_path / "model"
    save(model)
    if "</s>" in text:
        save_tokenizer(model, byte_level(QWEN_2), eos="<|im_end|>")
        with_words(model, ["</s>", "</b>"])
    save_random_model(model, "llama")
    facts = write_gguf(model, tmp_path / "model.gguf", kind="f32")
    texts = [text, alike]
    found, expected = ask("xllamacpp", facts.path, {"texts": texts}), expected_answer(model, {"texts": texts})
    assert found["tokens"][0] != expected["tokens"][0] and found["tokens"][1] == expected["tokens"][1]
    assert any(remark in one for one in facts.remarks)


@pytest.mark.parametrize(("arguments", "starts"), [("'role', 'equalto', 'user'", True), ("'role', 'defined'", False)])
def test_a_chat_template_that_llama_cpp_does_not_start_with_is_named(tmp_path: Path, arguments: str, starts: bool) -> None:
    template = f"{{{{ messages | selectattr({arguments}) | list | length }}}}{{{{ messages[0].content }}}}"
    save_tokenizer(tmp_path / "model", byte_level(None), template=template)
    save_random_model(tmp_path / "model", "llama")
    facts = write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind="f32")
    if starts:
        assert facts.remarks == () and ask("xllamacpp", facts.path, {"chats": CHATS[:1]})["rendered"] == [
            f"1{CHATS[0][0]['content']}"
        ]
        return
    assert f"llama.cpp does not read selectattr({arguments}) in the chat template" in facts.remarks[0]
    with pytest.raises(EngineError, match="Failed to init server"):  # its log, which says why, may come too late to be read
        ask("xllamacpp", facts.path, {})


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen2", {"head_dim": 32}, "'blk.0.attn_q.weight' has wrong shape"),
        ("qwen3", {"attention_bias": True}, "wrong number of tensors"),
    ],
)
def test_what_the_export_refuses_is_what_llama_cpp_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], words: str
) -> None:
    qwen(tmp_path / "model")
    save_random_model(tmp_path / "model", family, **changes)
    with pytest.raises(UsageError, match="does not load"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind="f32")
    monkeypatch.setattr(gguf_file, "_check_is_loaded", lambda model, config: None)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind="f32")
    with pytest.raises(EngineError, match=words):
        ask("xllamacpp", tmp_path / "model.gguf", {})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bound"), [("f32", 5e-2), ("f16", 5e-2), ("bf16", 0.1), ("q8_0", 0.3)])
def test_a_trained_model_as_llama_cpp_serves_it_by_itself(tmp_path: Path, kind: Any, bound: float) -> None:
    """With its KV cache of 16 bits and its fast attention, against the numbers in the file: 0.010, 0.007, 0.044 and 0.18
    nats at most. It rounds what flows through a layer to the numbers of the weights, with q8_0 to 8 bits."""
    facts = write_gguf(BASE, tmp_path / "model.gguf", kind=kind)
    request = {"ids": [IDS], "options": {"cache": "f16", "flash": True}}
    rows = load_gguf(facts.path, BASE)(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1)
    expected = {"logprobs": [rows.gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()]}
    assert largest_difference(ask("xllamacpp", facts.path, request), expected) < bound


@pytest.mark.slow
def test_golden_prompts_are_answered_to_an_openai_client(tmp_path: Path) -> None:
    export_gguf(BASE, tmp_path / "out", kind="f32", prompts=None, is_checked=False, has_card=False)
    golden = load_golden(tmp_path / "out" / "golden_prompts.jsonl")
    chats = [[{"role": "user", "content": one.prompt}] for one in golden]
    request = {"texts": [one.rendered for one in golden], "chats": chats, "new_tokens": 32, "options": {"completions": True}}
    found = ask("xllamacpp", tmp_path / "out", request)
    assert found["rendered"] == [one.rendered for one in golden]
    assert found["tokens"] == [one.prompt_ids for one in golden]
    assert found["completions"] == [one.text for one in golden]

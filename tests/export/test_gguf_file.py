"""GGUF files, read back by transformers, whose reader shares no code with our writer."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf_models import byte_level, save_random_model, save_tokenizer, sentence_piece, with_words
from packaging.version import Version

import pe_dpo
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.export.gguf_file import llama3_factors, load_gguf, write_gguf
from pe_dpo.export.gguf_tokenizer import LLAMA_3, QWEN_2, TEKKEN, Vocabulary
from pe_dpo.export.golden import answer_log_probs, golden_prompts, mean_divergence
from pe_dpo.inference.policy import Policy
from pe_dpo.model.base import inspect_base
from pe_dpo.progress import showing

BASE = Path(pe_dpo.__file__).parent / "quickstart" / "base"
TEXTS = [
    "Hello world",
    " leading and trailing ",
    "don't WE'LL they've I'm 'tis",
    "1234567 8 90,000.5",
    "tabs\tand\n\nlines \n  indented\r\n",
    "héllo 日本語 नमस्ते 🚀👩‍👧",
    "snake_case(x)[0] != {'a': 1};  // ok",
    "",
    "a" * 40 + "!" * 9,
]
UNSPACED = [text for text in TEXTS if not text.startswith(" ")]
"""transformers 5.23 reads every tokenizer of model "llama" as Metaspace, which puts no space before a space; llama.cpp does."""
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model of a family with a byte-level tokenizer."""

    def make(family: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(family) / "model"
        bos = {} if family.startswith("qwen") else {"bos_token": "<s>"}
        save_tokenizer(folder, byte_level(QWEN_2 if family.startswith("qwen") else None), **bos)
        save_random_model(folder, family, **changes)
        return folder

    return make


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def original(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def metadata_of(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_16_bit_model_reads_back_with_equal_logits(
    make_model: Callable, tmp_path: Path, family: str, is_tied: bool, kind: Any
) -> None:
    model = make_model(family, tie_word_embeddings=is_tied, shard="20KB" if is_tied else "1GB")
    facts = write_gguf(model, tmp_path / "model.gguf", kind=kind)
    assert facts.is_lossless and facts.kind == kind
    assert len(list(model.glob("*.safetensors"))) > 1 or not is_tied
    assert torch.equal(logits_of(load_gguf(facts.path, model)), logits_of(original(model)))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_of_attention_and_mlp_are_kept(make_model: Callable, tmp_path: Path, family: str) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = make_model(family, **biases)
    facts = write_gguf(model, tmp_path / "model.gguf", kind="f32")
    assert torch.equal(logits_of(load_gguf(facts.path, model)), logits_of(original(model)))


def test_half_precision_changes_logits_by_its_rounding_only(make_model: Callable, tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.float32)
    facts = write_gguf(model, tmp_path / "model.gguf", kind="f16")
    mine, theirs = logits_of(load_gguf(facts.path, model)), logits_of(original(model))
    assert not facts.is_lossless
    assert 0 < (mine - theirs).abs().max() < 2e-2 * theirs.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bound"), [("f16", 1e-7), ("q8_0", 1e-4), ("q4_0", 1e-2)])
def test_a_trained_model_keeps_its_answers_within_the_measured_divergence(tmp_path: Path, kind: Any, bound: float) -> None:
    """Measured on the quickstart's base: f16 below 1e-8, q8_0 1.1e-5, q4_0 4.9e-3 nats."""
    from transformers import AutoTokenizer

    model, tokenizer = original(BASE), AutoTokenizer.from_pretrained(BASE)
    info = inspect_base(str(BASE), quantize="none", dtype="float32")
    golden = golden_prompts(Policy(model, tokenizer, info, {tokenizer.eos_token_id}))
    facts = write_gguf(BASE, tmp_path / "model.gguf", kind=kind)
    assert mean_divergence(load_gguf(facts.path, BASE), list(answer_log_probs(model, golden)), golden) < bound


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260k", "hh-dialogue-4m"])
def test_real_models_and_their_tokenizers_read_back(shared: Path, tmp_path: Path, name: str) -> None:
    model = shared / "models" / name
    facts = write_gguf(model, tmp_path / "model.gguf", kind="f32")
    assert torch.equal(logits_of(load_gguf(facts.path, model)), logits_of(original(model)))
    texts = UNSPACED if name == "stories260k" else TEXTS
    assert ids_by(tmp_path, "model.gguf", texts=texts) == ids_by(model, texts=texts)


def ids_by(folder: Path, gguf_file: str | None = None, *, texts: list[str] = TEXTS) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf_file} if gguf_file else {}))
    return [tokenizer(text)["input_ids"] for text in texts]


TOKENIZERS = {
    "gpt-2": {"pattern": None},
    "llama-bpe": {"pattern": LLAMA_3, "ignores_merges": True},
    "smaug-bpe": {"pattern": LLAMA_3},
    "qwen2": {"pattern": QWEN_2},
    "tekken": {"pattern": TEKKEN, "ignores_merges": True},
    "smollm": {"pattern": None, "digits": True},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_known_pre_tokenizers_get_their_name(tmp_path: Path, name: str) -> None:
    save_tokenizer(tmp_path, byte_level(**TOKENIZERS[name]))
    assert Vocabulary(tmp_path, 400).pre == name


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="transformers 5.17 fails without a first token")
@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "tekken"])
def test_byte_level_tokenizers_read_back_with_equal_ids(make_model: Callable, tmp_path: Path, name: str) -> None:
    """Not smollm: transformers 5.23 reads its digits as GPT-2 does."""
    trained = byte_level(**TOKENIZERS[name])
    model = with_tokenizer(make_model("llama"), tmp_path, lambda folder: save_tokenizer(folder, trained))
    write_gguf(model, tmp_path / "model.gguf", kind="bf16")
    assert ids_by(tmp_path, "model.gguf") == ids_by(model)


def test_the_pattern_of_qwen_is_that_of_transformers() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PRETOKENIZE_REGEX == QWEN_2


def with_tokenizer(model: Path, place: Path, save: Callable[[Path], None]) -> Path:
    """A copy of a model with another tokenizer."""
    folder = place / "changed"
    shutil.copytree(model, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    save(folder)
    return folder


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("has_prefix", [True, False])
def test_scores_merge_as_the_ranks_do(tmp_path: Path, text: str, has_prefix: bool) -> None:
    sentence_piece(tmp_path, prepend=has_prefix)
    check_scores(tmp_path, text, 400)


@pytest.mark.real
def test_scores_of_a_real_sentence_piece_model_merge_as_the_ranks_do(shared: Path) -> None:
    for text in [*TEXTS, "Once upon a time, there was a little girl named Lily. She didn't like the big dog's bone!"]:
        check_scores(shared / "models" / "stories260k", text, 512)


def check_scores(folder: Path, text: str, size: int) -> None:
    from transformers import AutoTokenizer

    vocabulary = Vocabulary(folder, size)
    assert vocabulary.model == "llama"
    wanted = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert score_ids(vocabulary, text) == wanted


def score_ids(vocabulary: Any, text: str) -> list[int]:
    """llama.cpp's tokenizer of model "llama", written down again: join the neighbours of the highest score, leftmost first."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    text = ((" " if vocabulary.adds_space_prefix and text else "") + text).replace(" ", "▁")
    symbols: list[str | None] = list(text)
    while True:
        live = [place for place, symbol in enumerate(symbols) if symbol is not None]
        queue = [
            (-vocabulary.scores[ids[joined]], left, right)
            for left, right in itertools.pairwise(live)
            if (joined := f"{symbols[left]}{symbols[right]}") in ids
        ]
        if not queue:
            break
        _, left, right = min(queue)
        symbols[left], symbols[right] = f"{symbols[left]}{symbols[right]}", None
    found: list[int] = []
    for symbol in symbols:
        if symbol is not None:
            found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def test_sentence_piece_tokenizers_read_back_with_equal_ids(make_model: Callable, tmp_path: Path) -> None:
    model = with_tokenizer(make_model("mistral"), tmp_path, sentence_piece)
    write_gguf(model, tmp_path / "model.gguf", kind="bf16")
    assert ids_by(tmp_path, "model.gguf", texts=UNSPACED) == ids_by(model, texts=UNSPACED)


def test_the_vocabulary_is_padded_to_the_embedding(tmp_path: Path) -> None:
    """The quickstart's tokenizer has 995 tokens, of which 6 are special; its model has 1024 rows."""
    facts = write_gguf(BASE, tmp_path / "model.gguf", kind="bf16")
    metadata = metadata_of(facts.path)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == metadata["llama.vocab_size"] == 1024
    assert tokens[994:997:2] == [tokens[994], "[PAD996]"] and types[995:] == [5] * 29
    assert types[:7] == [3] * 6 + [1]


def test_metadata_says_what_the_configuration_says(make_model: Callable, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    model = make_model("mistral", rope_parameters=rope, rms_norm_eps=1e-5, sliding_window=64)
    facts = write_gguf(model, tmp_path / "model.gguf", kind="q8_0")
    found = metadata_of(facts.path)
    wanted = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 5e5,
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.type": "linear",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {key: found[key] for key in wanted} == wanted
    assert any("last 64" in remark for remark in facts.remarks)


def test_the_chat_template_is_embedded_and_bos_follows_it(tiny_base: Path, tmp_path: Path) -> None:
    """A tokenizer that adds BOS with a template that writes none: training read no BOS, so the server must not add one."""
    model = with_tokenizer(tiny_base, tmp_path, sentence_piece)
    post = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    post["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    (model / "tokenizer.json").write_text(json.dumps(post), encoding="utf-8")
    assert (model / "chat_template.jinja").is_file()
    assert not Vocabulary(model, 320).adds_bos
    (model / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}", encoding="utf-8")
    vocabulary = Vocabulary(model, 320)
    assert vocabulary.adds_bos and vocabulary.chat_template == "{{ bos_token }}{{ messages[0]['content'] }}"


def test_further_ends_of_the_generation_config_end_turns_too(tiny_base: Path, tmp_path: Path) -> None:
    """llama.cpp stops at eos, eot and eom; the file has room for one eos only."""
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    (model / "generation_config.json").write_text('{"eos_token_id": [9, 256, 8]}', encoding="utf-8")
    assert Vocabulary(model, 320).special_ids == {"eos": 256, "pad": 257, "eot": 9, "eom": 8}


def test_llama_3_frequencies_are_those_of_transformers(make_model: Callable, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 5e5 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / llama3_factors(config), scaled)
    facts = write_gguf(make_model("llama", rope_parameters=rope), tmp_path / "model.gguf", kind="f32")
    from gguf import GGUFReader

    assert next(t for t in GGUFReader(facts.path).tensors if t.name == "rope_freqs.weight").shape.tolist() == [16]


def test_rows_that_are_no_blocks_fall_back_to_half_precision(make_model: Callable, tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = make_model("qwen2", intermediate_size=72)
    facts = write_gguf(model, tmp_path / "model.gguf", kind="q4_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(facts.path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.attn_q.bias"] == types["blk.0.attn_norm.weight"] == "F32"
    assert facts.remarks[-1] == "2 tensors are f16, their rows do not divide into blocks of 32: blk.0.ffn_down.weight, …"


def test_progress_counts_the_tensors(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with showing(lambda *step: seen.append(step)):
        facts = write_gguf(BASE, tmp_path / "model.gguf", kind="f16")
    assert seen == [("writing", done, facts.tensors) for done in range(1, facts.tensors + 1)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma2"}, "model_type gemma2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE is dynamic"),
    ],
)
def test_other_models_are_refused_with_the_command_that_converts_them(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    model = tmp_path / "other"
    shutil.copytree(tiny_base, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    with pytest.raises(UsageError, match=words) as refusal:
        write_gguf(model, tmp_path / "model.gguf", kind="f16")
    assert f"python convert_hf_to_gguf.py {model} --outfile other-f16.gguf --outtype f16" in str(refusal.value)
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen2", {"head_dim": 32}, "its 4 heads of 32 are not its hidden size, 64, and llama.cpp does not load a qwen2"),
        ("qwen3", {"attention_bias": True}, "its attention has biases, and llama.cpp does not load a qwen3"),
    ],
)
def test_shapes_that_llama_cpp_does_not_load_are_refused_before_writing(
    make_model: Callable, tmp_path: Path, family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as refusal:
        write_gguf(make_model(family, **changes), tmp_path / "model.gguf", kind="f16")
    assert "convert_hf_to_gguf" not in str(refusal.value) and "vLLM" in str(refusal.value)
    assert not list(tmp_path.glob("*.gguf*"))


def test_what_llama_cpp_reads_as_other_tokens_is_named(tmp_path: Path) -> None:
    """Of the words that llama.cpp makes special, one that the tokenizer has as an ordinary token and never gives."""
    tokenizer = byte_level(QWEN_2)
    save_tokenizer(tmp_path, tokenizer, eos="<|end|>")
    with_words(tmp_path, ["</s>", "[EOT]", "</div>"])
    remarks = Vocabulary(tmp_path, 400).remarks
    assert len(remarks) == 2
    assert remarks[0].startswith("its tokenizer normalizes text (NFC) and llama.cpp does not")
    assert remarks[1].startswith("llama.cpp takes </s>, [EOT] in a text for one special token")
    save_tokenizer(tmp_path, byte_level(None))
    assert Vocabulary(tmp_path, 400).remarks == []


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["pre_tokenizer"].update(use_regex=False),
        lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True),
        lambda parts: parts["model"].update(ignore_merges=True),
        lambda parts: parts.update(normalizer={"type": "Lowercase"}),
    ],
)
def test_unknown_pre_tokenizers_are_refused(tiny_base: Path, tmp_path: Path, change: Callable) -> None:
    model = tmp_path / "other"
    shutil.copytree(tiny_base, model)
    parts = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    change(parts)
    (model / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    with pytest.raises(UsageError, match="convert_hf_to_gguf"):
        Vocabulary(model, 320)


def test_merges_that_scores_cannot_express_are_refused(tmp_path: Path) -> None:
    """With the merge ▁ + t gone, llama.cpp would still join the two, as ▁t is a token."""
    sentence_piece(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    parts["model"]["merges"].remove(["▁", "t"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    with pytest.raises(UsageError, match="scores"):
        Vocabulary(tmp_path, 400)


def test_a_missing_tensor_is_an_error_and_leaves_nothing(make_model: Callable, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "other"
    shutil.copytree(make_model("qwen2"), model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"blk\.1\.attn_k\.bias"):
        write_gguf(model, tmp_path / "model.gguf", kind="f16")
    assert not list(tmp_path.glob("*.gguf*"))


def test_values_beyond_half_precision_are_an_error_and_leave_nothing(make_model: Callable, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "other"
    shutil.copytree(make_model("llama"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match="not finite as f16"):
        write_gguf(model, tmp_path / "model.gguf", kind="f16")
    assert not [file for file in tmp_path.iterdir() if file.is_file()]


def test_without_the_gguf_package_the_command_to_install_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r'pip install "pe-dpo\[gguf\]"'):
        write_gguf(BASE, tmp_path / "model.gguf", kind="f16")

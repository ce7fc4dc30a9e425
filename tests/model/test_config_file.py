"""config.json of a merged model, key by key against the base's: what is published for transformers 4, and what 5 writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from pe_dpo.model.config_file import derived_config, with_old_spelling

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 256,
          "rope_type": "llama3"}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 128, "type": "yarn"}
LINEAR = {"factor": 8.0, "rope_type": "linear"}
LONG = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "type": "longrope"}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}
OLD: dict[str, dict[str, Any]] = {
    "llama 3.1": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "qwen 2.5": {"model_type": "qwen2", "rope_theta": 1000000.0, "rope_scaling": YARN},
    "mistral": {"model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None},
    "gemma 2": {"model_type": "gemma2", "rope_theta": 10000.0, "attn_logit_softcapping": 50.0, **GEMMA},
    "gemma 3": {"model_type": "gemma3_text", "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": LINEAR,
                "sliding_window_pattern": 2, **GEMMA},
    "phi 3": {"model_type": "phi3", "rope_theta": 10000.0, "original_max_position_embeddings": 128, "rope_scaling": LONG,
              "pad_token_id": 0},
}  # fmt: skip
"""As their publishers write them, in the words of transformers 4."""
PUBLISHED = {"architectures": ["SomethingForCausalLM"], "torch_dtype": "bfloat16", "transformers_version": "4.43.0"}


def save(folder: Path, **content: Any) -> str:
    text = json.dumps(content, indent=4)  # not as transformers indents
    (folder / "config.json").write_text(text, encoding="utf-8")
    return text


def derived(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> str:
    return derived_config(folder, AutoConfig.from_pretrained(folder), dtype=dtype, changes=changes)


@pytest.mark.parametrize("name", OLD)
def test_the_configuration_of_a_base_is_carried_byte_for_byte_where_nothing_changed(name: str, tmp_path: Path) -> None:
    text = save(tmp_path, **SIZES, **OLD[name], **PUBLISHED)
    assert derived(tmp_path) == text


@pytest.mark.parametrize("name", OLD)
def test_only_what_changed_is_written_otherwise(name: str, tmp_path: Path) -> None:
    text = save(tmp_path, **SIZES, **OLD[name], **PUBLISHED, tie_word_embeddings=True)
    written = json.loads(derived(tmp_path, dtype=torch.float32, tie_word_embeddings=False, vocab_size=330))
    changes = {"torch_dtype": "float32", "tie_word_embeddings": False, "vocab_size": 330}
    assert list(written.items()) == list({**json.loads(text), **changes}.items())


def test_code_and_codes_go(tmp_path: Path) -> None:
    own = {**SIZES, **OLD["llama 3.1"], **PUBLISHED}
    code = {"AutoConfig": "configuration_llama.LlamaConfig"}
    codes = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    save(tmp_path, **own, auto_map=code, quantization_config=codes)
    assert json.loads(derived(tmp_path)) == own


def test_a_path_where_the_base_once_lay_goes_and_a_name_stays(tmp_path: Path) -> None:
    for place, kept in (("/home/me/base", False), ("org/base", True)):
        save(tmp_path, **SIZES, **OLD["llama 3.1"], **PUBLISHED, _name_or_path=place)
        assert ("_name_or_path" in json.loads(derived(tmp_path))) == kept


def test_a_wrapper_is_changed_in_the_part_that_says_it(tmp_path: Path) -> None:
    text = {**SIZES, **OLD["gemma 3"], "torch_dtype": "bfloat16"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14, "model_type": "siglip_vision_model"}  # fmt: skip
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": vision, **PUBLISHED}
    own = save(tmp_path, **whole)
    assert derived(tmp_path) == own
    written = json.loads(derived(tmp_path, dtype=torch.float32, vocab_size=330))
    assert written == {**whole, "torch_dtype": "float32", "text_config": {**text, "vocab_size": 330, "torch_dtype": "float32"}}


NEW = {
    "llama 3.1": ({"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
                  {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "mistral": ({"model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
                {"rope_theta": 1000000.0, "rope_scaling": None}),
    "gemma 3": ({"model_type": "gemma3_text", **GEMMA, "rope_parameters": {
                    "full_attention": {**LINEAR, "rope_theta": 1000000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
                {"rope_theta": 1000000.0, "rope_scaling": LINEAR, "rope_local_base_freq": 10000.0}),
    "phi 3": ({"model_type": "phi3", "original_max_position_embeddings": 128, "pad_token_id": 0, "rope_parameters": {
                  **LONG, "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
                  "original_max_position_embeddings": 128}},
              {"rope_theta": 10000.0, "rope_scaling": LONG, "partial_rotary_factor": 1.0}),
    "pythia": ({"model_type": "gpt_neox", "rope_parameters": {
                   "rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}},
               {"rotary_emb_base": 20000.0, "rotary_pct": 0.5}),
    "gpt-oss": ({"model_type": "gpt_oss", "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
                {"rope_theta": 150000.0, "rope_scaling": {"rope_type": "default"}}),
    "qwen 3 moe": ({"model_type": "qwen3_moe", "head_dim": 8, "num_local_experts": 4, "moe_intermediate_size": 32,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
                   {"num_experts": 4, "rope_theta": 1000000.0, "rope_scaling": None}),
}  # fmt: skip
"""In the words of transformers 5, and what versions before it need beside them."""


@pytest.mark.parametrize("name", NEW)
def test_a_base_that_version_5_wrote_is_given_the_words_of_before(name: str, tmp_path: Path) -> None:
    own, old = NEW[name]
    own = {**SIZES, **own, "dtype": "bfloat16", "transformers_version": "5.23.0"}
    save(tmp_path, **own)
    expected = {**own, **old, "torch_dtype": "bfloat16"}
    assert json.loads(derived(tmp_path)) == expected
    before = AutoConfig.from_pretrained(tmp_path).rope_parameters
    save(tmp_path, **expected)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == before


def test_words_that_would_mean_something_else_are_left_out(tmp_path: Path) -> None:
    """Olmo 3 had one rotary base for all layers; of two, version 5 reads the second as 10,000."""
    kinds = {kind: {"rope_type": "default", "rope_theta": 54321.0} for kind in ("full_attention", "sliding_attention")}
    own = {**SIZES, "model_type": "olmo3", "sliding_window": 32, "rope_parameters": kinds}
    save(tmp_path, **own)
    assert with_old_spelling(own, type(AutoConfig.from_pretrained(tmp_path))) == own


def test_a_configuration_that_would_be_read_otherwise_is_written_anew(tmp_path: Path, warned: list[str]) -> None:
    """Here the file is not the one that was read in training."""
    save(tmp_path, **SIZES, **OLD["llama 3.1"], **PUBLISHED)
    trained_on = AutoConfig.from_pretrained(tmp_path)
    save(tmp_path, **SIZES, **OLD["llama 3.1"] | {"rope_theta": 10000.0}, **PUBLISHED)
    written = json.loads(derived_config(tmp_path, trained_on, dtype=torch.bfloat16, changes={}))
    assert len(warned) == 1 and "would not be read as the model that is written" in warned[0]
    assert written["rope_theta"] == 500000.0 and written["rope_scaling"] == LLAMA3
    assert written["rope_parameters"] == {**LLAMA3, "rope_theta": 500000.0}

"""Files of bases and adapters that came from elsewhere: damaged ones are one line, and nothing in them runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import load_adapter_for_evaluation
from pe_dpo.model.adapter_config import read_adapter_config
from pe_dpo.model.adapter_files import AdapterFiles
from pe_dpo.model.base import end_token_ids, inspect_base, load_base, load_tokenizer, read_config
from pe_dpo.model.tensor_files import TensorFiles
from pe_dpo.model.weight_files import weight_files
from pe_dpo.quickstart.demo import BASE

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def refused(read: Any, place: Path) -> str:
    with pytest.raises(ModelError) as error:
        read(str(place))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("values", [
    {"hidden_size": "x"}, {"hidden_size": [64]}, {"num_attention_heads": 0}, {"rms_norm_eps": {"a": 1}}, {"model_type": []},
    {"use_cache": "\x1b[31m"}, {"vocab_size": -1}, {"architectures": 5, "hidden_act": "no such"},
])  # fmt: skip
def test_a_damaged_config_is_one_line(base: Path, values: dict[str, Any]) -> None:
    change(base / "config.json", **values)
    assert "\x1b" not in refused(inspect_base, base)


def test_a_config_nested_without_end_is_one_line(base: Path) -> None:
    (base / "config.json").write_text(f'{{"quantization_config": {DEEP}}}', encoding="utf-8")
    assert str(base) in refused(read_config, base)
    assert "config.json: cannot be read" in refused(weight_files, base)


@pytest.mark.parametrize("values", [{"pad_token": [1]}, {"extra_special_tokens": 5}, {"added_tokens_decoder": []}])
def test_a_damaged_tokenizer_config_is_one_line(base: Path, values: dict[str, Any]) -> None:
    change(base / "tokenizer_config.json", **values)
    refused(load_tokenizer, base)


def test_a_panic_of_the_tokenizers_rust_is_one_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is no Exception: a random search ended with it after thousands of cases."""

    class PanicException(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> Any:
        raise PanicException("range end index 18446744073709551612 out of range for slice of length 13")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    assert "its tokenizer cannot be read: range end index" in refused(load_tokenizer, base)


def test_damaged_files_beside_it_are_one_line(base: Path) -> None:
    change(base / "tokenizer.json", model=True)
    refused(load_tokenizer, base)
    (base / "generation_config.json").write_text('{"eos_token_id": ["x", {}]}', encoding="utf-8")
    refused(end_token_ids, base)
    index = {"weight_map": {"x\ny": "a\ud800\n.safetensors"}}
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(TensorFiles, base)
    (base / "model.safetensors.index.json").write_text(f'{{"weight_map": {DEEP}}}', encoding="utf-8")
    refused(TensorFiles, base)


@pytest.mark.parametrize(("key", "value"), [
    ("r", "8"), ("lora_alpha", [8]), ("rank_pattern", [1]), ("alpha_pattern", {"q": None}), ("modules_to_save", [None]),
    ("rank_pattern", {r"((\w+)*)*x": 2}), ("target_modules", r"(.*a){20}.*.*.*.*.*.*.*.*.*b"), ("alpha_pattern", {"(": 2}),
    ("r", 10**400), ("peft_type", "\n\x1b[31m"),
])  # fmt: skip
def test_a_damaged_adapter_config_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    """A pattern is tried on every module's name; one with a repeat in a repeat takes as long as the world lasts."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(read_adapter_config, tmp_path)


@pytest.mark.parametrize("pattern", [
    r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj", r".*\.(?:q_proj|v_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
])  # fmt: skip
def test_patterns_that_tools_write_are_read(tmp_path: Path, pattern: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": pattern, "rank_pattern": {"^layers.0.q_proj": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert read_adapter_config(tmp_path).target_modules == pattern
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 4), "base_model.model.q.lora_B.weight": torch.ones(4, 2)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    assert AdapterFiles(tmp_path).changes["q.weight"].scaling == 2


# --------------------------------------------------------------------------------------------------- nothing of them runs


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What would be there if something planted had run."""
    return tmp_path / "ran"


class Evil:
    """What a pickle runs when it is read without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_code_beside_a_base_is_not_run(base: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    monkeypatch.chdir(base)
    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    change(base / "tokenizer_config.json", auto_map=code)
    change(base / "config.json", auto_map=code)
    load_base(inspect_base(str(base)))  # of a class that transformers has itself
    load_tokenizer(str(base))
    change(base / "config.json", model_type="evil")
    assert "needs Python code from its own repository (auto_map), which is never run" in refused(inspect_base, base)
    change(base / "config.json", model_type="llama", auto_map={}, attn_implementation="evil/kernel")
    assert "names a kernel of the hub as its attention's, which is a program and is never fetched" in refused(
        inspect_base, base
    )
    assert not marker.exists()


def test_a_pickle_in_the_place_of_an_adapter_is_not_read(tmp_path: Path, marker: Path) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save({"lora_A": Evil(marker)}, tmp_path / "adapter_model.bin")
    assert "only safetensors are read" in refused(AdapterFiles, tmp_path)
    model = load_base(inspect_base(str(BASE)))
    assert "only safetensors are read" in refused(lambda folder: load_adapter_for_evaluation(model, folder), tmp_path)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    assert "cannot be read" in refused(AdapterFiles, tmp_path)
    assert "does not load onto this base" in refused(lambda folder: load_adapter_for_evaluation(model, folder), tmp_path)
    assert not marker.exists()


def test_a_module_that_an_adapter_names_is_not_imported(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = {"megatron_core": "evil_module", "megatron_config": {"x": 1},
             "auto_mapping": {"base_model_class": "X", "parent_library": "evil_module"}}  # fmt: skip
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **named}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "PEFT would import a module that it names" in refused(read_adapter_config, tmp_path)
    assert not marker.exists()

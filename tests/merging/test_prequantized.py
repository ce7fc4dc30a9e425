"""Bases that lie on disk as bitsandbytes' codes: trained on exactly these, and merged onto what they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pe_dpo.audit.audit import audit
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.merging.merge import merge
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.model.fingerprint import parameter_fingerprint, parameter_fingerprints
from pe_dpo.model.quantization import four_bit_layers
from pe_dpo.model.weight_files import FourBitFiles
from pe_dpo.training.train import train

IDS = torch.arange(1, 200).view(1, -1)
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-single": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
}
LEFT_OUT = ["lm_head", "model.layers.1.self_attn", "model.layers.0.mlp.down_proj"]
"""As "dynamic" quantizations leave some layers in 16 bits."""


def quantized_copy(base: Path, folder: Path, **settings: Any) -> Path:
    """Save a base as transformers saves one that it has quantized, its tokenizer beside it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config).save_pretrained(folder)
    for path in (*base.glob("token*"), *base.glob("*.jinja")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def dynamic(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic")
    return quantized_copy(tiny_base, folder, **KINDS["nf4"], llm_int8_skip_modules=LEFT_OUT)


@pytest.fixture(scope="module")
def dynamic_run(dynamic: Path, tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny_recipe(
        tmp_path_factory.mktemp("run") / "run", f"model.base={dynamic}", "model.quantize=auto", "train.learning_rate=3.0e-3"
    )
    return train(recipe).folder


@pytest.mark.parametrize("kind", KINDS)
def test_its_codes_are_loaded_as_they_lie_in_the_files(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = quantized_copy(tiny_base, tmp_path / "base", **KINDS[kind])
    info = inspect_base(str(folder))
    assert (info.quantize, info.is_prequantized, info.parameters) == (kind, True, inspect_base(str(tiny_base)).parameters)
    model = load_base(info)
    layers = dict(four_bit_layers(model))
    assert len(layers) == 14 and all(layer.compute_dtype == torch.float32 for layer in layers.values())
    assert model(IDS).logits.dtype == torch.float32
    found, files = parameter_fingerprints(model), FourBitFiles(folder)
    assert found.keys() == {tensor.name for tensor in files}
    for tensor in files:
        is_coded = tensor.name in files.parts
        stored = files.codes(tensor.name, torch.float32) if is_coded else files.read(tensor.name).float()
        assert found[tensor.name] == parameter_fingerprint(stored), tensor.name
        assert is_coded == (tensor.name.removesuffix(".weight") in layers)


def test_codes_made_before_are_those_made_while_loading(tiny_base: Path, tmp_path: Path) -> None:
    before = load_base(inspect_base(str(quantized_copy(tiny_base, tmp_path / "base", **KINDS["nf4"])), dtype="bfloat16"))
    now = load_base(inspect_base(str(tiny_base), quantize="nf4", dtype="bfloat16"))
    assert parameter_fingerprints(before) == parameter_fingerprints(now)


@pytest.mark.slow
def test_a_run_on_it_is_merged_onto_what_its_codes_stand_for(dynamic_run: Path, dynamic: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    record = json.loads((dynamic_run / "base.json").read_text())
    assert (record["quantize"], record["prequantized"], len(record["quantized_layers"])) == ("nf4", True, 14 - 5)
    verdict = merge(dynamic_run, tmp_path / "out", dtype="fp32")
    assert verdict.describe() == "serves what was trained"
    base = load_base(inspect_base(str(dynamic))).eval()
    with torch.no_grad():
        before = base(IDS).logits.clone()
        trained = PeftModel.from_pretrained(base, dynamic_run).eval()(IDS).logits
        served = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    assert (served - trained).abs().max() < 2e-5 < 1e-3 < (trained - before).abs().max()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.slow
def test_codes_say_how_the_base_of_a_foreign_adapter_is_loaded(
    dynamic_run: Path, dynamic: Path, tiny_base: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    """As in Unsloth's adapters, which name a `…-bnb-4bit` base; on another base that is to be said."""
    adapter, data = tmp_path / "adapter", str(tiny_pairs / "test.jsonl")
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(dynamic_run / name, adapter)
    done = merge(adapter, tmp_path / "out", base=str(dynamic), data=data, pairs=2)
    assert done.plan.source.facts.quantize == "nf4"
    assert done.describe() == "serves the adapter on this base; nothing shows that it is the one of training"
    with pytest.raises(UsageError, match="nothing there says how its base was loaded in training"):
        merge(adapter, tmp_path / "other", base=str(tiny_base), data=data, pairs=2)


def test_without_pairs_its_tensors_are_still_those_of_training(dynamic_run: Path, dynamic: Path, tmp_path: Path) -> None:
    assert "in its files" in merge(dynamic_run, tmp_path / "out", pairs=0).describe()
    other = shutil.copytree(dynamic, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][5] ^= 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight is not what the adapter was trained on"):
        merge(dynamic_run, tmp_path / "wrong", base=str(other), pairs=0)


@pytest.mark.slow
def test_the_original_weights_are_those_of_a_base_that_has_them(
    dynamic_run: Path, tiny_base: Path, warned: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"holds codes, not the weights they were made of; name the base that has those"):
        merge(dynamic_run, tmp_path / "out", onto="original")
    with pytest.raises(ModelError, match=r"is not what was trained on, which were the codes of .*dynamic"):
        merge(dynamic_run, tmp_path / "out", base=str(tiny_base))
    verdict = merge(dynamic_run, tmp_path / "out", onto="original", base=str(tiny_base))
    assert verdict.describe() == "keeps the update, on the original weights: not the model that was trained"
    assert verdict.change is not None
    assert any("nothing shows that the codes of" in line for line in warned)


def test_asking_for_another_quantization_of_codes_is_refused(dynamic: Path) -> None:
    with pytest.raises(ModelError, match=r"comes quantized \(nf4\), and is trained on these very codes"):
        inspect_base(str(dynamic), quantize="none")


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"quant_method": "bitsandbytes", "_load_in_8bit": True}])
def test_settings_of_older_versions_are_understood(settings: dict[str, Any], dynamic: Path, tmp_path: Path) -> None:
    base = shutil.copytree(dynamic, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert inspect_base(str(base)).quantize == ("fp4-single" if "load_in_4bit" in settings else "int8")


def test_what_quantizing_did_to_it_is_not_claimed_to_be_nothing(dynamic: Path, tiny_recipe: Callable, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", f"model.base={dynamic}", "model.quantize=auto")
    with pytest.raises(UsageError, match="comes as nf4 codes, and nothing here has the weights"):
        audit(recipe, with_quantization_error=True)


def test_a_file_of_codes_that_is_cut_off_later_is_a_line(dynamic: Path, tmp_path: Path) -> None:
    base = shutil.copytree(dynamic, tmp_path / "base")
    files = FourBitFiles(base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors: .* cannot be read"):
        [files.read(name) for name in files.parts]

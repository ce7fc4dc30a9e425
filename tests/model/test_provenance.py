"""What a run writes down of its base, and what of a base can change without being noticed: nothing."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pe_dpo.model.adapter import attach_adapter
from pe_dpo.model.base import inspect_base, load_base, load_tokenizer
from pe_dpo.model.fingerprint import file_fingerprints, parameter_fingerprint, parameter_fingerprints
from pe_dpo.model.provenance import base_record, changed, changed_files, template_fingerprint, tokenizer_fingerprint
from pe_dpo.model.quantization import dequantized, four_bit_layers, quantized_parameter


@pytest.fixture
def own_base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base to change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def record(base: Path, quantize: str = "nf4") -> dict[str, Any]:
    facts = inspect_base(str(base), quantize=quantize)
    return json.loads(json.dumps(base_record(load_base(facts), facts, load_tokenizer(str(base)))))


def test_a_record_has_each_file_and_each_parameter_once(own_base: Path) -> None:
    found = record(own_base)
    assert found["files"] == {
        name: hashlib.sha256((own_base / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    assert found["tensors"].keys() == load_file(own_base / "model.safetensors").keys()
    assert len(found["quantized_layers"]) == 14
    assert (found["quantize"], found["dtype"], found["device"]) == ("nf4", "float32", "cpu")


def test_an_adapter_on_the_base_changes_nothing_of_the_record(own_base: Path) -> None:
    facts = inspect_base(str(own_base), quantize="nf4")
    model, tokenizer = load_base(facts), load_tokenizer(str(own_base))
    bare = base_record(model, facts, tokenizer)
    assert base_record(attach_adapter(model, rank=4, alpha=8), facts, tokenizer) == bare


@pytest.mark.parametrize("quantize", ["nf4", "nf4-single", "none"])
def test_another_weight_is_noticed_and_named(own_base: Path, quantize: str) -> None:
    before = record(own_base, quantize)
    weights = load_file(own_base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(weights, own_base / "model.safetensors", metadata={"format": "pt"})
    after = parameter_fingerprints(load_base(inspect_base(str(own_base), quantize=quantize)))
    assert changed(before["tensors"], after) == ["model.layers.1.mlp.up_proj.weight"]
    assert changed_files(before, own_base) == ["model.safetensors"]


def test_a_change_too_small_for_four_bits_is_noticed_in_the_files(own_base: Path) -> None:
    before = record(own_base)
    weights = load_file(own_base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] *= 1 + 2e-7
    save_file(weights, own_base / "model.safetensors", metadata={"format": "pt"})
    after = parameter_fingerprints(load_base(inspect_base(str(own_base), quantize="nf4")))
    assert changed(before["tensors"], after) == []
    assert changed_files(before, own_base) == ["model.safetensors"]


def test_another_quantization_is_noticed_in_every_quantized_layer(own_base: Path) -> None:
    before = record(own_base, "nf4")
    assert changed(before["tensors"], record(own_base, "nf4-single")["tensors"]) == [
        f"{name}.weight" for name in sorted(before["quantized_layers"])
    ]


def test_a_large_file_of_the_hubs_cache_is_known_by_its_name_only_where_names_are_believed(tmp_path: Path) -> None:
    """The cache links a file to a blob that is called after its sha256."""
    (tmp_path / ("a" * 64)).write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / ("a" * 64))
    assert file_fingerprints(tmp_path, ["model.safetensors"], believe_names=True) == {"model.safetensors": "a" * 64}
    true = hashlib.sha256(b"weights").hexdigest()
    assert file_fingerprints(tmp_path, ["model.safetensors"]) == {"model.safetensors": true}


def test_a_tokenizer_is_known_by_what_it_does_to_text_and_not_by_how_it_was_last_used(tiny_base: Path) -> None:
    fresh, used = load_tokenizer(str(tiny_base)), load_tokenizer(str(tiny_base))
    used(["a", "longer"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(used) == tokenizer_fingerprint(fresh)
    used.add_tokens(["new"])
    assert tokenizer_fingerprint(used) != tokenizer_fingerprint(fresh)
    assert template_fingerprint(used) == template_fingerprint(fresh)
    used.chat_template += " "
    assert template_fingerprint(used) != template_fingerprint(fresh)


@pytest.mark.parametrize("quantize", ["nf4", "nf4-single"])
def test_a_weight_is_quantized_as_loading_quantizes_it(tiny_base: Path, quantize: str) -> None:
    """Codes, scales and their scales to the bit; else a merge would add to other values than were trained on."""
    layers = dict(four_bit_layers(load_base(inspect_base(str(tiny_base), quantize=quantize))))
    weights = load_file(tiny_base / "model.safetensors")
    assert len(layers) == 14
    for name, layer in layers.items():
        ours = quantized_parameter(weights[f"{name}.weight"], quantize, device="cpu")
        assert parameter_fingerprint(ours) == parameter_fingerprint(layer.weight)


def test_four_bit_codes_stand_for_values_between_those_of_bfloat16(tiny_base: Path) -> None:
    """code × scale, multiplied here by hand from bitsandbytes' own table."""
    weight = load_file(tiny_base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    parameter = quantized_parameter(weight, "nf4-single", device="cpu")
    packed = parameter.data.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1).long()
    state = parameter.quant_state
    by_hand = (state.code[codes].view(-1, 64) * state.absmax[:, None]).view(weight.shape)
    values = dequantized(parameter)
    assert torch.equal(values, by_hand)
    assert not torch.equal(values.bfloat16().float(), values)
    assert state.dtype == torch.float32 and parameter.quant_state is state

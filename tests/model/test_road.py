"""What `check` knows of the whole way, from configuration and headers: sizes as loading makes them, and dead ends."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter_targets import find_targets
from pe_dpo.model.base import empty_model, inspect_base, load_base
from pe_dpo.model.road import check_can_be_merged, files_here, loaded_size

SIZES = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def save(folder: Path, name: str) -> Path:
    import transformers as hf

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = {
        "llama": lambda: hf.LlamaConfig(**SIZES, intermediate_size=256),
        "gpt2": lambda: hf.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=2, n_positions=64),
        "mixture": lambda: hf.Qwen3MoeConfig(**SIZES, intermediate_size=256, head_dim=32, **experts),
    }[name]()
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def bytes_of(model: Any) -> int:
    """Weights as they lie in memory, codes with their blocks' scales."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        scales = {} if state is None else state.as_dict(packed=True)
        total += parameter.nbytes + sum(tensor.nbytes for name, tensor in scales.items() if name.endswith("absmax"))
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixture"])
@pytest.mark.parametrize("quantize", ["nf4", "fp4-single", "int8", "none"])
def test_sizes_are_those_of_the_loaded_base(name: str, quantize: Any, tmp_path: Path) -> None:
    info = inspect_base(str(save(tmp_path / "base", name)), quantize=quantize, dtype="bfloat16")
    size, model = loaded_size(info, files_here(info)), load_base(info)
    codes = [parameter for parameter in model.parameters() if parameter.dtype in (torch.uint8, torch.int8)]
    per_byte = 2 if quantize.endswith(("4", "single")) else 1
    assert size.coded == per_byte * sum(parameter.numel() for parameter in codes)
    assert size.bytes == pytest.approx(bytes_of(model), rel=1e-3)
    assert size.parameters == info.parameters


def test_experts_left_in_16_bits_are_told(tmp_path: Path) -> None:
    base = str(save(tmp_path / "base", "mixture"))
    whole, attention = (loaded_size(inspect_base(base, quantize="nf4", quantize_experts=one)) for one in (True, False))
    experts = 2 * 4 * (2 * 64 * 128 + 64 * 128)
    assert (whole.experts, whole.left) == (experts, 2 * 4 * 128), "the routers"
    assert (attention.experts, attention.left) == (0, experts + 2 * 4 * 128)


def test_a_base_of_which_no_codes_are_made_is_told(tmp_path: Path) -> None:
    """bitsandbytes takes torch's own linear layers, and Falcon's are of a class of its own."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    size = loaded_size(inspect_base(str(tmp_path), quantize="nf4"))
    assert (size.coded, size.left) == (0, 2 * (64 * (64 + 2 * 16) + 64 * 64 + 2 * 4 * 64 * 64)), "multi-query attention and MLP"


@pytest.mark.parametrize("kind", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_base_that_comes_as_codes_is_as_large_as_its_files_say(kind: Any, tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    skip = ["lm_head", "model.layers.1.mlp"]
    how = BitsAndBytesConfig(**kind, llm_int8_skip_modules=skip)
    AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=how).save_pretrained(tmp_path / "base")
    info = inspect_base(str(tmp_path / "base"))
    assert loaded_size(info, files_here(info)).bytes == pytest.approx(bytes_of(load_base(info)), rel=1e-3)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "gate_proj", "up_proj", "down_proj"], "these are experts or routers, .*leave them out"),
        ("all-linear", None),
    ],
)
def test_an_update_that_could_not_be_merged_is_refused(targets: Any, message: str | None, tmp_path: Path) -> None:
    info = inspect_base(str(save(tmp_path / "base", "mixture")), quantize="nf4")
    model = empty_model(info.base, info.config)
    found = find_targets(model, targets)
    if message is None:
        check_can_be_merged(info, model, found, files_here(info))
        assert {path.rpartition(".")[2] for path in found.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    else:
        with pytest.raises(ModelError, match=message):
            check_can_be_merged(info, model, found, files_here(info))


def test_a_layer_that_the_files_do_not_have_is_named(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.other.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    info = inspect_base(str(base))
    model = empty_model(info.base, info.config)
    with pytest.raises(ModelError, match=r"does not have model\.layers\.1\.mlp\.up_proj\.weight"):
        check_can_be_merged(info, model, find_targets(model, "all-linear"), files_here(info))


def test_files_that_are_not_here_stop_nothing(monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    info = inspect_base(str(tiny_base))._replace(base="somebody/a-model-that-is-not-here")
    assert files_here(info) is None

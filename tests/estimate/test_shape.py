"""The weights of a base as config.json gives them, against transformers' own model of that configuration."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from pe_dpo.errors import ModelError
from pe_dpo.estimate.bases import find_config, kept_bases
from pe_dpo.estimate.shape import FAMILIES, shape_of
from pe_dpo.model.adapter_targets import find_targets
from pe_dpo.model.base import BaseInfo, empty_model
from pe_dpo.model.road import loaded_size
from pe_dpo.quantizations import bytes_per_weight

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32}, "gemma": {"head_dim": 32}, "gemma2": {"head_dim": 32}, "gemma3_text": {"head_dim": 32},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4},
    "qwen3_5_text": {"head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                     "linear_num_value_heads": 4},
}  # fmt: skip
OTHERS = {
    "gemma3": {
        "text_config": {**SIZES, "head_dim": 32},
        "vision_config": {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 28, "patch_size": 14},
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320},
}  # fmt: skip
"""Of images and text, and of kinds that are not counted from the configuration."""


def config_of(kind: str, **more: Any) -> Any:
    return AutoConfig.for_model(kind, **(OTHERS[kind] if kind in OTHERS else {**SIZES, **OWN.get(kind, {})}), **more)


@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
def test_parameters_and_codes_are_those_of_the_model_that_transformers_builds(kind: str) -> None:
    config = config_of(kind)
    shape = shape_of("x", config)
    for quantize in ("nf4", "int8"):
        found = loaded_size(BaseInfo("x", None, config, 0, None, quantize, torch.bfloat16))
        assert (shape.parameters, shape.coded(quantize)) == (found.parameters, found.coded)
        in_16_bits = 2 * (shape.parameters - shape.coded(quantize))
        assert round(shape.coded(quantize) * bytes_per_weight(quantize) + in_16_bits) == found.bytes
    assert shape.is_counted is (kind not in ("gpt2", "mamba"))


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3", "qwen3_5_text", "qwen3_moe", "gpt2"])
def test_adapters_go_where_training_puts_them(kind: str) -> None:
    config = config_of(kind)
    shape, model = shape_of("x", config), empty_model("x", config)
    for targets in ("all-linear", "attention"):
        found = [path for weight, _ in shape.adapted(targets) for path in weight.paths]
        assert sorted(found) == sorted(find_targets(model, targets).layers)


def test_names_patterns_and_exclusions_choose_layers() -> None:
    shape = shape_of("x", config_of("llama"))
    chosen = shape.adapted(["q_proj", r"model\.layers\.[01]\.mlp\.up_proj"], exclude=[r"model\.layers\.3\..*"])
    assert [(weight.path.rpartition(".")[2], layers) for weight, layers in chosen] == [("q_proj", 3), ("up_proj", 2)]
    assert [weight.role for weight, _ in shape.adapted(["lm_head", "embed_tokens"])] == ["embedding", "head"]
    with pytest.raises(ModelError, match=r"no layer of llama is left; there are down_proj, gate_proj, k_proj"):
        shape.adapted(["nothing"])


def test_four_bits_leave_experts_if_they_are_told_to() -> None:
    """4 layers with 4 experts of (192 + 96)·64: 294,912 weights."""
    shape = shape_of("x", config_of("mixtral"))
    assert shape.coded("nf4") - shape.coded("nf4", with_experts=False) == 294_912


@pytest.mark.parametrize("base", kept_bases())
def test_kept_sizes_give_the_number_of_parameters_that_the_hub_shows(base: str) -> None:
    """Exactly, norms and biases too; of one the hub's number is not known."""
    found = shape_of(base, find_config(base)[0])
    published = kept_bases()[base]["parameters"]
    assert found.parameters == (4_205_751_296 if published is None else published)
    assert found.is_counted

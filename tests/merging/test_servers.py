"""Which command serves an adapter as it was trained, and why there is none; tests/engines/ runs these with the engines."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import random_adapter

from pe_dpo.merging.servers import Serving, serving_commands, shell_lines
from pe_dpo.model.adapter_files import AdapterFiles
from pe_dpo.model.base import BaseInfo, empty_model, inspect_base

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Could not find a config file:UserWarning",
    "ignore:`lora_bias=True` was passed but the targeted layer:UserWarning",
    "ignore:.*LoRA tensor.* have invalid shape:UserWarning",  # peft 0.21 takes a LoRA bias for a torn matrix
)

NAME = "it's tuned"


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, made_once: Callable[..., Path]) -> Callable[..., AdapterFiles]:
    def make(**settings: Any) -> AdapterFiles:
        name = "-".join(["served", *(f"{key}={value}" for key, value in settings.items())])
        return AdapterFiles(made_once(name, lambda folder: random_adapter(tiny_base, folder, **settings)))

    return make


@pytest.fixture(scope="module")
def served(tiny_base: Path, adapter: Callable[..., AdapterFiles]) -> Callable[..., Serving]:
    """How vLLM serves an adapter on the tiny base, of whose facts some are replaced."""
    facts = inspect_base(str(tiny_base), quantize="none", dtype="bfloat16")
    modules = empty_model(facts.base, facts.config)

    def serve(settings: dict[str, Any] | None = None, /, modules: Any = modules, **replaced: Any) -> Serving:
        (serving,) = serving_commands(adapter(**settings or {}), facts._replace(**replaced), modules, NAME)
        assert serving.engine == "vllm"
        return serving

    return serve


def test_an_adapter_on_a_base_in_16_bits_is_served_with_its_own_tokenizer(served: Callable[..., Serving]) -> None:
    command, remark = served(base="org/base", revision="abc")[1:]
    assert command is not None
    assert shlex.split(command) == [
        *("vllm", "serve", "org/base", "--revision", "abc", "--tokenizer", NAME, "--dtype", "bfloat16"),
        *("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={NAME}"),
    ]
    assert remark == ""


def test_training_in_float32_is_served_in_16_bits_which_is_said(served: Callable[..., Serving]) -> None:
    """vLLM's kernels for adapters take 16 bits alone on a GPU."""
    command, remark = served(dtype=torch.float32)[1:]
    assert command is not None and "--dtype" not in command
    assert remark == "It computes in 16 bits; training computed in float32."


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({"r": 1}, 1), ({"r": 3}, 8), ({"r": 9}, 16), ({"r": 4, "rank_pattern": {"q_proj": 40}}, 64), ({"r": 257}, 320)],
)
def test_the_largest_rank_is_the_next_that_vllm_has(
    settings: dict[str, Any], rank: int, served: Callable[..., Serving]
) -> None:
    command = served(settings).command
    assert command is not None and f"--max-lora-rank {rank} " in command


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 513}, "it takes ranks up to 512, and this has 513"),
        ({"use_dora": True}, "plain LoRA on linear layers alone, and this has DoRA (model.layers.0.mlp.down_proj.weight)"),
        ({"lora_bias": True}, "this has a bias (model.layers.0.mlp.down_proj.bias)"),
        ({"modules_to_save": ["input_layernorm"]}, "this has whole weights (model.layers.0.input_layernorm.weight)"),
        ({"trainable_token_indices": [7, 5]}, "this has trained tokens (model.embed_tokens.weight)"),
        ({"resize": 352}, "this has whole weights (lm_head.weight)"),
        ({"target_modules": ["q_proj", "lm_head"]}, "this has LoRA on embedding or head (lm_head.weight)"),
    ],
)
def test_what_vllm_refuses_is_merged(settings: dict[str, Any], words: str, served: Callable[..., Serving]) -> None:
    command, remark = served(settings)[1:]
    assert command is None
    assert remark.startswith("vLLM cannot serve this adapter: ") and remark.endswith("; merge it (`pe-dpo merge`)")
    assert words in remark


def test_what_cannot_be_merged_either_is_left_to_peft(served: Callable[..., Serving]) -> None:
    command, remark = served({"target_parameters": ["mlp.gate_proj.weight"], "target_modules": []})[1:]
    assert command is None
    assert "nor is there a merge of it (was trained with target_parameters" in remark and remark.endswith("; load it with PEFT")


@pytest.mark.parametrize("quantize", ["nf4-single", "fp4", "fp4-single", "int8"])
def test_no_command_makes_other_codes_than_training_had(quantize: str, served: Callable[..., Serving]) -> None:
    command, remark = served(quantize=quantize)[1:]
    assert command is None
    assert ("`pe-dpo merge --onto original`" in remark) == (quantize == "int8")


def test_the_codes_of_an_nf4_run_are_made_by_a_plugin_that_is_named(served: Callable[..., Serving]) -> None:
    command, remark = served(quantize="nf4")[1:]
    assert command is not None and "--dtype bfloat16 --quantization bitsandbytes --enable-lora" in command
    assert "`pip install vllm-bnb-plugin`" in remark


@pytest.mark.parametrize("quantize", ["nf4", "nf4-single", "fp4"])
def test_codes_that_lie_in_the_files_need_no_flag(quantize: str, served: Callable[..., Serving]) -> None:
    command, remark = served(quantize=quantize, is_prequantized=True)[1:]
    assert command is not None and "--quantization" not in command
    assert "`pip install vllm-bnb-plugin`" in remark


def test_codes_of_files_in_float32_are_not_quite_those_of_training(served: Callable[..., Serving]) -> None:
    """The tiny base's files are in float32; training made codes of what is left of them in bfloat16."""
    assert "the codes of the float32 in the base's files, training made them of bfloat16" in served(quantize="nf4").remark
    assert "in the base's files" not in served(quantize="nf4", dtype=torch.float32).remark


def built(name: str, **settings: Any) -> tuple[Any, BaseInfo]:
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, **settings)
    return empty_model(name, config), BaseInfo(name, None, config, 0, None, "none", torch.bfloat16)


def test_a_base_that_vllm_would_build_of_other_names_is_not_named(served: Callable[..., Serving]) -> None:
    """Trained is the language model of a multimodal base; vLLM's whole one has its layers under another prefix (vllm#48019)."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
            "num_key_value_heads": 1, "head_dim": 16, "layer_types": ["full_attention"]}  # fmt: skip
    modules, facts = built("qwen3_5", text_config=text, architectures=["Qwen3_5ForConditionalGeneration"])
    assert type(modules).__name__ == "Qwen3_5ForCausalLM"
    command, remark = served(modules=modules, config=facts.config)[1:]
    assert command is None
    assert "load the base as Qwen3_5ForConditionalGeneration" in remark and "answer as the base without an error" in remark
    facts.config.architectures = ["Qwen3_5ForCausalLM"]
    assert served(modules=modules, config=facts.config).command is not None


def test_a_class_without_adapters_is_named(served: Callable[..., Serving]) -> None:
    modules, facts = built("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64, architectures=["GPT2LMHeadModel"])
    assert "it takes no adapters on GPT2LMHeadModel" in served(modules=modules, config=facts.config).remark


def test_what_training_left_in_16_bits_vllm_would_make_codes_of(served: Callable[..., Serving]) -> None:
    """Experts lie in parameters that are no linear layers; the weights of out_proj are read past bitsandbytes' layer."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
             "num_key_value_heads": 1, "num_local_experts": 2}  # fmt: skip
    modules, facts = built("mixtral", **small, architectures=["MixtralForCausalLM"])
    in_nf4 = served(modules=modules, config=facts.config, quantize="nf4")
    assert in_nf4.command is None and "it makes 4-bit codes of model.layers.0.mlp." in in_nf4.remark
    assert served(modules=modules, config=facts.config).command is not None


def test_lines_for_a_shell_have_remarks_as_comments() -> None:
    lines = shell_lines([Serving("vllm", None, "no"), Serving("vllm", "vllm serve x", "one " * 30), Serving("vllm", "ls", "")])
    assert [line[:6] for line in lines] == ["# one ", "# one ", "vllm s", "ls"]
    assert max(map(len, lines)) <= 80

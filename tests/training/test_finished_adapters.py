"""Adapters as other tools leave them: started from and laid under as they are, or refused before training with the way out."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import random_adapter

from pe_dpo.errors import ModelError
from pe_dpo.merging.merge import merge
from pe_dpo.model.adapter import attach_adapter, lay_under, save_adapter, start_from_adapter
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.training.preparation import prepare_run

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Could not find a config file:UserWarning",
    "ignore:`lora_bias=True` was passed but the targeted layer:UserWarning",
    "ignore:.*LoRA tensor.* have invalid shape:UserWarning",  # peft 0.21 takes a LoRA bias for a torn matrix
)

BY_DEFAULT = ("adapter.rank=16", "adapter.alpha=32")
"""A start has these of its own."""
IDS = torch.arange(3, 43).view(2, 20)


def make_adapter(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Save a random adapter, and return the logits of the model that it makes of the base."""
    with torch.no_grad():
        logits: torch.Tensor = random_adapter(base, folder, **{"target_modules": ["q_proj"]} | settings)(IDS).logits
    return logits


TAKEN: dict[str, dict[str, Any]] = {
    "a pattern of targets": {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
    "ranks and scalings by pattern, rank-stabilized": {
        **{"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        **{"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}},
    },
    "Unsloth": {"written": {"unsloth_fixed": True, "unsloth_version": None}},
    "ms-swift": {"written": {"lora_dtype": "bfloat16", "lorap_lr_ratio": 16.0}},
    "EVA": {"written": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKEN)
def test_an_adapter_of_another_tool_is_started_from_and_laid_under_as_it_is(
    name: str, tiny_base: Path, make_recipe: Callable, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    adapter = tmp_path / "adapter"
    wanted = make_adapter(tiny_base, adapter, **TAKEN[name])
    for settings in ((f"adapter.start={adapter}", "adapter.reference=adapter", *BY_DEFAULT), (f"adapter.over={adapter}",)):
        prepare_run(make_recipe(*settings))
    started = start_from_adapter(load_base(inspect_base(str(tiny_base))), adapter, reference="adapter").eval()
    over = lay_under(attach_adapter(load_base(inspect_base(str(tiny_base))), rank=2, alpha=4), adapter).eval()
    for number, model in enumerate((started, over)):
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=1e-5)
        save_adapter(model, tmp_path / f"trained-{number}")
    merge(tmp_path / "trained-0", tmp_path / "out", base=str(tiny_base), quantize="none", dtype="fp32", pairs=0)
    with torch.no_grad():
        served = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(served, wanted, rtol=0, atol=1e-5)


MERGED_FIRST: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "is a DoRA adapter"),
    "a trained head": ({"modules_to_save": ["lm_head"]}, r"trains whole modules \(lm_head\)"),
    "added tokens": ({"resize": 352}, r"has values of lm_head\.weight, model\.embed_tokens\.weight besides LoRA \(added"),
    "trained tokens": ({"trainable_token_indices": [5, 7]}, r"has values of model\.embed_tokens\.weight besides LoRA"),
    "LoRA on the head": ({"target_modules": ["q_proj", "lm_head"]}, r"has values of lm_head\.weight besides LoRA"),
}


@pytest.mark.parametrize("name", MERGED_FIRST)
@pytest.mark.parametrize("key", ["start", "over"])
def test_what_is_more_than_an_update_is_merged_into_its_base_first(
    key: str, name: str, tiny_base: Path, make_recipe: Callable, tmp_path: Path
) -> None:
    """Refused before training, naming the command, and the command works: all of the update is in what it writes."""
    config, words = MERGED_FIRST[name]
    adapter = tmp_path / "adapter"
    wanted = make_adapter(tiny_base, adapter, **config)
    reference = ("adapter.reference=adapter", *BY_DEFAULT) if key == "start" else ()
    with pytest.raises(ModelError, match=rf"{words}.*; write it into its base first \(`pe-dpo merge {adapter} -o BASE`\)"):
        prepare_run(make_recipe(f"adapter.{key}={adapter}", *reference))
    if key == "over":
        return
    done = merge(adapter, tmp_path / "BASE", base=str(tiny_base), quantize="none", dtype="fp32", pairs=0)
    assert done.report["mean_kept"] == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        base = load_base(inspect_base(str(tmp_path / "BASE"))).eval()
        torch.testing.assert_close(base(IDS).logits, wanted, rtol=0, atol=1e-5)
    prepare_run(make_recipe(f"model.base={tmp_path / 'BASE'}"))


DEAD_ENDS: dict[str, tuple[dict[str, Any], str]] = {
    "bare parameters": (
        {"target_parameters": ["mlp.gate_proj.weight"], "target_modules": []},
        r"target_parameters = .* which this version cannot merge: it could be trained on, .*with PEFT \(merge_and_unload\)",
    ),
    "replicated layers": (
        {"layer_replication": [[0, 2], [1, 2]]},
        "layer_replication = .* cannot merge: it could be trained on",
    ),
    "a field of another version": ({"written": {"new_thing": 3}}, "has new_thing, which the installed peft does not know: it"),
    "a LoRA bias where the base has none": (
        {"lora_bias": True},
        r"the model has no model\.layers\.0\.self_attn\.q_proj\.bias, which .*that could be trained, not merged",
    ),
    "an initialisation that moves the base": ({"init_lora_weights": "pissa"}, "initialised by pissa, which changed its base"),
}


@pytest.mark.parametrize("name", DEAD_ENDS)
def test_an_adapter_that_could_be_trained_on_and_not_merged_is_refused_before(
    name: str, tiny_base: Path, make_recipe: Callable, tmp_path: Path
) -> None:
    config, words = DEAD_ENDS[name]
    make_adapter(tiny_base, tmp_path / "adapter", **config)
    with pytest.raises(ModelError, match=words):
        prepare_run(make_recipe(f"adapter.start={tmp_path / 'adapter'}", "adapter.reference=adapter", *BY_DEFAULT))


@pytest.mark.slow
def test_a_lora_bias_is_trained_on_where_the_base_has_the_bias(tiny_base: Path, make_recipe: Callable, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    base, adapter = shutil.copytree(tiny_base, tmp_path / "base"), tmp_path / "adapter"
    config = AutoConfig.from_pretrained(tiny_base)
    config.attention_bias = True
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    wanted = make_adapter(base, adapter, lora_bias=True)
    prepare_run(make_recipe(f"model.base={base}", f"adapter.start={adapter}", "adapter.reference=adapter", *BY_DEFAULT))
    model = start_from_adapter(load_base(inspect_base(str(base))), adapter, reference="adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=1e-5)
    save_adapter(model, tmp_path / "trained")
    merge(tmp_path / "trained", tmp_path / "out", base=str(base), quantize="none", dtype="fp32", pairs=0)
    with torch.no_grad():
        served = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(served, wanted, rtol=0, atol=1e-5)
    with pytest.raises(
        ModelError, match=r"q_proj\.bias is not plain LoRA; only that can lie under a new adapter: write it into"
    ):
        prepare_run(make_recipe(f"model.base={base}", f"adapter.over={adapter}"))


def test_an_adapter_to_start_from_that_does_not_fit_is_refused_before_the_base_is_read(
    tiny_base: Path, make_recipe: Callable, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "small")
    make_adapter(tmp_path / "small", tmp_path / "adapter")
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="adapter: does not load onto this base"):
        prepare_run(
            make_recipe(f"model.base={base}", f"adapter.start={tmp_path / 'adapter'}", "adapter.reference=base", *BY_DEFAULT)
        )

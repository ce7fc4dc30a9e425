"""Adapters of every kind that PEFT makes: merged, loaded in plain transformers, and held against PEFT's own forward."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import random_adapter

from pe_dpo.errors import ModelError, PeDpoError
from pe_dpo.merging.adapter_package import package_adapter
from pe_dpo.merging.merge import merge
from pe_dpo.merging.source import open_source

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Could not find a config file:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:`lora_bias=True` was passed but the targeted layer:UserWarning",
    "ignore:.*LoRA tensor.* have invalid shape:UserWarning",  # peft 0.21 takes a LoRA bias for a torn matrix
)

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny base, and the same with tied embeddings, in shards, with biases, and a GPT-2."""
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    root = tmp_path_factory.mktemp("bases")
    tied = AutoConfig.from_pretrained(tiny_base)
    tied.tie_word_embeddings = True
    biased = AutoConfig.from_pretrained(tiny_base)
    biased.attention_bias = biased.mlp_bias = True
    torch.manual_seed(1)
    models = {
        "tied": (LlamaForCausalLM(tied), {}),
        "sharded": (AutoModelForCausalLM.from_pretrained(tiny_base), {"max_shard_size": "60KB"}),
        "biased": (LlamaForCausalLM(biased), {}),
        "gpt2": (GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                            bos_token_id=1, eos_token_id=1)), {}),
    }  # fmt: skip
    found = {"plain": tiny_base}
    for name, (model, saving) in models.items():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(root / name, **saving)
        for path in (*tiny_base.glob("token*"), *tiny_base.glob("*.jinja")):
            shutil.copy(path, root / name)
        found[name] = root / name
    assert len(list(found["sharded"].glob("*.safetensors"))) > 2
    return found


@pytest.fixture(scope="module")
def untouched(bases: dict[str, Path]) -> Callable[[str], torch.Tensor]:
    """The logits of a base itself, by its name."""
    return cache(lambda name: merged_logits(bases[name]))


def make_adapter(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Save a random adapter, and return the logits of the model that it makes of the base."""
    with torch.no_grad():
        logits: torch.Tensor = random_adapter(base, folder, **settings)(IDS).logits
    return logits


def merged_logits(folder: Path) -> torch.Tensor:
    """What plain transformers makes of a merged folder."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    return logits


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain LoRA": ("plain", {}),
    "several shards": ("sharded", {}),
    "tied embeddings, left alone": ("tied", {}),
    "rsLoRA": ("plain", {"use_rslora": True}),
    "rank and alpha patterns": (
        "plain",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}},
    ),
    "patterns with rsLoRA": ("plain", {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "DoRA": ("plain", {"use_dora": True}),
    "DoRA with rsLoRA": ("sharded", {"use_dora": True, "use_rslora": True}),
    "a LoRA bias": ("biased", {"lora_bias": True}),
    "trained biases": ("biased", {"bias": "all"}),
    "biases of adapted layers": ("biased", {"bias": "lora_only"}),
    "a trained head": ("plain", {"modules_to_save": ["lm_head"]}),
    "a trained embedding": ("plain", {"modules_to_save": ["embed_tokens"]}),
    "trained norms": ("plain", {"modules_to_save": ["input_layernorm"]}),
    "LoRA on the head": ("plain", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on the embedding": ("plain", {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on a tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on a tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on both of a tied pair": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "a trained tied head": ("tied", {"modules_to_save": ["lm_head"]}),
    "a trained tied embedding": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "both of a tied pair trained": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a tied pair trained as one": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "a tied head that goes along": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "a resized vocabulary": ("plain", {"resize": 352}),
    "a resized tied vocabulary": ("tied", {"resize": 352}),
    "a resized vocabulary, its head trained": ("plain", {"resize": 352, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "trained tokens": ("plain", {"trainable_token_indices": [7, 5]}),
    "trained tokens of a tied pair": ("tied", {"trainable_token_indices": [5, 7]}),
    "other tokens of embedding and head": ("plain", {"trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [3]}}),
    "other tokens of a tied pair": ("tied", {"trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [3]}}),
    "trained tokens of a tied head": ("tied", {"trainable_token_indices": {"lm_head": [5]}}),
    "added and trained tokens": ("tied", {"resize": 352, "trainable_token_indices": [5, 340]}),
    "transposed layers": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merge_computes_what_peft_computes(
    name: str, bases: dict[str, Path], untouched: Callable[[str], torch.Tensor], tmp_path: Path
) -> None:
    base, config = ADAPTERS[name]
    wanted = make_adapter(bases[base], tmp_path / "adapter", **config)
    merge(tmp_path / "adapter", tmp_path / "out", base=str(bases[base]), quantize="none", dtype="fp32", pairs=0)
    found = merged_logits(tmp_path / "out")
    assert (found - wanted).abs().max() < 2e-5
    assert (wanted[..., :320] - untouched(base)).abs().max() > 1e-2, "an adapter that does nothing shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        *[("plain LoRA", "nf4"), ("DoRA", "nf4"), ("a LoRA bias", "nf4"), ("a trained tied head", "nf4")],
        *[("LoRA on a tied embedding", "nf4"), ("a resized tied vocabulary", "none"), ("DoRA", "none")],
    ],
)
def test_special_adapters_pass_the_verification_on_pairs(
    name: str, quantize: str, bases: dict[str, Path], tiny_pairs: Path, tmp_path: Path
) -> None:
    """Against PEFT on the base as loaded, for the rest of the way: bfloat16 files, quantized layers, held-out pairs."""
    base, config = ADAPTERS[name]
    make_adapter(bases[base], tmp_path / "adapter", **config)
    done = merge(
        tmp_path / "adapter", tmp_path / "out", base=str(bases[base]), quantize=quantize, dtype="bf16",
        data=str(tiny_pairs / "test.jsonl"), pairs=3,
    )  # fmt: skip
    assert done.faults == []
    assert done.held_out is not None and done.held_out.relative_kl < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "config", "tied", "vocabulary"),
    [
        ("tied", {}, True, 320),
        ("tied", {"target_modules": ["lm_head"]}, False, 320),
        ("tied", {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, True, 320),
        ("tied", {"resize": 352}, True, 352),
        ("plain", {"resize": 352}, False, 352),
    ],
)
def test_the_configuration_says_what_the_weights_are(
    base: str, config: dict[str, Any], tied: bool, vocabulary: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    make_adapter(bases[base], tmp_path / "adapter", **config)
    merge(tmp_path / "adapter", tmp_path / "out", base=str(bases[base]), quantize="none", pairs=0)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["vocab_size"]) == (tied, vocabulary)
    assert "quantization_config" not in written


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"init_lora_weights": "pissa"}, "changed its base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.gate_proj.weight"], "target_modules": []}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_reason(
    config: dict[str, Any], words: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    make_adapter(bases["plain"], tmp_path / "adapter", **config)
    with pytest.raises(PeDpoError, match=words):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(bases["plain"]), quantize="none", pairs=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


UNMERGED: dict[str, dict[str, Any]] = {
    "trained parameters": {"target_parameters": ["mlp.gate_proj.weight"], "target_modules": []},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "an activated adapter": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
    "a LoRA bias where the base has none": {"lora_bias": True},
    "DoRA": {"use_dora": True},
    "added tokens": {"resize": 352},
    "plain LoRA": {},
}


@pytest.mark.parametrize("name", UNMERGED)
def test_what_peft_loads_is_packaged_for_it(name: str, bases: dict[str, Path], tmp_path: Path, warned: list[str]) -> None:
    """Also what cannot be merged, whose refusal says so; and servers are only named where they load it."""
    wanted = make_adapter(bases["plain"], tmp_path / "adapter", **UNMERGED[name])
    with open_source(tmp_path / "adapter", base=str(bases["plain"]), quantize="none", pairs=0) as source:
        (serving,), _ = package_adapter(source, tmp_path / "out")
    lines = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    places = {".": tmp_path / "out", bases["plain"].name: bases["plain"]}
    for named, place in places.items():
        lines = lines.replace(repr(named), repr(str(place)))
    exec(lines, found)
    with torch.no_grad():
        assert torch.equal(found["model"].eval()(IDS).logits, wanted)
    is_plain = name == "plain LoRA"
    assert (serving.command is not None) == is_plain
    assert any("vLLM cannot serve this adapter" in line for line in warned) != is_plain


def test_an_adapter_that_took_something_out_of_its_base_is_not_packaged(bases: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(bases["plain"], tmp_path / "adapter", init_lora_weights="pissa")
    with (
        open_source(tmp_path / "adapter", base=str(bases["plain"]), quantize="none", pairs=0) as source,
        pytest.raises(ModelError, match=r"initialised by pissa, which changed its base; save it .*makes plain LoRA of it"),
    ):
        package_adapter(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (
            "unsloth/llama-3-8b-bnb-4bit",
            r"; its adapter_config\.json names unsloth/.*bnb-4bit, whose codes may stand for other",
        ),
        ("somewhere/else", r"; its adapter_config\.json names somewhere/else$"),
        (None, "quantize none$"),
    ],
)
@pytest.mark.slow
def test_nothing_shows_the_base_of_an_adapter_that_was_not_trained_here(
    named: str | None, words: str, bases: dict[str, Path], tiny_pairs: Path, tmp_path: Path, warned: list[str]
) -> None:
    """Said before any verdict, and in it: the merge is right, and on which base the adapter was trained is another matter."""
    make_adapter(bases["plain"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
    with open_source(tmp_path / "adapter", base=str(bases["plain"]), quantize="none", pairs=0):
        (line,) = warned
    assert re.search(
        rf"^warning: no base\.json .*: nothing can show that {re.escape(str(bases['plain']))} is the base .*{words}", line
    )
    done = merge(
        tmp_path / "adapter", tmp_path / "out", base=str(bases["plain"]), quantize="none", pairs=2,
        data=str(tiny_pairs / "test.jsonl"),
    )  # fmt: skip
    assert done.describe() == "serves the adapter on this base; nothing shows that it is the one of training"
    assert done.report["mean_kept"] == pytest.approx(1, abs=0.01)
    assert len(warned) == 2


@pytest.fixture
def stacked(bases: dict[str, Path], tmp_path: Path) -> Callable[[], torch.Tensor]:
    """Two adapters saved as `sft` and `dpo`, of other targets, ranks and scalings; PEFT's logits with both on."""
    make_adapter(bases["plain"], tmp_path / "sft", r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj"])
    make_adapter(bases["plain"], tmp_path / "dpo", seed=1, alpha_pattern={"q_proj": 7}, rank_pattern={"down_proj": 3})

    def logits() -> torch.Tensor:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(bases["plain"])
        model = PeftModel.from_pretrained(base, tmp_path / "sft", adapter_name="sft")
        model.load_adapter(tmp_path / "dpo", adapter_name="dpo")
        model.base_model.set_adapter(["sft", "dpo"])
        with torch.no_grad():
            found: torch.Tensor = model.eval()(IDS).logits
        return found

    return logits


@pytest.mark.slow
def test_two_adapters_become_one_for_servers_that_load_only_one(
    stacked: Callable[[], torch.Tensor], bases: dict[str, Path], tiny_pairs: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with open_source(
        tmp_path / "dpo", sft=tmp_path / "sft", base=str(bases["plain"]), quantize="none",
        data=str(tiny_pairs / "test.jsonl"), pairs=4,
    ) as source:  # fmt: skip
        _, held_out = package_adapter(source, tmp_path / "one")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["plain"]), tmp_path / "one")
    with torch.no_grad():
        assert (model.eval()(IDS).logits - stacked()).abs().max() < 2e-5
    assert held_out is not None and held_out.shift_kept == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_two_adapters_merge_into_one_model(
    stacked: Callable[[], torch.Tensor], bases: dict[str, Path], tiny_pairs: Path, tmp_path: Path
) -> None:
    done = merge(
        tmp_path / "dpo", tmp_path / "out", sft=tmp_path / "sft", base=str(bases["plain"]), quantize="none", dtype="fp32",
        data=str(tiny_pairs / "test.jsonl"), pairs=4,
    )  # fmt: skip
    assert (merged_logits(tmp_path / "out") - stacked()).abs().max() < 2e-5
    assert done.faults == []


def test_only_plain_lora_can_be_made_one_with_another(bases: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(bases["plain"], tmp_path / "sft", use_dora=True)
    make_adapter(bases["plain"], tmp_path / "dpo")
    with pytest.raises(ModelError, match="is not plain LoRA"):
        merge(tmp_path / "dpo", tmp_path / "out", sft=tmp_path / "sft", base=str(bases["plain"]), quantize="none", pairs=0)


def test_an_adapter_travels_with_the_recipe_of_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(bases["plain"], tmp_path / "adapter", r=12)
    with open_source(tmp_path / "adapter", base=str(bases["plain"]), quantize="nf4-single", pairs=0) as source:
        (serving,), _ = package_adapter(source, tmp_path / "out")
    saved = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert saved == (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert serving.command is None and "nf4 with double quantization, and training had nf4-single" in serving.remark
    lines = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    places = {".": tmp_path / "out", bases["plain"].name: bases["plain"]}
    for named, place in places.items():
        lines = lines.replace(repr(named), repr(str(place)))
    exec(lines, found)
    layer = found["model"].base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == ("nf4", False)

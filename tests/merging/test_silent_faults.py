"""Merges that are wrong without an error: each passed a check once, and none may again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pe_dpo.errors import MergeRefused, ModelError, UsageError
from pe_dpo.merging.merge import merge
from pe_dpo.model.adapter_files import AdapterFiles
from pe_dpo.training.train import train


@pytest.fixture(scope="module")
def trained(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on nf4, long enough that its shift stands out of rounding."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_recipe(folder, "model.quantize=nf4", "train.epochs=4", "train.learning_rate=2.0e-3"))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.slow
def test_the_run_merges_as_it_is(run: Path, tmp_path: Path) -> None:
    done = merge(run, tmp_path / "out", pairs=9, dtype="bf16")
    assert done.report["verdict"] == "serves what was trained"
    assert done.held_out is not None and done.held_out.shift_kept == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_that_was_trained_in_bfloat16_is_not_doubted_for_its_arithmetic(
    dtype: Any, tiny_recipe: Callable, tmp_path: Path
) -> None:
    """Trained and merged model round differently in 16 bits; both are computed in float32 to be compared."""
    settings = ("model.quantize=nf4", "model.dtype=bfloat16", "train.max_steps=4", "train.learning_rate=5.0e-4")
    train(tiny_recipe(tmp_path / "run", *settings))
    done = merge(tmp_path / "run", tmp_path / "out", pairs=9, dtype=dtype)
    assert done.report["computed_in"] == "float32"
    assert done.report["verdict"] == "serves what was trained"


@pytest.mark.slow
@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_a_wrong_scale_is_refused_by_the_pairs(
    factor: float, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of each tensor takes the same scale, and cannot see it; `test_merge_failures` has half and twice the scale."""
    right = AdapterFiles._scaling
    monkeypatch.setattr(AdapterFiles, "_scaling", lambda self, module: factor * right(self, module))
    with pytest.raises(MergeRefused, match=r"of the preference shift kept|changes anything"):
        merge(run, tmp_path / "out", pairs=9, dtype="bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_alpha_written_into_a_finished_run_is_refused(run: Path, tmp_path: Path) -> None:
    """Reference, trained and merged model would all be read with it, and agree."""
    path = run / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 32}))
    with pytest.raises(ModelError, match=r"adapter_config\.json: is not what training wrote"):
        merge(run, tmp_path / "out", pairs=9)


@pytest.mark.slow
def test_another_name_for_the_base_in_a_finished_run_is_none_of_the_adapters_business(run: Path, tmp_path: Path) -> None:
    path = run / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere/moved"}))
    assert merge(run, tmp_path / "out", pairs=0).faults == []


def test_the_adapter_that_a_run_started_from_is_not_added_a_second_time(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="that is in it already; leave `sft` out"):
        merge(run, tmp_path / "out", sft=run, pairs=9)


def test_how_a_run_was_quantized_cannot_be_said_otherwise(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"was trained on nf4, as base\.json says"):
        merge(run, tmp_path / "out", quantize="none", pairs=0)


@pytest.mark.parametrize("place", ["reference", "deeper"])
def test_the_merged_model_does_not_go_into_the_run(place: str, run: Path) -> None:
    with pytest.raises(UsageError, match="which is to be merged; choose another output"):
        merge(run, run / place, pairs=0)


@pytest.mark.slow
def test_onto_the_original_is_not_called_what_was_trained(run: Path, tmp_path: Path) -> None:
    for pairs in (0, 9):
        done = merge(run, tmp_path / f"out{pairs}", onto="original", pairs=pairs)
        assert done.report["verdict"] == "keeps the update, on the original weights: not the model that was trained"


# ---------------------------------------------------------------- bases and adapters from elsewhere


def save_adapter(base: Path, folder: Path, *, size: float = 0.1, **config: Any) -> None:
    """A PEFT adapter whose every trained tensor is moved by noise of a size."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(loaded, LoraConfig(r=4, target_modules=["q_proj"], **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    model.save_pretrained(folder)


def as_bfloat16(base: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder)
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_small_change_of_a_whole_module_is_kept_too(tiny_base: Path, tmp_path: Path) -> None:
    """Most of it is below half a step of bfloat16: nearest would put the base's own head back."""
    base = as_bfloat16(tiny_base, tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", size=1e-4, modules_to_save=["lm_head"])
    done = merge(tmp_path / "adapter", tmp_path / "out", base=str(base), quantize="none", dtype="bf16", pairs=0)
    head = next(tensor for tensor in done.tensors if tensor.name == "lm_head.weight")
    assert head.kept == pytest.approx(1, abs=0.1)
    assert head.rounding == "stochastic on the grid"


def test_an_update_of_zeros_has_no_relative_size_and_a_report(tiny_base: Path, tmp_path: Path) -> None:
    """JSON has no infinity; the report of such a merge once could not be written."""
    from transformers import AutoConfig, LlamaForCausalLM

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = AutoConfig.from_pretrained(base)
    config.attention_bias = True
    LlamaForCausalLM(config).save_pretrained(base)  # whose biases are zeros
    save_adapter(base, tmp_path / "adapter", bias="lora_only")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(base), quantize="none", pairs=0)
    tensors = json.loads((tmp_path / "out" / "merge_report.json").read_text(encoding="utf-8"))["tensors"]
    assert {tensor["name"].split(".")[-1] for tensor in tensors if tensor["relative_size"] is None} == {"bias"}


def test_a_head_of_its_own_stays_one_whatever_the_configuration_says_of_tying(tiny_base: Path, tmp_path: Path) -> None:
    """transformers does not tie two tensors that differ; a merge that took the embedding for both would lose the head."""
    from transformers import AutoModelForCausalLM

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    save_adapter(tiny_base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(base), quantize="none", pairs=0)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings is False


def test_a_tensor_that_a_sixteen_bit_base_keeps_in_float32_stays_float32(tiny_base: Path, tmp_path: Path) -> None:
    base = as_bfloat16(tiny_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float() * 1.001
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    save_adapter(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(base), quantize="none", pairs=0)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["model.norm.weight"], weights["model.norm.weight"])
    assert after["lm_head.weight"].dtype == torch.bfloat16


def test_transposed_layers_in_four_bits_are_merged(tiny_base: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    """transformers quantizes them in another order than they lie in the files."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    shape = {"n_positions": 256, "n_embd": 64, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, **shape))
    model.save_pretrained(base)
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    data = str(tiny_pairs / "test.jsonl")
    done = merge(tmp_path / "adapter", tmp_path / "out", base=str(base), quantize="nf4", dtype="fp32", data=data, pairs=2)
    assert done.faults == [] and done.report["mean_kept"] == pytest.approx(1, abs=1e-4)
    assert done.held_out is not None and done.held_out.relative_kl < 1e-6


def test_a_field_that_the_installed_peft_does_not_know_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """PEFT itself drops it with a warning, and with it whatever it did to the weights."""
    save_adapter(tiny_base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_future": True}))
    with pytest.raises(ModelError, match="has use_future, which"):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(tiny_base), quantize="none", pairs=0)


def test_tables_that_no_layer_reads_do_not_stop_a_merge(run: Path, tmp_path: Path) -> None:
    """Old files hold the frequencies of RoPE; transformers passes over them, and hashes of a loaded base know them not."""
    record = json.loads((run / "base.json").read_text())
    base = Path(shutil.copytree(record["id"], tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert merge(run, tmp_path / "out", base=str(base), pairs=0).faults == []

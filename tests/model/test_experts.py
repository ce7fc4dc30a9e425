"""Mixtures of experts: 4-bit codes of the experts too, computed with as a dense copy of their values would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pe_dpo.merging.merge import merge
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.model.layout import Layout
from pe_dpo.model.quantization import dequantized, four_bit_experts, four_bit_layers, values_in
from pe_dpo.training.train import train

IDS = torch.arange(1, 97).view(2, -1)
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


def configs() -> dict[str, Any]:
    import transformers as hf

    return {
        "per expert in the files": hf.Qwen3MoeConfig(**SIZES, num_experts=12, num_experts_per_tok=2, moe_intermediate_size=32),
        "transposed, with biases": hf.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        "renamed in the files": hf.MixtralConfig(**SIZES, num_local_experts=4),
    }


@pytest.fixture(scope="module", params=["per expert in the files", "transposed, with biases", "renamed in the files"])
def mixture(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(configs()[request.param]).save_pretrained(folder)
    for path in (*tiny_base.glob("token*"), *tiny_base.glob("*.jinja"), *tiny_base.glob("generation*")):
        shutil.copy(path, folder)
    return folder


def dense_copy(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Return a model of plain weights with the values that another one's codes stand for."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="grouped_mm").eval()
    for name, layer in four_bit_layers(model):
        dense.get_submodule(name).weight.data = values_in(layer.weight, dtype)
    for name, experts, attribute in four_bit_experts(model):
        path = name.rpartition(".")[0]
        getattr(dense.get_submodule(path), attribute).data = values_in(getattr(experts, attribute), dtype)
    return dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_compute_what_a_dense_copy_of_their_values_computes(mixture: Path, dtype: torch.dtype) -> None:
    model: Any = load_base(inspect_base(str(mixture), quantize="nf4", dtype=str(dtype).removeprefix("torch."))).eval()
    assert len(list(four_bit_experts(model))) == 4
    results = []
    for one in (model, dense_copy(model, mixture, dtype)):
        inputs = one.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = one(inputs_embeds=inputs).logits
        logits.float().square().mean().backward()
        results.append((logits.detach(), inputs.grad))
    (found, slope), (wanted, wanted_slope) = results
    assert torch.equal(found, wanted) and torch.equal(slope, wanted_slope)


def test_the_values_of_experts_are_not_kept_for_the_backward(mixture: Path) -> None:
    model: Any = load_base(inspect_base(str(mixture), quantize="nf4")).eval()
    dense, kept = dense_copy(model, mixture, torch.float32), []
    size = sum(dense.get_parameter(name).nbytes for name, _, _ in four_bit_experts(model))
    for one in (model, dense):
        inputs = one.get_input_embeddings()(IDS).detach().requires_grad_()
        storages: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages, own: set[int] = own) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            one(inputs_embeds=inputs).logits.sum()
        kept.append(sum(storages.values()))
    assert kept[1] - kept[0] > 0.9 * size


def test_files_and_modules_are_each_made_of_the_other(mixture: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tensors = AutoModelForCausalLM.from_pretrained(mixture), load_file(mixture / "model.safetensors")
    layout, held = Layout(model, tensors), model.state_dict()
    assert set(layout.module_of) == set(tensors) and set(layout.module_of.values()) == set(held)
    for name, tensor in held.items():
        if not layout.is_assembled(name):
            assert torch.equal(tensors[layout.files_of(name)[0]], tensor), name
            continue
        assert torch.equal(layout.assemble(name, tensors.__getitem__), tensor), name
        apart = layout.take_apart(name, tensor)
        assert apart.keys() == set(layout.files_of(name))
        assert all(torch.equal(part, tensors[part_name]) for part_name, part in apart.items())


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [9, 0])
def test_a_run_on_4_bit_experts_is_merged_onto_their_values(
    mixture: Path, pairs: int, tiny_recipe: Callable, tmp_path: Path
) -> None:
    settings = (f"model.base={mixture}", "model.quantize=nf4", "adapter.targets=[q_proj, v_proj]", "train.learning_rate=3.0e-3")
    run = train(tiny_recipe(tmp_path / "run", *settings, "train.max_steps=2")).folder
    record = json.loads((run / "base.json").read_text())
    assert len([name for name in record["quantized_layers"] if "experts" in name]) == 4
    verdict = merge(run, tmp_path / "out", dtype="fp32", pairs=pairs)
    assert not verdict.faults
    model: Any = load_base(inspect_base(str(mixture), quantize="nf4"))
    merged = load_base(inspect_base(str(tmp_path / "out"), quantize="none"))
    for name, experts, attribute in four_bit_experts(model):
        assert torch.equal(merged.get_parameter(name), dequantized(getattr(experts, attribute))), name
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(mixture / "model.safetensors").keys()

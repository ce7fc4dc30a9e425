"""Bases whose files name their tensors otherwise than their modules: merged under the names of their own files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from benchmarks.architectures.models import ARCHITECTURES
from pe_dpo.merging.merge import merge
from pe_dpo.model.adapter import attach_adapter, save_adapter
from pe_dpo.model.base import inspect_base, load_base, load_tokenizer
from pe_dpo.model.layout import Layout
from pe_dpo.quickstart.demo import BASE, PAIRS

IDS = torch.randint(10, 1000, (2, 24), generator=torch.Generator().manual_seed(0))


def published(name: str, folder: Path) -> Path:
    """A base as it would be published, with the quickstart's tokenizer."""
    ARCHITECTURES[name].save(folder)
    load_tokenizer(str(BASE)).save_pretrained(folder)
    return folder


def names_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sorted(file.keys())


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits.double().log_softmax(-1)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("gemma3-4b", "nf4"),
        ("qwen3.5-moe-vl", "nf4"),
        ("llama4", "nf4"),
        ("mllama", "none"),
        ("qwen2.5-vl", "nf4"),
    ],
)
def test_a_multimodal_base_is_merged_under_the_names_of_its_files(name, quantize, tmp_path):
    base = published(name, tmp_path / "base")
    facts = inspect_base(str(base), quantize=quantize, quantize_experts=False)  # as others load it
    model = attach_adapter(load_base(facts), rank=4, alpha=8)
    untouched = logprobs(model)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.05)
    trained = logprobs(model)
    save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "out"
    verdict = merge(
        tmp_path / "adapter", out, base=str(base), quantize=quantize, dtype="fp32", data=str(PAIRS / "test.jsonl"), pairs=2
    )
    assert verdict.faults == [] and verdict.describe().startswith("serves the adapter on this base")
    assert names_in(out) == names_in(base)
    # As it was trained, and as it was published; the latter alone where transformers has no language model of its own.
    trained_as = type(model.get_base_model()).__name__
    for kind in {trained_as, ARCHITECTURES[name].model_class}:
        served = logprobs(getattr(hf, kind).from_pretrained(out, dtype=torch.float32))
        assert float((trained.exp() * (trained - served)).sum(-1).max()) < 1e-9
    assert float((trained.exp() * (trained - untouched)).sum(-1).max()) > 1e-4, "an adapter that does nothing shows nothing"


@pytest.mark.parametrize(
    ("name", "in_modules", "in_files"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", ["model.layers.0.mlp.up_proj.weight"]),
        ("gemma3-4b", "model.language_model.norm.weight", ["language_model.model.norm.weight"]),
        ("qwen3.5-vl", "model.norm.weight", ["model.language_model.norm.weight"]),
        ("llama4", "lm_head.weight", ["language_model.lm_head.weight"]),
        ("gpt-neox", "lm_head.weight", ["embed_out.weight"]),
        ("llama3.2", "lm_head.weight", []),  # tied
        (
            "qwen3-moe",
            "model.layers.0.mlp.experts.down_proj",
            [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(4)],
        ),
    ],
)
def test_a_layout_knows_the_files_of_each_tensor(name, in_modules, in_files, tmp_path):
    ARCHITECTURES[name].save(tmp_path)
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(tmp_path))
    layout = Layout(model, names_in(tmp_path))
    assert layout.files_of(in_modules) == in_files
    assert layout.is_assembled(in_modules) == (len(in_files) > 1)
    assert {layout.module_of[file] for file in in_files} <= {in_modules}

"""Bases whose weights lie as codes, or pickled, are written as plain safetensors of the same values."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pe_dpo.errors import ModelError, UsageError
from pe_dpo.export.plain_folder import export_plain
from pe_dpo.merging.merge import merge
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.training.train import train

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What a code of MXFP4 stands for: OCP microscaling formats 1.0, table 5."""


def as_fp8(base: Path, block: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """Turn a base's projections into fp8 codes in place; return what they stand for."""
    tensors, wanted = load_file(base / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors[name].float()
        rows, columns = block or weight.shape
        scales = torch.stack([part.abs().max() / 448 for strip in weight.split(rows) for part in strip.split(columns, 1)])
        scales = scales.view(-(-weight.shape[0] // rows), -1)
        spread = scales.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        wanted[name] = (codes.float() * spread).bfloat16()
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scales if block else scales.view(())
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": list(block) if block else None, "activation_scheme": "dynamic"}
    _say(base, settings)
    return wanted


def _say(base: Path, settings: dict[str, Any]) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize("block", [(48, 32), None], ids=["blocks that do not come out even", "one scale a tensor"])
def test_fp8_becomes_what_it_stands_for(block: tuple[int, int] | None, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    before = load_file(base / "model.safetensors")
    wanted = as_fp8(base, block)
    with pytest.raises(ModelError, match=r"comes as fp8 codes.*`pe-dpo export .*base --plain -o BASE`"):
        inspect_base(str(base))
    assert export_plain(str(base), tmp_path / "out") == len(wanted) == 14
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted.get(name, before[name])), name
    load_base(inspect_base(str(tmp_path / "out"), quantize="nf4"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()


def test_mxfp4_becomes_what_it_stands_for(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128}
    base = tmp_path / "base"
    GptOssForCausalLM(GptOssConfig(**sizes, **experts)).bfloat16().save_pretrained(base)
    tensors, wanted = load_file(base / "model.safetensors"), {}
    torch.manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inner, outer = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (count, outer, inner // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
        wanted[name] = (values * torch.exp2(scales.float() - 127)[..., None]).flatten(2).transpose(1, 2)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _say(base, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    assert export_plain(str(base), tmp_path / "out") == 2
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in wanted.items():
        assert torch.equal(found[name], values.bfloat16()), name
    loaded = dict(load_base(inspect_base(str(tmp_path / "out"))).named_parameters())
    assert torch.equal(loaded["model.layers.0.mlp.experts.down_proj"], wanted["model.layers.0.mlp.experts.down_proj"])


@pytest.mark.slow
def test_a_base_of_pickled_tensors_is_trained_and_merged(tiny_base: Path, tiny_recipe: Callable, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    run = train(tiny_recipe(tmp_path / "run", f"model.base={base}", "model.quantize=nf4")).folder
    assert merge(run, tmp_path / "merged").describe() == "serves what was trained"
    assert export_plain(str(base), tmp_path / "out") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


def test_nothing_that_lies_in_a_pickle_runs(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"lm_head.weight": Evil()}, base / "pytorch_model.bin")
    for attempt in (lambda: export_plain(str(base), tmp_path / "out"), lambda: load_base(inspect_base(str(base)))):
        with pytest.raises(ModelError, match=r"hold more than tensors, or are damaged, and were not read"):
            attempt()
    assert "ran" not in capsys.readouterr().out


def test_what_is_plain_already_is_left_alone(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plain safetensors already"):
        export_plain(str(tiny_base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_codes_that_cannot_be_read_are_named_with_a_way_out(method: str, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    _say(base, {"quant_method": method, "bits": 4})
    for attempt in (lambda: inspect_base(str(base)), lambda: export_plain(str(base), tmp_path / "out")):
        with pytest.raises(ModelError, match=rf"{method} codes.*[nN]ame the model that they were made of, or one"):
            attempt()

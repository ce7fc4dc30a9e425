"""An adapter scaled toward its reference: W_ref + a·(W − W_ref), held against sums written down here and against PEFT.

ΔW is read from the adapter's files, 4-bit values come from bitsandbytes; PEFT has its own scalings times a.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import random_adapter
from safetensors.torch import load_file
from torch import Tensor

from pe_dpo.errors import MergeRefused, ModelError, UsageError
from pe_dpo.merging import source as source_module
from pe_dpo.merging.adapter_package import package_adapter
from pe_dpo.merging.behaviour import Agreement
from pe_dpo.merging.compare import compare_merges
from pe_dpo.merging.merge import merge
from pe_dpo.merging.source import open_source
from pe_dpo.model.adapter import load_adapter_for_evaluation, scaled
from pe_dpo.model.adapter_files import AdapterFiles, save_scaled_adapter
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.training.train import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:Setting `save_embedding_layers`:UserWarning",
        "ignore:.*LoRA tensor.* have invalid shape:UserWarning",  # peft 0.21 takes a LoRA bias for a torn matrix
    ),
]

IDS = torch.arange(3, 63).view(3, 20)
TOWARD = "scaled toward the reference by a = 0.5"


@pytest.fixture(scope="module")
def runs(tiny_recipe: Callable, made_once: Callable[..., Path]) -> dict[str, Path]:
    """A run on the base in float32, one in 4 bit, and one that starts from each with its frozen copy as the reference."""

    def fill(root: Path) -> None:
        for quantize in ("none", "nf4"):
            short = (f"model.quantize={quantize}", "train.max_steps=2")
            train(tiny_recipe(root / quantize, *short, "train.learning_rate=3.0e-3"))
            start = f"adapter={{start: '{root / quantize}', reference: adapter}}"
            train(tiny_recipe(root / f"{quantize}, frozen", *short, "train.learning_rate=1.0e-2", start))

    root = made_once("runs-to-scale", fill)
    return {name: root / name for name in ("none", "nf4", "none, frozen", "nf4, frozen")}


def updates(folder: Path) -> dict[str, Tensor]:
    """ΔW of each tensor of a plain adapter of one rank, from its files."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        f"{layer.removeprefix('base_model.model.')}.weight": config["lora_alpha"]
        / config["r"]
        * (tensors[f"{layer}.lora_B.weight"].double() @ tensors[f"{layer}.lora_A.weight"].double())
        for layer in layers
    }


def as_trained(base: Path, quantize: str) -> dict[str, Tensor]:
    """The base's weights as training had them, float32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    tensors = load_file(base / "model.safetensors")
    if quantize == "none":
        return tensors
    layers = [name for name in tensors if "_proj." in name]
    codes = {name: Params4bit(tensors[name], requires_grad=False, quant_type="nf4").to("cpu") for name in layers}
    return tensors | {name: dequantize_4bit(one.data, one.quant_state) for name, one in codes.items()}


def peft_logits(base: Path, adapters: list[tuple[Path, float]]) -> Tensor:
    """Plain PEFT with several adapters on, the scalings of each times a weight."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for number, (folder, weight) in enumerate(adapters):
        if number:
            model.load_adapter(folder, adapter_name=f"a{number}")
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name="a0")
        for module in model.modules():
            if hasattr(module, "lora_A") and f"a{number}" in module.scaling:
                module.scaling[f"a{number}"] *= weight
    model.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
    with torch.no_grad():
        logits: Tensor = model.eval()(IDS).logits
    return logits


def plain_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    return logits


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Save a random adapter, and return its folder."""
    random_adapter(base, folder, **settings)
    return folder


def package(target: Path, output: Path, **settings: Any) -> Agreement | None:
    """Write the adapter as `merge --onto adapter` does; where it is another than the trained one, how near it comes to that."""
    with open_source(target, **settings) as source:
        return package_adapter(source, output)[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------- what is served


@pytest.mark.parametrize(("quantize", "scale"), [("none", 1.5), ("nf4", 0.3)])
def test_merged_tensors_are_the_base_and_a_share_of_the_update(
    quantize: str, scale: float, runs: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    merge(runs[quantize], tmp_path / "out", scale=scale, dtype="fp32", pairs=0)
    wanted, delta = as_trained(tiny_base, quantize), updates(runs[quantize])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(delta) == 14 and found.keys() == wanted.keys()
    for name, weight in wanted.items():
        if name in delta:
            torch.testing.assert_close(found[name], (weight.double() + scale * delta[name]).float(), rtol=1e-6, atol=1e-7)
            assert delta[name].abs().max() > 1e-4, "an update that is nothing shows nothing"
        else:
            assert torch.equal(found[name], weight)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_with_a_frozen_reference_the_way_is_from_there_and_not_from_the_base(
    quantize: str, runs: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    run = runs[f"{quantize}, frozen"]
    done = merge(run, tmp_path / "out", scale=0.25, dtype="fp32", pairs=4)
    start, delta, weights = updates(runs[quantize]), updates(run), as_trained(tiny_base, quantize)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, update in delta.items():
        wanted = weights[name].double() + 0.75 * start[name] + 0.25 * update
        torch.testing.assert_close(found[name], wanted.float(), rtol=1e-6, atol=1e-7)
        assert (found[name] - weights[name].double() - 0.25 * update).abs().max() > 1e-4, "the reference's part is something"
    assert done.faults == []
    assert done.report["held_out"]["shift_kept"] == pytest.approx(1, abs=1e-3)


SPECIAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns with rsLoRA": {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "a LoRA bias": {"lora_bias": True},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_the_scaled_adapter_does_in_peft_what_the_trained_one_does_at_a_times_its_scaling(
    name: str, tiny_base: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    base = biased(tiny_base, tmp_path / "base") if name == "a LoRA bias" else tiny_base
    adapter = make_adapter(base, tmp_path / "adapter", **SPECIAL[name])
    wanted = peft_logits(base, [(adapter, 0.3)])
    settings: dict[str, Any] = {"base": str(base), "quantize": "none", "data": str(tiny_pairs / "test.jsonl"), "pairs": 4}
    package(adapter, tmp_path / "package", scale=0.3, **settings)
    merge(adapter, tmp_path / "merged", scale=0.3, dtype="fp32", **settings)
    assert (peft_logits(base, [(tmp_path / "package", 1.0)]) - wanted).abs().max() < 2e-5
    assert (plain_logits(tmp_path / "merged") - wanted).abs().max() < 2e-5
    assert (peft_logits(base, [(adapter, 1.0)]) - wanted).abs().max() > 1e-2
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "package", adapter)]
    assert configs[0] == {**configs[1], "base_model_name_or_path": None}  # a path of this machine


def biased(base: Path, folder: Path) -> Path:
    """The base with biases in its attention, of which one kind of adapter needs some."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(base)
    config.attention_bias = config.mlp_bias = True
    shutil.copytree(base, folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_an_adapter_on_top_of_another_is_scaled_toward_that_one(tiny_base: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    sft = make_adapter(tiny_base, tmp_path / "sft", r=2, use_rslora=True, target_modules=["q_proj", "v_proj"])
    top = make_adapter(tiny_base, tmp_path / "top", seed=1, alpha_pattern={"q_proj": 7})
    wanted = peft_logits(tiny_base, [(sft, 1.0), (top, 0.3)])
    settings: dict[str, Any] = {"base": str(tiny_base), "quantize": "none", "data": str(tiny_pairs / "test.jsonl"), "pairs": 4}
    done = merge(top, tmp_path / "merged", sft=sft, scale=0.3, dtype="fp32", **settings)
    package(top, tmp_path / "package", sft=sft, scale=0.3, **settings)
    assert (plain_logits(tmp_path / "merged") - wanted).abs().max() < 2e-5
    assert (peft_logits(tiny_base, [(tmp_path / "package", 1.0)]) - wanted).abs().max() < 2e-5
    assert done.faults == []


def test_an_adapter_that_was_saved_in_16_bits_is_scaled_in_float32(tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    (tmp_path / "scaled").mkdir()
    stored = {name: tensor.bfloat16() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(stored, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    save_scaled_adapter(AdapterFiles(adapter), 0.3, tmp_path / "scaled")
    found = load_file(tmp_path / "scaled" / "adapter_model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(found[name], 0.3 * tensor.float() if "lora_B" in name else tensor)


@pytest.mark.parametrize("name", ["nf4", "nf4, frozen"])
def test_what_is_served_is_what_is_measured_of_a_run_in_memory(
    name: str, runs: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    merge(runs[name], tmp_path / "out", scale=0.25, dtype="fp32", pairs=0)
    model = load_adapter_for_evaluation(load_base(inspect_base(str(tiny_base), quantize="nf4", dtype="float32")), runs[name])
    with torch.no_grad(), scaled(model, 0.25):
        wanted = model(IDS).logits
    assert (plain_logits(tmp_path / "out") - wanted).abs().max() < 2e-5


def test_a_scale_of_one_leaves_every_file_as_it_is_without_it(runs: dict[str, Path], tmp_path: Path) -> None:
    for run in (runs["nf4"], runs["nf4, frozen"]):
        found = []
        for settings in ({}, {"scale": 1}):
            merge(run, tmp_path / "merged", dtype="bf16", pairs=2, **settings)
            package(run, tmp_path / "package", pairs=2, **settings)
            found.append([contents(tmp_path / name) for name in ("merged", "package")])
            for name in ("merged", "package"):
                shutil.rmtree(tmp_path / name)
        assert found[0] == found[1]
        saved = (run / "adapter_model.safetensors").read_bytes()
        assert found[0][1]["adapter_model.safetensors"] == saved


def test_the_nearer_to_the_reference_the_smaller_the_kl(runs: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    """At a hundredth of the way KL is quadratic in a."""
    reference = plain_logits(tiny_base).double().log_softmax(-1)
    found = {}
    for scale in (0.005, 0.01, 0.5, 1.0, 1.5):
        merge(runs["none"], tmp_path / str(scale), scale=scale, dtype="fp32", pairs=0)
        policy = plain_logits(tmp_path / str(scale)).double().log_softmax(-1)
        found[scale] = float((policy.exp() * (policy - reference)).sum(-1).mean())
    assert list(found.values()) == sorted(found.values()) and found[0.005] > 0
    assert found[0.01] / found[0.005] == pytest.approx(4, rel=0.1)
    assert found[0.5] < 0.5 * found[1.0]


# ------------------------------------------------------------------------------------------------------ what is said of it


def test_report_card_and_verdict_say_the_scale_and_do_not_say_that_it_was_trained(
    runs: dict[str, Path], tmp_path: Path, logged: list[str]
) -> None:
    done = merge(runs["nf4"], tmp_path / "out", scale=0.5, pairs=4)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text(encoding="utf-8"))
    assert report == done.report
    assert (report["scale"], report["verdict"]) == (0.5, f"serves the update, {TOWARD}: on purpose not what was trained")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert TOWARD in card and "W_ref + 0.5·(W − W_ref)" in card and "not the model that was trained" in card
    assert "KL(scaled ‖ merged)" in card and "what the scaled update changed" in card and "KL(trained" not in card
    assert any(line.startswith(f"{TOWARD}: what is served is not what was trained") for line in logged)
    assert not any(line.startswith("warning: a = ") for line in logged)


def test_more_than_what_was_trained_is_allowed_and_called_so(runs: dict[str, Path], tmp_path: Path, logged: list[str]) -> None:
    done = merge(runs["none"], tmp_path / "out", scale=1.5, pairs=4)
    assert done.report["verdict"].startswith("serves the update, scaled away from the reference by a = 1.5")
    assert "warning: a = 1.5 goes beyond what was trained (extrapolation)" in logged


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"pairs": 0}, f"has the update in its files, {TOWARD}; not verified on pairs"),
        ({"onto": "original"}, f"keeps the update, {TOWARD}, on the original weights: not the model that was trained"),
    ],
)
def test_every_verdict_says_the_scale(settings: dict[str, Any], verdict: str, runs: dict[str, Path], tmp_path: Path) -> None:
    assert merge(runs["nf4"], tmp_path / "out", scale=0.5, **{"pairs": 4, **settings}).report["verdict"] == verdict


def test_the_report_names_the_adapter_that_onto_adapter_writes_and_the_one_it_was_made_of(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def sha256(folder: Path) -> str:
        return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()

    for name in ("nf4", "nf4, frozen"):
        report = merge(runs[name], tmp_path / f"merged {name}", scale=0.5, pairs=0).report
        held_out = package(runs[name], tmp_path / name, scale=0.5, pairs=4)
        assert report["adapter_sha256"] == sha256(tmp_path / name) != sha256(runs[name])
        assert report["from_adapter_sha256"] == sha256(runs[name])
        assert held_out is not None and held_out.shift_kept == pytest.approx(1, abs=1e-4)
        assert TOWARD in (tmp_path / name / "README.md").read_text(encoding="utf-8")


def test_a_packaged_scaled_adapter_is_still_called_scaled_and_not_scaled_again(
    runs: dict[str, Path], tiny_base: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    package(runs["nf4"], tmp_path / "package", scale=0.5, pairs=0)
    base = str(tiny_base)
    report = merge(tmp_path / "package", tmp_path / "out", base=base, data=str(tiny_pairs / "test.jsonl"), pairs=4).report
    assert (report["scale"], report["faults"]) == (0.5, [])
    assert report["verdict"] == f"serves the update, {TOWARD}: on purpose not what was trained"
    with pytest.raises(UsageError, match=f"is {TOWARD} already"):
        merge(tmp_path / "package", tmp_path / "other", base=base, scale=0.5, pairs=0)


def test_compare_holds_each_way_to_serve_against_the_scaled_model(runs: dict[str, Path]) -> None:
    with open_source(runs["nf4, frozen"], pairs=4) as source:
        full = compare_merges(source)
    with open_source(runs["nf4, frozen"], pairs=4, scale=0.5) as source:
        half = compare_merges(source)
    found = {name: candidate for name, candidate, _ in half}
    assert source.scale == 0.5 and list(found) == [name for name, _, _ in full]
    assert found["adapter"].kl == 0 and found["onto dequantized"].kl < 1e-3 * found["reference"].kl
    assert 0 < found["reference"].kl < 0.5 * full[0][1].kl


# ------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("frozen", ["", ", frozen"])
def test_a_scale_that_is_not_the_one_asked_for_is_refused_by_the_pairs(
    frozen: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held against is PEFT's own arithmetic on the adapter of training, not the files that were made of it."""
    scaled, fused = source_module.save_scaled_adapter, source_module.save_fused_adapter
    monkeypatch.setattr(source_module, "save_scaled_adapter", lambda it, scale, folder: scaled(it, scale**2, folder))
    monkeypatch.setattr(source_module, "save_fused_adapter", lambda two, by, folder: fused(two, (0.0, by[1]), folder))
    with pytest.raises(MergeRefused, match=f"the merge is not what was trained, {TOWARD}") as caught:
        merge(runs[f"nf4{frozen}"], tmp_path / "out", scale=0.5, pairs=4)
    assert "of the preference shift kept" in str(caught.value)
    with pytest.raises(MergeRefused, match=r"the (one )?adapter does not do what"):
        package(runs[f"nf4{frozen}"], tmp_path / "out", scale=0.5, pairs=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_that_means_nothing_is_refused_before_anything_is_read(scale: float, tmp_path: Path) -> None:
    for work in (merge, package):
        with pytest.raises(UsageError, match=f"^`scale` {scale or 0}: (is the reference itself|write a number above 0)"):
            work(tmp_path / "nothing", tmp_path / "out", scale=scale)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "has DoRA, which sets W's norms"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is saved whole"),
        ({"modules_to_save": ["input_layernorm"]}, "layernorm.weight is saved whole"),
        ({"bias": "all"}, "bias is saved whole"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.weight is saved whole"),  # PEFT saves the base's head too
    ],
)
def test_what_is_no_update_of_lora_is_not_scaled(config: dict[str, Any], words: str, tiny_base: Path, tmp_path: Path) -> None:
    base = biased(tiny_base, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    for work in (merge, package):
        with pytest.raises(ModelError, match=words):
            work(adapter, tmp_path / "out", scale=0.5, base=str(base), quantize="none", pairs=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_beside_its_own_reference_has_that_in_it_already(
    runs: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    """As a checkpoint's or a copied adapter's folder, without the run's record."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        for part in ("", "reference"):
            (tmp_path / "adapter" / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(runs["none, frozen"] / part / name, tmp_path / "adapter" / part)
    settings: dict[str, Any] = {"base": str(tiny_base), "quantize": "none", "pairs": 0}
    with pytest.raises(UsageError, match="that is in it already; leave `sft` out"):
        merge(tmp_path / "adapter", tmp_path / "out", sft=runs["none"], **settings)
    merge(tmp_path / "adapter", tmp_path / "out", scale=0.5, dtype="fp32", **settings)
    merge(runs["none, frozen"], tmp_path / "of the run", scale=0.5, dtype="fp32", pairs=0)
    assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "of the run")["model.safetensors"]

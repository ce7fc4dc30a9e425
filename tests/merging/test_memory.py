"""What measuring the models of a merge takes: counted before anything is loaded; and one layer at a time where it is short."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pe_dpo.errors import MergeRefused
from pe_dpo.merging import memory
from pe_dpo.merging.memory import place_model
from pe_dpo.merging.merge import merge
from pe_dpo.merging.verify import Verdict
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.model.fingerprint import parameter_fingerprints
from pe_dpo.model.layers_on_disk import LayersOnDisk
from pe_dpo.model.quantization import codes_rounded
from pe_dpo.training.train import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LAYER = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096
"""Weights of one decoder layer: attention of 8 key-value heads, the MLP, two norms."""
ENDS = 2 * 128256 * 4096 + 4096
"""Embeddings, head, and the norm between."""


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the configuration says; there are no weights."""
    folder = tmp_path_factory.mktemp("8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    return inspect_base(str(folder), quantize="none", dtype="float32")


def free(monkeypatch: pytest.MonkeyPatch, *, ram: float, gpu: float | None = None) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: {"cpu": ram, "cuda": gpu}[device.type])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)


@pytest.mark.parametrize(
    ("ram", "gpu", "device", "weights"),
    [
        (64e9, None, CPU, 32 * LAYER + ENDS),
        (16e9, None, CPU, LAYER + ENDS),
        (64e9, 80e9, CUDA, 32 * LAYER + ENDS),
        (64e9, 16e9, CUDA, LAYER + ENDS),  # rather than hours on the CPU
        (64e9, 5e9, CPU, 32 * LAYER + ENDS),
    ],
)
def test_a_merged_8b_is_verified_on_16_gb(
    ram: float, gpu: float | None, device: torch.device, weights: int, llama_8b: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, ram=ram, gpu=gpu)
    place = place_model(llama_8b, [])
    assert place == (device, weights == LAYER + ENDS, 4 * weights, 4 * (32 * LAYER + ENDS), True)


def test_a_trained_8b_in_nf4_takes_its_codes_and_the_rest_in_float32(llama_8b: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is a plain one at a time, for the noise of rounding; with 0.6 bytes a parameter it was counted as 4.8 GB."""
    free(monkeypatch, ram=16e9)
    norms = 32 * 2 * 4096
    codes = 32 * LAYER - norms
    place = place_model(llama_8b._replace(quantize="nf4"), [])
    assert place.bytes == round(codes * (0.5 + 1 / 64 + 4 / (64 * 256)) + 4 * (ENDS + norms)) + 4 * LAYER
    assert (place.is_layerwise, place.fits, round(place.bytes / 1e9, 2)) == (False, True, 8.68)


def test_answers_count_with_their_logits_and_distributions(llama_8b: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, ram=64e9, gpu=64e9)
    pair = SimpleNamespace(prompt_ids=np.zeros(7), chosen_ids=np.zeros(3), rejected_ids=np.zeros(2))
    assert place_model(llama_8b, [pair]).bytes == 4 * (32 * LAYER + ENDS) + 3 * 4 * 3 * 128256  # type: ignore[list-item]
    free(monkeypatch, ram=64e9)
    kept = 4 * 4 * 128256 * (10 + 9)
    assert place_model(llama_8b, [pair]).bytes == 4 * (32 * LAYER + ENDS) + 3 * 4 * 3 * 128256 + kept  # type: ignore[list-item]


def test_where_nothing_fits_the_least_is_tried(llama_8b: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, ram=2e9, gpu=1e9)
    assert place_model(llama_8b, []) == (CPU, True, 4 * (LAYER + ENDS), 4 * (32 * LAYER + ENDS), False)


# ------------------------------------------------------------------------------------------------------- layer by layer


@pytest.fixture(scope="module")
def runs(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    settings = ("train.max_steps=3", "train.learning_rate=2.0e-3")
    for quantize in ("nf4", "none"):
        train(tiny_recipe(folder / quantize, f"model.quantize={quantize}", "model.dtype=bfloat16", *settings))
    return {quantize: folder / quantize for quantize in ("nf4", "none")}


def merged(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, ram: float, **settings: Any) -> Verdict:
    """Merge with so much free memory."""
    free(monkeypatch, ram=ram)
    return merge(run, folder, dtype="bf16", pairs=5, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "onto"), [("nf4", "original"), ("none", "dequantized")])
def test_a_merge_verified_layer_by_layer_is_the_same_to_the_bit(
    quantize: str, onto: Any, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: list[str] = []
    loaded = LayersOnDisk.loaded
    monkeypatch.setattr(LayersOnDisk, "loaded", lambda self, layer: on_disk.append(layer) or loaded(self, layer))
    whole = merged(runs[quantize], tmp_path / "whole", monkeypatch, ram=64e9, onto=onto).report
    assert on_disk == []
    short = merged(runs[quantize], tmp_path / "short", monkeypatch, ram=1e6, onto=onto).report
    # Each of the two layers once for each measurement: of the base that is not quantized (three), and of the merged model.
    assert on_disk == ["model.layers.0", "model.layers.1"] * 4
    assert {**short, "versions": None} == {**whole, "versions": None}
    assert short["held_out"]["kl_reference"] > 1e-6 and short["noise_floor"]["kl"] > 0
    assert short["verdict"].startswith(("serves what was trained", "keeps the update"))


@pytest.mark.slow
def test_a_layer_that_was_not_loaded_is_found(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LayersOnDisk.loaded
    monkeypatch.setattr(LayersOnDisk, "loaded", lambda self, layer: loaded(self, "model.layers.0"))
    with pytest.raises(MergeRefused, match="not finite"):
        merged(runs["nf4"], tmp_path / "out", monkeypatch, ram=1e6)


def test_a_base_with_its_layers_on_disk_has_the_fingerprints_of_one_in_memory(tiny_base: Path) -> None:
    info = inspect_base(str(tiny_base), quantize="none", dtype="bfloat16")
    on_disk = LayersOnDisk(info, device=CPU, compute_dtype=torch.float32)
    assert on_disk.fingerprints == parameter_fingerprints(load_base(info))
    weight = on_disk.model.model.layers[1].mlp.up_proj
    assert weight.weight.untyped_storage().nbytes() == 4  # a placeholder
    assert weight.weight.isnan().all()
    with on_disk.loaded("model.layers.1"):
        assert torch.equal(weight.weight, load_base(info).model.layers[1].mlp.up_proj.weight.float())  # type: ignore[union-attr, index]
    assert weight.weight.isnan().all()


def test_codes_come_back_after_their_values_were_rounded(tiny_base: Path) -> None:
    model: Any = load_base(inspect_base(str(tiny_base), quantize="nf4", dtype="float32"))
    before = parameter_fingerprints(model)
    with codes_rounded(model, model.model.layers[0].modules(), torch.bfloat16):
        first, second = (layer.mlp.up_proj.weight for layer in model.model.layers)
        assert (first.dtype, second.dtype) == (torch.float32, torch.uint8)
        assert torch.equal(first, first.bfloat16().float())
    assert parameter_fingerprints(model) == before


# ------------------------------------------------------------------------------------------------------- what is said


def said(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, pairs: int = 3, **free_memory: Any) -> list[str]:
    """What is logged before a model would be loaded."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    free(monkeypatch, **free_memory)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pe_dpo.merging.merge.Unmerged", stop)
    monkeypatch.setattr("pe_dpo.merging.merge.write", stop)
    logger, level = logging.getLogger("pe_dpo"), logging.getLogger("pe_dpo").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(run, folder, pairs=pairs)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines


@pytest.mark.slow
def test_what_a_merge_takes_is_said_before_anything_is_loaded(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, takes = said(runs["nf4"], tmp_path / "out", monkeypatch, ram=64e9)
    assert first == "to be measured on 3 of 9 held-out pairs"
    assert takes.startswith("takes ") and takes.endswith(" MB on disk")
    assert " MB in RAM as trained, " in takes and " MB in RAM to verify what was merged, " in takes
    (takes,) = said(runs["nf4"], tmp_path / "out", monkeypatch, ram=64e9, pairs=0)
    assert takes.endswith("; no model is loaded, and the largest tensor is what memory has to hold")


@pytest.mark.slow
def test_what_is_done_instead_is_said_with_what_is_free(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, takes, *instead = said(runs["none"], tmp_path / "out", monkeypatch, ram=1e6)
    assert " MB in RAM as trained (layer by layer), " in takes and " to verify what was merged (layer by layer), " in takes
    assert instead[0].startswith("as trained layer by layer, as 1.0 MB of RAM are free: whole it takes ")
    assert instead[1].endswith("the system may stop it; `pairs` 0 verifies the tensors alone, and loads no model")


@pytest.mark.slow
def test_the_cpu_is_not_taken_beside_a_gpu_without_a_word(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = said(runs["nf4"], tmp_path / "out", monkeypatch, ram=64e9, gpu=2e5)
    words = "on the CPU, hours for a large model, as 0.2 MB of the GPU are free; `pairs` 0 verifies the tensors alone"
    assert [line.partition(": ")[2].startswith(words) for line in lines[-2:]] == [True, True]

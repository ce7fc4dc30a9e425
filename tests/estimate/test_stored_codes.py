"""Bases that lie on disk as bitsandbytes' codes, with layers left out: counted as large as they are once loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_dpo.estimate import Estimate, estimate_run
from pe_dpo.estimate.lengths import made_up_lengths
from pe_dpo.model.base import inspect_base
from pe_dpo.model.road import files_here, loaded_size

LEFT_OUT = ["lm_head", "model.layers.1.self_attn", "model.layers.0.mlp.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-single": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=KINDS)
def kind_and_base(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("codes")
    how = BitsAndBytesConfig(**KINDS[request.param], llm_int8_skip_modules=LEFT_OUT)
    AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=how).save_pretrained(folder)
    return request.param, folder


@pytest.fixture
def estimated(make_recipe: Callable) -> Callable[[Path], Estimate]:
    def make(base: Path) -> Estimate:
        recipe = make_recipe(f"model.base={base}", "model.quantize=auto")
        lengths = made_up_lengths(recipe, (20, 10, 10), pairs=8, held_out=0)
        return estimate_run(recipe, None, lengths=lengths)

    return make


def bytes_of(found: Estimate) -> float:
    return found.parts["codes"] + found.parts["weights"]


def test_it_is_as_large_as_it_is_loaded(kind_and_base: tuple[str, Path], estimated: Callable) -> None:
    """Codes are the attention of one layer of two, and five of six matrices of the MLPs."""
    kind, base = kind_and_base
    found, info = estimated(base), inspect_base(str(base))
    inner = info.config.intermediate_size
    attention = 2 * 64 * (64 + info.config.num_key_value_heads * info.config.head_dim)
    assert found.setup.quantize == kind
    assert found.setup.coded == found.to_dict()["base"]["coded"] == attention + 5 * 64 * inner
    size = loaded_size(info, files_here(info))
    assert (found.setup.coded, bytes_of(found)) == (size.coded, size.bytes)


def test_without_its_files_the_configuration_says_what_is_left_out(
    kind_and_base: tuple[str, Path], estimated: Callable, tmp_path: Path
) -> None:
    base = shutil.copytree(kind_and_base[1], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    info, found = inspect_base(str(base)), estimated(base)
    assert files_here(info) is None
    assert bytes_of(found) == loaded_size(info).bytes == bytes_of(estimated(kind_and_base[1]))
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]["llm_int8_skip_modules"]
    (base / "config.json").write_text(json.dumps(config))
    assert estimated(base).setup.coded == loaded_size(inspect_base(str(base))).coded > found.setup.coded


def test_headers_of_its_files_decide_over_the_configuration(
    kind_and_base: tuple[str, Path], estimated: Callable, tmp_path: Path
) -> None:
    base = shutil.copytree(kind_and_base[1], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    (base / "config.json").write_text(json.dumps(config))
    found, info = estimated(base), inspect_base(str(base))
    assert bytes_of(found) == loaded_size(info, files_here(info)).bytes == bytes_of(estimated(kind_and_base[1]))


def test_files_that_are_not_all_here_are_a_note(estimated: Callable, kind_and_base: tuple[str, Path], tmp_path: Path) -> None:
    """As where a base is being fetched."""
    base = shutil.copytree(kind_and_base[1], tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    found = estimated(base)
    assert bytes_of(found) == bytes_of(estimated(kind_and_base[1]))
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"codes are counted as config.json says: {weights}: cannot be read")

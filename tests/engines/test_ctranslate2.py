"""CTranslate2 on merged folders, through its own converter, against transformers in float32."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines.compare import expected_answer, greedy_faults, largest_difference
from benchmarks.engines.worker import ask

pytestmark = [pytest.mark.engine("ctranslate2"), pytest.mark.slow]


@pytest.fixture(scope="module")
def question(request_of_all: dict[str, Any]) -> dict[str, Any]:
    return {part: request_of_all[part] for part in ("ids", "greedy", "new_tokens")}


def without_scaling(model: Path, folder: Path) -> Path:
    """A copy of a model whose positions are not scaled."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_theta", None) or config["rope_parameters"]["rope_theta"]
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["merged", "merged-original", "merged-none"])
def test_a_merged_model_answers_as_in_transformers(
    artefact: Callable[[str], Path], question: dict[str, Any], tmp_path: Path, name: str
) -> None:
    model = without_scaling(artefact(name), tmp_path / "model")
    answer, expected = ask("ctranslate2", model, question), expected_answer(model, question)
    assert largest_difference(answer, expected) < 1e-4
    assert greedy_faults(answer, expected) == []


def test_ctranslate2_leaves_out_llama_3s_scaling(
    artefact: Callable[[str], Path], question: dict[str, Any], expected: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """Its converter 4.8.5 writes the two frequency factors and not the factor itself; no error says so."""
    unscaled = without_scaling(artefact("merged"), tmp_path / "model")
    answer = ask("ctranslate2", artefact("merged"), question)
    assert largest_difference(answer, expected("merged")) > 1
    assert largest_difference(answer, expected_answer(unscaled, question)) < 1e-4

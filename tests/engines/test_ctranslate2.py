"""CTranslate2 on merged folders, through its own converter, against transformers in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines.compare import greedy_faults, largest_difference
from benchmarks.engines.worker import ask

pytestmark = [pytest.mark.engine("ctranslate2"), pytest.mark.slow]


@pytest.fixture(scope="module")
def question(request_of_all: dict[str, Any]) -> dict[str, Any]:
    return {part: request_of_all[part] for part in ("ids", "greedy", "new_tokens")}


def test_a_merged_model_answers_as_in_transformers(
    artefact: Callable[[str], Path], question: dict[str, Any], expected: Callable[[str], dict[str, Any]]
) -> None:
    answer = ask("ctranslate2", artefact("merged-unscaled"), question)
    assert largest_difference(answer, expected("merged-unscaled")) < 1e-4
    assert greedy_faults(answer, expected("merged-unscaled")) == []


def test_ctranslate2_leaves_out_llama_3s_scaling(
    artefact: Callable[[str], Path], question: dict[str, Any], expected: Callable[[str], dict[str, Any]]
) -> None:
    """Its converter 4.8.5 writes the two frequency factors and not the factor itself; no error says so."""
    answer = ask("ctranslate2", artefact("merged"), question)
    assert largest_difference(answer, expected("merged")) > 0.5
    assert largest_difference(answer, expected("merged-unscaled")) < 1e-4

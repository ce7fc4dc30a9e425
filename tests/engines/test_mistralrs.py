"""mistral.rs on merged folders, GGUF files and an adapter, against transformers in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines.artefacts import whole_model
from benchmarks.engines.compare import equal, greedy_faults, largest_difference
from benchmarks.engines.worker import ask

pytestmark = [pytest.mark.engine("mistralrs"), pytest.mark.slow]

LIMIT = 5e-2
"""Nats. On a CPU, asked for float32, mistral.rs is 0.008 off for all of these alike, as 16-bit products would be."""


@pytest.mark.parametrize("name", ["merged", "gguf-f32", "adapter-none"])
def test_an_artefact_answers_as_in_transformers(
    artefact: Callable[[str], Path], request_of_all: dict[str, Any], expected: Callable[[str], dict[str, Any]], name: str
) -> None:
    path = artefact(name)
    options = {"base": str(artefact("base"))} if name.startswith("adapter") else {}
    request = {**request_of_all, "options": {**request_of_all["options"], **options}}
    answer = ask("mistralrs", next(path.glob("*.gguf"), path), request)
    wanted = expected(whole_model(name))
    assert largest_difference(answer, wanted) < LIMIT
    assert equal(answer, wanted, "tokens") == len(request["texts"]) == 400
    assert answer["chat_lengths"] == wanted["chat_lengths"]
    assert greedy_faults(answer, wanted) == greedy_faults(answer, wanted, "chat_greedy") == []

"""`transformers serve` on merged folders, asked by OpenAI's client, against transformers in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines.worker import EngineError, ask

pytestmark = [pytest.mark.engine("transformers_serve"), pytest.mark.slow]


@pytest.mark.parametrize("name", ["merged", "merged-original"])
def test_prompts_and_chats_are_gone_on_with_as_in_transformers(
    artefact: Callable[[str], Path], request_of_all: dict[str, Any], expected: Callable[[str], dict[str, Any]], name: str
) -> None:
    answer, wanted = ask("transformers_serve", artefact(name), request_of_all), expected(name)
    parts = ("greedy_texts", "chat_lengths", "chat_texts")
    assert [answer[part] for part in parts] == [wanted[part] for part in parts]
    assert len(answer["chat_texts"]) == 5


def test_an_adapter_is_refused_and_not_served_on_another_base(
    artefact: Callable[[str], Path], request_of_all: dict[str, Any]
) -> None:
    with pytest.raises(EngineError, match="Unrecognized model"):
        ask("transformers_serve", artefact("adapter-none"), request_of_all)

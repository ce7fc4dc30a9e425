"""What engines are given, made once for all processes that run the tests; engines that are not installed are skipped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines.artefacts import fill, full_request
from benchmarks.engines.worker import why_missing


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that is marked `engine("name")` where that engine is not installed."""
    for mark in item.iter_markers("engine"):
        if missing := why_missing(mark.args[0]):
            pytest.skip(missing)


@pytest.fixture(scope="session")
def artefact(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """The folder of an artefact by its name in benchmarks/engines/artefacts.py."""

    def get(name: str) -> Path:
        return made_once(f"engines-{name}", lambda folder: fill(name, folder, get))

    return get


@pytest.fixture(scope="session")
def request_of_all(artefact: Callable[[str], Path]) -> dict[str, Any]:
    """A request with every part: sequences, 400 texts, chats, prompts to go on with."""
    return full_request(artefact("base"))


@pytest.fixture(scope="session")
def expected(artefact: Callable[[str], Path], request_of_all: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """What transformers in float32 answers to that request, by the name of a whole model."""
    from benchmarks.engines.compare import expected_answer

    known: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = expected_answer(artefact(name), request_of_all)
        return known[name]

    return get

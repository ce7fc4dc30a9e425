"""Fixtures of the objective's tests: one thread, and the published vectors where they are at hand."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED = Path(os.environ.get("PE_DPO_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def loss_vectors() -> dict[str, Any]:
    """33 in-family configurations × 20 pairs, computed with 60 digits."""
    return _shared_json("vectors/loss_vectors.json")


@pytest.fixture(scope="session")
def testbed() -> dict[str, Any]:
    """Closed forms: two-arm optima, gradient flows, flip times, mixout expectations, diagnostics."""
    return _shared_json("vectors/testbed_expected.json")


def _shared_json(name: str) -> dict[str, Any]:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the checkout: set PE_DPO_SHARED to the folder that holds it")
    return json.loads(path.read_text())

"""Forwards that go through the layers of a model together."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pe_dpo.inference.layerwise import layer_by_layer


class Model(nn.Module):
    """Two layers, the first of which is used twice; the state that it carries along is its own affair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean()
        for layer in (self.layers[0], self.layers[1], self.layers[0]):
            x = layer(x).tanh() + mean
        return x


@pytest.fixture
def loads() -> list[str]:
    return []


def run(model: Model, inputs: list[Tensor], loads: list[str]) -> list[Tensor]:
    @contextmanager
    def loaded(name: str) -> Iterator[None]:
        loads.append(name)
        yield

    layers = {str(index): layer for index, layer in enumerate(model.layers)}
    return layer_by_layer([partial(model, x) for x in inputs], layers, loaded)


def test_each_layer_is_loaded_once_for_all_forwards_and_changes_no_bit(loads: list[str]) -> None:
    model, inputs = Model(), [torch.full((rows, 4), 0.1 * rows) for rows in (1, 2, 3)]
    found = run(model, inputs, loads)
    assert loads == ["0", "1", "0"]
    assert all(torch.equal(one, model(x)) for one, x in zip(found, inputs, strict=True))
    assert not any(one.requires_grad for one in found)
    assert [set(vars(layer)) & {"forward"} for layer in model.layers] == [set(), set()]


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_in_one_forward_ends_the_others_and_is_raised(bad: int, loads: list[str]) -> None:
    model, inputs = Model(), [torch.ones(1, 4) for _ in range(3)]
    inputs[bad] = torch.ones(1, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(model, inputs, loads)
    assert torch.equal(run(model, inputs[1:2], loads)[0], model(inputs[1]))


def test_the_number_of_threads_stays(loads: list[str]) -> None:
    before = torch.get_num_threads()
    run(Model(), [torch.ones(1, 4)], loads)
    assert torch.get_num_threads() == before

"""The example that teaches is also a second implementation of the training loop."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "plain_loop.py"


@pytest.fixture(scope="module")
def plain_loop():
    spec = importlib.util.spec_from_file_location("plain_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_fits_on_a_page():
    assert len(EXAMPLE.read_text().splitlines()) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.1, 0.05])
def test_the_plain_loop_has_the_losses_of_the_trainer(plain_loop, make_recipe, gamma):
    from pe_dpo.inference.policy import load_policy
    from pe_dpo.runs.run import Run
    from pe_dpo.training.preparation import prepare_run
    from pe_dpo.training.train import train

    recipe = make_recipe(f"loss.gamma={gamma}")
    trained = [line["loss"] for line in Run(train(recipe).folder).metrics if "loss" in line]
    data = prepare_run(recipe).data
    plain = list(plain_loop.train(load_policy(recipe, device="cpu").model, data.train, gamma=gamma))
    assert len(plain) == 6
    assert plain[0] != plain[-1]
    assert plain == pytest.approx(trained, abs=1e-6)

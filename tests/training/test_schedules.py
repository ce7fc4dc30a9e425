"""The learning rate along a run: by transformers' schedules, except that the first step of a rise moves weights."""

import pytest
import torch
from safetensors.torch import load_file

from pe_dpo.runs.run import Run
from pe_dpo.training.train import train

pytestmark = pytest.mark.slow


def rates(folder):
    return [line["learning_rate"] for line in Run(folder).metrics if "learning_rate" in line]


@pytest.mark.parametrize(("settings", "expected"), [
    (["train.warmup=3"], [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
    (["train.warmup=0.5"], [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
    (["train.warmup=1"], [1, 1, 0.8, 0.6, 0.4, 0.2]),
    (["train.warmup=0"], [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    (["train.warmup=2", "train.schedule=constant_with_warmup"], [0.5, 1, 1, 1, 1, 1]),
    (["train.warmup=2", "train.schedule=cosine_with_min_lr", "train.schedule_args={min_lr_rate: 1.0}"], [0.5, 1, 1, 1, 1, 1]),
])  # fmt: skip
def test_the_rates_of_six_steps(make_recipe, settings, expected):
    result = train(make_recipe("train.learning_rate=1.0e-3", "train.max_steps=6", *settings))
    assert rates(result.folder) == pytest.approx([1e-3 * one for one in expected], rel=1e-9)


def test_the_first_step_moves_weights(make_recipe):
    result = train(make_recipe("train.max_steps=1", "train.warmup=0.1"))
    weights = load_file(result.folder / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert torch.isfinite(torch.cat([weight.flatten() for weight in weights.values()])).all()


@pytest.mark.parametrize("optimizer", ["adafactor", "rmsprop", "adagrad", "lion_32bit", "adamw_torch_fused"])
def test_optimizers_of_transformers_train(make_recipe, optimizer):
    result = train(make_recipe("train.max_steps=1", "train.warmup=0", f"train.optimizer={optimizer}", output=optimizer))
    weights = load_file(result.folder / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_an_optimizer_that_needs_a_package_which_is_not_there_is_said_before_training(make_recipe):
    from pe_dpo.errors import RecipeError
    from pe_dpo.training.preparation import prepare_run

    with pytest.raises(RecipeError, match=r"train\.optimizer: grokadamw: .*install"):
        prepare_run(make_recipe("train.optimizer=grokadamw"))

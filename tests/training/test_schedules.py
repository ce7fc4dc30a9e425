"""The learning rate along a run: by transformers' schedules, except that the first step of a rise moves weights."""

import pytest
import torch
from one_base import train
from safetensors.torch import load_file

from pe_dpo.runs.run import Run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("settings", "expected"), [
    (["train.warmup=3"], [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
    (["train.warmup=0.5"], [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
    (["train.warmup=1"], [1, 1, 0.8, 0.6, 0.4, 0.2]),
    (["train.warmup=0"], [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    (["train.warmup=2", "train.schedule=constant_with_warmup"], [0.5, 1, 1, 1, 1, 1]),
    (["train.warmup=2", "train.schedule=cosine_with_min_lr", "train.schedule_args={min_lr_rate: 1.0}"], [0.5, 1, 1, 1, 1, 1]),
])  # fmt: skip
def test_the_rates_of_six_steps(make_trainer, settings, expected):
    trainer = make_trainer("train.learning_rate=1.0e-3", *settings, fresh=True)
    trainer.create_optimizer_and_scheduler(6)
    rates = []
    for _ in range(6):
        rates += trainer.lr_scheduler.get_last_lr()[:1]
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([1e-3 * one for one in expected], rel=1e-9)


def test_a_run_logs_its_rates(make_recipe):
    """A rise over two steps, and of the fall after it the one step that is left."""
    result = train(make_recipe("train.max_steps=3", "train.warmup=2"))
    rates = [line["learning_rate"] for line in Run(result.folder).metrics if "learning_rate" in line]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3], rel=1e-9)


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

"""A trainer over the tiny world, as `train` builds it."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_trainer(make_recipe: Callable) -> Callable[..., Any]:
    """A PairTrainer with its adapter's B set to noise (so that policy ≠ reference), unless `fresh`."""

    def make(*overrides: str, fresh: bool = False) -> Any:
        import torch

        from pe_dpo.training.run import build_trainer, prepare_run

        recipe = make_recipe(*overrides)
        trainer = build_trainer(recipe, prepare_run(recipe))
        if not fresh:
            generator = torch.Generator().manual_seed(1)
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.05, generator=generator)
        trainer.held_out_reference = trainer.score_reference()
        return trainer

    return make

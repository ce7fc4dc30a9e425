"""A trainer over the tiny world, as `train` builds it."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_trainer(make_recipe: Callable) -> Callable[..., Any]:
    """A PairTrainer with its adapter's B set to noise (so that policy ≠ reference), unless `fresh`."""

    def make(*overrides: str, fresh: bool = False) -> Any:
        import torch

        from pe_dpo.model.adapter import as_reference
        from pe_dpo.training.arguments import training_arguments
        from pe_dpo.training.run import build_model, prepare_run
        from pe_dpo.training.trainer import PairTrainer

        recipe = make_recipe(*overrides)
        facts, tokenizer, data = prepare_run(recipe)
        args = training_arguments(recipe, data)
        model = build_model(recipe, facts, "cpu")
        if not fresh:
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.05, generator=generator)
        trainer = PairTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            held_out=data.held_out,
            coefficients=recipe.loss.coefficients(),
            margin_scale=recipe.loss.margin_scale,
            token_budget=recipe.train.tokens_per_microbatch,
            keep_checkpoints=recipe.train.keep_checkpoints,
            tokenizer=tokenizer,
        )
        with as_reference(model):
            trainer.held_out_reference = trainer.score_model()
        return trainer

    return make

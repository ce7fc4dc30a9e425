"""A trainer over the tiny world, as `train` builds it."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_trainer(make_recipe: Callable) -> Callable[..., Any]:
    """A PairTrainer with its adapter's B set to noise (so that policy ≠ reference), unless `fresh`."""

    def make(*overrides: str, fresh: bool = False) -> Any:
        import torch

        from pe_dpo.evaluation.reference import open_reference
        from pe_dpo.evaluation.scorer import choose_scorer
        from pe_dpo.training.arguments import training_arguments
        from pe_dpo.training.memory import plan_memory
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
        settings = recipe.train
        scorer = choose_scorer(model, data.train, device="cpu", packing=settings.packing)
        plan = plan_memory(
            model, data.train, scorer, tokens=settings.tokens_per_microbatch, checkpointing=settings.gradient_checkpointing
        )
        policy = "auto" if recipe.reference.policy == "skip" else recipe.reference.policy
        reference = open_reference(model, facts, scorer, policy=policy, token_budget=plan.tokens, path=recipe.reference.store)
        trainer = PairTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            held_out=data.held_out,
            coefficients=recipe.loss.coefficients(),
            margin_scale=recipe.loss.margin_scale,
            scorer=scorer,
            reference=reference,
            token_budget=plan.tokens,
            keep_checkpoints=recipe.train.keep_checkpoints,
            tokenizer=tokenizer,
        )
        trainer.held_out_reference = trainer.score_reference()
        return trainer

    return make

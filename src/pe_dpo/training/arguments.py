"""From the train section of a recipe to the arguments of transformers' Trainer."""

import math
import os
from typing import Any

import torch

from pe_dpo.data import PreparedData
from pe_dpo.recipe import Recipe


def training_arguments(recipe: Recipe, data: PreparedData) -> Any:
    """Return Trainer's arguments; what the recipe does not say is Trainer's default."""
    from transformers import TrainingArguments

    settings = recipe.train
    steps = total_steps(recipe, data)
    tenth = max(1, math.ceil(steps / 10))
    on_cpu = not torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=recipe.output,
        per_device_train_batch_size=settings.pairs_per_step,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=min(math.ceil(settings.warmup * steps), steps - 1) if settings.schedule != "constant" else 0,
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.eval_every or tenth,
        save_strategy="steps",
        save_steps=settings.save_every or tenth,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        report_to=settings.report_to or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
    )
    # One process drives one GPU; without this Trainer would spread the batch over all that it sees.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def total_steps(recipe: Recipe, data: PreparedData) -> int:
    """Return the optimizer steps of a run."""
    settings = recipe.train
    return settings.max_steps or math.ceil(math.ceil(len(data.train) / settings.pairs_per_step) * settings.epochs)

"""From the train section of a recipe to the arguments of transformers' Trainer."""

import math
import os
from pathlib import Path
from typing import Any

import torch

from pe_dpo.data import PreparedData
from pe_dpo.disk import check_can_be_written
from pe_dpo.errors import RecipeError
from pe_dpo.recipe import Recipe

_IN_TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
_WITHOUT_ARGUMENTS = ("linear", "cosine", "constant", "constant_with_warmup")


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
        lr_scheduler_kwargs=dict(settings.schedule_args),
        warmup_steps=warmup_steps(recipe, steps),
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed_of("masks"),  # what torch draws in training is dropout alone
        data_seed=settings.seed_of("order"),
        eval_strategy="steps",
        eval_steps=settings.eval_every or tenth,
        save_strategy="steps",
        save_steps=settings.save_every or tenth,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        report_to="none",  # see `trackers`
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


def check_optimizer(recipe: Recipe) -> None:
    """Check that the optimizer and the schedule of a recipe can be made.

    Raises:
        RecipeError: a package is missing, or the schedule needs or does not know an argument.
    """
    settings = recipe.train
    if settings.optimizer in _IN_TORCH and settings.schedule in _WITHOUT_ARGUMENTS and not settings.schedule_args:
        return  # they can; importing Trainer to see that takes longer than all that `pe-dpo check` does

    from transformers import Trainer, TrainingArguments, get_scheduler

    args = TrainingArguments(output_dir=recipe.output, optim=settings.optimizer, use_cpu=not torch.cuda.is_available())
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"train.optimizer: {settings.optimizer}: {error}; install it, or take adamw_torch") from error
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        get_scheduler(
            settings.schedule,
            torch.optim.SGD([weight], lr=settings.learning_rate),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(settings.schedule_args),
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train.schedule: {settings.schedule}: {error}; see train.schedule_args") from error


def warmup_steps(recipe: Recipe, steps: int) -> int:
    """Return the steps in which the learning rate rises, of so many in all; the last step is none of them."""
    settings = recipe.train
    if settings.schedule == "constant":
        return 0
    asked = int(settings.warmup) if settings.warmup >= 1 else math.ceil(settings.warmup * steps)
    return min(asked, steps - 1)


def total_steps(recipe: Recipe, data: PreparedData) -> int:
    """Return the optimizer steps of a run."""
    settings = recipe.train
    return settings.max_steps or math.ceil(math.ceil(len(data.train) / settings.pairs_per_step) * settings.epochs)


def check_disk(recipe: Recipe, *, parameters: int, saves: int, there: int = 0) -> None:
    """Check that the disk takes files and has room for the checkpoints of a run and for its adapter, before it takes a step.

    Counted is what there must be at least: the adapter in float32 and what Adam remembers of it. While a checkpoint is written,
    all that are kept are still there.

    Args:
        recipe: The recipe of the run.
        parameters: Trainable ones.
        saves: How many checkpoints are still to be written.
        there: How many lie there.

    Raises:
        DiskError: it does not, or has not.
    """
    settings = recipe.train
    states = 0 if "adam" not in settings.optimizer else 2 if "8bit" in settings.optimizer else 8
    adapter, checkpoint = 4 * parameters, (4 + states) * parameters
    new = max(0, min(max(2, settings.keep_checkpoints) + 1, there + saves) - there)
    check_can_be_written(
        Path(recipe.output),
        new * checkpoint + adapter,
        what=f"an adapter of {adapter / 1e6:,.1f} MB with {new} × {checkpoint / 1e6:,.1f} MB of checkpoints at a time",
        remedy="make room, choose another `output`, or lower train.keep_checkpoints",
    )

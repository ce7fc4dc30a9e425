"""One training run from recipe to adapter; read it as the table of contents of the product."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pe_dpo.data import PreparedData, data_hash
from pe_dpo.data.settings import prepare_from_settings
from pe_dpo.errors import DataError
from pe_dpo.evaluation.held_out import save_pairs
from pe_dpo.evaluation.pairs import ScoredPairs, pair_metrics
from pe_dpo.model.adapter import as_reference, attach_adapter, save_adapter, start_from_adapter
from pe_dpo.model.base import (
    BaseFacts,
    check_weights_unpacked,
    checkpoint_activations,
    end_token_ids,
    four_bit_layers,
    inspect_base,
    load_base,
    load_tokenizer,
)
from pe_dpo.model.fingerprint import base_fingerprint
from pe_dpo.recipe import Recipe, describe, warnings
from pe_dpo.training.callbacks import MetricsFile, StopOnSignal
from pe_dpo.training.checkpoints import checkpoint_step, newest_whole_checkpoint, write_atomically
from pe_dpo.training.model_card import model_card
from pe_dpo.training.run_folder import (
    append_metrics,
    check_same_inputs,
    locked,
    open_run_folder,
    rewind_metrics,
    update_run,
    versions,
)
from pe_dpo.training.start import StartCheck, check_start
from pe_dpo.training.trainer import OptimizerBatches, PairTrainer


class TrainResult(NamedTuple):
    """What a run came to."""

    folder: Path
    before: dict[str, float]
    """Held-out metrics at step 0; empty without held-out pairs."""
    after: dict[str, float]
    start: StartCheck
    steps: int
    interrupted_by: int | None
    """The signal that stopped the run after a checkpoint, or None."""
    remarks: list[str]
    """What looks off, in words, each with what to turn."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    callbacks: Sequence[Any] = (),
) -> TrainResult:
    """Train an adapter by a recipe and return what came of it; the run folder holds everything.

    Args:
        recipe: checked, from `load_recipe`.
        resume: go on with the run in `recipe.output` from its newest whole checkpoint.
        overwrite: remove the run in `recipe.output` first.
        say: gets a line of facts now and then, for people.
        callbacks: further callbacks of transformers' Trainer.

    Raises:
        RunFolderError: the folder is taken, locked, or holds a run of another recipe, data or base.
        DataError: the pairs cannot be used.
        ModelError: the base or an adapter cannot, or the reference is not what it must be.
        TrainingError: the run had to stop; checkpoints stay.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    if not state.is_main_process:
        return _train(recipe, resume, say=lambda line: None, callbacks=callbacks)
    with locked(Path(recipe.output)) as folder:
        open_run_folder(folder, recipe, resume=resume, overwrite=overwrite)
        return _train(recipe, resume, say=say, callbacks=callbacks)


def _train(recipe: Recipe, resume: bool, *, say: Callable[[str], None], callbacks: Sequence[Any]) -> TrainResult:
    from transformers import set_seed

    folder = Path(recipe.output)
    for line in [*describe(recipe.loss).lines(), *warnings(recipe)]:
        say(line)
    facts = inspect_base(**recipe.model.model_dump())
    tokenizer = load_tokenizer(recipe.model.base, revision=recipe.model.revision)
    data = prepare_data(recipe, facts, tokenizer)
    for line in data.report.lines():
        say(line)

    args = training_arguments(recipe, len(data.train))
    set_seed(recipe.train.seed)
    model = build_model(recipe, facts, args.device)
    fingerprint = base_fingerprint(model)
    hashes = {"data": data_hash(data.train), "held_out": data_hash(data.held_out), "base": fingerprint}
    checkpoint = _open_records(folder, recipe, facts, model, data, hashes, resume, say) if args.should_save else None
    checkpoint = _share(checkpoint)

    coefficients, budget = recipe.loss.coefficients(), recipe.train.tokens_per_microbatch
    stop = StopOnSignal()
    trainer = PairTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        held_out=data.held_out,
        coefficients=coefficients,
        margin_scale=recipe.loss.margin_scale,
        token_budget=budget,
        keep_checkpoints=recipe.train.keep_checkpoints,
        tokenizer=tokenizer,
        callbacks=[MetricsFile(folder), stop, *callbacks],
    )
    policy_is_reference = recipe.adapter.start is None or recipe.adapter.reference == "adapter"
    first = next(iter(OptimizerBatches(len(data.train), recipe.train.pairs_per_step, recipe.train.seed)))
    start = check_start(
        model,
        [data.train[index] for index in first],
        token_budget=budget,
        device=args.device,
        coefficients=coefficients,
        margin_scale=recipe.loss.margin_scale,
        policy_is_reference=policy_is_reference,
    )
    say(_start_line(start))
    before: dict[str, float] = {}
    remarks: list[str] = []
    if data.held_out:
        # Before the first step the policy still is the reference, unless an adapter starts against the raw base.
        with contextlib.nullcontext() if policy_is_reference else as_reference(model):
            trainer.held_out_reference = trainer.score_model()
        scored = trainer.score_held_out()
        before = {"loss": float(scored.loss.mean()), **pair_metrics(scored)}
        remarks += scale_remarks(recipe, scored)
        if args.should_save and checkpoint is None:
            append_metrics(folder, {"step": 0, **{f"eval_{key}": value for key, value in before.items()}})
    if args.should_save and checkpoint is None:
        update_run(folder, status="training", start=start._asdict(), before=before)

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    check_weights_unpacked(model)
    after: dict[str, float] = {}
    final = trainer.score_held_out() if data.held_out else None
    if final is not None:
        after = {"loss": float(final.loss.mean()), **pair_metrics(final)}
    remarks += outcome_remarks(before, after)
    result = TrainResult(folder, before, after, start, trainer.state.global_step, stop.received, remarks)
    if args.should_save:
        _finish(result, recipe, model, tokenizer, data, final)
    trainer.accelerator.wait_for_everyone()
    return result


def prepare_data(recipe: Recipe, facts: BaseFacts, tokenizer: Any) -> PreparedData:
    """Return the recipe's pairs as token ids, training and held out.

    Raises:
        DataError: see `prepare_from_settings`; or the loss asks for margins and no pair has one.
    """
    data = prepare_from_settings(
        recipe.data,
        tokenizer=tokenizer,
        context_length=facts.context_length,
        end_token_ids=end_token_ids(recipe.model.base, revision=recipe.model.revision),
    )
    if recipe.loss.margin_scale and not any(pair.margin for pair in data.train):
        raise DataError(
            f"{recipe.data.train}: loss.margin_scale is {recipe.loss.margin_scale:g}, but no pair has a margin; name its column "
            "in data.columns (margin, or chosen_score and rejected_score), or drop margin_scale"
        )
    return data


def build_model(recipe: Recipe, facts: BaseFacts, device: torch.device | str) -> Any:
    """Return base and adapter on the device, ready to train."""
    base = load_base(facts, device=device)
    checkpointing = recipe.train.gradient_checkpointing
    if torch.device(device).type != "cpu" if checkpointing == "auto" else checkpointing:
        checkpoint_activations(base)
    adapter = recipe.adapter
    if adapter.start:
        return start_from_adapter(base, adapter.start, reference=adapter.reference or "base")
    return attach_adapter(
        base,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        targets=adapter.targets,
        init=adapter.init,
        seed=recipe.train.seed,
    )


def training_arguments(recipe: Recipe, pairs: int) -> Any:
    """Return Trainer's arguments; what the recipe does not say is Trainer's default."""
    from transformers import TrainingArguments

    settings = recipe.train
    steps = settings.max_steps or math.ceil(math.ceil(pairs / settings.pairs_per_step) * settings.epochs)
    tenth = max(1, math.ceil(steps / 10))
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=recipe.output,
        per_device_train_batch_size=settings.pairs_per_step,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=math.ceil(settings.warmup * steps) if settings.schedule != "constant" else 0,
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        eval_strategy="steps" if recipe.data.eval != 0 else "no",
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


def scale_remarks(recipe: Recipe, scored: ScoredPairs) -> list[str]:
    """Return a warning when γ ≠ β is out of scale with the reference: |δ| = |γ − β|·sd(Δ0) above 1."""
    if not scored.has_reference or len(scored.loss) < 2:
        return []
    per_token = recipe.loss.reduce == "mean"
    spread = float((scored.reference_preference_per_token if per_token else scored.reference_preference).std())
    delta = (recipe.loss.gamma_value - recipe.loss.beta) * spread
    if abs(delta) <= 1 or recipe.loss.gamma_value == 0:
        return []
    return [
        f"δ = (γ−β)·sd(Δ0) = {delta:.2f}: with sd(Δ0) = {spread:.3g} nats a few pairs take nearly all of the gradient at the "
        "start; bring gamma closer to beta, or use reduce: mean"
    ]


def outcome_remarks(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Return what looks off after training, in words."""
    if not before or not after:
        return []
    remarks = []
    if after.get("displacement/chosen", 0.0) < 0 and after.get("displacement/rejected", 0.0) < 0:
        remarks.append(
            "both answers became less likely than under the reference (chosen "
            f"{after['displacement/chosen']:.2f}, rejected {after['displacement/rejected']:.2f} nats): likelihood moved "
            "elsewhere; loss.sft_weight counteracts it"
        )
    if after["accuracy/policy"] == before["accuracy/policy"] and after["loss"] == before["loss"]:
        remarks.append("nothing moved: raise train.learning_rate or train.epochs")
    return remarks


def _open_records(
    folder: Path,
    recipe: Recipe,
    facts: BaseFacts,
    model: Any,
    data: PreparedData,
    hashes: dict[str, str],
    resume: bool,
    say: Callable[[str], None],
) -> Path | None:
    """Write what the run starts from, or check it and return the checkpoint to resume from."""
    if resume and (folder / "run.json").is_file():
        check_same_inputs(folder, **hashes)
        checkpoint, passed_over = newest_whole_checkpoint(folder)
        for line in passed_over:
            say(line)
        say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning")
        rewind_metrics(folder, checkpoint_step(checkpoint) if checkpoint else -1)
        if checkpoint:
            return checkpoint
    reference = recipe.adapter.reference or "base"
    update_run(
        folder,
        status="starting",
        versions=versions(),
        hashes=hashes,
        base={
            "id": recipe.model.base,
            "revision": getattr(model.config, "_commit_hash", None) or recipe.model.revision,
            "quantize": facts.quantize,
            "dtype": str(facts.dtype).removeprefix("torch."),
            "parameters": facts.parameters,
            "quantized_layers": [name for name, _ in four_bit_layers(model)],
        },
        reference_card={
            "is": "the base with adapters off" if reference == "base" else f"a frozen copy of {recipe.adapter.start}",
            "base_sha256": hashes["base"],
            "run_in_training": recipe.loss.gamma_value != 0,
        },
        loss=describe(recipe.loss)._asdict(),
        pairs={"train": len(data.train), "held_out": len(data.held_out)},
    )
    write_atomically(folder / "data_report.json", json.dumps(data.report.to_dict(), indent=1, ensure_ascii=False))
    return None


def _share(checkpoint: Path | None) -> Path | None:
    """Tell every process what the main one resumes from."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([checkpoint])[0]


def _start_line(start: StartCheck) -> str:
    same = "" if start.largest_difference is None else f"max |log π − log π0| {start.largest_difference:g}, "
    return f"step 0: {same}loss {start.loss:.4f}, mean score {start.score:.4g}"


def _finish(
    result: TrainResult, recipe: Recipe, model: Any, tokenizer: Any, data: PreparedData, scored: ScoredPairs | None
) -> None:
    """Write what the finished (or interrupted) run leaves for others."""
    folder = result.folder
    if result.interrupted_by is not None:
        update_run(folder, status="interrupted", step=result.steps)
        return
    save_adapter(model, folder)
    tokenizer.save_pretrained(folder)
    if scored is not None:
        save_pairs(scored, data.held_out, folder / "eval_pairs.parquet")
    write_atomically(folder / "README.md", model_card(recipe, result.before, result.after))
    update_run(
        folder, status="finished", step=result.steps, before=result.before, after=result.after, remarks=result.remarks
    )

"""One training run from recipe to adapter; read it as the table of contents of the product."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pe_dpo.data import data_hash
from pe_dpo.errors import DataError, TrainingError
from pe_dpo.inference.inputs import Inputs, build_model, read_inputs
from pe_dpo.inference.reference import open_reference
from pe_dpo.inference.scorer import choose_scorer
from pe_dpo.log import quiet
from pe_dpo.metrics.table import PairTable
from pe_dpo.model.adapter import adapter_is_zero, attach_adapter, lent, parameter_targets, save_adapter
from pe_dpo.model.adapter_config import check_adapter
from pe_dpo.model.base import answer_end_tokens, empty_model
from pe_dpo.model.mixout import attach_mixout
from pe_dpo.model.provenance import adapter_fingerprint, base_record
from pe_dpo.model.quantization import check_weights_unpacked
from pe_dpo.objective import Loss
from pe_dpo.progress import progress
from pe_dpo.recipe import Recipe, describe, warnings, with_absolute_paths, with_gamma
from pe_dpo.runs.files import snapshot_folder
from pe_dpo.runs.folder import append_metrics, check_run_folder, locked, open_run_folder, update_run
from pe_dpo.runs.records import finish_records, start_records
from pe_dpo.training.arguments import check_trackers, total_steps, training_arguments
from pe_dpo.training.callbacks import MetricsFile, StopOnSignal
from pe_dpo.training.gamma import find_gamma, record_gamma, repair_recipe, with_recorded_gamma
from pe_dpo.training.measurements import Snapshots, keep_measurements, keep_scaled, snapshot_steps
from pe_dpo.training.memory import plan_memory
from pe_dpo.training.mixing import Mixing, mixout_warnings
from pe_dpo.training.remarks import scale_remarks
from pe_dpo.training.start import StartCheck, check_diagonal, check_end, check_start
from pe_dpo.training.trainer import PairTrainer, forget_if_any
from pe_dpo.training.watch import Watch

logger = logging.getLogger(__name__)


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
    reduce: Literal["sum", "mean"] = "sum"
    """Of the loss: which log-probs its 2×2 table is about."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Any] = (),
    shared: "SharedRun | None" = None,
) -> TrainResult:
    """Train an adapter by a recipe and return what came of it; the run folder holds everything.

    Args:
        recipe: checked, from `load_recipe`.
        resume: go on with the run in `recipe.output` from its newest whole checkpoint.
        overwrite: remove the run in `recipe.output` first.
        callbacks: further callbacks of transformers' Trainer.
        shared: base and pairs of an earlier run with the same sections `model` and `data`, to be used again; the base is given
            back without the adapter.

    Raises:
        RunFolderError: the folder is taken, locked, or holds a run of another recipe, data or base.
        DataError: the pairs cannot be used.
        ModelError: the base or an adapter cannot, or the reference is not what it must be.
        TrainingError: the run had to stop, or came to numbers that are not finite; checkpoints stay.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    recipe = with_absolute_paths(recipe)
    if resume:
        recipe = with_recorded_gamma(Path(recipe.output), recipe)
    if not state.is_main_process:
        with quiet(), lent(shared.base) if shared else nullcontext():
            prepared, base = prepare_run(recipe, shared=shared), shared.base if shared else None
            return _train(recipe, prepared, None, base, callbacks=callbacks)
    folder = Path(recipe.output)
    if resume:
        repair_recipe(folder)
    check_run_folder(folder, recipe, resume=resume, overwrite=overwrite)
    prepared = prepare_run(recipe, shared=shared)
    with locked(folder), lent(shared.base) if shared else nullcontext():
        # Again, since another run may have come and gone while the pairs were prepared.
        check_run_folder(folder, recipe, resume=resume, overwrite=overwrite)
        base = shared.base if shared else None
        try:
            return _train(recipe, prepared, folder, base, resume=resume, callbacks=callbacks)
        except TrainingError as error:
            update_run(folder, status="failed", why=str(error))
            raise


class SharedRun(NamedTuple):
    """What several runs with the same sections `model` and `data` have in common."""

    prepared: Inputs
    base: Any
    """Loaded, without adapters."""


def prepare_run(
    recipe: Recipe,
    *,
    shared: SharedRun | None = None,
) -> Inputs:
    """Return the facts of the base, the tokenizer and the pairs, or those that are `shared`; no weights are read.

    Raises:
        ModelError: see `inspect_base`, `check_adapter` and `load_tokenizer`; or an adapter target matches nothing.
        DataError: see `prepare_pairs`; or the loss asks for margins and no pair has one.
    """
    check_trackers(recipe.train.report_to)
    for line in describe(recipe.loss).lines():
        logger.info(line)
    for line in warnings(recipe):
        logger.warning(line)
    if recipe.adapter.start:
        check_adapter(recipe.adapter.start)
    prepared = shared.prepared if shared else read_inputs(recipe)
    if not recipe.adapter.start and recipe.adapter.targets != "all-linear":  # else each target matches, or is the adapter's
        facts = prepared.facts
        attach_adapter(empty_model(facts.base, facts.config), rank=1, alpha=1, targets=recipe.adapter.targets)
    if recipe.loss.margin_scale and not any(pair.margin for pair in prepared.data.train):
        raise DataError(
            f"{recipe.data.train}: loss.margin_scale is {recipe.loss.margin_scale:g}, but no pair has a margin; name its "
            "column in data.columns (margin, or chosen_score and rejected_score), or drop margin_scale"
        )
    for line in prepared.data.report.lines():
        logger.info(line)
    for line in mixout_warnings(recipe, prepared.facts, total_steps(recipe, prepared.data)):
        logger.warning(line)
    if recipe.generation.scales and not prepared.data.held_out:
        logger.warning("generation.scales: no pairs are held out, so nothing will be measured at other scales; set data.eval")
    return prepared


def _train(
    recipe: Recipe,
    prepared: Inputs,
    folder: Path | None,
    base: Any,
    *,
    resume: bool = False,
    callbacks: Sequence[Any],
) -> TrainResult:
    """Load, check, train, measure; `folder` is None in every process but the one that writes."""
    from accelerate.utils import broadcast_object_list

    facts, tokenizer, data = prepared
    stop = StopOnSignal()
    began = time.perf_counter()
    listeners = [stop, MetricsFile(Path(recipe.output)), *callbacks]
    trainer = build_trainer(recipe, prepared, folder, resume=resume, base=base, callbacks=listeners)
    if recipe.loss.is_calibrated:
        recipe = with_gamma(recipe, trainer.loss.gamma)
    model, reference = trainer.model, trainer.reference
    hashes = {"data": data_hash(data.train), "held_out": data_hash(data.held_out), "base": reference.base_fingerprint}
    if recipe.adapter.start:
        hashes["start"] = adapter_fingerprint(Path(recipe.adapter.start))
    describe_base = partial(base_record, model, facts, tokenizer)
    checkpoint = start_records(folder, recipe, describe_base, data, hashes) if folder else None
    checkpoint = broadcast_object_list([checkpoint])[0]
    start = _check_start(trainer, recipe)
    logger.info(_start_line(start))
    first = _score_before(trainer, recipe)
    first = trainer.first = first.since(first)
    if recipe.policy_starts_as_reference:
        check_diagonal(first)
    at_start = trainer.watched_metrics(first)
    before = at_start if data.held_out else {}
    if folder and checkpoint is None:
        update_run(folder, status="training", start=start._asdict(), before=before)
        append_metrics(folder, {"step": 0, **{f"{trainer.prefix}_{key}": value for key, value in at_start.items()}})
    scale = scale_remarks(recipe, first, of="held-out" if data.held_out else "watched training")
    for line in scale:
        logger.warning(line)
    watch = Watch(Path(recipe.output), recipe.loss, at_start)
    trainer.add_callback(watch)

    ends = answer_end_tokens(tokenizer, recipe.model.base, revision=recipe.model.revision)
    keep = partial(keep_measurements, trainer=trainer, settings=recipe.generation, end_tokens=ends)
    if data.held_out and recipe.generation.snapshots:
        trainer.add_callback(
            Snapshots(
                snapshot_steps(recipe.generation.snapshots, total_steps(recipe, data)),
                lambda step: keep(folder and snapshot_folder(folder, step), scored=trainer.score_held_out()),
            )
        )
    try:
        trainer.train_to(total_steps(recipe, data), checkpoint)
    finally:
        stop.restore()
        reference.flush()

    check_weights_unpacked(model)
    last = trainer.score_held_out() if data.held_out else None
    after = trainer.watched_metrics(last) if last else {}
    remarks = [*scale, *watch.conclude(after, has_moved=not adapter_is_zero(model))]
    step, reduce = trainer.state.global_step, recipe.loss.reduce
    result = TrainResult(Path(recipe.output), before, after, start, step, stop.received, remarks, reduce)
    if folder:
        update_run(folder, scoring=_scoring_facts(trainer))
    if folder and stop.received is not None:
        update_run(folder, status="interrupted", step=result.steps)
    if stop.received is None:
        _keep_outcome(trainer, recipe, folder, result, last, keep, began)
    trainer.accelerator.wait_for_everyone()
    return result


def _keep_outcome(
    trainer: PairTrainer,
    recipe: Recipe,
    folder: Path | None,
    result: TrainResult,
    scored: PairTable | None,
    keep: Callable[..., None],
    began: float,
) -> None:
    """Write the adapter and what a complete run came to; its scaled states are measured in every process.

    Raises:
        TrainingError: it came to numbers that are not finite.
    """
    trainer.check_adapter_is_finite()
    check_end(scored)
    if folder:
        save_adapter(trainer.model, folder)
        trainer.processing_class.save_pretrained(folder)
        if scored is not None:
            with progress("sampling"):
                keep(folder, scored=scored)
        update_run(folder, seconds=time.perf_counter() - began)
    keep_scaled(keep, trainer, folder, recipe.generation.scales)
    if folder:
        finish_records(folder, recipe, before=result.before, after=result.after, step=result.steps, remarks=result.remarks)


def build_trainer(
    recipe: Recipe,
    prepared: Inputs,
    folder: Path | None = None,
    *,
    resume: bool = False,
    base: Any = None,
    callbacks: Sequence[Any] = (),
) -> PairTrainer:
    """Return the trainer of a run: base and adapter loaded, the way of its pairs chosen, memory planned, reference and γ found.

    The folder of a run that begins is made ready last, so that what lies there is not removed for a run that cannot begin.

    Raises:
        ModelError: the base or an adapter cannot be used, or cannot be packed although the recipe insists.
        StoreUnavailable: the recipe insists on a store.
        RecipeError, UsageError: see `find_gamma`.
    """
    from transformers import set_seed

    facts, tokenizer, data = prepared
    settings = recipe.train
    args = training_arguments(recipe, data)
    set_seed(settings.seed)
    model = build_model(recipe, facts, args.device, base=base)
    bare = parameter_targets(model)
    if bare:
        logger.warning(
            f"the adapter is also on {', '.join(bare)}, experts or routers that PEFT trains as bare parameters; `pe-dpo "
            "merge` cannot merge those. Name adapter.targets (q_proj, v_proj, …) to leave them out"
        )
    mixout = attach_mixout(model, recipe.mixout.p, seed=settings.seed, form=recipe.mixout.form)
    scorer = choose_scorer(model, [*data.train, *data.held_out], device=args.device, packing=settings.packing)
    plan = plan_memory(
        model, data.train, scorer, tokens=settings.tokens_per_microbatch, checkpointing=settings.gradient_checkpointing
    )
    logger.info(f"{plan.tokens} tokens per forward{', activations recomputed in the backward' if plan.checkpointing else ''}")
    # γ = 0 never asks for training pairs; those that are held out have a reference all the same.
    policy = "auto" if recipe.reference.policy == "skip" else recipe.reference.policy
    reference = open_reference(model, facts, scorer, policy=policy, token_budget=plan.tokens, path=recipe.reference.store)
    asked, (recipe, calibration) = recipe, find_gamma(recipe, reference, data.train)
    trainer = PairTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        held_out=data.held_out,
        loss=Loss(**recipe.loss.coefficients()),
        scorer=scorer,
        reference=reference,
        token_budget=plan.tokens,
        keep_checkpoints=settings.keep_checkpoints,
        tokenizer=tokenizer,
        prompts_together=settings.prompts_together,
        starts_at_reference=recipe.policy_starts_as_reference,
        callbacks=callbacks,
    )
    if mixout.layers:
        trainer.add_callback(Mixing(mixout, recipe.mixout, total_steps(recipe, data), trainer))
    if folder:
        open_run_folder(folder, asked, resume=resume)
        if calibration:
            record_gamma(folder, recipe, calibration)
    return trainer


def _check_start(trainer: PairTrainer, recipe: Recipe) -> StartCheck:
    """Check step 0 on the pairs of the first optimizer step."""
    pairs = trainer.train_dataset
    first = next(iter(trainer.optimizer_batches()))
    return check_start(
        trainer.model,
        [pairs[index] for index in first],
        trainer.scorer,
        token_budget=trainer.token_budget,
        loss=trainer.loss,
        policy_is_reference=recipe.policy_starts_as_reference,
        is_fresh=recipe.adapter.start is None,
    )


def _score_before(trainer: PairTrainer, recipe: Recipe) -> PairTable:
    """Check the stored reference, fill it if the recipe says so, and return the watched pairs as they are scored at step 0."""
    reference, pairs, watched = trainer.reference, trainer.train_dataset, trainer.watched
    uses_reference = recipe.loss.gamma_value != 0
    forget_if_any(reference, reference.recheck([*(pairs if uses_reference else []), *trainer.held_out]))
    if recipe.reference.policy == "store" and uses_reference:
        mine = pairs[trainer.args.process_index :: trainer.args.world_size]
        with progress("scoring, reference"):
            reference.logprobs(mine)
        reference.flush()
    trainer.held_out_reference = trainer.score_reference()
    reference.flush()
    if recipe.policy_starts_as_reference and not trainer.any_process(bool(reference.found)):
        return trainer.score_held_out(
            trainer.held_out_reference
        )  # this very moment's: π is π0, there is nothing to score again
    policy = trainer.score_model()
    if recipe.policy_starts_as_reference and forget_if_any(reference, reference.difference(watched, policy)):
        trainer.held_out_reference = trainer.score_reference()
    return trainer.score_held_out(policy)


def _scoring_facts(trainer: PairTrainer) -> dict[str, Any]:
    return {
        "path": trainer.scorer.path,
        "tokens_per_forward": trainer.token_budget,
        "reference_pairs_computed": trainer.reference.computed,
    }


def _start_line(start: StartCheck) -> str:
    same = "" if start.largest_difference is None else f"max |log π − log π0| {start.largest_difference:g}, "
    return f"step 0: {same}loss {start.loss:.4f}, mean score {start.score:.4g}"

"""One training run from recipe to adapter; read it as the table of contents of the product."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pe_dpo.data import data_hash
from pe_dpo.errors import DataError, TrainingError
from pe_dpo.inference.inputs import Inputs, read_inputs
from pe_dpo.inference.policy import load_policy
from pe_dpo.inference.reference import open_reference
from pe_dpo.inference.scorer import choose_scorer
from pe_dpo.log import quiet
from pe_dpo.metrics.table import PairTable
from pe_dpo.model.adapter import adapter_is_zero, attach_adapter, borrowed_base, save_adapter, scaled
from pe_dpo.model.adapter_config import check_adapter
from pe_dpo.model.base import empty_model
from pe_dpo.model.mixout import attach_mixout
from pe_dpo.model.provenance import adapter_fingerprint, adapter_fingerprints, base_record
from pe_dpo.model.quantization import check_weights_unpacked
from pe_dpo.objective import Loss
from pe_dpo.progress import progress
from pe_dpo.recipe import Recipe, describe, warnings, with_absolute_paths, with_gamma
from pe_dpo.runs.files import scaled_folder, snapshot_folder
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter, check_run_folder, locked
from pe_dpo.training.arguments import check_trackers, total_steps, training_arguments
from pe_dpo.training.callbacks import MetricsFile, StopOnSignal
from pe_dpo.training.gamma import find_gamma, record_gamma, repair_recipe, with_recorded_gamma
from pe_dpo.training.measurements import Snapshots, keep_measurements, snapshot_steps
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
    run = Run(recipe.output)
    if resume:
        recipe = with_recorded_gamma(run, recipe)
    with ExitStack() as stack:
        if not state.is_main_process:
            stack.enter_context(quiet())
            prepared = prepare_run(recipe, shared=shared)
        else:
            if resume:
                repair_recipe(run)
            check_run_folder(run.folder, recipe, resume=resume, overwrite=overwrite)
            prepared = prepare_run(recipe, shared=shared)
            stack.enter_context(locked(run.folder))
            # Again, since another run may have come and gone while the pairs were prepared.
            check_run_folder(run.folder, recipe, resume=resume, overwrite=overwrite)
        if shared:
            stack.enter_context(borrowed_base(shared.base))
        writer = RunWriter(run.folder, writes=state.is_main_process)
        try:
            return _train(recipe, prepared, writer, shared.base if shared else None, resume=resume, callbacks=callbacks)
        except TrainingError as error:
            writer.update(status="failed", why=str(error))
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
    """Return what the base is, the tokenizer and the pairs, or those that are `shared`; no weights are read.

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
        facts = prepared.base
        attach_adapter(empty_model(facts.base, facts.config), rank=1, alpha=1, targets=recipe.adapter.targets)
    if recipe.loss.margin_scale and not any(pair.margin for pair in prepared.data.train):
        raise DataError(
            f"{recipe.data.train}: loss.margin_scale is {recipe.loss.margin_scale:g}, but no pair has a margin; name its "
            "column in data.columns (margin, or chosen_score and rejected_score), or drop margin_scale"
        )
    for line in prepared.data.report.lines():
        logger.info(line)
    for line in mixout_warnings(recipe, prepared.base, total_steps(recipe, prepared.data)):
        logger.warning(line)
    if recipe.generation.scales and not prepared.data.held_out:
        logger.warning("generation.scales: no pairs are held out, so nothing will be measured at other scales; set data.eval")
    return prepared


def _train(
    recipe: Recipe, prepared: Inputs, writer: RunWriter, base: Any, *, resume: bool, callbacks: Sequence[Any]
) -> TrainResult:
    """Load, check, train, measure."""
    began = time.perf_counter()
    data = prepared.data
    folder, steps = writer.folder, total_steps(recipe, data)
    stop = StopOnSignal()
    trainer = build_trainer(
        recipe, prepared, writer, resume=resume, base=base, callbacks=[stop, MetricsFile(writer), *callbacks]
    )
    if recipe.loss.is_calibrated:
        recipe = with_gamma(recipe, trainer.loss.gamma)
    checkpoint = _record_start(writer, recipe, prepared, trainer)

    # What must hold before the first step, and how the watched pairs are scored then.
    start = check_start(
        trainer.model,
        [data.train[index] for index in next(iter(trainer.optimizer_batches()))],
        trainer.scorer,
        loss=trainer.loss,
        policy_is_reference=recipe.policy_starts_as_reference,
        is_fresh=recipe.adapter.start is None,
    )
    logger.info(start.describe())
    first = _score_before(trainer, recipe)
    first = trainer.first = first.since(first)
    if recipe.policy_starts_as_reference:
        check_diagonal(first)
    at_start = trainer.watched_metrics(first)
    before = at_start if data.held_out else {}
    if checkpoint is None:
        writer.update(status="training", start=start._asdict(), before=before)
        writer.log({"step": 0, **{f"{trainer.prefix}_{key}": value for key, value in at_start.items()}})
    scale = scale_remarks(recipe, first, of="held-out" if data.held_out else "watched training")
    for line in scale:
        logger.warning(line)

    watch = Watch(writer, recipe.loss, at_start)
    trainer.add_callback(watch)

    def keep(place: Path, scored: PairTable) -> None:
        if writer.writes:
            keep_measurements(place, trainer, scored, recipe.generation)

    if data.held_out and recipe.generation.snapshots:
        points = snapshot_steps(recipe.generation.snapshots, steps)
        trainer.add_callback(Snapshots(points, lambda step: keep(snapshot_folder(folder, step), trainer.score_held_out())))
    try:
        trainer.train_to(steps, checkpoint)
    finally:
        stop.restore()
        trainer.reference.flush()

    check_weights_unpacked(trainer.model)
    last = trainer.score_held_out() if data.held_out else None
    after = trainer.watched_metrics(last) if last else {}
    remarks = [*scale, *watch.conclude(after, has_moved=not adapter_is_zero(trainer.model))]
    result = TrainResult(folder, before, after, start, trainer.state.global_step, stop.received, remarks, recipe.loss.reduce)
    scoring = {"path": trainer.scorer.path, "tokens_per_forward": trainer.scorer.token_budget}
    writer.update(scoring={**scoring, "reference_pairs_computed": trainer.reference.computed})
    if stop.received is not None:
        writer.update(status="interrupted", step=result.steps)
    else:
        _finish(writer, recipe, trainer, result, last, keep, began)
    trainer.accelerator.wait_for_everyone()
    return result


def _record_start(writer: RunWriter, recipe: Recipe, prepared: Inputs, trainer: PairTrainer) -> Path | None:
    """Write down what a fresh run starts from, or check it for one that goes on; return the checkpoint to go on from."""
    from accelerate.utils import broadcast_object_list

    info, tokenizer, data = prepared
    base = trainer.reference.base_fingerprint
    hashes = {"data": data_hash(data.train), "held_out": data_hash(data.held_out), "base": base}
    if recipe.adapter.start:
        hashes["start"] = adapter_fingerprint(Path(recipe.adapter.start))
    checkpoint = None
    if writer.writes and Run(writer.folder).info.hashes.data is not None:
        checkpoint = writer.resume(hashes)
    elif writer.writes:
        pairs = {"train": len(data.train), "held_out": len(data.held_out)}
        described = base_record(trainer.model, info, tokenizer)
        writer.record_start(recipe, hashes, base=described, data_report=data.report.to_dict(), pairs=pairs)
    found: Path | None = broadcast_object_list([checkpoint])[0]
    return found


def _finish(
    writer: RunWriter,
    recipe: Recipe,
    trainer: PairTrainer,
    result: TrainResult,
    scored: PairTable | None,
    keep: Callable[[Path, PairTable], None],
    began: float,
) -> None:
    """Write the adapter and what a complete run came to; its scaled states are measured in every process.

    Raises:
        TrainingError: it came to numbers that are not finite.
    """
    trainer.check_adapter_is_finite()
    check_end(scored)
    if writer.writes:
        save_adapter(trainer.model, result.folder)
        trainer.processing_class.save_pretrained(result.folder)
    if scored is not None:
        with progress("sampling"):
            keep(result.folder, scored)
    writer.update(seconds=time.perf_counter() - began)
    for scale in recipe.generation.scales if trainer.held_out else ():
        with scaled(trainer.model, scale):
            at_scale = trainer.score_held_out()
            with progress("sampling"):
                keep(scaled_folder(result.folder, scale), at_scale)
    adapter = adapter_fingerprints(result.folder) if writer.writes else {}
    writer.finish(recipe, before=result.before, after=result.after, step=result.steps, remarks=result.remarks, adapter=adapter)


def build_trainer(
    recipe: Recipe,
    prepared: Inputs,
    writer: RunWriter | None = None,
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

    info, tokenizer, data = prepared
    settings = recipe.train
    args = training_arguments(recipe, data)
    set_seed(settings.seed)
    policy = load_policy(recipe, base=base, info=info, tokenizer=tokenizer, device=args.device)
    model = policy.model
    mixout = attach_mixout(model, recipe.mixout.p, seed=settings.seed, form=recipe.mixout.form)
    scorer = choose_scorer(model, [*data.train, *data.held_out], packing=settings.packing)
    plan = plan_memory(
        model, data.train, scorer, tokens=settings.tokens_per_microbatch, checkpointing=settings.gradient_checkpointing
    )
    scorer.token_budget = plan.tokens
    logger.info(f"{plan.tokens} tokens per forward{', activations recomputed in the backward' if plan.checkpointing else ''}")
    # γ = 0 never asks for training pairs; those that are held out have a reference all the same.
    caching = "auto" if recipe.reference.policy == "skip" else recipe.reference.policy
    reference = open_reference(policy, scorer, caching=caching, path=recipe.reference.store)
    asked, (recipe, calibration) = recipe, find_gamma(recipe, reference, data.train)
    trainer = PairTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        held_out=data.held_out,
        loss=Loss(**recipe.loss.coefficients()),
        scorer=scorer,
        reference=reference,
        keep_checkpoints=settings.keep_checkpoints,
        tokenizer=tokenizer,
        prompts_together=settings.prompts_together,
        starts_at_reference=recipe.policy_starts_as_reference,
        callbacks=callbacks,
    )
    if mixout.layers:
        trainer.add_callback(Mixing(mixout, recipe.mixout, total_steps(recipe, data), trainer, writer))
    if writer:
        writer.begin(asked, resume=resume)
        if calibration:
            record_gamma(writer, recipe, calibration)
    return trainer


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
        # It is this very moment's, and π is π0: there is nothing to score again.
        return trainer.score_held_out(trainer.held_out_reference)
    policy = trainer.score_model()
    if recipe.policy_starts_as_reference and forget_if_any(reference, reference.difference(watched, policy)):
        trainer.held_out_reference = trainer.score_reference()
    return trainer.score_held_out(policy)

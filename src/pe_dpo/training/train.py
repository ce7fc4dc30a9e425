"""One training run from recipe to adapter; read it as the table of contents of the product."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from pe_dpo.disk import disk_errors_named
from pe_dpo.errors import RunFolderError, TrainingError, describe_error
from pe_dpo.inference.inputs import Findings, Inputs
from pe_dpo.inference.policy import load_policy
from pe_dpo.inference.reference import open_reference
from pe_dpo.inference.scorer import NOT_PACKED, choose_scorer
from pe_dpo.interruption import listening
from pe_dpo.log import quiet
from pe_dpo.metrics.catalogue import pair_metrics
from pe_dpo.metrics.table import PairTable
from pe_dpo.model.adapter import POLICY, adapter_parameters, borrowed_base
from pe_dpo.model.attention import switch_on
from pe_dpo.model.fingerprint import tensor_fingerprints
from pe_dpo.model.mixout import attach_mixout
from pe_dpo.model.provenance import adapter_fingerprints, base_files, base_record
from pe_dpo.model.quantization import check_weights_unpacked
from pe_dpo.objective import Loss
from pe_dpo.recipe import Recipe, with_absolute_paths, with_gamma
from pe_dpo.runs.checkpoints import checkpoint_step
from pe_dpo.runs.files import scaled_folder
from pe_dpo.runs.origins import save_origins
from pe_dpo.runs.overrides import override_keys
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter, check_run_folder, locked
from pe_dpo.training.arguments import check_disk, total_steps, training_arguments
from pe_dpo.training.bad_steps import BadSteps
from pe_dpo.training.best import KeepBest
from pe_dpo.training.callbacks import MetricsFile, Snapshots, StopOnSignal
from pe_dpo.training.clock import SaveClock
from pe_dpo.training.diagnostics import diagnose_scale
from pe_dpo.training.gamma import find_gamma, forget_if_any, score_own_part, with_recorded_gamma
from pe_dpo.training.memory import plan_memory
from pe_dpo.training.mixing import Mixing
from pe_dpo.training.monitor import Monitor
from pe_dpo.training.origins import Origins, compare_step_zero
from pe_dpo.training.peak import MemoryPeak, memory_record
from pe_dpo.training.preparation import prepare_run
from pe_dpo.training.start import StartCheck, check_diagonal, check_held_out, check_start
from pe_dpo.training.trackers import Trackers
from pe_dpo.training.trainer import PairTrainer

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
    """What looks off, each with what to turn."""
    reduce: Literal["sum", "mean"] = "sum"
    """Whether the loss, and so its 2×2 table, is about sums of log-probs or about means per token."""
    best: str = ""
    """What the best evaluation came to, and how much of that is luck, in words; empty where none was kept."""
    ended: str = ""
    """Why the run ended before its last step, in words."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    override: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
    shared: Inputs | None = None,
) -> TrainResult:
    """Train an adapter by a recipe and return what came of it; the run folder holds everything.

    Args:
        recipe: A checked recipe, from `load_recipe`.
        resume: Whether to go on with the run in `recipe.output` from its newest whole checkpoint.
        overwrite: Whether to remove the run in `recipe.output` first.
        override: Keys of the recipe ("train.learning_rate", "lr") that a person means to change in a run that goes on, and
            "data.train" for pairs that are others now; which may, and what is recorded, is in `runs.overrides`.
        callbacks: Further callbacks of transformers' Trainer.
        shared: Pairs and loaded base of runs with the same sections `model` and `data`; the base is given back without the
            adapter.

    Raises:
        RunFolderError: the folder is taken, locked, or holds a run of another recipe, data or base.
        DataError: the pairs cannot be used.
        ModelError: the base or an adapter cannot, or the reference is not what it must be.
        TrainingError: the run had to stop, or came to numbers that are not finite; checkpoints stay.
        Interrupted: a signal came before the first step or after the last; its notes say how to go on. Between them the run
            finishes the step, saves, and returns.
        DiskError: the disk is full, read-only or failing; checkpoints stay.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    meant = override_keys(override, goes_on=resume)
    recipe = with_absolute_paths(recipe)
    run, writer = Run(recipe.output), RunWriter(Path(recipe.output), writes=state.is_main_process)
    if resume:
        recipe = with_recorded_gamma(run, recipe)
    again = "what was saved stays, and `resume` goes on from there"
    with ExitStack() as stack:
        stack.enter_context(listening())
        stack.enter_context(disk_errors_named(run.folder, advice=again))
        if not state.is_main_process:
            stack.enter_context(quiet())
            prepared = prepare_run(recipe, shared=shared, recorded=run.data_report if resume else None)
        else:
            if resume and run.exists and (repaired := with_recorded_gamma(run, run.recipe)) != run.recipe:
                writer.write_recipe(repaired)  # a kill came between the γ that was found and the recipe that has it
            check_run_folder(run.folder, recipe, resume=resume, overwrite=overwrite, override=meant)
            prepared = prepare_run(recipe, shared=shared, recorded=run.data_report if resume else None)
            stack.enter_context(locked(run.folder))
            # Again, since another run may have come and gone while the pairs were prepared.
            check_run_folder(run.folder, recipe, resume=resume, overwrite=overwrite, override=meant)
            writer.sweep()
        origins = Origins(recipe, prepared, meant)
        if resume and state.is_main_process and run.info.hashes.data is not None:
            origins.check(run)
        if prepared.data.report.template_date:  # so that the run's recipe, trained again, repeats it
            written = {"template_date": date.fromisoformat(prepared.data.report.template_date)}
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=written)})
        prepared = prepared._replace(findings=prepared.findings or Findings())
        if prepared.loaded_base is not None:
            stack.enter_context(borrowed_base(prepared.loaded_base))
        try:
            with disk_errors_named(run.folder, advice=again):
                return _train(recipe, prepared, writer, origins, resume=resume, callbacks=callbacks)
        except RunFolderError:  # a refusal leaves the run what it is
            raise
        except Exception as error:
            writer.fail(describe_error(error))
            raise
        except KeyboardInterrupt as stop:  # Interrupted, or a second Ctrl-C, which waits for no step
            stop.add_note(writer.interrupt(goes_on=resume))
            raise


def _train(
    recipe: Recipe, prepared: Inputs, writer: RunWriter, origins: Origins, *, resume: bool, callbacks: Sequence[Any]
) -> TrainResult:
    """Load, check, train, measure."""
    began, peak = time.perf_counter(), MemoryPeak()
    data, findings = prepared.data, prepared.findings or Findings()
    steps, stop, trackers = total_steps(recipe, data), StopOnSignal(), Trackers(recipe, writer)
    callbacks = [stop, MetricsFile(writer), trackers, *callbacks]
    trainer = build_trainer(recipe, prepared, writer, resume=resume, callbacks=callbacks)
    if recipe.loss.is_calibrated:
        recipe = with_gamma(recipe, trainer.loss.gamma)
    checkpoint, is_changed = _record_start(writer, recipe, prepared, trainer, origins)
    skipped = [line for line in Run(writer.folder).metrics if "skipped" in line] if writer.writes else []
    trainer.bad_steps.recall(gather_object(skipped))

    # What must hold before the first step, and how the monitored pairs are scored then.
    start = check_start(
        trainer.model,
        [data.train[index] for index in next(iter(trainer.optimizer_batches()))],
        trainer.scorer,
        loss=trainer.loss,
        policy_is_reference=recipe.policy_starts_as_reference,
        is_fresh=recipe.adapter.start is None,
    )
    logger.info(start.describe())
    first = _score_before(trainer, recipe, findings)
    first = trainer.first = first.since(first)
    check_held_out(first if data.held_out else None)
    if recipe.policy_starts_as_reference:
        check_diagonal(first)
    at_start = pair_metrics(first, is_fixed_set=True)
    before = at_start if data.held_out else {}
    if checkpoint is None:
        writer.update(status="training", start=start._asdict(), before=before)
        writer.log({"step": 0, **trainer.with_prefix(at_start)})
    else:
        _compare_with_beginning(writer, trainer.with_prefix(at_start), before, is_changed=is_changed)
    remarks = diagnose_scale(recipe, first, of="held-out" if data.held_out else "watched training")
    for line in remarks:
        logger.warning(line)

    monitor, generation = Monitor(writer, recipe.loss, at_start), recipe.generation
    trainer.add_callback(monitor)
    if data.held_out and generation.snapshots:
        parts = generation.snapshots + 1  # the end is left out, and what falls on one step is measured once
        points = {round(steps * part / parts) for part in range(1, parts)} - {0, steps}

        def measure(step: int) -> None:
            place = writer.folder / "snapshots" / f"step-{step:06d}"
            trainer.save_measurements(place, trainer.score_monitored(), generation)

        trainer.add_callback(Snapshots(points, measure))
    try:
        with trackers:
            trainer.train_to(steps, checkpoint)
    finally:
        stop.restore()
        trainer.reference.flush()

    check_weights_unpacked(trainer.model)
    last, evaluated = None, trainer.evaluated
    if data.held_out:  # Trainer evaluates the last step of a run that was not stopped
        last = evaluated[1] if evaluated and evaluated[0] == trainer.state.global_step else trainer.score_monitored()
    after = pair_metrics(last, is_fixed_set=True) if last else {}
    updates = [weight for name, weight in trainer.model.named_parameters() if f"lora_B.{POLICY}" in name]
    concluded = monitor.conclude(after, has_moved=any(bool(weight.any()) for weight in updates))
    remarks = [*concluded, *filter(None, [Run(writer.folder).info.describe_skipped()]), *remarks]
    step = trainer.state.global_step
    best = trainer.best.summary(before) if trainer.best else None
    ended = trainer.best.describe_end() if trainer.best else ""
    writer.update(best=best and best.model_dump(), ended=ended or None)
    result = TrainResult(
        writer.folder,
        before,
        after,
        start,
        step,
        stop.received,
        remarks,
        recipe.loss.reduce,
        best.describe() if best else "",
        ended,
    )
    scoring = {"path": trainer.scorer.path, "tokens_per_forward": trainer.scorer.token_budget}
    writer.update(scoring={**scoring, "reference_pairs_computed": trainer.reference.computed})
    if prepared.loaded_base is None:  # else what was measured is without the base, or with another run
        above = trainer.recomputation.above
        writer.update(memory=memory_record(recipe, data, trainer.scorer, peak, recomputes_above=above))
    if stop.received is not None:
        writer.update(status="interrupted", step=step)
    else:
        _finish(writer, recipe, trainer, result, last, began)
    trainer.accelerator.wait_for_everyone()
    return result


def build_trainer(
    recipe: Recipe,
    prepared: Inputs,
    writer: RunWriter | None = None,
    *,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
) -> PairTrainer:
    """Return the trainer of a run: policy → scorer → memory → reference → loss (γ) → trainer.

    The folder of a run that begins is made ready last, so that what lies there is not removed for a run that cannot begin.

    Args:
        recipe: The recipe of the run.
        prepared: What `prepare_run` returned for it.
        writer: The writer of the run; None outside of one.
        resume: Whether the run goes on, so that what lies in its folder stays.
        callbacks: Further callbacks of transformers' Trainer.

    Raises:
        ModelError: the base or an adapter cannot be used, or cannot be packed although the recipe insists.
        StoreUnavailable: the recipe insists on a store.
        RecipeError, UsageError: see `find_gamma`.
    """
    from transformers import set_seed

    info, tokenizer, data, base, known = prepared
    settings, findings = recipe.train, known or Findings()
    args = training_arguments(recipe, data)
    set_seed(settings.seed_of("masks"))
    policy = load_policy(recipe, base=base, info=info, tokenizer=tokenizer, device=args.device)
    mixout = attach_mixout(policy.model, recipe.mixout.p, seed=settings.seed_of("masks"), form=recipe.mixout.form)

    # What is tried before the first step depends on these alone: B = 0, and neither dropout nor mixout is on.
    places = recipe.adapter.model_dump_json(exclude={"rank", "alpha", "rslora", "init", "dropout"})
    way = f"{settings.packing} {places} {bool(mixout.layers)} {recipe.mixout.form}"
    if way in findings.scorers:
        scorer = copy(findings.scorers[way])
        if scorer.path not in NOT_PACKED:
            switch_on(policy.causal_lm)
        logger.info(f"{'padded' if scorer.path == 'padded' else f'packed rows ({scorer.path})'}: as an earlier run found it")
    else:
        both: Any = data.train + data.held_out  # type: ignore[operator]  # lists, or columns of which nothing is copied
        scorer = choose_scorer(policy.model, both, packing=settings.packing)
        findings.scorers[way] = copy(scorer)
    scorer.token_budget, recomputation = plan_memory(
        policy.model, data.train, scorer, tokens=settings.tokens_per_microbatch, checkpointing=settings.gradient_checkpointing
    )
    logger.info(f"{scorer.token_budget} tokens per forward{recomputation.describe()}")

    # γ = 0 never asks for training pairs; those that are held out have a reference all the same.
    caching = "auto" if recipe.reference.policy == "skip" else recipe.reference.policy
    reference = open_reference(policy, scorer, caching=caching, path=recipe.reference.store, tensors=findings.tensors)
    asked, (recipe, calibration) = recipe, find_gamma(recipe, reference, data.train)
    recorded = Run(writer.folder).data_report if resume and writer else None

    trainer = PairTrainer(
        reference,
        Loss(**recipe.loss.coefficients()),
        data,
        args,
        keep_checkpoints=settings.keep_checkpoints,
        prompts_together=settings.prompts_together,
        starts_at_reference=recipe.policy_starts_as_reference,
        first_step_moves=recorded is None or recorded.get("held_out_rows") is not None,  # else a run of the first days
        callbacks=callbacks,
    )
    trainer.recomputation, trainer.tokens_asked = recomputation, settings.tokens_per_microbatch
    trainer.add_callback(SaveClock(settings.save_minutes))
    if writer and settings.keep_best:
        trainer.best = KeepBest(trainer, writer, settings.keep_best, settings.patience)
        trainer.add_callback(trainer.best)
    trainer.bad_steps = BadSteps(settings.bad_steps, writer)
    if mixout.layers:
        trainer.add_callback(Mixing(mixout, recipe.mixout, total_steps(recipe, data), trainer, writer))
    if writer:
        writer.begin(asked, resume=resume)
        if calibration:
            writer.update(gamma_calibration=calibration.to_dict())
            writer.write_recipe(recipe)
    return trainer


def _record_start(
    writer: RunWriter, recipe: Recipe, prepared: Inputs, trainer: PairTrainer, origins: Origins
) -> tuple[Path | None, bool]:
    """Write down what a fresh run starts from, or check it for one that goes on.

    Returns:
        The checkpoint to go on from, and whether a person changed something on the way.

    Raises:
        RunFolderError: the base is another one.
        DiskError: the disk has no room for what the run is going to write.
    """
    info, tokenizer, data, _, known = prepared
    findings = known or Findings()
    checkpoint, is_changed = None, False
    if writer.writes:
        run = Run(writer.folder)
        origins.check_base(run, trainer.model, trainer.reference.base_fingerprint)
        if run.info.hashes.data is not None:
            checkpoint = writer.resume()
            is_changed = origins.go_on(run, writer, checkpoint_step(checkpoint) if checkpoint else 0, recipe)
            is_changed = is_changed or bool(run.info.overrides)
        else:
            pairs = {"train": len(data.train), "held_out": len(data.held_out)}
            findings.files = findings.files or base_files(info)
            findings.tensors = findings.tensors or tensor_fingerprints(trainer.model)
            described = base_record(trainer.model, info, tokenizer, files=findings.files, tensors=findings.tensors)
            save_origins(run.folder, origins.inputs, origins.rows)
            if origins.override:  # it was killed before it had come to its data
                writer.write_recipe(recipe)
            report, threads = data.report.to_dict(), torch.get_num_threads()
            writer.record_start(recipe, origins.hashes, base=described, data_report=report, pairs=pairs, threads=threads)
        parameters = sum(weight.numel() for weight in adapter_parameters(trainer.model))
        left = total_steps(recipe, data) - (checkpoint_step(checkpoint) if checkpoint else 0)
        saves = math.ceil(left / trainer.args.save_steps)
        check_disk(recipe, parameters=parameters, saves=saves, there=len(Run(writer.folder).checkpoints()))
    found: tuple[Path | None, bool] = broadcast_object_list([(checkpoint, is_changed)])[0]
    return found


def _compare_with_beginning(
    writer: RunWriter, now: Mapping[str, float], before: Mapping[str, float], *, is_changed: bool
) -> None:
    """Say, and record, where the pairs that are measured along the way are computed otherwise than when the run began.

    Where a person changed something, the beginning is what it is by the loss and on the pairs of now.
    """
    if is_changed or not writer.writes:
        writer.update(before=dict(before))
        return
    run = Run(writer.folder)
    line = compare_step_zero(next((line for line in run.metrics if line["step"] == 0), {}), now)
    if line is not None:
        logger.warning(line)
        writer.update(resumed=[*run.info.resumed, {"step": run.metrics[-1]["step"], "changed": [line]}])


def _score_before(trainer: PairTrainer, recipe: Recipe, findings: Findings) -> PairTable:
    """Check the stored reference, fill it if the recipe says so, and return the monitored pairs as scored at step 0.

    Where an earlier run on this base has scored them with a policy that started as this reference, they are not scored again.
    """
    reference, pairs = trainer.reference, trainer.train_dataset
    uses_reference = recipe.loss.gamma_value != 0
    both: Any = pairs + trainer.held_out if uses_reference else trainer.held_out
    forget_if_any(reference, reference.recheck(both))
    if recipe.reference.policy == "store" and uses_reference:
        score_own_part(reference, pairs)
    trainer.monitored_reference = trainer.score_reference()
    reference.flush()
    if not recipe.policy_starts_as_reference:
        return trainer.score_monitored()
    start = f"{reference.key} {trainer.scorer.token_budget}"
    policy = findings.starts.get(start) if reference.remembers else None
    if policy is None and not any(gather_object([bool(reference.found)])):
        policy = trainer.monitored_reference  # of this very moment, and π is π0: there is nothing to score again
    else:
        policy = trainer.score_model() if policy is None else policy
        if forget_if_any(reference, reference.difference(trainer.monitored, policy)):
            trainer.monitored_reference = trainer.score_reference()
    findings.starts[start] = policy
    return trainer.score_monitored(policy)


def _finish(
    writer: RunWriter, recipe: Recipe, trainer: PairTrainer, result: TrainResult, last: PairTable | None, began: float
) -> None:
    """Write the adapter and what a complete run came to; its scaled states are measured in every process.

    Raises:
        TrainingError: it came to numbers that are not finite.
    """
    trainer.check_adapter_is_finite()
    trainer.bad_steps.check_some_step_was_taken(result.steps)
    if last is not None:
        finite = np.isfinite(last.policy_chosen + last.policy_rejected + last.loss)
        bad = [where for where, is_finite in zip(last.where, finite, strict=True) if not is_finite]
        if bad:
            raise TrainingError(
                f"after the last step, loss or log-probs are not finite for {len(bad)} of {len(last)} held-out pairs "
                f"({', '.join(bad[:5])}); nothing was saved as the run's adapter. Lower train.learning_rate or loss.beta"
            )
    if writer.writes:
        trainer.save_policy(result.folder)
    if last is not None:
        trainer.save_measurements(result.folder, last, recipe.generation)
    writer.update(seconds=time.perf_counter() - began)
    for scale in recipe.generation.scales if trainer.held_out else ():
        with trainer.policy.scaled(scale):
            trainer.save_measurements(scaled_folder(result.folder, scale), trainer.score_monitored(), recipe.generation)
    adapter = adapter_fingerprints(result.folder) if writer.writes else {}
    writer.finish(
        recipe,
        before=result.before,
        after=result.after,
        step=result.steps,
        remarks=result.remarks,
        adapter=adapter,
        pairs=last,
    )

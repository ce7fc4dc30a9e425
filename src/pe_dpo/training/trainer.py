"""The optimizer step: a thin subclass of transformers.Trainer.

Trainer hands over the pairs of a whole optimizer step; the step splits them into micro-batches by a token budget, and every
pair counts 1/B of the loss whatever the split, also when memory runs out and the step begins again with smaller ones. A step
whose loss or gradient is not finite is skipped (`bad_steps`):

    loss = Σ over micro-batches, Σ over pairs  ℓ(pair) / B          so 1×8 = 2×4 = 8×1, on one process or several

Overridden: what computes the loss, what logs, and where a checkpoint is put together. The optimizer, its schedule, trackers
and the distributed machinery are Trainer's.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from pe_dpo.data import PreparedData
from pe_dpo.data.encoded import column
from pe_dpo.data.order import OptimizerBatches
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.disk import write_json
from pe_dpo.errors import ModelError, OutOfMemory, TrainingError, UsageError
from pe_dpo.inference.drift import measure_drift
from pe_dpo.inference.logprobs import concatenate, moved
from pe_dpo.inference.pairs import pair_table, pair_terms, with_texts
from pe_dpo.inference.reference import Reference
from pe_dpo.metrics.catalogue import pair_metrics, share_intervals
from pe_dpo.metrics.table import PairTable
from pe_dpo.model.adapter import adapter_parameters, restore_adapter, save_adapter
from pe_dpo.model.base import set_training
from pe_dpo.model.fixed import fixed_weights
from pe_dpo.model.provenance import base_folder
from pe_dpo.model.tokenizer_files import Files, tokenizer_files, write_files
from pe_dpo.objective import Loss, PairLogprobs, PreferenceLoss
from pe_dpo.progress import progress
from pe_dpo.recipe.schema import GenerationSection
from pe_dpo.runs.best import remove_best
from pe_dpo.runs.checkpoints import checkpoint_step, commit_checkpoint, staging_folder
from pe_dpo.runs.files import ANSWERS_FILE, PAIRS_FILE, STATE_FILE, read_object
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import save_evaluation
from pe_dpo.training.bad_steps import NAMED, BadSteps, bisect, unfit_pairs
from pe_dpo.training.best import KeepBest
from pe_dpo.training.memory import Recomputation
from pe_dpo.training.monitor import train_probe
from pe_dpo.training.window import Window

GENERATION_SEED = 0
"""The seed of the sampled answers: the same in every run, so that runs are compared on common random numbers."""

NEWEST_LINES = 100
"""Of the log that stay in memory for callbacks; the record of all is metrics.jsonl."""

logger = logging.getLogger(__name__)


class PairTrainer(Trainer):
    """Trains an adapter on encoded pairs.

    Args:
        reference: π0's log-probs of the pairs; it knows the policy that is trained, and the scorer of both.
        loss: What is trained on, with its γ as a number.
        data: Encoded pairs to train on and to evaluate on; without the latter some of the former are monitored, as `probe_…`.
        args: Trainer's; `per_device_train_batch_size` is the pairs per optimizer step over all processes together, `data_seed`
            the seed of their order.
        keep_checkpoints: How many to keep.
        prompts_together: Whether pairs of one prompt share an optimizer step, so that its answers are scored once.
        starts_at_reference: Whether π = π0 at step 0, so that the training pairs' log-probs of then are known.
        callbacks: Further callbacks of Trainer.

    Raises:
        UsageError: mixed precision, FSDP or DeepSpeed, as environment variables of a launcher ask for them: this trainer does
            it itself, or cannot do it.
    """

    def __init__(
        self,
        reference: Reference,
        loss: Loss,
        data: PreparedData,
        args: TrainingArguments,
        *,
        keep_checkpoints: int = 1,
        prompts_together: bool = False,
        starts_at_reference: bool = True,
        first_step_moves: bool = True,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.reference, self.loss, self.held_out = reference, loss, data.held_out
        self.policy, self.scorer = reference.policy, reference.scorer
        self.recomputation = Recomputation(self.policy.causal_lm)
        """Which rows recompute their activations; another one where memory was planned."""
        self.keep_checkpoints, self.prompts_together = keep_checkpoints, prompts_together
        self.starts_at_reference, self.first_step_moves = starts_at_reference, first_step_moves
        self.monitored = data.held_out or train_probe(data.train)
        """Pairs whose metrics are measured along the way."""
        self.monitored_reference: PairLogprobs | None = None
        """Log-probs of the monitored pairs under π0, in their order; set once, before training."""
        self.first: PairTable | None = None
        """The monitored pairs as they are scored at step 0; set once, before training."""
        self.bad_steps = BadSteps()
        """The steps that were skipped; another one where the recipe says how many in a row stop the run."""
        self.evaluated: tuple[int, PairTable] | None = None
        """The step of the newest evaluation, and the monitored pairs as they were scored then."""
        self.tokens_asked: int | str = "auto"
        """How many tokens a forward may have, as the recipe asks for it."""
        self._logged = 0
        """The step of the last line of metrics."""
        self.best: KeepBest | None = None
        """What keeps the best adapter, where the recipe asks for that."""
        self._window = Window(self, loss)
        self._staging: Path | None = None
        super().__init__(
            model=self.policy.model,
            args=args,
            train_dataset=data.train,
            eval_dataset=self.monitored,
            processing_class=self.policy.tokenizer,
            callbacks=[self._window, *callbacks],
        )
        self.remove_callback(PrinterCallback)
        if self.accelerator.mixed_precision != "no":
            raise UsageError(
                f"accelerate is set to mixed precision {self.accelerator.mixed_precision}; unset ACCELERATE_MIXED_PRECISION "
                "and say model.dtype in the recipe"
            )
        kind = str(self.accelerator.distributed_type.value)
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise UsageError(
                f"launched as {kind}: the base lies whole on each card, and the step is its own all-reduce of the adapter, so "
                "that FSDP and DeepSpeed have nothing to divide; start one process per GPU with torchrun"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return transformers' schedule, a step earlier while the learning rate rises: the first step has 1/w of it, not 0."""
        is_new = getattr(self, "lr_scheduler", None) is None
        schedule: Any = super().create_scheduler(num_training_steps, optimizer)
        rise = self.args.get_warmup_steps(num_training_steps)
        if is_new and rise and self.first_step_moves:
            (factor,) = set(schedule.lr_lambdas)
            self.lr_scheduler = LambdaLR(schedule.optimizer, lambda step: factor(step + 1 if step < rise else step))
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        """Every process gets the whole optimizer batch and takes its own share of it in `training_step`."""
        batches = self.optimizer_batches()
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=list)
        loader.set_epoch = batches.set_epoch  # as accelerate's loaders have it: Trainer calls it
        return loader

    def optimizer_batches(self) -> OptimizerBatches:
        """Return the indices of each optimizer step's pairs."""
        pairs = self.train_dataset
        keys = column(pairs, "prompt_key") if self.prompts_together else range(len(pairs))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return OptimizerBatches(keys, self.args.per_device_train_batch_size, seed)

    def training_step(self, model: Any, inputs: list[EncodedPair], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward over one optimizer step's pairs; return the step's loss, detached.

        A step whose loss or gradient is not finite in any process leaves no gradient in any, and without one an optimizer
        changes nothing: neither what is trained nor its own averages.

        Raises:
            TrainingError: this was one such step too many, or memory does not do for one pair.
        """
        model = self.accelerator.unwrap_model(model)
        set_training(model, True)
        self._logged = getattr(self, "_globalstep_last_logged", 0)
        mine, share = inputs[self.args.process_index :: self.args.world_size], 1 / len(inputs)
        with self.keeping_what_was_saved(), fixed_weights():
            total, scored = self._within_memory(model, mine, share)
            gradients = []
            for parameter in self._trained:
                if parameter.grad is None:  # what no pair reaches is zero, not missing: Adam's averages move on all the same
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
            unfit = unfit_pairs(PairTable.join(scored), needs_reference=self.loss.needs_reference) if scored else {}
            is_bad = is_mine = bool(unfit) or not torch.nn.utils.get_total_norm(gradients).isfinite()
            if self.args.world_size > 1:  # in two reductions: an adapter is small, and processes may have any rows
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                torch.distributed.all_reduce(flat)
                for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                    gradient.copy_(part.view_as(gradient))
                is_bad = is_mine or not torch.nn.utils.get_total_norm(gradients).isfinite()
                both = torch.stack([total, torch.tensor(float(is_bad), dtype=total.dtype, device=total.device)])
                torch.distributed.all_reduce(both)
                total, is_bad = both[0], bool(both[1])
            if is_bad:
                self._skip(self._blame(model, mine, share, unfit) if is_mine else {})
                return torch.zeros((), device=self.args.device)
        self._window.add(scored, sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in inputs))
        return total.float()

    def _within_memory(self, model: Any, pairs: list[EncodedPair], share: float) -> tuple[torch.Tensor, list[PairTable]]:
        """Return `_accumulate` of the pairs, begun again with smaller rows, and recomputing more, where memory runs out."""
        while True:
            try:
                return self.scorer.within_memory(pairs, lambda: self._accumulate(model, pairs, share))
            except OutOfMemory:
                more = self.recomputation.grow()
                if more is None:
                    raise
            logger.warning(f"a pair does not fit alone: from here on {more} (nothing is lost)")

    def _accumulate(self, model: Any, pairs: list[EncodedPair], share: float) -> tuple[torch.Tensor, list[PairTable]]:
        """Add the gradients of the pairs' losses, each counted `share`; return the sum of the losses, and the scored pairs.

        Without a gradient from where on a loss is not finite: the step will be skipped, and its pairs are only looked at.
        """
        self._drop_gradients()  # of a first try that ran out of memory
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        parts: list[PairTable] = []
        is_fit = True
        for batch in self.scorer.split(pairs) if pairs else []:
            scored, out = self.forward_pairs(model, [pairs[index] for index in batch])
            loss = share * out.loss.sum()
            is_fit = is_fit and not unfit_pairs(scored, needs_reference=self.loss.needs_reference)
            # A hinge that is satisfied by all pairs has gradient 0, and so has an SFT term of weight 0.
            if is_fit and (scored.weight.any() or self.loss.sft_weight):
                loss.backward()
            total += loss.detach()
            parts.append(scored)
            self.callback_handler.on_substep_end(self.args, self.state, self.control)
        return total, parts

    def _blame(self, model: Any, pairs: list[EncodedPair], share: float, unfit: dict[str, str]) -> dict[str, str]:
        """Return which of this process's pairs spoil a step, and what of each is not finite; random draws are as before.

        What the forward did not show, a gradient, is looked for by halving: two passes for one pair.
        """

        def is_good(some: Sequence[EncodedPair]) -> bool:
            self._within_memory(model, list(some), share)
            gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
            return not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite())

        fit = [pair for pair in pairs if pair.where not in unfit]
        if len(unfit) >= NAMED or not fit:
            return unfit
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            spoiling = [] if unfit and is_good(fit) else bisect(fit, is_good, most=NAMED - len(unfit))
        return unfit | {pair.where: "gradient" for pair in spoiling}

    @cached_property
    def _trained(self) -> list[torch.nn.Parameter]:
        """What is trained; looking for it in each step would walk over all modules of the model."""
        return adapter_parameters(self.policy.model)

    def _drop_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def _skip(self, mine: dict[str, str]) -> None:
        """Leave no gradient, and write down in all processes whose pairs are to blame."""
        self._drop_gradients()
        self.check_adapter_is_finite()
        pairs = {where: what for part in gather_object([mine]) for where, what in part.items()}
        self.bad_steps.add(self.state.global_step + 1, pairs)

    def forward_pairs(self, model: Any, pairs: list[EncodedPair]) -> tuple[PairTable, PreferenceLoss]:
        """Return the pairs as scored, and their losses with gradient."""
        device = self.args.device
        reference = None
        if self.loss.needs_reference:  # first, while no activations of the policy lie in memory
            reference = moved(self.reference.logprobs(pairs), device)
        self.recomputation.of(self.scorer.tokens(pairs))
        policy = self.scorer.logprobs(model, pairs)
        out = self.loss(policy, reference, *pair_terms(pairs, device))
        return pair_table(pairs, policy, reference, out, self.loss), out

    @contextmanager
    def keeping_what_was_saved(self) -> Iterator[None]:
        """Within the block, memory that does not do for one pair ends the run, with what can be done about it."""
        try:
            yield
        except OutOfMemory as error:
            raise TrainingError(
                f"after step {self.state.global_step}: {error}, or train.gradient_checkpointing: true; what was saved stays, "
                "and `resume` goes on from the last checkpoint"
            ) from error

    def check_adapter_is_finite(self) -> None:
        """Check that the trained adapter can be saved and gone on with.

        Raises:
            TrainingError: a number of it is NaN or infinite.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise TrainingError(
                    f"step {self.state.global_step}: the adapter is not finite ({name}), so it was not saved. Lower "
                    "train.learning_rate; what was saved before stays, and `resume` goes on from the last checkpoint"
                )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs seen since the last line, over all processes, but for steps that were skipped."""
        steps = self.state.global_step - self._logged
        skipped = sum(self._logged < step <= self.state.global_step for step in self.bad_steps.pairs)
        if "loss" in logs and skipped:
            logs["skipped_steps"] = skipped
            if self.state.global_step in self.bad_steps.pairs:
                logs.pop("grad_norm", None)  # there is none
            if skipped < steps:
                logs["loss"] *= steps / (steps - skipped)
            else:
                del logs["loss"]
                self._window.restart_clock()
        if "loss" in logs:
            window, speed = self._window.empty()
            metrics = pair_metrics(window.since(None) if self.starts_at_reference else window)
            logs |= metrics | {"tokens_per_second": speed}
        super().log(logs, start_time)
        del self.state.log_history[:-NEWEST_LINES]

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the metrics of the monitored pairs, and log them."""
        scored = self.score_monitored()
        self.evaluated = self.state.global_step, scored
        metrics = self.with_prefix(pair_metrics(scored, is_fixed_set=True))
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._window.restart_clock()
        return metrics

    def with_prefix(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return metrics of the monitored pairs as they are logged: eval_… where these are held out, else probe_…."""
        prefix = "eval" if self.held_out else "probe"
        return {f"{prefix}_{key}": value for key, value in metrics.items()}

    def score_model(self) -> PairLogprobs:
        """Return the monitored pairs' log-probs under the model as it is now."""
        return self._of_monitored(lambda pairs: self.scorer.score_pairs(self.model, pairs))

    def score_reference(self) -> PairLogprobs:
        """Return the monitored pairs' log-probs under π0."""
        return self._of_monitored(self.reference.logprobs)

    def score_monitored(self, policy: PairLogprobs | None = None) -> PairTable:
        """Return the monitored pairs as policy (if not given) and reference score them now."""
        policy = self.score_model() if policy is None else policy
        out = self.loss(policy, self.monitored_reference, *pair_terms(self.monitored))
        table = pair_table(self.monitored, policy, self.monitored_reference, out, self.loss)
        return table if self.first is None else table.since(self.first)

    def _of_monitored(self, score: Callable[[Sequence[EncodedPair]], PairLogprobs]) -> PairLogprobs:
        """Return what `score` makes of the monitored pairs; the processes share the work."""
        world, rank = self.args.world_size, self.args.process_index
        if len(self.monitored) < world:
            world, rank = 1, 0
        with self.keeping_what_was_saved(), progress("scoring, held-out pairs" if self.held_out else "scoring, watched pairs"):
            mine = score(self.monitored[rank::world])
        if world == 1:
            return mine
        order = torch.cat([torch.arange(start, len(self.monitored), world) for start in range(world)]).argsort()
        return PairLogprobs(*(field[order] for field in concatenate(gather_object([mine]))))

    def save_measurements(self, folder: Path, scored: PairTable, settings: GenerationSection) -> None:
        """Sample answers if they are asked for, and write all that is known of the policy now; in the main process only.

        eval_pairs.parquet     held-out pairs one by one
        generations.parquet    answers sampled from the policy, with KL(π‖π0), entropy and length
        evaluation.json        the metrics of both

        Args:
            folder: The folder of the run at its end, along the way one under snapshots/, and one under scaled/ for the finished
                adapter scaled toward the reference.
            scored: The held-out pairs as they are now.
            settings: What to sample.
        """
        if not self.is_world_process_zero():
            return
        folder.mkdir(parents=True, exist_ok=True)
        drift = None
        if settings.prompts:
            with self.keeping_what_was_saved(), progress("sampling"):
                drift = measure_drift(self.policy, self.scorer, self.held_out, settings, seed=GENERATION_SEED)
        with_texts(scored, self.held_out, self.policy.tokenizer).save(folder / PAIRS_FILE)
        if drift:
            drift.table.save(folder / ANSWERS_FILE)
        metrics = pair_metrics(scored, is_fixed_set=True)
        save_evaluation(folder, metrics, share_intervals(metrics), drift.summary() if drift else None)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Trainer write its checkpoint into a staging folder, then seal and rename it."""
        self.check_adapter_is_finite()
        run = Path(self.args.output_dir)
        self.reference.flush()
        self._staging = staging_folder(run)
        newest, self.state.log_history = self.state.log_history, []  # metrics.jsonl is the record
        try:
            super()._save_checkpoint(model, trial)
            staged = self._staging / f"checkpoint-{self.state.global_step}"
            self._window.save(staged)
            if self.args.should_save and self.best:
                self.best.save(staged)
            if self.args.should_save:
                write_json(staged / STATE_FILE, {"tokens": self.scorer.token_budget, "tokens_asked": self.tokens_asked})
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                record = Run(run)
                keep, former = self.keep_checkpoints, record.former_inputs
                commit_checkpoint(run, self.state.global_step, record.inputs, keep=keep, former=former)
            self.accelerator.wait_for_everyone()
        finally:
            self._staging, self.state.log_history = None, newest

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.save_policy(Path(output_dir or self.args.output_dir))

    def save_policy(self, folder: Path) -> None:
        """Write the adapter, and the tokenizer's files with its chat template as in training, into a folder."""
        save_adapter(self.model, folder)
        write_files(self._tokenizer_files, folder)

    @cached_property
    def _tokenizer_files(self) -> Files:
        base = self.policy.base
        try:
            origins = [base_folder(base.base, base.revision, is_loaded=True)]
        except ModelError:  # it was moved away since it was loaded, which is no reason to lose the adapter
            origins = []
        return tokenizer_files(self.policy.tokenizer, origins)

    def train_to(self, step: int, checkpoint: Path | None) -> None:
        """Train up to a step, from a checkpoint or from the beginning.

        A checkpoint of that step is only read back: given one, Trainer would take a further step before it looks. So is one
        with which the run's patience ended.
        """
        if self.best:
            self.best.restore(checkpoint)
        elif self.args.should_save:  # a person may have asked for no best on the way
            remove_best(Path(self.args.output_dir))
        is_over = self.best is not None and self.best.is_over
        if checkpoint is None or (checkpoint_step(checkpoint) < step and not is_over):
            try:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except UnpicklingError as error:  # torch's own message says how to run what is in there
                raise TrainingError(
                    f"{checkpoint}: its optimizer's or generators' states hold more than numbers, or are damaged, and were not "
                    "read; remove this checkpoint and resume from the one before"
                ) from error
            return
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _init_training_state(self, max_steps: int, *arguments: Any, **more: Any) -> Any:
        found = super()._init_training_state(max_steps, *arguments, **more)
        self.state.compute_steps(self.args, max_steps)  # how often is the recipe's, not the checkpoint's
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore the optimizer's averages and where the schedule stands; learning rate and decay are the recipe's."""
        if checkpoint is None:
            return
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        asked = [{key: group[key] for key in ("initial_lr", "weight_decay") if key in group} for group in groups]
        rates = list(scheduler.base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler.base_lrs = rates
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
        for group, own, rate in zip(self.optimizer.param_groups, asked, scheduler._last_lr, strict=True):
            group.update(own, lr=rate)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        restore_adapter(self.model, folder)
        self._window.restore(folder)
        state = read_object(folder / STATE_FILE)
        if state.get("tokens_asked") == self.tokens_asked:  # else the recipe asks for another split now
            self.scorer.token_budget = state["tokens"]  # smaller where memory ran out, and where a row ends moves bits

"""The optimizer step: a thin subclass of transformers.Trainer.

Trainer hands over the pairs of a whole optimizer step; the step splits them into micro-batches by a token budget, and every
pair counts 1/B of the loss whatever the split, also when memory runs out and the step begins again with smaller ones:

    loss = Σ over micro-batches, Σ over pairs  ℓ(pair) / B          so 1×8 = 2×4 = 8×1, on one process or several

Overridden: what computes the loss, what logs, and where a checkpoint is put together. The optimizer, its schedule, trackers
and the distributed machinery are Trainer's.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import OutOfMemory, TrainingError, UsageError
from pe_dpo.inference.logprobs import PairLogprobs, concatenate
from pe_dpo.inference.pairs import pair_table
from pe_dpo.inference.reference import Reference
from pe_dpo.inference.scorer import Scorer
from pe_dpo.metrics.catalogue import pair_metrics
from pe_dpo.metrics.table import PairTable
from pe_dpo.model.adapter import adapter_parameters, restore_adapter, save_adapter
from pe_dpo.objective import Loss, PreferenceLoss
from pe_dpo.runs.checkpoints import checkpoint_step, commit_checkpoint, staging_folder
from pe_dpo.runs.run import Run
from pe_dpo.training.order import EpochLoader, OptimizerBatches
from pe_dpo.training.watch import probe_pairs

logger = logging.getLogger(__name__)


class PairTrainer(Trainer):
    """Trains an adapter on encoded pairs.

    Args:
        model: a PEFT model from `model.adapter`.
        args: Trainer's; `per_device_train_batch_size` is the pairs per optimizer step over all processes together.
        train_dataset: encoded pairs.
        held_out: encoded pairs to evaluate on; empty: some of the training pairs are watched instead, as `probe_…`.
        loss: what is trained on; with its γ as a number.
        scorer: how pairs go through the model.
        reference: π0's log-probs of the pairs.
        keep_checkpoints: how many to keep.
        callbacks: further Trainer callbacks.
        tokenizer: saved beside each adapter.
        prompts_together: whether pairs of one prompt share an optimizer step, so that its answers are scored once.
        starts_at_reference: whether π = π0 at step 0, so that the training pairs' log-probs of then are known.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        train_dataset: Sequence[EncodedPair],
        held_out: Sequence[EncodedPair],
        loss: Loss,
        scorer: Scorer,
        reference: Reference,
        keep_checkpoints: int,
        tokenizer: Any,
        prompts_together: bool = False,
        starts_at_reference: bool = True,
        callbacks: Sequence[Any] = (),
    ) -> None:
        watched = held_out or probe_pairs(train_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=watched,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        _check_plain(self.accelerator)
        self.remove_callback(PrinterCallback)
        self.held_out = held_out
        self.watched = watched
        """Pairs whose metrics are measured along the way."""
        self.held_out_reference: PairLogprobs | None = None
        """Log-probs of the watched pairs under π0, in their order; set once, before training."""
        self.first: PairTable | None = None
        """The watched pairs as they are scored at step 0; set once, before training."""
        self.starts_at_reference = starts_at_reference
        self.loss = loss
        self.prompts_together = prompts_together
        self.scorer = scorer
        self.reference = reference
        self.keep_checkpoints = keep_checkpoints
        self._window: list[PairTable] = []
        self._window_tokens = 0
        self._window_start = time.perf_counter()
        self._staging: Path | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Every process gets the whole optimizer batch and takes its own share of it in `training_step`."""
        return EpochLoader(self.train_dataset, self.optimizer_batches())

    def optimizer_batches(self) -> OptimizerBatches:
        """Return the indices of each optimizer step's pairs."""
        keys = [pair.prompt_key for pair in self.train_dataset] if self.prompts_together else range(len(self.train_dataset))
        return OptimizerBatches(keys, self.args.per_device_train_batch_size, self.args.seed)

    def training_step(self, model: Any, inputs: list[EncodedPair], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward over one optimizer step's pairs; return the step's loss, detached."""
        model = self.accelerator.unwrap_model(model)
        model.train()
        mine = inputs[self.args.process_index :: self.args.world_size]
        with self._keeping_what_was_saved():
            total, scored = self.scorer.within_memory(mine, lambda: self._accumulate(model, mine, 1 / len(inputs)))
        # What no pair reaches is zero, not missing: Adam's averages move on all the same.
        for parameter in adapter_parameters(model):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._sum_over_processes(total, [p.grad for p in adapter_parameters(model) if p.grad is not None])
        self._check_gradients(inputs)
        self._window.extend(scored)
        self._window_tokens += sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in inputs)
        return total.float()

    def _accumulate(self, model: Any, pairs: list[EncodedPair], share: float) -> tuple[torch.Tensor, list[PairTable]]:
        """Add the gradients of the pairs' losses, each counted `share`; return the sum of the losses, and the scored pairs."""
        model.zero_grad()  # of a first try that ran out of memory
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        parts = []
        for batch in self.scorer.split(pairs) if pairs else []:
            scored, out = self.forward_pairs(model, [pairs[index] for index in batch])
            loss = share * out.loss.sum()
            # A hinge that is satisfied by all pairs has gradient 0, and so has an SFT term of weight 0.
            if scored.weight.any() or self.loss.sft_weight:
                loss.backward()
            total += loss.detach()
            parts.append(scored)
            self.callback_handler.on_substep_end(self.args, self.state, self.control)
        return total, parts

    def forward_pairs(self, model: Any, pairs: list[EncodedPair]) -> tuple[PairTable, PreferenceLoss]:
        """Return the pairs as scored, and their losses with gradient.

        Raises:
            TrainingError: a loss is not finite; names the pairs.
        """
        device = self.args.device
        reference = None
        if self.loss.needs_reference:  # first, while no activations of the policy lie in memory
            reference = PairLogprobs(*(field.to(device) for field in self.reference.logprobs(pairs)))
        policy = self.scorer.logprobs(model, pairs)
        margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64, device=device)
        out = self.loss(policy, reference, margins)
        table = pair_table(pairs, policy, reference, out, self.loss)
        if not np.isfinite(table.loss).all():
            bad = [where for where, loss in zip(table.where, table.loss, strict=True) if not np.isfinite(loss)]
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is not finite for {', '.join(bad[:5])}; nothing was updated by "
                "this step. Lower train.learning_rate or loss.beta, or look at these rows; `resume` goes on from the last "
                "checkpoint"
            )
        return table, out

    @contextmanager
    def _keeping_what_was_saved(self) -> Iterator[None]:
        """Within the block, memory that does not do for one pair ends the run, with what can be done about it."""
        try:
            yield
        except OutOfMemory as error:
            raise TrainingError(
                f"after step {self.state.global_step}: {error}, or train.gradient_checkpointing: true; what was saved stays, "
                "and `resume` goes on from the last checkpoint"
            ) from error

    def _sum_over_processes(self, total: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        """Sum the loss and the gradients, in place, in two reductions: an adapter is small, and processes may have any rows."""
        if self.args.world_size == 1:
            return
        torch.distributed.all_reduce(total)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def any_process(self, what: bool) -> bool:
        """Return whether it holds in any process."""
        return any(gather_object([what]))

    def _check_gradients(self, pairs: list[EncodedPair]) -> None:
        gradients = [p.grad for p in adapter_parameters(self.model) if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            names = ", ".join(pair.where for pair in pairs[:5])
            raise TrainingError(
                f"step {self.state.global_step + 1}: the gradient is not finite (pairs {names}, …); nothing was updated by "
                "this step. Lower train.learning_rate or loss.beta; `resume` goes on from the last checkpoint"
            )

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
        """Add the metrics of the pairs seen since the last line, over all processes."""
        if "loss" in logs:
            parts = gather_object([PairTable.join(self._window)] if self._window else [])
            seconds = time.perf_counter() - self._window_start
            window = PairTable.join(parts)
            metrics = pair_metrics(window.since(None) if self.starts_at_reference else window)
            logs |= metrics | {"tokens_per_second": self._window_tokens / max(seconds, 1e-9)}
            self._window, self._window_tokens, self._window_start = [], 0, time.perf_counter()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the metrics of the watched pairs, and log them."""
        metrics = {f"{self.prefix}_{key}": value for key, value in self.watched_metrics(self.score_held_out()).items()}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._window_start = time.perf_counter()
        return metrics

    @property
    def prefix(self) -> str:
        """Of the watched pairs' metrics: eval where they are held out, probe where they are trained on."""
        return "eval" if self.held_out else "probe"

    def watched_metrics(self, scored: PairTable) -> dict[str, float]:
        """Return the metrics of the watched pairs as scored."""
        return pair_metrics(scored, is_fixed_set=True)

    def score_model(self) -> PairLogprobs:
        """Return the watched pairs' log-probs under the model as it is now."""
        return self._of_held_out(lambda pairs: self.scorer.score_pairs(self.model, pairs))

    def score_reference(self) -> PairLogprobs:
        """Return the watched pairs' log-probs under π0."""
        return self._of_held_out(self.reference.logprobs)

    def score_held_out(self, policy: PairLogprobs | None = None) -> PairTable:
        """Return the watched pairs as policy (if not given) and reference score them now."""
        policy = self.score_model() if policy is None else policy
        margins = torch.tensor([pair.margin for pair in self.watched], dtype=torch.float64)
        out = self.loss(policy, self.held_out_reference, margins)
        table = pair_table(self.watched, policy, self.held_out_reference, out, self.loss)
        return table if self.first is None else table.since(self.first)

    def _of_held_out(self, score: Callable[[Sequence[EncodedPair]], PairLogprobs]) -> PairLogprobs:
        """Return what `score` makes of the watched pairs; the processes share the work."""
        world, rank = self.args.world_size, self.args.process_index
        if len(self.watched) < world:
            world, rank = 1, 0
        share = self.watched[rank::world]
        with self._keeping_what_was_saved():
            mine = score(share)
        if world == 1:
            return mine
        order = torch.cat([torch.arange(start, len(self.watched), world) for start in range(world)]).argsort()
        return PairLogprobs(*(field[order] for field in concatenate(gather_object([mine]))))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Trainer write its checkpoint into a staging folder, then seal and rename it."""
        self.check_adapter_is_finite()
        run = Path(self.args.output_dir)
        self.reference.flush()
        self._staging = staging_folder(run)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                commit_checkpoint(run, self.state.global_step, Run(run).inputs, keep=self.keep_checkpoints)
            self.accelerator.wait_for_everyone()
        finally:
            self._staging = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir)
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def train_to(self, step: int, checkpoint: Path | None) -> None:
        """Train up to a step, from a checkpoint or from the beginning.

        A checkpoint of that step is only read back: given one, Trainer would take a further step before it looks.
        """
        if checkpoint is None or checkpoint_step(checkpoint) < step:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_adapter(self.model, resume_from_checkpoint)


def forget_if_any(reference: Reference, why: str | None) -> bool:
    """Throw the stored reference away in all processes if one of them found it wrong; return whether."""
    reasons = [reason for reason in gather_object([why]) if reason]
    if reasons:
        reference.forget(reasons[0])
    return bool(reasons)


def _check_plain(accelerator: Any) -> None:
    """Check that accelerate was not told to do what this trainer does itself, or cannot do.

    Raises:
        UsageError: mixed precision, FSDP or DeepSpeed, as environment variables of a launcher ask for them.
    """
    if accelerator.mixed_precision != "no":
        raise UsageError(
            f"accelerate is set to mixed precision {accelerator.mixed_precision}; unset ACCELERATE_MIXED_PRECISION and say "
            "model.dtype in the recipe"
        )
    kind = str(accelerator.distributed_type.value)
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UsageError(f"launched as {kind}; start several processes with torchrun, one per GPU")

"""The optimizer step: a thin subclass of transformers.Trainer.

Trainer hands over the pairs of a whole optimizer step; the step splits them into micro-batches by a token budget, and every
pair counts 1/B of the loss whatever the split:

    loss = Σ over micro-batches, Σ over pairs  ℓ(pair) / B          so 1×8 = 2×4 = 8×1, on one process or several

Overridden: what computes the loss, what logs, and where a checkpoint is put together. The optimizer, its schedule, trackers
and the distributed machinery are Trainer's.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from pe_dpo.data.batches import pad, split_by_tokens
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import TrainingError
from pe_dpo.evaluation.pairs import ScoredPairs, join, pair_metrics, score_loss, score_pairs, scored_pairs, set_metrics
from pe_dpo.model.adapter import adapter_parameters, as_reference, restore_adapter, save_adapter
from pe_dpo.model.scoring import PairLogprobs, concatenate, pair_logprobs
from pe_dpo.training.checkpoints import commit_checkpoint, keep_newest, staging_folder


class PairTrainer(Trainer):
    """Trains an adapter on encoded pairs.

    Args:
        model: a PEFT model from `model.adapter`.
        args: Trainer's; `per_device_train_batch_size` is the pairs per optimizer step over all processes together.
        train_dataset: encoded pairs.
        held_out: encoded pairs to evaluate on; may be empty.
        coefficients: of the loss, see `evaluation.pairs.score_loss`.
        margin_scale: of the data's margin column.
        token_budget: most tokens of one forward, padding included.
        keep_checkpoints: how many to keep.
        callbacks: further Trainer callbacks.
        tokenizer: saved beside each adapter.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        train_dataset: Sequence[EncodedPair],
        held_out: Sequence[EncodedPair],
        coefficients: Mapping[str, Any],
        margin_scale: float,
        token_budget: int,
        keep_checkpoints: int,
        tokenizer: Any,
        callbacks: Sequence[Any] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=held_out or None,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.held_out = held_out
        self.held_out_reference: PairLogprobs | None = None
        """Log-probs of the held-out pairs under π0, in their order; set once, before training."""
        self.coefficients = coefficients
        self.margin_scale = margin_scale
        self.token_budget = token_budget
        self.keep_checkpoints = keep_checkpoints
        self._window: list[ScoredPairs] = []
        self._window_tokens = 0
        self._window_start = time.perf_counter()
        self._staging: Path | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Every process gets the whole optimizer batch and takes its own share of it in `training_step`."""
        sampler = OptimizerBatches(len(self.train_dataset), self.args.per_device_train_batch_size, self.args.seed)
        return _EpochLoader(self.train_dataset, sampler)

    def training_step(self, model: Any, inputs: list[EncodedPair], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward over one optimizer step's pairs; return the step's loss, detached."""
        model.train()
        world, rank = self.args.world_size, self.args.process_index
        mine = inputs[rank::world]
        # A process left without pairs still takes part in the gradient's reduction, with weight 0.
        share = world / len(inputs) if mine else 0.0
        mine = mine or inputs[:1]
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        batches = split_by_tokens(mine, self.token_budget)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                scored, loss = self.forward_pairs(model, [mine[index] for index in batch])
                mean_part = share * loss.sum()
                self.accelerator.backward(mean_part)
            total += mean_part.detach()
            if share:
                self._window.append(scored)
        self._check_gradients(inputs)
        self._window_tokens += sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in inputs)
        return total.float()

    def forward_pairs(self, model: Any, pairs: list[EncodedPair]) -> tuple[ScoredPairs, torch.Tensor]:
        """Return the pairs as scored, and their losses (B,) with gradient.

        Raises:
            TrainingError: a loss is not finite; names the pairs.
        """
        tensors = pad(pairs).to(self.args.device)
        policy = pair_logprobs(model, *tensors)
        reference = None
        if self.coefficients["gamma"] != 0:
            with as_reference(self.accelerator.unwrap_model(model)) as frozen:
                reference = pair_logprobs(frozen, *tensors)
        margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64, device=self.args.device)
        out = score_loss(policy, reference, margins, self.coefficients, self.margin_scale)
        if not out.loss.isfinite().all():
            bad = [pair.where for pair, finite in zip(pairs, out.loss.isfinite().tolist(), strict=True) if not finite]
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is not finite for {', '.join(bad[:5])}; nothing was updated by "
                "this step. Lower train.learning_rate or loss.beta, or look at these rows; `--resume` goes on from the last "
                "checkpoint"
            )
        return scored_pairs(policy, reference, out), out.loss

    def _check_gradients(self, pairs: list[EncodedPair]) -> None:
        gradients = [p.grad for p in adapter_parameters(self.model) if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            names = ", ".join(pair.where for pair in pairs[:5])
            raise TrainingError(
                f"step {self.state.global_step + 1}: the gradient is not finite (pairs {names}, …); nothing was updated by "
                "this step. Lower train.learning_rate or loss.beta; `--resume` goes on from the last checkpoint"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs seen since the last line, over all processes."""
        if "loss" in logs:
            parts = gather_object([join(self._window)] if self._window else [])
            seconds = time.perf_counter() - self._window_start
            logs |= pair_metrics(join(parts)) | {"tokens_per_second": self._window_tokens / max(seconds, 1e-9)}
            self._window, self._window_tokens, self._window_start = [], 0, time.perf_counter()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the metrics of the held-out pairs, and log them."""
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in set_metrics(self.score_held_out()).items()}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._window_start = time.perf_counter()
        return metrics

    def score_model(self) -> PairLogprobs:
        """Return the held-out pairs' log-probs under the model as it is now; the processes share the work."""
        world, rank = self.args.world_size, self.args.process_index
        if len(self.held_out) < world:
            world, rank = 1, 0
        mine = score_pairs(self.model, self.held_out[rank::world], token_budget=self.token_budget, device=self.args.device)
        if world == 1:
            return mine
        order = torch.cat([torch.arange(start, len(self.held_out), world) for start in range(world)]).argsort()
        return PairLogprobs(*(field[order] for field in concatenate(gather_object([mine]))))

    def score_held_out(self) -> ScoredPairs:
        """Return the held-out pairs as policy and reference score them now."""
        policy = self.score_model()
        margins = torch.tensor([pair.margin for pair in self.held_out], dtype=torch.float64)
        out = score_loss(policy, self.held_out_reference, margins, self.coefficients, self.margin_scale)
        return scored_pairs(policy, self.held_out_reference, out)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Trainer write its checkpoint into a staging folder, then seal and rename it."""
        run = Path(self.args.output_dir)
        self._staging = staging_folder(run)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                commit_checkpoint(run, self.state.global_step)
                keep_newest(run, self.keep_checkpoints)
            self.accelerator.wait_for_everyone()
        finally:
            self._staging = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir)
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_adapter(self.model, resume_from_checkpoint)


class OptimizerBatches(Sampler[list[int]]):
    """The indices of each optimizer step's pairs: a permutation that is a function of seed and epoch alone.

    No state of a random generator is needed to resume, and every process draws the same batches.
    """

    def __init__(self, pairs: int, pairs_per_step: int, seed: int) -> None:
        self.pairs, self.pairs_per_step, self.seed, self.epoch = pairs, pairs_per_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.pairs, generator=generator).tolist()
        for start in range(0, self.pairs, self.pairs_per_step):
            yield order[start : start + self.pairs_per_step]

    def __len__(self) -> int:
        return -(-self.pairs // self.pairs_per_step)


class _EpochLoader(DataLoader):
    """A loader that passes the epoch on to its batches, as Trainer asks of accelerate's loaders."""

    def __init__(self, pairs: Sequence[EncodedPair], batches: OptimizerBatches) -> None:
        super().__init__(pairs, batch_sampler=batches, collate_fn=list)  # type: ignore[arg-type]  # a sequence will do
        self.set_epoch = batches.set_epoch

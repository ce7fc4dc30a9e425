"""The optimizer step: a thin subclass of transformers.Trainer.

Trainer hands over the pairs of a whole optimizer step; the step splits them into micro-batches by a token budget, and every
pair counts 1/B of the loss whatever the split, also when memory runs out and the step begins again with smaller ones:

    loss = Σ over micro-batches, Σ over pairs  ℓ(pair) / B          so 1×8 = 2×4 = 8×1, on one process or several

Overridden: what computes the loss, what logs, and where a checkpoint is put together. The optimizer, its schedule, trackers
and the distributed machinery are Trainer's.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import TrainingError
from pe_dpo.evaluation.pairs import ScoredPairs, join, pair_metrics, score_loss, score_pairs, scored_pairs, set_metrics
from pe_dpo.evaluation.reference import Reference
from pe_dpo.evaluation.scorer import Scorer
from pe_dpo.model.adapter import adapter_parameters, restore_adapter, save_adapter
from pe_dpo.model.scoring import PairLogprobs, concatenate
from pe_dpo.objective import PreferenceLoss
from pe_dpo.training.checkpoints import commit_checkpoint, keep_newest, staging_folder
from pe_dpo.training.order import EpochLoader, OptimizerBatches

_Result = TypeVar("_Result")


class PairTrainer(Trainer):
    """Trains an adapter on encoded pairs.

    Args:
        model: a PEFT model from `model.adapter`.
        args: Trainer's; `per_device_train_batch_size` is the pairs per optimizer step over all processes together.
        train_dataset: encoded pairs.
        held_out: encoded pairs to evaluate on; may be empty.
        coefficients: of the loss, see `evaluation.pairs.score_loss`.
        margin_scale: of the data's margin column.
        scorer: how pairs go through the model.
        reference: π0's log-probs of the pairs.
        token_budget: most tokens of one forward; halved when memory runs out.
        keep_checkpoints: how many to keep.
        callbacks: further Trainer callbacks.
        tokenizer: saved beside each adapter.
        prompts_together: whether pairs of one prompt share an optimizer step, so that its answers are scored once.
        say: gets a line when something is not as planned.
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
        scorer: Scorer,
        reference: Reference,
        token_budget: int,
        keep_checkpoints: int,
        tokenizer: Any,
        prompts_together: bool = False,
        callbacks: Sequence[Any] = (),
        say: Callable[[str], None] = lambda line: None,
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
        self.prompts_together = prompts_together
        self.scorer = scorer
        self.reference = reference
        self.say = say
        self.token_budget = token_budget
        self.keep_checkpoints = keep_checkpoints
        self._window: list[ScoredPairs] = []
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
        total, scored = self._with_smaller_rows(lambda: self._accumulate(model, mine, 1 / len(inputs)))
        # The gradients of a LoRA are small: one reduction after the last micro-batch, and processes may have any number of
        # micro-batches. What no pair reaches is zero, not missing: Adam's averages move on all the same.
        for parameter in adapter_parameters(model):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._sum_over_processes(parameter.grad)
        self._sum_over_processes(total)
        self._check_gradients(inputs)
        self._window.extend(scored)
        self._window_tokens += sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in inputs)
        return total.float()

    def _accumulate(self, model: Any, pairs: list[EncodedPair], share: float) -> tuple[torch.Tensor, list[ScoredPairs]]:
        """Add the gradients of the pairs' losses, each counted `share`; return the sum of the losses, and the scored pairs."""
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        parts = []
        for batch in self.scorer.split(pairs, self.token_budget) if pairs else []:
            scored, out = self.forward_pairs(model, [pairs[index] for index in batch])
            loss = share * out.loss.sum()
            # A hinge that is satisfied by all pairs has gradient 0, and so has an SFT term of weight 0.
            if out.weight.any() or self.coefficients["sft_weight"]:
                loss.backward()
            total += loss.detach()
            parts.append(scored)
        return total, parts

    def forward_pairs(self, model: Any, pairs: list[EncodedPair]) -> tuple[ScoredPairs, PreferenceLoss]:
        """Return the pairs as scored, and their losses with gradient.

        Raises:
            TrainingError: a loss is not finite; names the pairs.
        """
        device = self.args.device
        reference = None
        if self.coefficients["gamma"] != 0:  # first, while no activations of the policy lie in memory
            reference = PairLogprobs(*(field.to(device) for field in self.reference.logprobs(pairs)))
        policy = self.scorer.logprobs(model, pairs)
        margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64, device=device)
        out = score_loss(policy, reference, margins, self.coefficients, self.margin_scale)
        if not out.loss.isfinite().all():
            bad = [pair.where for pair, finite in zip(pairs, out.loss.isfinite().tolist(), strict=True) if not finite]
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is not finite for {', '.join(bad[:5])}; nothing was updated by "
                "this step. Lower train.learning_rate or loss.beta, or look at these rows; `--resume` goes on from the last "
                "checkpoint"
            )
        return scored_pairs(policy, reference, out), out

    def _with_smaller_rows(self, step: Callable[[], _Result]) -> _Result:
        """Return what the step returns; out of memory, begin it again with half the tokens per forward.

        Raises:
            TrainingError: rows cannot become smaller.
        """
        while True:
            try:
                return step()
            except torch.OutOfMemoryError as error:
                longest = max(self.scorer.tokens([pair]) for pair in self.train_dataset)
                if self.token_budget <= longest:
                    raise TrainingError(
                        f"step {self.state.global_step + 1}: out of memory with one pair at a time (the longest has {longest} "
                        "tokens); nothing was updated by this step. Set train.gradient_checkpointing: true, or a smaller "
                        "data.max_length; `--resume` goes on from the last checkpoint"
                    ) from error
            self.model.zero_grad()
            torch.cuda.empty_cache()
            self.token_budget = max(longest, self.token_budget // 2)
            self.reference.token_budget = self.token_budget
            self.say(f"look: out of memory; going on with {self.token_budget} tokens per forward (the step is not lost)")

    def _sum_over_processes(self, tensor: torch.Tensor) -> None:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(tensor)

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
        """Return the held-out pairs' log-probs under the model as it is now."""
        return self._of_held_out(lambda pairs: score_pairs(self.model, pairs, self.scorer, token_budget=self.token_budget))

    def score_reference(self) -> PairLogprobs:
        """Return the held-out pairs' log-probs under π0."""
        return self._of_held_out(self.reference.logprobs)

    def score_held_out(self, policy: PairLogprobs | None = None) -> ScoredPairs:
        """Return the held-out pairs as policy (if not given) and reference score them now."""
        policy = self.score_model() if policy is None else policy
        margins = torch.tensor([pair.margin for pair in self.held_out], dtype=torch.float64)
        out = score_loss(policy, self.held_out_reference, margins, self.coefficients, self.margin_scale)
        return scored_pairs(policy, self.held_out_reference, out)

    def _of_held_out(self, score: Callable[[Sequence[EncodedPair]], PairLogprobs]) -> PairLogprobs:
        """Return what `score` makes of the held-out pairs; the processes share the work."""
        world, rank = self.args.world_size, self.args.process_index
        if len(self.held_out) < world:
            world, rank = 1, 0
        mine = self._with_smaller_rows(lambda: score(self.held_out[rank::world]))
        if world == 1:
            return mine
        order = torch.cat([torch.arange(start, len(self.held_out), world) for start in range(world)]).argsort()
        return PairLogprobs(*(field[order] for field in concatenate(gather_object([mine]))))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Trainer write its checkpoint into a staging folder, then seal and rename it."""
        run = Path(self.args.output_dir)
        self.reference.flush()
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

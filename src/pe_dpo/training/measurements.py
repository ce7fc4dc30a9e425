"""What is measured of a policy and kept: at the end of a run in its folder, along the way under snapshots/, and of the finished
adapter scaled toward the reference under scaled/ (recipe: generation.scales).

eval_pairs.parquet     held-out pairs one by one
generations.parquet    answers sampled from the policy, with KL(π‖π0), entropy and length (recipe: generation.prompts)
evaluation.json        the metrics of both
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pe_dpo.inference.drift import measure_drift
from pe_dpo.inference.pairs import with_texts
from pe_dpo.metrics.catalogue import pair_metrics, share_intervals
from pe_dpo.metrics.table import PairTable
from pe_dpo.recipe.schema import GenerationSection
from pe_dpo.runs.files import ANSWERS_FILE, PAIRS_FILE
from pe_dpo.runs.writing import save_evaluation
from pe_dpo.training.trainer import PairTrainer

GENERATION_SEED = 0
"""Of the sampled answers: the same in every run, so that runs are compared on common random numbers."""


class Snapshots(TrainerCallback):
    """Calls `measure` with the step after each of some optimizer steps."""

    def __init__(self, steps: Collection[int], measure: Callable[[int], None]) -> None:
        self.steps, self.measure = frozenset(steps), measure

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is due."""
        if state.global_step in self.steps:
            self.measure(state.global_step)


def snapshot_steps(count: int, steps: int) -> list[int]:
    """Return `count` steps that divide a run of `steps` evenly, its end left out; fewer where there are not so many."""
    return sorted({round(steps * part / (count + 1)) for part in range(1, count + 1)} - {0, steps})


def keep_measurements(
    folder: Path,
    trainer: PairTrainer,
    scored: PairTable,
    settings: GenerationSection,
) -> None:
    """Sample answers if they are asked for, and write all that is known of the policy as it is now.

    Args:
        folder: where to.
        trainer: with the policy.
        scored: the held-out pairs as they are now.
        settings: what to sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drift = None
    if settings.prompts:
        policy = trainer.reference.policy
        drift = measure_drift(policy, trainer.scorer, trainer.held_out, settings, seed=GENERATION_SEED)
    with_texts(scored, trainer.held_out, trainer.processing_class).save(folder / PAIRS_FILE)
    if drift:
        drift.table.save(folder / ANSWERS_FILE)
    metrics = pair_metrics(scored, is_fixed_set=True)
    intervals = share_intervals(metrics, len(scored))
    save_evaluation(folder, metrics, intervals, drift.summary() if drift else None)

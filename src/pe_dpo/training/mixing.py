"""Mixout in a run: when another model is sampled, how p rises, how strong p turned out to be, and where it is hopeless."""

import logging
from typing import Any

from transformers import TrainerCallback

from pe_dpo.inference.mixout_noise import PAIRS, MixoutNoise, measure_noise
from pe_dpo.model.adapter import attach_adapter
from pe_dpo.model.base import BaseInfo, empty_model
from pe_dpo.model.mixout import Mixout, attach_mixout
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.schema import MixoutSection
from pe_dpo.runs.writing import RunWriter
from pe_dpo.training.trainer import PairTrainer

logger = logging.getLogger(__name__)

FEWEST_UNITS, FEWEST_STEPS = 8, 10
"""With fewer input units of a layer, or fewer steps that train a unit, mostly masks are learned. Judgement, not measurement."""


class Mixing(TrainerCallback):
    """Sets what is sampled, through the events of Trainer; measures what p came to when the run is complete.

    Args:
        mixout: The mixout of the model.
        settings: The mixout section of the recipe.
        steps: The optimizer steps of the whole run.
        trainer: The trainer of the model.
        writer: The writer of the run; None outside of one.
    """

    def __init__(
        self, mixout: Mixout, settings: MixoutSection, steps: int, trainer: PairTrainer, writer: RunWriter | None
    ) -> None:
        self.mixout, self.settings, self.trainer, self.writer = mixout, settings, trainer, writer
        self._rise = min(round(settings.warmup * steps), steps - 1)  # the last step has all of p
        self._microbatch = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the model of an optimizer step."""
        self.mixout.p = self.settings.p * min(1.0, (state.global_step + 1) / (self._rise + 1))
        self._microbatch = 0
        self._draw(args, state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the model of the next micro-batch, where each has its own."""
        self._microbatch += 1
        self._draw(args, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that no layer learned past its mask; a process without pairs in this step has the others' gradients alone."""
        if self._microbatch:
            self.mixout.check_reached()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, and write into run.json, how strong p was; not of a run that was interrupted."""
        if state.global_step < state.max_steps or not state.is_world_process_zero:
            return
        noise = self.measure()
        if self.writer:
            self.writer.update(mixout={**self.settings.model_dump(), **noise._asdict()})
        logger.info(f"mixout {self.settings.p:g} ({self.settings.form}): {noise.words()}")

    def measure(self) -> MixoutNoise:
        """Return how far masks move the scores of a few monitored pairs."""
        trainer = self.trainer
        pairs, reference, reduce = trainer.monitored[:PAIRS], trainer.monitored_reference, trainer.loss.reduce
        assert reference is not None, "scored before the first step"
        with trainer.keeping_what_was_saved():
            return measure_noise(trainer.model, self.mixout, pairs, trainer.scorer, reference, reduce=reduce)

    def _draw(self, args: Any, state: Any) -> None:
        if self.settings.draws == "step":
            self.mixout.draw = state.global_step
        else:
            self.mixout.draw = state.global_step, args.process_index, self._microbatch


def mixout_warnings(recipe: Recipe, base: BaseInfo, steps: int) -> list[str]:
    """Return what makes little sense about a recipe's mixout; no weights are read.

    Args:
        recipe: The recipe of the run.
        base: What is known of its base.
        steps: The optimizer steps of the run.

    Raises:
        ModelError: something would be trained that mixout does not cover.
    """
    p, form = recipe.mixout.p, recipe.mixout.form
    if not p:
        return []
    found = []
    if (1 - p) * steps < FEWEST_STEPS:
        found.append(
            f"mixout.p {p:g} trains each unit in {(1 - p) * steps:.1f} of {steps} steps on average; lower it, or train longer"
        )
    if form == "element":
        found.append(
            "mixout.form: element multiplies whole layers again, two to four times the work of each; column is nearly free"
        )
    if recipe.adapter.start:
        return found
    adapter = recipe.adapter
    model = attach_adapter(
        empty_model(base.base, base.config), rank=adapter.rank, alpha=adapter.alpha, dropout=0.0, targets=adapter.targets,
        exclude=adapter.exclude,
    )  # fmt: skip
    narrowest = min(layer.units for layer in attach_mixout(model, p, seed=0).layers.values() if layer.units)
    if form == "column" and (1 - p) * narrowest < FEWEST_UNITS:
        found.append(
            f"mixout.p {p:g} keeps {(1 - p) * narrowest:.1f} of the {narrowest} input units of the narrowest layer on average: "
            "mostly masks are learned; lower it"
        )
    return found

"""A γ that the recipe leaves to the data: found before the first step, written down, and taken from there by a resumed run.

recipe: gamma: auto ── log-probs of the training pairs ── γ ──► run.json: gamma_calibration, recipe.yaml: the number
                                                                      └── --resume with the same recipe
"""

import logging
from collections.abc import Sequence

import torch

from pe_dpo.audit.calibration import Calibration, calibrate_loss
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.disk import write_atomically
from pe_dpo.inference.reference import Reference, check_finite
from pe_dpo.progress import progress
from pe_dpo.recipe import Recipe, recipe_to_yaml, warnings, with_gamma
from pe_dpo.runs.files import RECIPE_FILE
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter
from pe_dpo.training.trainer import forget_if_any

logger = logging.getLogger(__name__)


def find_gamma(
    recipe: Recipe,
    reference: Reference,
    pairs: Sequence[EncodedPair],
) -> tuple[Recipe, Calibration | None]:
    """Return the recipe with its γ as a number, and how it was found; a recipe that has a number stays.

    Log-probs of all training pairs are looked up or computed, by each process its part; the first process's γ is everybody's.

    Args:
        recipe: of the run.
        reference: of the run.
        pairs: that will be trained on, all of them in every process.

    Raises:
        UsageError: the data do not allow the γ that is asked for.
        RecipeError: with the number that was found the recipe contradicts itself.
        ModelError: a log-prob is not finite.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if not recipe.loss.is_calibrated:
        return recipe, None
    state = PartialState()
    forget_if_any(reference, reference.recheck(pairs))
    mine = pairs[state.process_index :: state.num_processes]
    with progress("scoring, reference"):
        reference.logprobs(mine)
    reference.flush()
    state.wait_for_everyone()
    logprobs = reference.logprobs(pairs)
    check_finite(logprobs, pairs)
    margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
    found = calibrate_loss(recipe.loss, logprobs, margins, [pair.prompt_key for pair in pairs])
    found = broadcast_object_list([found])[0]
    recipe = with_gamma(recipe, found.gamma)
    logger.info(_words(found, recipe))
    for line in warnings(recipe):
        logger.warning(line)
    return recipe, found


def record_gamma(writer: RunWriter, recipe: Recipe, found: Calibration) -> None:
    """Write down what γ came to, and the recipe that has it."""
    if writer.writes:
        writer.update(gamma_calibration=found.to_dict())
        write_atomically(writer.folder / RECIPE_FILE, recipe_to_yaml(recipe))


def with_recorded_gamma(run: Run, recipe: Recipe) -> Recipe:
    """Return a recipe with the γ that a run found, where both ask for it in the same way; else as it is."""
    if not recipe.loss.is_calibrated:
        return recipe
    record = run.info.calibration
    return with_gamma(recipe, record["gamma"]) if record.get("asked") == recipe.loss.gamma else recipe


def repair_recipe(run: Run) -> None:
    """Write the γ that was found into recipe.yaml, should a kill have come between the record and it."""
    if run.exists:
        found = with_recorded_gamma(run, run.recipe)
        if found != run.recipe:
            write_atomically(run.folder / RECIPE_FILE, recipe_to_yaml(found))


def _words(found: Calibration, recipe: Recipe) -> str:
    interval = "" if found.interval is None else " (95 %: {:.3g} to {:.3g})".format(*found.interval)
    kappa = found.gamma / recipe.loss.beta
    return f"gamma {found.asked}: {found.gamma:.4g}{interval}, κ = γ/β {kappa:.3g}, from {found.pairs} pairs"

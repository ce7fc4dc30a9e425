"""A γ that the recipe leaves to the data: found before the first step, written down, and taken from there by a resumed run.

recipe: gamma: auto ── log-probs of the training pairs ── γ ──► run.json: gamma_calibration, recipe.yaml: the number
                                                                      └── --resume with the same recipe
"""

import logging
from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from pe_dpo.audit.calibration import Calibration, calibrate_loss
from pe_dpo.data.encoded import column
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.inference.pairs import pair_terms
from pe_dpo.inference.reference import Reference, check_finite
from pe_dpo.progress import progress
from pe_dpo.recipe import Recipe, warnings, with_gamma
from pe_dpo.runs.run import Run

logger = logging.getLogger(__name__)


def find_gamma(recipe: Recipe, reference: Reference, pairs: Sequence[EncodedPair]) -> tuple[Recipe, Calibration | None]:
    """Return the recipe with its γ as a number, and how it was found; a recipe that has a number stays.

    Log-probs of all training pairs are looked up or computed, by each process its part; the first process's γ is everybody's.

    Args:
        recipe: The recipe of the run.
        reference: The reference of the run.
        pairs: All pairs that will be trained on, in every process.

    Raises:
        UsageError: the data do not allow the γ that is asked for.
        RecipeError: with the number that was found the recipe contradicts itself.
        ModelError: a log-prob is not finite.
    """
    if not recipe.loss.is_calibrated:
        return recipe, None
    forget_if_any(reference, reference.recheck(pairs))
    score_own_part(reference, pairs)
    PartialState().wait_for_everyone()
    logprobs = reference.logprobs(pairs)
    check_finite(logprobs, pairs)
    found = calibrate_loss(recipe.loss, logprobs, pair_terms(pairs), column(pairs, "prompt_key"))
    found = broadcast_object_list([found])[0]
    recipe = with_gamma(recipe, found.gamma)
    interval = "" if found.interval is None else " (95 %: {:.3g} to {:.3g})".format(*found.interval)
    kappa = found.gamma / recipe.loss.beta
    logger.info(f"gamma {found.asked}: {found.gamma:.4g}{interval}, κ = γ/β {kappa:.3g}, from {found.pairs} pairs")
    for line in warnings(recipe):
        logger.warning(line)
    return recipe, found


def with_recorded_gamma(run: Run, recipe: Recipe) -> Recipe:
    """Return a recipe with the γ that a run found, where both ask for it in the same way; else as it is."""
    if not recipe.loss.is_calibrated:
        return recipe
    record = run.info.calibration
    return with_gamma(recipe, record["gamma"]) if record.get("asked") == recipe.loss.gamma else recipe


def forget_if_any(reference: Reference, why: str | None) -> bool:
    """Throw the stored reference away in all processes if one of them found it wrong; return whether."""
    reasons = [reason for reason in gather_object([why]) if reason]
    if reasons:
        reference.forget(reasons[0])
    return bool(reasons)


def score_own_part(reference: Reference, pairs: Sequence[EncodedPair]) -> None:
    """Look up or compute, and store, the reference's log-probs of this process's part of the pairs."""
    state = PartialState()
    with progress("scoring, reference"):
        reference.logprobs(pairs[state.process_index :: state.num_processes])
    reference.flush()

"""What looks off in a run, in words, each with what to turn."""

from collections.abc import Mapping

from pe_dpo.evaluation.pairs import ScoredPairs
from pe_dpo.recipe import Recipe


def scale_remarks(recipe: Recipe, held_out: ScoredPairs | None) -> list[str]:
    """Return a warning when γ ≠ β is out of scale with the reference: |δ| = |γ − β|·sd(Δ0) above 1.

    Args:
        recipe: of the run.
        held_out: the held-out pairs as scored before training; None without any.
    """
    if held_out is None or not held_out.has_reference or len(held_out.loss) < 2 or recipe.loss.gamma_value == 0:
        return []
    per_token = recipe.loss.reduce == "mean"
    spread = float((held_out.reference_preference_per_token if per_token else held_out.reference_preference).std())
    delta = (recipe.loss.gamma_value - recipe.loss.beta) * spread
    if abs(delta) <= 1:
        return []
    return [
        f"δ = (γ−β)·sd(Δ0) = {delta:.2f}: with sd(Δ0) = {spread:.3g} nats a few pairs take nearly all of the gradient at the "
        "start; bring gamma closer to beta, or use reduce: mean"
    ]


def outcome_remarks(after: Mapping[str, float], *, has_moved: bool) -> list[str]:
    """Return what looks off after training.

    Args:
        after: held-out metrics; may be empty.
        has_moved: whether any B of the adapter is not 0.
    """
    remarks = []
    chosen, rejected = after.get("displacement/chosen", 0.0), after.get("displacement/rejected", 0.0)
    if chosen < 0 and rejected < 0:
        remarks.append(
            f"both answers became less likely than under the reference (chosen {chosen:.2f}, rejected {rejected:.2f} nats): "
            "likelihood moved elsewhere; loss.sft_weight counteracts it"
        )
    if not has_moved:
        remarks.append(
            "nothing moved, the adapter is still zero: no pair had a gradient; look at active and weight in metrics.jsonl"
        )
    return remarks

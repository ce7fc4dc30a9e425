"""What looks off in a run, in words, each with what to turn."""

from collections.abc import Callable, Mapping

from pe_dpo.links import link_named
from pe_dpo.metrics.estimates import wilson_interval
from pe_dpo.metrics.table import PairTable
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.loss_section import LossSection

Metrics = Mapping[str, float]

FEWEST_PAIRS = 30
"""Correlations and shares of pairs say nothing of fewer."""


def scale_remarks(recipe: Recipe, first: PairTable, *, of: str) -> list[str]:
    """Return a warning when γ ≠ β is out of scale with the reference: |δ| = |γ − β|·sd(Δ0) above 1.

    Args:
        recipe: of the run, its γ a number.
        first: the watched pairs as scored before training.
        of: which pairs these are, in words.
    """
    if not first.has_reference or len(first) < 2 or recipe.loss.gamma_value == 0:
        return []
    spread = float(first.delta("reference", per_token=recipe.loss.reduce == "mean").std(ddof=1))
    delta = (recipe.loss.gamma_value - recipe.loss.beta) * spread
    if abs(delta) <= 1:
        return []
    return [
        f"δ = (γ−β)·sd(Δ0) = {delta:.2f}: with sd(Δ0) = {spread:.3g} nats over the {of} pairs a few of them take "
        "nearly all of the gradient at the start; bring gamma closer to beta, or use reduce: mean"
    ]


def batch_remarks(metrics: Metrics, loss: LossSection) -> dict[str, str]:
    """Return what looks off in the pairs of one or a few optimizer steps, by name.

    Args:
        metrics: of the pairs, see `pair_metrics`.
        loss: of the recipe.
    """
    if metrics.get("weight/mean", 1.0) > 0 or loss.sft_weight:
        return {}
    turn = "raise loss.margin, or stop here" if link_named(loss.link).has_kink else "lower loss.beta, or stop here"
    return {"dead": f"no pair pulls any more: the loss is content with every pair of a step, so nothing is learned; {turn}"}


def set_remarks(metrics: Metrics, before: Metrics, loss: LossSection) -> dict[str, str]:
    """Return what looks off in a fixed set of pairs, by name.

    Args:
        metrics: of the set, see `pair_metrics`; may be empty.
        before: the same at step 0; may be empty.
        loss: of the recipe.
    """
    found = {name: judge(metrics, before, loss) for name, judge in _JUDGES.items()} if metrics else {}
    return {name: words for name, words in found.items() if words}


def stillness_remark(*, has_moved: bool) -> dict[str, str]:
    """Return what to say of an adapter that is still zero after training.

    Args:
        has_moved: whether any B of the adapter is not 0.
    """
    if has_moved:
        return {}
    words = "nothing moved, the adapter is still zero: no pair had a gradient; look at active and weight/mean in metrics.jsonl"
    return {"frozen": words}


def _frozen(metrics: Metrics, before: Metrics, loss: LossSection) -> str | None:
    keys = ("logps/chosen", "logps/rejected")
    if not before or any(metrics[key] != before[key] for key in keys) or not metrics["weight/mean"]:
        return None
    return (
        "not one log-prob has changed since step 0 although pairs pull: the adapter is frozen, or its steps are lost in the "
        "base's precision; look at grad_norm and learning_rate in metrics.jsonl, raise train.learning_rate"
    )


def _both_fell(metrics: Metrics, before: Metrics, loss: LossSection) -> str | None:
    chosen, rejected = metrics.get("displacement/chosen", 0.0), metrics.get("displacement/rejected", 0.0)
    if not (chosen < 0 and rejected < 0):
        return None
    fell = metrics["displacement/chosen_fell"]
    if wilson_interval(fell, int(metrics["pairs"]))[0] <= 0.5:
        return None
    turn = "raise loss.sft_weight" if loss.sft_weight else "loss.sft_weight counteracts it"
    return (
        f"both answers became less likely than under the reference (chosen {chosen:.2f}, rejected {rejected:.2f} nats; "
        f"{fell:.0%} of the chosen fell): likelihood moved elsewhere; {turn}"
    )


def _collapsed(metrics: Metrics, before: Metrics, loss: LossSection) -> str | None:
    lost = -metrics.get("displacement/chosen_per_token", 0.0)
    if lost < 0.5:
        return None
    return (
        f"the chosen answers lost {lost:.2f} nats per token: the policy has gone far from the reference and may write broken "
        "text; lower train.learning_rate, raise beta and gamma together, or stop earlier (generation.snapshots shows where)"
    )


def _overfitted(metrics: Metrics, before: Metrics, loss: LossSection) -> str | None:
    if not before or not metrics["loss"] > 1.02 * before["loss"] + 0.002:
        return None
    return (
        f"the loss of the watched pairs is above what it was before training ({before['loss']:.4f} then, {metrics['loss']:.4f} "
        "now): what is learned does not carry over; lower train.learning_rate, stop earlier, or mixout.p > 0"
    )


def _saturated(metrics: Metrics, before: Metrics, loss: LossSection) -> str | None:
    share = metrics.get("weight/saturated", 0.0)
    if share < 0.8 or metrics["pairs"] < FEWEST_PAIRS:
        return None
    low = metrics["weight/saturated_low"]
    if low > share / 2:
        return (
            f"saturated: {low:.0%} of the pairs pull with less than a twentieth of full weight, and more steps change little; "
            "to learn more from them lower beta and gamma together, else stop earlier"
        )
    nearer = "bring loss.gamma closer to loss.beta" if loss.gamma_value != loss.beta else "lower beta and gamma together"
    reduce = ", or use loss.reduce: mean" if loss.reduce == "sum" else ""
    return (
        f"saturated: {share - low:.0%} of the pairs pull with full weight however they are ranked, and the loss cannot tell "
        f"them apart: it asks for Δπ of {metrics['margin/q50']:.3g} nats (median); {nearer}{reduce}"
    )


def _concentrated(metrics: Metrics, before: Metrics, loss: LossSection) -> str | None:
    pairs, share = metrics["pairs"], metrics.get("weight/effective_share", 0.0)
    if pairs < FEWEST_PAIRS or not 0 < share < 0.1:
        return None
    return (
        f"a few pairs take nearly all of the gradient: {pairs:.0f} pull like {share * pairs:.0f}; bring loss.gamma closer to "
        "loss.beta, lower both, or set loss.label_smoothing if the labels are noisy"
    )


def _satisfied_early(metrics: Metrics, before: Metrics, loss: LossSection) -> str | None:
    """A hinge drops such pairs for good. The logistic loss only eases off, and near step 0 it has not yet: hence the mean score
    of the wrong pairs, above 1, where they pull with a quarter of full weight. By sums and per token, or it is about length."""
    tables = ("regimes", "regimes_per_token")
    pairs = metrics["pairs"]
    if pairs < FEWEST_PAIRS or any(f"{table}/satisfied_early" not in metrics for table in tables):
        return None
    share = min(metrics[f"{table}/satisfied_early"] for table in tables) / pairs
    wrong = [metrics.get(f"{table}/policy_wrong_reference_wrong/mean_score", 0.0) for table in tables]
    if share < 0.2 or (not link_named(loss.link).has_kink and min(wrong) < 1):
        return None
    floor = "" if loss.reference_floor is not None else "loss.reference_floor: 0 (HyPO), "
    return (
        f"satisfied early: the loss is content (z >= 0) with {share:.0%} of the pairs although the policy ranks them wrong, "
        f"since the reference ranks them worse; {floor}a smaller loss.gamma or loss.margin > 0 keeps pulling"
    )


def _drifts_with_length(metrics: Metrics, before: Metrics, loss: LossSection) -> str | None:
    slope, linked = metrics.get("length/shift_slope", 0.0), metrics.get("length/shift_correlation", 0.0)
    if metrics["pairs"] < FEWEST_PAIRS or abs(linked) < 0.5 or abs(slope) < 0.02:
        return None
    turns = ["loss.reduce: mean"] if loss.reduce == "sum" else []
    turns.append("loss.length_penalty > 0" if slope > 0 else "loss.sft_weight where both answers fall")
    return (
        f"length drift: against the reference each further token of an answer {'gains' if slope > 0 else 'costs'} it "
        f"{abs(slope):.3f} nats (correlation {linked:.2f} with the length difference): the policy learns "
        f"{'longer' if slope > 0 else 'shorter'} answers; {' or '.join(turns)}"
    )


_JUDGES: Mapping[str, Callable[[Metrics, Metrics, LossSection], str | None]] = {
    "frozen": _frozen,
    "both_fell": _both_fell,
    "collapsed": _collapsed,
    "overfitted": _overfitted,
    "saturated": _saturated,
    "concentrated": _concentrated,
    "satisfied_early": _satisfied_early,
    "length_drift": _drifts_with_length,
}

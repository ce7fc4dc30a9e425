"""What looks off in a run, each with what to turn: by name, from the metrics of its pairs."""

from collections.abc import Mapping

from pe_dpo.links import link_named
from pe_dpo.metrics.catalogue import share_interval
from pe_dpo.metrics.table import PairTable
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.describe import preference_names
from pe_dpo.recipe.loss_section import LossSection

Metrics = Mapping[str, float]

_GRAVEST_FIRST = (
    "frozen", "collapsed", "both_fell", "overfitted", "dead", "concentrated", "saturated", "satisfied_early", "length_drift",
)  # fmt: skip
"""The names of what is looked for, by how much of the result each can cost: first a run that came to nothing or did harm, then
one that learned less than it could, then what it learned beside the point."""

FEWEST_PAIRS = 30
"""Correlations and shares of pairs say nothing of fewer."""


def gravest_first(found: Mapping[str, str]) -> list[str]:
    """Return what looks off, the gravest first."""
    return [found[name] for name in sorted(found, key=_GRAVEST_FIRST.index)]


def diagnose_scale(recipe: Recipe, first: PairTable, *, of: str) -> list[str]:
    """Return a warning when γ ≠ β is out of scale with the reference: |δ| = |γ − β|·sd(Δ0) above 1.

    Args:
        recipe: The recipe of the run, its γ a number.
        first: The monitored pairs as scored before training.
        of: Which pairs these are, as "held-out".
    """
    if not first.has_reference or len(first) < 2 or recipe.loss.gamma_value == 0:
        return []
    in_score = first.scored("reference") * (1 if first.pair_beta is None else first.pair_beta / recipe.loss.beta)
    spread, (_, what) = float(in_score.std(ddof=1)), preference_names(recipe.loss.rejected_weight)
    what = what if first.pair_beta is None else f"βᵢ/β·{what}"
    delta = (recipe.loss.gamma_value - recipe.loss.beta) * spread
    if abs(delta) <= 1:
        return []
    return [
        f"δ = (γ−β)·sd({what}) = {delta:.2f}: with sd({what}) = {spread:.3g} nats over the {of} pairs a few of them take "
        "nearly all of the gradient at the start; bring gamma closer to beta, or use reduce: mean"
    ]


def diagnose_window(metrics: Metrics, loss: LossSection) -> dict[str, str]:
    """Return what looks off in the pairs of one or a few optimizer steps, by name.

    Args:
        metrics: The metrics of the pairs, see `pair_metrics`.
        loss: The loss section of the recipe.
    """
    if metrics.get("weight/mean", 1.0) > 0 or loss.sft_weight:
        return {}
    turn = "raise loss.margin, or stop here" if link_named(loss.link).has_kink else "lower loss.beta, or stop here"
    return {"dead": f"no pair pulls any more: the loss is content with every pair of a step, so nothing is learned; {turn}"}


def diagnose_pairs(metrics: Metrics, before: Metrics, loss: LossSection) -> dict[str, str]:
    """Return what looks off in a fixed set of pairs, by name.

    Args:
        metrics: The metrics of the set, see `pair_metrics`; may be empty.
        before: The same at step 0; may be empty.
        loss: The loss section of the recipe.
    """
    if not metrics:
        return {}
    found = _diagnose_likelihoods(metrics, before, loss)
    if metrics["pairs"] >= FEWEST_PAIRS:
        found |= _diagnose_weights(metrics, loss) | _diagnose_rankings(metrics, loss)
    return found


def _diagnose_likelihoods(metrics: Metrics, before: Metrics, loss: LossSection) -> dict[str, str]:
    """Return what looks off in the log-probs and in the loss: frozen, both_fell, collapsed, overfitted."""
    found = {}
    is_still = bool(before) and all(
        key in metrics and metrics[key] == before.get(key) for key in ("logps/chosen", "logps/rejected")
    )
    if is_still and metrics.get("weight/mean"):
        found["frozen"] = (
            "not one log-prob has changed since step 0 although pairs pull: the adapter is frozen, or its steps are lost in "
            "the base's precision; look at grad_norm and learning_rate in metrics.jsonl, raise train.learning_rate"
        )
    chosen, rejected = metrics.get("displacement/chosen", 0.0), metrics.get("displacement/rejected", 0.0)
    if chosen < 0 and rejected < 0:
        fell = metrics["displacement/chosen_fell"]
        lower = f"loss.rejected_weight below {min(1, loss.rejected_weight):g}"
        turn = f"raise loss.sft_weight or set {lower}" if loss.sft_weight else f"loss.sft_weight or {lower} counteracts it"
        if share_interval(metrics, "displacement/chosen_fell")[0] > 0.5:
            found["both_fell"] = (
                f"both answers became less likely than under the reference (chosen {chosen:.2f}, rejected {rejected:.2f} "
                f"nats; {fell:.0%} of the chosen fell): likelihood moved elsewhere; {turn}"
            )
    lost = -metrics.get("displacement/chosen_per_token", 0.0)
    if lost >= 0.5:
        found["collapsed"] = (
            f"the chosen answers lost {lost:.2f} nats per token: the policy has gone far from the reference and may write "
            "broken text; lower train.learning_rate, raise beta and gamma together, or stop earlier (generation.snapshots "
            "shows where)"
        )
    if "loss" in before and "loss" in metrics and metrics["loss"] > 1.02 * before["loss"] + 0.002:
        found["overfitted"] = (
            f"the loss of the watched pairs is above what it was before training ({before['loss']:.4f} then, "
            f"{metrics['loss']:.4f} now): what is learned does not carry over; lower train.learning_rate, stop earlier, or "
            "mixout.p > 0"
        )
    return found


def _diagnose_weights(metrics: Metrics, loss: LossSection) -> dict[str, str]:
    """Return what looks off in how hard pairs pull: saturated, concentrated."""
    found = {}
    share, low = metrics.get("weight/saturated", 0.0), metrics.get("weight/saturated_low", 0.0)
    if share >= 0.8 and low > share / 2:
        found["saturated"] = (
            f"saturated: {low:.0%} of the pairs pull with less than a twentieth of full weight, and more steps change little; "
            "to learn more from them lower beta and gamma together, else stop earlier"
        )
    elif share >= 0.8:
        nearer = "bring loss.gamma closer to loss.beta" if loss.gamma_value != loss.beta else "lower beta and gamma together"
        reduce = ", or use loss.reduce: mean" if loss.reduce == "sum" else ""
        found["saturated"] = (
            f"saturated: {share - low:.0%} of the pairs pull with full weight however they are ranked, and the loss cannot "
            f"tell them apart: it asks for Δπ of {metrics['margin/q50']:.3g} nats (median); {nearer}{reduce}"
        )
    pairs, effective = metrics["pairs"], metrics.get("weight/effective_share", 0.0)
    if 0 < effective < 0.1:
        found["concentrated"] = (
            f"a few pairs take nearly all of the gradient: {pairs:.0f} pull like {effective * pairs:.0f}; bring loss.gamma "
            "closer to loss.beta, lower both, or set loss.label_smoothing if the labels are noisy"
        )
    return found


def _diagnose_rankings(metrics: Metrics, loss: LossSection) -> dict[str, str]:
    """Return what looks off in which pairs are ranked right: satisfied_early, length_drift.

    A hinge drops pairs that it is content with for good. The logistic loss only eases off, and near step 0 it has not yet:
    hence the mean score of the wrong pairs, above 1, where they pull with a quarter of full weight. By sums and per token, or
    it is about length.
    """
    found = {}
    tables = ("regimes", "regimes_per_token")
    if all(f"{table}/satisfied_early" in metrics for table in tables):
        share = min(metrics[f"{table}/satisfied_early"] for table in tables) / metrics["pairs"]
        wrong = min(metrics.get(f"{table}/policy_wrong_reference_wrong/mean_score", 0.0) for table in tables)
        floor = "" if loss.reference_floor is not None or loss.rejected_weight != 1 else "loss.reference_floor: 0 (HyPO), "
        if share >= 0.2 and (link_named(loss.link).has_kink or wrong >= 1):
            found["satisfied_early"] = (
                f"satisfied early: the loss is content (z >= 0) with {share:.0%} of the pairs although the policy ranks them "
                f"wrong, since the reference ranks them worse; {floor}a smaller loss.gamma or loss.margin > 0 keeps pulling"
            )
    slope, correlation = metrics.get("length/shift_slope", 0.0), metrics.get("length/shift_correlation", 0.0)
    if abs(correlation) >= 0.5 and abs(slope) >= 0.02:
        turns = ["loss.reduce: mean"] if loss.reduce == "sum" else []
        turns.append("loss.length_penalty > 0" if slope > 0 else "loss.sft_weight where both answers fall")
        found["length_drift"] = (
            f"length drift: against the reference each further token of an answer {'gains' if slope > 0 else 'costs'} it "
            f"{abs(slope):.3f} nats (correlation {correlation:.2f} with the length difference): the policy learns "
            f"{'longer' if slope > 0 else 'shorter'} answers; {' or '.join(turns)}"
        )
    return found

"""All metrics of pairs and of sampled answers; what a run logs, evaluates, compares, reports and shows goes through this list.

    METRICS["accuracy/shift"](table)          a sum over rows divided by another, so that resampling prompts resamples it

Every metric is a mean over rows, never a mean of batch means, so that it does not depend on the batch size. Those that are
functions of the whole set (quantiles, slopes) have no rows, and runs are not compared on them.

Which metrics are fair between runs is no matter of taste. An implicit reward β·log π − γ·log π0 contains the run's own β and γ:
`rewards/…` of runs with another κ = γ/β are different quantities under one name. `accuracy/shift`, the share of pairs whose Δπ
moved above Δ0, has neither in it; it is what γ = β trains towards. `accuracy/policy`, the share that the policy ranks right, is
what γ = 0 trains towards, and by summed log-probs the lengths of the answers decide most of it. `win_rate` knows nothing of
the loss at all, where a scorer was at hand.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from pe_dpo.metrics.estimates import (
    clustered_ratio,
    correlation,
    length_slope,
    pairs_worth,
    right,
    wilson_interval,
)
from pe_dpo.metrics.quadrants import WAYS, effective_pairs, preference, quadrant_metrics, saturation, transitions
from pe_dpo.metrics.table import AnswerTable, Floats, PairTable, Table

T = TypeVar("T", bound=Table)


@dataclass(frozen=True, kw_only=True)
class Metric(Generic[T]):
    """A quantity of a table: Σ numerator / Σ denominator over its rows, or a function of all of it."""

    key: str
    """Under which it is logged and written."""
    title: str
    """For people, short."""
    explanation: str = ""
    """In a sentence; the title where it is empty."""
    kind: Literal["pairs", "answers"] = "pairs"
    """What its rows are."""
    needs: tuple[str, ...] = ()
    """Columns and settings of the table without which there is none."""
    numerator: Callable[[T], Floats] | None = None
    denominator: str | None = None
    """A column; ones if left out."""
    function: Callable[[T], float] | None = None
    """Instead of a numerator; NaN where it is not defined."""
    reference: Callable[[T], Floats] | float | None = None
    """Numerator of π0 itself, or its value. None where it has none, or where a run does not come near it as √KL falls to 0."""
    is_share: bool = False
    """Whether a row is 1, 0 or a tie (½): there is a Wilson interval, and differences are said in points."""
    direction: Literal[-1, 0, 1] | None = None
    """1 where more is better, −1 where less is, 0 where neither; None where comparing runs on it says nothing."""
    better: Literal[-1, 1] | None = None
    """Which way is better from one evaluation of a run to the next, where comparing runs says nothing; None: as `direction`."""
    caution: str = ""
    """Why runs should not be compared on it all the same."""
    is_headline: bool = False
    """Whether it is shown first: before and after a run in the terminal, on the model card and in the report."""
    form: str = ".4f"
    """How its values are written, where they are shown."""
    of_fixed_set: bool = False
    """Whether it is about pairs that are measured again and again, and not about those of a few steps of training."""

    def __call__(self, table: T) -> float:
        """Return the metric of a table that has what it needs; the answers to each prompt count together as much as others'."""
        if self.function is not None:
            return self.function(table)
        if self.kind == "pairs" and self.numerator is not None:  # each counts alike, whatever its prompt
            numerators = self.numerator(table)
            return float(numerators.sum() / (getattr(table, self.denominator).sum() if self.denominator else len(numerators)))
        above, below = self.sums(table, {key: at for at, key in enumerate(dict.fromkeys(table.prompt_key))})
        return float(above.sum() / below.sum())

    def sums(
        self, table: T, prompts: Mapping[str, int], *, size: int | None = None, numerators: Floats | None = None
    ) -> tuple[Floats, Floats]:
        """Return numerators and denominators summed over the rows of each prompt, (size,) each.

        The answers to a prompt count together as much as those to another, however many there are.

        Args:
            table: pairs or answers; those of prompts that are not in `prompts` are left out.
            prompts: position of each prompt by its key.
            size: one more than the largest position; by default the number of prompts.
            numerators: other than the metric's own.
        """
        if numerators is None:
            assert self.numerator is not None, f"{self.key} has rows"
            numerators = self.numerator(table)
        denominators = getattr(table, self.denominator) if self.denominator else np.ones(len(numerators))
        size = size or len(prompts)
        at = np.array(list(map(prompts.get, table.prompt_key, itertools.repeat(-1))), dtype=np.int64)
        there = at >= 0
        at, numerators, denominators = at[there], numerators[there], denominators[there]
        if self.kind == "answers":
            share = 1 / np.bincount(at, minlength=size)[at]
            numerators, denominators = numerators * share, denominators * share
        return np.bincount(at, numerators, size).astype(np.float64), np.bincount(at, denominators, size).astype(np.float64)


_REFERENCE = ("reference_chosen", "reference_rejected")
_REWARDS = ("chosen_reward", "rejected_reward")
_LENGTHS = ("chosen_lengths", "rejected_lengths")
_POLICY = ("policy_chosen", "policy_rejected")
_OWN_COEFFICIENTS = "contains the β and γ that each run was trained with"


def _saturation(table: PairTable) -> tuple[float, float]:
    assert table.link is not None, "the loss is known"
    return saturation(table.score, table.link) or (math.nan, math.nan)


def _margin_quantile(share: float) -> Callable[[PairTable], float]:
    return lambda table: float(np.quantile(table.effective_margin(), share))


# A line or a few for each, to be read as a table.
# fmt: off
_OF_PAIRS: tuple[Metric[PairTable], ...] = (
    Metric(key="accuracy/policy", title="accuracy, summed log-probs",
        explanation="pairs that the policy ranks right (Δπ > 0)", needs=_POLICY,
        numerator=lambda table: right(table.delta("policy")), reference=lambda table: right(table.delta("reference")),
        is_share=True, form=".3f", direction=1, is_headline=True),
    Metric(key="accuracy/policy_per_token", title="accuracy, per token",
        explanation="pairs that the policy ranks right by log-probs per token", needs=(*_POLICY, *_LENGTHS),
        numerator=lambda table: right(table.delta("policy", per_token=True)),
        reference=lambda table: right(table.delta("reference", per_token=True)), is_share=True, form=".3f", direction=1,
        is_headline=True),
    Metric(key="accuracy/policy_length_matched", title="accuracy, length-matched", needs=(*_POLICY, *_REFERENCE),
        numerator=lambda table: right(preference(table, "policy", "regimes_length_matched")), is_share=True, form=".3f",
        is_headline=True, of_fixed_set=True),
    Metric(key="accuracy/shift", title="moved toward chosen",
        explanation="pairs whose preference training moved towards chosen (Δπ > Δ0)", needs=(*_POLICY, *_REFERENCE),
        numerator=lambda table: right(table.shift()), is_share=True, form=".3f", direction=1, is_headline=True),
    Metric(key="accuracy/shift_per_token", title="moved toward chosen, per token",
        explanation="pairs whose preference per token training moved towards chosen",
        needs=(*_POLICY, *_REFERENCE, *_LENGTHS), numerator=lambda table: right(table.shift(per_token=True)), is_share=True,
        form=".3f", direction=1),
    Metric(key="accuracy/reference", title="accuracy of the reference, summed log-probs", needs=_REFERENCE,
        numerator=lambda table: right(table.delta("reference")), is_share=True, form=".3f"),
    Metric(key="accuracy/reference_per_token", title="accuracy of the reference, per token", needs=_REFERENCE,
        numerator=lambda table: right(table.delta("reference", per_token=True)), is_share=True, form=".3f"),
    Metric(key="accuracy/reference_length_matched", title="accuracy of the reference, length-matched", needs=_REFERENCE,
        numerator=lambda table: right(preference(table, "reference", "regimes_length_matched")), is_share=True,
        form=".3f", of_fixed_set=True),
    Metric(key="accuracy/implicit", title="accuracy of the score before its margin",
        explanation="pairs with z + m > 0; differs from reward accuracy under a floor or a rejected_weight alone",
        numerator=lambda table: right(table.implicit_preference), is_share=True, form=".3f", better=1),
    Metric(key="rewards/accuracies", title="reward accuracy", explanation="pairs whose chosen reward is the larger one",
        needs=_REWARDS, numerator=lambda table: right(table.reward_margin), is_share=True, form=".3f", direction=1,
        caution=_OWN_COEFFICIENTS, is_headline=True),
    Metric(key="rewards/margins", title="reward margin", explanation="reward of chosen minus reward of rejected",
        needs=_REWARDS, numerator=lambda table: table.reward_margin, direction=1, caution=_OWN_COEFFICIENTS,
        is_headline=True),
    Metric(key="rewards/chosen", title="reward of chosen", needs=_REWARDS, numerator=lambda table: table.chosen_reward),
    Metric(key="rewards/rejected", title="reward of rejected", needs=_REWARDS, numerator=lambda table: table.rejected_reward),
    Metric(key="nll/chosen_per_token", title="NLL of chosen, nats per token",
        explanation="negative log-likelihood of chosen answers, nats per token", needs=("policy_chosen", "chosen_lengths"),
        numerator=lambda table: -table.policy_chosen, denominator="chosen_lengths",
        reference=lambda table: -table.reference_chosen, direction=-1),
    Metric(key="logps/chosen", title="log π of chosen, nats", numerator=lambda table: table.policy_chosen),
    Metric(key="logps/rejected", title="log π of rejected, nats", numerator=lambda table: table.policy_rejected),
    Metric(key="score/mean", title="mean score z", numerator=lambda table: table.score),
    Metric(key="active", title="share of pairs with z < 0", form=".3f", is_share=True,
        numerator=lambda table: np.where(table.score < 0, 1.0, 0.0)),
    Metric(key="weight/mean", title="mean gradient weight", numerator=lambda table: np.abs(table.weight)),
    Metric(key="weight/effective_share", title="share of pairs that pull, (Σ|w|)²/(N·Σw²)",
        function=lambda table: effective_pairs(table.weight) / len(table)),
    Metric(key="weight/saturated", title="share of pairs of nearly no weight, or nearly the largest", needs=("link",),
        function=lambda table: sum(_saturation(table))),
    Metric(key="weight/saturated_low", title="share of pairs of nearly no weight", needs=("link",),
        function=lambda table: _saturation(table)[0]),
    Metric(key="margin/q05", title="Δπ that the loss asks for, 5 %", needs=("beta",), function=_margin_quantile(0.05)),
    Metric(key="margin/q50", title="Δπ that the loss asks for, median", needs=("beta",), function=_margin_quantile(0.5)),
    Metric(key="margin/q95", title="Δπ that the loss asks for, 95 %", needs=("beta",), function=_margin_quantile(0.95)),
    Metric(key="displacement/chosen", title="chosen, nats vs reference", needs=_REFERENCE,
        numerator=lambda table: table.displacement("chosen"), is_headline=True),
    Metric(key="displacement/rejected", title="rejected, nats vs reference", needs=_REFERENCE,
        numerator=lambda table: table.displacement("rejected"), is_headline=True),
    Metric(key="loss", title="loss", numerator=lambda table: table.loss, is_headline=True, of_fixed_set=True, better=-1),
    Metric(key="displacement/chosen_per_token", title="chosen, nats vs reference, per token", needs=_REFERENCE,
        numerator=lambda table: table.displacement("chosen"), denominator="chosen_lengths"),
    Metric(key="displacement/rejected_per_token", title="rejected, nats vs reference, per token", needs=_REFERENCE,
        numerator=lambda table: table.displacement("rejected"), denominator="rejected_lengths"),
    Metric(key="displacement/chosen_fell", title="share of chosen that π0 likes better", form=".3f", needs=_REFERENCE,
        is_share=True, numerator=lambda table: np.where(table.displacement("chosen") < 0, 1.0, 0.0)),
    Metric(key="regimes/satisfied_early", title="pairs satisfied early (z ≥ 0, Δπ < 0)", needs=_REFERENCE,
        function=lambda table: int(((table.score >= 0) & (table.delta() < 0)).sum()), form=".0f"),
    Metric(key="regimes/effective_pairs", title="effective pairs (Σ|w|)²/Σw²", needs=_REFERENCE,
        function=lambda table: effective_pairs(table.weight), form=".0f"),
    Metric(key="length/shift_slope", title="Δπ − Δ0 by token of length difference, nats", needs=_REFERENCE,
        function=lambda table: length_slope(table.shift(), table.length_difference), of_fixed_set=True),
    Metric(key="length/shift_correlation", title="correlation of Δπ − Δ0 with the length difference", needs=_REFERENCE,
        function=lambda table: correlation(table.shift(), table.length_difference), of_fixed_set=True),
    Metric(key="length/reference_correlation", title="correlation of Δ0 with the length difference", needs=_REFERENCE,
        function=lambda table: correlation(table.delta("reference"), table.length_difference), of_fixed_set=True),
)

_OF_ANSWERS: tuple[Metric[AnswerTable], ...] = (
    Metric(key="kl", title="KL(π‖π0), nats per answer", kind="answers", needs=("kl",), numerator=lambda table: table.kl,
        reference=0.0),
    Metric(key="kl_per_token", title="KL(π‖π0), nats per token", kind="answers", needs=("kl", "tokens"),
        numerator=lambda table: table.kl, denominator="tokens"),
    Metric(key="kl_k1", title="KL(π‖π0) by plain log-ratios, nats per answer", kind="answers",
        needs=("log_policy", "log_reference"), numerator=lambda table: table.log_policy - table.log_reference),
    Metric(key="win_rate", title="win rate against π0 (ties ½)",
        explanation="answers that score higher than the reference's own to the same prompt", kind="answers",
        needs=("score", "reference_score"), numerator=lambda table: right(table.score_difference), reference=0.5,
        is_share=True, form=".3f", direction=1),
    Metric(key="entropy_per_token", title="entropy of π, nats per token",
        explanation="entropy of the policy along its answers, nats per token", kind="answers", needs=("entropy", "tokens"),
        numerator=lambda table: table.entropy, denominator="tokens", direction=0),
    Metric(key="tokens", title="tokens of an answer", explanation="length of answers, tokens", kind="answers",
        needs=("tokens",), numerator=lambda table: table.tokens, direction=0, form=".2f"),
)
# fmt: on

_ALL: tuple[Metric[Any], ...] = (*_OF_PAIRS, *_OF_ANSWERS)
METRICS = {metric.key: metric for metric in _ALL}
"""By key, in the order in which they are shown. `kl` is Rao-Blackwellised, averaged over the answers to a prompt, then over
prompts."""
COMPARED = {key: metric for key, metric in METRICS.items() if metric.direction is not None}
"""Those that runs can be compared on."""
WORTH = "pairs_worth/"
"""Before the key of a share: how many independent pairs would tell it as well as the pairs that share prompts do."""
SELECTING = {one.key: way for one in _OF_PAIRS if one.numerator is not None and (way := one.better or one.direction)}
"""Which way is better, by the key of each metric that the best evaluation of a run can be picked by (`recipe.schema`)."""


def pair_metrics(table: PairTable, *, is_fixed_set: bool = False) -> dict[str, float]:
    """Return the metrics of pairs by key, under TRL's names where the quantity is TRL's.

    `rewards/accuracies` is the share of pairs whose chosen reward is larger (what DPO papers plot, trivially above ½ in
    training); rewards are per token where the loss is (`reduce: mean`). `accuracy/policy` is the share that the policy itself
    ranks right; `accuracy/implicit` that with z + m > 0, which differs from `rewards/accuracies` under a floor, or a
    `rejected_weight` λ, which only the score has;
    `accuracy/shift` that with Δπ > Δ0, whatever γ (½ at step 0). Ties count ½ in all of them. Quadrants, displacement and
    reference accuracy are there when the reference was run, `margin/…` and `weight/saturated…` when the loss is known. What is
    not defined is left out and never NaN: an empty quadrant's mean, or a mean over a pair that has no number.

    Args:
        table: of pairs as scored now.
        is_fixed_set: whether these are pairs that are measured again and again. Then there are too the mean loss, transitions
            since step 0 (McNemar), quadrants between answers as if of equal length (`regimes_length_matched`), and how the
            shift Δπ − Δ0 moves with the length difference. Where step 0 is not known, the policy started at the reference.
            Where pairs share prompts, `pairs_worth/…` says of each share how many independent pairs would tell it as well.
    """
    if is_fixed_set and table.has_reference and not table.knows("initial_chosen"):
        table = table.since(None)
    found: dict[str, float] = {"pairs": len(table)}
    for metric in _OF_PAIRS:
        if table.knows(*metric.needs) and (is_fixed_set or not metric.of_fixed_set):
            found[metric.key] = metric(table)
    if is_fixed_set and len(set(table.prompt_key)) < len(table):
        for metric in _OF_PAIRS:
            if metric.key in found and metric.numerator is not None and metric.is_share:
                found[f"{WORTH}{metric.key}"] = pairs_worth(metric.numerator(table), table.prompt_key)
    if table.has_reference and is_fixed_set:
        for way in WAYS:
            before, now = (preference(table, model, way) for model in ("initial", "policy"))
            changes = transitions(before, now, table.prompt_key)
            found |= quadrant_metrics(table, way) | {f"{way}/transitions/{name}": value for name, value in changes.items()}
    elif table.has_reference:
        # Of few pairs, means by token say little: what counts is where the pairs and the weight are.
        counts, kept = quadrant_metrics(table, "regimes_per_token"), ("/pairs", "/weight_share", "/ties", "/satisfied_early")
        found |= quadrant_metrics(table, "regimes") | {key: value for key, value in counts.items() if key.endswith(kept)}
    return {key: value for key, value in found.items() if not math.isnan(value)}


def share_interval(metrics: Mapping[str, float], key: str) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share among metrics of pairs, of which some may share prompts.

    Args:
        metrics: as `pair_metrics` returns them of a fixed set.
        key: of the share.
    """
    return wilson_interval(metrics[key], metrics.get(f"{WORTH}{key}", metrics["pairs"]))


def share_intervals(metrics: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return 95 % Wilson intervals of the metrics that are shares of pairs; see `share_interval`."""
    return {one.key: share_interval(metrics, one.key) for one in _OF_PAIRS if one.is_share and one.key in metrics}


def headline_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[list[str]]:
    """Return title, value before and value after of the headline metrics that were measured twice, shares with intervals."""
    rows = []
    for metric in _OF_PAIRS:
        if metric.is_headline and metric.key in before and metric.key in after:
            cells = [format(metrics[metric.key], metric.form) for metrics in (before, after)]
            if metric.is_share:
                ends = (share_interval({"pairs": after["pairs"], **metrics}, metric.key) for metrics in (before, after))
                cells = [f"{cell} [{low:.3f}, {high:.3f}]" for cell, (low, high) in zip(cells, ends, strict=True)]
            rows.append([metric.title, *cells])
    return rows


def answer_metrics(table: AnswerTable) -> dict[str, dict[str, float | None]]:
    """Return mean and standard error, clustered by prompt, of every metric of answers that were not scored."""
    found = {}
    for metric in _OF_ANSWERS:
        if not metric.is_share and metric.numerator is not None:
            denominators = getattr(table, metric.denominator) if metric.denominator else np.ones(len(table))
            found[metric.key] = clustered_ratio(metric.numerator(table), denominators, table.prompt_key)
    return found

"""What runs can be compared on: each metric a sum over rows divided by another, so that resampling prompts resamples it.

Which metrics are fair between arms is no matter of taste. An implicit reward β·log π − γ·log π0 contains the arm's own β and γ:
`rewards/…` of arms with another κ = γ/β are different quantities under one name. `accuracy/shift`, the share of pairs whose Δπ
moved above Δ0, has neither in it; it is what γ = β trains towards. `accuracy/policy`, the share that the policy ranks right, is
what γ = 0 trains towards, and by summed log-probs the lengths of the answers decide most of it. `win_rate` knows nothing of
the loss at all, where a scorer was at hand.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pe_dpo.errors import UsageError
from pe_dpo.runs.files import Rows
from pe_dpo.runs.observations import Observation

Floats = NDArray[np.float64]
Columns = Mapping[str, Floats]
Sums = tuple[Floats, Floats]
"""Numerators and denominators, summed over the rows of each prompt."""


class Metric(NamedTuple):
    """A quantity Σ numerator / Σ denominator over held-out pairs or sampled answers."""

    title: str
    kind: Literal["pairs", "answers"]
    """What its rows are."""
    needs: tuple[str, ...]
    """Columns without which there is none."""
    numerator: Callable[[Columns], Floats]
    denominator: str | None = None
    """A column; ones if left out."""
    reference: Callable[[Columns], Floats] | float | None = None
    """Numerator of π0 itself, or its value. None where it has none, or where a run does not come near it as √KL falls to 0."""
    is_share: bool = False
    """Whether a row is 0, ½ or 1, so that differences are said in points."""
    direction: Literal[-1, 0, 1] = 1
    """1 where more is better, −1 where less is, 0 where neither."""
    caution: str = ""
    """Why arms should not be compared on it."""


def right(preference: Floats) -> Floats:
    """Return 1 for each Δ > 0, ½ for a tie, 0 otherwise."""
    return (np.sign(preference) + 1) / 2


def _preference(model: str) -> Callable[[Columns], Floats]:
    return lambda columns: columns[f"{model}_chosen"] - columns[f"{model}_rejected"]


def _per_token(model: str) -> Callable[[Columns], Floats]:
    def preference(columns: Columns) -> Floats:
        chosen = columns[f"{model}_chosen"] / columns["chosen_lengths"]
        return chosen - columns[f"{model}_rejected"] / columns["rejected_lengths"]

    return preference


_POLICY = ("policy_chosen", "policy_rejected")
_REFERENCE = ("reference_chosen", "reference_rejected")
_LENGTHS = ("chosen_lengths", "rejected_lengths")
_REWARDS = ("chosen_reward", "rejected_reward")
_OWN_COEFFICIENTS = "contains the β and γ that each arm was trained with"

METRICS: dict[str, Metric] = {
    "accuracy/shift": Metric(
        "pairs whose preference training moved towards chosen (Δπ > Δ0)",
        "pairs",
        (*_POLICY, *_REFERENCE),
        lambda columns: right(_preference("policy")(columns) - _preference("reference")(columns)),
        is_share=True,
    ),
    "accuracy/shift_per_token": Metric(
        "pairs whose preference per token training moved towards chosen",
        "pairs",
        (*_POLICY, *_REFERENCE, *_LENGTHS),
        lambda columns: right(_per_token("policy")(columns) - _per_token("reference")(columns)),
        is_share=True,
    ),
    "accuracy/policy": Metric(
        "pairs that the policy ranks right (Δπ > 0)",
        "pairs",
        _POLICY,
        lambda columns: right(_preference("policy")(columns)),
        reference=lambda columns: right(_preference("reference")(columns)),
        is_share=True,
    ),
    "accuracy/policy_per_token": Metric(
        "pairs that the policy ranks right by log-probs per token",
        "pairs",
        (*_POLICY, *_LENGTHS),
        lambda columns: right(_per_token("policy")(columns)),
        reference=lambda columns: right(_per_token("reference")(columns)),
        is_share=True,
    ),
    "rewards/accuracies": Metric(
        "pairs whose chosen reward is the larger one",
        "pairs",
        _REWARDS,
        lambda columns: right(columns["chosen_reward"] - columns["rejected_reward"]),
        is_share=True,
        caution=_OWN_COEFFICIENTS,
    ),
    "rewards/margins": Metric(
        "reward of chosen minus reward of rejected",
        "pairs",
        _REWARDS,
        lambda columns: columns["chosen_reward"] - columns["rejected_reward"],
        caution=_OWN_COEFFICIENTS,
    ),
    "nll/chosen_per_token": Metric(
        "negative log-likelihood of chosen answers, nats per token",
        "pairs",
        ("policy_chosen", "chosen_lengths"),
        lambda columns: -columns["policy_chosen"],
        "chosen_lengths",
        reference=lambda columns: -columns["reference_chosen"],
        direction=-1,
    ),
    "win_rate": Metric(
        "answers that score higher than the reference's own to the same prompt",
        "answers",
        ("score", "reference_score"),
        lambda columns: right(columns["score"] - columns["reference_score"]),
        reference=0.5,
        is_share=True,
    ),
    "entropy_per_token": Metric(
        "entropy of the policy along its answers, nats per token",
        "answers",
        ("entropy", "tokens"),
        lambda columns: columns["entropy"],
        "tokens",
        direction=0,
    ),
    "tokens": Metric("length of answers, tokens", "answers", ("tokens",), lambda columns: columns["tokens"], direction=0),
}
"""By the name under which a run logs it, where it does."""

KL = Metric("KL(π‖π0), nats per answer", "answers", ("kl",), lambda columns: columns["kl"], reference=0.0, direction=-1)
"""Rao-Blackwellised, averaged over the answers to a prompt, then over prompts."""


def choose_metric(name: str | None, observations: Sequence[Observation]) -> str:
    """Return the name of the metric to compare on: what was asked for, else `win_rate` where scored, else `accuracy/shift`.

    Raises:
        UsageError: there is no such metric.
    """
    if name is None:
        ours = [one for one in observations if one.source == "pe-dpo"]
        is_scored = bool(ours) and all(missing_words(METRICS["win_rate"], one) is None for one in ours)
        return "win_rate" if is_scored else "accuracy/shift" if ours else "rewards/accuracies"
    if name not in METRICS:
        raise UsageError(f"--metric {name}: is not one of {', '.join(METRICS)}")
    return name


def missing_words(metric: Metric, observation: Observation) -> str | None:
    """Return why an observation has no such metric, with what to do about it, or None if it has."""
    rows = observation.rows(metric.kind)
    if rows is None and metric.kind == "pairs":
        return f"{observation.run} has no held-out pairs one by one; measure it with pe-dpo eval"
    if rows is None:
        return f"{observation.run} has no sampled answers; ask for them with generation.prompts, or with pe-dpo eval"
    gone = [name for name in metric.needs if name not in rows.columns or np.isnan(rows.columns[name]).all()]
    if not gone:
        return None
    remedy = "give pe-dpo eval a scorer" if "score" in gone else "measure it again with pe-dpo eval"
    return f"{observation.run} has no {', '.join(gone)} of its {metric.kind}; {remedy}"


def mean_of(metric: Metric, observation: Observation) -> float:
    """Return the metric of one observation on all its rows; NaN where it has none."""
    rows = observation.rows(metric.kind)
    if rows is None or missing_words(metric, observation):
        return float("nan")
    numerators, denominators = prompt_sums(metric, rows, {key: at for at, key in enumerate(dict.fromkeys(rows.prompts))})
    return float(numerators.sum() / denominators.sum())


def prompt_sums(metric: Metric, rows: Rows, prompts: Mapping[str, int], *, size: int | None = None) -> Sums:
    """Return numerators and denominators of a metric summed over the rows of each prompt, (size,) each.

    The answers to a prompt count together as much as those to another, however many there are.

    Args:
        metric: what to sum.
        rows: pairs or answers; those of prompts that are not in `prompts` are left out.
        prompts: position of each prompt by its key.
        size: one more than the largest position; by default the number of prompts.
    """
    return _sums(metric, rows, metric.numerator(rows.columns), prompts, size or len(prompts))


def reference_sums(metric: Metric, rows: Rows, prompts: Mapping[str, int]) -> Sums | None:
    """Return the same of the reference itself, or None where the metric has no value there."""
    if isinstance(metric.reference, float):
        return np.full(len(prompts), metric.reference), np.ones(len(prompts))
    if metric.reference is None or not set(_REFERENCE) <= set(rows.columns):
        return None
    values = metric.reference(rows.columns)
    return None if np.isnan(values).any() else _sums(metric, rows, values, prompts, len(prompts))


def _sums(metric: Metric, rows: Rows, numerator: Floats, prompts: Mapping[str, int], size: int) -> Sums:
    denominator = rows.columns[metric.denominator] if metric.denominator else np.ones(len(numerator))
    at = np.array([prompts.get(key, -1) for key in rows.prompts])
    there = at >= 0
    at, numerator, denominator = at[there], numerator[there], denominator[there]
    if metric.kind == "answers":
        share = 1 / np.bincount(at, minlength=size)[at]
        numerator, denominator = numerator * share, denominator * share
    totals = [np.bincount(at, part, size).astype(np.float64) for part in (numerator, denominator)]
    return totals[0], totals[1]

"""What a model makes of a set of pairs: log-probs, scores and weights per pair, and the metrics over them.

Every metric is a mean over pairs, never a mean of batch means, so that it does not depend on the batch size.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.inference.logprobs import concatenate
from pe_dpo.inference.scorer import Scorer
from pe_dpo.metrics.regimes import RegimeTable, correlation, length_slope, regime_table, saturation, share_right, transitions
from pe_dpo.objective import Loss, PairLogprobs, PreferenceLoss
from pe_dpo.progress import advance

MARGIN_QUANTILES = (0.05, 0.5, 0.95)


class ScoredPairs(NamedTuple):
    """Pairs with all that was computed of them; every field (B,) float64 on the CPU, log-probs in nats."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    """NaN where the reference was not run (γ = 0 in training)."""
    reference_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    loss: Tensor
    score: Tensor
    weight: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor

    @property
    def has_reference(self) -> bool:
        """Whether the reference was run on these pairs."""
        return not bool(self.reference_chosen.isnan().all())

    @property
    def policy_preference(self) -> Tensor:
        """Δπ, summed over tokens."""
        return self.policy_chosen - self.policy_rejected

    @property
    def reference_preference(self) -> Tensor:
        """Δ0, summed over tokens."""
        return self.reference_chosen - self.reference_rejected

    @property
    def policy_preference_per_token(self) -> Tensor:
        """Δπ of the mean log-probs."""
        return self.policy_chosen / self.chosen_lengths - self.policy_rejected / self.rejected_lengths

    @property
    def reference_preference_per_token(self) -> Tensor:
        """Δ0 of the mean log-probs."""
        return self.reference_chosen / self.chosen_lengths - self.reference_rejected / self.rejected_lengths


def score_pairs(
    model: Any,
    pairs: Sequence[EncodedPair],
    scorer: Scorer,
    *,
    token_budget: int,
) -> PairLogprobs:
    """Return the log-probs of all pairs in their order, on the CPU, without gradients.

    Args:
        model: a causal LM in the state to be measured (adapters on or off).
        pairs: any number of pairs, in any order.
        scorer: the way through the model.
        token_budget: most tokens of one forward.
    """
    batches = scorer.split(pairs, token_budget)
    parts, done = [], 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                scored = scorer.logprobs(model, [pairs[index] for index in batch])
                parts.append(PairLogprobs(*(field.cpu() for field in scored)))
                done += len(batch)
                advance(done, len(pairs))
    finally:
        model.train(was_training)
    back = torch.tensor([index for batch in batches for index in batch]).argsort()
    return PairLogprobs(*(field[back] for field in concatenate(parts)))


def scored_pairs(policy: PairLogprobs, reference: PairLogprobs | None, loss: PreferenceLoss) -> ScoredPairs:
    """Return the pairs with all that was computed of them, detached and on the CPU."""
    unknown = torch.full_like(policy.chosen, float("nan"))
    fields = (
        policy.chosen,
        policy.rejected,
        unknown if reference is None else reference.chosen,
        unknown if reference is None else reference.rejected,
        policy.chosen_lengths,
        policy.rejected_lengths,
        loss.loss,
        loss.score,
        loss.weight,
        loss.chosen_reward,
        loss.rejected_reward,
    )
    return ScoredPairs(*(field.detach().double().cpu() for field in fields))


def join(parts: Sequence[ScoredPairs]) -> ScoredPairs:
    """Return several sets of pairs as one."""
    return ScoredPairs(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def pair_metrics(pairs: ScoredPairs, loss: Loss | None = None, *, initial: ScoredPairs | None = None) -> dict[str, float]:
    """Return the metrics of a set of pairs, under TRL's names where the quantity is TRL's.

    `rewards/accuracies` is the share of pairs whose chosen reward is larger (what DPO papers plot, trivially above ½ in
    training); rewards are per token where the loss is (`reduce: mean`). `accuracy/policy` is the share that the policy itself
    ranks right; `accuracy/implicit` that with z + m > 0, which differs from `rewards/accuracies` under a floor alone;
    `accuracy/shift` that with Δπ > Δ0, whatever γ (½ at step 0). Ties count ½ in all of them. Regimes, displacement and
    reference accuracy are there when the reference was run. What is not defined, such as an empty quadrant's mean, is left out.

    Args:
        pairs: as scored now.
        loss: with which they were scored; without it there are no `margin/…` and no `weight/saturated`.
        initial: the same pairs as scored at step 0; None where that is not known.
    """
    reward_margin = pairs.chosen_reward - pairs.rejected_reward
    metrics: dict[str, float] = {
        "pairs": len(pairs.loss),
        "rewards/chosen": _mean(pairs.chosen_reward),
        "rewards/rejected": _mean(pairs.rejected_reward),
        "rewards/margins": _mean(reward_margin),
        "rewards/accuracies": share_right(reward_margin),
        "logps/chosen": _mean(pairs.policy_chosen),
        "logps/rejected": _mean(pairs.policy_rejected),
        "accuracy/policy": share_right(pairs.policy_preference),
        "accuracy/policy_per_token": share_right(pairs.policy_preference_per_token),
        "accuracy/implicit": share_right(_score_before_margin(pairs, loss)),
        "nll/chosen_per_token": float(-pairs.policy_chosen.sum() / pairs.chosen_lengths.sum()),
        "score/mean": _mean(pairs.score),
        **_weight_metrics(pairs.weight),
        "active": _share(pairs.score < 0),
    }
    if loss is not None:
        metrics |= _link_metrics(pairs, loss)
    if not pairs.has_reference:
        return metrics
    metrics |= {
        "accuracy/reference": share_right(pairs.reference_preference),
        "accuracy/reference_per_token": share_right(pairs.reference_preference_per_token),
        "accuracy/shift": share_right(pairs.policy_preference - pairs.reference_preference),
        "accuracy/shift_per_token": share_right(pairs.policy_preference_per_token - pairs.reference_preference_per_token),
        **_displacement(pairs),
    }
    by_sum, per_token = regimes(pairs, initial)
    metrics |= {
        **_table_metrics("regimes", by_sum),
        **_table_metrics("regimes_per_token", per_token, is_whole=False),
        "regimes/effective_pairs": by_sum.effective_pairs,
    }
    return metrics


def set_metrics(pairs: ScoredPairs, loss: Loss | None = None, *, initial: ScoredPairs | None = None) -> dict[str, float]:
    """Return the mean loss and the metrics of a fixed set of pairs, with what only such a set can tell.

    That is: transitions since step 0 (McNemar), regimes between answers as if of equal length (`regimes_length_matched`), and
    how the shift Δπ − Δ0 moves with the length difference, in nats per token and as a correlation.

    Args:
        pairs: all of the set, as scored now.
        loss: see `pair_metrics`.
        initial: the same pairs as scored at step 0; None: the policy started at the reference.
    """
    if not pairs.has_reference:
        return {"loss": _mean(pairs.loss), **pair_metrics(pairs, loss)}
    before = at_reference(pairs) if initial is None else initial
    return {
        "loss": _mean(pairs.loss),
        **pair_metrics(pairs, loss, initial=before),
        **_table_metrics("regimes_per_token", regimes(pairs, before)[1]),
        **_transition_metrics("regimes", before.policy_preference, pairs.policy_preference),
        **_transition_metrics("regimes_per_token", before.policy_preference_per_token, pairs.policy_preference_per_token),
        **_length_metrics(pairs, before),
    }


def at_reference(pairs: ScoredPairs) -> ScoredPairs:
    """Return the pairs with the log-probs of the reference in place of the policy's; loss, score, weight and rewards stay."""
    return pairs._replace(policy_chosen=pairs.reference_chosen, policy_rejected=pairs.reference_rejected)


def regimes(pairs: ScoredPairs, initial: ScoredPairs | None = None) -> tuple[RegimeTable, RegimeTable]:
    """Return the 2×2 tables by summed and by per-token log-probs: by sums, quadrants mostly measure length.

    Args:
        pairs: as scored now.
        initial: the same pairs as scored at step 0; None where that is not known, and then no mean change of Δπ is given.
    """
    own = pairs.score, pairs.weight
    policy, per_token = pairs.policy_preference, pairs.policy_preference_per_token
    change = None if initial is None else policy - initial.policy_preference
    change_per_token = None if initial is None else per_token - initial.policy_preference_per_token
    return (
        regime_table(policy, pairs.reference_preference, *own, change),
        regime_table(per_token, pairs.reference_preference_per_token, *own, change_per_token),
    )


def wilson_interval(share: float, pairs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share of `pairs` independent pairs.

    Args:
        share: in [0, 1]; ties counted ½ are fine.
        pairs: how many; 0 gives (0, 1).
        confidence: of the interval, two-sided.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if pairs == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * pairs)) / (1 + z * z / pairs)
    half = z / (1 + z * z / pairs) * (share * (1 - share) / pairs + z * z / (4 * pairs * pairs)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _share(holds: Tensor) -> float:
    return float(holds.double().mean())


def _score_before_margin(pairs: ScoredPairs, loss: Loss | None) -> Tensor:
    """β·Δπ − γ·max(Δ0, floor), which is z + m."""
    if loss is None or loss.reference_floor is None:
        return pairs.chosen_reward - pairs.rejected_reward
    is_mean = loss.reduce == "mean"
    policy = pairs.policy_preference_per_token if is_mean else pairs.policy_preference
    reference = pairs.reference_preference_per_token if is_mean else pairs.reference_preference
    return loss.beta * policy - loss.gamma * reference.clamp(min=loss.reference_floor)


def _weight_metrics(weight: Tensor) -> dict[str, float]:
    """How hard the pairs pull, and how evenly: (Σ|w|)²/(B·Σw²)."""
    pull = weight.abs()
    mean, mean_square = _mean(pull), _mean(pull.square())
    return {"weight/mean": mean, "weight/effective_share": mean**2 / mean_square if mean_square else 0.0}


def _link_metrics(pairs: ScoredPairs, loss: Loss) -> dict[str, float]:
    """Quantiles of the effective margin M = (γ·max(Δ0, floor) + m)/β, which Δπ has to reach (z >= 0 ⇔ Δπ >= M); saturation."""
    policy = pairs.policy_preference_per_token if loss.reduce == "mean" else pairs.policy_preference
    margin = policy - pairs.score / loss.beta
    quantiles = torch.quantile(margin, torch.tensor(MARGIN_QUANTILES, dtype=margin.dtype)).tolist()
    metrics = {f"margin/q{100 * q:02.0f}": value for q, value in zip(MARGIN_QUANTILES, quantiles, strict=True)}
    saturated = saturation(pairs.score, loss.link)
    if saturated is None:
        return metrics
    return metrics | {"weight/saturated": sum(saturated), "weight/saturated_low": saturated.low}


def _displacement(pairs: ScoredPairs) -> dict[str, float]:
    """How far both answers moved from the reference: nats per answer and per token, and the share of chosen ones that fell."""
    chosen, rejected = pairs.policy_chosen - pairs.reference_chosen, pairs.policy_rejected - pairs.reference_rejected
    return {
        "displacement/chosen": _mean(chosen),
        "displacement/rejected": _mean(rejected),
        "displacement/chosen_per_token": float(chosen.sum() / pairs.chosen_lengths.sum()),
        "displacement/rejected_per_token": float(rejected.sum() / pairs.rejected_lengths.sum()),
        "displacement/chosen_fell": _share(chosen < 0),
    }


def _table_metrics(prefix: str, table: RegimeTable, *, is_whole: bool = True) -> dict[str, float]:
    """The cells of a 2×2 table; counts and shares of weight alone, unless `is_whole`."""
    metrics: dict[str, float] = {f"{prefix}/ties": table.ties, f"{prefix}/satisfied_early": table.satisfied_early}
    for name, cell in table.quadrants.items():
        metrics |= {f"{prefix}/{name}/pairs": cell.pairs, f"{prefix}/{name}/weight_share": cell.weight_share}
        if is_whole and cell.pairs:
            metrics[f"{prefix}/{name}/active"] = cell.active / cell.pairs
            metrics[f"{prefix}/{name}/mean_score"] = cell.mean_score
        if is_whole and not math.isnan(cell.mean_change):
            metrics[f"{prefix}/{name}/mean_change"] = cell.mean_change
    return metrics


def _transition_metrics(prefix: str, before: Tensor, now: Tensor) -> dict[str, float]:
    return {f"{prefix}/transitions/{key}": value for key, value in transitions(before, now)._asdict().items()}


def _length_metrics(pairs: ScoredPairs, initial: ScoredPairs) -> dict[str, float]:
    """Regimes and accuracy with the reference's slope on length taken off both preferences, and the length in the shift.

    The slope is that of Δ0, which no training moves, so that policy and reference agree at step 0 here too.

    Args:
        pairs: all of a fixed set.
        initial: the same as scored at step 0.
    """
    difference = pairs.chosen_lengths - pairs.rejected_lengths
    tilt = length_slope(pairs.reference_preference, difference) * difference
    policy, reference = pairs.policy_preference - tilt, pairs.reference_preference - tilt
    table = regime_table(policy, reference, pairs.score, pairs.weight, pairs.policy_preference - initial.policy_preference)
    shift = pairs.policy_preference - pairs.reference_preference
    metrics = {
        "accuracy/policy_length_matched": share_right(policy),
        "accuracy/reference_length_matched": share_right(reference),
        "length/shift_slope": length_slope(shift, difference),
        "length/shift_correlation": correlation(shift, difference),
        "length/reference_correlation": correlation(pairs.reference_preference, difference),
        **_table_metrics("regimes_length_matched", table),
        **_transition_metrics("regimes_length_matched", initial.policy_preference - tilt, policy),
    }
    return {key: value for key, value in metrics.items() if not math.isnan(value)}

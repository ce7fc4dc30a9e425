"""What a model makes of a set of pairs: log-probs, scores and weights per pair, and the metrics over them.

Every metric is a mean over pairs, never a mean of batch means, so that it does not depend on the batch size.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.evaluation.scorer import Scorer
from pe_dpo.model.scoring import PairLogprobs, concatenate
from pe_dpo.objective import QUADRANTS, PreferenceLoss, RegimeTable, preference_loss, regime_table, share_right


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
    progress: Callable[[int, int], None] | None = None,
) -> PairLogprobs:
    """Return the log-probs of all pairs in their order, on the CPU, without gradients.

    Args:
        model: a causal LM in the state to be measured (adapters on or off).
        pairs: any number of pairs, in any order.
        scorer: the way through the model.
        token_budget: most tokens of one forward.
        progress: called with pairs done and pairs in all.
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
                if progress:
                    progress(done, len(pairs))
    finally:
        model.train(was_training)
    back = torch.tensor([index for batch in batches for index in batch]).argsort()
    return PairLogprobs(*(field[back] for field in concatenate(parts)))


def score_loss(
    policy: PairLogprobs, reference: PairLogprobs | None, margins: Tensor, coefficients: Mapping[str, Any], margin_scale: float
) -> PreferenceLoss:
    """Return the loss of pairs from their log-probs.

    Args:
        policy: with gradients in training.
        reference: may be None if and only if gamma is 0.
        margins: the data's margin column, (B,); zeros without one.
        coefficients: keyword arguments of `preference_loss`, as `Recipe.loss.coefficients()` gives them.
        margin_scale: times `margins`.
    """
    return preference_loss(
        policy.chosen,
        policy.rejected,
        None if reference is None else reference.chosen,
        None if reference is None else reference.rejected,
        chosen_lengths=policy.chosen_lengths,
        rejected_lengths=policy.rejected_lengths,
        pair_margin=margin_scale * margins if margin_scale else None,
        **coefficients,
    )


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


def pair_metrics(pairs: ScoredPairs) -> dict[str, float]:
    """Return the metrics of a set of pairs, under TRL's names where the quantity is TRL's.

    `rewards/accuracies` is the share of pairs whose chosen reward is larger (what DPO papers plot, trivially above ½ in
    training); rewards are per token where the loss is (`reduce: mean`). `accuracy/policy` is the share that the policy itself
    ranks right. Ties count ½ in all of them. Regimes, displacement and reference accuracy are there when the reference was run.
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
        "nll/chosen_per_token": float(-pairs.policy_chosen.sum() / pairs.chosen_lengths.sum()),
        "score/mean": _mean(pairs.score),
        "active": float((pairs.score < 0).double().mean()),
    }
    if not pairs.has_reference:
        return metrics
    metrics |= {
        "accuracy/reference": share_right(pairs.reference_preference),
        "accuracy/reference_per_token": share_right(pairs.reference_preference_per_token),
        "displacement/chosen": _mean(pairs.policy_chosen - pairs.reference_chosen),
        "displacement/rejected": _mean(pairs.policy_rejected - pairs.reference_rejected),
        "displacement/chosen_fell": float((pairs.policy_chosen < pairs.reference_chosen).double().mean()),
    }
    tables = regimes(pairs)
    for prefix, table in zip(("regimes", "regimes_per_token"), tables, strict=True):
        for name in QUADRANTS:
            metrics[f"{prefix}/{name}/pairs"] = table.quadrants[name].pairs
            metrics[f"{prefix}/{name}/weight_share"] = table.quadrants[name].weight_share
        metrics[f"{prefix}/ties"] = table.ties
    metrics["regimes/effective_pairs"] = tables[0].effective_pairs
    metrics["regimes/satisfied_early"] = tables[0].satisfied_early
    return metrics


def set_metrics(pairs: ScoredPairs) -> dict[str, float]:
    """Return the mean loss and the metrics of a set of pairs."""
    return {"loss": float(pairs.loss.mean()), **pair_metrics(pairs)}


def regimes(pairs: ScoredPairs) -> tuple[RegimeTable, RegimeTable]:
    """Return the 2×2 tables by summed and by per-token log-probs: by sums, quadrants mostly measure length."""
    by_sum = regime_table(pairs.policy_preference, pairs.reference_preference, pairs.score, pairs.weight)
    per_token = regime_table(pairs.policy_preference_per_token, pairs.reference_preference_per_token, pairs.score, pairs.weight)
    return by_sum, per_token


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

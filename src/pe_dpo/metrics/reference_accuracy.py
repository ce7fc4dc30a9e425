"""How the reference ranks pairs: right, wrong, tied, and how much of that is length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pe_dpo.inference.logprobs import PairLogprobs
from pe_dpo.metrics.clusters import clustered_mean
from pe_dpo.metrics.regimes import correlation, length_slope, share_right
from pe_dpo.metrics.table import wilson_interval


@dataclass(frozen=True)
class Ranking:
    """How the reference ranks the pairs, by one reduction of its log-probs; lengths in tokens, Δ0 in nats (a token)."""

    right: float
    """Share of pairs with Δ0 > 0."""
    right_interval: tuple[float, float]
    """95 %, Wilson's, for as many independent pairs as the pairs of the prompts are worth."""
    wrong: float
    """Share with Δ0 < 0."""
    ties: int
    """Pairs with Δ0 = 0 exactly."""
    right_at_equal_length: float
    """Share with Δ0 − a·(|chosen| − |rejected|) > 0, a the slope of the least-squares line; ties ½."""
    spread: float
    """sd(Δ0); NaN for one pair."""
    robust_spread: float
    """1.4826 · median |Δ0 − median Δ0|."""
    length_correlation: float
    """Of Δ0 with |chosen| − |rejected|; NaN where one is constant."""


def rank(preference: np.ndarray, length_difference: np.ndarray, prompt_keys: Sequence[str]) -> Ranking:
    """Return how pairs are ranked.

    Args:
        preference: Δ0, (B,) nats or nats a token.
        length_difference: |chosen| − |rejected| in tokens, (B,).
        prompt_keys: (B,); pairs of one prompt are not independent.
    """
    right = preference > 0
    share = float(right.mean())
    return Ranking(
        right=share,
        right_interval=wilson_interval(share, independent_pairs(right, prompt_keys)),
        wrong=float((preference < 0).mean()),
        ties=int((preference == 0).sum()),
        right_at_equal_length=share_right(torch.from_numpy(without_length(preference, length_difference))),
        spread=float(preference.std(ddof=1)) if len(preference) > 1 else math.nan,
        robust_spread=robust_spread(preference),
        length_correlation=correlation(torch.from_numpy(preference), torch.from_numpy(length_difference)),
    )


def preferences(reference: PairLogprobs, reduce: str) -> np.ndarray:
    """Return Δ0 of each pair, (B,) float64: of summed log-probs, or of log-probs per token ("mean")."""
    chosen, rejected = reference.chosen.double().numpy(), reference.rejected.double().numpy()
    if reduce == "sum":
        return chosen - rejected
    return chosen / reference.chosen_lengths.double().numpy() - rejected / reference.rejected_lengths.double().numpy()


def without_length(preference: np.ndarray, length_difference: np.ndarray) -> np.ndarray:
    """Return Δ0 − a·(|chosen| − |rejected|): the preference as it would be between answers of equal length.

    a is the slope of the least-squares line of Δ0 on the length difference (`length_slope`). The line's intercept stays in: it
    is what the reference prefers at equal length.

    Args:
        preference: Δ0, (B,) nats.
        length_difference: in tokens, (B,).
    """
    slope = length_slope(torch.from_numpy(preference), torch.from_numpy(length_difference))
    return preference - slope * length_difference


def robust_spread(values: np.ndarray) -> float:
    """Return 1.4826 · median |x − median x|: the standard deviation of a normal sample, whatever its tails."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def independent_pairs(right: np.ndarray, prompt_keys: Sequence[str]) -> int:
    """Return how many independent pairs would know their share right as well: fewer, where pairs of a prompt are alike.

    The pairs divided by the design effect: the squared error of the share that allows for dependence within prompts, over that
    of independent pairs.

    Args:
        right: bool, (B,).
        prompt_keys: (B,).
    """
    share, error = clustered_mean(right, prompt_keys).values()
    if share is None or not error:
        return len(set(prompt_keys))
    return max(1, min(len(right), round(share * (1 - share) / error**2)))

"""How the reference ranks pairs: right, wrong, tied, and how much of that is length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pe_dpo.metrics.estimates import clustered_mean, correlation, share_right, wilson_interval, without_length
from pe_dpo.metrics.table import Floats


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


def rank(preference: Floats, length_difference: Floats, prompt_keys: Sequence[str]) -> Ranking:
    """Return how pairs are ranked.

    Args:
        preference: Δ0, (N,) nats or nats a token.
        length_difference: |chosen| − |rejected| in tokens, (N,).
        prompt_keys: (N,); pairs of one prompt are not independent.
    """
    right = preference > 0
    share = float(right.mean())
    return Ranking(
        right=share,
        right_interval=wilson_interval(share, independent_pairs(right, prompt_keys)),
        wrong=float((preference < 0).mean()),
        ties=int((preference == 0).sum()),
        right_at_equal_length=share_right(without_length(preference, length_difference)),
        spread=float(preference.std(ddof=1)) if len(preference) > 1 else math.nan,
        robust_spread=robust_spread(preference),
        length_correlation=correlation(preference, length_difference),
    )


def robust_spread(values: Floats) -> float:
    """Return 1.4826 · median |x − median x|: the standard deviation of a normal sample, whatever its tails."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def independent_pairs(right: np.ndarray, prompt_keys: Sequence[str]) -> int:
    """Return how many independent pairs would know their share right as well: fewer, where pairs of a prompt are alike.

    The pairs divided by the design effect: the squared error of the share that allows for dependence within prompts, over that
    of independent pairs.

    Args:
        right: bool, (N,).
        prompt_keys: (N,).
    """
    share, error = clustered_mean(right, prompt_keys).values()
    if share is None or not error:
        return len(set(prompt_keys))
    return max(1, min(len(right), round(share * (1 - share) / error**2)))

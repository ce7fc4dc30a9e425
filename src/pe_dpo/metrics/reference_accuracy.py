"""How the reference ranks pairs: right, wrong, tied, and how much of that is length."""

import math
from collections.abc import Sequence

import numpy as np

from pe_dpo.metrics.estimates import correlation, pairs_worth, share_right, wilson_interval, without_length
from pe_dpo.metrics.table import Floats


class ReferenceAccuracy:
    """How the reference ranks pairs, by one reduction of its log-probs; lengths in tokens, Δ0 in nats (a token).

    Args:
        preference: Δ0, (N,) nats or nats a token.
        length_difference: |chosen| − |rejected| in tokens, (N,).
        prompt_keys: (N,); pairs of one prompt are not independent.
    """

    def __init__(self, preference: Floats, length_difference: Floats, prompt_keys: Sequence[str]) -> None:
        right = preference > 0
        self.right = float(right.mean())
        """Share of pairs with Δ0 > 0."""
        self.right_interval = wilson_interval(self.right, pairs_worth(right, prompt_keys))
        """95 %, Wilson's, for as many independent pairs as the pairs of the prompts are worth."""
        self.wrong = float((preference < 0).mean())
        """Share with Δ0 < 0."""
        self.ties = int((preference == 0).sum())
        """Pairs with Δ0 = 0 exactly."""
        self.right_at_equal_length = share_right(without_length(preference, length_difference))
        """Share with Δ0 − a·(|chosen| − |rejected|) > 0, a the slope of the least-squares line; ties ½."""
        self.spread = float(preference.std(ddof=1)) if len(preference) > 1 else math.nan
        """sd(Δ0); NaN for one pair."""
        self.robust_spread = robust_spread(preference)
        """1.4826 · median |Δ0 − median Δ0|."""
        self.length_correlation = correlation(preference, length_difference)
        """Of Δ0 with |chosen| − |rejected|; NaN where one is constant."""


def robust_spread(values: Floats) -> float:
    """Return 1.4826 · median |x − median x|: the standard deviation of a normal sample, whatever its tails."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))

"""What the reference's preferences say about the labels: a Platt scale, its errors, and what it tells in bits.

    τ̂ = argmax_τ Σ log σ(τ·Δ0)      a logistic regression without intercept: at τ̂, Δ0 is right as often as σ(τ̂·Δ0) claims

When π0 becomes π0^α, τ̂ becomes τ̂/α, and nothing else here changes.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import chdtrc, expit

from pe_dpo.metrics.bootstrap import cluster_weights
from pe_dpo.metrics.estimates import right as ranked_right
from pe_dpo.metrics.estimates import without_length

REPLICATES = 1000
"""Of the bootstrap over prompts: percentiles of a 95 % interval then move by 2 % of its width from seed to seed."""
FOLDS = 10
"""Of the cross-fitted likelihood; fewer where there are fewer prompts."""
_CELLS = 2_000_000
"""Numbers per block of replicates × pairs: 16 MB."""


class LabelFit:
    """What the reference's preferences say about the labels: a logistic regression without intercept, and its errors.

    Args:
        preference: Δ0 of each pair, (B,) nats.
        prompt_keys: (B,); pairs of one prompt are resampled together.
        length_difference: |chosen| − |rejected| in tokens, (B,).

    Source:
        Platt 1999 for the scale; Efron & Tibshirani 1993, ch. 13, for percentile intervals.
    """

    def __init__(
        self, preference: np.ndarray, *, prompt_keys: Sequence[str], length_difference: np.ndarray | None = None
    ) -> None:
        right = ranked_right(preference)
        self.scale, self.standard_error = _fit(preference)
        """τ̂ per nat (or per nat a token), infinite where the reference ranks every pair right (−) wrong; and its error from the
        Fisher information, for independent pairs."""
        self.interval = math.nan, math.nan
        """95 % of τ̂, percentiles of a bootstrap over prompts; NaN where there is only one prompt."""
        # Up to rounding it is not below 0.
        self.likelihood_ratio = max(0.0, 2 * (len(right) * math.log(2) - float(_nll(self.scale, preference).sum())))
        """2·(log-likelihood at τ̂ − at 0): χ² with one degree of freedom if the reference says nothing and pairs are
        independent."""
        self.p_value = float(chdtrc(1, self.likelihood_ratio))
        self.bits_per_pair = math.nan
        """1 − NLL/log 2, each pair with the τ̂ of the other folds of prompts: what the reference tells of a label, or below 0;
        NaN where there is only one prompt."""
        self.accuracy = float(right.mean())
        """Share of pairs that the reference ranks right, ties ½."""
        self.accuracy_interval = math.nan, math.nan
        """95 %, from the same bootstrap."""
        self.scale_without_length: float | None = None
        """τ̂ of Δ0 as it would be between answers of equal length; see `without_length`."""
        self.standard_error_without_length: float | None = None
        if length_difference is not None:
            alone = without_length(preference, length_difference)
            self.scale_without_length, self.standard_error_without_length = _fit(alone)

        _, owner = np.unique(np.asarray(prompt_keys), return_inverse=True)
        prompts = int(owner.max(initial=0)) + 1
        if prompts == 1:
            return
        folds = min(FOLDS, prompts)
        fold = (np.random.default_rng(0).permutation(prompts) % folds)[owner]
        scales = _platt_scales(preference, (fold != np.arange(folds)[:, None]).astype(float))
        self.bits_per_pair = 1 - float(_nll(scales[fold], preference).mean()) / math.log(2)
        self.interval, self.accuracy_interval = _intervals(preference, right, owner, self.scale)


def _fit(preference: np.ndarray) -> tuple[float, float]:
    """τ̂ and its standard error from the Fisher information."""
    scale = float(_platt_scales(preference, np.ones((1, len(preference))))[0])
    claims = expit(scale * preference) if math.isfinite(scale) else np.zeros(len(preference))
    information = float(np.sum(preference**2 * claims * (1 - claims)))
    return scale, information**-0.5 if information > 0 else math.inf


def _nll(scale: float | np.ndarray, preference: np.ndarray) -> np.ndarray:
    """−log σ(τ·Δ0) of each pair; a tie costs log 2 at any τ."""
    with np.errstate(invalid="ignore"):
        return np.logaddexp(0.0, -np.where(preference == 0, 0.0, scale * preference))


def _intervals(preference: np.ndarray, right: np.ndarray, owner: np.ndarray, scale: float) -> list[tuple[float, float]]:
    """Percentiles 2.5 and 97.5 of τ̂ and of the accuracy over resampled prompts; `owner` is the number of each pair's prompt."""
    generator = np.random.default_rng(0)
    prompts = int(owner.max()) + 1
    rows = max(1, min(REPLICATES, _CELLS // len(owner)))
    parts = []
    for start in range(0, REPLICATES, rows):
        count = min(rows, REPLICATES - start)
        weights = cluster_weights(generator, count, prompts)[:, owner]  # how often the prompt of each pair was drawn
        parts.append((_platt_scales(preference, weights, start=scale), (weights @ right) / weights.sum(axis=1)))
    # Order statistics: between two infinite ones there is nothing to interpolate.
    return [
        (float(np.quantile(values, 0.025, method="lower")), float(np.quantile(values, 0.975, method="higher")))
        for values in map(np.concatenate, zip(*parts, strict=True))
    ]


def _platt_scales(preference: np.ndarray, weights: np.ndarray, start: float = 0.0) -> np.ndarray:
    """Return argmax_τ Σ w·log σ(τ·Δ0) for every row of weights, by Newton's method on all rows at once.

    Where its steps run away, a bracket holds the root: the slope falls.

    Args:
        preference: (B,).
        weights: (R, B), >= 0.
        start: where to begin.

    Returns:
        (R,); ±inf where all pairs of a row are ranked alike, NaN where all are ties.
    """
    unit = math.sqrt(float(np.mean(preference**2))) or 1.0
    values = preference / unit
    scales = np.full(len(weights), start * unit if math.isfinite(start) else 0.0)
    step = np.full(len(weights), math.inf)
    with np.errstate(all="ignore"):
        for _ in range(30):
            miss = expit(-scales[:, None] * values)
            step = ((weights * miss) @ values) / ((weights * miss * (1 - miss)) @ values**2)
            scales = scales + step
            if np.all(np.abs(step) <= 1e-6 * (1 + np.abs(scales))):  # what is left is of the order of its square
                break

    def slope(scale: float, row: int) -> float:
        return float((weights[row] * expit(-scale * values)) @ values)

    some_right, some_wrong = weights @ (values > 0) > 0, weights @ (values < 0) > 0
    for row in np.flatnonzero(some_right & some_wrong & ~(np.abs(step) <= 1e-6 * (1 + np.abs(scales)))).tolist():
        from scipy.optimize import brentq  # dear to import, and rarely needed

        reach = 1.0
        while slope(reach, row) > 0 or slope(-reach, row) < 0:
            reach *= 2
        scales[row] = brentq(slope, -reach, reach, args=(row,), xtol=1e-14)
    scales[some_right & ~some_wrong], scales[some_wrong & ~some_right] = math.inf, -math.inf
    scales[~some_right & ~some_wrong] = math.nan
    return scales / unit

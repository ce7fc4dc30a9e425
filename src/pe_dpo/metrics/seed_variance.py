"""Variance between seeds, pooled over arms: few seeds tell it badly for one arm, and well for many that scatter alike.

    s̃_a² = (d0·s0² + d·s_a²)/(d0 + d)        s_a²: variance of D_s over the S seeds of arm a, d = S − 1
    1/σ_a² ~ χ²(d0)/(d0·s0²)                  the assumption: arms differ as a scaled inverse χ² does; d0 = ∞ if all are alike

The moderated t of s̃_a² has d0 + d degrees of freedom, but no more than the arms together know. They do not scatter
independently, since all are held against the same line: of 20 arms whose differences correlate by .9, three seeds know hardly
more than two degrees of freedom, and a t with d0 + d calls differences real in 14 % of cases instead of 5 %. So the limit is

    d·(tr Σ̂)²/tr(Σ̂²)                         Σ̂: covariance of the arms over seeds

with which 2 to 6 % are called real, whatever the correlation (1,500 experiments each).

Source:
    Smyth 2004, "Linear models and empirical Bayes methods for assessing differential expression in microarray experiments"
    (limma), for the model and its fit; Greenhouse & Geisser 1959, "On methods in the analysis of profile data", for the limit.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from pe_dpo.metrics.bootstrap import Effect
from pe_dpo.metrics.table import Floats

FEWEST_ARMS, FEWEST_SEEDS = 5, 3
"""Below which neither the assumption nor the correlation of arms can be seen."""
DOUBTFUL = 0.05
"""The p below which variances do not look as the assumption has them."""


class SeedVariance(NamedTuple):
    """The variance of a difference between seeds, as arms together tell it."""

    arms: int
    seeds: int
    variance: float
    """s0²."""
    freedom: float
    """d0; infinite where the arms' variances differ no more than chance."""
    limit: float
    """Degrees of freedom that the arms together know."""
    fit_p: float
    """Kolmogorov's and Smirnov's p of the variances under the assumption. It is a guide and no level: the assumption's two
    numbers were fitted to the same variances, which makes it too large, and arms that scatter together make it too small."""

    @property
    def is_plausible(self) -> bool:
        """Whether the assumption holds as far as can be seen."""
        return self.fit_p >= DOUBTFUL

    @property
    def pooled_freedom(self) -> float:
        """Degrees of freedom of a moderated t."""
        return min(self.freedom + self.seeds - 1, self.limit)


def seed_variance(per_seed: Floats) -> SeedVariance | None:
    """Return what arms together tell of their variance between seeds; None of fewer than 5 arms or 3 seeds.

    Args:
        per_seed: D_s of each arm, (A, S), the same seeds in each.
    """
    from scipy import stats  # dear to import

    arms, seeds = per_seed.shape
    if arms < FEWEST_ARMS or seeds < FEWEST_SEEDS:
        return None
    own = seeds - 1
    apart = per_seed - per_seed.mean(1, keepdims=True)
    variances = (apart**2).sum(1) / own
    covariance = apart.T @ apart / own  # its eigenvalues but zeros are those of the arms' covariance
    squares = float((covariance**2).sum())
    if squares == 0:
        return None
    limit = max(float(own), own * float(np.trace(covariance)) ** 2 / squares)
    variances = np.maximum(variances, 1e-5 * (np.median(variances) or variances.max()))
    logs = np.log(variances) - special.digamma(own / 2) + math.log(own / 2)
    surplus = float(logs.var(ddof=1) - special.polygamma(1, own / 2))
    freedom, variance = math.inf, float(variances.mean())
    if surplus > 0:
        half = optimize.brentq(lambda value: float(special.polygamma(1, value)) - surplus, 1e-8, 1e8) if surplus > 1e-7 else 1e7
        freedom = 2 * half
        variance = math.exp(float(logs.mean()) + float(special.digamma(half)) - math.log(half))
    ratios = variances / variance
    law = stats.chi2(own, scale=1 / own) if math.isinf(freedom) else stats.f(own, freedom)
    return SeedVariance(arms, seeds, variance, freedom, limit, float(stats.kstest(ratios, law.cdf).pvalue))


def pool_seeds(
    found: Sequence[Effect | None], seeds: Sequence[Sequence[int]], *, confidence: float = 0.95
) -> tuple[list[Effect | None], SeedVariance | None]:
    """Return effects with the variance of their seeds moderated where that is plausible, and what was pooled.

    Those are pooled that rest on one and the same set of seeds: of the sets that enough effects have, the largest. Effects of
    other seeds stay as they are.

    Args:
        found: of each arm, not adjusted for others yet.
        seeds: of each arm, in the order of its `per_seed`.
        confidence: of intervals.
    """
    sets = [tuple(of_arm) if one else () for one, of_arm in zip(found, seeds, strict=True)]
    count = Counter(sets)
    pooled_set = max(sets, key=lambda one: (count[one] >= FEWEST_ARMS, len(one), count[one]), default=())
    rows = [one.per_seed for one, its in zip(found, sets, strict=True) if one and its == pooled_set]
    pooled = seed_variance(np.array(rows)) if rows else None
    if pooled is None or not pooled.is_plausible:
        return list(found), pooled
    moderated = [
        _moderated(one, pooled, confidence=confidence) if one and its == pooled_set else one
        for one, its in zip(found, sets, strict=True)
    ]
    return moderated, pooled


def _moderated(found: Effect, pooled: SeedVariance, *, confidence: float) -> Effect:
    errors, own = found.errors, pooled.seeds - 1
    observed = errors.seeds + errors.together
    if math.isinf(pooled.freedom):
        observed = pooled.variance / pooled.seeds
    else:
        prior = pooled.freedom * pooled.variance / pooled.seeds
        observed = (prior + own * observed) / (pooled.freedom + own)
    together = min(max(0.0, errors.prompts - errors.alone), observed)
    errors = errors._replace(together=together, seeds=observed - together, seed_freedom=pooled.pooled_freedom)
    return Effect.known_to(errors, found.estimate, confidence=confidence, seed_sd=found.seed_sd, per_seed=found.per_seed)

"""Means over answers or pairs of which several belong to one prompt, and so are not independent of each other."""

from collections.abc import Hashable, Sequence

import numpy as np

Numbers = Sequence[float] | np.ndarray


def clustered_mean(values: Numbers, clusters: Sequence[Hashable]) -> dict[str, float | None]:
    """Return the mean of values with a standard error that allows for dependence within clusters; see `clustered_ratio`."""
    return clustered_ratio(values, [1.0] * len(values), clusters)


def clustered_ratio(numerators: Numbers, denominators: Numbers, clusters: Sequence[Hashable]) -> dict[str, float | None]:
    """Return Σ numerators / Σ denominators with its standard error.

    Clusters are independent of each other, what is in one may depend on each other in any way. The error is that of the linear
    approximation, √(C/(C−1) Σ_c r_c²) / Σ denominators with r_c the sum of numerator − ratio·denominator in cluster c; for
    means of clusters of one size it is the standard error of the mean of the clusters' means.

    Args:
        numerators: N values.
        denominators: N values, not all 0.
        clusters: which cluster each belongs to.

    Returns:
        `mean` and `standard_error`, the latter None if there is only one cluster.

    Source:
        Cochran 1977, "Sampling techniques", 6.3 and 9A; Miller 2024 (arXiv 2411.00640), section 2.2.
    """
    mean = float(np.sum(numerators) / np.sum(denominators))
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    members = [numbers[cluster] for cluster in clusters]
    sums = np.bincount(members, np.asarray(numerators, dtype=np.float64) - mean * np.asarray(denominators, dtype=np.float64))
    count = len(sums)
    if count < 2:
        return {"mean": mean, "standard_error": None}
    error = float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / abs(np.sum(denominators)))
    return {"mean": mean, "standard_error": error}

"""Points, lines of equal KL, and paired differences between them, seed by seed.

A line joins the baseline's observations of one seed over √KL. Nothing is said beyond its ends.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.experiments.measured import Measured
from pe_dpo.experiments.wording import with_state
from pe_dpo.metrics.statistics import Floats, interpolate
from pe_dpo.runs.observations import Observation


class Point(NamedTuple):
    """Observations of one setting of the dials: the column of each seed."""

    settings: dict[str, Any]
    by_seed: dict[int, int]

    @property
    def columns(self) -> list[int]:
        """Columns of all seeds."""
        return list(self.by_seed.values())


class Paired(NamedTuple):
    """Differences between a point and something else, for seeds that both have."""

    per_seed: Floats
    """(S,); S may be 0."""
    replicates: Floats
    """(repeats, S)."""
    compared: int
    """Seeds that could be compared, in range or not."""
    gaps: tuple[float, ...] = ()
    """Per seed, by how much the metric differs between the two ends of the piece of line that was used."""


class _Knots(NamedTuple):
    """The line of one seed: K observations of different √KL."""

    roots: Floats
    """(K,)."""
    values: Floats
    root_replicates: Floats
    """(repeats, K)."""
    value_replicates: Floats


def points_of(observations: Sequence[Observation]) -> list[Point]:
    """Return the points in the order of their first observation; see `wording.with_state` for snapshots and scales."""
    found: dict[str, Point] = {}
    for column, one in enumerate(observations):
        settings = with_state(one.settings, step=one.step, is_final=one.is_final, scale=one.scale)
        found.setdefault(repr(settings), Point(settings, {})).by_seed[one.seed] = column
    return list(found.values())


def values_at(points: Iterable[Point], key: str) -> set[str]:
    """Return the values that a dial has at points which turn nothing else, "" where it is not turned."""
    return {repr(point.settings.get(key, "")) for point in points if set(point.settings) <= {key}}


def paired_seeds(seeds: Iterable[int], others: Iterable[int]) -> list[tuple[int, int]]:
    """Return the seeds that both have; if there is none, pairs in their order, since then any pairing is as good."""
    ours, theirs = sorted(seeds), sorted(others)
    common = sorted(set(ours) & set(theirs))
    return [(seed, seed) for seed in common] or list(zip(ours, theirs, strict=False))


def against_point(point: Point, other: Point, observed: Floats, replicates: Floats) -> Paired:
    """Return what a quantity has more at one point than at another, for the seeds in which both have it.

    Args:
        point: the one.
        other: the other.
        observed: of all observations, (J,).
        replicates: the same over resampled prompts, (repeats, J).
    """
    columns = [(point.by_seed[seed], other.by_seed[twin]) for seed, twin in paired_seeds(point.by_seed, other.by_seed)]
    known = [pair for pair in columns if not np.isnan(observed[list(pair)]).any()]
    ours, theirs = [pair[0] for pair in known], [pair[1] for pair in known]
    return Paired(observed[ours] - observed[theirs], replicates[:, ours] - replicates[:, theirs], len(known))


def against_line(measured: Measured, point: Point, line: Sequence[Point]) -> Paired:
    """Return what the metric is more at a point than on the line at the same √KL, for the seeds in range.

    In replicates, in which a line may end a little earlier than as observed, its last observation stands for it.

    Args:
        measured: all observations.
        point: one that is not on the line.
        line: points that make it.
    """
    on_line: dict[int, list[int]] = {}
    for other in line:
        for seed, column in other.by_seed.items():
            if not np.isnan(measured.kl[column]):
                on_line.setdefault(seed, []).append(column)
    known = [seed for seed, column in point.by_seed.items() if not np.isnan(measured.kl[column])]
    pairs = paired_seeds(known, on_line)
    differences, replicates, gaps = [], [], []
    for seed, twin in pairs:
        column, knots = point.by_seed[seed], _knots(measured, on_line[twin])
        at = measured.roots[column]
        there = interpolate(knots.roots[None], knots.values[None], at[None])[0]
        if np.isnan(there):
            continue
        resampled = interpolate(
            knots.root_replicates, knots.value_replicates, measured.root_replicates[:, column], nearest=True
        )
        differences.append(measured.values[column] - there)
        replicates.append(measured.value_replicates[:, column] - resampled)
        gaps.append(_gap(knots, float(at)))
    stacked = np.stack(replicates, axis=1) if replicates else np.empty((len(measured.value_replicates), 0))
    return Paired(np.array(differences), stacked, len(pairs), tuple(gaps))


def _knots(measured: Measured, columns: Sequence[int]) -> _Knots:
    """The line through some observations, those of equal KL averaged, and the reference at KL 0 where it has the metric."""
    roots, group = np.unique(measured.roots[columns], return_inverse=True)
    average = np.eye(len(roots))[group] / np.bincount(group)[group][:, None]
    values = measured.values[columns] @ average
    root_replicates = measured.root_replicates[:, columns] @ average
    value_replicates = measured.value_replicates[:, columns] @ average
    if np.isnan(measured.reference) or roots[0] == 0:
        return _Knots(roots, values, root_replicates, value_replicates)
    return _Knots(
        np.r_[0.0, roots],
        np.r_[measured.reference, values],
        np.c_[np.zeros(len(root_replicates)), root_replicates],
        np.c_[measured.reference_replicates, value_replicates],
    )


def _gap(knots: _Knots, at: float) -> float:
    right = int(np.clip(np.searchsorted(knots.roots, at), min(1, len(knots.roots) - 1), len(knots.roots) - 1))
    return float(abs(knots.values[right] - knots.values[max(0, right - 1)]))

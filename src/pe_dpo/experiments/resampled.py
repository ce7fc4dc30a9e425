"""Many observations over the same resampled prompts, and differences between them, seed by seed: direct, or at equal KL.

A line joins the baseline's observations of one seed over √KL. Nothing is said beyond its ends.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.errors import UsageError
from pe_dpo.experiments.comparison import SCALE, STEP, with_state
from pe_dpo.metrics.bootstrap import Effect, effect, hierarchical_replicates, interpolate, resampled_ratios
from pe_dpo.metrics.catalogue import METRICS, Metric
from pe_dpo.metrics.table import Floats
from pe_dpo.runs.observations import Observation

FEWEST_PROMPTS = 5
"""To resample: below that an interval would be a guess."""


class Setting(NamedTuple):
    """Observations of one setting of the hyperparameters: the column of each seed."""

    settings: dict[str, Any]
    by_seed: dict[int, int]

    @property
    def columns(self) -> list[int]:
        """Columns of all seeds."""
        return list(self.by_seed.values())


class Differences(NamedTuple):
    """What the metric is more at one setting than at another, or than on a line, seed by seed."""

    seeds: list[int]
    """Those in which both are known and, against a line, in its range; of the first setting, where the two share none."""
    observed: Floats
    """(S,), and S may be 0."""
    replicates: Floats
    """(repeats, S)."""
    compared: int
    """Seeds that both have, in range or not."""
    gap: float = np.nan
    """Of a line: by how much the metric differs between the two ends of the piece that was used, mean over seeds."""
    on_chord: int = 0
    """Of a line: seeds that lie between the reference at KL 0 and its first observation."""


def settings_of(observations: Sequence[Observation]) -> list[Setting]:
    """Return the settings that are compared, see `with_state`, in the order of their first observation, scaled ones last.

    Of earlier states of runs those of the base recipe alone are.
    """
    found: dict[str, Setting] = {}
    for column, one in enumerate(observations):
        settings = with_state(one.settings, step=one.step, is_final=one.is_final, scale=one.scale)
        if STEP not in settings or set(settings) == {STEP}:
            found.setdefault(repr(settings), Setting(settings, {})).by_seed[one.seed] = column
    return sorted(found.values(), key=lambda one: SCALE in one.settings)


def base_of(settings: Sequence[Setting]) -> Setting:
    """Return the base recipe's, the one that changes nothing, else the first."""
    return next((one for one in settings if not one.settings), settings[0])


def paired_seeds(seeds: Iterable[int], others: Iterable[int]) -> list[tuple[int, int]]:
    """Return the seeds that both have; if there is none, pairs in their order, since then any pairing is as good."""
    ours, theirs = sorted(seeds), sorted(others)
    common = sorted(set(ours) & set(theirs))
    return [(seed, seed) for seed in common] or list(zip(ours, theirs, strict=False))


class Resampled:
    """Metric and KL of J observations that all have the metric's rows, as observed and over prompts drawn with replacement.

    The draws are the same for all. KL is measured on the prompts to which every observation with answers has some. Replicates
    that draw none of them are left out, of which there are few if any. The metric is NaN in a replicate that draws no row of
    an observation; such a replicate is lacking for effects in which that observation stands, and for no others.

    Args:
        observations: at least one.
        metric: what to measure.
        repeats: replicates.
        seed: of the draws.

    Raises:
        UsageError: there are fewer than FEWEST_PROMPTS prompts to resample.
    """

    def __init__(self, observations: Sequence[Observation], metric: Metric[Any], *, repeats: int, seed: int) -> None:
        asked = [set(one.answers.prompt_key) for one in observations if one.answers]
        answered = set.intersection(*asked) if asked else set()
        if metric.kind == "answers":
            keys = sorted(answered)
        else:
            keys = sorted(answered.union(*(set(one.pairs.prompt_key) for one in observations if one.pairs)))
        if len(keys) < FEWEST_PROMPTS:
            raise UsageError(f"runs share {len(keys)} prompts, of which no interval can be made; hold out more (data.eval)")
        at = {key: index for index, key in enumerate(keys)}
        kl, kl_at = METRICS["kl"], {key: index for key, index in at.items() if key in answered}
        nothing = np.zeros(len(keys)), np.zeros(len(keys))
        tables = [one.rows(metric.kind) for one in observations]
        parts = [metric.sums(table, at) if table else nothing for table in tables]
        parts += [kl.sums(one.answers, kl_at, size=len(keys)) if one.answers else nothing for one in observations]
        of_reference = nothing
        if isinstance(metric.reference, float):
            of_reference = np.full(len(keys), metric.reference), np.ones(len(keys))
        elif metric.reference is not None:  # the same in all that were measured with it, and γ = 0 needs no measuring
            known = ((table, metric.reference(table)) for table in tables if table)
            measured = next(((table, found) for table, found in known if not np.isnan(found).any()), None)
            of_reference = metric.sums(measured[0], at, numerators=measured[1]) if measured else nothing
        parts.append(of_reference)
        numerators, denominators = (np.stack(side, axis=1) for side in zip(*parts, strict=True))
        with np.errstate(invalid="ignore"):
            observed = numerators.sum(0) / denominators.sum(0)
        replicates = resampled_ratios(numerators, denominators, repeats=repeats, seed=seed)
        count = len(observations)
        of_kl = np.flatnonzero(~np.isnan(observed[count:-1])) + count
        replicates = replicates[~np.isnan(replicates[:, of_kl]).any(1)]
        self.observations, self.metric = observations, metric
        self.rows = max(len(table or ()) for table in tables)
        """Pairs or answers of one observation."""
        self.values, self.value_replicates = observed[:count], replicates[:, :count]
        """The metric, (J,) and (repeats, J)."""
        self.kl, self.kl_replicates = observed[count:-1], replicates[:, count:-1]
        """The same of the KL in nats; NaN without sampled answers."""
        self.roots, self.root_replicates = (np.sqrt(np.maximum(kl, 0)) for kl in (self.kl, self.kl_replicates))
        """The same of √KL in √nats; an estimate below 0, which no KL is, counts as 0."""
        self.reference, self.reference_replicates = float(observed[-1]), replicates[:, -1]
        """The metric of π0 and (repeats,) of it; NaN where the line of equal KL does not begin there."""
        self.prompts, self.kl_prompts = len(keys), len(answered)
        """Clusters that were resampled, and those with sampled answers."""

    def effect(self, differences: Differences | None, *, confidence: float, of_kl: bool = False) -> Effect | None:
        """Return the mean of differences over seeds with its error; None where there is none, or none of prompts beyond one.

        Args:
            differences: of the metric, or of the KL.
            confidence: of the interval.
            of_kl: which of the two.
        """
        clusters = self.kl_prompts if of_kl else self.prompts
        if differences is None or not differences.seeds or clusters < 2:
            return None
        one_row = 1 / self.rows if self.metric.is_share and not of_kl else 0.0
        return effect(differences.observed, differences.replicates, clusters=clusters, one_row=one_row, confidence=confidence)

    def against(self, one: Setting, other: Setting, *, of_kl: bool = False) -> Differences:
        """Return what the metric, or the KL, is more at one setting than at another, for the seeds in which both have it."""
        observed, replicates = (self.kl, self.kl_replicates) if of_kl else (self.values, self.value_replicates)
        pairs = paired_seeds(one.by_seed, other.by_seed)
        columns = [(seed, one.by_seed[seed], other.by_seed[twin]) for seed, twin in pairs]
        known = [column for column in columns if not np.isnan(observed[list(column[1:])]).any()]
        seeds, ours, theirs = ([column[part] for column in known] for part in range(3))
        return Differences(seeds, observed[ours] - observed[theirs], replicates[:, ours] - replicates[:, theirs], len(columns))

    def against_line(self, one: Setting, line: Sequence[Setting]) -> Differences:
        """Return what the metric is more at one setting than on the line at the same √KL, for the seeds in range.

        In replicates, in which a line may end a little earlier than as observed, its last observation stands for it.

        Args:
            one: a setting that is not on the line.
            line: settings that make it.
        """
        on_line: dict[int, list[int]] = {}
        for other in line:
            for seed, column in other.by_seed.items():
                if not np.isnan(self.kl[column]):
                    on_line.setdefault(seed, []).append(column)
        known = [seed for seed, column in one.by_seed.items() if not np.isnan(self.kl[column])]
        pairs = paired_seeds(known, on_line)
        seeds, differences, replicates, gaps = [], [], [np.empty((len(self.value_replicates), 0))], []
        on_chord = 0
        for seed, twin in pairs:
            column, (roots, values, root_replicates, value_replicates) = one.by_seed[seed], self._knots(on_line[twin])
            at = self.roots[column]
            there = interpolate(roots[None], values[None], at[None])[0]
            if np.isnan(there):
                continue
            resampled = interpolate(root_replicates, value_replicates, self.root_replicates[:, column], nearest=True)
            seeds.append(seed)
            differences.append(self.values[column] - there)
            replicates.append((self.value_replicates[:, column] - resampled)[:, None])
            right = int(np.clip(np.searchsorted(roots, at), min(1, len(roots) - 1), len(roots) - 1))
            gaps.append(abs(values[right] - values[max(0, right - 1)]))
            on_chord += bool(at < self.roots[on_line[twin]].min())
        gap = float(np.mean(gaps)) if gaps else np.nan
        return Differences(seeds, np.array(differences), np.concatenate(replicates, axis=1), len(pairs), gap, on_chord)

    def _knots(self, columns: Sequence[int]) -> tuple[Floats, Floats, Floats, Floats]:
        """The line of one seed as K observations of different √KL: (K,) roots and values, (repeats, K) of both resampled.

        Those of equal KL are averaged, and the reference begins the line at KL 0 where it has the metric.
        """
        roots, group = np.unique(self.roots[columns], return_inverse=True)
        average = np.eye(len(roots))[group] / np.bincount(group)[group][:, None]
        values = self.values[columns] @ average
        root_replicates = self.root_replicates[:, columns] @ average
        value_replicates = self.value_replicates[:, columns] @ average
        if np.isnan(self.reference) or roots[0] == 0:
            return roots, values, root_replicates, value_replicates
        return (
            np.r_[0.0, roots],
            np.r_[self.reference, values],
            np.c_[np.zeros(len(root_replicates)), root_replicates],
            np.c_[self.reference_replicates, value_replicates],
        )

    def over_seeds(self, settings: Sequence[Setting], draws: Floats, *, of_root: bool = False) -> Floats:
        """Return replicates of each setting's mean over seeds, of the metric or of √KL, (repeats, settings).

        Prompts and seeds are drawn for all settings alike; NaN for one that was not measured at every seed.

        Args:
            settings: of which.
            draws: see `hierarchical_replicates`.
            of_root: of √KL instead of the metric.
        """
        observed, replicates = (self.roots, self.root_replicates) if of_root else (self.values, self.value_replicates)
        return np.stack(
            [
                np.full(len(replicates), np.nan)
                if np.isnan(observed[one.columns]).any()
                else hierarchical_replicates(observed[one.columns], replicates[:, one.columns], draws)
                for one in settings
            ],
            axis=1,
        )

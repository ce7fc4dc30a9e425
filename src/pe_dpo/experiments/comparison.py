"""What a comparison of runs comes to: arms, all runs, what it would take to know more, and the verdict in words."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from pe_dpo.disk import json_without_nan
from pe_dpo.errors import UsageError
from pe_dpo.metrics.bootstrap import Effect, Errors
from pe_dpo.metrics.catalogue import Metric

STEP, SCALE, RUN = "step", "scale", "run"
"""Settings that are no recipe keys: where a run was stopped early, what its adapter was scaled by, and the folder of a run that
repeats another."""
FREE_CONTROLS = (STEP, SCALE)
"""Settings that take no training of their own: what they make of a run is no candidate for the best."""


def with_state(settings: Mapping[str, Any], *, step: int, is_final: bool, scale: float | None) -> dict[str, Any]:
    """Return the settings of the arm to which a measured state of a run belongs: its step or scale is one of them."""
    if is_final:
        return dict(settings)
    return {**settings, STEP: step} if scale is None else {**settings, SCALE: scale}


def is_end(settings: Mapping[str, Any]) -> bool:
    """Return whether settings are what runs came to, not an earlier or a scaled state of them."""
    return not any(key in settings for key in FREE_CONTROLS)


def as_json(found: Any) -> dict[str, Any]:
    """Return a dataclass as JSON has it, without errors, which are what intervals and p are made of."""

    def without_errors(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in fields if name != "errors"}

    whole: dict[str, Any] = json_without_nan(asdict(found, dict_factory=without_errors))
    return whole


class Method(NamedTuple):
    """How differences are tested; `compare.compare` says what each means."""

    repeats: int = 10_000
    seed: int = 0
    confidence: float = 0.95
    equivalent: float | None = None
    pool_seeds: bool = False

    def check(self) -> None:
        """Check that everything can be meant.

        Raises:
            UsageError: something cannot.
        """
        if self.repeats < 100:
            raise UsageError(f"`repeats` {self.repeats}: a bootstrap needs at least 100 replicates, better 10,000")
        if not 0.5 <= self.confidence < 1:
            raise UsageError(f"`confidence` {self.confidence:g}: must be at least 0.5 and less than 1, as 0.95")
        if self.seed < 0:
            raise UsageError(f"`seed` {self.seed}: must be 0 or more")
        if self.equivalent is not None and not 0 < self.equivalent < math.inf:
            raise UsageError(f"`equivalent` {self.equivalent:g}: must be above 0, as 2 for two points")

    def margin(self, metric: Metric[Any], within: float = math.nan) -> float:
        """Return what counts as no difference, in units of the metric; NaN where nothing does.

        Args:
            metric: of the difference.
            within: points of a share, or units of another metric, that a question says itself; NaN where it does not.
        """
        points = (math.nan if self.equivalent is None else self.equivalent) if math.isnan(within) else within
        return points / 100 if metric.is_share else points


@dataclass(frozen=True)
class RunRow:
    """One observation in the table of all runs: the end of a run, a snapshot of it, or its end scaled toward the reference."""

    name: str
    """The settings, in words."""
    run: str
    """The run's folder, or file of TRL."""
    seed: int | None
    step: int
    is_final: bool
    """Whether it is the end of a run, as it is."""
    source: str
    """pe-dpo or trl."""
    settings: dict[str, Any]
    """Dotted recipe key: value, where it differs from the base recipe."""
    kl: float
    """Nats per answer; NaN without sampled answers."""
    value: float
    """The metric, in TRL's logs as TRL has it; NaN where unknown."""
    metrics: dict[str, float]
    """Other metrics that are known, by their names."""
    scale: float | None = None
    """By which the end was scaled, if it was."""


@dataclass(frozen=True)
class Arm:
    """One setting of the hyperparameters, over its seeds."""

    name: str
    settings: dict[str, Any]
    is_baseline: bool
    """Whether it lies on the line that others are held against."""
    seeds: list[int]
    value: float
    """Mean of the metric over seeds."""
    value_sd: float
    """Between seeds; NaN with one."""
    kl: float
    """Nats per answer, mean over seeds; NaN without sampled answers."""
    root_kl: float
    """Mean over seeds of √KL."""
    matched: Effect | None
    """Minus the baseline at equal KL, over the seeds in range; None for the baseline itself, and where no seed is in range. Of
    one seed where others have several it has neither interval nor p."""
    seeds_in_range: int
    seeds_compared: int
    """Seeds that the baseline has too, in its range or not."""
    gap: float
    """By how much the metric differs between the baseline's two neighbours in KL, mean over seeds. The straight line between
    them is wrong by less, if the truth is monotone there. NaN where nothing is matched."""
    seeds_on_chord: int
    """Seeds that were held against the straight line from the reference at KL 0 to the baseline's first observation."""
    direct: Effect | None
    """Minus the base recipe, each at its own KL; None for the base recipe itself."""
    direct_kl: Effect | None
    """The same of the KL, nats per answer."""
    mcnemar: dict[str, float] | None
    """With one seed and a metric of 0 and 1: pairs gained and lost against the base recipe, and McNemar's exact p with the
    pairs of a prompt as one draw."""
    pareto: float
    """Share of replicates in which no other arm has as small a KL and as good a value; NaN without KL or direction."""


@dataclass(frozen=True)
class Power:
    """What it takes to tell 2 points apart, in a comparison of average error, at the level that the verdict uses."""

    unit: str
    """pair or answer."""
    pairs: int
    """How many there are."""
    seeds: int
    comparisons: int
    """That are tested together: Holm's first step asks each for that part of the level."""
    needed: float
    """Of them, for 80 % power in the verdict with as many seeds; infinite where their spread hides 2 points, NaN if the metric
    is no share."""
    smallest_found: float
    """Difference that one of these comparisons, tested alone, shows with 80 % power."""
    smallest_in_verdict: float
    """Difference that the verdict says with 80 % power: after Holm's correction for all comparisons."""
    with_two_more: float
    """The same with two more seeds; NaN with one seed, whose spread is not known."""
    errors: Errors
    """Of an average comparison."""
    seed_sd: float
    """Of the difference, between seeds, apart from what their prompts bring in; NaN with one seed."""


@dataclass(frozen=True)
class Best:
    """The best of n arms, and how much of its lead is luck."""

    name: str
    points: int
    value: float
    optimism: float
    """By how much being picked makes it look better than it is."""
    corrected: float
    """What to expect of it on other prompts and seeds."""


@dataclass(frozen=True)
class NamedContrast:
    """A contrast that was named in words, over its points and, where there are several, over data sets."""

    text: str
    """As it was named."""
    name: str
    """In words: "mixout (mean of 3 points) minus β at equal KL"."""
    points: list[str]
    """Names of those that it is the mean of: those that can be compared in every seed that it counts."""
    left_out: list[str]
    """Names of its other points, of both sides."""
    is_at_equal_kl: bool
    effect: Effect | None
    """None where nothing could be compared."""
    after: int | None
    """Runs that were finished when it was named; None where that was not recorded, since it was named for this comparison."""
    lacking: str = ""
    """Why it has no points, in words, where it has none."""
    by_data_set: dict[str, Effect | None] = field(default_factory=dict)
    """Of a contrast over several data sets: the effect in each, not adjusted."""
    data_sets: int = 1
    """How many of them its mean counts: a data set with one seed does not count where others have several."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    verdict: str
    """What can and cannot be told apart, in plain words."""
    metric: str
    title: str
    """The metric in words."""
    is_share: bool
    """Whether differences are in points."""
    direction: int
    """1 where more is better, −1 where less is, 0 where neither."""
    baseline: str
    """Name of the hyperparameter whose runs make the line of equal KL: "β", or "early stopping"."""
    seeds: int
    pairs: int
    """Rows that the metric is made of: held-out pairs, or sampled answers of one run."""
    unit: str
    """What those are: "pair" or "answer"."""
    repeats: int
    confidence: float
    runs: list[RunRow]
    """All of them, snapshots and scaled ends too."""
    arms: list[Arm] = field(default_factory=list)
    """Ends of runs, the snapshots of the base recipe, and last the ends at other scales."""
    reference: float = math.nan
    """The metric of π0, where lines of equal KL begin with it; NaN where they do not."""
    prompts: int = 0
    """Clusters that are resampled."""
    kl_prompts: int = 0
    """Prompts with sampled answers."""
    power: Power | None = None
    best: Best | None = None
    contrasts: list[NamedContrast] = field(default_factory=list)
    """Where there are any, they are what the verdict speaks of, and all other differences are exploration."""
    equivalent: float | None = None
    """What counts as no difference, in points of a share, or in units of the metric."""
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it: numbers that are not finite become null."""
        return as_json(self)

"""What a comparison of runs comes to: arms, all runs, what it would take to know more, and the verdict in words."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pe_dpo.disk import json_without_nan


@dataclass(frozen=True)
class RunRow:
    """One observation in the table of all runs: the end of a run, a snapshot of it, or its end scaled toward the reference."""

    name: str
    """Of its point, in words."""
    run: str
    """Its folder, or file of TRL."""
    seed: int | None
    step: int
    is_final: bool
    """Whether it is the end of a run, as it is."""
    source: str
    """pe-dpo or trl."""
    settings: dict[str, Any]
    """Dotted recipe key: value, where it is turned away from the base recipe."""
    kl: float
    """Nats per answer; NaN without sampled answers."""
    value: float
    """The metric, in TRL's logs as TRL has it; NaN where unknown."""
    metrics: dict[str, float]
    """Other metrics that are known, by their names."""
    scale: float | None = None
    """Of a scaled end."""


@dataclass(frozen=True)
class Difference:
    """A paired difference, mean over seeds."""

    estimate: float
    low: float
    high: float
    p: float
    """Two-sided, not adjusted."""
    p_adjusted: float
    """By Holm, over all points that were compared in this way."""
    standard_error: float
    seed_sd: float
    """Standard deviation between seeds; NaN with one seed, whose spread is in neither interval nor p."""
    per_seed: list[float]


@dataclass(frozen=True)
class Arm:
    """A point, which is one setting of the dials, over its seeds."""

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
    matched: Difference | None
    """Minus the baseline at equal KL, over the seeds in range; None for the baseline itself, and where no seed is in range."""
    seeds_in_range: int
    seeds_compared: int
    """Seeds that the baseline has too, in its range or not."""
    gap: float
    """By how much the metric differs between the baseline's two neighbours in KL, mean over seeds. The straight line between
    them is wrong by less, if the truth is monotone there. NaN where nothing is matched."""
    direct: Difference | None
    """Minus the base point, each at its own KL; None for the base point itself."""
    direct_kl: Difference | None
    """The same of the KL, nats per answer."""
    mcnemar: dict[str, float] | None
    """With one seed and a metric of 0 and 1: pairs gained and lost against the base point, and McNemar's exact p, which takes
    pairs as independent."""
    pareto: float
    """Share of replicates in which no other point has as small a KL and as good a value; NaN without KL or direction."""


@dataclass(frozen=True)
class Power:
    """What it takes to tell 2 points apart, in a comparison of average error."""

    unit: str
    """pair or answer."""
    pairs: int
    """There are."""
    seeds: int
    needed: float
    """Pairs for 80 % power with as many seeds; infinite where their spread hides 2 points, NaN if the metric is no share."""
    needed_for_two_runs: float
    """The same for two runs of one seed at their own KL, from discordance and design effect; NaN if no share of pairs."""
    smallest_found: float
    """Difference that these runs show with 80 % power."""
    discordance: float
    """Share of pairs that one of two runs of a seed alone has right, the mean over points against the base point."""
    design_effect: float
    """By how much pairs that share a prompt widen the variance of that difference."""
    seed_sd: float
    """Of the difference, between seeds, apart from what their prompts bring in; NaN with one seed."""


@dataclass(frozen=True)
class Best:
    """The best of n points, and how much of its lead is luck."""

    name: str
    points: int
    value: float
    optimism: float
    """By how much being picked makes it look better than it is."""
    corrected: float
    """What to expect of it on other prompts and seeds."""


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
    """Name of the dial whose runs make the line of equal KL: "β", or "early stopping"."""
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
    """Ends of runs, the snapshots of the base point, and last the ends at other scales."""
    reference: float = math.nan
    """The metric of π0, where lines of equal KL begin with it; NaN where they do not."""
    prompts: int = 0
    """Clusters that are resampled."""
    kl_prompts: int = 0
    """Prompts with sampled answers."""
    power: Power | None = None
    best: Best | None = None
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it: numbers that are not finite become null."""
        return json_without_nan(asdict(self))

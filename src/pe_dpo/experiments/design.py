"""What a sweep will be able to tell apart, before it is run: from the variances of one that was, or from stated ones.

A share of N pairs, each with a prompt of its own, over S seeds:

    V_prompts alone    of_pair/N          pairs on which two runs differ in every seed
    V_together         of_draw/(N·S)      pairs on which they differ in one
    V_seeds            seed_sd²/S         a run as a whole is better or worse
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pe_dpo.errors import UsageError
from pe_dpo.experiments.compare import compare, line_axis
from pe_dpo.experiments.comparison import SCALE, STEP
from pe_dpo.experiments.plan import SweepPlan
from pe_dpo.metrics.bootstrap import Errors, smallest_found
from pe_dpo.printable import counted

OF_PAIR, OF_DRAW, SEED_SD = 0.06, 0.07, 0.01
"""What is assumed where no sweep is there: two runs rank 6 % of the pairs differently in every seed and 7 % in one, and differ
by 1 point between seeds beyond that. The two sweeps of benchmarks/results/study have 1 to 7 %, 1 to 12 % and 0.5 to 1.7
points."""
PAIRS = (100, 300, 1000)
"""Held-out pairs for which it is said where none are measured yet."""


class Design(NamedTuple):
    """What one number of held-out pairs, or of sampled answers, finds with 80 % power."""

    pairs: int
    """Or answers, where the metric of the sweep that was run is of these."""
    alone: float
    """The smallest difference of one test by itself, as a share; NaN with one seed, whose spread is not known."""
    in_verdict: float
    """After Holm's correction for all that is tested together."""
    with_two_more: float
    """The same with two more seeds."""


class Designs(NamedTuple):
    """What a plan will find, for some numbers of held-out pairs or of sampled answers."""

    sizes: list[Design]
    unit: str
    """pair or answer."""
    assumed: str
    """In words."""
    comparisons: int
    """That are tested together."""


def designs(plan: SweepPlan, *, like: Path | None = None, confidence: float = 0.95) -> Designs:
    """Return what a plan will find.

    Args:
        plan: of which seeds, contrasts and points count.
        like: a sweep folder whose variances and pairs are taken; by default the plan's own folder where runs have finished.
        confidence: 1 − it is the level of the verdict.

    Raises:
        UsageError: `like` has no runs of two seeds or more that can be compared.
    """
    comparisons = len(plan.contrasts) or _points(plan)
    errors, unit, sizes, words = _assumed(like or plan.folder, asked=like is not None)
    found = []
    for pairs, more in sizes:
        smallest = [
            smallest_found(errors.with_runs(seeds), more=more, confidence=confidence, comparisons=count)
            if seeds > 1
            else math.nan
            for seeds, count in ((len(plan.seeds), 1), (len(plan.seeds), comparisons), (len(plan.seeds) + 2, comparisons))
        ]
        found.append(Design(pairs, *smallest))
    return Designs(found, unit, words, comparisons)


def _points(plan: SweepPlan) -> int:
    """How many arms will be held against the line of equal KL, or against the base recipe where there are no others.

    As `compare` has them: the ends of runs, the snapshots of the base recipe, and every end at other scales.
    """
    ends = list({point.name: point.settings for point in plan.points}.values())
    arms = [*ends, *({STEP: number} for number in range(plan.recipe.generation.snapshots) if {} in ends)]
    arms += [{**one, SCALE: scale} for one in ends for scale in plan.recipe.generation.scales]
    axis, _ = line_axis("loss.beta", arms)
    return max(1, sum(not set(one) <= {axis} for one in arms) or len(arms) - 1)


def _assumed(folder: Path, *, asked: bool) -> tuple[Errors, str, Sequence[tuple[int, float]], str]:
    """Errors, the unit of rows, numbers of them each with how many times those of the errors that are, and what was assumed."""
    try:
        power = compare([folder]).power
    except UsageError:
        if asked:
            raise
        power = None
    if power is not None and power.seeds > 1:
        sample = counted(power.pairs, power.unit), counted(power.comparisons, "comparison")
        words = f"variances of {folder}: {power.seeds} seeds, {', '.join(sample)}"
        return power.errors, power.unit, [(power.pairs, 1.0)], words
    if asked:
        raise UsageError(f"`like` {folder}: has no comparison over two seeds or more, whose variances could be taken")
    base = PAIRS[0]
    alone, together = OF_PAIR / base, OF_DRAW / base / 2
    words = (
        f"a share; two runs rank {OF_PAIR:.0%} of the pairs differently in every seed and {OF_DRAW:.0%} in one seed, differ by "
        f"{100 * SEED_SD:g} point between seeds (standard deviation) beyond that, and every pair has a prompt of its own"
    )
    errors = Errors(alone + together, alone, together, SEED_SD**2 / 2, base, 2)
    return errors, "pair", [(pairs, pairs / base) for pairs in PAIRS], words

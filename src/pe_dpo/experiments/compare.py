"""What can and cannot be told apart between runs: paired, at matched KL, every run shown.

    metric ┤        ● mixout 0.3            the baseline dial's runs of one seed are joined by straight lines;
           │    ╱─○────                     another run of that seed is held against the line at its own √KL,
           │  ○╱  ↕ D_s                     if the line reaches there: nothing is extrapolated
           └──────────── √KL(π‖π0)

The difference is the mean of D_s over seeds; its error is that of prompts and seeds (`statistics`). Prompts are drawn once per
replicate for all runs, for the metric and for the KL, and every line is drawn anew. The null hypothesis is that every dial
gives the same for its KL (Gao et al. 2022, arXiv 2210.10760, found a KL penalty "akin to early stopping").

The reference itself is the line's first point, at KL 0, where a metric comes near the reference's as KL falls: accuracy/policy,
NLL, win rate (½ by definition). accuracy/shift and rewards/accuracies do not. They are ½ at KL 0 by the rule for ties, but
after the smallest step every pair has moved, and a line from ½ would flatter whatever is compared near it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pe_dpo.errors import UsageError
from pe_dpo.experiments import wording
from pe_dpo.experiments.arms import find_arms
from pe_dpo.experiments.comparison import Arm, Comparison, RunRow
from pe_dpo.experiments.matching import Point, points_of, values_at
from pe_dpo.experiments.measured import Measured, measure
from pe_dpo.experiments.wording import FREE_CONTROLS, SCALE, STEP, is_end
from pe_dpo.metrics.catalogue import COMPARED, METRICS, Metric
from pe_dpo.recipe import known_keys
from pe_dpo.recipe.names import SHORT_NAMES
from pe_dpo.runs.observations import Observation, read_observations

FEW_PROMPTS = 20
"""Sampled prompts below which the error of the KL is not well known."""


def compare(
    targets: Sequence[str | Path],
    *,
    metric: str | None = None,
    baseline: str = "beta",
    repeats: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """Return what can and cannot be told apart between runs.

    Args:
        targets: run folders, sweep folders, TRL's trainer_state.json; see `observations.read_observations`.
        metric: one of `metrics.METRICS`; by default `win_rate` where all answers were scored, else `accuracy/shift`.
        baseline: the dial whose runs make the line of equal KL: a short name ("beta"), a dotted recipe key, "step" for the
            snapshots of the base point, or "scale" for its adapter scaled toward the reference. Snapshots, else scales, also
            serve where only one value of the dial was run.
        repeats: replicates of the bootstrap.
        seed: of the bootstrap.
        confidence: of intervals; 1 − it is the level at which Holm-adjusted p speak in the verdict.

    Raises:
        UsageError: a target, the metric or the dial is nothing that can be compared, or runs do not belong together.
    """
    if repeats < 100:
        raise UsageError(f"--repeats {repeats}: a bootstrap needs at least 100 replicates, better 10,000")
    if not 0.5 <= confidence < 1:
        raise UsageError(f"--confidence {confidence:g}: must be at least 0.5 and less than 1, as 0.95")
    if seed < 0:
        raise UsageError(f"--seed {seed}: must be 0 or more")
    if not targets:
        raise UsageError("nothing to compare: name run folders, or the folder of a sweep")
    dial = check_names(metric, baseline)
    table = read_observations(targets)
    name = choose_metric(metric, table.observations)
    chosen = METRICS[name]
    ours = [one for one in table.observations if one.source == "pe-dpo"]
    usable = [one for one in ours if missing_words(chosen, one) is None]
    if ours and not usable:
        raise UsageError(f"--metric {name}: {missing_words(chosen, ours[0])}")
    found = Comparison(
        verdict="",
        metric=name,
        title=chosen.explanation or chosen.title,
        is_share=chosen.is_share,
        direction=chosen.direction or 0,
        baseline=wording.dial_name(dial),
        seeds=len({one.seed for one in usable}),
        pairs=max((len(rows) for one in usable if (rows := one.rows(chosen.kind))), default=0),
        unit=chosen.kind.removesuffix("s"),
        repeats=repeats,
        confidence=confidence,
        runs=[_run_row(one, name) for one in table.observations],
        remarks=[*table.remarks, *_remarks_on_metric(name, ours, usable, peers=len(table.observations) - len(ours))],
    )
    if usable:
        found = _with_arms(found, measure(usable, chosen, repeats=repeats, seed=seed), chosen, dial, seed)
    return replace(found, verdict=wording.verdict(found))


def choose_metric(name: str | None, observations: Sequence[Observation]) -> str:
    """Return the name of the metric to compare on: what was asked for, else `win_rate` where scored, else `accuracy/shift`.

    Raises:
        UsageError: there is no such metric.
    """
    if name is None:
        ours = [one for one in observations if one.source == "pe-dpo"]
        is_scored = bool(ours) and all(missing_words(METRICS["win_rate"], one) is None for one in ours)
        return "win_rate" if is_scored else "accuracy/shift" if ours else "rewards/accuracies"
    if name not in COMPARED:
        raise UsageError(f"--metric {name}: is not one of {', '.join(COMPARED)}")
    return name


def missing_words(metric: Metric[Any], observation: Observation) -> str | None:
    """Return why an observation has no such metric, with what to do about it, or None if it has."""
    rows = observation.rows(metric.kind)
    if rows is None and metric.kind == "pairs":
        return f"{observation.run} has no held-out pairs one by one; measure it with pe-dpo eval"
    if rows is None:
        return f"{observation.run} has no sampled answers; ask for them with generation.prompts, or with pe-dpo eval"
    gone = [name for name in metric.needs if not rows.knows(name)]
    if not gone:
        return None
    remedy = "give pe-dpo eval a scorer" if "score" in gone else "measure it again with pe-dpo eval"
    return f"{observation.run} has no {', '.join(gone)} of its {metric.kind}; {remedy}"


def mean_of(metric: Metric[Any], observation: Observation) -> float:
    """Return the metric of one observation on all its rows; NaN where it has none."""
    rows = observation.rows(metric.kind)
    return math.nan if rows is None or missing_words(metric, observation) else metric(rows)


def check_names(metric: str | None, baseline: str) -> str:
    """Return the key of the baseline dial, or "step", or "scale".

    Raises:
        UsageError: there is no such metric or dial.
    """
    choose_metric(metric, [])
    dial = SHORT_NAMES.get(baseline, baseline)
    if dial not in (*FREE_CONTROLS, *known_keys()):
        names = ", ".join(SHORT_NAMES)
        raise UsageError(f"--baseline {baseline}: is neither {STEP} nor {SCALE}, nor a dial ({names}), nor a key of a recipe")
    return dial


def _run_row(one: Observation, name: str) -> RunRow:
    is_ours = one.source == "pe-dpo"
    metrics = {key: mean_of(metric, one) if is_ours else one.logged.get(key, math.nan) for key, metric in COMPARED.items()}
    return RunRow(
        name=wording.point_name(one.settings if one.scale is None else {**one.settings, SCALE: one.scale}),
        run=one.run,
        seed=one.seed if is_ours else None,
        step=one.step,
        is_final=one.is_final,
        source=one.source,
        settings=one.settings,
        kl=mean_of(METRICS["kl"], one),
        value=metrics[name],
        metrics={key: value for key, value in metrics.items() if not math.isnan(value)},
        scale=one.scale,
    )


def _with_arms(found: Comparison, measured: Measured, metric: Metric[Any], dial: str, seed: int) -> Comparison:
    """The comparison with all that can be paired."""
    points = points_of(measured.observations)
    dial, remarks = _line_dial(dial, points, found)
    points = [point for point in points if STEP not in point.settings or set(point.settings) == {STEP}]
    points = sorted(points, key=lambda point: SCALE in point.settings)
    line = [point for point in points if set(point.settings) <= {dial}]
    arms, power, best = find_arms(measured, points, line, metric, seed=seed, confidence=found.confidence)
    found = replace(
        found,
        baseline=wording.dial_name(dial),
        arms=arms,
        reference=measured.reference,
        prompts=measured.prompts,
        kl_prompts=measured.kl_prompts,
        power=power,
        best=best,
    )
    return replace(found, remarks=[*found.remarks, *remarks, *_remarks_on_arms(found)])


def _line_dial(dial: str, points: Sequence[Point], found: Comparison) -> tuple[str, list[str]]:
    """The dial that makes the line: the one asked for, or where only one value of it was run what takes no run of its own."""
    ends = [point for point in points if is_end(point.settings)]
    others = {STEP: "the base point's snapshots (early stopping)", SCALE: "the base point's adapter at other scales"}
    there = [key for key in others if len(values_at(points, key)) > 1]
    if dial in FREE_CONTROLS or len(values_at(ends, dial)) > 1 or not there:
        return dial, []
    return there[0], [
        f"only one value of {found.baseline} was run with the rest of the base recipe: the line of equal KL is made of "
        f"{others[there[0]]} instead"
    ]


def _remarks_on_metric(name: str, ours: Sequence[Observation], usable: Sequence[Observation], *, peers: int) -> list[str]:
    """What is to be known of the metric and of those that lack it."""
    found = []
    if METRICS[name].caution:
        found.append(f"{name} {METRICS[name].caution}; accuracy/shift, accuracy/policy and win_rate do not")
    if len(usable) < len(ours):
        lacking = next(one for one in ours if one not in usable)
        found.append(
            f"{len(ours) - len(usable)} of {len(ours)} measured policies have no {name} and are shown, not compared: "
            f"{missing_words(METRICS[name], lacking)}"
        )
    if peers:
        found.append(
            f"{wording.counted(peers, 'log')} of TRL: means over held-out pairs, without the pairs one by one and without KL, "
            "so that nothing can be paired or matched; TRL averages them over batches and counts ties of rewards as wrong"
        )
    return found


def _remarks_on_arms(found: Comparison) -> list[str]:
    """What makes differences less sure than their intervals say."""
    remarks = []
    if not found.kl_prompts:
        remarks.append("no answers were sampled, so there is no KL to match: set generation.prompts, or run pe-dpo eval")
    elif found.kl_prompts < FEW_PROMPTS:
        remarks.append(f"KL comes from {found.kl_prompts} prompts; more generation.prompts would make the match surer")
    if found.seeds == 1:
        remarks.append("one seed: intervals and p hold for these runs, the spread between seeds is not in them")
    elif any(one and len(one.per_seed) == 1 for arm in found.arms for one in (arm.matched, arm.direct)):
        remarks.append("where one seed alone could be compared, the spread between seeds is not in the interval")
    unknown = [arm.name for arm in found.arms if math.isnan(arm.kl)]
    if unknown and found.kl_prompts:
        remarks.append(
            f"{wording.listed(unknown)}: no sampled answers for some or all seeds, and without a KL nothing is matched; ask "
            "for them with generation.prompts, or with pe-dpo eval"
        )
    outside: dict[tuple[int, int], list[str]] = {}
    for arm in found.arms:
        if arm.seeds_in_range < arm.seeds_compared:
            seeds = arm.seeds_compared - arm.seeds_in_range, arm.seeds_compared
            outside.setdefault(seeds, []).append(arm.name)
    remarks += [
        f"{wording.listed(names)}: out of range of the {found.baseline} dial for {missed} of "
        f"{wording.counted(compared, 'seed')}; nothing is extrapolated"
        for (missed, compared), names in outside.items()
    ]
    matched = [(arm.name, arm.matched) for arm in found.arms if arm.matched]
    lone = [name for name, one in matched if one.p < 1 - found.confidence <= one.p_adjusted]
    if lone:
        remarks.append(
            f"{wording.listed(lone)}: the interval by itself leaves 0 out, but among {len(matched)} comparisons that happens "
            "too easily by chance (Holm)"
        )
    wide = [arm.name for arm in found.arms if _is_coarse(arm)]
    if wide:
        remarks.append(
            f"{wording.listed(wide)}: the neighbours on the {found.baseline} line differ by more than the interval is wide, so "
            f"the straight line between them may be wrong by as much; run values of {found.baseline} in between"
        )
    return remarks


def _is_coarse(arm: Arm) -> bool:
    """Whether the baseline's neighbours in KL are too far apart for a straight line between them."""
    return arm.matched is not None and arm.gap > arm.matched.high - arm.matched.low

"""What can and cannot be told apart between runs: paired, at matched KL, every run shown.

    metric ┤        ● mixout 0.3            the baseline's runs of one seed (other values of β) are joined by lines;
           │    ╱─○────                     another run of that seed is held against the line at its own √KL,
           │  ○╱  ↕ D_s                     if the line reaches there: nothing is extrapolated
           └──────────── √KL(π‖π0)

The difference is the mean of D_s over seeds; its error is that of prompts and seeds (`metrics.bootstrap`). Prompts are drawn
once per replicate for all runs, for the metric and for the KL, and every line is drawn anew. The null hypothesis is that every
hyperparameter gives the same for its KL (Gao et al. 2022, arXiv 2210.10760, found a KL penalty "akin to early stopping").

The reference itself is the line's first point, at KL 0, where a metric comes near the reference's as KL falls: accuracy/policy,
NLL, win rate (½ by definition). accuracy/shift and rewards/accuracies do not. They are ½ at KL 0 by the rule for ties, but
after the smallest step every pair has moved, and a line from ½ would flatter whatever is compared near it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.errors import UsageError
from pe_dpo.experiments import summary
from pe_dpo.experiments.comparison import FREE_CONTROLS, SCALE, STEP, Arm, Best, Comparison, Method, Power, RunRow, is_end
from pe_dpo.experiments.contrasts import Contrast, find_contrasts, named_contrasts, over_data_sets
from pe_dpo.experiments.resampled import Differences, Resampled, Setting, base_of, paired_seeds, settings_of
from pe_dpo.metrics import bootstrap
from pe_dpo.metrics.bootstrap import Effect, tested_together
from pe_dpo.metrics.catalogue import COMPARED, METRICS, Metric
from pe_dpo.metrics.estimates import changed_sides
from pe_dpo.metrics.seed_variance import SeedVariance, pool_seeds
from pe_dpo.metrics.table import Floats
from pe_dpo.recipe import Recipe, known_keys
from pe_dpo.recipe.names import SHORT_NAMES
from pe_dpo.runs.observations import Observation, base_recipe, data_sets, read_observations

POINTS = 0.02
"""The difference of a share for which the needed pairs are told."""


def compare(
    targets: Sequence[str | Path],
    *,
    metric: str | None = None,
    baseline: str = "beta",
    repeats: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    contrasts: Sequence[str] = (),
    equivalent: float | None = None,
    pool_seeds: bool = False,
) -> Comparison:
    """Return what can and cannot be told apart between runs.

    Where contrasts were named, with the sweep or here, the verdict is about them alone. Sweeps of several data sets are
    compared each by itself then, and their contrasts are averaged.

    Args:
        targets: run folders, sweep folders, TRL's trainer_state.json; see `observations.read_observations`.
        metric: one of `metrics.COMPARED`; by default `win_rate` where all answers were scored, else `accuracy/shift`, per token
            where all losses are (`reduce: mean`).
        baseline: the hyperparameter whose runs make the line of equal KL: a short name ("beta"), a dotted recipe key, "step"
            for the snapshots of the base recipe, or "scale" for its adapter scaled toward the reference. Snapshots, else
            scales, also serve where only one value of the hyperparameter was run.
        repeats: replicates of the bootstrap.
        seed: of the bootstrap.
        confidence: of intervals; 1 − it is the level at which Holm-adjusted p speak in the verdict.
        contrasts: questions beside those that a sweep carries, see `contrasts.read_contrast`.
        equivalent: what counts as no difference, in points of a share or units of another metric: then it is said too what lies
            within it (two one-sided tests).
        pool_seeds: take the variance between seeds from all points at equal KL together where their variances look as if they
            could, see `metrics.seed_variance`; contrasts keep their own.

    Raises:
        UsageError: a target, the metric, the baseline or a contrast is nothing that can be compared, or runs do not belong
            together.
    """
    method = Method(repeats, seed, confidence, equivalent, pool_seeds)
    method.check()
    if not targets:
        raise UsageError("nothing to compare: name run folders, or the folder of a sweep")
    axis = check_names(metric, baseline)
    named, of_plans = named_contrasts(targets, contrasts)
    groups = data_sets(targets) if named else {"": targets}
    read = {name: read_observations(group) for name, group in groups.items()}
    chosen = METRICS[metric or _default_metric([one for observations, _ in read.values() for one in observations])]
    by_name: dict[str, Comparison] = {}
    for name, (observations, remarks) in read.items():
        compared = _compare_data_set(observations, chosen, axis, named, base_recipe(groups[name]), method)
        by_name[name] = replace(compared, remarks=[*remarks, *compared.remarks])
    found = next(iter(by_name.values()))
    if len(by_name) > 1:
        found = replace(
            found,
            seeds=min(one.seeds for one in by_name.values()),
            pairs=sum(one.pairs for one in by_name.values()),
            runs=[run for one in by_name.values() for run in one.runs],
            arms=[],
            reference=math.nan,
            prompts=sum(one.prompts for one in by_name.values()),
            kl_prompts=sum(one.kl_prompts for one in by_name.values()),
            power=None,
            best=None,
            contrasts=over_data_sets(by_name, named, chosen, method),
            remarks=[
                f"contrasts alone are averaged over {len(by_name)} data sets; for points, compare each by itself",
                *(f"{name}: {remark}" for name, one in by_name.items() for remark in one.remarks),
            ],
        )
        found = replace(found, verdict=summary.verdict(found))
    nothing = next((one for one in found.contrasts if one.lacking and one.after is None), None)
    if nothing:
        raise UsageError(f"`contrasts` {nothing.text}: {nothing.lacking}; name others")
    return replace(found, remarks=[*found.remarks, *of_plans])


def _default_metric(observations: Sequence[Observation]) -> str:
    """The metric of a comparison for which none was named, which all data sets of it have."""
    ours = [one for one in observations if one.source == "pe-dpo"]
    if not ours:
        return "rewards/accuracies"
    if all(why_missing(METRICS["win_rate"], one) is None for one in ours):
        return "win_rate"
    return "accuracy/shift_per_token" if is_per_token(ours) else "accuracy/shift"


def is_per_token(observations: Sequence[Observation]) -> bool:
    """Return whether all losses were of log-probs per token, so that runs are told apart by these."""
    return all(one.pairs is None or one.pairs.reduce == "mean" for one in observations if one.source == "pe-dpo")


def _compare_data_set(
    observations: Sequence[Observation],
    metric: Metric[Any],
    axis: str,
    contrasts: Sequence[Contrast],
    base: Recipe | None,
    method: Method,
) -> Comparison:
    """Compare runs that were measured on the same held-out pairs.

    Args:
        observations: of them, and of logs of TRL.
        metric: to compare on.
        axis: the baseline as a dotted key, or "step", or "scale".
        contrasts: questions.
        base: the recipe that settings are turned away from; None of logs of TRL alone.
        method: how differences are tested.
    """
    ours = [one for one in observations if one.source == "pe-dpo"]
    usable = [one for one in ours if why_missing(metric, one) is None]
    if ours and not usable:
        raise UsageError(f"`metric` {metric.key}: {why_missing(metric, ours[0])}")
    lacking = next((one for one in ours if one not in usable), None)
    found = Comparison(
        verdict="",
        metric=metric.key,
        title=metric.explanation or metric.title,
        is_share=metric.is_share,
        direction=metric.direction or 0,
        baseline=summary.hyperparameter_name(axis),
        seeds=len({one.seed for one in usable}),
        pairs=0,
        unit=metric.kind.removesuffix("s"),
        repeats=method.repeats,
        confidence=method.confidence,
        equivalent=method.equivalent,
        runs=[_run_row(one, metric.key) for one in observations],
        remarks=summary.metric_remarks(
            metric,
            measured=len(ours),
            lacking=len(ours) - len(usable),
            why=lacking and why_missing(metric, lacking),
            logs=len(observations) - len(ours),
        ),
    )
    if usable:
        assert base is not None, "there are runs"
        resampled = Resampled(usable, metric, repeats=method.repeats, seed=method.seed)
        settings = settings_of(usable)
        axis, remarks = line_axis(axis, [one.settings for one in settings])
        arms = find_arms(resampled, settings, axis, method)
        answers = find_contrasts(resampled, settings, contrasts, base, method)
        asked = [one.effect for one in answers if one.effect is not None and not math.isnan(one.effect.p)]
        if method.pool_seeds:
            remarks.append(summary.pool_remark(arms.pooled))
        found = replace(
            found,
            baseline=summary.hyperparameter_name(axis),
            pairs=resampled.rows,
            arms=arms.arms,
            reference=resampled.reference,
            prompts=resampled.prompts,
            kl_prompts=resampled.kl_prompts,
            power=find_power(asked, metric, rows=resampled.rows, confidence=method.confidence) if answers else arms.power,
            best=arms.best,
            contrasts=answers,
        )
        found = replace(found, remarks=[*found.remarks, *remarks, *summary.arm_remarks(found)])
    return replace(found, verdict=summary.verdict(found))


def check_names(metric: str | None, baseline: str) -> str:
    """Return the key of the baseline's hyperparameter, or "step", or "scale".

    Raises:
        UsageError: there is no such metric or hyperparameter.
    """
    if metric is not None and metric not in COMPARED:
        raise UsageError(f"`metric` {metric}: is not one of {', '.join(COMPARED)}")
    key = SHORT_NAMES.get(baseline, baseline)
    if key not in (*FREE_CONTROLS, *known_keys()):
        names = ", ".join(SHORT_NAMES)
        raise UsageError(
            f"`baseline` {baseline}: is neither {STEP} nor {SCALE}, nor a hyperparameter ({names}), nor a key of a recipe"
        )
    return key


def why_missing(metric: Metric[Any], observation: Observation) -> str | None:
    """Return why an observation has no such metric, with what to do about it, or None if it has."""
    table = observation.rows(metric.kind)
    if table is None and metric.kind == "pairs":
        return f"{observation.run} has no held-out pairs one by one; measure it with pe-dpo eval"
    if table is None:
        return f"{observation.run} has no sampled answers; ask for them with generation.prompts, or with pe-dpo eval"
    gone = [name for name in metric.needs if not table.knows(name)]
    if not gone:
        return None
    remedy = "give pe-dpo eval a scorer" if "score" in gone else "measure it again with pe-dpo eval"
    return f"{observation.run} has no {', '.join(gone)} of its {metric.kind}; {remedy}"


class Arms(NamedTuple):
    """What settings come to."""

    arms: list[Arm]
    power: Power | None
    best: Best | None
    pooled: SeedVariance | None
    """What differences at equal KL tell together of their variance between seeds; None where that was not asked, or they are
    too few."""


def find_arms(resampled: Resampled, settings: Sequence[Setting], axis: str, method: Method) -> Arms:
    """Return what settings come to, what it takes to tell them apart, and the best of them.

    Args:
        resampled: all observations.
        settings: to tell about.
        axis: what alone those turn that make the line of equal KL.
        method: how differences are tested.
    """
    base = base_of(settings)
    line = [one for one in settings if set(one.settings) <= {axis}]
    metric, confidence = resampled.metric, method.confidence

    def effects(differences: Sequence[Differences | None], *, of_kl: bool = False) -> list[Effect | None]:
        return [resampled.effect(one, confidence=confidence, of_kl=of_kl) for one in differences]

    at_equal_kl = [None if one in line else resampled.against_line(one, line) for one in settings]
    matched, pooled = effects(at_equal_kl), None
    if method.pool_seeds:  # direct differences share no line
        matched, pooled = pool_seeds(matched, [one.seeds if one else [] for one in at_equal_kl], confidence=confidence)
    matched = tested_together(matched, confidence=confidence, margins=[method.margin(metric)] * len(matched))
    direct, direct_kl = (
        tested_together(
            effects([None if one == base else resampled.against(one, base, of_kl=of_kl) for one in settings], of_kl=of_kl),
            confidence=confidence,
        )
        for of_kl in (False, True)
    )
    most_seeds = max(len(one.by_seed) for one in settings)
    draws = np.random.default_rng([method.seed, 1]).random((len(resampled.value_replicates), most_seeds))
    values = resampled.over_seeds(settings, draws)
    front = _front(resampled, settings, values, draws, metric.direction)
    arms = []
    for index, one in enumerate(settings):
        own, on_line, found = resampled.values[one.columns], at_equal_kl[index], matched[index]
        arms.append(
            Arm(
                name=summary.setting_name(one.settings),
                settings=one.settings,
                is_baseline=one in line,
                seeds=sorted(one.by_seed),
                value=float(own.mean()),
                value_sd=float(own.std(ddof=1)) if len(own) > 1 else math.nan,
                kl=float(resampled.kl[one.columns].mean()),
                root_kl=float(resampled.roots[one.columns].mean()),
                matched=found,
                seeds_in_range=len(found.per_seed) if found else 0,
                seeds_compared=on_line.compared if on_line else 0,
                gap=on_line.gap if on_line else math.nan,
                seeds_on_chord=on_line.on_chord if on_line else 0,
                direct=direct[index],
                direct_kl=direct_kl[index],
                mcnemar=_mcnemar(resampled, one, base),
                pareto=float(front[index]),
            )
        )
    tested = [one for one in (matched if any(matched) else direct) if one is not None and not math.isnan(one.p)]
    power = find_power(tested, metric, rows=resampled.rows, confidence=confidence)
    return Arms(arms, power, _best(arms, values, metric.direction), pooled)


def find_power(tested: Sequence[Effect], metric: Metric[Any], *, rows: int, confidence: float) -> Power | None:
    """Return what it takes to tell 2 points apart, by the average error of those with most seeds; None of no effect.

    Args:
        tested: effects that are tested together. One of a single seed does not know how much its few seeds scatter.
        metric: of which they are effects.
        rows: pairs or answers that it is made of.
        confidence: of intervals.
    """
    if not tested:
        return None
    seeds, count = max(one.errors.runs for one in tested), len(tested)
    parts = np.mean([one.errors[:4] for one in tested if one.errors.runs == seeds], axis=0).tolist()
    one_of_them = next(one.errors for one in tested if one.errors.runs == seeds)
    errors = one_of_them._replace(**dict(zip(bootstrap.Errors._fields, parts, strict=False)))
    more = errors.with_runs(seeds + 2) if seeds > 1 else None
    return Power(
        unit=metric.kind.removesuffix("s"),
        pairs=rows,
        seeds=seeds,
        comparisons=count,
        needed=rows * bootstrap.prompts_needed(errors, POINTS, confidence=confidence, comparisons=count)
        if metric.is_share
        else math.nan,
        smallest_found=bootstrap.smallest_found(errors, confidence=confidence),
        smallest_in_verdict=bootstrap.smallest_found(errors, confidence=confidence, comparisons=count),
        with_two_more=bootstrap.smallest_found(more, confidence=confidence, comparisons=count) if more else math.nan,
        errors=errors,
        seed_sd=(errors.seeds * seeds) ** 0.5,
    )


def _run_row(one: Observation, name: str) -> RunRow:
    is_ours = one.source == "pe-dpo"

    def value_of(metric: Metric[Any]) -> float:
        if not is_ours:
            return one.logged.get(metric.key, math.nan)
        return math.nan if why_missing(metric, one) else metric(one.rows(metric.kind))

    metrics = {key: value_of(metric) for key, metric in COMPARED.items()}
    return RunRow(
        name=summary.setting_name(one.settings if one.scale is None else {**one.settings, SCALE: one.scale}),
        run=one.run,
        seed=one.seed if is_ours else None,
        step=one.step,
        is_final=one.is_final,
        source=one.source,
        settings=one.settings,
        kl=value_of(METRICS["kl"]),
        value=metrics[name],
        metrics={key: value for key, value in metrics.items() if not math.isnan(value)},
        scale=one.scale,
    )


def line_axis(axis: str, settings: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """Return what makes the line: what was asked for, or what takes no run of its own where only one value of that was run.

    Args:
        axis: what was asked for.
        settings: of all arms.
    """

    def values(key: str, among: Sequence[Mapping[str, Any]]) -> set[str]:
        return {repr(one.get(key, "")) for one in among if set(one) <= {key}}

    ends = [one for one in settings if is_end(one)]
    others = {STEP: "the base point's snapshots (early stopping)", SCALE: "the base point's adapter at other scales"}
    there = [key for key in others if len(values(key, settings)) > 1]
    if axis in FREE_CONTROLS or len(values(axis, ends)) > 1 or not there:
        return axis, []
    return there[0], [
        f"only one value of {summary.hyperparameter_name(axis)} was run with the rest of the base recipe: the line of equal KL "
        f"is made of {others[there[0]]} instead"
    ]


def _front(resampled: Resampled, settings: Sequence[Setting], values: Floats, draws: Floats, direction: int | None) -> Floats:
    """Share of replicates in which each setting is on the front; the reference, which costs nothing, competes too."""
    if not direction:
        return np.full(len(settings), math.nan)
    roots = resampled.over_seeds(settings, draws, of_root=True)
    is_known = ~np.isnan(roots).all(axis=0)
    if not math.isnan(resampled.reference):
        roots, values = np.c_[roots, np.zeros(len(roots))], np.c_[values, resampled.reference_replicates]
    shares = bootstrap.pareto_membership(roots, direction * values)[: len(settings)]
    return np.where(is_known, shares, math.nan)


def _mcnemar(resampled: Resampled, one: Setting, base: Setting) -> dict[str, float] | None:
    """Pairs gained and lost against the base, of one run each; those of a prompt are one draw."""
    metric, twins = resampled.metric, paired_seeds(one.by_seed, base.by_seed)
    if not metric.is_share or metric.kind != "pairs" or not twins or len(one.by_seed) > 1 or one == base:
        return None
    tables = [resampled.observations[column].pairs for column in (one.by_seed[twins[0][0]], base.by_seed[twins[0][1]])]
    assert metric.numerator is not None, "what is compared has rows"
    ours, theirs = (metric.numerator(table) for table in tables)
    return changed_sides(theirs, ours, tables[0].prompt_key if tables[0] else ())._asdict()


def _best(arms: Sequence[Arm], values: Floats, direction: int | None) -> Best | None:
    """The best of all ends of runs; snapshots and scaled adapters are no candidates of their own."""
    ends = [index for index, arm in enumerate(arms) if is_end(arm.settings)]
    if not direction or len(ends) < 2:
        return None
    means = direction * np.array([arms[index].value for index in ends])
    optimism = bootstrap.optimism_of_best(means, direction * values[:, ends])
    best = int(means.argmax())
    return Best(
        name=arms[ends[best]].name,
        points=len(ends),
        value=float(direction * means[best]),
        optimism=optimism,
        corrected=float(direction * (means[best] - optimism)),
    )

"""The page of a sweep: what can and cannot be told apart, every run shown, finished or not."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pe_dpo.errors import UsageError
from pe_dpo.experiments.comparison import Comparison, Method, RunRow
from pe_dpo.experiments.sides import compare_observed_sides
from pe_dpo.experiments.summary import best_line, hyperparameter_name, power_lines
from pe_dpo.metrics.bootstrap import Effect
from pe_dpo.metrics.catalogue import METRICS
from pe_dpo.printable import counted
from pe_dpo.recipe import describe, describe_sources, recipe_to_yaml
from pe_dpo.report.content import Page, PageSection, PageTable
from pe_dpo.report.style import fmt
from pe_dpo.report.sweep_plots import (
    equal_kl_section,
    frontier_section,
    kappa_section,
    measures_section,
    seeds_section,
)
from pe_dpo.report.sweep_record import REPEATS, SweepRecord
from pe_dpo.runs.run import RunInfo

ACCURACIES = ("accuracy/policy", "accuracy/policy_per_token")
"""Metrics in the tables of points and of runs, whichever is compared."""


def report_sweep(folder: Path, *, metric: str | None = None, baseline: str = "beta") -> Page:
    """Return the report of a sweep, whether all of its runs are finished or none.

    Args:
        folder: with sweep.json.
        metric: to compare on; see `compare`.
        baseline: the hyperparameter that others are held against at equal KL.

    Raises:
        UsageError: sweep.json is torn.
    """
    sweep = SweepRecord(folder, metric=metric, baseline=baseline)
    comparison = sweep.comparison
    rest = [run.info.status for run in sweep.runs if run.info.status != "finished"]
    standing = f"All {len(sweep.runs)} planned runs are finished and shown below."
    if rest:
        counts = ", ".join(f"{rest.count(status)} {status}" for status in dict.fromkeys(rest))
        finished = len(sweep.runs) - len(rest)
        standing = f"Of {len(sweep.runs)} planned runs {finished} are finished; {counts}. All are named below."
    alarms = [f"Warning: {remark.removesuffix('.')}." for remark in (comparison.remarks if comparison else [])]
    sections = []
    if comparison is not None:
        sections += [
            _points_section(sweep, comparison),
            equal_kl_section(comparison),
            frontier_section(sweep, comparison),
            _sides_section(sweep, comparison),
            seeds_section(sweep, comparison),
            kappa_section(sweep),
            measures_section(sweep, comparison),
        ]
        sections[:0] = [_contrasts_section(comparison)] if comparison.contrasts else []
    sections += [_limits_section(sweep), _runs_section(sweep), _plan_section(sweep)]
    records: list[dict[str, Any]] = []  # of results.jsonl; what is not known is null
    for run in sweep.runs:
        measured = {"kl": run.row.kl, **run.row.metrics} if run.row else {}
        records.append({
            "point": run.name,
            "settings": run.row.settings if run.row else None,
            "seed": run.seed,
            "folder": str(run.folder.relative_to(sweep.folder)),
            "status": run.info.status,
            "why": run.info.why or None,
            "steps": run.info.step or None,
            "seconds": run.info.seconds or None,
            "kappa": None if math.isnan(run.kappa) else run.kappa,
            "metrics": {key: value for key, value in measured.items() if math.isfinite(value)},
        })  # fmt: skip
    verdict = comparison.verdict if comparison else f"Nothing can be compared yet: {sweep.why_not}."
    return Page(f"Sweep {folder.resolve().name}", verdict, [standing], sections, alarms, records)


def _plan_section(sweep: SweepRecord) -> PageSection:
    recipe = sweep.recipe
    loss = describe(recipe.loss, recipe.data.pair_columns)
    info = sweep.finished[0].info if sweep.finished else RunInfo()
    pairs, versions = info.pairs, info.versions
    seeds = sorted({run.seed for run in sweep.runs})
    turned: dict[str, list[str]] = {}
    for run in sweep.runs:
        for key, value in (run.row.settings if run.row else {}).items():
            turned.setdefault(hyperparameter_name(key), []).append(f"{value:g}" if isinstance(value, float) else str(value))
    rows = [
        ("Base", recipe.model.base),
        ("Data", describe_sources(recipe.data.train)),
        ("Pairs", f"{pairs['train']} to train on, {pairs['held_out']} held out" if pairs else ""),
        ("Base recipe's loss", loss.formula),
        ("Equals", loss.equals),
        ("Hyperparameters varied", "; ".join(f"{name} {', '.join(dict.fromkeys(values))}" for name, values in turned.items())),
        ("Seeds", f"{len(seeds)} ({', '.join(map(str, seeds))})"),
        ("Runs", str(len(sweep.runs))),
        ("Versions", ", ".join(f"{key} {value}" for key, value in versions.items() if key != "platform")),
    ]
    folded = [("Base recipe", recipe_to_yaml(recipe).rstrip())]
    return PageSection("plan", "What was run", facts=[row for row in rows if row[1]], folded=folded, is_folded=True)


def _contrasts_section(comparison: Comparison) -> PageSection:
    """The questions that the sweep was run for."""
    scale, form = (100, "+.1f") if comparison.is_share else (1, "+.3g")
    rows = []
    for one in comparison.contrasts:
        found = one.effect
        cells = ["not compared", "–", "–", "–", "–"]
        if found is not None:
            ends = [
                fmt(scale * value, form) for value in (found.estimate, found.low, found.high, found.inner_low, found.inner_high)
            ]
            cells = [
                f"{ends[0]} (one seed)" if math.isnan(found.low) else f"{ends[0]} [{ends[1]}, {ends[2]}]",
                fmt(found.p_adjusted, ".2g"),
                fmt(scale * found.margin, "g"),
                "–" if math.isnan(found.margin) else f"[{ends[3]}, {ends[4]}]",
                fmt(found.p_equivalent_adjusted, ".2g"),
            ]
        named = "not with the sweep" if one.after is None else f"after {one.after} runs" if one.after else "before any run"
        rows.append([one.name, *cells, named])
    level = 100 * (1 - comparison.confidence)
    unit = ", points" if comparison.is_share else ""
    header = ["contrast", f"{comparison.metric}{unit}", "p (Holm)", "margin", f"{100 - 2 * level:g} % interval"]
    table = PageTable(
        "contrasts",
        f"{counted(len(rows), 'contrast')}, tested by themselves",
        [*header, "p of equivalence (Holm)", "named"],
        rows,
        f"Each is the mean over its points, seed by seed, with {100 - level:g} % interval. Equivalence: two one-sided tests; "
        "the difference is shown to be smaller than the margin where their interval lies within it.",
    )
    return PageSection("contrasts", "What was asked", tables=[table])


def _points_section(sweep: SweepRecord, comparison: Comparison) -> PageSection:
    """Two tables of the points: effect at equal KL and KL; then accuracy, length, entropy, cost."""
    base = next(arm for arm in comparison.arms if arm.direct is None)
    base_tokens = _mean(sweep.rows_of(base), "tokens")
    has_wins = any(run.row is not None and "win_rate" in run.row.metrics for run in sweep.runs)
    form = ".3f" if comparison.is_share else ".4f"
    rows, measures = [], []
    for number, arm in enumerate(comparison.arms, start=1):
        measured = sweep.rows_of(arm)
        seconds = [run.info.seconds or math.nan for run in sweep.runs_of(arm)]
        tokens = _mean(measured, "tokens")
        effect = "baseline" if arm.is_baseline else "–"
        if arm.matched is not None:
            numbers = (arm.matched.estimate, arm.matched.low, arm.matched.high)
            estimate, low, high = (fmt(100 * value, "+.1f") if comparison.is_share else fmt(value, "+.3g") for value in numbers)
            effect = f"{estimate} (one seed)" if math.isnan(arm.matched.low) else f"{estimate} [{low}, {high}]"
        spread = "" if math.isnan(arm.value_sd) else f" ± {fmt(arm.value_sd, form)}"
        rows.append([
            arm.name,
            str(number),
            str(len(arm.seeds)),
            f"{fmt(arm.value, form)}{spread}",
            fmt(arm.kl, ".4f"),
            _kl_difference(arm.direct_kl),
            effect,
            f"{arm.seeds_in_range} of {arm.seeds_compared}" if arm.seeds_compared else "–",
            fmt(arm.matched.p_adjusted, ".2g") if arm.matched else "–",
            fmt(arm.pareto, ".2f"),
        ])  # fmt: skip
        measures.append([
            arm.name,
            *(fmt(_mean(measured, key), ".3f") for key in ACCURACIES),
            *([fmt(_mean(measured, "win_rate"), ".3f")] if has_wins else []),
            fmt(tokens, ".2f"),
            fmt(tokens - base_tokens, "+.2f"),
            fmt(_mean(measured, "entropy_per_token"), ".3f"),
            fmt(sum(seconds) / len(seconds) if seconds else math.nan, ".0f"),
        ])  # fmt: skip
    unit = ", points" if comparison.is_share else ""
    compared = PageTable(
        "points",
        f"{counted(len(rows), 'point')}, means over seeds",
        [
            "point",
            "no.",
            "seeds",
            comparison.metric,
            "KL, nats",
            "Δ KL",
            f"Δ at equal KL{unit}",
            "in range",
            "p (Holm)",
            "Pareto",
        ],
        rows,
        f"{comparison.metric}: {comparison.title}; ± is the standard deviation between seeds. Δ KL: against {base.name}. Δ at "
        f"equal KL: minus {comparison.baseline} at the same √KL, with {100 * comparison.confidence:g} % interval, never "
        "extrapolated; in range: for how many seeds. Pareto: share of replicates in which no other point has as small a KL and "
        "as good a value. – stands for what was not measured.",
    )
    accuracies = [*(METRICS[key].title for key in ACCURACIES), *(["win rate"] if has_wins else [])]
    measured_too = PageTable(
        "points-more",
        "The same points: what else was measured, means over seeds",
        ["point", *accuracies, "tokens", "Δ tokens", "entropy", "seconds"],
        measures,
        f"Accuracy: share of held-out pairs with Δπ > 0. Δ tokens: against {base.name}. Seconds: of training.",
    )
    return PageSection("points-table", "Points", tables=[compared, measured_too])


def _kl_difference(found: Effect | None) -> str:
    """How much further than the base recipe a point went, with its interval."""
    if found is None:
        return "–"
    interval = "(one seed)" if math.isnan(found.low) else f"[{fmt(found.low, '+.2f')}, {fmt(found.high, '+.2f')}]"
    return f"{fmt(found.estimate, '+.2f')} {interval}"


def _mean(rows: Sequence[RunRow], key: str) -> float:
    values = [row.metrics.get(key, math.nan) for row in rows]
    return sum(values) / len(values) if values else math.nan


def _sides_section(sweep: SweepRecord, comparison: Comparison) -> PageSection:
    """The metric of each point where the reference ranks a pair right and where it ranks it wrong."""
    title = "Where the reference is right, and where it is wrong"
    metric = comparison.metric if METRICS[comparison.metric].kind == "pairs" else None
    try:
        method = Method(REPEATS, confidence=comparison.confidence)
        found = compare_observed_sides({"": sweep.observations}, by="reference", metric=metric, method=method)
    except UsageError as error:
        return PageSection("sides", title, missing=[str(error)])
    scale, form = (100, ".1f") if found.is_share else (1, ".3g")

    def cell(one: Effect | None, sign: str = "") -> str:
        if one is None:
            return "–"
        value, low, high = (fmt(scale * number, f"{sign}{form}") for number in (one.estimate, one.low, one.high))
        return f"{value} (one seed)" if math.isnan(one.low) else f"{value} [{low}, {high}]"

    rows = []
    for one in found.points:
        p = "–" if one.gap_direct is None else fmt(one.gap_direct.p_adjusted, ".2g")
        rows.append([one.name, cell(one.right), cell(one.wrong), cell(one.gap, "+"), cell(one.gap_direct, "+"), p])
    counts, base = found.points[0].pairs, next(one.name for one in found.points if one.gap_direct is None)
    way = "log-probs per token" if found.per_token else "summed log-probs"
    table = PageTable(
        "sides",
        f"{found.metric}{', points,' if found.is_share else ''} by what π0 ranks right and wrong ({way})",
        [
            "point",
            f"π0 right ({counts['right']:g})",
            f"π0 wrong ({counts['wrong']:g})",
            "wrong − right",
            f"minus {base}",
            "p (Holm)",
        ],
        rows,
        "One share of all pairs averages both sides, which may move apart. Means over seeds, with "
        f"{100 * found.confidence:g} % intervals over prompts and seeds; the gap and its difference from that of {base} "
        "are paired by seed and prompt.",
    )
    return PageSection("sides", title, tables=[table])


def _runs_section(sweep: SweepRecord) -> PageSection:
    """The table of all runs, of their earlier and scaled states, and the names of those that are not finished."""
    metric = sweep.comparison.metric if sweep.comparison else "accuracy/policy"
    header = ["run", "seed", "status", "steps", metric, "KL, nats", *(METRICS[key].title for key in ACCURACIES)]
    header += ["loss", "tokens", "entropy", "seconds"]
    rows = []
    for run in sweep.runs:
        kl = run.row.kl if run.row else math.nan
        value = run.row.value if run.row else run.measured(metric)
        rows.append([
            run.name,
            str(run.seed),
            run.info.status,
            str(run.info.step or "–"),
            fmt(value, ".4f"),
            fmt(kl, ".4f"),
            *(fmt(run.measured(key), ".3f") for key in ACCURACIES),
            fmt(run.measured("loss"), ".4f"),
            fmt(run.measured("tokens"), ".2f"),
            fmt(run.measured("entropy_per_token"), ".3f"),
            fmt(run.info.seconds or math.nan, ".0f"),
        ])  # fmt: skip
    note = "– stands for what was not measured."
    if any(math.isfinite(run.margin_noise) for run in sweep.runs):
        header.append("mask noise")
        rows = [[*row, fmt(run.margin_noise, ".3f")] for row, run in zip(rows, sweep.runs, strict=True)]
        note += " Mask noise: how far a mask of mixout moves a pair's score, in units of what training moved it (margin_noise)."
    tables = [PageTable("runs", f"All {len(rows)} planned runs", header, rows, note)]
    others = [row for row in (sweep.comparison.runs if sweep.comparison else []) if not row.is_final]
    for name, rest, words in (
        ("snapshots", [row for row in others if row.scale is None], "earlier states of these runs (snapshots)"),
        ("scaled", [row for row in others if row.scale is not None], "adapters of these runs, scaled toward the reference"),
    ):
        if rest:
            cells = [
                [
                    row.name,
                    str(row.seed),
                    str(row.step),
                    fmt(row.value, ".4f"),
                    fmt(row.kl, ".4f"),
                    fmt(_mean([row], "tokens"), ".2f"),
                ]
                for row in rest
            ]
            header = ["run", "seed", "step", metric, "KL, nats", "tokens"]
            tables.append(PageTable(name, f"{len(rest)} {words}", header, cells, is_folded=True))
    missing = []
    for run in sweep.runs:
        if run.info.status != "finished":
            why = f" ({run.info.why})" if run.info.why else ""
            place = run.folder.relative_to(sweep.folder)
            missing.append(f"{place}: {run.info.status}{why}; start the same `pe-dpo sweep` again to go on with it.")
    return PageSection("runs-table", "All runs", tables=tables, missing=missing, is_folded=not missing)


def _limits_section(sweep: SweepRecord) -> PageSection:
    sentences = [
        "One base, one data set: what holds here is not shown for others. Held-out pairs say how answers are ranked; what the "
        "policy writes by itself is in KL, length and, where a scorer was given, win rate."
    ]
    comparison = sweep.comparison
    if comparison:
        lines = [f"{line[:1].upper()}{line[1:]}." for line in power_lines(comparison)]
        sentences += [*lines, "Smaller ones may be there unseen."] if lines else []
    if comparison and (line := best_line(comparison)):
        sentences.append(f"{line[:1].upper()}{line[1:]}.")
    missing = []
    if len({run.seed for run in sweep.runs}) == 1:
        missing.append("how much seeds matter: every point has one seed; add some with `pe-dpo sweep … --seeds 3`.")
    return PageSection("limits", "What this cannot show", sentences, missing=missing)

"""`pe-dpo compare`."""

import json as json_module
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pe_dpo.cli import console
from pe_dpo.printable import printable_json

if TYPE_CHECKING:
    from pe_dpo.experiments.comparison import Comparison
    from pe_dpo.experiments.sides import SideComparison
    from pe_dpo.metrics.bootstrap import Effect
    from pe_dpo.metrics.sides import By

TARGETS = "Run folders, the folder of a sweep, or logs of TRL (trainer_state.json)."
METRIC = (
    "accuracy/shift, accuracy/policy, win_rate, nll/chosen_per_token, …; default: win_rate where scored, "
    "else accuracy/shift (per token where the loss is)."
)
_BESIDE = ("accuracy/shift", "accuracy/policy", "rewards/accuracies", "win_rate")
"""Metrics in the table of all runs, whichever is compared."""
BASELINE = "What others are held against: beta, mixout, lr, a dotted key, step (early stopping), scale (of adapters)."
CONTRAST = (
    'A question beside those of the sweep, as "mixout against beta within 2": its points averaged, then tested. Repeatable. '
    "Sweeps of several data sets are averaged too."
)
POOL_SEEDS = "Take the variance between seeds from all points at equal KL together (moderated t), where they scatter alike."
BY = "reference or policy: tell the metric apart where that model ranks a pair right and where wrong, with the gap."
EQUIVALENT = "Points of a share (or units) that count as no difference: say what lies within them, too."


def compare(
    targets: Annotated[list[Path], typer.Argument(help=TARGETS, metavar="RUNS|SWEEP")],
    metric: Annotated[str | None, typer.Option(help=METRIC)] = None,
    baseline: Annotated[str, typer.Option(help=BASELINE)] = "beta",
    confidence: Annotated[float, typer.Option(help="Confidence of the intervals and of the verdict.")] = 0.95,
    repeats: Annotated[int, typer.Option(help="Replicates of the bootstrap.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    contrast: Annotated[list[str] | None, typer.Option(help=CONTRAST)] = None,
    equivalent: Annotated[float | None, typer.Option(help=EQUIVALENT)] = None,
    by: Annotated[str | None, typer.Option(help=BY)] = None,
    pool_seeds: Annotated[bool, typer.Option("--pool-seeds", help=POOL_SEEDS)] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what can and cannot be told apart between runs: paired, at equal KL, all runs shown.

    A run can look better because it went further from the reference. So each is held against the runs of the baseline (β)
    at its own KL, seed by seed and pair by pair, between their KLs and never beyond.

    The metric must not depend on what is compared. Reward accuracy contains β and γ themselves. accuracy/shift, the share of
    pairs whose preference moved towards the chosen answer, does not, though it is what γ = β trains towards; accuracy/policy,
    the share ranked right, is what γ = 0 trains towards, and the lengths of answers decide most of it. A win rate knows nothing
    of the loss.

    Where a sweep carries contrasts, the verdict is about those alone: few questions named beforehand find smaller differences
    than all points at once.
    """
    from pe_dpo.experiments.compare import compare as run
    from pe_dpo.experiments.summary import best_line, power_lines
    from pe_dpo.metrics.catalogue import METRICS

    found = run(
        list(targets),
        metric=metric,
        baseline=baseline,
        confidence=confidence,
        repeats=repeats,
        seed=seed,
        contrasts=contrast or (),
        equivalent=equivalent,
        pool_seeds=pool_seeds,
    )
    sides = None
    if by is not None:
        from pe_dpo.experiments.sides import compare_sides

        asked = metric or (None if METRICS[found.metric].kind == "answers" else found.metric)
        sides = compare_sides(list(targets), by=cast("By", by), metric=asked, repeats=repeats, seed=seed, confidence=confidence)
    if json:
        parts = {"sides": sides.to_dict()} if sides else {}
        typer.echo(
            printable_json(json_module.dumps({**found.to_dict(), **parts}, indent=1, ensure_ascii=False, allow_nan=False))
        )
        return

    console.show_lines([found.verdict])
    _show_contrasts(found)
    if sides:
        _show_sides(sides)
    _show_arms(found)
    _show_direct(found)
    _show_runs(found)
    console.show_lines([*power_lines(found), *([best_line(found)] if found.best is not None else [])])
    for remark in found.remarks:
        console.warn(f"{remark}")


def _show_contrasts(found: "Comparison") -> None:
    """Each contrast over its points, and over each data set where there are several."""
    rows = []
    for one in found.contrasts:
        effects = {one.name: one.effect, **{f"  on {name}": effect for name, effect in one.by_data_set.items()}}
        for name, effect in effects.items():
            if effect is None:
                rows.append([name, "not compared", *[""] * 4])
                continue
            scale, form = (100, "+.1f") if found.is_share else (1, "+.3g")
            inner = f"{scale * effect.inner_low:{form}} to {scale * effect.inner_high:{form}}"
            within = ["", ""] if math.isnan(effect.margin) else [inner, _number(effect.p_equivalent_adjusted, ".3f")]
            rows.append([name, *_difference_cells(found, effect), *within])
    if not rows:
        return
    level = 1 - found.confidence
    header = ["contrast", _title(found.metric), f"{100 * found.confidence:g} % CI", "p (Holm)"]
    header += [f"{100 * (1 - 2 * level):g} % CI", "p of equivalence"] if any(row[4] for row in rows) else []
    console.show_table("contrasts, tested by themselves", header, [row[: len(header)] for row in rows])


def _show_sides(found: "SideComparison") -> None:
    """Each point where the reference, or the policy, ranks right and where wrong, and the gap."""
    from pe_dpo.metrics.sides import RANKINGS, SIDES

    scale, form, ends = (100, ".1f", ".0f") if found.is_share else (1, ".3g", ".3g")

    def cell(one: "Effect | None", sign: str = "") -> str:
        if one is None:
            return "–"
        interval = "one seed" if math.isnan(one.low) else f"{scale * one.low:{sign}{ends}}, {scale * one.high:{sign}{ends}}"
        return f"{scale * one.estimate:{sign}{form}} [{interval}]"

    name, rows, names = RANKINGS[found.by], [], []
    for side in SIDES:
        counts = {round(point.pairs[side], 1) for point in found.points}
        names.append(f"{name} {side}{f' ({counts.pop():g})' if len(counts) == 1 else ''}")
    for point in found.points:
        more = ["", ""]
        if point.gap_direct is not None:
            more = [cell(point.gap_direct, "+"), _number(point.gap_direct.p_adjusted, ".3f")]
        rows.append([point.name, cell(point.right), cell(point.wrong), cell(point.gap, "+"), *more])
    way = "per token" if found.per_token else "by summed log-probs"
    unit = "in points with" if found.is_share else "with"
    title = f"{_title(found.metric)} where {name} ranks right and where wrong ({way}),"
    title += f"\n{unit} {100 * found.confidence:g} % intervals"
    bases = [point.name for point in found.points if point.gap_direct is None]
    minus = f"minus {bases[0]}" if len(bases) == 1 else "minus base's"  # several data sets have one each
    console.show_table(title, ["point", *names, "wrong − right", minus, "p (Holm)"], rows)


def _show_arms(found: "Comparison") -> None:
    """Each point over its seeds, against the baseline at equal KL."""
    if not found.arms:
        return
    title = f"{_title(found.metric)} ({found.metric}): {found.title}"
    title += f"\nagainst {found.baseline} at equal KL; sd is that between seeds"
    title += "; all in points" if found.is_share else ""
    scale, form, of_sd = (100, ".1f", ".1f") if found.is_share else (1, ".4g", ".3g")
    rows = []
    for arm in found.arms:
        where = "on the line" if arm.is_baseline else "out of range" if arm.seeds_compared else ""
        matched = [where, "", "", ""]
        if arm.matched is not None and not arm.is_baseline:
            matched = [*_difference_cells(found, arm.matched), _number(scale * arm.matched.seed_sd, of_sd)]
        numbers = (_number(arm.root_kl, ".3f"), _number(scale * arm.value, form), _number(scale * arm.value_sd, form))
        rows.append([arm.name, *numbers, *matched, _number(100 * arm.pareto, ".0f", " %")])
    interval = f"{100 * found.confidence:g} % CI"
    header = ["point", "√KL", "value", "sd", "at equal KL", interval, "p (Holm)", "sd at equal KL", "on front"]
    known = [at for at in range(len(header)) if at == 0 or any(row[at] for row in rows)]  # none could be matched, or one seed
    console.show_table(title, [header[at] for at in known], [[row[at] for at in known] for row in rows])


def _show_direct(found: "Comparison") -> None:
    """Each point against the base point, both at their own KL."""
    rows = []
    for arm in found.arms:
        if arm.direct is None:
            continue
        kl, changed = arm.direct_kl, arm.mcnemar
        of_kl = ["", ""]
        if kl is not None:
            of_kl = [f"{kl.estimate:+.3f}", "one seed" if math.isnan(kl.low) else f"{kl.low:+.3f} to {kl.high:+.3f}"]
        pairs = "" if changed is None else f"{changed['gained']:.0f}, {changed['lost']:.0f} (p {changed['p']:.3f})"
        rows.append([arm.name, *_difference_cells(found, arm.direct), *of_kl, pairs])
    if not rows:
        return
    base = next(arm.name for arm in found.arms if arm.direct is None)
    interval = f"{100 * found.confidence:g} % CI"
    header = ["point", _title(found.metric), interval, "p (Holm)", "KL", f"KL, {interval}"]
    header += ["gained, lost (McNemar)"] if any(arm.mcnemar for arm in found.arms) else []
    console.show_table(f"minus {base}, each at its own KL", header, [row[: len(header)] for row in rows])


def _difference_cells(found: "Comparison", one: "Effect") -> list[str]:
    """Estimate, interval, adjusted p."""
    scale, form = (100, "+.1f") if found.is_share else (1, "+.3g")
    interval = "one seed" if math.isnan(one.low) else f"{scale * one.low:{form}} to {scale * one.high:{form}}"
    return [f"{scale * one.estimate:{form}}", interval, _number(one.p_adjusted, ".3f")]


def _show_runs(found: "Comparison") -> None:
    """All runs and all their snapshots and scaled adapters, one by one."""
    known = [key for key in _BESIDE if key != found.metric and any(key in run.metrics for run in found.runs)]
    rows = []
    for run in found.runs:
        step = f"{run.step}" if run.is_final or run.scale is not None else f"{run.step}, early"
        numbers = [run.value, *(run.metrics.get(key, math.nan) for key in known)]
        seed = "" if run.seed is None else str(run.seed)
        rows.append([run.name, seed, step, _number(run.kl, ".3f"), *(_number(value, ".4f") for value in numbers)])
    header = ["all runs", "seed", "step", "KL", *map(_title, (found.metric, *known))]
    title = "1 measured policy" if len(found.runs) == 1 else f"{len(found.runs)} measured policies"
    console.show_table(title, header, rows, names=3)


def _title(metric: str) -> str:
    """Return what a metric is called, by its key."""
    from pe_dpo.metrics.catalogue import METRICS

    return METRICS[metric].title


def _number(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{form}}{unit}"

"""What the arms of a sweep came to, as figures: the frontier, differences at equal KL, κ, seeds, length, displacement."""

import math
from collections.abc import Callable, Sequence

from pe_dpo.experiments.comparison import Arm, Comparison, Difference
from pe_dpo.experiments.wording import SCALE, dial_name, is_end, point_name
from pe_dpo.report.content import Plot, Section
from pe_dpo.report.run_outcome import signed_text
from pe_dpo.report.style import BLUE, BROWN, CROSS, MARKERS, SERIES, VERMILLION
from pe_dpo.report.sweep_plots import (
    MOST_CURVES,
    Group,
    KappaCurve,
    Look,
    Mark,
    Point,
    Row,
    against_kappa,
    frontier,
    numbered,
    rows_figures,
)
from pe_dpo.report.sweep_record import RunState, SweepRecord

ANSWERS = "`pe-dpo eval RUN --prompts 64` for each run, or generation.prompts in the recipe of the sweep."
NO_KL = f"KL(π‖π0) was not measured, so arms cannot be held against each other at equal KL; sample answers: {ANSWERS}"
SCALED = "scaled adapter"
"""Arms that are others, scaled toward the reference."""


def frontier_section(sweep: SweepRecord, comparison: Comparison) -> Section:
    """Return the metric against √KL."""
    title = f"Frontier: {comparison.metric} against √KL"
    arms = [arm for arm in comparison.arms if not math.isnan(arm.root_kl)]
    if not arms:
        return Section("frontier", title, missing=[NO_KL])
    groups = _groups(sweep, comparison)
    figure = frontier(
        groups,
        _baseline_line(comparison),
        comparison.metric,
        snapshots=[
            (_root(row.kl), row.value)
            for row in comparison.runs
            if not row.is_final and row.scale is None and not math.isnan(row.kl + row.value)
        ],
    )
    numbers = "; numbers as in the table of arms" if numbered(groups) else ""
    scaled = " ×: adapters scaled toward the reference, which takes no training." if SCALED in _looks(comparison) else ""
    ends = f"√KL from {min(arm.root_kl for arm in arms):.2g} to {max(arm.root_kl for arm in arms):.2g}"
    values = f"{comparison.metric} from {min(arm.value for arm in arms):.3g} to {max(arm.value for arm in arms):.3g}"
    plot = Plot(
        "frontier",
        figure,
        f"{_capital(comparison.title)}. Large: arms, mean over seeds, with 95 % intervals both ways{numbers}. Small: every "
        f"run.{scaled} Dark line: the {comparison.baseline} dial, against which others are held. An arm above "
        "it gets more for its KL, if the intervals allow to say so; bars may leave the panel.",
        f"Scatter of {len(arms)} arms, {ends}, {values}.",
        is_wide=True,
    )
    return Section("frontier", title, plots=[plot])


def equal_kl_section(comparison: Comparison) -> Section:
    """Return differences at equal KL; where there are none, differences to the base recipe."""
    title = "Differences at equal KL"
    looks = _looks(comparison)
    rows = [_row(comparison, arm, arm.matched, looks) for arm in comparison.arms if not arm.is_baseline]
    if any(arm.matched for arm in comparison.arms):
        names = [arm.name for arm in comparison.arms if arm.matched and arm.matched.p_adjusted < 1 - comparison.confidence]
        caption = (
            f"{comparison.metric} minus the {comparison.baseline} dial at the same √KL, mean over seeds with "
            f"{100 * comparison.confidence:g} % interval over prompts and seeds; ticks are seeds. Filled: told apart after "
            f"Holm's correction ({len(names)} of {sum(arm.matched is not None for arm in comparison.arms)}). Never "
            "extrapolated: arms whose √KL the dial did not reach have no difference."
        )
        return Section("equal-kl", title, plots=_row_plots("matched", rows, _unit(comparison), caption, level=0.0))
    missing = [_why_unmatched(comparison)]
    rows = [_row(comparison, arm, arm.direct, looks) for arm in comparison.arms if arm.direct]
    if not rows:
        return Section("equal-kl", title, missing=missing)
    caption = (
        f"{comparison.metric} minus that of the base recipe, each at its own KL, with {100 * comparison.confidence:g} % "
        "interval: an arm that went further from the reference may be ahead for that alone."
    )
    return Section("equal-kl", title, plots=_row_plots("direct", rows, _unit(comparison), caption, level=0.0), missing=missing)


def kappa_section(sweep: SweepRecord) -> Section:
    """Return KL and entropy against κ, all else equal."""
    title = "What γ does to the distance and to the entropy"
    plots = []
    for name, ylabel, words, theory, value in (
        ("kl-kappa", "KL(π‖π0), nats per answer", "KL from the reference", _KL_THEORY, _kl),
        ("entropy-kappa", "entropy, nats per token", "Entropy of the policy", _ENTROPY_THEORY, _entropy),
    ):
        curves = _kappa_curves(sweep, value)
        if curves:
            plots.append(
                Plot(
                    name,
                    against_kappa(curves, ylabel),
                    f"{words} against κ = γ/β, all other dials equal; dots are runs, lines join means over seeds (least at κ = "
                    f"{_argmin(curves[0]):g} for {curves[0].label}). {theory}",
                    f"{len(curves)} lines of {words} over κ: {_curve_words(curves[0])}.",
                )
            )
    missing = []
    if not plots:
        values = {state.kappa for state in sweep.finished if not math.isnan(state.kappa)}
        if len(values) < 2:
            missing.append("γ was not turned alone in this sweep, so there is nothing over κ; add --grid gamma=0,0.5x,1x,2x.")
        else:
            missing.append(NO_KL)
    return Section("kappa", title, plots=plots, missing=missing)


def seeds_section(sweep: SweepRecord, comparison: Comparison) -> Section:
    """Return how much seeds matter, arm by arm."""
    looks = _looks(comparison)
    rows = []
    for arm in _ends(comparison):
        values = [row.value for row in sweep.rows_of(arm)]
        rows.append(Row(arm.name, [Mark(looks[_dials(comparison, arm)], arm.value, math.nan, math.nan, values)]))
    missing = []
    if max((len(arm.seeds) for arm in comparison.arms), default=0) < 2:
        missing.append("the spread between seeds: every arm has one; add some with `pe-dpo sweep … --seeds 3`.")
    spreads = [arm.value_sd for arm in comparison.arms if not math.isnan(arm.value_sd)]
    words = f" Standard deviation between seeds: median {sorted(spreads)[len(spreads) // 2]:.3g}." if spreads else ""
    caption = f"{comparison.metric} of every run (ticks) and the mean of each arm.{words}"
    level = None if math.isnan(comparison.reference) else comparison.reference
    return Section(
        "seeds", "Spread between seeds", plots=_row_plots("seeds", rows, comparison.metric, caption, level), missing=missing
    )


def measures_section(sweep: SweepRecord, comparison: Comparison) -> Section:
    """Return length of answers and displacement, arm by arm."""
    plots, missing = [], []
    looks = _looks(comparison)
    length = _measure_rows(sweep, comparison, [("", looks, lambda state: _metric(state, "tokens"))])
    if length:
        plots += _row_plots(
            "length", length, "tokens of an answer", "Length of sampled answers: runs (ticks) and mean of each arm."
        )
    else:
        missing.append(f"how long answers are: none were sampled; {ANSWERS}")
    sides = {"chosen": Look(BLUE, MARKERS[0]), "rejected": Look(VERMILLION, MARKERS[1])}
    kinds = [
        (side, dict.fromkeys(looks, look), lambda state, side=side: state.after(f"displacement/{side}"))
        for side, look in sides.items()
    ]
    moved = _measure_rows(sweep, comparison, kinds)
    if moved:
        caption = (
            "log π − log π0 of held-out chosen and rejected answers: runs (ticks) and mean of each arm. Left of 0 they became "
            "less likely."
        )
        figures = rows_figures(moved, "nats per answer", level=0.0, legend=sides)
        plots += _as_plots("displacement", figures, caption, _rows_words(moved))
    else:
        missing.append("displacement: no run has its reference on held-out pairs; measure it with `pe-dpo eval RUN`.")
    return Section("measures", "Length and displacement", plots=plots, missing=missing)


def _measure_rows(
    sweep: SweepRecord,
    comparison: Comparison,
    kinds: Sequence[tuple[str, dict[str, Look], Callable[[RunState], float]]],
) -> list[Row]:
    """A row for each arm in which some run has the quantity; empty if none has."""
    rows = []
    for arm in _ends(comparison):
        marks = []
        for _, looks, value in kinds:
            values = [found for state in sweep.runs_of(arm) if not math.isnan(found := value(state))]
            if values:
                marks.append(Mark(looks[_dials(comparison, arm)], sum(values) / len(values), math.nan, math.nan, values))
        rows.append(Row(arm.name, marks, "" if marks else "not measured"))
    return rows if any(row.marks for row in rows) else []


def _groups(sweep: SweepRecord, comparison: Comparison) -> list[Group]:
    looks = _looks(comparison)
    members: dict[str, list[int]] = {name: [] for name in looks}
    for index, arm in enumerate(comparison.arms):
        if not math.isnan(arm.root_kl):
            members[_dials(comparison, arm)].append(index)
    crosses = sweep.crosses
    groups = []
    for name, indices in members.items():
        points, runs = [], []
        for index in indices:
            arm, cross = comparison.arms[index], crosses[index]
            points.append(
                Point(index + 1, arm.root_kl, arm.value, cross.root_kl_low, cross.root_kl_high, cross.low, cross.high)
            )
            runs += [(_root(row.kl), row.value) for row in sweep.rows_of(arm)]
        if points:
            groups.append(Group(name, looks[name], points, runs, is_control=name == SCALED))
    return groups


def _baseline_line(comparison: Comparison) -> list[tuple[float, float]]:
    arms = [arm for arm in comparison.arms if arm.is_baseline and not math.isnan(arm.root_kl)]
    start = [] if math.isnan(comparison.reference) else [(0.0, comparison.reference)]
    return [*start, *sorted((arm.root_kl, arm.value) for arm in arms)]


def _looks(comparison: Comparison) -> dict[str, Look]:
    """Colour and marker of each kind of arm, in the order of their first arm; that of scaled adapters is always the same."""
    names = list(dict.fromkeys(_dials(comparison, arm) for arm in comparison.arms))
    trained = {name: _look(index) for index, name in enumerate(name for name in names if name != SCALED)}
    return {**trained, SCALED: Look(BROWN, CROSS)} if SCALED in names else trained


def _look(index: int) -> Look:
    """Colours in their order with their markers; of more than six every further round has the markers moved on by one."""
    count = len(SERIES)
    return Look(SERIES[index % count], MARKERS[(index + index // count) % count])


def _dials(comparison: Comparison, arm: Arm) -> str:
    """What an arm turns besides the baseline's dial; scaled adapters are a kind of their own, unless they are the baseline."""
    if SCALE in arm.settings and not arm.is_baseline:
        return SCALED
    keys = [name for key in arm.settings if (name := dial_name(key)) != comparison.baseline]
    return " and ".join(keys) if keys else comparison.baseline


def _ends(comparison: Comparison) -> list[Arm]:
    """Arms that are ends of runs as they are."""
    return [arm for arm in comparison.arms if is_end(arm.settings)]


def _row(comparison: Comparison, arm: Arm, found: Difference | None, looks: dict[str, Look]) -> Row:
    if found is None:
        return Row(arm.name, [], "KL not measured" if math.isnan(arm.root_kl) else "outside the range of the dial")
    factor = 100 if comparison.is_share else 1
    look = looks[_dials(comparison, arm)]
    told = found.p_adjusted < 1 - comparison.confidence
    centre, low, high = (factor * value for value in (found.estimate, found.low, found.high))
    return Row(arm.name, [Mark(look, centre, low, high, [factor * value for value in found.per_seed], told)])


def _unit(comparison: Comparison) -> str:
    return f"difference in {comparison.metric}" + (", points" if comparison.is_share else "")


def _row_plots(name: str, rows: Sequence[Row], xlabel: str, caption: str, level: float | None = None) -> list[Plot]:
    return _as_plots(name, rows_figures(rows, xlabel, level=level), caption, _rows_words(rows)) if rows else []


def _as_plots(name: str, figures: Sequence[object], caption: str, alt: str) -> list[Plot]:
    parts = len(figures)
    plots = []
    for part, figure in enumerate(figures, start=1):
        suffix = f"-{part}" if part > 1 else ""
        words = f"{caption} (Part {part} of {parts}.)" if parts > 1 else caption
        plots.append(Plot(f"{name}{suffix}", figure, words, alt))  # type: ignore[arg-type]
    return plots


def _rows_words(rows: Sequence[Row]) -> str:
    """The numbers of a figure with a row for each arm."""
    parts = [f"{row.label}: {row.note or ', '.join(signed_text(f'{mark.centre:.3g}') for mark in row.marks)}" for row in rows]
    return f"Dot plot, one row per arm. {'; '.join(parts)}."


def _why_unmatched(comparison: Comparison) -> str:
    if all(math.isnan(arm.root_kl) for arm in comparison.arms):
        return NO_KL
    if all(arm.is_baseline for arm in comparison.arms):
        return f"only the {comparison.baseline} dial was turned, and it is the line that others are held against."
    return (
        f"no arm's √KL lies within what the {comparison.baseline} dial reached; run more of its values, on both sides, or hold "
        "arms against what takes no runs: early stopping (`pe-dpo sweep … --snapshots 4`, then `--baseline step`) or "
        "scaled adapters (`--scale-control 0.5,0.75`, then `--baseline scale`)."
    )


def _kappa_curves(sweep: SweepRecord, value: Callable[[RunState], float]) -> list[KappaCurve]:
    """Runs that differ in γ alone, as curves over κ, those of most κ first; curves of a single κ are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for state in sweep.finished:
        if state.row is None or math.isnan(state.kappa) or math.isnan(value(state)):
            continue
        rest = {key: turned for key, turned in state.row.settings.items() if key != "loss.gamma"}
        found.setdefault(point_name(rest), []).append((state.kappa, value(state)))
    curves = []
    for label, runs in found.items():
        by_kappa: dict[float, list[float]] = {}
        for kappa, measured in sorted(runs):
            by_kappa.setdefault(kappa, []).append(measured)
        if len(by_kappa) > 1:
            means = [sum(values) / len(values) for values in by_kappa.values()]
            curves.append(KappaCurve(label, _look(0), list(by_kappa), means, runs))
    curves = sorted(curves, key=lambda curve: -len(curve.kappas))[:MOST_CURVES]
    return [curve._replace(look=_look(index)) for index, curve in enumerate(curves)]


_KL_THEORY = "Theory has a U: below and above some κ the policy goes further."
_ENTROPY_THEORY = "In theory κ > 1 sharpens the reference, and κ < 1 flattens it."


def _kl(state: RunState) -> float:
    return state.row.kl if state.row else math.nan


def _entropy(state: RunState) -> float:
    return _metric(state, "entropy_per_token")


def _argmin(curve: KappaCurve) -> float:
    return min(zip(curve.means, curve.kappas, strict=True))[1]


def _curve_words(curve: KappaCurve) -> str:
    points = ", ".join(f"{mean:.3g} at {kappa:g}" for kappa, mean in zip(curve.kappas, curve.means, strict=True))
    return f"{curve.label} {points}"


def _metric(state: RunState, key: str) -> float:
    return state.row.metrics.get(key, math.nan) if state.row else math.nan


def _root(kl: float) -> float:
    return math.sqrt(max(kl, 0.0)) if not math.isnan(kl) else math.nan


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

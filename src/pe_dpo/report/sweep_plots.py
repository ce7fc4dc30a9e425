"""What the arms of a sweep came to, as figures: the frontier, differences at equal KL, κ, seeds, length, displacement."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pe_dpo.experiments.comparison import SCALE, Arm, Comparison, is_end
from pe_dpo.experiments.summary import hyperparameter_name, setting_name
from pe_dpo.metrics.bootstrap import Effect
from pe_dpo.metrics.table import Floats
from pe_dpo.report.content import PageSection, Plot
from pe_dpo.report.style import (
    BLUE,
    BROWN,
    CROSS,
    FAINT,
    INK,
    MARKERS,
    PAPER,
    QUIET,
    SERIES,
    VERMILLION,
    WIDTH,
    fmt,
    panel,
    plain,
)
from pe_dpo.report.sweep_record import SweepRecord

ANSWERS = "`pe-dpo eval RUN --prompts 64` for each run, or generation.prompts in the recipe of the sweep."
NO_KL = f"KL(π‖π0) was not measured, so points cannot be held against each other at equal KL; sample answers: {ANSWERS}"
SCALED = "scaled adapter"
"""Arms that are others, scaled toward the reference."""
MOST_ROWS = 30
"""Rows of one figure: more do not fit on a page."""
MOST_NUMBERS = 24
"""Numbers beside points; of more nobody finds his own."""
MOST_CURVES = 6
"""Curves over κ in one figure."""

_PANEL = (300.0, 210.0)
"""Width and height of the frontier's panel, roughly, in points."""
_BESIDE = ((7, 6), (-7, 6), (7, -6), (-7, -6), (0, 9), (0, -9), (11, 0), (-11, 0), (10, 11), (-10, 11), (10, -11), (-10, -11))
"""Places for a number beside its point, in points."""
_ENOUGH = 9.0
"""Points between two numbers that do not touch."""

Look = tuple[str, str]
"""Colour and marker."""


def frontier_section(sweep: SweepRecord, comparison: Comparison) -> PageSection:
    """Return the metric against √KL."""
    title = f"Frontier: {comparison.metric} against √KL"
    arms = {number: arm for number, arm in enumerate(comparison.arms, start=1) if not math.isnan(arm.root_kl)}
    if not arms:
        return PageSection("frontier", title, missing=[NO_KL])
    trained = [number for number, arm in arms.items() if _kind(comparison, arm) != SCALED]
    numbered = next((numbers for numbers in (list(arms), trained) if len(numbers) <= MOST_NUMBERS), [])
    numbers = "; numbers as in the table of points" if numbered else ""
    scaled = " ×: adapters scaled toward the reference, which takes no training." if SCALED in _looks(comparison) else ""
    ends = f"√KL from {min(arm.root_kl for arm in arms.values()):.2g} to {max(arm.root_kl for arm in arms.values()):.2g}"
    lowest, highest = min(arm.value for arm in arms.values()), max(arm.value for arm in arms.values())
    plot = Plot(
        "frontier",
        frontier(sweep, comparison, arms, numbered),
        f"{comparison.title[:1].upper()}{comparison.title[1:]}. Large: points, mean over seeds, with 95 % intervals both "
        f"ways{numbers}. Small: every run.{scaled} Dark line: {comparison.baseline}, against which others are held. "
        "A point above it gets more for its KL, if the intervals let one say so; a bar with an arrow goes on beyond it.",
        f"Scatter of {len(arms)} points, {ends}, {comparison.metric} from {lowest:.3g} to {highest:.3g}.",
        is_wide=True,
    )
    return PageSection("frontier", title, plots=[plot])


def frontier(sweep: SweepRecord, comparison: Comparison, arms: Mapping[int, Arm], numbered: Sequence[int]) -> Figure:
    """Return the metric against √KL: arms with crosses of their intervals, all runs as dots, and the line of the baseline.

    Args:
        sweep: of which they are.
        comparison: of the sweep.
        arms: those with a KL, by their numbers in the table of arms.
        numbered: which of them have their number beside them.
    """
    known = [row for row in comparison.runs if not math.isnan(row.kl + row.value)]
    snapshots = [(_root(row.kl), row.value) for row in known if not row.is_final and row.scale is None]
    line = sorted((arm.root_kl, arm.value) for arm in arms.values() if arm.is_baseline)
    line = line if math.isnan(comparison.reference) else [(0.0, comparison.reference), *line]
    dots, looks = [*line, *snapshots], dict[int, dict[str, Any]]()
    with panel("√KL(π‖π0), √nats", comparison.metric, height=4.3, columns=3) as (figure, axes):
        if snapshots:
            x, y = np.transpose(snapshots)
            axes.scatter(x, y, s=6, color=QUIET, alpha=0.35, linewidths=0, label="earlier states")
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), color=INK, linewidth=1.2, alpha=0.7, zorder=1, label="baseline")
        for kind, (colour, marker) in _looks(comparison).items():
            members = {number: arm for number, arm in arms.items() if _kind(comparison, arm) == kind}
            if not members:
                continue
            runs = [(_root(row.kl), row.value) for arm in members.values() for row in sweep.rows_of(arm)]
            if runs:
                x, y = np.transpose(runs)
                axes.scatter(x, y, s=9, color=colour, alpha=0.4, linewidths=0)
            dots += runs
            alpha, size, height = (0.3, 5, 2.5) if kind == SCALED else (0.8, 6, 4.0)  # controls are behind the others
            looks |= {number: {"color": colour, "alpha": alpha, "zorder": height / 2} for number in members}
            x, y = np.transpose([(arm.root_kl, arm.value) for arm in members.values()])
            axes.plot(x, y, marker, color=colour, markersize=size, zorder=height, label=plain(kind, 28))
        x, y = np.transpose([*dots, *((arm.root_kl, arm.value) for arm in arms.values())])
        axes.set_xlim(0, _span(x, [end for number in looks for end in _ends(sweep, number, 0)])[1])
        axes.set_ylim(_span(y, [end for number in looks for end in _ends(sweep, number, 1)], is_share=comparison.is_share))
        for number, look in looks.items():
            _draw_cross(axes, arms[number], [_ends(sweep, number, way) for way in (0, 1)], look, is_share=comparison.is_share)
        _draw_numbers(axes, arms, numbered)
    return figure


def _ends(sweep: SweepRecord, number: int, way: int) -> tuple[float, float]:
    """Both ends of an arm's interval: of √KL (0) or of the metric (1); NaN without one."""
    found = sweep.crosses[number - 1][way]
    return (found.low, found.high) if found else (math.nan, math.nan)


def _draw_cross(axes: Axes, arm: Arm, ends: Sequence[tuple[float, float]], look: dict[str, Any], *, is_share: bool) -> None:
    """Draw both intervals of an arm within the panel; where one goes on beyond it, an arrow says so."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    root, (low, high) = ends[0], np.clip(ends[1], 0.0, 1.0) if is_share else ends[1]
    axes.plot(np.clip(root, left, right), [arm.value] * 2, linewidth=1.1, **look)
    axes.plot([arm.root_kl] * 2, np.clip((low, high), bottom, top), linewidth=1.1, **look)
    for is_beyond, x, y, arrow in (
        (root[1] > right, right, arm.value, ">"),
        (low < bottom, arm.root_kl, bottom, "v"),
        (high > top, arm.root_kl, top, "^"),
    ):
        if is_beyond:
            axes.plot([x], [y], arrow, markersize=4, clip_on=False, **look)


def _draw_numbers(axes: Axes, arms: Mapping[int, Arm], numbered: Sequence[int]) -> None:
    """Write beside each arm its number, where neither another arm nor another number is near, if there is such a place."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places = {
        number: ((arm.root_kl - left) / (right - left) * _PANEL[0], (arm.value - bottom) / (top - bottom) * _PANEL[1])
        for number, arm in arms.items()
    }
    taken = list(places.values())
    for number in numbered:
        x, y = places[number]
        others = [other for other in taken if other != (x, y)] or [(x + 99, y)]
        room = [min(math.dist((x + dx, y + dy), other) for other in others) for dx, dy in _BESIDE]
        dx, dy = _BESIDE[max(range(len(room)), key=lambda at: min(room[at], _ENOUGH))]
        taken.append((x + dx, y + dy))
        place = (arms[number].root_kl, arms[number].value)
        text = axes.annotate(str(number), place, (dx, dy), textcoords="offset points", zorder=5)
        text.set(fontsize=7.5, ha="center", va="center")


def _span(points: Floats, bars: Sequence[float], *, is_share: bool = False) -> tuple[float, float]:
    """Ends of an axis with all points on it, and of the bars what does not flatten the rest; a share's within 0 and 1."""
    low, high = min(points), max(points)
    room = 0.6 * (high - low) or 0.1 * abs(high) or 1.0
    known = [end for end in bars if math.isfinite(end)]
    edge = 0.05 * (high - low + room)
    ends = max(low - room, min([low, *known]) - edge), min(high + room, max([high, *known]) + edge)
    return (max(ends[0], 0.0), min(ends[1], 1.0)) if is_share else ends


# ---------------------------------------------------------------- a row for each arm


class Mark(NamedTuple):
    """A quantity of one arm, as it is drawn in the arm's row."""

    look: Look
    centre: float
    seeds: Sequence[float] = ()
    """The quantity of each seed."""
    low: float = math.nan
    high: float = math.nan
    """Ends of the interval; NaN without one."""
    is_filled: bool = True


Rows = Sequence[tuple[str, Sequence[Mark] | str]]
"""For each arm its name and its marks, or what stands in their place."""


def rows_plots(
    name: str,
    rows: Rows,
    xlabel: str,
    caption: str,
    *,
    level: float | None = None,
    legend: Mapping[str, Look] | None = None,
    is_share: bool = False,
) -> list[Plot]:
    """Return arms one below the other, in as many plots as it takes, all with the same axis.

    Args:
        name: of the first plot; the others have a number behind it.
        rows: at least one.
        xlabel: what is on the x axis, with its unit.
        caption: of every plot.
        level: where a vertical line stands for "no difference", or for the reference.
        legend: what the marks are, where there are several kinds.
        is_share: whether they are shares, which end at 0 and 1.
    """
    marks = [mark for _, found in rows if not isinstance(found, str) for mark in found]
    values = [value for mark in marks for value in (mark.centre, mark.low, mark.high, *mark.seeds)]
    known = [value for value in [*values, *([] if level is None else [level])] if np.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    words = [
        f"{label}: {found if isinstance(found, str) else ', '.join(fmt(mark.centre, '.3g') for mark in found)}"
        for label, found in rows
    ]
    alt = f"Dot plot, one row per point. {'; '.join(words)}."
    parts = [rows[start : start + MOST_ROWS] for start in range(0, len(rows), MOST_ROWS)]
    plots = []
    for number, part in enumerate(parts, start=1):
        height = 0.95 + 0.26 * len(part) + (0.25 if legend else 0.0)
        with panel("", "", width=WIDTH, height=height, columns=3) as (figure, axes):
            axes.set_xlabel(xlabel, loc="right")  # a long one has room below the names
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
            if level is not None:
                axes.axvline(level, color=QUIET, linewidth=1)
            for at, (_, found) in enumerate(part):
                axes.axhline(at, color=FAINT, linewidth=0.5, zorder=0)
                if isinstance(found, str):
                    text = axes.text(0.5, at, plain(found), transform=axes.get_yaxis_transform(), fontsize=8, color=QUIET)
                    text.set(ha="center", va="center", bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5})
                    continue
                for mark in found:
                    colour, marker = mark.look
                    axes.plot([mark.low, mark.high], [at, at], color=colour, linewidth=1.4, alpha=0.9)
                    axes.plot(mark.seeds, [at] * len(mark.seeds), "|", color=colour, markersize=7, alpha=0.7)
                    face = colour if mark.is_filled else PAPER
                    axes.plot([mark.centre], [at], marker, color=colour, markerfacecolor=face, markersize=6)
            for label, (colour, marker) in (legend or {}).items():
                axes.plot([], [], color=colour, marker=marker, linestyle="none", label=plain(label, 28))
            axes.set_ylim(len(part) - 0.4, -0.6)
            axes.set_xlim(*((max(low - room, 0), min(high + room, 1)) if is_share else (low - room, high + room)))
            axes.set_yticks(range(len(part)), [plain(label.replace(" with ", ", "), 40) for label, _ in part])
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
        which = f" (Part {number} of {len(parts)}.)" if len(parts) > 1 else ""
        plots.append(Plot(f"{name}-{number}" if number > 1 else name, figure, caption + which, alt))
    return plots


def equal_kl_section(comparison: Comparison) -> PageSection:
    """Return differences at equal KL; where there are none, differences to the base recipe or, without it, the first arm."""
    title = "Differences at equal KL"
    unit = f"difference in {comparison.metric}" + (", points" if comparison.is_share else "")
    interval = f"{100 * comparison.confidence:g} % interval"
    matched = [arm.matched for arm in comparison.arms if arm.matched]
    if matched:
        rows = [(arm.name, _difference(comparison, arm, arm.matched)) for arm in comparison.arms if not arm.is_baseline]
        apart = sum(found.p_adjusted < 1 - comparison.confidence for found in matched)
        tested = sum(not math.isnan(found.p) for found in matched)
        caption = (
            f"{comparison.metric} minus {comparison.baseline} at the same √KL, mean over seeds with {interval} over "
            f"prompts and seeds; ticks are seeds. Filled: told apart after Holm's correction ({apart} of {tested}). "
            f"Never extrapolated: points whose √KL {comparison.baseline} did not reach have no difference."
        )
        return PageSection("equal-kl", title, plots=rows_plots("matched", rows, unit, caption, level=0.0))
    if all(math.isnan(arm.root_kl) for arm in comparison.arms):
        missing = NO_KL
    elif all(arm.is_baseline for arm in comparison.arms):
        missing = f"only {comparison.baseline} was varied, and it is the line that others are held against."
    else:
        missing = (
            f"no point's √KL lies within what {comparison.baseline} reached; run more of its values, on both sides, or "
            "hold points against what takes no runs: early stopping (`pe-dpo sweep … --snapshots 4`, then "
            "`pe-dpo compare … --baseline step`) or scaled adapters (`pe-dpo sweep … --scale-control 0.5,0.75`, then "
            "`pe-dpo compare … --baseline scale`)."
        )
    rows = [(arm.name, _difference(comparison, arm, arm.direct)) for arm in comparison.arms if arm.direct]
    base = next(arm.name for arm in comparison.arms if arm.direct is None)
    caption = (
        f"{comparison.metric} minus that of {base}, each at its own KL, with {interval}: a point that went further "
        "from the reference may be ahead for that alone."
    )
    plots = rows_plots("direct", rows, unit, caption, level=0.0) if rows else []
    return PageSection("equal-kl", title, plots=plots, missing=[missing])


def _difference(comparison: Comparison, arm: Arm, found: Effect | None) -> list[Mark] | str:
    """The mark of a difference, or why there is none."""
    if found is None:
        return "KL not measured" if math.isnan(arm.root_kl) else "outside the range of the baseline"
    factor = 100 if comparison.is_share else 1
    centre, low, high, *seeds = (factor * value for value in (found.estimate, found.low, found.high, *found.per_seed))
    look = _looks(comparison)[_kind(comparison, arm)]
    return [Mark(look, centre, seeds, low, high, is_filled=found.p_adjusted < 1 - comparison.confidence)]


def seeds_section(sweep: SweepRecord, comparison: Comparison) -> PageSection:
    """Return how much seeds matter, arm by arm."""
    looks = _looks(comparison)
    rows = [
        (arm.name, [Mark(looks[_kind(comparison, arm)], arm.value, [row.value for row in sweep.rows_of(arm)])])
        for arm in comparison.arms
        if is_end(arm.settings)
    ]
    missing = []
    if max((len(arm.seeds) for arm in comparison.arms), default=0) < 2:
        missing.append("the spread between seeds: every point has one; add some with `pe-dpo sweep … --seeds 3`.")
    spreads = sorted(arm.value_sd for arm in comparison.arms if not math.isnan(arm.value_sd))
    words = f" Standard deviation between seeds: median {spreads[len(spreads) // 2]:.3g}." if spreads else ""
    caption = f"{comparison.metric} of every run (ticks) and the mean of each point.{words}"
    level, plots = None if math.isnan(comparison.reference) else comparison.reference, []
    if rows:
        plots = rows_plots("seeds", rows, comparison.metric, caption, level=level, is_share=comparison.is_share)
    return PageSection("seeds", "Spread between seeds", plots=plots, missing=missing)


def measures_section(sweep: SweepRecord, comparison: Comparison) -> PageSection:
    """Return length of answers and displacement, arm by arm."""
    arms, looks = [arm for arm in comparison.arms if is_end(arm.settings)], _looks(comparison)
    sides = {"chosen": (BLUE, MARKERS[0]), "rejected": (VERMILLION, MARKERS[1])}

    def mark(arm: Arm, key: str, look: Look) -> list[Mark]:
        values = [value for run in sweep.runs_of(arm) if not math.isnan(value := run.measured(key))]
        return [Mark(look, fmean(values), values)] if values else []

    lengths = {arm.name: mark(arm, "tokens", looks[_kind(comparison, arm)]) for arm in arms}
    moved = {arm.name: [*(found for side, look in sides.items() for found in mark(arm, f"displacement/{side}", look))]
             for arm in arms}  # fmt: skip
    plots, missing = [], []
    if any(lengths.values()):
        rows = [(name, marks or "not measured") for name, marks in lengths.items()]
        caption = "Length of sampled answers: runs (ticks) and mean of each point."
        plots += rows_plots("length", rows, "tokens of an answer", caption)
    else:
        missing.append(f"how long answers are: none were sampled; {ANSWERS}")
    if any(moved.values()):
        rows = [(name, marks or "not measured") for name, marks in moved.items()]
        caption = (
            "log π − log π0 of held-out chosen and rejected answers: runs (ticks) and mean of each point. Left of 0 they "
            "became less likely."
        )
        plots += rows_plots("displacement", rows, "nats per answer", caption, level=0.0, legend=sides)
    else:
        missing.append("displacement: no run has its reference on held-out pairs; measure it with `pe-dpo eval RUN`.")
    return PageSection("measures", "Length and displacement", plots=plots, missing=missing)


# ---------------------------------------------------------------- over κ


def kappa_section(sweep: SweepRecord) -> PageSection:
    """Return KL and entropy against κ, all else equal: a line of means over seeds for runs that differ in γ alone."""
    title = "What γ does to the distance and to the entropy"
    runs = sorted((run for run in sweep.finished if run.row and not math.isnan(run.kappa)), key=lambda run: run.kappa)
    plots = []
    for key, ylabel, words, theory in (
        (
            "kl",
            "KL(π‖π0), nats per answer",
            "KL from the reference",
            "Theory has a U: below and above some κ the policy goes further.",
        ),
        (
            "entropy_per_token",
            "entropy, nats per token",
            "Entropy of the policy",
            "In theory κ > 1 sharpens the reference, and κ < 1 flattens it.",
        ),
    ):
        found: dict[str, dict[float, list[float]]] = {}
        for run in runs:
            assert run.row is not None, "chosen above"
            if not math.isnan(run.measured(key)):
                rest = setting_name({name: value for name, value in run.row.settings.items() if name != "loss.gamma"})
                found.setdefault(rest, {}).setdefault(run.kappa, []).append(run.measured(key))
        curves = sorted((item for item in found.items() if len(item[1]) > 1), key=lambda item: -len(item[1]))[:MOST_CURVES]
        if not curves:
            continue
        with panel("κ = γ/β", ylabel) as (figure, axes):
            axes.axvline(1, color=QUIET, linewidth=1, linestyle=":")
            for index, (label, values) in enumerate(curves):
                colour, marker = _look(index)
                label = plain(label.replace(" with ", ", "), 30)
                axes.plot(list(values), list(map(fmean, values.values())), color=colour, marker=marker, label=label)
                x, y = np.transpose([(kappa, value) for kappa, each in values.items() for value in each])
                axes.scatter(x, y, s=11, color=colour, alpha=0.4, linewidths=0)
        label, means = curves[0][0], {kappa: fmean(values) for kappa, values in curves[0][1].items()}
        points = ", ".join(f"{mean:.3g} at {kappa:g}" for kappa, mean in means.items())
        plots.append(
            Plot(
                f"{key.removesuffix('_per_token')}-kappa",
                figure,
                f"{words} against κ = γ/β, all other hyperparameters equal; dots are runs, lines join means over seeds "
                f"(least at κ = {min(means, key=means.__getitem__):g} for {label}). {theory}",
                f"{len(curves)} lines of {words} over κ: {label} {points}.",
            )
        )
    missing = []
    if not plots:
        kappas = {run.kappa for run in sweep.finished if not math.isnan(run.kappa)}
        turned = (
            "γ was not turned alone in this sweep, so there is nothing over κ; add some with "
            "`pe-dpo sweep … --grid gamma=0,0.5x,1x,2x`."
        )
        missing.append(NO_KL if len(kappas) > 1 else turned)
    return PageSection("kappa", title, plots=plots, missing=missing)


# ---------------------------------------------------------------- kinds of arms


def _kind(comparison: Comparison, arm: Arm) -> str:
    """What an arm changes besides the baseline's hyperparameter; a scaled adapter that is no baseline is a kind of its own."""
    if SCALE in arm.settings and not arm.is_baseline:
        return SCALED
    keys = [name for key in arm.settings if (name := hyperparameter_name(key)) != comparison.baseline]
    return " and ".join(keys) if keys else comparison.baseline


def _looks(comparison: Comparison) -> dict[str, Look]:
    """Colour and marker of each kind of arm, in the order of their first arm; that of scaled adapters is always the same."""
    names = list(dict.fromkeys(_kind(comparison, arm) for arm in comparison.arms))
    trained = {name: _look(index) for index, name in enumerate(name for name in names if name != SCALED)}
    return {**trained, SCALED: (BROWN, CROSS)} if SCALED in names else trained


def _look(index: int) -> Look:
    """Colours in their order with their markers; of more than six every further round has the markers moved on by one."""
    count = len(SERIES)
    return SERIES[index % count], MARKERS[(index + index // count) % count]


def _root(kl: float) -> float:
    return math.sqrt(max(kl, 0.0)) if not math.isnan(kl) else math.nan

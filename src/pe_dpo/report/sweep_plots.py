"""Figures of a sweep; each takes numbers and returns a figure with one panel."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pe_dpo.report.plots import legend_below
from pe_dpo.report.style import FAINT, INK, PAPER, QUIET, WIDTH, new_figure, plain, style

MOST_ROWS = 30
"""Of one figure: more do not fit on a page."""
MOST_NUMBERS = 24
"""Numbers beside points; of more nobody finds his own."""


class Look(NamedTuple):
    """How arms that turn the same dials are drawn."""

    colour: str
    marker: str


class Point(NamedTuple):
    """An arm on the frontier, mean over seeds, with its intervals; NaN where unknown."""

    number: int
    """In the table of arms."""
    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float


class Group(NamedTuple):
    """Arms that turn the same dials."""

    label: str
    look: Look
    points: Sequence[Point]
    runs: Sequence[tuple[float, float]]
    """Every run by itself, x and y."""
    is_control: bool = False
    """Drawn smaller and behind the others."""


def frontier(
    groups: Sequence[Group], line: Sequence[tuple[float, float]], ylabel: str, *, snapshots: Sequence[tuple[float, float]] = ()
) -> Figure:
    """Return a metric against √KL: arms with crosses of their intervals, all runs as dots, and the line of the baseline.

    Args:
        groups: at least one with a point.
        line: of the baseline, rising in √KL; may be empty.
        ylabel: the metric.
        snapshots: earlier states of runs, small and grey.
    """
    with style():
        figure, axes = new_figure(height=4.3)
        if snapshots:
            x, y = zip(*snapshots, strict=True)
            axes.scatter(x, y, s=6, color=QUIET, alpha=0.35, linewidths=0, label="earlier states")
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), color=INK, linewidth=1.2, alpha=0.7, zorder=1, label="baseline")
        for group in groups:
            if group.runs:
                x, y = zip(*group.runs, strict=True)
                axes.scatter(x, y, s=9, color=group.look.colour, alpha=0.4, linewidths=0)
            _crosses(axes, group)
        axes.set_xlabel("√KL(π‖π0), √nats")
        axes.set_ylabel(ylabel)
        points, others = [point for group in groups for point in group.points], [*line, *snapshots]
        others += [run for group in groups for run in group.runs]
        across = [x for x, _ in others], [(point.x, point.x_low, point.x_high) for point in points]
        upwards = [y for _, y in others], [(point.y, point.y_low, point.y_high) for point in points]
        axes.set_xlim(0, _span(*across)[1])
        axes.set_ylim(_span(*upwards))
        _numbers(axes, points, numbered(groups))
        legend_below(figure, axes, columns=3)
    return figure


def numbered(groups: Sequence[Group]) -> list[Point]:
    """Return the arms that have a number beside them: all, or all but the controls, or none where there are too many."""
    points = [point for group in groups for point in group.points]
    trained = [point for group in groups for point in group.points if not group.is_control]
    return next((those for those in (points, trained) if len(those) <= MOST_NUMBERS), [])


def _span(values: Sequence[float], bars: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Ends of an axis with all points on it, and of their bars what does not flatten the rest.

    Args:
        values: of all runs.
        bars: centre, low end and high end of each; ends may be NaN.
    """
    known = [*values, *(centre for centre, _, _ in bars)]
    low, high = min(known), max(known)
    room = 0.6 * (high - low) or 0.1 * abs(high) or 1.0
    ends = [end for _, *both in bars for end in both if math.isfinite(end)]
    edge = 0.05 * (high - low + room)
    return max(low - room, min([low, *ends]) - edge), min(high + room, max([high, *ends]) + edge)


def _numbers(axes: Axes, points: Sequence[Point], named: Sequence[Point]) -> None:
    """Write some points' numbers beside them, where neither another point nor another number is near, if there is a place."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    place = {p: ((p.x - left) / (right - left) * _PANEL[0], (p.y - bottom) / (top - bottom) * _PANEL[1]) for p in points}
    taken = list(place.values())
    for point, (x, y) in ((point, place[point]) for point in named):
        others = [other for other in taken if other != (x, y)] or [(x + 99, y)]
        room = [min(math.dist((x + dx, y + dy), other) for other in others) for dx, dy in _BESIDE]
        dx, dy = _BESIDE[max(range(len(room)), key=lambda at: min(room[at], _ENOUGH))]
        taken.append((x + dx, y + dy))
        number = axes.annotate(str(point.number), (point.x, point.y), (dx, dy), textcoords="offset points", zorder=5)
        number.set(fontsize=7.5, ha="center", va="center")


_PANEL = (300.0, 210.0)
"""Width and height of the frontier's panel, roughly, in points."""
_BESIDE = ((7, 6), (-7, 6), (7, -6), (-7, -6), (0, 9), (0, -9), (11, 0), (-11, 0), (10, 11), (-10, 11), (10, -11), (-10, -11))
_ENOUGH = 9.0
"""Points between two numbers that do not touch."""


def _crosses(axes: Axes, group: Group) -> None:
    colour, marker = group.look
    alpha, size, height = (0.3, 5, 2.5) if group.is_control else (0.8, 6, 4.0)
    x, y = ([getattr(point, name) for point in group.points] for name in ("x", "y"))
    for point in group.points:
        bar: dict[str, Any] = {"color": colour, "linewidth": 1.1, "alpha": alpha, "zorder": height / 2}
        axes.plot([point.x_low, point.x_high], [point.y, point.y], **bar)
        axes.plot([point.x, point.x], [point.y_low, point.y_high], **bar)
    axes.plot(x, y, color=colour, marker=marker, linestyle="none", markersize=size, label=plain(group.label, 28), zorder=height)


class Mark(NamedTuple):
    """A quantity of one arm."""

    look: Look
    centre: float
    """NaN: there is none, only the seeds."""
    low: float
    high: float
    """Of its interval; NaN without one."""
    seeds: Sequence[float] = ()
    """Of each seed."""
    is_filled: bool = True


class Row(NamedTuple):
    """One arm in a figure with a row for each."""

    label: str
    marks: Sequence[Mark]
    note: str = ""
    """Stands in the place of marks."""


def rows_figures(
    rows: Sequence[Row], xlabel: str, *, level: float | None = None, legend: Mapping[str, Look] | None = None
) -> list[Figure]:
    """Return arms one below the other, in as many figures as it takes, all with the same axis.

    Args:
        rows: at least one.
        xlabel: with the unit.
        level: where a vertical line stands for "no difference", or for the reference.
        legend: what the marks are, where there are several kinds.
    """
    values = [value for row in rows for mark in row.marks for value in (mark.centre, mark.low, mark.high, *mark.seeds)]
    known = [value for value in [*values, *([] if level is None else [level])] if np.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    parts = [rows[start : start + MOST_ROWS] for start in range(0, len(rows), MOST_ROWS)]
    return [_rows_figure(part, xlabel, level, legend or {}, (low - room, high + room)) for part in parts]


def _rows_figure(
    rows: Sequence[Row], xlabel: str, level: float | None, legend: Mapping[str, Look], limits: tuple[float, float]
) -> Figure:
    with style():
        figure, axes = new_figure(WIDTH, 0.95 + 0.26 * len(rows) + (0.25 if legend else 0.0))
        if level is not None:
            axes.axvline(level, color=QUIET, linewidth=1)
        for at, row in enumerate(rows):
            _row(axes, at, row)
        for label, look in legend.items():
            axes.plot([], [], color=look.colour, marker=look.marker, linestyle="none", label=plain(label, 28))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(limits)
        axes.set_yticks(range(len(rows)), [plain(row.label.replace(" with ", ", "), 40) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        for at in range(len(rows)):
            axes.axhline(at, color=FAINT, linewidth=0.5, zorder=0)
        axes.set_xlabel(xlabel, loc="right")  # a long one has room below the names
        legend_below(figure, axes, columns=3)
    return figure


def _row(axes: Axes, at: int, row: Row) -> None:
    if row.note:
        place = axes.get_yaxis_transform()
        behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
        axes.text(0.5, at, plain(row.note), transform=place, ha="center", va="center", fontsize=8, color=QUIET, bbox=behind)
        return
    for mark in row.marks:
        colour, marker = mark.look
        axes.plot([mark.low, mark.high], [at, at], color=colour, linewidth=1.4, alpha=0.9)
        seeds = [value for value in mark.seeds if np.isfinite(value)]
        axes.plot(seeds, [at] * len(seeds), color=colour, marker="|", linestyle="none", markersize=7, alpha=0.7)
        face = colour if mark.is_filled else PAPER
        axes.plot([mark.centre], [at], color=colour, marker=marker, markerfacecolor=face, linestyle="none", markersize=6)


MOST_CURVES = 6


class KappaCurve(NamedTuple):
    """A quantity at several κ, all else equal."""

    label: str
    look: Look
    kappas: Sequence[float]
    """Rising."""
    means: Sequence[float]
    """Over seeds."""
    seeds: Sequence[tuple[float, float]]
    """Each run: κ and its value."""


def against_kappa(curves: Sequence[KappaCurve], ylabel: str) -> Figure:
    """Return a quantity against κ = γ/β, a line of means over seeds for each curve, runs as dots.

    Args:
        curves: at least one with two κ, at most MOST_CURVES.
        ylabel: with the unit.
    """
    with style():
        figure, axes = new_figure()
        axes.axvline(1, color=QUIET, linewidth=1, linestyle=":")
        for curve in curves:
            colour, marker = curve.look
            label = plain(curve.label.replace(" with ", ", "), 30)
            axes.plot(curve.kappas, curve.means, color=colour, marker=marker, label=label)
            x, y = zip(*curve.seeds, strict=True)
            axes.scatter(x, y, s=11, color=colour, alpha=0.4, linewidths=0)
        axes.set_xlabel("κ = γ/β")
        axes.set_ylabel(ylabel)
        legend_below(figure, axes, columns=2)
    return figure

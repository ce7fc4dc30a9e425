"""Figures of one run; each takes numbers and returns a figure with one panel."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pe_dpo.metrics.regimes import QUADRANTS
from pe_dpo.report.style import BLUE, DENSE, INK, MARKERS, ORANGE, PAPER, QUIET, SKY, VERMILLION, new_figure, plain, style
from pe_dpo.runs.run_record import Curve, Floats

QUADRANT_WORDS = dict(zip(QUADRANTS, ("both right", "gained: only π right", "lost: only π0 right", "both wrong"), strict=True))
QUADRANT_COLOURS = dict(zip(QUADRANTS, (BLUE, SKY, ORANGE, VERMILLION), strict=True))


class Line(NamedTuple):
    """A metric over steps, as it is drawn."""

    label: str
    curve: Curve
    colour: str
    kind: Literal["probe", "training"] = "probe"
    """On fixed pairs: a line with markers; of a training window: thin and pale, since other pairs are seen in each."""
    errors: Sequence[float] | None = None
    """Half-widths of intervals; NaN where unknown."""
    marker: str = MARKERS[0]


def over_steps(lines: Sequence[Line], ylabel: str, *, level: float | None = None) -> Figure:
    """Return metrics over optimizer steps.

    Args:
        lines: at least one with at least one point.
        ylabel: with the unit.
        level: where to draw a thin line that means "nothing", as 0 or ½.
    """
    with style():
        figure, axes = new_figure()
        if level is not None:
            axes.axhline(level, color=QUIET, linewidth=1, linestyle=":")
        for line in lines:
            if line.kind == "training":
                axes.plot(*line.curve, color=line.colour, linewidth=1.0, alpha=0.6, label=line.label)
                continue
            marker = line.marker if len(line.curve.steps) <= 40 else ""
            axes.plot(*line.curve, color=line.colour, marker=marker, label=line.label)
            if line.errors is not None:
                axes.errorbar(*line.curve, yerr=_known(line.errors), color=line.colour, fmt="none", capsize=2.5, linewidth=1)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        legend_below(figure, axes)
    return figure


def regime_shares(steps: Sequence[int], shares: Mapping[str, Sequence[float]], ylabel: str) -> Figure:
    """Return the shares of the four quadrants over steps, stacked to 1 (or to what ties leave).

    Args:
        steps: at least two, rising.
        shares: by QUADRANTS, each as long as `steps`, in [0, 1].
        ylabel: of what they are shares.
    """
    with style():
        figure, axes = new_figure()
        rows = [list(shares[name]) for name in QUADRANTS]
        colours = [QUADRANT_COLOURS[name] for name in QUADRANTS]
        axes.stackplot(
            steps, *rows, colors=colours, alpha=0.85, labels=list(QUADRANT_WORDS.values()), edgecolor=PAPER, linewidth=0.6
        )
        axes.set_xlim(steps[0], steps[-1])
        axes.set_ylim(0, 1)
        axes.grid(False)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        legend_below(figure, axes)
    return figure


class Target(NamedTuple):
    """Where the score z is 0: Δπ = κ·max(Δ0, floor) + offset."""

    kappa: float
    offset: float
    """m/β, nats."""
    floor: float | None

    def at(self, reference: Floats) -> Floats:
        """Return the Δπ at which a pair of this Δ0 has z = 0."""
        floored = reference if self.floor is None else np.maximum(reference, self.floor)
        return self.kappa * floored + self.offset


class Limits(NamedTuple):
    """The ranges of two axes."""

    x: tuple[float, float]
    y: tuple[float, float]


def preference_scatter(reference: Floats, policy: Floats, target: Target, limits: Limits, *, unit: str) -> Figure:
    """Return Δ0 against Δπ, one point per pair, coloured by quadrant, with the line on which z is 0.

    Args:
        reference: Δ0, (N,).
        policy: Δπ, (N,).
        target: of the loss.
        limits: the same for the start and the end of a run, so that they can be compared.
        unit: of both, such as "nats".
    """
    with style():
        figure, axes = new_figure(height=4.1)
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.axvline(0, color=QUIET, linewidth=0.8)
        for name, policy_sign, reference_sign in zip(QUADRANTS, (1, 1, -1, -1), (1, -1, 1, -1), strict=True):
            member = (np.sign(policy) == policy_sign) & (np.sign(reference) == reference_sign)
            _points(axes, reference[member], policy[member], QUADRANT_COLOURS[name], QUADRANT_WORDS[name], len(policy))
        tied = (policy == 0) | (reference == 0)
        if tied.any():
            _points(axes, reference[tied], policy[tied], QUIET, "tied", len(policy))
        ends = np.linspace(*limits.x, 201)
        axes.plot(ends, ends, color=QUIET, linewidth=1, linestyle="--", label="Δπ = Δ0 (no change)")
        axes.plot(ends, target.at(ends), color=INK, linewidth=1.6, label=_target_words(target))
        axes.set_xlim(limits.x)
        axes.set_ylim(limits.y)
        axes.set_xlabel(f"Δ0, reference's preference ({unit})")
        axes.set_ylabel(f"Δπ, policy's preference ({unit})")
        legend_below(figure, axes)
    return figure


def transition_table(counts: Sequence[Sequence[int]]) -> Figure:
    """Return the 2×2 table of pairs ranked right or wrong at the start (rows) and at the end (columns).

    Args:
        counts: [[right → right, right → wrong], [wrong → right, wrong → wrong]].
    """
    words = (("kept", "lost"), ("gained", "still wrong"))
    colours = ((BLUE, ORANGE), (SKY, VERMILLION))
    most = max(max(row) for row in counts) or 1
    with style():
        figure, axes = new_figure(height=3.0)
        for row in range(2):
            for column in range(2):
                count = counts[row][column]
                strength = 0.08 + 0.42 * count / most
                axes.fill_between([column, column + 1], row, row + 1, color=colours[row][column], alpha=strength, linewidth=0)
                axes.text(column + 0.5, row + 0.46, f"{count}", ha="center", va="center", fontsize=19)
                axes.text(column + 0.5, row + 0.78, words[row][column], ha="center", va="center", fontsize=10)
        axes.set_xlim(0, 2)
        axes.set_ylim(2, 0)
        axes.set_xticks([0.5, 1.5], ["right", "wrong"])
        axes.set_yticks([0.5, 1.5], ["right", "wrong"])
        axes.set_xlabel("policy after training ranks the pair")
        axes.set_ylabel("policy at the start")
        axes.tick_params(length=0)
        axes.grid(False)
        axes.axhline(1, color=QUIET, linewidth=0.8)
        axes.axvline(1, color=QUIET, linewidth=0.8)
        for spine in axes.spines.values():
            spine.set_visible(True)
    return figure


def length_scatter(difference: Floats, shift: Floats, *, ylabel: str) -> Figure:
    """Return what training moved against the difference in length, with the line of least squares if it has one.

    Args:
        difference: tokens of the chosen minus tokens of the rejected answer, (N,).
        shift: Δπ now minus Δπ at the start, (N,).
        ylabel: with the unit.
    """
    with style():
        figure, axes = new_figure()
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.axvline(0, color=QUIET, linewidth=0.8)
        _points(axes, difference, shift, BLUE, "a held-out pair", len(shift))
        if len(shift) > 2 and np.ptp(difference) > 0:
            slope, intercept = np.polyfit(difference, shift, 1)
            ends = np.asarray([difference.min(), difference.max()])
            axes.plot(ends, intercept + slope * ends, color=VERMILLION, label=f"least squares: {slope:+.3g} nats per token")
        axes.set_xlabel("tokens of chosen − tokens of rejected")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        legend_below(figure, axes)
    return figure


def length_histogram(groups: Mapping[str, Sequence[float]]) -> Figure:
    """Return how long answers are, as shares; one outline per group.

    Args:
        groups: label → tokens of each answer; at most four, none empty.
    """
    longest = max(max(values) for values in groups.values())
    bins = np.linspace(0, longest + 1, 25) if longest > 25 else np.arange(0, longest + 2)
    with style():
        figure, axes = new_figure()
        for (label, values), colour, dashes in zip(
            groups.items(), (BLUE, VERMILLION, ORANGE, QUIET), ("-", "--", "-.", ":"), strict=False
        ):
            shares = np.histogram(values, bins)[0] / len(values)
            axes.stairs(shares, bins, color=colour, linewidth=1.8, linestyle=dashes, label=plain(label), fill=False)
            axes.stairs(shares, bins, color=colour, alpha=0.12, fill=True)
        axes.set_xlim(0, bins[-1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of an answer")
        axes.set_ylabel("share of answers")
        legend_below(figure, axes)
    return figure


def scatter_limits(reference: Floats, *policies: Floats) -> Limits:
    """Return ranges that hold all points, and 0, with some room."""
    both = np.concatenate(policies)
    return Limits(_range(reference), _range(both))


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Put the legend under the panel, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)), handlelength=1.8)


def _points(axes: Axes, x: Floats, y: Floats, colour: str, label: str, total: int) -> None:
    size = 18 if total < 300 else 9 if total < 3000 else 4
    if len(x):
        axes.scatter(x, y, s=size, color=colour, alpha=0.65, linewidths=0, label=label, rasterized=total >= DENSE)


def _target_words(target: Target) -> str:
    offset = f" {'+' if target.offset >= 0 else '−'} {abs(target.offset):.3g}" if target.offset else ""
    floored = "Δ0" if target.floor is None else f"max(Δ0, {target.floor:g})"
    line = f"{target.kappa:.3g}·{floored}{offset}" if target.kappa else f"{target.offset:.3g}"
    return f"z = 0: Δπ = {line}"


def _range(values: Floats) -> tuple[float, float]:
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _known(errors: Sequence[float]) -> list[float]:
    return [0.0 if np.isnan(error) else error for error in errors]

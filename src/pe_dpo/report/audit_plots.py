"""Figures of an audit: what the reference prefers, and what the ratio κ = γ/β does with it.

audit-preference   how Δ0 is distributed
audit-length       Δ0 against the difference in length
audit-weights      who has the gradient at step 0, over κ
audit-flips        how long pairs that π0 ranks wrong take to flip, over κ
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pe_dpo.audit.audit import Audit
from pe_dpo.audit.forecast import FLIP_QUANTILES, Outlook
from pe_dpo.report.plots import legend_below
from pe_dpo.report.style import BLUE, DENSE, INK, ORANGE, QUIET, SKY, VERMILLION, new_figure, save, style

BINS = 60
SHOWN = 0.99
"""Of the pairs, in the middle; a few far ones would leave no room for the others."""
SLOWEST = 1e6
"""Flip times above are off the panel: a flip in a million times the quickest happens in no run."""


def save_audit_plots(found: Audit, folder: Path) -> list[Path]:
    """Draw an audit as PNG and SVG into a folder, which is made, and return the PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "audit-preference": preference_histogram(found),
        "audit-length": length_scatter(found),
        "audit-weights": weight_shares(found),
        "audit-flips": flip_times(found),
    }
    for name, figure in drawn.items():
        save(figure, folder, name)
    return [folder / f"{name}.png" for name in drawn]


def preference_histogram(found: Audit) -> Figure:
    """Return how Δ0 is distributed, with what π0 ranks wrong and right in two colours."""
    low, high = _middle(found.preference)
    width = (high - low) / BINS
    edges = width * np.arange(np.floor(min(low, 0.0) / width), np.ceil(max(high, 0.0) / width) + 1)  # 0 is one of them
    with style():
        figure, axes = new_figure()
        for member, colour, words in (
            (found.preference < 0, VERMILLION, f"π0 ranks wrong ({found.ranking.wrong:.0%})"),
            (found.preference > 0, BLUE, f"π0 ranks right ({found.ranking.right:.0%})"),
        ):
            axes.hist(found.preference[member], edges.tolist(), color=colour, alpha=0.85, label=words)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel(f"Δ0, {_unit(found)}")
        axes.set_ylabel("pairs")
        hidden = int(((found.preference < edges[0]) | (found.preference > edges[-1])).sum())
        if hidden:
            axes.set_title(f"{hidden} of {found.pairs} pairs lie outside", color=QUIET, fontsize=9)
        legend_below(figure, axes)
    return figure


def length_scatter(found: Audit) -> Figure:
    """Return Δ0 against the difference in length, with the line whose slope is taken off for the share at equal length."""
    with style():
        figure, axes = new_figure()
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.axvline(0, color=QUIET, linewidth=0.8)
        size = 18 if found.pairs < 300 else 9 if found.pairs < 3000 else 4
        x, y = found.length_difference, found.preference
        axes.scatter(x, y, s=size, color=BLUE, alpha=0.5, linewidths=0, rasterized=found.pairs >= DENSE)
        if found.pairs > 2 and np.ptp(x) > 0:
            slope, intercept = np.polyfit(x, y, 1)
            ends = np.asarray([x.min(), x.max()])
            axes.plot(
                ends, intercept + slope * ends, color=VERMILLION, label=f"least squares: {slope:+.3g} nats for each token"
            )
            axes.set_title(f"correlation {found.ranking.length_correlation:+.2f}".replace("-", "−"))
        axes.set_xlim(*_padded(x))
        axes.set_ylim(*_padded(y))
        axes.set_xlabel("tokens of chosen − tokens of rejected")
        axes.set_ylabel(f"Δ0, {_unit(found)}")
        legend_below(figure, axes)
    return figure


def weight_shares(found: Audit) -> Figure:
    """Return the shares of gradient weight at step 0 over κ, and how many of the pairs it is as if pulled alike."""
    with style():
        figure, axes = new_figure()
        lines: tuple[tuple[Callable[[Outlook], float], str, str, str], ...] = (
            (lambda at: at.weight_right, BLUE, "-", "gradient where π0 is right"),
            (lambda at: at.weight_wrong, VERMILLION, "--", "gradient where π0 is wrong"),
            (lambda at: at.effective, QUIET, ":", "effective share of pairs"),
        )
        kappas = [at.kappa for at in found.curve]
        for value, colour, dashes, words in lines:
            axes.plot(kappas, [value(at) for at in found.curve], dashes, color=colour, label=words)
        _mark_recipe(axes, found)
        axes.set_ylim(-0.02, 1.05)
        axes.set_xlabel("κ = γ/β")
        axes.set_ylabel("share at step 0")
        legend_below(figure, axes)
    return figure


def flip_times(found: Audit) -> Figure:
    """Return quantiles of the time until pairs that π0 ranks wrong flip, over κ."""
    kappas = np.asarray([at.kappa for at in found.curve])
    times = np.asarray([at.flip_times for at in found.curve])
    finite = times[np.isfinite(times) & (times > 0)]
    bottom = finite.min() / 2 if len(finite) else 1.0
    top = min(2 * finite.max(), SLOWEST * bottom) if len(finite) else SLOWEST
    with style():
        figure, axes = new_figure()
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: _power(time)))
        for column, (quantile, colour, dashes) in enumerate(
            zip(FLIP_QUANTILES, (SKY, BLUE, INK), ("--", "-", ":"), strict=True)
        ):
            known = np.where(np.isfinite(times[:, column]), np.minimum(times[:, column], 1e3 * top), np.nan)
            axes.plot(kappas, known, dashes, color=colour, label=f"{quantile:.0%} have flipped")
        _mark_recipe(axes, found)
        if not len(finite):
            axes.text(0.5, 0.5, "no pair flips", transform=axes.transAxes, ha="center")
        if np.isinf(times).any():
            axes.set_title("where a line ends, pairs never flip", color=QUIET, fontsize=9)
        axes.set_xlabel("κ = γ/β")
        axes.set_ylabel("time until wrong pairs flip, in 1/(2β²)")
        legend_below(figure, axes)
    return figure


def _power(time: float) -> str:
    """10⁶ without TeX, which the style leaves off."""
    return "10" + str(round(np.log10(time))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _mark_recipe(axes: Axes, found: Audit) -> None:
    kappa = found.recipe.kappa
    if kappa <= found.curve[-1].kappa:
        axes.axvline(kappa, color=ORANGE, linewidth=4, alpha=0.5, zorder=0, label=f"this recipe, κ = {kappa:.3g}")
    axes.set_xlim(-0.03, found.curve[-1].kappa + 0.03)


def _unit(found: Audit) -> str:
    return "nats" if found.reduce == "sum" else "nats a token"


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, ((1 - SHOWN) / 2, (1 + SHOWN) / 2))
    room = 0.02 * (high - low) or 1.0
    return float(low - room), float(high + room)


def _padded(values: np.ndarray) -> tuple[float, float]:
    low, high = _middle(values)
    return min(low, 0.0), max(high, 0.0)

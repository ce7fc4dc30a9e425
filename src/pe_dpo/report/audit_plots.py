"""Figures of an audit: what the reference prefers, and what the ratio κ = γ/β does with it.

audit-preference   how Δ0 is distributed
audit-length       Δ0 against the difference in length
audit-weights      who has the gradient at step 0, over κ
audit-flips        how long pairs that π0 ranks wrong take to flip, over κ
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pe_dpo.report.pair_plots import length_scatter
from pe_dpo.report.style import BLUE, INK, ORANGE, QUIET, SKY, VERMILLION, fmt, panel, save

if TYPE_CHECKING:
    from pe_dpo.audit.audit import Audit

BINS = 60
SHOWN = 0.99
"""Share of the pairs, in the middle, that is shown; a few far ones would leave no room for the others."""
SLOWEST = 1e6
"""Flip times above are off the panel: a flip in a million times the quickest happens in no run."""


def save_audit_plots(found: "Audit", folder: Path) -> list[Path]:
    """Draw an audit as PNG into a folder, which is made, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"audit-{name}.png": figure for name, figure in audit_figures(found).items()}
    for path, figure in files.items():
        save(figure, path)
    return list(files)


def audit_figures(found: "Audit") -> dict[str, Figure]:
    """Return the figures of an audit by their names: preference, length, weights, flips."""
    preference = f"Δ0, {'nats' if found.loss.reduce == 'sum' else 'nats a token'}"
    length = length_scatter(found.length_difference, found.preference, preference, "")
    (axes,) = length.axes
    if found.pairs > 2 and np.ptp(found.length_difference) > 0:
        axes.set_title(f"correlation {fmt(found.ranking.length_correlation, '+.2f')}")
    axes.set(xlim=_middle(found.length_difference), ylim=_middle(found.preference))

    with panel("κ = γ/β", "share at step 0") as (weights, axes):
        kappas = [at.kappa for at in found.curve]
        for name, colour, dashes, words in (
            ("weight_right", BLUE, "-", "gradient where π0 is right"),
            ("weight_wrong", VERMILLION, "--", "gradient where π0 is wrong"),
            ("effective", QUIET, ":", "effective share of pairs"),
        ):
            shares = [getattr(at, name) for at in found.curve]
            axes.plot(kappas, shares, dashes, color=colour, label=words, clip_on=False)  # whole at 0 and 1 too
        _mark_recipe(axes, found)
        axes.set_ylim(0, 1)
    histogram = _preference_histogram(found, preference)
    return {"preference": histogram, "length": length, "weights": weights, "flips": _flip_times(found)}


def _preference_histogram(found: "Audit", label: str) -> Figure:
    """How Δ0 is distributed, with what π0 ranks wrong and right in two colours."""
    low, high = _middle(found.preference)
    width = (high - low) / BINS
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)  # 0 is one of them
    with panel(label, "pairs") as (figure, axes):
        for member, colour, words in (
            (found.preference < 0, VERMILLION, f"π0 ranks wrong ({found.ranking.wrong:.0%})"),
            (found.preference > 0, BLUE, f"π0 ranks right ({found.ranking.right:.0%})"),
        ):
            axes.hist(found.preference[member], edges.tolist(), color=colour, alpha=0.85, label=words)
        axes.axvline(0, color=INK, linewidth=1)
        hidden = int(((found.preference < edges[0]) | (found.preference > edges[-1])).sum())
        if hidden:
            axes.set_title(f"{hidden} of {found.pairs} pairs lie outside", color=QUIET, fontsize=9)
    return figure


def _flip_times(found: "Audit") -> Figure:
    """Quantiles of the time until pairs that π0 ranks wrong flip, over κ."""
    from pe_dpo.audit.forecast import FLIP_QUANTILES

    kappas = np.asarray([at.kappa for at in found.curve])
    times = np.asarray([at.flip_times for at in found.curve])
    finite = times[np.isfinite(times) & (times > 0)]
    bottom = finite.min() / 2 if len(finite) else 1.0
    top = min(2 * finite.max(), SLOWEST * bottom) if len(finite) else SLOWEST
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")  # TeX is off in `style`
    with panel("κ = γ/β", "time until wrong pairs flip, in 1/(2β²)") as (figure, axes):
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: "10" + str(round(np.log10(time))).translate(superscript)))
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
    return figure


def _mark_recipe(axes: Axes, found: "Audit") -> None:
    kappa = found.recipe.kappa
    if kappa <= found.curve[-1].kappa:
        axes.axvline(kappa, color=ORANGE, linewidth=4, alpha=0.5, zorder=0, label=f"this recipe, κ = {kappa:.3g}")
    axes.set_xlim(-0.03, found.curve[-1].kappa + 0.03)


def _middle(values: np.ndarray) -> tuple[float, float]:
    """A range that holds 0 and the middle of the values, with some room."""
    low, high = np.quantile(values, ((1 - SHOWN) / 2, (1 + SHOWN) / 2))
    room = 0.02 * (high - low) or 1.0
    return min(float(low - room), 0.0), max(float(high + room), 0.0)

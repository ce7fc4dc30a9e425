"""How every figure and every number looks: one panel each, sizes, fonts, a palette that colour-blind readers can tell apart.

One panel per figure: on a page they stand side by side or below one another, whatever the width of the screen, and a paper
arranges them as it likes. Figures are made of matplotlib's objects; nothing here touches pyplot's global state.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from pe_dpo.metrics.quadrants import QUADRANTS

WIDTH, HEIGHT = 4.8, 3.5
"""Inches of a usual figure: 10 point text in it is still 8 point on a phone."""

INK, QUIET, FAINT, PAPER = "#20242a", "#6b7280", "#d0d4da", "#fefefe"
"""Text and axes; what is secondary; grid lines; what is hollow."""

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#b8609a", "#e69f00", "#56b4e9"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
"""Colours in the order of use.

Source:
    Okabe and Ito 2008, "Color universal design"; purple darkened, black and yellow left out, so that all show on white.
"""
BROWN = "#7a4b21"
"""The colour beside SERIES for what is the same in every sweep: adapters scaled toward the reference."""
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Markers beside the colours of SERIES, for prints in grey."""
CROSS = "X"
"""The marker beside BROWN."""

QUADRANT_LABELS = dict(zip(QUADRANTS, ("both right", "gained: only π right", "lost: only π0 right", "both wrong"), strict=True))
QUADRANT_COLOURS = dict(zip(QUADRANTS, (BLUE, SKY, ORANGE, VERMILLION), strict=True))
"""How pairs are named and drawn by who ranks them right."""

DENSE = 1000
"""From this many points on, they are drawn as an image inside the SVG: 10,000 circles as paths take 2 MB."""

_RC: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, and has κ, Δ and π
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # names from data are not formulas: a lone $ is a dollar
    "text.usetex": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "pe-dpo",  # the same figure gives the same picture
    "figure.dpi": 200,
    "figure.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the look to what is drawn and saved inside the `with`; it takes both, since fonts are chosen when text is made."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


@contextmanager
def panel(
    xlabel: str, ylabel: str, *, width: float = WIDTH, height: float = HEIGHT, columns: int = 2, has_whole_x: bool = False
) -> Iterator[tuple[Figure, Axes]]:
    """Draw a figure of one panel inside the `with`; its legend, if it has one, comes under the panel, where it hides nothing.

    Args:
        xlabel: what is on the x axis, with its unit.
        ylabel: what is on the y axis, with its unit.
        width: inches.
        height: inches.
        columns: of the legend, at most.
        has_whole_x: whether x is counted in whole numbers, as steps and tokens are.
    """
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if has_whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        yield figure, axes
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            figure.legend(loc="outside lower center", ncols=min(columns, len(handles)), handlelength=1.8)


def scatter_points(axes: Axes, x: Any, y: Any, colour: str, label: str, *, total: int) -> None:
    """Draw one point for each pair of a data set; the more pairs there are in all (total), the smaller they are."""
    size = 18 if total < 300 else 9 if total < 3000 else 4
    if len(x):
        axes.scatter(x, y, s=size, color=colour, alpha=0.6, linewidths=0, label=label, rasterized=total >= DENSE)


# Figures are drawn by their canvases: `Figure.savefig` goes through one once more before it draws it.


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG (200 dpi, on white); it keeps its layout and must not be changed afterwards."""
    with style():
        FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})
    figure.set_layout_engine("none")  # it has been laid out just now, which takes half of the time of the next picture


def to_svg(figure: Figure) -> bytes:
    """Return a figure as an SVG document for a page: text as paths, without a date, so that the same is the same."""
    buffer = io.BytesIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style():
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    return buffer.getvalue()


def fmt(value: float, form: str) -> str:
    """Return a number for people, formatted as ".3f" or "+.1f" says.

    Its minus is as wide as its plus, zero has no sign, and "–" stands for what is not known (NaN).
    """
    if value != value:
        return "–"
    text = format(value, form)
    return text.replace("-", "−") if text.strip("+-0.") else text.lstrip("+-")


def plain(text: object, most: int = 60) -> str:
    """Return text that the font can draw on one line: other characters become □, long text is cut with …."""
    known = _known_characters()
    line = "".join(sign if ord(sign) in known and sign.isprintable() else "□" for sign in " ".join(str(text).split()))
    return line if len(line) <= most else line[: most - 1] + "…"


@cache
def _known_characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=["DejaVu Sans"]))).get_charmap())

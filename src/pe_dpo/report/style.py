"""How every figure looks: one panel each, sizes, fonts, a palette that colour-blind readers can tell apart, PNG and SVG.

One panel per figure: on a page they stand side by side or below one another, whatever the width of the screen, and a paper
arranges them as it likes. Figures are made of matplotlib's objects; nothing here touches pyplot's global state.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

WIDTH, HEIGHT = 4.8, 3.5
"""Inches of a usual figure: 10 point text in it is still 8 point on a phone."""

INK, QUIET, FAINT, PAPER = "#20242a", "#6b7280", "#d0d4da", "#fefefe"
"""Text and axes; what is secondary; grid lines; what is hollow."""

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#b8609a", "#e69f00", "#56b4e9"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
"""Colours in the order of use.

Source:
    Okabe and Ito 2008, "Color universal design"; purple darkened, black and yellow left out, so that all show on white and in
    the dark.
"""
BROWN = "#7a4b21"
"""Beside SERIES, for what is the same in every sweep: adapters scaled toward the reference."""
PAGE_COLOURS = {
    **{INK: "--ink", QUIET: "--quiet", FAINT: "--faint", BLUE: "--blue", VERMILLION: "--vermillion", GREEN: "--green"},
    **{PURPLE: "--purple", ORANGE: "--orange", SKY: "--sky", BROWN: "--brown", PAPER: "--paper"},
}
"""What a page says instead, so that it can have lighter ones in the dark."""
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Beside each colour of SERIES, for prints in grey."""
CROSS = "X"
"""Beside BROWN."""

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
    "svg.hashsalt": "pe-dpo",  # the same figure gives the same file
    "savefig.dpi": 200,
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the look to what is drawn and saved inside the `with`; it takes both, since fonts are chosen when text is made."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return a figure with one panel; call it inside `style()`.

    Args:
        width: inches.
        height: inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write NAME.png (200 dpi, on white) and NAME.svg into a folder that exists; return the SVG document.

    The figure keeps its layout and must not be changed afterwards.
    """
    svg = to_svg(figure)
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    figure.set_layout_engine("none")  # it has been laid out just now, which takes half of the time
    with style():
        figure.savefig(folder / f"{name}.png", format="png", facecolor="white", metadata={"Software": None})
    return svg


def to_svg(figure: Figure) -> str:
    """Return the figure as an SVG document: text as paths, transparent, without a date, so that the same is the same."""
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return buffer.getvalue()


def to_element(svg: str, name: str) -> str:
    """Return an SVG document of `to_svg` as an <svg> element for a page.

    Its ids begin with the name, since a page holds several figures; its colours are the page's own (PAGE_COLOURS).

    Args:
        svg: the document.
        name: letters, digits and dashes; another for every figure of a page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    svg = svg.replace("<svg ", '<svg stroke-linejoin="round" stroke-linecap="butt" ', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-').replace("xlink:href=", "href=")
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def plain(text: object, most: int = 60) -> str:
    """Return text that the font can draw on one line: other characters become □, long text is cut with …."""
    known = _known_characters()
    line = "".join(sign if ord(sign) in known and sign.isprintable() else "□" for sign in " ".join(str(text).split()))
    return line if len(line) <= most else line[: most - 1] + "…"


@cache
def _known_characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=["DejaVu Sans"]))).get_charmap())

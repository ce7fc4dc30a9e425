"""A picture of a step's results: CPU seconds of every variant, and how many times faster than TRL's default and best."""

from pathlib import Path
from typing import Any

from benchmarks.results import load
from benchmarks.rounds import spread

PLAIN = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
GREY, BLUE, DARK = "#a7adb5", "#2f6fb0", "#173a5e"


def plot_step(path: Path) -> Path:
    """Draw the results of `step` beside their file and return the picture's path.

    Bars are medians over the rounds, whiskers smallest and largest.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = load(path)
    names = list(results["round_seconds"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.42 * len(names) + 1.9), sharey=True, layout="constrained")
    _draw_seconds(left, results, names)
    _draw_ratios(right, results, names)
    left.set_yticks(range(len(names)), [_label(name, results) for name in names], fontsize=9)
    left.invert_yaxis()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e3e6ea", linewidth=0.8)
        axis.set_axisbelow(True)
    settings, machine = results["settings"], results["machine"]
    figure.suptitle(
        f"One preference step: {settings['shape']}, {settings['dtype']}, {settings['model']}, "
        f"{results['tokens']['batch']['pairs']} pairs, one thread of {machine['cpu']}, {machine['date'][:10]}",
        fontsize=10,
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=140)
    plt.close(figure)
    return target


def _draw_seconds(axis: Any, results: dict[str, Any], names: list[str]) -> None:
    middles = [spread(results["round_seconds"][name]) for name in names]
    whiskers = [[m.median - m.low for m in middles], [m.high - m.median for m in middles]]
    colours = [GREY if name.startswith("TRL ") else BLUE for name in names]
    axis.barh(range(len(names)), [m.median for m in middles], xerr=whiskers, color=colours, height=0.68, ecolor="#444444")
    for row, middle in enumerate(middles):
        axis.annotate(
            f"{middle.median:.2f}", (middle.high, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_xlabel("CPU seconds per optimizer batch (TRL grey, ours blue; shorter is better)", fontsize=9)
    axis.margins(x=0.1)


def _draw_ratios(axis: Any, results: dict[str, Any], names: list[str]) -> None:
    for offset, key, colour, label in (
        (-0.18, "over_trl_default", BLUE, "TRL default"),
        (0.18, "over_trl_best", DARK, "TRL best of the grid"),
    ):
        ratios = [results["ratios"][name][key] for name in names]
        rows = [row + offset for row in range(len(names))]
        whiskers = [[m - low for m, low, _ in ratios], [high - m for m, _, high in ratios]]
        axis.barh(rows, [m for m, _, _ in ratios], xerr=whiskers, color=colour, height=0.34, ecolor="#444444", label=label)
        for row, (middle, _, high) in zip(rows, ratios, strict=True):
            axis.annotate(
                f"{middle:.2f}", (high, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7, bbox=PLAIN
            )
    axis.axvline(1, color="#666666", linewidth=0.8)
    axis.set_xlabel("times as fast as (ratio within each round; longer is better)", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="upper right")
    axis.margins(x=0.1)


def _label(name: str, results: dict[str, Any]) -> str:
    if name == results["trl_default"]:
        return f"TRL default: {name.removeprefix('TRL ')}"
    return f"TRL best: {name.removeprefix('TRL ')}" if name == results["trl_best"] else name

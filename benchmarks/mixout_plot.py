"""The picture of what mixout costs: times plain LoRA by shape, and memory beyond plain LoRA's."""

from pathlib import Path
from typing import Any

from benchmarks.mixout_cost import AGAIN, COLUMN, DROPOUT, ELEMENT, MOST, PEFT, PLAIN
from benchmarks.results import load

STYLES = {
    AGAIN: ("plain LoRA again (noise)", "#8a8f98", "|"),
    COLUMN: ("mixout, column", "#173a5e", "o"),
    ELEMENT: ("mixout, element", "#c8553d", "s"),
    DROPOUT: ("lora_dropout", "#e0a030", "^"),
    PEFT: ("PEFT's own plain LoRA", "#5b9a5b", "x"),
}
TICKS = (0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 5)


def plot_mixout(path: Path) -> Path:
    """Draw two panels beside the results and return the picture's path.

    Dots are medians over the rounds of ratios within a round, bars smallest and largest.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = load(path)
    rows = results["layers"] + results["steps"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14.5, 0.5 * len(rows) + 2.4), width_ratios=(1.7, 1), layout="constrained"
    )
    _draw_ratios(left, rows)
    _draw_memory(right, results["memory"])
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e3e6ea", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.invert_yaxis()
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=7, label=title)
        for title, colour, marker in STYLES.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    machine = results["machine"]
    figure.suptitle(
        f"Forward and backward under mixout and under lora_dropout, p = {results['settings']['p']:g}, a new draw each time; "
        f"one thread of {machine['cpu']}, {machine['date'][:10]}",
        fontsize=10,
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=140)
    plt.close(figure)
    return target


def _draw_ratios(axis: Any, rows: list[dict[str, Any]]) -> None:
    for place, (name, (_, colour, marker)) in enumerate(STYLES.items()):
        for number, row in enumerate(rows):
            if name not in row["over_plain"]:
                continue
            median, low, high = row["over_plain"][name]
            axis.errorbar(
                median, number + 0.15 * (place - (len(STYLES) - 1) / 2), xerr=[[median - low], [high - median]],
                color=colour, marker=marker, markersize=6, elinewidth=1.3,
            )  # fmt: skip
    for number in range(1, len(rows)):
        axis.axhline(number - 0.5, color="#eef0f3", linewidth=0.8)
    axis.axvline(1, color="#666666", linewidth=0.9)
    axis.axvline(MOST, color="#173a5e", linewidth=0.9, linestyle="--")
    axis.annotate(
        f"{MOST:g}", (MOST, 1), xycoords=("data", "axes fraction"), xytext=(2, 3), textcoords="offset points",
        fontsize=8, color="#173a5e",
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.minorticks_off()
    axis.set_ylim(-0.5, len(rows) - 0.5)
    axis.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=9)
    axis.set_xlabel("times the CPU seconds of plain LoRA (log scale, no unit)", fontsize=9)
    axis.set_title("Time: a layer in float32 unless said, and whole steps", fontsize=10, loc="left", pad=14)


def _draw_memory(axis: Any, rows: list[dict[str, Any]]) -> None:
    for place, (name, (_, colour, marker)) in enumerate(STYLES.items()):
        for number, row in enumerate(rows):
            plain, own = row["arms"][PLAIN], row["arms"][name]
            height = number + 0.15 * (place - (len(STYLES) - 1) / 2)
            kept, peak = (own[key] - plain[key] for key in ("kept_mib", "peak_mib"))
            axis.plot([kept, peak], [height, height], color=colour, linewidth=0.8, alpha=0.6)
            axis.plot(kept, height, color=colour, marker=marker, markersize=7, fillstyle="none")
            axis.plot(peak, height, color=colour, marker=marker, markersize=7)
    for number, row in enumerate(rows):
        axis.plot([row["matrix_mib"]] * 2, [number - 0.45, number + 0.45], color="#444444", linewidth=1, linestyle=":")
    axis.axvline(0, color="#666666", linewidth=0.9)
    axis.set_xscale("symlog", linthresh=1)
    ticks = (-100, -10, -1, 0, 1, 10, 100)
    axis.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axis.set_ylim(-0.5, len(rows) - 0.5)
    axis.set_yticks(range(len(rows)), [row["title"].replace(", ", "\n") for row in rows], fontsize=9)
    axis.set_xlabel("MiB beyond plain LoRA (linear within ±1); dotted: one d × d matrix", fontsize=9)
    axis.set_title("Memory of a layer: kept for the backward (open), peak (filled)", fontsize=10, loc="left", pad=14)

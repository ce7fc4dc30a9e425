"""The picture of what merges keep of one update, over its size."""

from pathlib import Path

from benchmarks.merge import DEFAULT, ONTO_ORIGINAL, REQUANTIZED, SIXTEEN_BIT, STOCHASTIC
from benchmarks.results import load

COLOURS = {
    DEFAULT.title: ("#173a5e", "o", "-"),
    STOCHASTIC.title: ("#2f6fb0", "s", "-"),
    SIXTEEN_BIT.title: ("#c8553d", "v", "--"),
    ONTO_ORIGINAL.title: ("#e0a030", "^", "--"),
    REQUANTIZED.title: ("#8a8f98", "x", "--"),
}


def plot_merge(path: Path) -> Path:
    """Draw the curve beside its file and return the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = load(path)
    points, machine = results["curve"], results["machine"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.6), sharey=True, layout="constrained")
    scales = [point["relative_size"] for point in points]
    pairs = results["settings"]["held_out_pairs"]
    for axis, key, words in (
        (axes[0], "kept", "share of ΔW in the merged weights, ⟨Ŵ − W, ΔW⟩ / ⟨ΔW, ΔW⟩"),
        (axes[1], "own_shift_kept", f"share of the preference shift kept, {pairs} held-out pairs"),
    ):
        band = "accepted by pe-dpo merge (0.9 to 1.1)" if key == "kept" else None
        axis.axhspan(0.9, 1.1, color="#e8eef5", zorder=0, label=band)
        for title, (colour, marker, line) in COLOURS.items():
            values = [next(row[key] for row in point["rows"] if row["way"] == title) for point in points]
            axis.plot(scales, values, line, color=colour, marker=marker, markersize=6, linewidth=1.8,
                      label=title if key == "kept" else None)  # fmt: skip
        axis.set_xscale("log")
        axis.set_ylim(-0.25, 1.6)
        axis.set_xlabel("size of the update, |ΔW| / |W| (Frobenius, all adapted layers; no unit)", fontsize=9)
        axis.set_title(words, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e3e6ea", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("share kept (1 = all of it)", fontsize=9)
    axes[1].annotate(
        "below about 1e-4 rounding W to bfloat16\nmoves preferences more than the adapter does;\n"
        "curves leave the picture there",
        (0.3, 0.84),
        xycoords="axes fraction",
        fontsize=8.5,
        color="#444444",
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(
        "One trained DPO update, scaled and merged: nf4 with double quantization, Llama of 1.4 M parameters, "
        f"{machine['date'][:10]}",
        fontsize=11,
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=140)
    plt.close(figure)
    return target

"""The picture of the log-linear world: KL over each dial, the frontier, and dials at the same KL."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import load

STYLES = {
    "beta": ("β = γ", "#173a5e", "o", "-"),
    "mixout": ("mixout, γ = β", "#2f6fb0", "s", "-"),
    "early": ("stopping early, γ = β", "#5b9a5b", "D", "-"),
    "kappa": ("κ = γ/β, β = ½", "#7b5aa6", "P", "-"),
    "floor": ("floor 0, β = γ", "#e0a030", "^", "--"),
    "mixout_alone": ("mixout, γ = 0", "#c8553d", "v", "--"),
    "early_alone": ("stopping early, γ = 0", "#d98a9a", "<", "--"),
    "beta_alone": ("β, γ = 0", "#8a8f98", "x", "--"),
}
RED = "#c8553d"
BLUE = "#173a5e"


def plot_worlds(path: Path) -> Path:
    """Draw six panels beside the results and return the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = load(path)
    figure, axes = plt.subplots(2, 3, figsize=(16.5, 10), layout="constrained")
    _draw_kappa(axes[0, 0], results)
    _draw_beta(axes[0, 1], results)
    _draw_mixout(axes[0, 2], results)
    _draw_frontier(axes[1, 0], results)
    _draw_matched(axes[1, 1], results)
    _draw_kappa_at_its_kl(axes[1, 2], results)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e3e6ea", linewidth=0.8)
        axis.set_axisbelow(True)
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle=line, label=title)
        for title, colour, marker, line in STYLES.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    world, seeds = results["world"], len(results["settings"]["seeds"])
    figure.suptitle(
        f"Log-linear world, {world['prompts']} prompts, {world['answers']} answers, {world['features']} features, "
        f"Bradley–Terry labels; {seeds} seeds, means and 95 % intervals; all expectations exact",
        fontsize=11,
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=140)
    plt.close(figure)
    return target


def _draw_kappa(axis: Any, results: dict[str, Any]) -> None:
    points = results["dials"]["kappa"]
    kappa = [point["value"] for point in points]
    labels = (("kl", "KL(π‖π0)", BLUE, "o", 10), ("entropy", "entropy of π", RED, "s", -16))
    for key, title, colour, marker, above in labels:
        values = np.array([point[key] for point in points])
        axis.plot(kappa, values, color=colour, linewidth=0.6, alpha=0.35)
        axis.errorbar(kappa, values.mean(1), yerr=_half_widths(values), color=colour, marker=marker, markersize=5, capsize=2)
        axis.annotate(title, (kappa[-1], values.mean(1)[-1]), xytext=(4, above), ha="right",
                      textcoords="offset points", fontsize=9, color=colour)  # fmt: skip
    axis.axhline(np.mean(results["reference"]["entropy"]), color=RED, linewidth=0.9, linestyle=":")
    axis.annotate("entropy of π0", (kappa[-1], np.mean(results["reference"]["entropy"])), xytext=(-4, 4), ha="right",
                  textcoords="offset points", fontsize=9, color=RED)  # fmt: skip
    axis.set_xlabel("κ = γ/β (no unit), β = ½; thin lines are seeds", fontsize=9)
    axis.set_ylabel("nats", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.set_title("γ is no tether: KL has a minimum inside, entropy falls", fontsize=10, loc="left")


def _draw_beta(axis: Any, results: dict[str, Any]) -> None:
    for name in ("beta", "floor", "beta_alone"):
        _draw_kl(axis, results, name)
    axis.set_ylim(bottom=0)
    axis.set_xscale("log")
    axis.set_xlabel("β (no unit)", fontsize=9)
    axis.set_title("A large β ends at π0 only with γ = β and no floor", fontsize=10, loc="left")


def _draw_mixout(axis: Any, results: dict[str, Any]) -> None:
    for name in ("mixout", "mixout_alone"):
        _draw_kl(axis, results, name)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("p of mixout (share), β = ½", fontsize=9)
    axis.set_title("A large p ends at π0, whatever γ is", fontsize=10, loc="left")


def _draw_kl(axis: Any, results: dict[str, Any], name: str) -> None:
    _, colour, marker, line = STYLES[name]
    points = results["dials"][name]
    values = np.array([point["kl"] for point in points])
    axis.errorbar(
        [point["value"] for point in points], values.mean(1), yerr=_half_widths(values),
        color=colour, marker=marker, linestyle=line, markersize=5, capsize=2,
    )  # fmt: skip
    axis.set_ylabel("KL(π‖π0), nats", fontsize=9)


def _draw_frontier(axis: Any, results: dict[str, Any]) -> None:
    for name, (_, colour, marker, line) in STYLES.items():
        points = results["dials"][name]
        kl, reward = (np.array([point[key] for point in points]) for key in ("kl", "reward"))
        axis.errorbar(
            np.sqrt(kl).mean(1), reward.mean(1), xerr=_half_widths(np.sqrt(kl)), yerr=_half_widths(reward),
            color=colour, marker=marker, linestyle=line, markersize=5, linewidth=1.4, elinewidth=0.8,
        )  # fmt: skip
    axis.plot(0, 0, marker="*", color="black", markersize=11)
    axis.annotate("π0", (0, 0), xytext=(7, -3), textcoords="offset points", fontsize=9)
    axis.set_xlabel("√KL(π‖π0) on prompts that were not trained on (√nats)", fontsize=9)
    axis.set_ylabel("reward gained over π0 (its standard deviation is 1)", fontsize=9)
    axis.set_title("What a nat buys", fontsize=10, loc="left")


def _draw_matched(axis: Any, results: dict[str, Any]) -> None:
    names = [name for name in STYLES if name in results["reward_at_the_same_kl"]]
    for place, name in enumerate(names):
        rows = [row for row in results["reward_at_the_same_kl"][name] if "mean" in row]
        _draw_differences(axis, name, rows, [row["kl"] * 1.03 ** (place - len(names) / 2) for row in rows])
    axis.axhline(0, color=BLUE, linewidth=1.2)
    axis.set_xscale("log")
    targets = [row["kl"] for row in next(iter(results["reward_at_the_same_kl"].values()))]
    axis.set_xticks(targets, [f"{target:g}" for target in targets])
    axis.minorticks_off()
    axis.set_xlabel("KL at which both are compared, nats (only where all seeds were observed)", fontsize=9)
    axis.set_ylabel("reward less that of β = γ, paired by seed", fontsize=9)
    axis.set_title("At the same KL, against the β dial", fontsize=10, loc="left")


def _draw_kappa_at_its_kl(axis: Any, results: dict[str, Any]) -> None:
    rows = [row for row in results["reward_of_kappa_at_its_own_kl"] if "mean" in row]
    _draw_differences(axis, "kappa", rows, [row["value"] for row in rows])
    axis.axhline(0, color=BLUE, linewidth=1.2)
    axis.set_xlabel("κ = γ/β (no unit), β = ½", fontsize=9)
    axis.set_ylabel("reward less that of β = γ at the run's own KL", fontsize=9)
    axis.set_title("γ apart from β is off the frontier on both sides", fontsize=10, loc="left")


def _draw_differences(axis: Any, name: str, rows: list[dict[str, Any]], places: list[float]) -> None:
    _, colour, marker, _ = STYLES[name]
    half = [(row["interval"][1] - row["interval"][0]) / 2 for row in rows]
    axis.errorbar(
        places, [row["mean"] for row in rows], yerr=half,
        color=colour, marker=marker, linestyle="none", markersize=6, capsize=3,
    )  # fmt: skip


def _half_widths(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of each row's mean."""
    from scipy.stats import t

    seeds = values.shape[1]
    half: np.ndarray = t.ppf(0.975, seeds - 1) * values.std(axis=1, ddof=1) / np.sqrt(seeds)
    return half

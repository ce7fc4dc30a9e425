"""The figures: who learns, and what it is worth; the post's table along training; the pull at equal KL."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study import explicit, real
from benchmarks.study.learning import GROUPS, LOGISTIC, arm, ends
from benchmarks.study.measured import Measured, State, kappa
from pe_dpo.experiments.comparison import SCALE, STEP, RunRow, with_state
from pe_dpo.report.style import BLUE, BROWN, GREEN, ORANGE, PURPLE, QUIET, SKY, VERMILLION, style

COLOURS = {0.0: VERMILLION, 0.5: ORANGE, 1.0: GREEN, 2.0: SKY, 4.0: BLUE, 8.0: PURPLE}
CELLS = {"both right": BLUE, "only π right": SKY, "only π0 right": ORANGE, "both wrong": VERMILLION}


def draw(measured: Measured, folder: Path) -> list[Path]:
    """Draw the figures of one experiment as PNG into a folder, and return their paths."""
    with style():
        made = {
            "learning": {"who-learns": _who_learns, "table-along": _table_along},
            "explicit": {"explicit-pull": _explicit_pull},
        }
        paths = []
        for name, of_it in made.get(measured.name, {}).items():
            paths.append(folder / f"{name}.png")
            of_it(measured).savefig(paths[-1], dpi=130)
        return paths


def draw_real(folder: Path) -> list[Path]:
    """Draw the figures of both sets of real pairs as PNG into a folder, and return their paths."""
    with style():
        paths = []
        for name, draw_one in {"who-moves": _who_moves, "frontier": _frontier, "kl-kappa": _kl_of_kappa}.items():
            figure = Figure(figsize=(11, 4.4), layout="constrained")
            for axis, data in zip(figure.subplots(1, 2, sharey=name == "who-moves"), real.DATA, strict=True):
                draw_one(axis, data)
                axis.set_title(data)
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
        return paths


def _who_moves(axis: Axes, data: str) -> None:
    """At β = 2, which share moved toward chosen by what π0 says of the pairs; one line for each κ."""
    for (beta, of_reference), found in sorted(real.grid_ends(data).items()):
        if beta != 2:
            continue
        groups = np.array_split(np.argsort(found[0].reference), 6)
        at = [found[0].reference[group].mean() for group in groups]
        shares = 100 * np.array([[(one.policy > one.reference)[group].mean() for group in groups] for one in found])
        colour = COLOURS[of_reference]
        axis.plot(at, shares.mean(axis=0), "o-", color=colour, label=f"κ = {of_reference:g}")
        axis.fill_between(at, shares.min(axis=0), shares.max(axis=0), color=colour, alpha=0.15, lw=0)
    axis.axvline(0, color=QUIET, lw=0.8)
    axis.set(ylim=(0, 100), xlabel="← π0 ranks it wrong      Δ0 per token, nats      π0 ranks it right →")
    if data == real.DATA[0]:
        axis.set_ylabel("held-out pairs moved toward chosen, %")


FRONTIER = {
    "β (γ = β)": (BLUE, "o-", {"loss.beta"}, 1.0), "γ = 0, by β": (VERMILLION, "o-", {"loss.beta", "loss.gamma"}, 0.0),
    "mixout": (PURPLE, "D", {"mixout.p"}, 1.0), "mixout with γ = 0": (ORANGE, "D", {"mixout.p", "loss.gamma"}, 0.0),
    "dropout": (GREEN, "s", {"adapter.dropout"}, 1.0), "learning rate": (SKY, "P", {"train.learning_rate"}, 1.0),
    "earlier stop": (GREEN, "^", {STEP}, 1.0), "scaled": (BROWN, "X", {SCALE}, 1.0),
    "γ = 0, scaled": (BROWN, "v", {"loss.gamma", SCALE}, 0.0),
}  # fmt: skip
"""Hyperparameters that the frontier shows, with the settings that a point has and its κ; the base recipe has none."""


def _frontier(axis: Axes, data: str) -> None:
    """The share moved toward chosen over √KL, mean and range of the seeds."""
    found = real.compared(data, real.METRICS[0])
    for name, (colour, mark, keys, of_reference) in FRONTIER.items():
        points = []
        for point in found.arms:
            has_keys = set(point.settings) <= keys if mark == "o-" else set(point.settings) == keys
            if has_keys and real.kappa_of(point.settings) == of_reference:
                values = 100 * np.array([one.value for one in found.runs if _state_of(one) == point.settings])
                points.append((point.root_kl, values.mean(), values.mean() - values.min(), values.max() - values.mean()))
        at, value, below, above = np.transpose(sorted(points))
        axis.errorbar(at, value, yerr=(below, above), fmt=mark, color=colour, label=name, ms=6, elinewidth=0.8, alpha=0.9)
    axis.set(xlabel="√KL(π‖π0), √nats", ylabel="held-out pairs moved toward chosen, %")


def _state_of(run: RunRow) -> dict[str, Any]:
    return with_state(run.settings, step=run.step, is_final=run.is_final, scale=run.scale)


def _kl_of_kappa(axis: Axes, data: str) -> None:
    """KL over κ, one line for each β, a small mark for each seed."""
    found = real.compared(data, real.METRICS[0])
    for beta, colour in zip(real.BETAS, (VERMILLION, BLUE, GREEN), strict=True):
        of_beta = [
            one
            for one in found.runs
            if one.is_final and one.scale is None and set(one.settings) <= {"loss.beta", "loss.gamma"}
            and one.settings.get("loss.beta", 2.0) == beta
        ]  # fmt: skip
        known = {
            of_reference: [one.kl for one in of_beta if real.kappa_of(one.settings) == of_reference]
            for of_reference in real.KAPPAS
        }
        axis.plot(list(known), [np.mean(kls) for kls in known.values()], "o-", color=colour, label=f"β = {beta:g}")
        for of_reference, kls in known.items():
            axis.plot([of_reference] * len(kls), kls, ".", color=colour, alpha=0.5)
    axis.set(xlabel="κ = γ/β", ylabel="KL(π‖π0), nats an answer", xticks=real.KAPPAS, ylim=(0, None))


def _who_learns(measured: Measured) -> Figure:
    """How far pairs moved by what π0 says of them; and where the policy ends: KL and true win rate."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    found = {value: states for (link, value), states in ends(measured, "from-reference").items() if link == LOGISTIC}
    order = np.argsort(measured.reference)
    groups = np.array_split(order, GROUPS)
    at = [measured.reference[group].mean() for group in groups]
    left.axvspan(min(at) - 0.4, 0, color=VERMILLION, alpha=0.06, lw=0)
    left.axvspan(0, max(at) + 0.4, color=BLUE, alpha=0.06, lw=0)
    for value, states in found.items():
        moves = np.array([[(one.delta - measured.reference)[group].mean() for group in groups] for one in states])
        left.plot(at, moves.mean(axis=0), "o-", color=COLOURS[value], label=f"κ = {value:g}")
        low, high = moves.min(axis=0), moves.max(axis=0)
        left.fill_between(at, low, high, color=COLOURS[value], alpha=0.15, lw=0)
    left.axhline(0, color=QUIET, lw=0.8)
    left.set(xlim=(min(at) - 0.4, max(at) + 0.4), xlabel="what the reference says of a pair: Δ0, nats")
    left.set(ylabel="how far training moved it toward chosen, nats", title="γ decides which pairs learn")
    left.text(0.01, 0.02, "π0 ranks it wrong", transform=left.transAxes, color=VERMILLION)
    left.text(0.99, 0.02, "π0 ranks it right", transform=left.transAxes, color=BLUE, ha="right")
    left.legend(title="γ = κ·β", frameon=False)
    means = []
    for value, states in found.items():
        kl, win = [one.kl.mean() for one in states], [100 * measured.win(one) for one in states]
        right.plot(kl, win, ".", color=COLOURS[value], alpha=0.5)
        means.append((np.mean(kl), np.mean(win)))
        right.plot(*means[-1], "o", color=COLOURS[value], ms=9)
        beside = {0.0: (-14, 10), 0.5: (-10, -18)}.get(value, (8, 4))
        right.annotate(f"κ = {value:g}", means[-1], xytext=beside, textcoords="offset points", color=COLOURS[value])
    right.plot(*np.transpose(means), color=QUIET, lw=0.8, zorder=0)
    right.set(xlabel="KL(π‖π0) of its answers, nats", ylabel="true win rate against π0, %", title="and what that is worth")
    return figure


def _table_along(measured: Measured) -> Figure:
    """Shares of the four cells over the steps, from a start that is courteous and wrong, for three κ."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, value in zip(axes, (0.0, 1.0, 4.0), strict=True):
        along: dict[int, list[list[float]]] = {}
        for one in measured.states:
            if one.part == "from-courteous" and arm(one) == (LOGISTIC, value):
                along.setdefault(one.step, []).append(_cells(one.delta, measured.reference))
                along.setdefault(0, []).append(_cells(measured.initial(one), measured.reference))
        steps = sorted(along)
        shares = 100 * np.array([np.mean(along[step], axis=0) for step in steps]).T
        axis.stackplot(steps, shares, labels=CELLS, colors=CELLS.values(), alpha=0.85)
        axis.set(title=f"κ = {value:g}", xlabel="step", xlim=(0, steps[-1]), ylim=(0, 100))
    axes[0].set_ylabel("held-out pairs, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _cells(policy: np.ndarray, reference: np.ndarray) -> list[float]:
    right, known = policy > 0, reference > 0
    return [float(cell.mean()) for cell in (right & known, right & ~known, ~right & known, ~right & ~known)]


def _explicit_pull(measured: Measured) -> Figure:
    """True win rate over KL: the β dial, and what else pulls toward π0; γ = β and γ = 0."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axis, of_reference, title in zip(figure.subplots(1, 2, sharey=True), (1.0, 0.0), ("γ = β", "γ = 0"), strict=True):
        _dials(axis, measured, of_reference)
        axis.set(xlabel="√KL(π‖π0), √nats", title=title)
        axis.axhline(50, color=QUIET, lw=0.8)
    figure.axes[0].set_ylabel("true win rate against π0, %")
    figure.axes[0].legend(frameon=False)
    return figure


def _dials(axis: Axes, measured: Measured, of_reference: float) -> None:
    """One line for each way to pull, through the means over draws of what it was set to."""
    ends_of = [one for one in measured.states if one.part.startswith("ends")]
    along = [one for one in measured.states if one.part.startswith("along") and kappa(one) == of_reference]
    stops = [one for one in along if one.scale is None]
    scaled = [one for one in along if one.scale is not None or one.is_end]

    def turned(key: str) -> list[tuple[Any, State]]:
        of_dial = [one for one in ends_of if explicit.is_dial(one, key, of_reference)]
        return [(one.settings.get(key), one) for one in of_dial if key == "loss.beta" or key in one.settings]

    for name, colour, line, states in (
        ("β", GREEN, "o-", turned("loss.beta")),
        ("mixout", BLUE, "s--", turned("mixout.p")),
        ("dropout", SKY, "v:", turned("adapter.dropout")),
        ("stopping early", VERMILLION, "D-", [(one.step, one) for one in stops]),
        ("scaling", BROWN, "X-", [(one.scale, one) for one in scaled]),
    ):
        groups: dict[Any, list[State]] = {}
        for value, one in states:
            groups.setdefault(value, []).append(one)
        means = [
            (np.mean([one.kl.mean() ** 0.5 for one in group]), 100 * np.mean([measured.win(one) for one in group]))
            for group in groups.values()
        ]
        axis.plot(*np.transpose(sorted(means)), line, color=colour, label=name, ms=6)

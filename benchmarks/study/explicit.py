"""Does an explicit pull do what the reference does: true win rates at equal KL, draw by draw, against the β dial."""

from collections.abc import Callable

import numpy as np

from benchmarks.study.contrasts import contrast_table, contrasts
from benchmarks.study.designs import BETAS
from benchmarks.study.measured import Measured, State, kappa
from pe_dpo.metrics.table import Floats

WITHIN = 2.0
"""Points of true win rate."""


def is_dial(state: State, key: str, of_reference: float) -> bool:
    """Return whether a state turns this key alone, or nothing, beside γ."""
    return (
        kappa(state) == of_reference and state.is_end and state.scale is None and set(state.settings) - {"loss.gamma"} <= {key}
    )


ARMS: dict[str, Callable[[State], bool]] = {
    "mixout (γ = β)": lambda one: is_dial(one, "mixout.p", 1) and "mixout.p" in one.settings,
    "mixout with γ = 0": lambda one: is_dial(one, "mixout.p", 0) and "mixout.p" in one.settings,
    "stops (γ = β)": lambda one: kappa(one) == 1 and one.scale is None and not one.is_end,
    "scales (γ = β)": lambda one: kappa(one) == 1 and one.scale is not None,
}
"""The four that were named."""
OTHERS: dict[str, Callable[[State], bool]] = {
    "dropout (γ = β)": lambda one: is_dial(one, "adapter.dropout", 1) and "adapter.dropout" in one.settings,
    "dropout with γ = 0": lambda one: is_dial(one, "adapter.dropout", 0) and "adapter.dropout" in one.settings,
    "β with γ = 0": lambda one: is_dial(one, "loss.beta", 0) and one.part.startswith("ends"),
    "stops with γ = 0": lambda one: kappa(one) == 0 and one.scale is None and not one.is_end,
    "scales with γ = 0": lambda one: kappa(one) == 0 and one.scale is not None,
}


def at_equal_kl(measured: Measured, is_in: Callable[[State], bool]) -> tuple[Floats, int, int]:
    """Return differences from the β dial, one a draw; how many states lie within its KLs; and how many there are.

    Straight lines over √KL join the dial's values of one draw; a draw of which no state lies within its KLs has no difference.
    """
    differences, inside, total = [], 0, 0
    for draw in sorted({one.draw for one in measured.states}):
        of_draw = [one for one in measured.states if one.draw == draw]
        dial = [one for one in of_draw if is_dial(one, "loss.beta", 1) and one.part.startswith("ends")]
        knots = sorted((one.kl.mean() ** 0.5, measured.win(one)) for one in dial)
        roots, wins = np.array(knots).T
        found = []
        for one in of_draw:
            if is_in(one):
                total += 1
                at = one.kl.mean() ** 0.5
                if roots[0] <= at <= roots[-1]:
                    found.append(measured.win(one) - float(np.interp(at, roots, wins)))
        inside += len(found)
        if found:
            differences.append(float(np.mean(found)))
    return np.array(differences), inside, total


def named(measured: Measured) -> str:
    """Return the four contrasts at equal KL, and whether they are within 2 points."""
    return _against_the_dial(measured, ARMS)


def others(measured: Measured) -> str:
    """Return the same of arms that were not named; adjusted among themselves, for description."""
    return _against_the_dial(measured, OTHERS)


def _against_the_dial(measured: Measured, arms: dict[str, Callable[[State], bool]]) -> str:
    differences = {}
    for name, is_in in arms.items():
        values, inside, total = at_equal_kl(measured, is_in)
        differences[f"{name} − β, {inside} of {total} states in range"] = values
    return contrast_table(contrasts(differences), unit="points", scale=100, within=WITHIN)


def dials_table(measured: Measured) -> str:
    """Return every setting: KL, true win rate and share of held-out pairs ranked right, mean over draws."""
    groups: dict[tuple[str, str], list[State]] = {}
    for one in measured.states:
        keys = {key: value for key, value in one.settings.items() if key != "loss.gamma"}
        if one.part.startswith("along") and one.is_end and one.scale is None:
            continue  # the same as the ends' own
        key, value = next(iter(keys.items())) if keys else ("loss.beta", 0.2)
        name = {"loss.beta": "β", "mixout.p": "mixout", "adapter.dropout": "dropout"}[key]
        words = f"{name} {value:g}"
        if one.scale is not None:
            words = f"scaled to {one.scale:g}"
        elif not one.is_end:
            words = f"stopped at step {one.step}"
        groups.setdefault((words, "β" if kappa(one) else "0"), []).append(one)
    lines = [
        "| | γ = β: KL | γ = β: win | γ = β: right | γ = 0: KL | γ = 0: win | γ = 0: right |",
        "|---|---|---|---|---|---|---|",
    ]
    for words in dict.fromkeys(words for words, _ in groups):
        cells = []
        for gamma in ("β", "0"):
            states = groups.get((words, gamma), [])
            if not states:
                cells += ["", "", ""]
                continue
            kl, win = np.mean([one.kl.mean() for one in states]), 100 * np.mean([measured.win(one) for one in states])
            cells += [f"{kl:.2f}", f"{win:.1f}", f"{100 * np.mean([(one.delta > 0).mean() for one in states]):.1f}"]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def facts(measured: Measured) -> dict[str, str]:
    """Return the numbers that the page's sentences take from the experiment, as they stand there."""
    stops, _, _ = at_equal_kl(measured, ARMS["stops (γ = β)"])
    (found,) = contrasts({"stops": stops})

    def mean(value: float, of_reference: float, number: Callable[[State], float]) -> float:
        return float(
            np.mean(
                [
                    number(one)
                    for one in measured.states
                    if one.part.startswith("ends")
                    and is_dial(one, "loss.beta", of_reference)
                    and one.settings.get("loss.beta", 0.2) == value
                ]
            )
        )

    def ranked(state: State) -> float:
        return float((state.delta > 0).mean())

    wins = {value: 100 * mean(value, 1, measured.win) for value in BETAS}
    best = max(wins, key=lambda value: wins[value])
    drift = mean(4.0, 0, lambda one: float(one.kl.mean()))
    return {
        "stopping early over β": f"{100 * found.mean:.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]",
        "the best β": f"{wins[best]:.0f} % at β = {best:g}",
        "overfitted": f"{wins[0.05]:.1f} % at β = 0.05",
        "and ranked right": f"{100 * mean(0.05, 1, ranked):.1f} %",
        "β = 4 with γ = 0": f"{drift:.2f} nats at β = 4, and {100 * mean(4.0, 0, measured.win):.1f} %",
    }

"""When does learning happen: by κ, link and start; what moved, how far, and whether the answers are better for it."""

from collections.abc import Sequence

import numpy as np

from benchmarks.study.contrasts import contrast_table, contrasts
from benchmarks.study.measured import Measured, State, kappa

LOGISTIC, HINGE, SIMPO = "logistic", "hinge, margin 0.1", "SimPO"


def arm(state: State) -> tuple[str, float]:
    """Return link and κ."""
    if "loss.preset" in state.settings:
        return SIMPO, 0.0
    return HINGE if "loss.link" in state.settings else LOGISTIC, kappa(state)


def ends(measured: Measured, part: str) -> dict[tuple[str, float], list[State]]:
    """Return the ends of runs by arm, in the order of their seeds."""
    found: dict[tuple[str, float], list[State]] = {}
    for state in sorted(measured.states, key=lambda one: (arm(one), one.seed)):
        if state.part == part and state.is_end:
            found.setdefault(arm(state), []).append(state)
    order = [LOGISTIC, HINGE, SIMPO]
    return dict(sorted(found.items(), key=lambda one: (order.index(one[0][0]), one[0][1])))


def arms_table(measured: Measured, part: str) -> str:
    """Return every arm: moved by what π0 says, gap, ranked right; KL and true win rate with their sd between seeds."""
    lines = [
        "| link | κ | moved, π0 right | moved, π0 wrong | gap | ranked right | KL | true win rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (link, of_reference), states in ends(measured, part).items():
        right, wrong = (100 * np.mean([measured.moved(one, is_right=which) for one in states]) for which in (True, False))
        ranked = 100 * np.mean([(one.delta > 0).mean() for one in states])
        kl, win = [one.kl.mean() for one in states], [100 * measured.win(one) for one in states]
        lines.append(
            f"| {link} | {of_reference:g} | {right:.0f} | {wrong:.0f} | {wrong - right:+.0f} | {ranked:.0f} | "
            f"{np.mean(kl):.2f} ± {np.std(kl, ddof=1):.2f} | {np.mean(win):.1f} ± {np.std(win, ddof=1):.1f} |".replace("-", "−")
        )
    return "\n".join([lines[0], lines[1].replace("−", "-"), *lines[2:]])


def named(measured: Measured) -> tuple[str, str]:
    """Return the four contrasts as two tables: those in points and that in nats; Holm over all four."""
    found = {
        of_reference: states for (link, of_reference), states in ends(measured, "from-reference").items() if link == LOGISTIC
    }

    def paired(left: Sequence[float], right: Sequence[float]) -> list[float]:
        return [one - other for one, other in zip(left, right, strict=True)]

    gaps = {value: [measured.gap(one) for one in found[value]] for value in (0.0, 1.0, 4.0)}
    kls = {value: [float(one.kl.mean()) for one in found[value]] for value in (1.0, 4.0)}
    wins = {value: [measured.win(one) for one in found[value]] for value in (1.0, 4.0)}
    four = contrasts(
        {
            "gap(κ = 0) − gap(κ = 1)": paired(gaps[0.0], gaps[1.0]),
            "gap(κ = 1) − gap(κ = 4)": paired(gaps[1.0], gaps[4.0]),
            "KL(κ = 4) − KL(κ = 1)": paired(kls[4.0], kls[1.0]),
            "win(κ = 1) − win(κ = 4)": paired(wins[1.0], wins[4.0]),
        }
    )
    in_points = [one for one in four if "KL" not in one.name]
    in_nats = [one for one in four if "KL" in one.name]
    return contrast_table(in_points, unit="points", scale=100), contrast_table(in_nats, unit="nats", scale=1)


CELLS = {
    "both right": (True, True),
    "gained: π right, π0 wrong": (True, False),
    "lost: π wrong, π0 right": (False, True),
    "both wrong": (False, False),
}


def cells_table(measured: Measured) -> str:
    """Return how many pairs moved toward chosen since the start, by the cell of policy and reference in which they started."""
    found = ends(measured, "from-courteous")
    first = next(iter(found.values()))[0]
    start = measured.initial(first)
    lines = ["| link | κ | " + " | ".join(CELLS) + " |", "|---|---|" + "---|" * len(CELLS)]
    members = [((start > 0) == policy) & ((measured.reference > 0) == reference) for policy, reference in CELLS.values()]
    lines.append("| pairs | | " + " | ".join(str(int(one.sum())) for one in members) + " |")
    for (link, of_reference), states in found.items():
        shares = [100 * np.mean([(state.delta > start)[one].mean() for state in states]) for one in members]
        lines.append(f"| {link} | {of_reference:g} | " + " | ".join(f"{share:.0f}" for share in shares) + " |")
    return "\n".join(lines)


GROUPS = 8
"""Held-out pairs are taken in so many groups of equal size, by Δ0."""


def facts(measured: Measured) -> dict[str, str]:
    """Return the numbers that the page's sentences take from the experiment, as they stand there."""
    from_reference, from_courteous = (ends(measured, f"from-{start}") for start in ("reference", "courteous"))
    wrongest, *_, surest = np.array_split(np.argsort(measured.reference), GROUPS)

    def win(arms: dict[tuple[str, float], list[State]], link: str, value: float) -> float:
        return float(100 * np.mean([measured.win(one) for one in arms[link, value]]))

    def kl(arms: dict[tuple[str, float], list[State]], link: str, value: float) -> float:
        return float(np.mean([one.kl.mean() for one in arms[link, value]]))

    def move(group: np.ndarray, value: float) -> float:
        states = from_reference[LOGISTIC, value]
        return float(np.mean([(one.delta - measured.reference)[group].mean() for one in states]))

    none, content = kl(from_reference, LOGISTIC, 0.0), (from_reference, HINGE, 1.0)
    values = sorted(value for link, value in from_reference if link == LOGISTIC)
    far = [win(from_courteous, link, 8.0) for link in (LOGISTIC, HINGE)]
    start = measured.initial(from_courteous[HINGE, 2.0][0])
    lost = (start < 0) & (measured.reference < 0)
    both_wrong = [
        100 * np.mean([(one.delta > start)[lost].mean() for one in from_courteous[HINGE, value]]) for value in (2.0, 4.0, 8.0)
    ]
    return {
        "moved where π0 is surest": f"{move(surest, 0.0):.1f} nats toward chosen at κ = 0 and {move(surest, 8.0):.1f} at κ = 8",
        "moved where π0 is most wrong": f"move {move(wrongest, 0.0):.1f} and {move(wrongest, 8.0):.1f}",
        "fall of the win rate": f"from {win(from_reference, LOGISTIC, 1.0):.1f} to {win(from_reference, LOGISTIC, 8.0):.1f} %",
        "KL from κ = 0 to 8": f"from {none:.1f} to {kl(from_reference, LOGISTIC, 8.0):.1f} nats",
        "the hinge that is content": f"KL {kl(*content):.2f}, win rate {win(*content):.1f} %",
        "SimPO's distance over γ = 0's": f"{kl(from_reference, SIMPO, 0.0) / none:.1f} times",
        "both wrong, under a hinge": ", ".join(f"{share:.0f}" for share in both_wrong) + " %",
        "courteous: win rate at κ = 8": f"{min(far):.0f} to {max(far):.0f} %",
        "courteous: KL by κ": "(" + ", ".join(f"{kl(from_courteous, LOGISTIC, value):.1f}" for value in values) + " nats)",
    }

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

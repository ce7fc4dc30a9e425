"""Luck, tuning, stopping early and stochasticity apart: components of variance, and what the best of k is worth."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from benchmarks.study.measured import Measured, State
from pe_dpo.metrics.table import Floats

ARMS = {"dpo": "DPO", "margin": "γ = 0, margin 1", "shuffled": "DPO on a coin's labels"}
SIZES = (1, 2, 4, 8, 16, 32, 72)


class Components(NamedTuple):
    """Variances of one number of a run; of a balanced design, so method of moments, not below 0."""

    draws: float
    """Which pairs were drawn."""
    seeds: float
    """Adapter, order and masks, within a draw."""
    configurations: float
    """β and learning rate."""
    draws_by_configurations: float
    rest: float
    """Seeds by configurations, and the error of the measurement."""


def components(values: Floats) -> Components:
    """Return the components of variance of values, (draws, seeds, configurations), with seeds nested in draws.

    Source: Searle, Casella & McCulloch 1992, "Variance components", section 4.4, expected mean squares of balanced data.
    """
    draws, seeds, configurations = values.shape
    grand = values.mean()
    by_draw, by_seed, by_configuration = values.mean(axis=(1, 2)), values.mean(axis=2), values.mean(axis=(0, 1))
    by_both = values.mean(axis=1)
    of_draws = seeds * configurations * ((by_draw - grand) ** 2).sum() / (draws - 1)
    of_seeds = configurations * ((by_seed - by_draw[:, None]) ** 2).sum() / (draws * (seeds - 1))
    of_configurations = draws * seeds * ((by_configuration - grand) ** 2).sum() / (configurations - 1)
    crossed = by_both - by_draw[:, None] - by_configuration + grand
    of_crossed = seeds * (crossed**2).sum() / ((draws - 1) * (configurations - 1))
    left = values - by_both[:, None, :] - by_seed[:, :, None] + by_draw[:, None, None]
    of_rest = (left**2).sum() / (draws * (seeds - 1) * (configurations - 1))
    found = (
        (of_draws - of_seeds - of_crossed + of_rest) / (seeds * configurations),
        (of_seeds - of_rest) / configurations,
        (of_configurations - of_crossed) / (draws * seeds),
        (of_crossed - of_rest) / seeds,
        of_rest,
    )
    return Components(*(max(0.0, float(one)) for one in found))


def best_of(scores: Floats, worth: Floats, size: int) -> float:
    """Return the expected worth of the best-scored of `size` candidates drawn without replacement.

    The i-th best of n is the best of those drawn with a chance of C(n − i, size − 1)/C(n, size). Of equal scores the earlier.

    Args:
        scores: by which is picked, (n,).
        worth: what the pick is then worth, (n,).
        size: of the draws, at most n.
    """
    order, count = np.argsort(-scores, kind="stable"), len(scores)
    behind = count - 1 - np.arange(count)

    def log_choose(n: Floats | int, k: int) -> Floats:
        return np.asarray(gammaln(np.asarray(n) + 1.0) - gammaln(k + 1.0) - gammaln(np.asarray(n) - k + 1.0))

    possible = behind >= size - 1
    chances = np.exp(log_choose(behind[possible], size - 1) - log_choose(count, size))
    return float((chances * worth[order][possible]).sum())


class Halves(NamedTuple):
    """One half of the held-out questions picks, the other is read."""

    picks: Floats
    """Share of pairs ranked right on the half that picks, one a candidate."""
    reads: Floats
    """The same on the other half."""
    wins: Floats
    """True win rate on the other half."""


def halves(measured: Measured, states: Sequence[State]) -> list[Halves]:
    """Return candidates seen from both halves of the questions; every question is in one half, by its place in the alphabet."""
    questions = sorted({*measured.shared["pair_questions"], *measured.shared["questions"]})
    is_even = {question: number % 2 == 0 for number, question in enumerate(questions)}
    of_pairs = np.array([is_even[one] for one in measured.shared["pair_questions"]])
    of_answers = np.array([is_even[one] for one in measured.shared["questions"]])

    def ranked(rows: Floats) -> Floats:
        return np.array([(state.delta > 0)[rows].mean() for state in states])

    return [
        Halves(
            ranked(of_pairs == half),
            ranked(of_pairs != half),
            np.array([measured.win(state, of_answers != half) for state in states]),
        )
        for half in (True, False)
    ]


def of_arm(measured: Measured, arm: str, draw: int | None = None) -> list[State]:
    """Return the states of one arm, of one draw or of all, in a fixed order."""
    found = [one for one in measured.states if one.part.rsplit("-", 1)[0] == arm and draw in (None, one.draw)]
    return sorted(found, key=lambda one: (one.draw, one.seed, sorted(one.settings.items()), one.step))


def components_table(measured: Measured) -> str:
    """Return standard deviations, in points, by what brings them in, of the ends of runs."""
    head = ["", "mean", "which pairs", "seed", "configuration", "pairs × configuration", "rest"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    numbers: dict[str, Callable[[State], float]] = {
        "true win rate": measured.win,
        "ranked right": lambda state: float((state.delta > 0).mean()),
    }
    for name, number in numbers.items():
        for arm, words in ARMS.items():
            mean, found = spread(measured, arm, number)
            parts = [f"{100 * variance**0.5:.1f}" for variance in found]
            lines.append(f"| {name}, {words} | {100 * mean:.1f} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def best_table(measured: Measured) -> str:
    """Return the best of k by one half of the questions, on both halves; mean over draws and halves, in points."""
    head = ["k", *(f"{words}: picked by, read, win" for words in ARMS.values())]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    found = {arm: best_by_size(measured, arm) for arm in ARMS}
    for size in SIZES:
        cells = [", ".join(f"{value:.1f}" for value in of_arm[size]) for of_arm in found.values()]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_by_size(measured: Measured, arm: str) -> dict[int, Halves]:
    """Return what the best of k is by the half that picks, on the other half and truly there: mean over draws, in %, by k."""
    draws = sorted({one.draw for one in measured.states})
    found = [half for draw in draws for half in halves(measured, of_arm(measured, arm, draw))]
    return {
        size: Halves(*(100 * np.mean([[best_of(half.picks, worth, size) for worth in half] for half in found], axis=0)))
        for size in SIZES
    }


def spread(measured: Measured, arm: str, number: Callable[[State], float]) -> tuple[float, Components]:
    """Return mean and components of variance of a number at the ends of an arm's runs."""
    states = [one for one in of_arm(measured, arm) if one.is_end]
    draws, seeds = len({one.draw for one in states}), len({one.seed for one in states})
    values = np.array([number(one) for one in states]).reshape(draws, seeds, -1)
    return float(values.mean()), components(values)


def facts(measured: Measured) -> dict[str, str]:
    """Return the numbers that the page's sentences take from the experiment, as they stand there."""
    most = max(SIZES)
    best = {arm: best_by_size(measured, arm) for arm in ARMS}
    coin, dpo, first = best["shuffled"][most], best["dpo"][most], best["dpo"][1]
    _, variances = spread(measured, "dpo", measured.win)
    deviations = Components(*(100 * variance**0.5 for variance in variances))
    picked, read, truly = (last - one for last, one in zip(dpo, first, strict=True))
    return {
        "a coin's best": f"{coin.picks - coin.reads:.1f} points better on the half that picked it",
        "a coin's best, truly": f"its true win rate is {coin.wins:.1f} %",
        "DPO's best, truly": f"DPO's is {dpo.wins:.1f} %",
        "gain of the best": f"{picked:.1f} points on the half that picks, {read:.1f} on the other",
        "what the gain is worth": f"{truly:.1f} points of true win rate",
        "sd by configuration and seed": f"{deviations.configurations:.1f} points against {deviations.seeds:.1f} for the seed",
        "sd by draw": f"{deviations.draws:.1f} for which pairs were drawn",
    }

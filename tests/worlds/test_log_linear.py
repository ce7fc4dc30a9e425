"""What γ, β, mixout and the floor do where reward, KL and accuracy are exact: signs with 95 % intervals over 6 seeds.

One log-linear world with Bradley–Terry labels: evidence about the method and the code, not about language models. "Below" means
that the interval of the differences, paired by seed, lies below 0. The sizes beside the tests were measured here, β = 0.5
where nothing else is said; `python -m benchmarks worlds` has the whole sweep.
"""

import itertools
import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from log_linear import (
    ANSWERS,
    PROMPTS,
    Measures,
    Worlds,
    independent_pairs,
    interval,
    make_worlds,
    measure,
    minimum,
    pair_regimes,
    reward_at,
    train,
    trajectory,
)
from torch import Tensor

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BETA = 0.5
KAPPAS = (0.0, 0.5, 1.0, 2.0, 4.0)
BETAS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.5, 2.5, 5.0)
RATES = (0.15, 0.3, 0.45, 0.65, 0.9)


@cache
def worlds() -> Worlds:
    """The six worlds of all tests."""
    return make_worlds()


@cache
def trained(*, beta: float, gamma: float, **options: Any) -> Measures:
    """What training without mixout comes to, where the loss is lowest."""
    return measure(worlds(), minimum(worlds(), beta=beta, gamma=gamma, **options))


@cache
def path() -> list[Tensor]:
    """θ on Adam's way at γ = β, and at its end."""
    return trajectory(worlds(), beta=BETA, gamma=BETA, keep=(2, 4, 6, 9, 12, 16))


@cache
def untrained() -> Measures:
    """The reference itself."""
    return measure(worlds(), worlds().reference)


def beta_dial(**options: Any) -> list[Measures]:
    """γ = β from large to small, behind the reference: β = ∞."""
    return [untrained(), *(trained(beta=beta, gamma=beta, **options) for beta in reversed(BETAS))]


@cache
def mixout_runs() -> dict[float, list[Measures]]:
    """With the reference and without it, p from large to small."""
    gammas, rates = (nats(column) for column in zip(*itertools.product((BETA, 0.0), reversed(RATES)), strict=True))
    runs = [measure(worlds(), weights) for weights in train(worlds(), beta=BETA, gamma=gammas, mixout=rates)]
    return {BETA: runs[: len(RATES)], 0.0: runs[len(RATES) :]}


def mixout_dial(gamma: float) -> list[Measures]:
    """p from large to small, behind the reference: p = 1."""
    return [untrained(), *mixout_runs()[gamma], trained(beta=BETA, gamma=gamma)]


def nats(values: Iterable[float]) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(list(values), dtype=torch.float64)


def is_below(smaller: Tensor, larger: Tensor | float) -> bool:
    """Whether the interval of the differences lies below 0; a seed out of range (NaN) makes it false."""
    return interval(smaller - larger)[1] < 0


# ---------------------------------------------------------------------------------------------------- the world itself


def test_the_reference_ranks_a_little_better_than_chance():
    assert bool(((untrained().accuracy > 0.52) & (untrained().accuracy < 0.59)).all())


def test_the_reference_is_at_no_distance_from_itself_and_wins_half():
    for field, expected in (("kl", 0.0), ("reward", 0.0), ("win_rate", 0.5), ("chosen_shift", 0.0), ("rejected_shift", 0.0)):
        torch.testing.assert_close(getattr(untrained(), field), torch.full((6,), expected).double(), msg=field)


def test_the_measures_agree_with_a_million_drawn_answers():
    """Reward, win rate and KL of seed 0 within 5 standard errors of what draws give; the errors are 1e-3 and less."""
    world, weights = worlds(), minimum(worlds(), beta=BETA, gamma=BETA)
    logits = world.features[0, PROMPTS:] @ torch.stack([weights[0], world.reference[0]]).T
    policy, reference = torch.log_softmax(logits, dim=1).unbind(2)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.multinomial(p.exp(), 5000, replacement=True, generator=generator) for p in (policy, reference))
    reward = world.reward[0, PROMPTS:]
    ours_reward, theirs_reward = reward.gather(1, ours), reward.gather(1, theirs)
    wins = (ours_reward > theirs_reward).double() + 0.5 * (ours_reward == theirs_reward)
    exact = measure(world, weights)
    for drawn, value in (
        (ours_reward - theirs_reward, exact.reward[0]),
        (wins, exact.win_rate[0]),
        ((policy - reference).gather(1, ours), exact.kl[0]),
    ):
        error = float((drawn.var(dim=1).mean() / drawn.numel()).sqrt())  # of the draws; the prompts are the same
        assert float(drawn.mean()) == pytest.approx(float(value), abs=5 * error)


def published() -> dict[str, Any]:
    """What `python -m benchmarks worlds` wrote."""
    return json.loads((ROOT / "benchmarks" / "results" / "worlds.json").read_text(encoding="utf-8"))


def test_the_published_results_of_mixout_are_what_this_world_gives():
    """One run, every measure of every seed."""
    weights = train(worlds(), beta=BETA, gamma=BETA, mixout=0.5, steps=published()["settings"]["steps"])
    point = next(point for point in published()["dials"]["mixout"] if point["value"] == 0.5)
    for name, values in measure(worlds(), weights)._asdict().items():
        assert values.tolist() == pytest.approx(point[name], abs=1e-3), name


@pytest.mark.parametrize(
    ("dial", "settings"),
    [
        ("kappa", lambda kappa: {"beta": BETA, "gamma": kappa * BETA}),
        ("beta", lambda beta: {"beta": beta, "gamma": beta}),
        ("beta_alone", lambda beta: {"beta": beta, "gamma": 0.0}),
        ("floor", lambda beta: {"beta": beta, "gamma": beta, "reference_floor": 0.0}),
    ],
)
def test_published_training_ended_where_the_loss_is_lowest(dial, settings):
    """Three points, every measure of every seed: Adam, 300 steps, against Newton's method."""
    for point in published()["dials"][dial][3:10:3]:
        for name, values in trained(**settings(point["value"]))._asdict().items():
            assert values.tolist() == pytest.approx(point[name], abs=1e-5), (point["value"], name)


def test_training_ends_where_the_loss_is_lowest():
    """150 steps of Adam at γ = β end within 1e-3 of every weight; they moved by up to 1.3."""
    lowest = minimum(worlds(), beta=BETA, gamma=BETA)
    torch.testing.assert_close(path()[-1], lowest, rtol=0, atol=1e-3)
    assert (lowest - worlds().reference).abs().max() > 0.5


def test_runs_side_by_side_are_each_what_it_is_by_itself():
    """Two runs of three steps, different in β, γ and p."""
    beta, gamma, rate = (0.5, 1.5), (1.0, 0.0), (0.2, 0.6)
    together = train(worlds(), beta=nats(beta), gamma=nats(gamma), mixout=nats(rate), steps=3)
    for run, one in enumerate(together):
        alone = train(worlds(), beta=beta[run], gamma=gamma[run], mixout=rate[run], steps=3)
        torch.testing.assert_close(one, alone, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- where nothing moves


def test_a_hinge_with_gamma_beta_and_no_margin_never_moves():
    """The post's C5: every score is exactly 0, and so is the gradient."""
    weights = train(worlds(), beta=BETA, gamma=BETA, link="hinge", steps=10)
    assert torch.equal(weights, worlds().reference)
    assert not measure(worlds(), weights).kl.any()


def test_a_hinge_without_reference_and_margin_is_content_with_the_uniform_policy():
    """C8 without a margin: loss 0 at Δπ = 0. Entropy is log 16, reward 0.20 below the reference's; γ = β, m = 1 gains 0.76."""
    hinges = train(worlds(), beta=BETA, gamma=nats([0.0, BETA]), link="hinge", pair_margin=nats([0.0, 1.0]))
    alone, with_margin = (measure(worlds(), weights) for weights in hinges)
    torch.testing.assert_close(alone.entropy, torch.full((6,), math.log(ANSWERS)).double(), rtol=0, atol=1e-3)
    assert is_below(alone.reward, 0.0)
    assert is_below(-with_margin.reward, -0.5)


# ---------------------------------------------------------------------------------------------------- γ is no tether


def test_kl_is_u_shaped_in_kappa():
    """1.49, 0.97, 0.73, 0.63, 0.73 nats at κ = 0, ½, 1, 2, 4: the smallest is strictly inside."""
    runs = {kappa: trained(beta=BETA, gamma=kappa * BETA).kl for kappa in KAPPAS}
    for larger, smaller in ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0), (4.0, 2.0)):
        assert is_below(runs[smaller], runs[larger]), (smaller, larger)


def test_entropy_falls_with_kappa():
    """1.80, 1.60, 1.34, 0.90, 0.49 nats; the reference has 1.98: γ > β sharpens it."""
    for less, more in itertools.pairwise(KAPPAS):
        assert is_below(trained(beta=BETA, gamma=more * BETA).entropy, trained(beta=BETA, gamma=less * BETA).entropy)


def test_kl_falls_with_beta_and_with_mixout():
    """From 1.48 to 0.012 nats for β = γ from ¼ to 5, from 0.73 to 0.010 for p from 0 to 0.9."""
    for dial in (beta_dial(), mixout_dial(gamma=BETA), mixout_dial(gamma=0.0)):
        for nearer, farther in itertools.pairwise(dial):
            assert is_below(nearer.kl, farther.kl)


def test_the_beta_dial_without_a_reference_never_comes_near_it():
    """γ = 0 with β → ∞ is the uniform policy, not π0: its KL stays above 0.85, and its reward ends below the reference's."""
    runs = [trained(beta=beta, gamma=0.0) for beta in (*BETAS, 20.0)]
    assert min(float(run.kl.min()) for run in runs) > 0.8
    assert is_below(runs[-1].reward, 0.0)


# ---------------------------------------------------------------------------------------------------- at the same KL


@pytest.mark.parametrize("kl", [0.1, 0.25, 0.5])
def test_mixout_and_beta_are_alike_at_the_same_kl(kl):
    """At γ = β: the whole interval of the difference in reward (0.3 to 0.65) lies within ±0.03; it is ±0.01 wide at most."""
    at = torch.full((6,), kl).double()
    low, high = interval(reward_at(mixout_dial(gamma=BETA), at) - reward_at(beta_dial(), at))
    assert -0.03 < low < high < 0.03


@pytest.mark.parametrize("kl", [0.1, 0.25, 0.5])
def test_without_a_reference_mixout_pays_more_at_the_same_kl(kl):
    """γ = 0 with mixout: −0.056, −0.086, −0.118."""
    at = torch.full((6,), kl).double()
    assert is_below(reward_at(mixout_dial(gamma=0.0), at), reward_at(beta_dial(), at))


def test_without_a_reference_beta_pays_more_at_the_same_kl():
    """γ = 0, β = 1, at the KL that it has, 1.03: −0.46."""
    alone = trained(beta=1.0, gamma=0.0)
    assert is_below(alone.reward, reward_at(beta_dial(), alone.kl) - 0.3)


@pytest.mark.parametrize("kappa", [0.5, 2.0, 4.0])
def test_gamma_apart_from_beta_pays_more_at_the_same_kl(kappa):
    """At the KL that each has: −0.04, −0.11, −0.36. More reward than γ = β at the same β (κ = ½: 0.84 against 0.78) is KL."""
    run = trained(beta=BETA, gamma=kappa * BETA)
    assert is_below(run.reward, reward_at(beta_dial(), run.kl))


def test_stopping_early_is_a_little_worse_than_beta_at_the_same_kl():
    """Adam at γ = β, on its way past KL 0.25: −0.06."""
    early = [measure(worlds(), weights) for weights in path()[:-1]]
    at = torch.full((6,), 0.25).double()
    low, high = interval(reward_at([untrained(), *early], at) - reward_at(beta_dial(), at))
    assert -0.1 < low < high < 0


# ---------------------------------------------------------------------------------------------------- the floor


def test_a_floor_of_zero_leaves_no_pair_satisfied_early():
    """HyPO: z ≥ 0 with Δπ < 0 is impossible where Δ0 counts 0 at least. With γ = β a tenth of the pairs is."""
    for floor, low, high in ((None, 0.08, 0.13), (0.0, 0.0, 0.0)):
        options = {"beta": BETA, "gamma": BETA, "reference_floor": floor}
        tables = pair_regimes(worlds(), minimum(worlds(), **options), **options)
        shares = [table["satisfied_early"] / len(worlds().prompt) for table in tables]
        assert low <= min(shares) <= max(shares) <= high


def test_a_floor_buys_its_reward_with_kl():
    """At the same β +0.13 in reward for 0.41 nats more; at the same KL it is below."""
    floored, plain = trained(beta=BETA, gamma=BETA, reference_floor=0.0), trained(beta=BETA, gamma=BETA)
    assert is_below(plain.reward, floored.reward)
    assert is_below(plain.kl, floored.kl)
    assert is_below(floored.reward, reward_at(beta_dial(), floored.kl))


# ---------------------------------------------------------------------------------------------------- pairs that share nothing


def test_a_hinge_ends_at_the_accuracy_known_before_training_where_pairs_are_independent():
    """By gradient descent from π0, the share with γ·Δ0 + m > 0 or Δ0 > 0; a step is 0.02 nats at most."""
    coefficients = [(0.5, 1.0), (0.25, 0.5), (0.5, 0.3), (0.25, 0.0), (1.0, 0.0)]
    gammas, margins = (nats(column) for column in zip(*coefficients, strict=True))
    lone = independent_pairs(seeds=(0,))
    options = {"beta": BETA, "gamma": gammas, "pair_margin": margins, "link": "hinge"}
    runs = train(lone, **options, optimizer=torch.optim.SGD, learning_rate=0.02 * PROMPTS / BETA, steps=800)
    for (gamma, margin), weights in zip(coefficients, runs, strict=True):
        score = gamma * lone.reference + margin
        predicted, near = (score > 0) | (lone.reference > 0), score.abs() < 0.02
        assert torch.equal((weights > 0)[~near], predicted[~near]), (gamma, margin)


def test_momentum_carries_pairs_over_the_kink_of_a_hinge():
    """The same with Adam: once a pair is satisfied its gradient is 0, and the running mean goes on pushing.

    At γ = β/2 without a margin no wrong pair should flip (0.48 are right); Adam with its usual 0.9 ends at 0.8.
    """
    lone = independent_pairs()
    weights = train(lone, beta=BETA, gamma=BETA / 2, link="hinge", learning_rate=0.1, steps=100)
    predicted = (lone.reference > 0).double().mean(1)
    assert is_below(predicted + 0.2, (weights > 0).double().mean(1))

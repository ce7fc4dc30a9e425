"""Problems with a closed form, solved by minimizing the loss: bandits with all their pairs, and two answers with noisy labels.

The expected values were computed elsewhere from the formulas; here only `preference_loss` is minimized, over free logits.
Source of the optima: π* ∝ π0^κ·exp(r/β), Rafailov et al. 2023 (arXiv 2305.18290) for κ = 1.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from pe_dpo.objective import preference_loss

TWO_ARM_LINKS: dict[str, Any] = {"logistic": "logistic", "squared": "squared", "exponential": lambda score: torch.exp(-score)}


@pytest.fixture(scope="module")
def closed_forms(shared: Path) -> dict[str, Any]:
    """15 bandits and 54 two-arm optima."""
    path = shared / "vectors" / "testbed_expected.json"
    if not path.is_file():
        pytest.skip("vectors/testbed_expected.json is not in the shared folder")
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- bandits


@pytest.mark.real
@pytest.mark.parametrize("number", range(15))
def test_the_population_loss_of_a_bandit_has_its_minimum_at_the_closed_form(closed_forms, number):
    """Two to six answers, every ordered pair weighted with the chance of its Bradley–Terry label."""
    assert len(closed_forms["bandit_optimum"]) == 15
    bandit = closed_forms["bandit_optimum"][number]
    reference = torch.log_softmax(nats(bandit["ref_logits"]), dim=0)
    reward = nats(bandit["reward"])
    policy = solve(reference, reward, beta=bandit["beta"], gamma=bandit["gamma"])
    torch.testing.assert_close(policy, nats(bandit["log_pi_star"]), rtol=0, atol=1e-7)
    chance, reference_chance = policy.exp(), reference.exp()
    wins = torch.sigmoid(reward[:, None] - reward[None, :])
    for name, found in {
        "kl_pi_ref": (chance * (policy - reference)).sum(),
        "kl_ref_pi": (reference_chance * (reference - policy)).sum(),
        "expected_reward": (chance * reward).sum(),
        "entropy": -(chance * policy).sum(),
        "win_vs_ref": chance @ wins @ reference_chance,
    }.items():
        assert float(found) == pytest.approx(bandit[name], abs=1e-7), name


@pytest.mark.real
@pytest.mark.parametrize("number", range(15))
def test_the_kl_of_a_bandit_changes_with_kappa_as_published(closed_forms, number):
    """(KL(κ+h) − KL(κ−h)) / 2h between two minimized policies, h = 0.003; at κ = 0, where γ cannot be lower, from one side.

    The error is of the order h²·KL‴: 1e-5 times the third derivative; that of the minimizer is divided by h.
    """
    bandit = closed_forms["bandit_optimum"][number]
    reference, beta = torch.log_softmax(nats(bandit["ref_logits"]), dim=0), bandit["beta"]

    def kl(kappa: float) -> float:
        policy = solve(reference, nats(bandit["reward"]), beta=beta, gamma=kappa * beta)
        return float((policy.exp() * (policy - reference)).sum())

    kappa, h = bandit["gamma"] / beta, 0.003
    slope = (kl(kappa + h) - kl(kappa - h)) / (2 * h) if kappa else (4 * kl(h) - kl(2 * h) - 3 * kl(0.0)) / (2 * h)
    assert slope == pytest.approx(bandit["dkl_dkappa"], abs=5e-4)


@pytest.mark.slow
def test_the_kl_is_smallest_where_its_covariance_says():
    """κ* = 1 − Cov_π*(log π0, r) / (β·Var_π*(log π0)); on both sides of it KL(π*‖π0) is larger. γ is no monotone tether."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        reference = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), dim=0)
        reward = torch.randn(6, generator=generator, dtype=torch.float64) - 0.5 * reference
        beta = 0.7

        def kl(kappa: float, reference: Tensor = reference, reward: Tensor = reward, beta: float = beta) -> float:
            policy = solve(reference, reward, beta=beta, gamma=kappa * beta)
            return float((policy.exp() * (policy - reference)).sum())

        best = float(minimize_scalar(kl, bounds=(0.0, 8.0), method="bounded", options={"xatol": 1e-6}).x)
        chance = solve(reference, reward, beta=beta, gamma=best * beta).exp()
        centred = reference - (chance * reference).sum()
        formula = 1 - (chance * centred * reward).sum() / (beta * (chance * centred.square()).sum())
        assert 0.1 < best < 7.9
        assert best == pytest.approx(float(formula), abs=1e-3)


def solve(reference: Tensor, reward: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Return log π that minimizes the population loss, by LBFGS over free logits, starting at π0."""
    chosen, rejected = torch.tensor(list(itertools.permutations(range(len(reward)), 2))).T
    label = torch.sigmoid(reward[chosen] - reward[rejected])

    def loss(policy: Tensor) -> Tensor:
        answers = policy[chosen], policy[rejected], reference[chosen], reference[rejected]
        return (label * preference_loss(*answers, beta=beta, gamma=gamma).loss).sum()

    return minimize(loss, reference)


def minimize(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Return the log-probs where the loss is lowest."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-13, tolerance_change=1e-18
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(torch.log_softmax(logits, dim=0))
        value.backward()
        return value

    optimizer.step(closure)
    return torch.log_softmax(logits.detach(), dim=0)


# ---------------------------------------------------------------------------------------------------- two answers


@pytest.mark.real
@pytest.mark.parametrize("link", TWO_ARM_LINKS)
def test_two_answers_come_to_rest_at_every_published_optimum(closed_forms, link):
    """A share p of labels says a > b, with margins and both smoothings. Brent's method sees values of the loss alone."""
    rows = [row for row in closed_forms["two_arm_optimum"] if row["link"] == link]
    assert len(rows) == {"logistic": 30, "squared": 12, "exponential": 12}[link]
    for row in rows:
        options = {
            "link": TWO_ARM_LINKS[link],
            "margin": row["margin"],
            "label_smoothing": row.get("flip", 0.0),
            "label_smoothing_mode": row.get("flip_mode", "conservative"),
        }
        found = minimize_scalar(mean_over_labels, args=(row["p"], options), tol=1e-10)
        assert found.x == pytest.approx(row["d_star"], abs=1e-6), row


@pytest.mark.parametrize(("beta", "gamma", "reference"), [(0.1, 0.05, 12.0), (0.5, 0.5, -3.0), (2.0, 5.0, 1.0)])
@pytest.mark.parametrize("share", [0.55, 0.9])
def test_the_reference_moves_the_optimum_of_two_answers_by_kappa_times_its_own_preference(beta, gamma, reference, share):
    """Δπ* = κ·Δ0 + logit(p)/β: the idealized ranking of a pair."""

    def loss(policy: float) -> float:
        pair = nats([policy, -policy]) / 2, nats([reference, -reference]) / 2
        straight = preference_loss(pair[0], pair[0].flip(0), pair[1], pair[1].flip(0), beta=beta, gamma=gamma).loss
        return float(share * straight[0] + (1 - share) * straight[1])

    expected = gamma / beta * reference + math.log(share / (1 - share)) / beta
    found = minimize_scalar(loss, bracket=(expected - 3, expected + 2), tol=1e-10)
    assert found.x == pytest.approx(expected, abs=1e-5)


def mean_over_labels(preference: float, share: float, options: dict[str, Any]) -> float:
    """The mean loss at Δ = log π(a) − log π(b), β = 1 and γ = 0, where a share of the labels says a > b."""
    answers = nats([preference, 0.0])
    loss = preference_loss(answers, answers.flip(0), beta=1.0, gamma=0.0, **options).loss
    return float(share * loss[0] + (1 - share) * loss[1])


# ---------------------------------------------------------------------------------------------------- step 0


@pytest.mark.parametrize(("kappa", "share"), [(0.0, 0.219), (1.0, 0.5), (5.0, 0.932)])
def test_gamma_moves_where_the_weight_lies_and_not_how_much_there_is(kappa, share):
    """Logistic, π = π0, Δ0 normal with sd 20, β = 0.1: the mean weight is ½ for every γ; the share of pairs that π0 ranks
    right is ∫ over Δ0 > 0, here by 20,000 quantiles. The post's "prevents most pairs" (C10) holds for the hinge only."""
    quantiles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    reference = 20 * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    zero = torch.zeros_like(reference)
    weight = preference_loss(reference, zero, reference, zero, beta=0.1, gamma=0.1 * kappa).weight
    assert float(weight.mean()) == pytest.approx(0.5, abs=1e-9)
    assert float(weight[reference > 0].sum() / weight.sum()) == pytest.approx(share, abs=0.005)


def nats(values: list[float]) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)

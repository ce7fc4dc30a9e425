"""Closed forms of what training makes of a pair: against the published test bed, SciPy, and minimisation of the loss itself."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from pe_dpo.audit.dynamics import ideal_preference, time_to_pass
from pe_dpo.audit.forecast import forecast
from pe_dpo.objective import Loss, PairLogprobs, PairTerms, preference_loss

LINKS = ("logistic", "hinge", "squared")


def nats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scores(policy: np.ndarray, reference: np.ndarray, **options: Any) -> np.ndarray:
    """z of pairs of which only Δπ and Δ0 are known."""
    ours, theirs = torch.from_numpy(policy), torch.from_numpy(reference)
    return preference_loss(ours, 0 * ours, theirs, 0 * theirs, **options).score.numpy()


def hinge_accuracy(reference: np.ndarray, **options: Any) -> float:
    """The share that a hinge ends with ranking right, of pairs of which only Δ0 is known."""
    delta = torch.from_numpy(reference)
    logprobs = PairLogprobs(delta, 0 * delta, torch.ones(len(delta)), torch.ones(len(delta)))
    return forecast(Loss(**options), logprobs, PairTerms(0 * delta)).hinge_accuracy


# ---------------------------------------------------------------- time to flip


@pytest.mark.real
def test_the_published_flip_times_are_reproduced(testbed):
    assert len(testbed["flip_time"]) == 40
    for row in testbed["flip_time"]:
        beta, gamma, reference = row["beta"], row["kappa"] * row["beta"], nats(row["D0"])
        found = time_to_pass((beta - gamma) * reference, -gamma * reference, beta=beta)
        assert found.item() == pytest.approx(row["t_flip"], rel=1e-12), row


@pytest.mark.parametrize(("gamma", "units"), [(0.0, 6.0), (0.1, 152.4), (0.2, 21_883.0)])
def test_flip_times_of_the_post(gamma, units):
    """c = 50 nats wrong and β = 0.1, in units of 1/(2β²): exponential in γ."""
    found = time_to_pass(nats((gamma - 0.1) * 50), nats(gamma * 50), beta=0.1).item() * 2 * 0.1**2
    assert found == pytest.approx(units, rel=2e-3)


@pytest.mark.real
@pytest.mark.parametrize(("link", "published"), [("logistic", 18), ("hinge", 6), ("squared", 9)])
def test_the_published_flows_take_their_time(testbed, link, published):
    """Where a published score has risen from its start and rests nowhere, the time that it took."""
    rows = [row for row in testbed["pair_flow"] if row["link"] == link]
    assert len(rows) == 18
    checked = 0
    for row in rows:
        start = (row["beta"] - row["gamma"]) * row["D0"] - row["margin"]
        if row["z"] <= start + 1e-6 or (link != "logistic" and row["z"] >= 0):
            continue
        found = time_to_pass(nats(start), nats(row["z"]), beta=row["beta"], link=link)
        assert found.item() == pytest.approx(row["t"], rel=1e-9), row
        checked += 1
    assert checked == published


WEIGHTS = {"logistic": lambda z: 1 / (1 + math.exp(z)), "hinge": lambda z: 1.0, "squared": lambda z: -2 * z}
"""−link′(z) where z < 0 for the two links that rest at 0."""


@given(start=st.floats(-12, -0.2), part=st.floats(0.01, 0.99), beta=st.floats(0.05, 2), link=st.sampled_from(sorted(WEIGHTS)))
def test_the_time_is_that_of_dz_over_its_speed(start, part, beta, link):
    """t = ∫ dz / (2β²·w(z)), by SciPy's quadrature."""
    goal = start * part
    expected, _ = quad(lambda z: 1 / (2 * beta**2 * WEIGHTS[link](z)), start, goal, epsrel=1e-10)
    assert time_to_pass(nats(start), nats(goal), beta=beta, link=link).item() == pytest.approx(expected, rel=1e-7)


@given(start=st.floats(-12, 12), rise=st.floats(0.01, 12), beta=st.floats(0.05, 2))
def test_a_logistic_pair_goes_on_beyond_zero(start, rise, beta):
    expected, _ = quad(lambda z: 1 / (2 * beta**2 * WEIGHTS["logistic"](z)), start, start + rise, epsrel=1e-10)
    assert time_to_pass(nats(start), nats(start + rise), beta=beta).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("link", ["hinge", "squared"])
def test_links_that_rest_at_zero_never_pass_it(link):
    assert time_to_pass(nats(-1.0, -1.0, 0.0), nats(0.0, 2.0, 1.0), beta=0.5, link=link).tolist() == [math.inf] * 3


@pytest.mark.parametrize("link", LINKS)
def test_a_pair_that_is_right_already_has_flipped_at_time_zero(link):
    assert time_to_pass(nats(1.0, -3.0), nats(-1.0, -4.0), beta=0.5, link=link).tolist() == [0.0, 0.0]


def test_a_flip_that_takes_longer_than_a_number_can_tell_is_infinite_and_not_nan():
    """γ·c = 5,000: e^5000 is no float, neither is e^4900."""
    assert time_to_pass(nats(4900.0, -5000.0), nats(5000.0, 0.0), beta=0.1).tolist()[0] == math.inf
    assert time_to_pass(nats(-5000.0), nats(0.0), beta=1.0).item() == pytest.approx(5001 / 2, rel=1e-12)


# ---------------------------------------------------------------- with a weight of the rejected answer


@pytest.mark.parametrize("weight", [0.5, 1.5])
@pytest.mark.parametrize(("link", "margin"), [("logistic", 0.0), ("hinge", 2.0), ("squared", 1.0)])
def test_a_pair_with_a_rejected_weight_flips_when_small_steps_on_both_answers_flip_it(link, margin, weight):
    """50 midpoint steps on log π+ and log π− apart, with autograd's gradient, to the time at which it shall be a tie."""
    loss = Loss(beta=0.5, gamma=0.5, margin=margin, link=link, rejected_weight=weight)
    reference = PairLogprobs(tensor(-7.0), tensor(-6.0), *torch.ones(2, 1))
    found = forecast(loss, reference, PairTerms(torch.zeros(1)))
    time = found.flip_times[1] / (2 * 0.5**2)
    assert 0 < time < 40
    assert found.hinge_accuracy == (margin > 0)

    def slopes(both: torch.Tensor) -> torch.Tensor:
        both = both.requires_grad_()
        out = loss(reference._replace(chosen=both[:1], rejected=both[1:]), reference, torch.zeros(1))
        return -torch.autograd.grad(out.loss.sum(), both)[0]

    both, step = tensor(-7.0, -6.0), time / 50
    for _ in range(50):
        middle = both.detach() + step / 2 * slopes(both)
        both = both.detach() + step * slopes(middle)
    assert (both[0] - both[1]).item() == pytest.approx(0.0, abs=1e-3)


def test_with_a_rejected_weight_no_pair_has_an_optimum_and_scores_spread_with_what_is_in_them():
    """log p(chosen) − ½·log p(rejected) is −4, −1 and −5, sd 2.0817; Δ0 is −1, 0 and −1."""
    reference = PairLogprobs(tensor(-7.0, -2.0, -9.0), tensor(-6.0, -2.0, -8.0), *torch.ones(2, 3))
    found = forecast(Loss(beta=0.5, gamma=1.5, rejected_weight=0.5), reference, PairTerms(torch.zeros(3)))
    assert found.delta == pytest.approx(2.0817 * 1.0, rel=1e-4)
    assert all(math.isnan(share) for share in found.ideal_accuracy)


# ---------------------------------------------------------------- where a hinge ends


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 0.07, 0.1, 0.23])
@pytest.mark.parametrize("margin", [0.0, 0.4, 2.0])
def test_final_hinge_accuracy_is_that_of_descent_on_the_loss(gamma, margin):
    """P(γΔ0 + m > 0 or Δ0 > 0), against 600 small steps of gradient descent on every pair; they overshoot by less than one."""
    generator = torch.Generator().manual_seed(3)
    reference = 12 * torch.randn(400, generator=generator, dtype=torch.float64)
    options = {"beta": 0.1, "gamma": gamma, "margin": margin}
    known = hinge_accuracy(reference.numpy(), **options)
    assert known == pytest.approx(float(((gamma * reference + margin > 0) | (reference > 0)).double().mean()), abs=1e-12)
    preference = reference.clone()
    for _ in range(600):
        zero = torch.zeros_like(preference)
        preference += 0.2 * preference_loss(preference, zero, reference, zero, link="hinge", **options).weight
    assert float((preference > 0.2).double().mean()) == pytest.approx(known, abs=0.02)


def test_a_hinge_without_margin_ends_with_the_references_own_accuracy():
    reference = nats(-5.0, -1.0, 2.0)
    for gamma in (0.0, 0.05, 0.1, 0.3):
        assert hinge_accuracy(reference, beta=0.1, gamma=gamma) == pytest.approx(1 / 3)


# ---------------------------------------------------------------- optima under noisy labels


def label_optimum(agreement: float, margin: np.ndarray, **options: Any) -> np.ndarray:
    """d* of pairs without a reference, whose score at a tie is minus the margin either way; β = 1."""
    return ideal_preference(agreement, -margin, -margin, Loss(1.0, 0.0, **options))


@pytest.mark.real
def test_the_published_optima_are_reproduced(testbed):
    rows = [row for row in testbed["two_arm_optimum"] if row["link"] in LINKS]
    assert len(rows) == 42
    for row in rows:
        smoothing = {"label_smoothing": row.get("flip", 0.0), "label_smoothing_mode": row.get("flip_mode", "conservative")}
        found = label_optimum(row["p"], nats(row["margin"]), link=row["link"], **smoothing).item()
        assert found == pytest.approx(row["d_star"], rel=1e-12, abs=1e-12), row


def test_a_margin_of_hundreds_does_not_overflow():
    """For large m the optimum of a logistic pair nears m + log((2p−1)/(1−p))."""
    found = label_optimum(0.75, nats(20.0, 299.0, 301.0, 900.0))
    assert np.allclose(found, nats(20.0, 299.0, 301.0, 900.0) + math.log(0.5 / 0.25), atol=1e-9)


def test_smoothing_that_takes_off_more_noise_than_there_is_holds_nothing():
    assert label_optimum(0.9, nats(0.0), label_smoothing=0.2, label_smoothing_mode="unbiased").item() == math.inf


IDEAL = [
    {},
    {"margin": 0.7},
    {"reference_floor": 0.0},
    {"reference_floor": -2.0, "margin": 0.3},
    {"length_penalty": 0.05},
    {"label_smoothing": 0.1, "margin": 0.2},
    {"label_smoothing": 0.1, "label_smoothing_mode": "unbiased"},
    {"link": "squared", "margin": 1.0},
    {"link": "squared", "margin": 1.0, "reference_floor": 0.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", IDEAL, ids=str)
@pytest.mark.parametrize("reference", [-6.0, -0.5, 4.0])
def test_the_ideal_preference_minimises_the_mean_loss_over_labels(options, reference):
    """Three of four labels as given; SciPy's minimiser over Δπ of ¾·loss + ¼·loss of the swapped pair, for every form of z."""
    common = {"beta": 0.4, "gamma": 0.6, **options, "pair_margin": tensor(0.25)}
    lengths = {"chosen_lengths": tensor(7.0), "rejected_lengths": tensor(4.0)}
    swapped_lengths = {"chosen_lengths": tensor(4.0), "rejected_lengths": tensor(7.0)}

    def loss(policy: float, sign: int) -> Any:
        of = lengths if sign > 0 else swapped_lengths
        return preference_loss(tensor(sign * policy), tensor(0.0), tensor(sign * reference), tensor(0.0), **common, **of)

    def mean(policy: float) -> float:
        return 0.75 * loss(policy, 1).loss.item() + 0.25 * loss(policy, -1).loss.item()

    tie, swapped = loss(0.0, 1).score.numpy(), loss(0.0, -1).score.numpy()
    found = ideal_preference(0.75, tie, swapped, Loss(0.4, 0.6, **options)).item()
    assert found == pytest.approx(minimize_scalar(mean, bracket=(found - 3, found + 5), tol=1e-12).x, abs=1e-4)


def test_without_a_reference_every_pair_is_right_at_its_optimum():
    reference = nats(-100.0, -1.0, 5.0)
    tie = scores(0 * reference, reference, beta=0.1, gamma=0.0)
    assert (ideal_preference(0.6, tie, tie, Loss(0.1, 0.0)) > 0).all()


@given(kappa=st.floats(0, 3), beta=st.floats(0.05, 1), agreement=st.floats(0.55, 0.95))
def test_idealized_accuracy_is_the_share_above_its_threshold(kappa, beta, agreement):
    """A(κ, β, p) = P(κ·Δ0 + logit(p)/β > 0)."""
    reference = np.linspace(-40, 40, 101)
    gamma = kappa * beta
    tie = scores(0 * reference, reference, beta=beta, gamma=gamma)
    swapped = scores(0 * reference, -reference, beta=beta, gamma=gamma)
    found = ideal_preference(agreement, tie, swapped, Loss(beta, gamma))
    expected = kappa * reference + np.log(agreement / (1 - agreement)) / beta
    assert np.allclose(found, expected, rtol=1e-9, atol=1e-9)

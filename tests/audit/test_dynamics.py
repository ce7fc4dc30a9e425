"""Closed forms of what training makes of a pair: against the published test bed, SciPy, and minimisation of the loss itself."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import lambertw
from torch import Tensor

from pe_dpo.audit.dynamics import flow, hinge_accuracy, hinge_final, ideal_preference, label_optimum, time_to_pass
from pe_dpo.objective import preference_loss

LINKS = ("logistic", "hinge", "squared", "exponential")


def nats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scores(policy: Tensor, reference: Tensor, **options: Any) -> Tensor:
    """z of pairs of which only Δπ and Δ0 are known."""
    zero = torch.zeros_like(policy)
    return preference_loss(policy, zero, reference, zero, **options).score


# ---------------------------------------------------------------- flows


@pytest.mark.real
@pytest.mark.parametrize("link", LINKS)
def test_the_published_flows_are_reproduced(testbed, link):
    rows = [row for row in testbed["pair_flow"] if row["link"] == link]
    assert len(rows) == 18
    for row in rows:
        start = nats((row["beta"] - row["gamma"]) * row["D0"] - row["margin"])
        assert flow(start, row["t"], beta=row["beta"], link=link).item() == pytest.approx(row["z"], rel=1e-12, abs=1e-12), row


@pytest.mark.parametrize("start", [-30.0, -3.0, -0.5, 0.0, 0.5, 0.99, 4.0, 6.0])
@pytest.mark.parametrize("time", [1e-6, 0.3, 1.0, 50.0, 500.0])
def test_the_logistic_flow_is_lambert_w(start, time):
    """z(t) = C + τ − W(e^(C+τ)) with C = z0 + e^z0 and τ = 2β²t, where e^(C+τ) is a float."""
    total = start + math.exp(start) + 0.5 * time
    expected = total - lambertw(math.exp(total)).real
    assert flow(nats(start), time, beta=0.5).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_scores_of_thousands_stay_finite_and_do_not_fall():
    start = nats(-4000.0, -800.0, 36.999, 37.001, 800.0, 4000.0)
    for link in LINKS[:2]:
        found = flow(start, 10.0, beta=0.5, link=link)
        assert found.isfinite().all()
        assert (found >= start).all()
    assert flow(start, 10.0, beta=0.5)[0].item() == pytest.approx(-3995.0, abs=1e-9)  # weight 1 all the way: 2β²t = 5


@pytest.mark.parametrize("link", LINKS[:3])
def test_a_flow_begins_with_the_gradient_of_the_loss(link):
    """dz/dt = 2β²·w at t = 0, w from the loss's own derivative."""
    start, beta, step = nats(-2.0, -0.3, 0.7, 3.0), 0.3, 1e-6
    weight = preference_loss(start / beta, torch.zeros(4).double(), beta=beta, gamma=0.0, link=link).weight
    rate = (flow(start, step, beta=beta, link=link) - start) / step
    assert torch.allclose(rate, 2 * beta**2 * weight, rtol=1e-5, atol=1e-9)


def test_a_hinge_at_its_kink_or_above_does_not_move():
    assert flow(nats(0.0, 2.0), 1e9, beta=1.0, link="hinge").tolist() == [0.0, 2.0]


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


@given(
    start=st.floats(-12, 12),
    rise=st.floats(0.01, 12),
    beta=st.floats(0.05, 2),
    link=st.sampled_from(["logistic", "exponential"]),
)
def test_the_flow_is_at_the_goal_when_its_time_has_come(start, rise, beta, link):
    time = time_to_pass(nats(start), nats(start + rise), beta=beta, link=link)
    assert flow(nats(start), time, beta=beta, link=link).item() == pytest.approx(start + rise, rel=1e-6, abs=1e-6)


@given(
    start=st.floats(-12, -0.2), part=st.floats(0.01, 0.99), beta=st.floats(0.05, 2), link=st.sampled_from(["hinge", "squared"])
)
def test_links_that_rest_at_zero_pass_what_lies_below(start, part, beta, link):
    goal = start * part
    time = time_to_pass(nats(start), nats(goal), beta=beta, link=link)
    assert flow(nats(start), time, beta=beta, link=link).item() == pytest.approx(goal, rel=1e-9)


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


# ---------------------------------------------------------------- where a hinge ends


def test_a_hinge_ends_where_its_score_is_zero():
    """β = γ = 0.1, margin 1: z = −1 for both, so Δπ rises by 1/β = 10; the third, with z = 0.5, stays."""
    assert hinge_final(nats(-4.0, 3.0, 6.0), nats(-1.0, -1.0, 0.5), beta=0.1).tolist() == [6.0, 13.0, 6.0]


@pytest.mark.parametrize("gamma", [0.0, 0.07, 0.1, 0.23])
@pytest.mark.parametrize("margin", [0.0, 0.4, 2.0])
def test_final_hinge_accuracy_is_that_of_descent_on_the_loss(gamma, margin):
    """P(γΔ0 + m > 0 or Δ0 > 0), against 600 small steps of gradient descent on every pair; they overshoot by less than one."""
    generator = torch.Generator().manual_seed(3)
    reference = 12 * torch.randn(400, generator=generator, dtype=torch.float64)
    options = {"beta": 0.1, "gamma": gamma, "margin": margin}
    tie = scores(torch.zeros_like(reference), reference, **options)
    known = hinge_accuracy(scores(reference, reference, **options), tie)
    assert known == pytest.approx(float(((gamma * reference + margin > 0) | (reference > 0)).double().mean()), abs=1e-12)
    preference = reference.clone()
    for _ in range(600):
        zero = torch.zeros_like(preference)
        preference += 0.2 * preference_loss(preference, zero, reference, zero, link="hinge", **options).weight
    assert float((preference > 0.2).double().mean()) == pytest.approx(known, abs=0.02)


def test_a_hinge_without_margin_ends_with_the_references_own_accuracy():
    reference = nats(-5.0, -1.0, 2.0)
    for gamma in (0.0, 0.05, 0.1, 0.3):
        start = scores(reference, reference, beta=0.1, gamma=gamma)
        assert hinge_accuracy(start, scores(0 * reference, reference, beta=0.1, gamma=gamma)) == pytest.approx(1 / 3)


# ---------------------------------------------------------------- optima under noisy labels


@pytest.mark.real
def test_the_published_optima_are_reproduced(testbed):
    assert len(testbed["two_arm_optimum"]) == 54
    for row in testbed["two_arm_optimum"]:
        smoothing = {"label_smoothing": row.get("flip", 0.0), "label_smoothing_mode": row.get("flip_mode", "conservative")}
        found = label_optimum(row["p"], nats(row["margin"]), link=row["link"], **smoothing).item()
        assert found == pytest.approx(row["d_star"], rel=1e-12, abs=1e-12), row


def test_a_margin_of_hundreds_does_not_overflow():
    """For large m the optimum of a logistic pair nears m + log((2p−1)/(1−p))."""
    found = label_optimum(0.75, nats(20.0, 299.0, 301.0, 900.0))
    assert torch.allclose(found, nats(20.0, 299.0, 301.0, 900.0) + math.log(0.5 / 0.25), atol=1e-9)


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


@pytest.mark.parametrize("options", IDEAL, ids=str)
@pytest.mark.parametrize("reference", [-6.0, -0.5, 4.0])
def test_the_ideal_preference_minimises_the_mean_loss_over_labels(options, reference):
    """Three of four labels as given; SciPy's minimiser over Δπ of ¾·loss + ¼·loss of the swapped pair, for every form of z."""
    common = {"beta": 0.4, "gamma": 0.6, **options, "pair_margin": nats(0.25)}
    lengths = {"chosen_lengths": nats(7.0), "rejected_lengths": nats(4.0)}
    swapped_lengths = {"chosen_lengths": nats(4.0), "rejected_lengths": nats(7.0)}

    def loss(policy: float, sign: int) -> Any:
        of = lengths if sign > 0 else swapped_lengths
        return preference_loss(nats(sign * policy), nats(0.0), nats(sign * reference), nats(0.0), **common, **of)

    def mean(policy: float) -> float:
        return 0.75 * loss(policy, 1).loss.item() + 0.25 * loss(policy, -1).loss.item()

    tie, swapped = loss(0.0, 1).score, loss(0.0, -1).score
    known = {name: options[name] for name in ("link", "label_smoothing", "label_smoothing_mode") if name in options}
    optimum = label_optimum(0.75, -(tie + swapped) / 2, **known)
    found = ideal_preference(tie, swapped, optimum, beta=0.4).item()
    assert found == pytest.approx(minimize_scalar(mean, bracket=(found - 3, found + 5), tol=1e-12).x, abs=1e-4)


def test_without_a_reference_every_pair_is_right_at_its_optimum():
    reference = nats(-100.0, -1.0, 5.0)
    tie = scores(0 * reference, reference, beta=0.1, gamma=0.0)
    assert (ideal_preference(tie, tie, label_optimum(0.6, 0 * reference), beta=0.1) > 0).all()


@given(kappa=st.floats(0, 3), beta=st.floats(0.05, 1), agreement=st.floats(0.55, 0.95))
def test_idealized_accuracy_is_the_share_above_its_threshold(kappa, beta, agreement):
    """A(κ, β, p) = P(κ·Δ0 + logit(p)/β > 0)."""
    reference = torch.linspace(-40, 40, 101, dtype=torch.float64)
    gamma = kappa * beta
    tie = scores(0 * reference, reference, beta=beta, gamma=gamma)
    swapped = scores(0 * reference, -reference, beta=beta, gamma=gamma)
    found = ideal_preference(tie, swapped, label_optimum(agreement, 0 * reference), beta=beta)
    expected = kappa * reference.numpy() + np.log(agreement / (1 - agreement)) / beta
    assert np.allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)

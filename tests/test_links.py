"""Links: what is said of each is what its function does."""

from typing import get_args

import numpy as np
import pytest
import torch

from pe_dpo.links import LinkName, link_named, link_value, link_weight

LINKS = get_args(LinkName)
SCORES = np.linspace(-40, 40, 3201)
"""Steps of 1/40, with 0 among them."""


def weights(link):
    return link_weight(link, SCORES)


@pytest.mark.parametrize("link", LINKS)
def test_the_weight_is_the_slope_of_the_value_turned_round(link):
    scores = torch.from_numpy(SCORES).requires_grad_()
    (slope,) = torch.autograd.grad(link_value(link, scores).sum(), scores)
    assert np.allclose(weights(link), -slope.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("link", "values"), [
    ("logistic", [np.log1p(np.e**2), np.log(2), np.log1p(np.e**-3)]), ("hinge", [2, 0, 0]), ("squared", [4, 0, 9]),
])  # fmt: skip
def test_the_value_is_that_of_the_formula(link, values):
    assert link_value(link, torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)).tolist() == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("link", LINKS)
def test_the_largest_weight_is_come_near_and_never_passed(link):
    largest, found = link_named(link).largest_weight, weights(link).max()
    assert found <= largest
    assert found > 0.99 * min(largest, 80)


@pytest.mark.parametrize("link", LINKS)
def test_a_kink_is_a_jump_to_weight_zero(link):
    before, at_zero = link_weight(link, np.array([-1e-9, 0.0]))
    jumps = bool(before > 0.5 and at_zero == 0)
    assert link_named(link).has_kink == jumps
    if jumps:
        assert not weights(link)[SCORES >= 0].any()


@pytest.mark.parametrize("link", LINKS)
def test_a_pair_at_zero_rests_where_it_is_said_to(link):
    assert link_named(link).rests_at_zero == (not link_weight(link, np.zeros(1)).any())


@pytest.mark.parametrize("link", LINKS)
def test_weights_saturate_where_they_come_near_both_ends_and_reach_neither(link):
    found, largest = weights(link), link_named(link).largest_weight
    near = (found > 0) & (found < 1e-6 * largest), (found < largest) & (found > (1 - 1e-6) * largest)
    assert link_named(link).saturates == all(side.any() for side in near)


@pytest.mark.parametrize("link", LINKS)
def test_shares_grow_with_gamma_where_it_is_said(link):
    """The share of Σ w on pairs with Δ0 > 0, at z = (β−γ)·Δ0 − m, as γ goes from 0 to ten times β; in [0, 1] all the way."""
    preference = np.random.default_rng(0).normal(1, 20, 500)
    weight = np.array([link_weight(link, (0.1 - gamma) * preference - 0.5) for gamma in np.linspace(0, 1, 200)])
    shares = weight[:, preference > 0].sum(axis=1) / weight.sum(axis=1)
    grows = bool(np.all(np.diff(shares) >= -1e-12) and shares.min() >= 0 and shares.max() <= 1 + 1e-12)
    assert link_named(link).shares_grow_with_gamma == grows

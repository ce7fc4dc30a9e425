"""Expectations over all masks, in closed form: the loss of a pair with two logits of its own, and its gradient.

θ = θ0 + u · (1, −1), each logit a unit with a mask of its own, so Δπ = Δ0 + u · (m₁ + m₂)/(1−p).
"""

import json

import pytest
import torch
import torch.nn.functional as F

from pe_dpo.model.mixout import MixLinear, mixout


@pytest.fixture(scope="module")
def rows(shared):
    return json.loads((shared / "vectors" / "testbed_expected.json").read_text(encoding="utf-8"))["mixout_two_logits"]


def of_entries(weight, target, p, draw):
    return mixout(weight, target, p, seed=0, draw=draw) @ torch.tensor([1.0, -1.0], dtype=torch.float64)


def of_columns(weight, target, p, draw):
    mixed = mixout(weight[None], target[None], p, seed=0, draw=draw)
    return F.linear(torch.tensor([1.0, -1.0], dtype=torch.float64), mixed)[0]


def of_elements(weight, target, p, draw):
    mixed = mixout(weight[:, None], target[:, None], p, form="element", seed=0, draw=draw)
    return mixed[0, 0] - mixed[1, 0]


def expectations(preference, row, u):
    """The expected loss at u, and its slope: every mask once, with its probability; draws are looked through for all four."""
    p, beta, gamma, start = row["mixout"], row["beta"], row["gamma"], row["D0"]
    target = torch.tensor([start / 2 + 0.3, -start / 2 + 0.3], dtype=torch.float64)
    scale = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    direction = torch.tensor([1.0, -1.0], dtype=torch.float64)
    seen = {}
    for draw in range(200):
        probe = preference(target + torch.tensor([1.0, -5.0], dtype=torch.float64), target, p, draw)
        kept = round((float(probe) - start) * (1 - p))  # 1 with the first, 5 with the second
        seen.setdefault(kept, draw)
    assert sorted(seen) == [0, 1, 5, 6]
    loss, mass = torch.zeros((), dtype=torch.float64), 0.0
    for kept, draw in seen.items():
        count = {0: 0, 1: 1, 5: 1, 6: 2}[kept]
        share = (1 - p) ** count * p ** (2 - count)
        moved = preference(target + scale * direction, target, p, draw)
        loss = loss + share * F.softplus(-(beta * moved - gamma * start))
        mass += share
    assert mass == pytest.approx(1)
    loss.backward()
    return float(loss.detach()), float(scale.grad)


@pytest.mark.parametrize("preference", [of_entries, of_columns, of_elements])
@pytest.mark.slow
def test_expected_losses_and_gradients_over_all_masks_are_the_closed_forms(rows, preference):
    assert len(rows) == 9
    for row in rows:
        loss, _ = expectations(preference, row, 0.0)
        assert loss == pytest.approx(row["loss_at_init"], abs=1e-12)
        loss, gradient = expectations(preference, row, 1.0)
        assert loss == pytest.approx(row["loss_at_1"], abs=1e-12)
        assert gradient == pytest.approx(row["grad_at_1"], abs=1e-12)


@pytest.mark.slow
def test_the_mean_over_draws_of_a_layer_comes_to_the_closed_form(rows):
    """As a user would train it: a linear layer over the two logits' indicator inputs, a draw per step."""
    row, draws = rows[4], 2500
    p, beta, gamma, start = row["mixout"], row["beta"], row["gamma"], row["D0"]
    linear = torch.nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[start / 2, -start / 2]]))
    layer = MixLinear(linear, p, seed=1)
    with torch.no_grad():
        layer.weight += torch.tensor([[1.0, -1.0]])
    losses, slopes = torch.empty(draws, dtype=torch.float64), torch.empty(draws, dtype=torch.float64)
    for draw in range(draws):
        layer.draw = draw
        loss = F.softplus(-(beta * layer(torch.tensor([1.0, -1.0], dtype=torch.float64)) - gamma * start)).sum()
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        losses[draw], slopes[draw] = loss.detach(), gradient[0, 0] - gradient[0, 1]
    for sample, wanted in ((losses, row["loss_at_1"]), (slopes, row["grad_at_1"])):
        assert abs(sample.mean() - wanted) < 4.5 * (sample.var() / draws).sqrt()

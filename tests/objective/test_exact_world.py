"""A language model small enough to write down whole: the minimum of the loss is where the theory puts it.

LoRA on every linear layer reaches π* ∝ π0^κ · exp(r/β) by LBFGS; `exact_lm` has the world.
"""

import itertools
from functools import cache

import pytest
import torch
from exact_lm import ANSWERS, World, kl, logprobs_of_all_answers, lowest, make_world, minimize, optimum, tabular_optimum
from torch import Tensor


@pytest.fixture
def world() -> World:
    return make_world()


@cache
def minimized(gamma: float) -> tuple[World, list[tuple[float, Tensor]]]:
    """A world whose adapters were trained, and the evaluations on the way."""
    world = make_world()
    return world, minimize(world, gamma=gamma)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_minimum_of_the_loss_is_the_tempered_reference_times_the_exponential_reward(gamma):
    """Three acceptance bounds: 1e-3 nats within 64 evaluations, 1e-6 within 80, and the same distance from π0.

    `tests/worlds/test_exact_lm.py` has κ = ½, 3/2 and, in 4 bits, 2.
    """
    world, trace = minimized(gamma)
    target, found = optimum(world, gamma=gamma), lowest(trace)
    assert kl(target, lowest(trace[:64])) < 1e-3
    assert kl(target, found) < 1e-6
    assert kl(found, world.base_logprobs) == pytest.approx(kl(target, world.base_logprobs), abs=1e-3)


@pytest.mark.slow
def test_with_a_rejected_weight_the_minimum_is_that_of_a_table_of_answers(world):
    target = tabular_optimum(world, gamma=1.0, rejected_weight=0.75)
    found = lowest(minimize(world, gamma=1.0, rejected_weight=0.75))
    assert kl(target, found) < 1e-6


def test_the_table_of_answers_is_at_the_closed_form_where_there_is_one(world):
    found = tabular_optimum(world, gamma=2.0, rejected_weight=1.0)
    assert kl(optimum(world, gamma=2.0), found) < 1e-12


def test_a_rejected_weight_raises_the_chosen_answers_and_costs_margin(world):
    """The trade-off of DPO-Shift, at the minimum: both answers are likelier, and further apart by less."""
    chosen, rejected = torch.tensor(list(itertools.permutations(range(len(ANSWERS)), 2))).T
    label = torch.sigmoid(world.reward[:, chosen] - world.reward[:, rejected])
    found = []
    for weight in (1.0, 0.95, 0.75):
        logprobs = tabular_optimum(world, gamma=1.0, rejected_weight=weight)
        one, other = ((label * logprobs[:, side]).sum().item() / label.sum().item() for side in (chosen, rejected))
        found.append((one, other, one - other))
    chosen_logprob, rejected_logprob, margin = zip(*found, strict=True)
    assert list(chosen_logprob) == sorted(chosen_logprob)
    assert list(rejected_logprob) == sorted(rejected_logprob)
    assert list(margin) == sorted(margin, reverse=True)


def test_the_three_minima_are_far_apart(world):
    """Otherwise the test above could not tell one γ from another: every two differ by more than 0.02 nats."""
    minima = [optimum(world, gamma=gamma) for gamma in (0, 1, 2)]
    assert min(kl(one, other) for one, other in itertools.permutations(minima, 2)) > 0.02


def test_the_chances_of_all_answers_add_up_to_one(world):
    assert len(ANSWERS) == 21
    torch.testing.assert_close(world.base_logprobs.exp().sum(dim=1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_chances_still_add_up_to_one_after_training():
    world, trace = minimized(1.0)
    trained = lowest(trace)
    assert kl(trained, world.base_logprobs) > 0.05
    torch.testing.assert_close(trained.exp().sum(dim=1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_fresh_adapters_leave_the_policy_at_the_reference_exactly(world):
    with torch.no_grad():
        assert torch.equal(logprobs_of_all_answers(world.policy), world.base_logprobs)


@pytest.mark.slow
def test_disabling_trained_adapters_gives_back_the_frozen_base_exactly():
    world, _ = minimized(1.0)
    with torch.no_grad():
        assert not torch.equal(logprobs_of_all_answers(world.policy), world.base_logprobs)
        with world.policy.disable_adapter():
            assert torch.equal(logprobs_of_all_answers(world.policy), world.base_logprobs)

"""Metrics over pairs, worked by hand."""

import math

import pytest
import scipy.stats
import torch

from pe_dpo.evaluation.pairs import ScoredPairs, join, pair_metrics, score_loss, scored_pairs, wilson_interval
from pe_dpo.model.scoring import PairLogprobs


def logprobs(chosen, rejected, chosen_lengths=None, rejected_lengths=None):
    count = len(chosen)
    lengths = (chosen_lengths or [1] * count, rejected_lengths or [1] * count)
    return PairLogprobs(
        *(torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected)), *(torch.tensor(n) for n in lengths)
    )


@pytest.fixture
def four():
    """One pair per quadrant; Δπ = 2, 2, −2, −2 and Δ0 = 4, −4, 4, −4; β = γ = ½, so z = −1, 3, −3, 1."""
    policy = logprobs([-4, -4, -6, -6], [-6, -6, -4, -4], [2, 2, 2, 2], [8, 2, 2, 2])
    reference = logprobs([-2, -6, -2, -6], [-6, -2, -6, -2], [2, 2, 2, 2], [8, 2, 2, 2])
    out = score_loss(policy, reference, torch.zeros(4), {"beta": 0.5, "gamma": 0.5}, 0.0)
    return scored_pairs(policy, reference, out)


def test_each_quadrant_has_its_pair_and_its_share_of_the_weight(four):
    metrics = pair_metrics(four)
    weights = [1 / (1 + math.exp(z)) for z in (-1, 3, -3, 1)]
    names = ("right_reference_right", "right_reference_wrong", "wrong_reference_right", "wrong_reference_wrong")
    for name, weight in zip(names, weights, strict=True):
        assert metrics[f"regimes/policy_{name}/pairs"] == 1
        assert metrics[f"regimes/policy_{name}/weight_share"] == pytest.approx(weight / sum(weights))
    assert metrics["regimes/satisfied_early"] == 1
    assert metrics["regimes/effective_pairs"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights))


def test_rewards_and_displacement_are_differences_from_the_reference(four):
    """½·(log π − log π0): chosen −1, 1, −2, 0; rejected 0, −2, 1, −1."""
    metrics = pair_metrics(four)
    assert metrics["rewards/chosen"] == pytest.approx(-0.5)
    assert metrics["rewards/rejected"] == pytest.approx(-0.5)
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["displacement/chosen"] == pytest.approx(-1.0)
    assert metrics["displacement/chosen_fell"] == 0.5
    assert metrics["nll/chosen_per_token"] == pytest.approx(20 / 8)


def test_sum_and_per_token_can_disagree_on_a_pair(four):
    """The first pair: −4 over 2 tokens against −6 over 8 is right by sum and wrong per token."""
    metrics = pair_metrics(four)
    assert metrics["accuracy/policy"] == 0.5
    assert metrics["accuracy/policy_per_token"] == 0.25


def test_ties_count_one_half():
    policy = logprobs([-3, -3, -1], [-3, -3, -2])
    out = score_loss(policy, policy, torch.zeros(3), {"beta": 0.1}, 0.0)
    metrics = pair_metrics(scored_pairs(policy, policy, out))
    assert metrics["accuracy/policy"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["regimes/ties"] == 2


def test_without_a_reference_there_is_no_table_and_nothing_made_up():
    policy = logprobs([-3.0], [-4.0])
    out = score_loss(policy, None, torch.zeros(1), {"beta": 1.0, "gamma": 0.0, "margin": 1.0}, 0.0)
    metrics = pair_metrics(scored_pairs(policy, None, out))
    assert not [key for key in metrics if key.startswith(("regimes", "displacement", "accuracy/reference"))]
    assert metrics["score/mean"] == 0.0


def test_the_margin_column_enters_with_its_scale():
    policy = logprobs([-1, -1], [-3, -3])
    out = score_loss(policy, None, torch.tensor([1.0, 4.0]), {"beta": 1.0, "gamma": 0.0}, 0.5)
    assert out.score.tolist() == [1.5, 0.0]


def test_joined_sets_are_weighted_by_their_pairs(four):
    first, rest = (ScoredPairs(*(field[part] for field in four)) for part in (slice(0, 1), slice(1, 4)))
    assert pair_metrics(join([first, rest])) == pair_metrics(four)


@pytest.mark.parametrize(
    ("share", "pairs", "low", "high"),
    [(0.65, 500, 0.6072, 0.6905), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.5, 0, 0.0, 1.0)],
)
def test_wilson_intervals_are_those_of_scipy_and_of_the_tables(share, pairs, low, high):
    assert wilson_interval(share, pairs) == pytest.approx((low, high), abs=1e-4)
    if pairs:
        expected = scipy.stats.binomtest(round(share * pairs), pairs).proportion_ci(method="wilson")
        assert wilson_interval(share, pairs) == pytest.approx((expected.low, expected.high), abs=1e-9)

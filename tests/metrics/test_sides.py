"""Shares of the pairs that a model ranks right, and of those that it ranks wrong."""

from dataclasses import replace

import numpy as np
import pytest
import tables
import torch

from pe_dpo.metrics.estimates import wilson_interval
from pe_dpo.metrics.sides import describe_sides, of_side, shares_by_side
from pe_dpo.metrics.table import PairTable
from pe_dpo.objective import Loss, PairLogprobs


def make(reference: list[float], policy: list[float], rejected_tokens: float = 10, reduce: str = "sum") -> PairTable:
    """Pairs with these Δ of sums: a rejected answer has log-prob −20, and chosen ones have ten tokens."""
    lengths = torch.full((len(policy),), 10.0), torch.full((len(policy),), rejected_tokens)

    def logprobs(delta: list[float]) -> PairLogprobs:
        rejected = torch.full((len(delta),), -20.0, dtype=torch.float64)
        return PairLogprobs(rejected + torch.tensor(delta, dtype=torch.float64), rejected, *lengths)

    loss = Loss(beta=1.0, gamma=1.0, reduce=reduce)
    out = loss(logprobs(policy), logprobs(reference), torch.zeros(len(policy)))
    return tables.table_of(logprobs(policy), logprobs(reference), out, loss)


REFERENCE = [1.0, 2.0, 3.0, -1.0, -2.0, 0.0]
POLICY = [2.0, 1.0, -3.0, 1.0, -1.0, 5.0]


def test_shares_are_apart_by_what_the_reference_ranks_right_and_wrong() -> None:
    """Moved: +1, −1, −6 where π0 is right, +2, +1 where it is wrong; the tie moved too and is on neither side."""
    found = shares_by_side(make(REFERENCE, POLICY), "reference")
    assert list(found) == ["accuracy/shift", "accuracy/policy", "rewards/accuracies"]
    shares = {key: [(part.pairs, part.share) for part in sides.values()] for key, sides in found.items()}
    third = pytest.approx(1 / 3)
    assert shares["accuracy/shift"] == shares["rewards/accuracies"] == [(3, third), (2, 1.0)]
    assert shares["accuracy/policy"] == [(3, pytest.approx(2 / 3)), (2, 0.5)]
    part = found["accuracy/policy"]["right"]
    assert (part.low, part.high) == wilson_interval(2 / 3, 3)
    assert part.describe() == "0.667 [0.208, 0.939]"


def test_shares_are_apart_by_what_the_policy_makes_of_the_pairs() -> None:
    found = shares_by_side(make(REFERENCE, POLICY), "policy")
    assert list(found) == ["accuracy/shift", "accuracy/reference", "rewards/accuracies"]
    assert [part[:2] for part in found["accuracy/reference"].values()] == [(4, 0.625), (2, 0.5)]
    assert [part[:2] for part in found["accuracy/shift"].values()] == [(4, 0.75), (2, 0.5)]


def test_sides_are_by_the_log_probs_that_the_loss_takes() -> None:
    """Rejected answers of 20 tokens are at −1 a token: Δ0 per token is Δ0/10 − 1, right from 10 nats on."""
    reference, policy = [1.0, 11.0, -5.0], [2.0, 10.5, -6.0]
    by_token = make(reference, policy, rejected_tokens=20, reduce="mean")
    table = of_side(by_token, "reference", "right")
    assert table is not None and table.where == ["rows:1"]
    found = shares_by_side(by_token, "reference")["accuracy/shift_per_token"]
    assert [part[:2] for part in found.values()] == [(1, 0.0), (2, 0.5)]
    by_sum = of_side(make(reference, policy, rejected_tokens=20), "reference", "right")
    assert by_sum is not None and by_sum.where == ["rows:0", "rows:1"]


def test_pairs_of_a_prompt_count_once_in_the_interval() -> None:
    """Ten copies of each pair under its prompt know a share no better than one."""
    once = make(REFERENCE[:5] * 4, POLICY[:5] * 4)
    copies = once.take(np.repeat(np.arange(20), 10))
    one, ten = (shares_by_side(table, "reference")["accuracy/shift"]["right"] for table in (once, copies))
    assert (one.pairs, ten.pairs) == (12, 120)
    assert ten.share == one.share and 1 <= (ten.high - ten.low) / (one.high - one.low) < 1.2


def test_an_empty_side_and_a_reference_that_was_not_run_are_said() -> None:
    table = make([1.0, 2.0], [0.0, 3.0])
    assert shares_by_side(table, "reference")["accuracy/shift"]["wrong"].describe() == "–"
    assert describe_sides(table) == "Moved toward chosen (by summed log-probs): 50% [9, 91] of the 2 that π0 ranks right."
    unknown = np.full(2, np.nan)
    without = replace(table, reference_chosen=unknown, reference_rejected=unknown)
    assert (shares_by_side(without, "reference"), describe_sides(without)) == ({}, "")

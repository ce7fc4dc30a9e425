"""Metrics over pairs, worked by hand."""

import math
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import scipy.stats
import tables
import torch

from pe_dpo.errors import UsageError
from pe_dpo.metrics.catalogue import METRICS, pair_metrics, share_intervals
from pe_dpo.metrics.estimates import wilson_interval
from pe_dpo.metrics.table import PairTable
from pe_dpo.objective import Loss, PairLogprobs


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
    out = Loss(beta=0.5, gamma=0.5)(policy, reference, torch.zeros(4))
    return tables.table_of(policy, reference, out)


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
    out = Loss(beta=0.1, gamma=0.1)(policy, policy, torch.zeros(3))
    metrics = pair_metrics(tables.table_of(policy, policy, out))
    assert metrics["accuracy/policy"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["regimes/ties"] == 2


def test_without_a_reference_there_is_no_table_and_nothing_made_up():
    policy = logprobs([-3.0], [-4.0])
    out = Loss(beta=1.0, gamma=0.0, margin=1.0)(policy, None, torch.zeros(1))
    metrics = pair_metrics(tables.table_of(policy, None, out))
    assert not [key for key in metrics if key.startswith(("regimes", "displacement", "accuracy/reference"))]
    assert metrics["score/mean"] == 0.0


def test_the_margin_column_enters_with_its_scale():
    policy = logprobs([-1, -1], [-3, -3])
    out = Loss(beta=1.0, gamma=0.0, margin_scale=0.5)(policy, None, torch.tensor([1.0, 4.0]))
    assert out.score.tolist() == [1.5, 0.0]


def test_joined_sets_are_weighted_by_their_pairs(four):
    first, rest = four.take([0]), four.take([1, 2, 3])
    assert pair_metrics(PairTable.join([first, rest])) == pair_metrics(four)


# ---------------------------------------------------------------- what the loss asks, and how it pulls

HALF = Loss(beta=0.5, gamma=0.5)


def test_the_margin_is_what_the_preference_has_to_reach(four):
    """γ = β and m = 0: M = Δ0, which is 4, −4, 4, −4; the 5 % quantile lies at the lower end, the median halfway."""
    metrics = pair_metrics(tables.with_loss(four, HALF))
    assert [metrics[f"margin/{quantile}"] for quantile in ("q05", "q50", "q95")] == pytest.approx([-4, 0, 4])


def test_the_margin_is_in_the_unit_of_the_loss():
    """Per token: Δ̄0 = −2/2 + 6/8 = −¼; β = 2, γ = 1, m = 3: M = (−¼ + 3)/2."""
    policy, reference = logprobs([-4], [-6], [2], [8]), logprobs([-2], [-6], [2], [8])
    loss = Loss(beta=2.0, gamma=1.0, margin=3.0, reduce="mean")
    scored = tables.table_of(policy, reference, loss(policy, reference, torch.zeros(1)))
    assert pair_metrics(tables.with_loss(scored, loss))["margin/q50"] == pytest.approx(2.75 / 2)


def test_the_weights_are_summed_up_as_size_evenness_and_saturation(four):
    """z = −1, 3, −3, 1: only |z| = 3 is beyond log 19, once on each side."""
    weights = [1 / (1 + math.exp(z)) for z in (-1, 3, -3, 1)]
    metrics = pair_metrics(tables.with_loss(four, HALF))
    assert metrics["weight/mean"] == pytest.approx(sum(weights) / 4)
    assert metrics["weight/effective_share"] == pytest.approx(sum(weights) ** 2 / (4 * sum(w * w for w in weights)))
    assert (metrics["weight/saturated"], metrics["weight/saturated_low"]) == (0.5, 0.25)


def test_with_a_rejected_weight_the_score_has_it_and_rankings_and_rewards_do_not():
    """λ = ½, β = γ = 1, m = 1. Policy −4, −6 and −9, −8; reference −5, −4 and −9, −9.

    z + m = (−4 + 3) − (−5 + 2) = 2 and (−9 + 4) − (−9 + 4½) = −½; Δπ = 2, −1; Δ0 = −1, 0; reward margins 3 and −1.
    M = γ·(l0+ − λ·l0−) + m − (1−λ)·lπ− = −3 + 1 + 3 = 1 and −4½ + 1 + 4 = ½.
    """
    policy, reference = logprobs([-4, -9], [-6, -8]), logprobs([-5, -9], [-4, -9])
    loss = Loss(beta=1.0, gamma=1.0, margin=1.0, rejected_weight=0.5)
    table = tables.table_of(policy, reference, loss(policy, reference, torch.zeros(2)), loss)
    assert table.score.tolist() == [1.0, -1.5]
    assert table.implicit_preference.tolist() == [2.0, -0.5]
    assert table.reward_margin.tolist() == [3.0, -1.0]
    assert table.effective_margin().tolist() == [1.0, 0.5]
    assert table.effective_margin("reference").tolist() == [0.0, 1.0]
    metrics = pair_metrics(table)
    assert (metrics["accuracy/policy"], metrics["accuracy/reference"]) == (0.5, 0.25)
    assert metrics["regimes/policy_right_reference_wrong/pairs"] == 1


def test_accuracy_of_the_score_can_differ_from_that_of_rewards_with_a_rejected_weight():
    """Both rose by 1 nat, chosen from −3 and rejected from −4: rewards tie, and ½ of the rejected one's rise is no loss."""
    policy, reference = logprobs([-2], [-3]), logprobs([-3], [-4])
    loss = Loss(beta=1.0, gamma=1.0, rejected_weight=0.5)
    metrics = pair_metrics(tables.table_of(policy, reference, loss(policy, reference, torch.zeros(1)), loss))
    assert (metrics["accuracy/implicit"], metrics["rewards/accuracies"]) == (1.0, 0.5)


def test_the_margin_of_each_pair_is_in_its_own_beta(tmp_path):
    """β = ½ and 2, κ = ½, m = 1: M = ½·Δ0 + 1/β is ½·4 + 2 = 4 and ½·4 + ½ = 2½; the columns are kept in the file."""
    policy, reference = logprobs([-4, -4], [-6, -6]), logprobs([-2, -2], [-6, -6])
    loss, own = Loss(beta=1.0, gamma=0.5, margin=1.0), torch.tensor([0.5, 2.0], dtype=torch.float64)
    table = replace(
        tables.table_of(policy, reference, loss(policy, reference, torch.zeros(2), own), loss), pair_beta=own.numpy()
    )
    assert table.effective_margin().tolist() == [4.0, 2.5]
    table.save(tmp_path / "pairs.parquet")
    loaded = PairTable.load(tmp_path / "pairs.parquet", remedy="")
    assert loaded.pair_beta.tolist() == [0.5, 2.0]
    assert loaded.pair_weight is None


def test_a_floor_counts_before_margins_in_each_pairs_own_beta():
    """β = 2, κ = ½, floor 0, Δπ = 2, Δ0 = −4: z + m = 2·2 − 1·max(−4, 0) = 4; without the floor it would be 8."""
    policy, reference = logprobs([-4], [-6]), logprobs([-6], [-2])
    loss, own = Loss(beta=1.0, gamma=0.5, reference_floor=0.0), torch.tensor([2.0], dtype=torch.float64)
    out = loss(policy, reference, torch.zeros(1), own)
    table = replace(tables.table_of(policy, reference, out, loss), pair_beta=own.numpy())
    assert table.implicit_preference.tolist() == out.score.tolist() == [4.0]


def test_a_hinge_does_not_report_saturation(four):
    assert not [key for key in pair_metrics(tables.with_loss(four, replace(HALF, link="hinge"))) if "saturated" in key]


def test_implicit_accuracy_counts_the_score_before_the_margin_and_so_knows_a_floor(four):
    """½·(Δπ − max(Δ0, 0)) = −1, 1, −3, −1; the rewards, without the floor, say −1, 3, −3, 1."""
    floor = replace(HALF, reference_floor=0.0, margin=9.0)
    assert pair_metrics(tables.with_loss(four, floor))["accuracy/implicit"] == 0.25
    assert pair_metrics(tables.with_loss(four, floor))["rewards/accuracies"] == 0.5
    assert pair_metrics(tables.with_loss(four, HALF))["accuracy/implicit"] == 0.5


def test_active_and_mean_score_are_those_of_the_quadrant(four):
    metrics = pair_metrics(tables.with_loss(four, HALF))
    names = ("right_reference_right", "right_reference_wrong", "wrong_reference_right", "wrong_reference_wrong")
    assert [metrics[f"regimes/policy_{name}/active"] for name in names] == [1, 0, 1, 0]
    assert [metrics[f"regimes/policy_{name}/mean_score"] for name in names] == pytest.approx([-1, 3, -3, 1])


def test_what_is_not_defined_is_left_out():
    """One pair, kept: three quadrants are empty, lengths have no spread, and JSON knows no NaN."""
    policy = logprobs([-1.0], [-2.0])
    scored = tables.table_of(policy, policy, HALF(policy, policy, torch.zeros(1)))
    metrics = pair_metrics(tables.with_loss(scored, HALF), is_fixed_set=True)
    assert not [key for key, value in metrics.items() if math.isnan(value)]
    assert "regimes/policy_wrong_reference_wrong/mean_score" not in metrics
    assert "length/shift_correlation" not in metrics
    assert metrics["regimes/policy_wrong_reference_wrong/weight_share"] == 0.0


def test_a_mean_over_a_pair_without_a_number_is_left_out_too():
    policy = logprobs([math.nan, -1.0], [-2.0, -3.0])
    scored = tables.with_loss(tables.table_of(policy, policy, HALF(policy, policy, torch.zeros(2))), HALF)
    for is_fixed_set in (False, True):
        metrics = pair_metrics(scored, is_fixed_set=is_fixed_set)
        assert not [key for key, value in metrics.items() if math.isnan(value)]
        assert "logps/chosen" not in metrics
        assert metrics["logps/rejected"] == -2.5


# ---------------------------------------------------------------- movement since step 0


def at_reference(table):
    return replace(table, policy_chosen=table.reference_chosen, policy_rejected=table.reference_rejected)


def test_displacement_per_token_is_over_all_tokens(four):
    """Chosen −2 + 2 − 4 + 0 = −4 over 8 tokens; rejected 0 − 4 + 2 − 2 = −4 over 14."""
    metrics = pair_metrics(four)
    assert metrics["displacement/chosen_per_token"] == pytest.approx(-4 / 8)
    assert metrics["displacement/rejected_per_token"] == pytest.approx(-4 / 14)


def test_shift_accuracy_asks_whether_the_preference_grew_whatever_gamma(four):
    """Δπ − Δ0 = −2, 6, −6, 2."""
    assert pair_metrics(four)["accuracy/shift"] == 0.5
    assert pair_metrics(at_reference(four))["accuracy/shift"] == 0.5  # all tied
    assert pair_metrics(four.take([1, 2, 3]))["accuracy/shift"] == pytest.approx(2 / 3)


def test_changes_and_transitions_are_since_the_reference_where_the_policy_started_there(four):
    metrics = pair_metrics(tables.with_loss(four, HALF), is_fixed_set=True)
    names = ("right_reference_right", "right_reference_wrong", "wrong_reference_right", "wrong_reference_wrong")
    assert [metrics[f"regimes/policy_{name}/mean_change"] for name in names] == [-2, 6, -6, 2]
    found = [metrics[f"regimes/transitions/{key}"] for key in ("kept", "gained", "lost", "not_yet", "p_value")]
    assert found == [1, 1, 1, 1, 1.0]


def test_changes_and_transitions_are_since_step_0_where_the_policy_started_elsewhere(four):
    """Δπ at step 0 was −1 for all four: the two that are right now were gained since, whatever the reference says."""
    first = replace(four, policy_chosen=four.policy_rejected - 1)
    metrics = pair_metrics(tables.with_loss(four, HALF).since(first), is_fixed_set=True)
    assert [metrics[f"regimes/transitions/{key}"] for key in ("kept", "gained", "lost", "not_yet")] == [0, 2, 0, 2]
    assert metrics["regimes/policy_right_reference_right/mean_change"] == 3


def test_a_window_of_training_pairs_has_no_changes_where_step_0_is_not_known(four):
    assert not [key for key in pair_metrics(tables.with_loss(four, HALF)) if "mean_change" in key or "transitions" in key]


# ---------------------------------------------------------------- length

LONGER, SHORTER = [30, 20, 10, 10], [10, 10, 20, 30]


def length_world(shift_per_token):
    """Δ0 = −2·(length difference) + 1: wrong where chosen is longer, though right at equal length. Δπ = Δ0 + a shift."""
    difference = torch.tensor(LONGER, dtype=torch.float64) - torch.tensor(SHORTER)
    rejected = torch.full((4,), -100.0, dtype=torch.float64)
    reference = PairLogprobs(rejected + 1 - 2 * difference, rejected, torch.tensor(LONGER), torch.tensor(SHORTER))
    policy = reference._replace(chosen=reference.chosen + shift_per_token * difference + torch.tensor([0.1, -0.1, -0.1, 0.1]))
    return tables.table_of(policy, reference, HALF(policy, reference, torch.zeros(4)), HALF)


def test_matched_on_length_the_reference_is_judged_by_what_length_does_not_explain():
    metrics = pair_metrics(length_world(0.0), is_fixed_set=True)
    assert (metrics["accuracy/reference"], metrics["accuracy/reference_length_matched"]) == (0.5, 1.0)
    assert metrics["regimes_length_matched/policy_right_reference_right/pairs"] == 4
    assert metrics["length/reference_correlation"] == pytest.approx(-1)


def test_a_policy_that_learns_length_alone_changes_sides_when_matched_on_length():
    """A shift of −0.5 nats per token of difference (20, 10, −10, −20) beats the intercept of 1 where chosen is longer."""
    metrics = pair_metrics(length_world(-0.5), is_fixed_set=True)
    assert metrics["length/shift_slope"] == pytest.approx(-0.5, abs=0.02)
    assert metrics["length/shift_correlation"] < -0.99
    assert metrics["regimes_length_matched/policy_wrong_reference_right/pairs"] == 2
    assert metrics["regimes_length_matched/transitions/lost"] == 2
    assert metrics["regimes/policy_wrong_reference_right/pairs"] == 0


def test_at_step_0_no_pair_is_off_the_diagonal_by_sums_per_token_or_matched_on_length():
    metrics = pair_metrics(at_reference(length_world(-0.5)), is_fixed_set=True)
    for table in ("regimes", "regimes_per_token", "regimes_length_matched"):
        for name in ("policy_right_reference_wrong", "policy_wrong_reference_right"):
            assert metrics[f"{table}/{name}/pairs"] == 0


# ---------------------------------------------------------------- the list, and tables on disk


def test_the_list_has_every_metric_that_is_one_number(four):
    """By its key, from the table alone; what is left are the cells of quadrants and transitions."""
    table = tables.with_loss(four, HALF)
    metrics = pair_metrics(table, is_fixed_set=True)
    listed = {key for key in metrics if key in METRICS}
    assert {key: METRICS[key](table) for key in listed} == {key: metrics[key] for key in listed}
    assert all(key.startswith("regimes") or key == "pairs" for key in metrics.keys() - listed)


def test_every_share_of_pairs_gets_an_interval(four):
    """Matched on length, too: the slope that all pairs share is taken as known."""
    found = share_intervals(pair_metrics(four, is_fixed_set=True))
    accuracies = {
        f"accuracy/{model}{way}" for model in ("policy", "reference") for way in ("", "_per_token", "_length_matched")
    }
    others = {"accuracy/shift", "accuracy/shift_per_token", "accuracy/implicit", "rewards/accuracies"}
    assert found.keys() == accuracies | others | {"active", "displacement/chosen_fell"}
    assert found["accuracy/policy"] == wilson_interval(0.5, 4)


def test_a_table_comes_back_from_its_file(four, tmp_path):
    written = replace(four.since(four), prompt=["a"] * 4, chosen=["b"] * 4, rejected=["c"] * 4)
    written.save(tmp_path / "pairs.parquet")
    read = PairTable.load(tmp_path / "pairs.parquet", remedy="")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]
    assert read.columns().keys() == written.columns().keys()
    assert all(list(read.columns()[name]) == list(column) for name, column in written.columns().items())
    assert PairTable.load(tmp_path / "pairs.parquet", remedy="", with_texts=False).prompt is None


def test_what_a_file_lacks_is_unknown_or_said(four, tmp_path):
    path = tmp_path / "pairs.parquet"
    table = pyarrow.table({"where": ["a"], "prompt_key": ["k"], "policy_chosen": [-1.0]})
    pyarrow.parquet.write_table(table, path)
    read = PairTable.load(path, remedy="measure it again")
    assert (read.knows("policy_chosen"), read.knows("reference_chosen"), read.initial_chosen) == (True, False, None)
    with pytest.raises(UsageError, match="has no column score; measure it again"):
        PairTable.load(path, remedy="measure it again", needs=["score"])
    path.write_bytes(b"torn")
    with pytest.raises(UsageError, match=r"cannot be read: .*; measure it again"):
        PairTable.load(path, remedy="measure it again")
    assert PairTable.load(tmp_path / "nothing.parquet", remedy="") is None


def test_rows_are_ordered_by_prompt_and_name_whatever_the_file_says(four):
    shuffled = four.take([2, 0, 3, 1])
    assert shuffled.in_order().where == four.where
    assert shuffled.in_order().policy_chosen.tolist() == four.policy_chosen.tolist()


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("share", "pairs", "low", "high"),
    [(0.65, 500, 0.6072, 0.6905), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.5, 0, 0.0, 1.0)],
)
def test_wilson_intervals_are_those_of_scipy_and_of_the_tables(share, pairs, low, high):
    assert wilson_interval(share, pairs) == pytest.approx((low, high), abs=1e-4)
    if pairs:
        expected = scipy.stats.binomtest(round(share * pairs), pairs).proportion_ci(method="wilson")
        assert wilson_interval(share, pairs) == pytest.approx((expected.low, expected.high), abs=1e-9)

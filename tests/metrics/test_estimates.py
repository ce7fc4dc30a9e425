"""How many pairs changed sides, against binomial tests, enumeration and hand-made tables."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pe_dpo.metrics.estimates import changed_sides, mean_change, pairs_worth, sign_flip_test, wilson_interval
from pe_dpo.metrics.quadrants import clustered_transitions, transitions


@pytest.mark.parametrize(("gained", "lost"), [(5, 0), (0, 3), (7, 7), (12, 4), (30, 11), (1, 0)])
def test_with_one_pair_per_prompt_the_p_value_is_that_of_mcnemars_exact_test(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue
    assert sign_flip_test([1] * gained + [-1] * lost + [0] * 9) == pytest.approx(expected, rel=1e-12)


def test_prompts_of_several_pairs_are_enumerated_over_all_signs() -> None:
    sums = [3, -1, 2, 2, -4, 1, 0, 5]
    sizes = [abs(number) for number in sums]
    signed = [sum(s * n for s, n in zip(signs, sizes, strict=True)) for signs in itertools.product((-1, 1), repeat=len(sizes))]
    expected = sum(abs(total) >= abs(sum(sums)) for total in signed) / len(signed)
    assert sign_flip_test(sums) == pytest.approx(expected, rel=1e-12)


def test_without_any_change_nothing_is_surprising() -> None:
    assert sign_flip_test([0, 0, 0]) == 1.0
    assert sign_flip_test([]) == 1.0


def test_pairs_are_counted_by_side_and_ties_apart() -> None:
    start = np.asarray([1.0, 2.0, -1.0, -2.0, -3.0, 0.0, 1.0])
    now = np.asarray([3.0, -1.0, 1.0, 4.0, -1.0, 2.0, 0.0])
    flips = clustered_transitions(start, now, list("abcdefg"))
    assert [flips[name] for name in ("kept", "lost", "gained", "not_yet", "tied")] == [1, 1, 2, 1, 2]
    assert flips["change"] == pytest.approx((4 - 3) / 7 + (0.5 - 0.5) / 7)  # right: 1,3,4,6 + ½·7 against 1,2,7 + ½·6


def test_a_pair_that_is_tied_in_one_ranking_is_not_in_the_test_of_the_others() -> None:
    """Three gained, none lost, ten of which a tie was undone: McNemar's p is 2/2³, however it is asked for."""
    before, now = np.r_[-np.ones(3), np.zeros(10), 1.0], np.ones(14)
    prompts = [str(row) for row in range(14)]
    found = [transitions(before, now), transitions(before, now, prompts), clustered_transitions(before, now, prompts)]
    assert [(one["gained"], one["lost"], one["p_value"]) for one in found] == [(3, 0, 0.25)] * 3
    assert changed_sides(np.array([0.5, 0.0, 1.0, np.nan]), np.array([1.0, 1.0, 0.5, 1.0]), "abcd") == (1, 0, 1.0)


def test_a_pair_without_a_number_is_in_no_count_and_hides_no_other() -> None:
    start, now = np.asarray([1.0, -1.0, math.nan, 2.0]), np.asarray([1.0, 1.0, 1.0, math.nan])
    assert clustered_transitions(start, now, list("abcc")) == clustered_transitions(start[:2], now[:2], list("ab"))
    nothing = clustered_transitions(start[2:], now[2:], list("cc"))
    assert [nothing[name] for name in ("kept", "lost", "gained", "not_yet", "tied", "p_value")] == [0, 0, 0, 0, 0, 1.0]
    assert math.isnan(nothing["change"])


def test_pairs_of_one_prompt_are_one_draw() -> None:
    start, now = -np.ones(8), np.ones(8)
    alone, together = clustered_transitions(start, now, list("abcdefgh")), clustered_transitions(start, now, list("aaaabbbb"))
    assert alone["p_value"] == pytest.approx(2 / 2**8)
    assert together["p_value"] == pytest.approx(2 / 2**2)


def test_the_interval_of_a_mean_is_students_over_prompts() -> None:
    values = np.asarray([1.0, 2.0, 4.0, 9.0])
    found = mean_change(values, list("abcd"))
    low, high = stats.t.interval(0.95, 3, loc=4.0, scale=stats.sem(values))
    assert found == pytest.approx((4.0, low, high))


def test_one_prompt_gives_no_interval() -> None:
    found = mean_change(np.asarray([1.0, 3.0]), ["a", "a"])
    assert found[0] == 2.0
    assert math.isnan(found[1]) and math.isnan(found[2])


def test_chance_alone_is_called_more_than_chance_in_at_most_one_case_of_twenty() -> None:
    """Prompts of three pairs that change sides together, without a direction: 5 % ± 3 standard errors of 400 repeats."""
    random = np.random.default_rng(5)
    called = 0
    for _ in range(400):
        direction = np.repeat(random.choice([-1.0, 0.0, 1.0], 30), 3)
        now = np.where(direction == 0, 1.0, direction)
        start = np.where(direction == 0, 1.0, -direction)
        called += clustered_transitions(start, now, [str(index // 3) for index in range(90)])["p_value"] < 0.05
    assert called <= 400 * (0.05 + 3 * math.sqrt(0.05 * 0.95 / 400))


# ---------------------------------------------------------------- pairs that share prompts


def test_pairs_with_prompts_of_their_own_are_worth_their_number_and_those_of_a_prompt_that_agree_one() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 2, 50).astype(float)
    assert pairs_worth(values, range(50)) == 50  # so that the interval is Wilson's to the bit
    assert pairs_worth(np.r_[values, np.nan], [*range(50), 0]) == 50
    assert pairs_worth(np.repeat(values, 4), np.repeat(np.arange(50), 4).tolist()) == pytest.approx(
        50 * (200 / 199) * (49 / 50) * (stats.t.ppf(0.025, 199) / stats.t.ppf(0.025, 49)) ** 2
    )
    assert pairs_worth(np.ones(20), np.repeat(np.arange(5), 4).tolist()) == 5
    assert pairs_worth(np.array([1.0, 0.0]), ["a", "a"]) == 1


def test_intervals_of_pairs_that_share_prompts_cover_the_share_as_often_as_they_say() -> None:
    """400 sets of 20 prompts × 10 pairs, each prompt right more or less often: Wilson's alone misses .7 in a third of them."""
    random = np.random.default_rng(1)
    chances = random.beta(0.7 * 1.5, 0.3 * 1.5, (400, 20, 1))
    sets = (random.random((400, 20, 10)) < chances).reshape(400, 200).astype(float)
    prompts = np.repeat(np.arange(20), 10).tolist()
    alone = [wilson_interval(float(one.mean()), 200) for one in sets]
    assert np.mean([not low <= 0.7 <= high for low, high in alone]) > 0.3
    ours = [wilson_interval(float(one.mean()), pairs_worth(one, prompts)) for one in sets]
    assert np.mean([not low <= 0.7 <= high for low, high in ours]) <= 0.05 + 2.33 * 0.011


def test_sides_changed_by_pairs_of_one_prompt_are_one_draw() -> None:
    """20 prompts × 10 pairs, of which prompts change sides as a whole: 12 gained, 2 lost; McNemar's p is below 1e−17."""
    before = np.repeat([-1.0] * 12 + [1.0] * 8, 10)
    now = np.repeat([1.0] * 12 + [-1.0] * 2 + [1.0] * 6, 10)
    prompts = [f"prompt {row // 10}" for row in range(200)]
    assert transitions(before, now)["p_value"] < 1e-17
    found = transitions(before, now, prompts)
    assert (found["gained"], found["lost"]) == (120, 20)
    assert found["p_value"] == pytest.approx(2 * sum(math.comb(14, count) for count in range(3)) / 2**14)


def test_prompts_that_change_sides_by_chance_are_seldom_a_change() -> None:
    """300 sets of 15 prompts, 4 pairs of each on one side: independent pairs would make a change of a third of them."""
    random = np.random.default_rng(2)
    signs = np.repeat(random.choice([-1.0, 1.0], (300, 15)), 4, axis=1)
    prompts = [str(row // 4) for row in range(60)]
    assert np.mean([transitions(-one, one)["p_value"] < 0.05 for one in signs]) > 0.25
    assert np.mean([transitions(-one, one, prompts)["p_value"] < 0.05 for one in signs]) <= 0.05


def test_the_normal_limit_stands_for_a_sum_that_is_long_to_enumerate() -> None:
    sums = [2] * 60 + [-2] * 35 + [1] * 40 + [-1] * 30
    exact = sign_flip_test(sums)
    many = sums * 60  # 15,600 pairs; the limit alone, held against the same statistic's normal p
    size = (abs(sum(many)) - 1) / math.sqrt(sum(one * one for one in many))
    assert sign_flip_test(many) == pytest.approx(2 * stats.norm.sf(size), rel=1e-9)
    assert exact == pytest.approx(2 * stats.norm.sf((60 - 1) / math.sqrt(sum(one * one for one in sums))), rel=0.05)

"""How many pairs changed sides, against binomial tests, enumeration and hand-made tables."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pe_dpo.metrics.estimates import mean_change, sign_flip_test
from pe_dpo.metrics.quadrants import clustered_transitions


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

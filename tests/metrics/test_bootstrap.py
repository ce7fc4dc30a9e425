"""Errors of differences: by hand, against brute force, and by asking how often they are right."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from pe_dpo.metrics import bootstrap
from pe_dpo.metrics.bootstrap import Effect, Errors


def test_weights_are_counts_of_draws_with_replacement() -> None:
    weights = bootstrap.cluster_weights(np.random.default_rng(0), 4000, 3)
    assert weights.shape == (4000, 3)
    assert (weights.sum(1) == 3).all()
    seen = {tuple(row) for row in weights}
    exact = {tuple(float(x) for x in np.bincount(draw, minlength=3)) for draw in itertools.product(range(3), repeat=3)}
    assert seen == exact
    # the chance of drawing each cluster once is 3!/27
    assert abs((weights == 1).all(1).mean() - 6 / 27) < 3 * math.sqrt(6 / 27 * 21 / 27 / 4000)


def test_resampled_ratios_are_those_of_brute_force_over_the_same_draws() -> None:
    random = np.random.default_rng(1)
    numerators, denominators = random.normal(size=(7, 3)), random.integers(1, 4, (7, 3)).astype(float)
    found = bootstrap.resampled_ratios(numerators, denominators, repeats=50, seed=5)
    draws = np.random.default_rng(5).integers(0, 7, (50, 7))
    for replicate, draw in zip(found, draws, strict=True):
        for column in range(3):
            above = sum(numerators[cluster, column] for cluster in draw)
            below = sum(denominators[cluster, column] for cluster in draw)
            assert replicate[column] == pytest.approx(above / below, rel=1e-12)


def test_resampled_ratios_have_the_distribution_of_all_possible_draws() -> None:
    """Three clusters can be drawn in 27 ways; mean and variance over these are those of many replicates."""
    numerators, denominators = np.array([[1.0], [0.0], [5.0]]), np.array([[1.0], [2.0], [3.0]])
    all_draws = [list(draw) for draw in itertools.product(range(3), repeat=3)]
    exact = np.array([numerators[draw].sum() / denominators[draw].sum() for draw in all_draws])
    found = bootstrap.resampled_ratios(numerators, denominators, repeats=40_000, seed=0)[:, 0]
    assert found.mean() == pytest.approx(exact.mean(), abs=4 * exact.std() / 200)
    assert found.var() == pytest.approx(exact.var(), rel=0.05)


def test_ratios_do_not_depend_on_how_many_replicates_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    numerators, denominators = random.normal(size=(11, 2)), np.ones((11, 2))
    whole = bootstrap.resampled_ratios(numerators, denominators, repeats=30, seed=3)
    monkeypatch.setattr(bootstrap, "_CELLS", 44)
    np.testing.assert_allclose(bootstrap.resampled_ratios(numerators, denominators, repeats=30, seed=3), whole, rtol=1e-12)


def test_a_replicate_that_draws_no_row_is_not_a_number() -> None:
    denominators = np.array([[1.0], [0.0], [0.0]])
    found = bootstrap.resampled_ratios(np.ones((3, 1)), denominators, repeats=2000, seed=0)[:, 0]
    assert abs(np.isnan(found).mean() - 8 / 27) < 0.04


def test_interpolation_by_hand() -> None:
    knots, values = np.array([[2.0, 0.0, 1.0]]), np.array([[8.0, 0.0, 2.0]])
    for at, expected in ((0.0, 0.0), (0.5, 1.0), (1.0, 2.0), (1.5, 5.0), (2.0, 8.0)):
        assert bootstrap.interpolate(knots, values, np.array([at]))[0] == pytest.approx(expected)


@example([(0.0, 0.0), (5e-324, 0.0)], 1.0)  # as near as two numbers can be
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(-5, 5)), min_size=1, max_size=6), st.floats(-1, 11))
def test_interpolation_never_extrapolates(points: list[tuple[float, float]], at: float) -> None:
    knots, values = (np.array(side)[None] for side in zip(*points, strict=True))
    found = bootstrap.interpolate(knots, values, np.array([at]))[0]
    assert math.isnan(found) == (at < knots.min() or at > knots.max())
    if not math.isnan(found):
        assert values.min() - 1e-9 <= found <= values.max() + 1e-9
    nearest = bootstrap.interpolate(knots, values, np.array([at]), nearest=True)[0]
    assert values.min() - 1e-9 <= nearest <= values.max() + 1e-9


def test_interpolation_of_many_rows_is_that_of_numpy_for_each() -> None:
    random = np.random.default_rng(4)
    knots, values, at = random.uniform(0, 1, (200, 5)), random.normal(size=(200, 5)), random.uniform(-0.2, 1.2, 200)
    found = bootstrap.interpolate(knots, values, at, nearest=True)
    for row in range(200):
        order = np.argsort(knots[row])
        assert found[row] == pytest.approx(np.interp(at[row], knots[row][order], values[row][order]), abs=1e-12)


def test_knots_of_equal_place_are_averaged() -> None:
    assert bootstrap.interpolate(np.array([[1.0, 1.0]]), np.array([[0.0, 4.0]]), np.array([1.0]))[0] == 2.0


def test_one_seed_has_the_textbook_interval_of_a_paired_mean() -> None:
    random = np.random.default_rng(6)
    differences = random.choice([-1.0, 0.0, 1.0], 200, p=[0.1, 0.7, 0.2])
    replicates = bootstrap.resampled_ratios(differences[:, None], np.ones((200, 1)), repeats=20_000, seed=0)
    found = bootstrap.effect(differences.mean(keepdims=True), replicates, clusters=200)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.002)
    assert found.p == pytest.approx(test.pvalue, rel=0.1)
    assert math.isnan(found.seed_sd)


def test_seeds_alone_have_the_textbook_interval_of_their_mean() -> None:
    """Where prompts bring in nothing, the interval is Student's over seeds."""
    per_seed = np.array([0.01, 0.03, 0.08])
    found = bootstrap.effect(per_seed, np.tile(per_seed, (500, 1)), clusters=1_000_000)
    test = stats.ttest_1samp(per_seed, 0.0)
    low, high = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)
    assert found.p == pytest.approx(test.pvalue, rel=1e-6)
    assert found.seed_sd == pytest.approx(per_seed.std(ddof=1))


def test_the_parts_of_an_error_by_hand() -> None:
    """Three seeds of D_s = ±1 of their own ±1 in common, in all 16 ways: each has a variance of 2, their mean 1 + 1/3.

    What is in common is 1, what seeds and prompts do together (2 − 4/3)/2 = 1/3; seeds at −10, 0 and 10 have 100/3 less that.
    """
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=4)))
    found = bootstrap.effect(np.array([-10.0, 0.0, 10.0]), signs[:, :3] + signs[:, 3:], clusters=10**9).errors
    assert found[:4] == pytest.approx((4 / 3, 1, 1 / 3, 33), rel=1e-6)


def test_the_interval_and_p_agree() -> None:
    random = np.random.default_rng(7)
    for shift in np.linspace(0, 0.1, 30):
        per_seed = shift + random.normal(0, 0.02, 3)
        replicates = per_seed + random.normal(0, 0.02, (400, 3)) + random.normal(0, 0.01, (400, 1))
        found = bootstrap.effect(per_seed, replicates, clusters=80)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_a_replicate_that_is_not_known_counts_for_nothing() -> None:
    random = np.random.default_rng(10)
    per_seed, replicates = random.normal(size=3), random.normal(size=(200, 3))
    unknown = np.concatenate([replicates, np.full((5, 3), math.nan)])
    found, expected = (bootstrap.effect(per_seed, some, clusters=60).errors for some in (unknown, replicates))
    assert found == pytest.approx(expected, rel=1e-12) and expected.together > 0


def test_a_replicate_that_one_seed_lacks_is_lacking_for_their_mean_alone() -> None:
    """The three seeds' effect is that of the replicates which all of them have."""
    random = np.random.default_rng(11)
    per_seed, replicates = random.normal(size=3), random.normal(size=(200, 3)) + random.normal(size=(200, 1))
    holes = replicates.copy()
    holes[:50, 1] = math.nan
    found, expected = (bootstrap.effect(per_seed, some, clusters=60).errors for some in (holes, replicates[50:]))
    assert found == pytest.approx(expected, rel=1e-12)


def test_as_many_seeds_as_there_are_leave_the_errors_as_they_are() -> None:
    """Of what prompts do with seeds, 3, the spread of the seeds showed 1; with twice the seeds each is halved."""
    errors = Errors(prompts=5.0, alone=2.0, together=1.0, seeds=0.5, clusters=50, runs=3, seed_freedom=4.0)
    assert errors.with_runs(3) == errors
    assert errors.with_runs(6) == Errors(3.5, 2.0, 0.5, 0.25, 50, 6, 7.0)


def test_one_seed_in_each_of_two_data_sets_is_no_test_beside_others_of_several() -> None:
    """Their mean has two numbers and knows no spread between seeds."""
    random = np.random.default_rng(12)
    alone = [bootstrap.effect(random.normal(size=1), random.normal(size=(200, 1)), clusters=40) for _ in range(2)]
    several = bootstrap.effect(random.normal(size=3), random.normal(size=(200, 3)), clusters=40)
    lone, other = bootstrap.tested_together([bootstrap.mean_effect(alone), several])
    assert lone is not None and other is not None
    assert np.isnan([lone.low, lone.high, lone.p, lone.p_adjusted]).all()
    assert other.p_adjusted == other.p


def test_a_difference_that_no_pair_has_is_not_known_to_be_zero() -> None:
    """100 pairs without a difference: one more that differs would have moved the mean by a hundredth."""
    found = bootstrap.effect(np.zeros(1), np.zeros((500, 1)), clusters=100, one_row=0.01)
    assert found.high == pytest.approx(0.01 * stats.t.isf(0.025, 99))
    assert found.p == 1.0


def test_a_difference_that_all_pairs_have_is_not_certain_for_few() -> None:
    found = bootstrap.effect(np.ones(1), np.ones((500, 1)), clusters=4)
    assert found.p > 0.01


def per_seed_and_replicates(
    random: np.random.Generator, repeats: int, seeds: int, prompts: int, parts: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """D_s of `repeats` experiments, (repeats, S), and over resampled prompts, (B, repeats, S): seed + prompt + both + 0."""
    of_seeds, of_prompts, of_both = parts
    values = random.normal(0, of_both, (repeats, seeds, prompts))
    values += random.normal(0, of_prompts, (repeats, 1, prompts)) + random.normal(0, of_seeds, (repeats, seeds, 1))
    columns = values.reshape(repeats * seeds, prompts).T
    replicates = bootstrap.resampled_ratios(columns, np.ones_like(columns), repeats=400, seed=0)
    return values.mean(2), replicates.reshape(-1, repeats, seeds)


PARTS = {
    "prompts alone": (0.0, 1.0, 0.0),
    "both together": (0.0, 0.0, 1.0),
    "prompts": (0.0, 1.0, 1.0),
    "seeds a little": (0.1, 1.0, 1.0),
    "seeds as much": (0.2, 1.0, 1.0),
    "seeds more": (1.0, 1.0, 1.0),
}


@cache
def effects_of_nothing(seeds: int, parts: tuple[float, float, float]) -> list[Effect]:
    """What is found in 1,000 experiments with 60 prompts in which nothing differs but by chance."""
    per_seed, replicates = per_seed_and_replicates(np.random.default_rng(seeds), 1000, seeds, 60, parts)
    return [bootstrap.effect(per_seed[one], replicates[:, one], clusters=60) for one in range(1000)]


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_miss_the_truth_in_at_most_five_percent(seeds: int, parts: tuple[float, float, float]) -> None:
    """Whatever is noisy: seeds, prompts, or what both do together; 95 % + 2.3 standard errors of 1,000 experiments."""
    misses = np.mean([not found.low <= 0 <= found.high for found in effects_of_nothing(seeds, parts)])
    assert misses <= 0.05 + 2.33 * math.sqrt(0.05 * 0.95 / 1000)


def test_resampling_seeds_and_reading_off_quantiles_would_err_four_times_as_often() -> None:
    """Why it is not done: the same experiments, the plain hierarchical bootstrap."""
    random = np.random.default_rng(3)
    per_seed, replicates = per_seed_and_replicates(random, 500, 3, 60, (1.0, 1.0, 1.0))
    drawn = random.integers(0, 3, (len(replicates), 1, 3))
    plain = np.take_along_axis(replicates, np.broadcast_to(drawn, replicates.shape), 2).mean(2)
    low, high = np.quantile(plain, [0.025, 0.975], axis=0)
    assert np.mean((low > 0) | (high < 0)) > 0.15
    ours = [bootstrap.effect(per_seed[one], replicates[:, one], clusters=60).p for one in range(500)]
    assert np.mean(np.array(ours) < 0.05) < 0.08


def test_what_one_seed_shows_is_no_difference_where_others_have_several() -> None:
    """100 experiments without a difference: six arms of three seeds, three of one, whose prompts are all that they know.

    Tested like the others, one of the lone arms is told apart in 4 of 5 experiments; left out, Holm keeps its 5 %.
    """
    per_seed, replicates = per_seed_and_replicates(np.random.default_rng(4), 900, 3, 40, (1.0, 1.0, 1.0))

    def experiment(number: int) -> list[Effect]:
        arms, seeds = range(9 * number, 9 * number + 9), [3] * 6 + [1] * 3
        return [
            bootstrap.effect(per_seed[one, :count], replicates[:, one, :count], clusters=40)
            for one, count in zip(arms, seeds, strict=True)
        ]

    found = [experiment(number) for number in range(100)]
    before = [bootstrap.holm(np.array([one.p for one in arms])) for arms in found]
    assert np.mean([adjusted.min() < 0.05 for adjusted in before]) > 0.7
    tested = [bootstrap.tested_together(arms) for arms in found]
    assert np.mean([any(one and one.p_adjusted < 0.05 for one in arms) for arms in tested]) <= 0.05 + 2.33 * 0.0218
    lone = tested[0][-1]
    assert lone is not None
    assert lone.estimate == found[0][-1].estimate
    assert np.isnan([lone.low, lone.high, lone.p, lone.p_adjusted]).all()
    alone = bootstrap.tested_together([arms[-1] for arms in found])  # where all have one seed, each is tested as it is
    assert not any(one is None or math.isnan(one.p_adjusted) for one in alone)


@pytest.mark.slow
def test_a_difference_of_the_margin_is_called_equivalent_in_at_most_five_percent() -> None:
    """300 experiments of five seeds whose true difference is the margin, above or below; one without a difference is found."""
    per_seed, replicates = per_seed_and_replicates(np.random.default_rng(5), 300, 5, 60, (0.2, 1.0, 1.0))
    margin = 0.5

    def equivalent(shift: float) -> float:
        found = [bootstrap.effect(per_seed[one] + shift, replicates[:, one] + shift, clusters=60) for one in range(300)]
        tested = [bootstrap.tested_together([one], margins=[margin])[0] for one in found]
        return float(np.mean([one is not None and one.p_equivalent < 0.05 for one in tested]))

    assert equivalent(margin) <= 0.05 + 2.33 * math.sqrt(0.05 * 0.95 / 300)
    assert equivalent(-margin) <= 0.05 + 2.33 * math.sqrt(0.05 * 0.95 / 300)
    assert equivalent(0.0) > 0.5


def test_the_mean_over_data_sets_errs_in_at_most_five_percent() -> None:
    """200 pairs of data sets without a difference, three seeds each, one of which scatters thrice as much."""
    parts = (1.0, 1.0, 1.0)
    sets = [per_seed_and_replicates(np.random.default_rng(seed), 200, 3, 40, parts) for seed in (6, 7)]
    false = []
    for one in range(200):
        effects = [
            bootstrap.effect(size * per_seed[one], size * replicates[:, one], clusters=40)
            for size, (per_seed, replicates) in zip((1.0, 3.0), sets, strict=True)
        ]
        pooled = bootstrap.mean_effect(effects)
        assert 2 <= pooled.errors.seed_freedom <= 4
        false.append(pooled.p < 0.05)
    assert np.mean(false) <= 0.05 + 2.33 * math.sqrt(0.05 * 0.95 / 200)


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_standard_errors_are_those_of_repeated_experiments(parts: tuple[float, float, float]) -> None:
    """Squared and averaged, within a tenth; a variance that is cut at 0 is too large where seeds bring in nothing."""
    squares = [found.errors.variance() for found in effects_of_nothing(3, parts)]
    of_seeds, of_prompts, of_both = parts
    truth = of_seeds**2 / 3 + of_prompts**2 / 60 + of_both**2 / 180
    assert 0.9 * truth < np.mean(squares) < (1.5 if of_seeds < 0.1 and of_both else 1.15) * truth


def test_hierarchical_replicates_have_the_variance_of_the_interval() -> None:
    random = np.random.default_rng(9)
    per_seed, replicates = per_seed_and_replicates(random, 1, 3, 60, (1.0, 1.0, 1.0))
    found = bootstrap.hierarchical_replicates(per_seed[0], replicates[:, 0], random.random((len(replicates), 3)))
    expected = bootstrap.effect(per_seed[0], replicates[:, 0], clusters=60).errors.variance()
    assert found.var() == pytest.approx(expected, rel=0.15)
    assert found.mean() == pytest.approx(per_seed.mean(), abs=4 * math.sqrt(expected / 1000))


def test_holm_by_hand() -> None:
    """Sorted .005·4 = .02, .01·3 = .03, .03·2 = .06, .04·1 → not below .06; one that is unknown counts for nothing."""
    found = bootstrap.holm(np.array([0.01, 0.04, math.nan, 0.03, 0.005]))
    np.testing.assert_allclose(found, [0.03, 0.06, math.nan, 0.06, 0.02])
    assert bootstrap.holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert len(bootstrap.holm(np.array([]))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3, 5])
@pytest.mark.parametrize("parts", [(0.0, 1.0, 0.0), (0.05, 0.4, 0.6), (0.3, 0.4, 0.6)], ids=["prompts", "both", "seeds"])
def test_a_planted_effect_is_found_at_the_stated_power(parts: tuple[float, float, float], seeds: int) -> None:
    """The smallest effect that is said to be found in 80 %, from the true variances, planted into 1,000 experiments."""
    of_seeds, of_prompts, of_both = parts if seeds > 1 else (0.0, *parts[1:])
    alone, together = of_prompts**2 / 100, of_both**2 / 100 / seeds
    seeds_part = of_seeds**2 / seeds if seeds > 1 else math.nan
    planted = bootstrap.smallest_found(Errors(alone + together, alone, together, seeds_part, 100, seeds))
    random = np.random.default_rng(12)
    per_seed, replicates = per_seed_and_replicates(random, 1000, seeds, 100, (of_seeds, of_prompts, of_both))
    found = [bootstrap.effect(per_seed[i] + planted, replicates[:, i] + planted, clusters=100).p < 0.05 for i in range(1000)]
    assert 0.75 < np.mean(found) < 0.90, np.mean(found)


def test_more_prompts_help_until_the_seeds_are_all_that_is_left() -> None:
    errors = Errors(prompts=4e-4, alone=3e-4, together=1e-4, seeds=0.0, clusters=100, runs=3)
    more = bootstrap.prompts_needed(errors, 0.02)
    assert bootstrap.smallest_found(errors, more=more) == pytest.approx(0.02, rel=1e-4)
    assert bootstrap.prompts_needed(errors._replace(seeds=0.01**2), 0.02) == math.inf


def test_one_seed_needs_the_pairs_of_the_textbook() -> None:
    """Variance of one pair's difference .0996 at 10 % discordance and 2 points: 1,954 pairs by the normal approximation."""
    errors = Errors(prompts=0.0996 / 500, alone=0.0996 / 500, together=0.0, seeds=math.nan, clusters=500, runs=1)
    assert 500 * bootstrap.prompts_needed(errors, 0.02) == pytest.approx(1954, rel=0.005)


def test_the_front_by_hand() -> None:
    """B costs more than A and is worth less; C costs most and is worth most; D is not there."""
    costs, values = np.array([[1.0, 2.0, 3.0, math.nan]]), np.array([[0.5, 0.4, 0.9, 1.0]])
    assert bootstrap.pareto_membership(costs, values).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_the_front_is_that_of_brute_force() -> None:
    random = np.random.default_rng(13)
    costs, values = random.integers(0, 4, (300, 5)).astype(float), random.integers(0, 4, (300, 5)).astype(float)

    def is_beaten(row: int, one: int) -> bool:
        return any(
            costs[row, other] <= costs[row, one]
            and values[row, other] >= values[row, one]
            and (costs[row, other], values[row, other]) != (costs[row, one], values[row, one])
            for other in range(5)
        )

    expected = [np.mean([not is_beaten(row, one) for row in range(300)]) for one in range(5)]
    np.testing.assert_allclose(bootstrap.pareto_membership(costs, values), expected)


@pytest.mark.parametrize(("spread", "tolerance"), [(0.0, 0.15), (1.0, 0.2), (6.0, 0.25)])
def test_the_optimism_of_the_best_is_what_picking_gains_by_luck(spread: float, tolerance: float) -> None:
    """Eight points with errors of 1 and true values that scatter by `spread`: estimated, against what luck really was."""
    random = np.random.default_rng(14)
    truth = random.normal(0, spread, (1500, 8))
    observed = truth + random.normal(0, 1, (1500, 8))
    best = observed.argmax(1)
    luck = (observed - truth)[np.arange(1500), best].mean()
    noise = random.normal(0, 1, (400, 8))
    estimated = np.mean([bootstrap.optimism_of_best(one, one + noise) for one in observed])
    assert estimated == pytest.approx(luck, rel=tolerance)


def test_one_point_is_not_picked() -> None:
    assert bootstrap.optimism_of_best(np.array([0.5]), np.array([[0.4], [0.6]])) == 0.0

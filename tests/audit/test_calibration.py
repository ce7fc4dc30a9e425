"""γ from data: against SciPy's minimiser, brute force and formulas by hand; its intervals against simulation."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import minimize_scalar
from scipy.stats import median_abs_deviation, norm

from pe_dpo.audit import label_fit
from pe_dpo.audit.calibration import LARGEST_MISS, calibrate_gamma, calibrate_loss
from pe_dpo.audit.label_fit import LabelFit
from pe_dpo.errors import UsageError
from pe_dpo.inference.pairs import preferences
from pe_dpo.metrics.estimates import without_length
from pe_dpo.metrics.reference_accuracy import robust_spread
from pe_dpo.objective import PairLogprobs, PairTerms
from pe_dpo.recipe.loss_section import LossSection


def own_prompts(values):
    return [str(index) for index in range(len(values))]


def labelled(generator, pairs, *, scale=0.05, spread=20.0):
    """Δ0 of pairs whose labels are right with chance σ(scale·Δ0)."""
    preference = generator.normal(0, spread, pairs)
    return np.where(generator.random(pairs) < 1 / (1 + np.exp(-scale * preference)), preference, -preference)


def nll(scale, preference):
    return float(np.logaddexp(0, -scale * preference).sum())


@pytest.fixture
def preference():
    return labelled(np.random.default_rng(7), 600)


# ---------------------------------------------------------------- auto: the Platt scale


def test_the_platt_scale_is_where_the_likelihood_is_largest(preference):
    found = calibrate_gamma("auto", preference, beta=0.1, prompt_keys=own_prompts(preference))
    best = minimize_scalar(nll, args=(preference,), bracket=(0, 0.1), tol=1e-12).x
    assert found.gamma == pytest.approx(best, rel=1e-6)
    assert nll(found.gamma, preference) <= min(nll(found.gamma * factor, preference) for factor in (0.99, 1.01))


@settings(max_examples=60, deadline=None)
@given(
    values=arrays.arrays(
        np.float64, st.integers(3, 40), elements=st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3)
    ),
    far=st.floats(-1e6, 1e6),
)
def test_the_platt_scale_makes_the_slope_zero_whatever_the_tails(values, far):
    """A pair a thousand times as far out as all others makes Newton's steps run away."""
    values = np.append(values, far)
    scale = LabelFit(values, prompt_keys=["a"] * len(values)).scale
    if not (values > 0).any() or not (values < 0).any():
        assert not math.isfinite(scale)
        return
    slope = np.sum(values / (1 + np.exp(np.clip(scale * values, -700, 700))))
    information = np.sum(values**2 / (2 + 2 * np.cosh(np.clip(scale * values, -350, 350))))
    assert abs(slope) <= 1e-6 * max(information * abs(scale), np.abs(values).max())


def test_the_standard_error_is_the_curvature_of_the_likelihood(preference):
    """1/√(second difference of the NLL)."""
    found = LabelFit(preference, prompt_keys=own_prompts(preference))
    step = 1e-4
    beside = nll(found.scale + step, preference) + nll(found.scale - step, preference)
    assert found.standard_error == pytest.approx((step**2 / (beside - 2 * nll(found.scale, preference))) ** 0.5, rel=1e-4)


def test_the_likelihood_ratio_is_that_of_log_two_a_pair(preference):
    """χ² with one degree of freedom is a squared normal."""
    found = LabelFit(preference, prompt_keys=own_prompts(preference))
    ratio = 2 * (len(preference) * math.log(2) - nll(found.scale, preference))
    assert found.likelihood_ratio == pytest.approx(ratio, rel=1e-12)
    assert found.p_value == pytest.approx(2 * norm.sf(ratio**0.5), rel=1e-9)


def test_information_is_that_of_scales_which_have_not_seen_the_prompt():
    """Eight prompts, so as many folds: each is left out once, and SciPy finds the scale of the others."""
    values = labelled(np.random.default_rng(2), 24)
    owner = np.repeat(np.arange(8), 3)
    lost = 0.0
    for prompt in range(8):
        scale = minimize_scalar(nll, args=(values[owner != prompt],), bracket=(-0.1, 0.1), tol=1e-12).x
        lost += nll(scale, values[owner == prompt])
    found = LabelFit(values, prompt_keys=[f"prompt {number}" for number in owner])
    assert found.bits_per_pair == pytest.approx(1 - lost / 24 / math.log(2), rel=1e-6)


def test_a_coin_tells_nothing():
    """Labels that do not depend on Δ0: cross-fitted information is at or below 0, and the interval covers 0."""
    values = np.random.default_rng(11).normal(0, 20, 2000)
    found = LabelFit(values, prompt_keys=own_prompts(values))
    assert found.interval[0] < 0 < found.interval[1]
    assert found.bits_per_pair < 1e-3
    assert found.p_value > 0.05


def test_accuracy_counts_a_tie_one_half():
    found = LabelFit(np.array([1.0, 0.0, -2.0, 3.0]), prompt_keys=["a", "b", "c", "d"])
    assert found.accuracy == 0.625


def test_what_is_left_without_length_is_what_does_not_grow_with_it():
    """Δ0 = −3·(|chosen| − |rejected|) + 2 has slope −3, and 2 is left; the scale of a constant is infinite, all are right."""
    lengths = np.array([5.0, -2.0, 9.0, 0.0, -7.0])
    preference = -3 * lengths + 2
    assert np.allclose(without_length(preference, lengths), 2)
    found = LabelFit(preference, prompt_keys=own_prompts(lengths), length_difference=lengths)
    assert found.scale_without_length == math.inf


def test_answers_of_one_length_difference_have_no_slope():
    assert without_length(np.array([1.0, -2.0]), np.array([3.0, 3.0])).tolist() == [1.0, -2.0]


# ---------------------------------------------------------------- auto: intervals


def test_the_interval_is_that_of_resampling_one_prompt_at_a_time():
    """A plain loop over 2,000 other draws, with SciPy's minimiser: the same percentiles but for the chance of the draws."""
    generator = np.random.default_rng(5)
    values = labelled(generator, 90, scale=0.08)
    owner = np.arange(90) // 3
    scales = []
    for _ in range(400):
        drawn = np.concatenate([np.flatnonzero(owner == prompt) for prompt in generator.integers(30, size=30)])
        scales.append(minimize_scalar(nll, args=(values[drawn],), bracket=(0, 0.1), tol=1e-9).x)
    found = LabelFit(values, prompt_keys=[str(number) for number in owner])
    width = found.interval[1] - found.interval[0]
    assert found.interval == pytest.approx(np.quantile(scales, (0.025, 0.975)).tolist(), abs=0.12 * width)


@pytest.mark.slow
def test_the_interval_covers_the_true_scale_as_often_as_it_says(monkeypatch):
    """95 % of 200 data sets of 150 pairs, give or take 3 standard errors (1.5 points each) and the percentiles' own bias."""
    monkeypatch.setattr(label_fit, "REPLICATES", 200)
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = labelled(generator, 150, scale=0.05)
        low, high = LabelFit(values, prompt_keys=own_prompts(values)).interval
        covered += low <= 0.05 <= high
    assert 0.90 <= covered / 200 <= 0.985


def test_pairs_of_a_prompt_that_repeat_each_other_do_not_narrow_the_interval():
    """Every pair four times, under its prompt: draws of prompts give the same scales, draws of pairs would halve the width."""
    values = labelled(np.random.default_rng(3), 120)
    once = LabelFit(values, prompt_keys=own_prompts(values))
    four = LabelFit(np.repeat(values, 4), prompt_keys=np.repeat(own_prompts(values), 4).tolist())
    assert four.scale == pytest.approx(once.scale, rel=1e-9)
    assert four.interval == pytest.approx(once.interval, rel=1e-6)
    assert four.accuracy_interval == pytest.approx(once.accuracy_interval, rel=1e-9)
    assert four.standard_error == pytest.approx(once.standard_error / 2, rel=1e-9)


def test_blocks_of_the_bootstrap_do_not_change_it(monkeypatch):
    values = labelled(np.random.default_rng(3), 60)
    whole = LabelFit(values, prompt_keys=own_prompts(values)).interval
    monkeypatch.setattr(label_fit, "_CELLS", 60 * 37)
    parts = LabelFit(values, prompt_keys=own_prompts(values)).interval
    assert parts == pytest.approx(whole, rel=1e-9)


def test_one_prompt_has_no_interval():
    found = calibrate_gamma("auto", np.array([3.0, -1.0, 2.0]), beta=0.1, prompt_keys=["same"] * 3).to_dict()
    assert found["interval"] == [None, None]
    assert found["gamma"] > 0


# ---------------------------------------------------------------- auto: where there is no scale


def test_a_reference_that_is_always_right_has_no_finite_scale():
    with pytest.raises(
        UsageError, match=r"auto: the reference ranks no pair wrong, so that no finite scale fits best; write a n"
    ):
        calibrate_gamma("auto", np.array([1.0, 5.0, 0.0]), beta=0.1, prompt_keys=["a", "b", "c"])


def test_a_reference_that_is_always_tied_has_no_scale():
    with pytest.raises(UsageError, match="auto: every Δ0 is 0"):
        calibrate_gamma("auto", np.zeros(3), beta=0.1, prompt_keys=["a", "b", "c"])


@pytest.mark.parametrize("values", [[-1.0, -5.0], [-3.0, 1.0, -2.0, -9.0]])
def test_a_reference_that_prefers_the_rejected_answers_gets_no_weight(values):
    found = calibrate_gamma("auto", np.array(values), beta=0.1, prompt_keys=own_prompts(values))
    assert found.gamma == 0
    assert found.label_fit.scale < 0


# ---------------------------------------------------------------- balance


@pytest.mark.parametrize(("share", "margin"), [(0.4, 0.0), (0.5, 0.0), (0.9, 0.0), (0.6, 1.5), (0.9, 1.5), (0.5, -1.0)])
def test_balance_gives_the_share_that_was_asked_for(preference, share, margin):
    """Σ over Δ0 > 0 of σ((γ−β)Δ0 + m), over Σ of all."""
    found = calibrate_gamma(f"balance:{share}", preference, beta=0.1, margin=margin, prompt_keys=own_prompts(preference))
    weights = 1 / (1 + np.exp(-((found.gamma - 0.1) * preference + margin)))
    assert weights[preference > 0].sum() / weights.sum() == pytest.approx(share, abs=1e-9)
    assert found.share == pytest.approx(share, abs=1e-9)


def test_the_base_rate_gives_gamma_equal_to_beta():
    values = np.array([3.0, 1.0, -2.0, 7.0])
    assert calibrate_gamma("balance:0.75", values, beta=0.3, prompt_keys=own_prompts(values)).gamma == pytest.approx(
        0.3, rel=1e-9
    )


def test_the_lowest_share_is_that_of_gamma_zero():
    """At γ = 0 the weights are σ(−βΔ0): 1/(1+e) and e/(1+e) for ±1 at β = 1, so 0.2689 is on the right pair."""
    values = np.array([1.0, -1.0])
    lowest = 1 / (1 + math.e)
    assert calibrate_gamma(f"balance:{lowest + 1e-9}", values, beta=1.0, prompt_keys=["a", "b"]).gamma == pytest.approx(
        0, abs=1e-7
    )
    with pytest.raises(
        UsageError, match=r"balance:0.2: no gamma gives this share: it is 0.269 with gamma 0 and goes to 1 as gamma"
    ):
        calibrate_gamma("balance:0.2", values, beta=1.0, prompt_keys=["a", "b"])


@pytest.mark.parametrize(("values", "reachable"), [
    ([2.0, 3.0], "it is 1 with gamma 0 and goes to 1"),
    ([-2.0, -3.0], "it is 0 with gamma 0 and goes to 0"),
    ([2.0, 0.0], "it is 0.474 with gamma 0 and goes to 0.667"),
])  # fmt: skip
def test_a_share_that_no_gamma_gives_is_refused_with_what_is_reachable(values, reachable):
    """A tie weighs ½ at any γ, so beside one right pair at most 1/1.5 lies on the right one."""
    with pytest.raises(UsageError, match=reachable):
        calibrate_gamma("balance:0.8", np.array(values), beta=0.1, prompt_keys=["a", "b"])


def test_a_hinge_without_margin_has_all_its_weight_on_one_side():
    values = np.array([1.0, 2.0, -1.0, -3.0])
    with pytest.raises(
        UsageError, match=r"weights of a hinge are 0 or 1, and at gamma 0.1 the share jumps from 0 to 1; ask for one"
    ):
        calibrate_gamma("balance:0.5", values, beta=0.1, link="hinge", prompt_keys=own_prompts(values))


@pytest.mark.parametrize(("values", "margin", "gamma"), [
    ([1.0, 2.0], 0.0, "0.1"),
    ([1.0, -1.0], -1.0, "1.1"),
])  # fmt: skip
def test_a_hinge_that_is_content_with_every_pair_at_gamma_zero_is_refused_in_words(values, margin, gamma):
    """0.1·Δ0 − m is never below 0, so no pair pulls before γ·Δ0 is larger, and then right pairs alone do."""
    with pytest.raises(UsageError, match=f"at gamma {gamma} the share jumps from 0 to 1; ask for one"):
        calibrate_gamma("balance:0.5", np.array(values), beta=0.1, margin=margin, link="hinge", prompt_keys=["a", "b"])


def test_a_hinge_with_a_margin_comes_as_near_as_its_steps_allow(preference):
    found = calibrate_gamma("balance:0.8", preference, beta=0.1, margin=1.0, link="hinge", prompt_keys=own_prompts(preference))
    active = (0.1 - found.gamma) * preference - 1 < 0
    assert (active & (preference > 0)).sum() / active.sum() == pytest.approx(0.8, abs=LARGEST_MISS)


def test_shares_of_a_squared_link_are_refused():
    with pytest.raises(UsageError, match="the shares of link squared do not grow with gamma"):
        calibrate_gamma("balance:0.5", np.array([1.0, -1.0]), beta=0.1, link="squared", prompt_keys=["a", "b"])


def test_a_floor_counts_in_the_weights(preference):
    """z = βΔ0 − γ·max(Δ0, 0) on wrong pairs does not move with γ."""
    options = {"beta": 0.1, "reference_floor": 0.0, "prompt_keys": own_prompts(preference)}
    found = calibrate_gamma("balance:0.4", preference, **options)
    weights = 1 / (1 + np.exp(0.1 * preference - found.gamma * np.maximum(preference, 0)))
    assert weights[preference > 0].sum() / weights.sum() == pytest.approx(0.4, abs=1e-9)


# ---------------------------------------------------------------- scale


def test_scale_divides_by_the_median_deviation():
    """Median 2, deviations 3, 1, 0, 1, 98: their median is 1, so the spread is 1.4826 and γ = 2/1.4826."""
    values = np.array([-1.0, 1.0, 2.0, 3.0, 100.0])
    assert robust_spread(values) == pytest.approx(1.4826, rel=1e-12)
    assert robust_spread(values) == pytest.approx(median_abs_deviation(values, scale="normal"), rel=1e-4)
    assert calibrate_gamma("scale:2", values, beta=0.1, prompt_keys=own_prompts(values)).gamma == pytest.approx(
        2 / 1.4826, rel=1e-4
    )


def test_pairs_without_a_spread_are_refused():
    with pytest.raises(UsageError, match="scale:1: more than half of the pairs have one and the same Δ0"):
        calibrate_gamma("scale:1", np.array([2.0, 2.0, 2.0, 9.0]), beta=0.1, prompt_keys=["a", "b", "c", "d"])


# ---------------------------------------------------------------- π0 → π0^α


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.1, 0.5, 3.0, 200.0])
def test_sharpening_the_reference_divides_gamma_by_as_much(preference, alpha):
    keys = own_prompts(preference)
    for asked in ("auto", "scale:0.7"):
        before = calibrate_gamma(asked, preference, beta=0.1, prompt_keys=keys)
        after = calibrate_gamma(asked, alpha * preference, beta=0.1, prompt_keys=keys)
        assert after.gamma * alpha == pytest.approx(before.gamma, rel=1e-6)
    before, after = (LabelFit(factor * preference, prompt_keys=keys) for factor in (1.0, alpha))
    for name in ("likelihood_ratio", "p_value", "bits_per_pair", "accuracy", "accuracy_interval"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-6), name
    assert np.multiply(after.interval, alpha) == pytest.approx(before.interval, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_balance_follows_where_beta_does_and_else_keeps_its_distance_to_beta(preference, alpha):
    """Step 0 has π = π0 = π0^α on both sides: z = (β−γ)·α·Δ0 is the same at (β/α, γ/α), or at β with (γ−β)/α."""
    keys = own_prompts(preference)
    before = calibrate_gamma("balance:0.7", preference, beta=0.1, margin=0.5, prompt_keys=keys).gamma
    both = calibrate_gamma("balance:0.7", alpha * preference, beta=0.1 / alpha, margin=0.5, prompt_keys=keys).gamma
    assert both * alpha == pytest.approx(before, rel=1e-9)
    alone = calibrate_gamma("balance:0.7", alpha * preference, beta=0.1, margin=0.5, prompt_keys=keys).gamma
    assert (alone - 0.1) * alpha == pytest.approx(before - 0.1, rel=1e-6, abs=1e-9)


# ---------------------------------------------------------------- from a loss


def logprobs(generator, pairs=200):
    lengths = [torch.from_numpy(generator.integers(3, 40, pairs)) for _ in range(2)]
    values = [torch.from_numpy(-1.5 * length.numpy() + generator.normal(0, 4, pairs)) for length in lengths]
    return PairLogprobs(*values, *lengths)


@pytest.mark.parametrize("asked", ["auto", "balance:0.6", "scale:1"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_loss_is_calibrated_on_its_own_preferences_and_margins(asked, reduce):
    generator = np.random.default_rng(4)
    reference, column = logprobs(generator), torch.from_numpy(generator.normal(0, 1, 200))
    keys = own_prompts(column)
    loss = LossSection(gamma=asked, beta=0.4, margin=0.3, margin_scale=0.5, length_penalty=0.02, reduce=reduce)
    difference = (reference.chosen_lengths - reference.rejected_lengths).numpy()
    by_hand = reference.chosen - reference.rejected
    if reduce == "mean":
        by_hand = reference.chosen / reference.chosen_lengths - reference.rejected / reference.rejected_lengths
    assert np.array_equal(preferences(reference, reduce), by_hand.numpy())
    expected = calibrate_gamma(
        asked, by_hand, beta=0.4, margin=0.3 + 0.5 * column.numpy() - 0.02 * difference, prompt_keys=keys
    )
    assert calibrate_loss(loss, reference, PairTerms(column), keys).gamma == pytest.approx(expected.gamma, rel=1e-12)


def test_a_calibration_is_json():
    values = labelled(np.random.default_rng(1), 40)
    for asked in ("auto", "balance:0.5", "scale:1"):
        found = calibrate_gamma(asked, values, beta=0.1, prompt_keys=own_prompts(values)).to_dict()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["asked"] == asked


def test_a_way_that_is_none_is_refused():
    with pytest.raises(ValueError, match="asked is '1x': expected auto, balance:S or scale:G"):
        calibrate_gamma("1x", np.array([1.0, -1.0]), beta=0.1, prompt_keys=["a", "b"])

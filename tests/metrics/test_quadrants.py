"""Which pairs pull: the 2×2 table, and the closed forms of what such pulling leads to.

The closed forms come from the published test bed: the optimum of one pair under noisy labels, its gradient flow, the time until
a wrong pair flips, and the mean of the loss over mixout's masks.
"""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pe_dpo.metrics.estimates import correlation, length_slope, mcnemar, share_right
from pe_dpo.metrics.quadrants import QUADRANTS, effective_pairs, quadrants, saturation, transitions
from pe_dpo.objective import PreferenceLoss, preference_loss

PUBLISHED_QUADRANTS = {
    "policy_right_reference_right": "pi_right|ref_right",
    "policy_right_reference_wrong": "pi_right|ref_wrong",
    "policy_wrong_reference_right": "pi_wrong|ref_right",
    "policy_wrong_reference_wrong": "pi_wrong|ref_wrong",
}
LINKS = {
    "logistic": "logistic",
    "hinge": "hinge",
    "squared": "squared",
    "exponential": lambda z: torch.exp(-z),
}


def nats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of_preferences(policy: Tensor, reference: Tensor, **options: Any) -> PreferenceLoss:
    """The loss of pairs of which only Δπ and Δ0 are known."""
    zero = torch.zeros_like(policy)
    return preference_loss(policy, zero, reference, zero, **options)


# ---------------------------------------------------------------- the table, by hand


def five_pairs() -> dict[str, float]:
    """One kept pair, two lost, one gained, one that is not yet right; weights 1, 2, 3, 0 and 4 of 10 in all."""
    return quadrants(
        policy=nats(5, -1, -2, 3, -4),
        reference=nats(2, 1, 6, -1, -3),
        score=nats(1.5, -0.5, -2.5, 4.0, 0.25),
        weight=nats(1, 2, 3, 0, 4),
    )


def test_each_pair_is_counted_in_its_own_quadrant():
    assert [five_pairs()[f"{name}/pairs"] for name in QUADRANTS] == [1, 1, 2, 1]


def test_weight_shares_are_parts_of_the_summed_weight():
    """1/10, 0/10, (2 + 3)/10, 4/10."""
    assert [five_pairs()[f"{name}/weight_share"] for name in QUADRANTS] == pytest.approx([0.1, 0.0, 0.5, 0.4], rel=1e-12)


def test_active_pairs_have_a_score_below_zero():
    """Only the two lost pairs, −0.5 and −2.5, which are all of their quadrant."""
    assert [five_pairs()[f"{name}/active"] for name in QUADRANTS] == [0, 0, 1, 0]


def test_mean_score_is_over_the_pairs_of_the_quadrant():
    assert [five_pairs()[f"{name}/mean_score"] for name in QUADRANTS] == [1.5, 4.0, -1.5, 0.25]


def test_effective_pairs_count_how_evenly_the_weight_is_spread():
    """(1 + 2 + 3 + 0 + 4)² / (1 + 4 + 9 + 0 + 16) = 100/30."""
    assert effective_pairs(nats(1, 2, 3, 0, 4)) == pytest.approx(100 / 30, rel=1e-12)


def test_a_pair_is_satisfied_early_when_its_score_is_not_negative_but_its_order_is_wrong():
    """Only the last pair: z = 0.25 with Δπ = −4."""
    assert five_pairs()["satisfied_early"] == 1


def test_a_score_of_exactly_zero_is_satisfied_and_not_active():
    table = quadrants(nats(-1), nats(-1), score=nats(0), weight=nats(0.5))
    assert (table["satisfied_early"], table["policy_wrong_reference_wrong/active"]) == (1, 0)


def test_ties_are_counted_apart_and_in_no_quadrant():
    """A pair tied under π, one tied under π0, one under both, one under neither."""
    table = quadrants(nats(0, 2, 0, 1), nats(1, 0, 0, 1), score=nats(1, 1, 1, 1), weight=nats(1, 1, 1, 1))
    assert table["ties"] == 3
    assert sum(table[f"{name}/pairs"] for name in QUADRANTS) == 1


def test_the_weight_of_ties_stays_in_the_total():
    """One of four equal weights is outside the ties, so the shares add up to a quarter."""
    table = quadrants(nats(0, 2, 0, 1), nats(1, 0, 0, 1), score=nats(1, 1, 1, 1), weight=nats(1, 1, 1, 1))
    assert sum(table[f"{name}/weight_share"] for name in QUADRANTS) == 0.25


def test_an_empty_quadrant_has_no_pairs_no_share_and_no_mean():
    table = quadrants(nats(1, 2), nats(1, 1), score=nats(1, 2), weight=nats(1, 1))
    empty = {key: value for key, value in table.items() if key.startswith("policy_wrong_reference_wrong")}
    assert empty == {"policy_wrong_reference_wrong/pairs": 0, "policy_wrong_reference_wrong/weight_share": 0.0}


def test_a_table_without_any_weight_has_shares_and_effective_pairs_of_zero():
    table = quadrants(nats(1, -1), nats(1, -1), score=nats(1, 2), weight=nats(0, 0))
    assert [table[f"{name}/weight_share"] for name in QUADRANTS] == [0.0] * 4
    assert effective_pairs(nats(0, 0)) == 0.0


def test_equal_weights_are_as_many_effective_pairs_as_there_are_pairs():
    """(4·0.3)² / (4·0.09) = 4."""
    assert effective_pairs(nats(0.3, 0.3, 0.3, 0.3)) == pytest.approx(4, rel=1e-12)


def test_pairs_that_pull_back_count_by_the_size_of_their_pull():
    """A squared link pulls one pair up and another down by the same amount: the sum is 0, the gradient is not."""
    assert effective_pairs(nats(1, -1)) == 2.0
    table = quadrants(nats(1, -1), nats(1, -1), score=nats(1, -1), weight=nats(3, -1))
    assert table["policy_right_reference_right/weight_share"] == 0.75


def test_a_table_of_no_pairs_is_empty():
    table = quadrants(nats(), nats(), nats(), nats())
    assert (table["ties"], effective_pairs(nats()), table["satisfied_early"]) == (0, 0.0, 0)
    assert [(table[f"{name}/pairs"], table[f"{name}/weight_share"]) for name in QUADRANTS] == [(0, 0.0)] * 4


def test_at_the_reference_both_off_diagonal_quadrants_are_empty():
    """π = π0 gives Δπ = Δ0: nothing is gained or lost at step 0."""
    preference = nats(3, -2, 0.5, -7)
    out = loss_of_preferences(preference, preference, beta=0.1)
    counts = [quadrants(preference, preference, out.score, out.weight)[f"{name}/pairs"] for name in QUADRANTS]
    assert counts == [2, 0, 0, 2]


@pytest.mark.parametrize(("gamma", "share"), [(0.3, 1 / (1 + math.exp(-0.8))), (0.1, 0.5), (0.0, 1 / (1 + math.exp(0.4)))])
def test_gamma_above_beta_moves_the_pull_to_pairs_that_the_reference_ranks_right(gamma, share):
    """Δ = ±4 at the reference, β = 0.1: weights σ((γ−β)·(±4)), which add up to 1, so the right pair's share is σ(4(γ−β))."""
    preference = nats(4, -4)
    out = loss_of_preferences(preference, preference, beta=0.1, gamma=gamma)
    table = quadrants(preference, preference, out.score, out.weight)
    assert table["policy_right_reference_right/weight_share"] == pytest.approx(share, rel=1e-12)


def test_the_mean_change_is_over_the_pairs_of_the_quadrant():
    """Kept: 0.5. Gained: 4. Lost: (−3 − 8)/2. Not yet: −1."""
    table = quadrants(
        nats(5, -1, -2, 3, -4), nats(2, 1, 6, -1, -3), nats(0, 0, 0, 0, 0), nats(1, 1, 1, 1, 1), nats(0.5, -3, -8, 4, -1)
    )
    assert [table[f"{name}/mean_change"] for name in QUADRANTS] == [0.5, 4.0, -5.5, -1.0]


def test_there_is_no_mean_change_where_step_0_is_not_known():
    assert not [key for key in five_pairs() if "mean_change" in key]


def test_a_pair_without_a_number_is_in_no_quadrant_and_spoils_none():
    table = quadrants(nats(1, math.nan), nats(2, 1), score=nats(3, math.nan), weight=nats(1, 1))
    assert sum(table[f"{name}/pairs"] for name in QUADRANTS) == 1
    assert table["policy_right_reference_right/mean_score"] == 3.0


# ---------------------------------------------------------------- transitions since step 0


def test_transitions_count_who_changed_sides_and_leave_ties_out():
    """Kept, gained, lost twice, not yet; one tied before and one tied now."""
    found = transitions(before=nats(1, -1, 2, 3, -4, 0, 5), now=nats(2, 1, -2, -1, -1, 3, 0))
    assert [found[name] for name in ("kept", "gained", "lost", "not_yet")] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (10, 2, 2 * (1 + 12 + 66) / 2**12),  # 79 of 4096, twice
        (0, 5, 2 / 2**5),
        (3, 3, 1.0),
        (0, 0, 1.0),
        (1, 0, 1.0),
    ],
)
def test_mcnemar_is_the_binomial_tail_on_both_sides(gained, lost, p_value):
    assert mcnemar(gained, lost) == pytest.approx(p_value, rel=1e-12)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


@pytest.mark.parametrize(("gained", "lost"), [(17, 31), (400, 330), (2600, 2401)])
def test_mcnemar_is_scipys_binomial_test(gained, lost):
    assert mcnemar(gained, lost) == pytest.approx(scipy.stats.binomtest(gained, gained + lost).pvalue, rel=1e-9)


# ---------------------------------------------------------------- saturation


def test_the_logistic_link_saturates_at_scores_of_log_19():
    """σ(−z) = 1/20 at z = log 19 = 2.944, and 19/20 at −log 19."""
    edge = math.log(19)
    found = saturation(nats(edge + 1e-9, edge - 1e-9, 10, 0, 1 - edge, -edge + 1e-9, -edge - 1e-9, -50), "logistic")
    assert found == (2 / 8, 2 / 8)


@pytest.mark.parametrize("link", ["hinge", "squared"])
def test_links_without_a_slope_to_approach_do_not_saturate(link):
    assert saturation(nats(5, -5), link) is None


# ---------------------------------------------------------------- length


def test_the_length_slope_is_that_of_a_line_with_an_intercept():
    """Δ = 7 − 2·(|chosen| − |rejected|), to the bit."""
    difference = nats(-3, 0, 4, 11)
    assert length_slope(7 - 2 * difference.numpy(), difference.numpy()) == pytest.approx(-2, rel=1e-12)


def test_the_length_slope_is_numpys_least_squares_line():
    random = np.random.default_rng(0)
    difference, noise = random.integers(-40, 60, 50).astype(float), random.normal(0, 30, 50)
    expected = np.polyfit(difference, 0.8 * difference + noise, 1)[0]
    found = length_slope(0.8 * difference + noise, difference)
    assert found == pytest.approx(expected, rel=1e-10)


def test_without_a_spread_of_lengths_there_is_no_slope():
    assert length_slope(np.array([1.0, 2.0, 3.0]), np.full(3, 4.0)) == 0.0


def test_correlation_is_numpys_and_undefined_for_a_constant():
    one, other = nats(1, 2, 4, -3), nats(0, 5, 1, -2)
    assert correlation(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1], rel=1e-12)
    assert math.isnan(correlation(one, nats(2, 2, 2, 2)))


# ---------------------------------------------------------------- shares of right pairs


def test_share_right_counts_a_tie_as_one_half():
    """(1 + 1 + ½ + 0) / 4."""
    assert share_right(nats(3, 0.1, 0, -2)) == 0.625


def test_share_right_is_one_half_when_everything_is_tied():
    """Step 0 of DPO: every implicit reward gap is 0; ties counted as wrong would show 0."""
    assert share_right(torch.zeros(7)) == 0.5


def test_share_right_of_no_pairs_is_not_a_number():
    assert math.isnan(share_right(nats()))


# ---------------------------------------------------------------- the published diagnostics


@pytest.mark.real
@pytest.mark.parametrize("row", range(8))
def test_the_published_diagnostics_are_reproduced(testbed, row):
    diagnostics = testbed["diagnostics"]
    policy, reference, expected = nats(*diagnostics["D_pi"]), nats(*diagnostics["D_0"]), diagnostics["rows"][row]
    options = {name: expected[name] for name in ("beta", "gamma", "margin", "link")}
    out = loss_of_preferences(policy, reference, **options)
    table = quadrants(policy, reference, out.score, out.weight)
    for name, published in PUBLISHED_QUADRANTS.items():
        target = expected["quadrants"][published]
        pairs = table[f"{name}/pairs"]
        assert (pairs, pairs * table.get(f"{name}/active", 0)) == pytest.approx((target["count"], target["active"])), name
        assert table[f"{name}/weight_share"] == pytest.approx(target["weight_share"], rel=1e-11, abs=1e-14), name
    assert effective_pairs(out.weight) == pytest.approx(expected["ess"], rel=1e-11)
    assert table["satisfied_early"] == expected["prematurely_satisfied"]
    assert len(diagnostics["rows"]) == 8


# ---------------------------------------------------------------- the optimum of one pair under noisy labels


@pytest.mark.parametrize(
    ("label_share", "margin", "optimum"),
    [
        (0.7, 0.0, math.log(7 / 3)),  # the Bradley–Terry log-odds
        (0.7, 2.0, 2.3108980913144106),  # e^d = [0.4·e² + √(0.16·e⁴ + 0.84)] / 0.6
    ],
)
def test_a_pair_seen_with_both_labels_rests_where_the_closed_form_says(label_share, margin, optimum):
    """A share p of labels says a > b. The pull at Δ = d*: p·w(d*) − (1−p)·w(−d*) = 0."""
    assert _pull(optimum, label_share, margin=margin) == pytest.approx(0, abs=1e-12)
    assert _pull(optimum - 0.01, label_share, margin=margin) > 1e-4
    assert _pull(optimum + 0.01, label_share, margin=margin) < -1e-4


@pytest.mark.real
@pytest.mark.parametrize("link", ["logistic", "squared", "exponential"])
def test_the_mean_gradient_over_labels_vanishes_at_every_published_optimum(testbed, link):
    """With margins and both smoothings; it changes sign there, from pulling up to pulling down."""
    rows = [row for row in testbed["two_arm_optimum"] if row["link"] == link]
    assert len(rows) == {"logistic": 30, "squared": 12, "exponential": 12}[link]
    for row in rows:
        options = {
            "margin": row["margin"],
            "link": LINKS[link],
            "label_smoothing": row.get("flip", 0.0),
            "label_smoothing_mode": row.get("flip_mode", "conservative"),
        }
        assert _pull(row["d_star"], row["p"], **options) == pytest.approx(0, abs=1e-9), row
        assert _pull(row["d_star"] - 0.01, row["p"], **options) > 1e-5, row
        assert _pull(row["d_star"] + 0.01, row["p"], **options) < -1e-5, row


def _pull(preference: float, label_share: float, **options: Any) -> float:
    """Minus the gradient of the mean loss over labels, with respect to Δ = log π(a) − log π(b), at β = 1 and γ = 0."""
    policy = nats(preference).requires_grad_()
    zero = torch.zeros_like(policy)
    for_a = preference_loss(policy, zero, beta=1.0, gamma=0.0, **options).loss
    for_b = preference_loss(zero, policy, beta=1.0, gamma=0.0, **options).loss
    (gradient,) = torch.autograd.grad((label_share * for_a + (1 - label_share) * for_b).sum(), policy)
    return -gradient.item()


# ---------------------------------------------------------------- the gradient flow of one pair


@pytest.mark.real
@pytest.mark.parametrize("link", ["logistic", "squared", "exponential"])
def test_the_flow_of_a_smooth_link_follows_its_closed_form(testbed, link):
    """d(Δπ)/dt = 2β·w from Δπ = Δ0, in steps of Runge–Kutta.

    50 steps for each of the spans [0, 1], [1, 10], [10, 100], so h ≤ 0.18 up to t = 10. The fastest rate is 1 per unit of
    time (squared, 4β² at β = ½): the error of the method is t·e^−t·h⁴/120 < 4e-6 there, and less for slower flows; hence 1e-5.
    """
    for row, start, score in _flows(testbed, link):
        assert score == pytest.approx(row["z"], abs=1e-5), (row, start)


@pytest.mark.real
def test_the_flow_of_a_hinge_rises_at_a_constant_rate_and_rests_at_its_kink(testbed):
    """dz/dt = 2β² until z = 0: a straight line up to rounding, and from 0 or above no movement at all.

    The step that reaches the kink misses it by less than itself: 2β²·h = 0.09 (β = ½ in steps of 0.18), 0.036 (β = 0.1, 1.8).
    """
    for row, start, score in _flows(testbed, "hinge"):
        arrives = start < 0 and row["z"] == 0
        assert score == pytest.approx(row["z"], abs=0.09 if arrives else 1e-12), (row, start)


def _flows(testbed: dict[str, Any], link: str) -> list[tuple[dict[str, Any], float, float]]:
    """Return each published point of a link with its score at t = 0 and the one that we arrive at."""
    rows = [row for row in testbed["pair_flow"] if row["link"] == link]
    assert len(rows) == 18
    pairs = list(dict.fromkeys((row["beta"], row["gamma"], row["margin"], row["D0"]) for row in rows))
    scores = _flow(link, *(torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)))
    found = []
    for row in rows:
        pair = pairs.index((row["beta"], row["gamma"], row["margin"], row["D0"]))
        found.append((row, float(scores[0.0][pair]), float(scores[row["t"]][pair])))
    return found


def _flow(link: str, beta: Tensor, gamma: Tensor, margin: Tensor, reference: Tensor, steps: int = 50) -> dict[float, Tensor]:
    """Return the scores at t = 0, 1, 10 and 100 of pairs that start at the reference, each with its coefficients."""

    def out(preference: Tensor) -> PreferenceLoss:
        return loss_of_preferences(preference, reference, beta=beta, gamma=gamma, pair_margin=margin, link=LINKS[link])

    def velocity(preference: Tensor) -> Tensor:
        return 2 * beta * out(preference).weight

    preference = reference
    scores = {0.0: out(preference).score}
    for start, stop in ((0.0, 1.0), (1.0, 10.0), (10.0, 100.0)):
        h = (stop - start) / steps
        for _ in range(steps):
            k1 = velocity(preference)
            k2 = velocity(preference + h / 2 * k1)
            k3 = velocity(preference + h / 2 * k2)
            k4 = velocity(preference + h * k3)
            preference = preference + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        scores[stop] = out(preference).score
    return scores


# ---------------------------------------------------------------- the time until a wrong pair flips


@pytest.mark.parametrize(
    ("gamma", "units"),
    [
        (0.0, 1 + 0 - math.exp(-5) + 5),  # 5.99
        (0.1, math.exp(5) + 5 - 1 - 0),  # 152
        (0.2, math.exp(10) + 10 - math.exp(5) - 5),  # 21,883
    ],
)
def test_the_time_to_flip_a_wrong_pair_is_exponential_in_gamma(gamma, units):
    """A pair wrong by c = 50 nats, β = 0.1: e^{γc} + γc − e^{(γ−β)c} − (γ−β)c in units of 1/(2β²)."""
    assert _time_to_flip(0.1, gamma, -50.0) * 2 * 0.1**2 == pytest.approx(units, rel=1e-9)


@pytest.mark.real
def test_the_published_flip_times_are_the_integral_of_one_over_the_weight(testbed):
    """Up to 1e22 units of time, where no stepping would arrive."""
    assert len(testbed["flip_time"]) == 40
    for row in testbed["flip_time"]:
        found = _time_to_flip(row["beta"], row["kappa"] * row["beta"], row["D0"])
        assert found == pytest.approx(row["t_flip"], rel=1e-9), row


@pytest.mark.real
def test_the_published_loss_at_the_flip_is_the_loss_of_a_tie(testbed):
    """At Δπ = 0 the score is −γΔ0."""
    for row in testbed["flip_time"]:
        out = loss_of_preferences(nats(0.0), nats(row["D0"]), beta=row["beta"], gamma=row["kappa"] * row["beta"])
        assert out.loss.item() == pytest.approx(row["loss_at_flip"], rel=1e-11, abs=0), row


def _time_to_flip(beta: float, gamma: float, reference: float) -> float:
    """Return ∫ d(Δπ) / (2β·w(Δπ)) from Δπ = Δ0 < 0 to 0, by Gauss–Legendre with 64 nodes."""
    nodes, parts = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(64))
    preference = reference / 2 * (1 - nodes)
    weight = loss_of_preferences(preference, torch.full_like(preference, reference), beta=beta, gamma=gamma).weight
    return float((parts * -reference / 2 / (2 * beta * weight)).sum())


# ---------------------------------------------------------------- the mean over mixout's masks


@pytest.mark.real
def test_loss_and_gradient_are_the_published_means_over_mixout_masks(testbed):
    """Two logits moved by u and −u from the reference; mixout keeps each move with chance 1−p and divides it by 1−p.

    Δπ = Δ0 + u·(M1 + M2)/(1−p), the four masks summed with their chances; the gradient is d/du at u = 1.
    """
    assert len(testbed["mixout_two_logits"]) == 9
    for row in testbed["mixout_two_logits"]:
        at_init, _ = _mean_over_masks(row, move=0.0)
        loss, gradient = _mean_over_masks(row, move=1.0)
        assert at_init == pytest.approx(row["loss_at_init"], rel=1e-12), row
        assert loss == pytest.approx(row["loss_at_1"], rel=1e-12), row
        assert gradient == pytest.approx(row["grad_at_1"], rel=1e-12), row


def _mean_over_masks(row: dict[str, float], move: float) -> tuple[float, float]:
    """Return the mean loss over the four masks and its derivative with respect to the move."""
    p = row["mixout"]
    masks = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    chance = torch.where(masks == 1, 1 - p, p).prod(dim=1)
    moved = nats(move).requires_grad_()
    preference = row["D0"] + moved * masks.sum(dim=1) / (1 - p)
    reference = torch.full_like(chance, row["D0"])
    mean = (chance * loss_of_preferences(preference, reference, beta=row["beta"], gamma=row["gamma"]).loss).sum()
    (gradient,) = torch.autograd.grad(mean, moved)
    return mean.item(), gradient.item()

"""The claims of the seed post, C1 to C13, each as arithmetic; `docs/claims.md` says what each one means and how far it holds.

Δπ and Δ0 are log π(chosen) − log π(rejected) under policy and reference, κ = γ/β, z = β·Δπ − γ·Δ0 − m.
"""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from pe_dpo.metrics.quadrants import QUADRANTS, quadrants
from pe_dpo.objective import PreferenceLoss, preference_loss

LENGTHS = torch.tensor([2, 5]), torch.tensor([4, 3])


def nats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(policy: Tensor, reference: Tensor, **options) -> PreferenceLoss:
    """The loss of pairs of which only Δπ and Δ0 are known."""
    zero = torch.zeros_like(policy)
    return preference_loss(policy, zero, reference, zero, **options)


def at_the_reference(reference: Tensor, **options) -> PreferenceLoss:
    return pairs(reference, reference, **options)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


GRID = [float(step) / 4 for step in range(-24, 25)]
"""Quarters between −6 and 6: sums and products with powers of two are exact."""


# ---------------------------------------------------------------- C1, C2: the loss


@pytest.mark.parametrize(("gamma", "score"), [(0.5, 0.5 * 3 - 0.5 * -2), (0.125, 0.5 * 3 - 0.125 * -2), (0.0, 0.5 * 3)])
def test_c1_the_loss_weighs_policy_and_reference_apart(gamma, score):
    """Δπ = 3, Δ0 = −2, β = ½; γ = ½ is DPO, γ = 0 forgets the reference."""
    assert pairs(nats(3), nats(-2), beta=0.5, gamma=gamma).loss.item() == pytest.approx(softplus(-score), rel=1e-14)


def test_c1_dpo_is_the_default_and_gamma_zero_needs_no_reference():
    policy, reference = nats(3, -1), nats(-2, 4)
    assert torch.equal(pairs(policy, reference, beta=0.5).loss, pairs(policy, reference, beta=0.5, gamma=0.5).loss)
    alone = preference_loss(policy, torch.zeros(2), beta=0.5, gamma=0.0).loss
    assert torch.equal(alone, pairs(policy, reference, beta=0.5, gamma=0.0).loss)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 2.0, 10.0])
def test_c2_a_tempered_reference_is_the_same_as_another_gamma(alpha):
    """π0' ∝ π0^α over six answers: the normaliser cancels in Δ0' = αΔ0, so (β, γ/α, π0') is (β, γ, π0) for every link."""
    reference = torch.log_softmax(torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0)
    policy = torch.log_softmax(torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0)
    tempered = torch.log_softmax(alpha * reference, 0)
    chosen, rejected = torch.tensor(list(itertools.permutations(range(6), 2))).T
    for link in ("logistic", "hinge", "squared"):
        one, other = (
            preference_loss(
                policy[chosen], policy[rejected], of[chosen], of[rejected], beta=0.5, gamma=gamma, link=link, margin=0.3
            ).loss
            for of, gamma in ((reference, 0.8), (tempered, 0.8 / alpha))
        )
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def test_c2b_with_gamma_tied_to_beta_the_optimum_follows_the_temperature():
    """π* ∝ π0^α·e^{r/β} moves with α; with γ = β/α it does not."""
    logits, reward = nats(0.5, -1.0, 0.0, 1.5), nats(-0.5, 1.0, 0.25, -1.0)
    tied = [minimizer(torch.log_softmax(alpha * logits, 0), reward, beta=0.5, gamma=0.5) for alpha in (0.5, 1.0, 2.0)]
    rescaled = [
        minimizer(torch.log_softmax(alpha * logits, 0), reward, beta=0.5, gamma=0.5 / alpha) for alpha in (0.5, 1.0, 2.0)
    ]
    assert min(kl(one, other) for one, other in itertools.permutations(tied, 2)) > 0.03
    assert max(kl(one, other) for one, other in itertools.permutations(rescaled, 2)) < 1e-9


def test_c2b_a_temperature_on_tokens_is_not_a_temperature_on_answers():
    """Two tokens: the first is even, the second is sharp after the one and flat after the other.

    At τ = ½ every token is squared and normalised by its own prefix: log π0'(ab) = 2·log π0(ab) − log Σ_b' π0(b'|a)², which
    differs between the prefixes, so Δ0' ≠ 2Δ0.
    """
    second = torch.log(torch.tensor([[0.98, 0.02], [0.5, 0.5]], dtype=torch.float64))
    answers = (math.log(0.5) + second).flatten()
    hot = math.log(0.5) + torch.log_softmax(2 * second, 1)
    sequence = torch.log_softmax(2 * answers, 0)
    assert sequence[0] - sequence[2] == pytest.approx(2 * (answers[0] - answers[2]).item(), rel=1e-12)
    missing = math.log((0.98**2 + 0.02**2) / 0.5)
    assert (hot[0, 0] - hot[1, 0]).item() == pytest.approx(2 * (answers[0] - answers[2]).item() - missing, rel=1e-12)
    assert missing > 0.6


# ---------------------------------------------------------------- C3, C4, C6: the hinge and its margin


@pytest.mark.parametrize(("policy", "reference"), [(3, -2), (-3, 2), (1, 2), (-1, -8)])
def test_c3_the_hinge_is_what_is_missing_to_gamma_times_the_references_preference(policy, reference):
    """max(0, γΔ0 − βΔπ) without a margin; the hinge of other tools, max(0, 1 − z), has one of 1."""
    score = 0.5 * policy - 0.25 * reference
    found = pairs(nats(policy), nats(reference), beta=0.5, gamma=0.25, link="hinge").loss.item()
    assert found == max(0.0, -score)
    margin = pairs(nats(policy), nats(reference), beta=0.5, gamma=0.25, link="hinge", margin=1.0).loss.item()
    assert margin == max(0.0, 1 - score)


@pytest.mark.parametrize(("beta", "gamma", "margin"), [(0.5, 0.5, 0.0), (0.5, 2.0, 0.0), (2.0, 0.5, 1.0), (0.25, 0.0, -0.5)])
def test_c4_the_hinge_is_zero_where_the_policy_reaches_the_effective_margin(beta, gamma, margin):
    """Zero ⇔ Δπ ≥ κΔ0 + m/β =: M, on a grid of powers of two where equality is exact."""
    policy, reference = (side.flatten() for side in torch.meshgrid(nats(*GRID), nats(*GRID), indexing="ij"))
    out = pairs(policy, reference, beta=beta, gamma=gamma, margin=margin, link="hinge")
    reached = policy >= gamma / beta * reference + margin / beta
    assert torch.equal(out.loss == 0, reached)
    assert torch.equal(out.score >= 0, reached)
    assert 0 < reached.sum() < len(policy)


def test_c6_a_pair_that_the_reference_gets_wrong_satisfies_the_loss_while_still_wrong():
    """κ = 1, Δ0 = −10: at Δπ = −9 the hinge is zero, and the logistic weight is below a half, although the order is wrong."""
    hinge = pairs(nats(-9), nats(-10), beta=0.1, link="hinge")
    assert (hinge.loss.item(), hinge.weight.item()) == (0.0, 0.0)
    logistic = pairs(nats(-9), nats(-10), beta=0.1)
    assert logistic.weight.item() == pytest.approx(1 / (1 + math.exp(0.1)))
    assert quadrants(nats(-9), nats(-10), hinge.score, hinge.weight)["satisfied_early"] == 1


# ---------------------------------------------------------------- C5, C9: the start


def test_c5_at_the_reference_with_gamma_equal_to_beta_the_hinge_is_zero_and_dead():
    out = at_the_reference(nats(*GRID), beta=0.5, link="hinge")
    assert not out.loss.any() and not out.weight.any()


def test_c5_the_logistic_loss_starts_at_log_two_and_pulls_every_pair_with_one_half():
    """So "almost no learning" is true of the hinge and false of DPO."""
    out = at_the_reference(nats(*GRID), beta=0.5)
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, math.log(2)), rtol=1e-15, atol=0)
    assert set(out.weight.tolist()) == {0.5}


def test_c9_training_starts_on_the_diagonal():
    reference = nats(*GRID)
    out = at_the_reference(reference, beta=0.5, gamma=1.5)
    counts = [quadrants(reference, reference, out.score, out.weight)[f"{name}/pairs"] for name in QUADRANTS]
    assert counts == [24, 0, 0, 24]


# ---------------------------------------------------------------- C7, C8: the two tables


def quadrant_activity(gamma: float, scale: float = 1.0) -> dict[str, set[bool]]:
    """Whether the hinge without a margin pulls, for all pairs of the grid by quadrant; Δπ is `scale` times the grid. β = ½."""
    policy, reference = (side.flatten() for side in torch.meshgrid(scale * nats(*GRID), nats(*GRID), indexing="ij"))
    active = pairs(policy, reference, beta=0.5, gamma=gamma, link="hinge").weight > 0
    found: dict[str, set[bool]] = {}
    for name, (policy_sign, reference_sign) in zip(QUADRANTS, itertools.product((1, -1), (1, -1)), strict=True):
        member = (policy.sign() == policy_sign) & (reference.sign() == reference_sign)
        found[name] = set(active[member].tolist())
    return found


@pytest.mark.parametrize("gamma", [0.125, 0.5, 4.0])
def test_c7_off_the_diagonal_the_table_holds_for_every_gamma_above_zero(gamma):
    found = quadrant_activity(gamma)
    assert found["policy_wrong_reference_right"] == {True}
    assert found["policy_right_reference_wrong"] == {False}


def test_c7_on_the_diagonal_it_holds_only_for_kappa_above_every_ratio():
    """|Δπ/Δ0| goes up to 6/¼ = 24 on the grid: κ = 25 has the post's table, κ = 8 has pairs of both kinds."""
    post = {"policy_right_reference_right": {True}, "policy_wrong_reference_wrong": {False}}
    assert {name: quadrant_activity(0.5 * 25)[name] for name in post} == post
    assert {name: quadrant_activity(0.5 * 8)[name] for name in post} == {name: {True, False} for name in post}


@pytest.mark.parametrize(("kappa", "right_pulls", "wrong_pulls"), [(2.0, True, False), (0.5, False, True), (1.0, False, False)])
def test_c7_at_the_reference_it_holds_for_kappa_above_one(kappa, right_pulls, wrong_pulls):
    reference = nats(*(value for value in GRID if value))
    active = at_the_reference(reference, beta=0.5, gamma=0.5 * kappa, link="hinge").weight > 0
    assert set(active[reference > 0].tolist()) == {right_pulls}
    assert set(active[reference < 0].tolist()) == {wrong_pulls}


def test_c8_without_the_reference_the_hinge_pulls_where_the_policy_is_wrong():
    found = quadrant_activity(0.0)
    assert [found[name] for name in QUADRANTS] == [{False}, {False}, {True}, {True}]


# ---------------------------------------------------------------- C10: how many pairs pull


SPREAD, BETA = 20.0, 0.1


def expected_weight(kappa: float, low: float) -> float:
    """E[σ((κ−1)·β·Δ0); Δ0 > low] for Δ0 ~ N(0, 20²), by quadrature."""
    weight = lambda x: norm.pdf(x) / (1 + math.exp(-(kappa - 1) * BETA * SPREAD * x))  # noqa: E731
    return quad(weight, low, 12)[0]


@pytest.mark.parametrize(("kappa", "published"), [(0.0, 0.219), (1.0, 0.5), (5.0, 0.932)])
def test_c10_gamma_does_not_take_weight_away_it_moves_it(kappa, published):
    """Logistic, at the reference: the mean weight is ½ whatever κ; the share of pairs that π0 ranks right goes from 22 to 93 %.

    100,000 draws; the standard error of a mean weight is 0.0015, of the share below 0.003.
    """
    reference = SPREAD * torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = at_the_reference(reference, beta=BETA, gamma=kappa * BETA)
    share = (out.weight[reference > 0].sum() / out.weight.sum()).item()
    assert out.weight.mean().item() == pytest.approx(0.5, abs=0.006)
    assert share == pytest.approx(expected_weight(kappa, 0) / expected_weight(kappa, -12), abs=0.009)
    assert share == pytest.approx(published, abs=0.012)  # as published, from one sample of its own


@pytest.mark.parametrize(("kappa", "right"), [(5.0, True), (0.0, False)])
def test_c10_a_hinge_leaves_exactly_one_half_of_the_pairs_out(kappa, right):
    reference = SPREAD * torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    active = at_the_reference(reference, beta=BETA, gamma=kappa * BETA, link="hinge").weight > 0
    assert torch.equal(active, (reference > 0) == right)


def test_c10_a_large_gamma_all_but_silences_a_third_of_the_pairs_under_the_logistic_loss():
    """κ = 5: σ(8Z) < 0.05 ⇔ Z < −log(19)/8, so Φ(−0.368) = 35.6 % of the pairs; as many pull with more than 0.95."""
    reference = SPREAD * torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = at_the_reference(reference, beta=BETA, gamma=5 * BETA).weight
    assert (weight < 0.05).double().mean().item() == pytest.approx(0.356, abs=0.006)
    assert (weight > 0.95).double().mean().item() == pytest.approx(0.356, abs=0.006)


# ---------------------------------------------------------------- C11: where it ends


def minimizer(reference: Tensor, reward: Tensor, *, beta: float, gamma: float) -> Tensor:
    """log π at the minimum of the population loss over all ordered pairs of answers, labels by Bradley–Terry; by LBFGS."""
    chosen, rejected = torch.tensor(list(itertools.permutations(range(len(reward)), 2))).T
    label = torch.sigmoid(reward[chosen] - reward[rejected])
    logits = torch.zeros_like(reward).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def population_loss() -> Tensor:
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 0)
        sides = policy[chosen], policy[rejected], reference[chosen], reference[rejected]
        loss = (label * preference_loss(*sides, beta=beta, gamma=gamma).loss).sum()
        loss.backward()
        return loss

    optimizer.step(population_loss)
    return torch.log_softmax(logits.detach(), 0)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


BANDIT = torch.log_softmax(nats(0.9, -0.3, 0.4, -1.2, 0.1, 0.0), 0), nats(0.2, 0.7, -0.5, 0.1, -0.8, 0.4)
"""Six answers: log π0 and rewards."""


def optimum(kappa: float, beta: float) -> Tensor:
    """log π* ∝ κ·log π0 + r/β."""
    return torch.log_softmax(kappa * BANDIT[0] + BANDIT[1] / beta, 0)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_c11_the_minimum_is_the_tempered_reference_not_the_reference(kappa):
    found = minimizer(*BANDIT, beta=0.5, gamma=0.5 * kappa)
    assert kl(optimum(kappa, 0.5), found) < 1e-9


def test_c11_the_distance_from_the_reference_is_least_at_one_kappa_and_grows_from_there():
    """κ* = 1 − Cov_{π*}(log π0, r)/(β·Var_{π*}(log π0)), a fixed point; found by iteration, checked on both sides."""
    log_ref, reward = BANDIT
    beta, best = 0.5, 1.0
    for _ in range(500):
        p = optimum(best, beta).exp()
        centred = log_ref - p @ log_ref
        best += 0.2 * (1 - float(p @ (centred * (reward - p @ reward)) / (beta * p @ centred.square())) - best)
    distance = {kappa: kl(optimum(kappa, beta), log_ref) for kappa in (0.0, best - 0.05, best, best + 0.05, 2.0, 4.0)}
    assert min(distance, key=distance.__getitem__) == best
    assert 0 < best < 2
    assert distance[best] < distance[2.0] < distance[4.0]


def test_c11_where_the_reward_goes_with_the_reference_the_distance_only_rises():
    """π0 = (.7, .2, .1) and r = 2·log π0 at β = ½: π* ∝ π0^(κ + 4), so κ* = −3, and from κ = 0 on KL only grows."""
    log_ref = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    distance = [kl(torch.log_softmax((kappa + 4) * log_ref, 0), log_ref) for kappa in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)]
    assert distance == sorted(distance)
    assert distance[0] > 0.1
    assert kl(torch.log_softmax((-3 + 4) * log_ref, 0), log_ref) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("answers", "share"), [(3, 0.26), (10, 0.125)])
def test_c11_in_some_random_worlds_the_distance_begins_by_rising(answers, share):
    """log π0 and r standard normal, β = ½: the slope of KL(π*‖π0) at κ = 0 is Cov(log π0, log π* − log π0) under π*."""
    draws = torch.Generator().manual_seed(0)
    log_ref, reward = (torch.randn(10_000, answers, dtype=torch.float64, generator=draws) for _ in range(2))
    log_ref, best = log_ref.log_softmax(1), (reward / 0.5).log_softmax(1)
    p = best.exp()
    centred = log_ref - (p * log_ref).sum(1, keepdim=True)
    slope = (p * centred * (best - log_ref)).sum(1)
    assert (slope >= 0).double().mean().item() == pytest.approx(share, abs=0.015)


def test_c11_a_large_gamma_sharpens_the_reference():
    """No reward at all: π* ∝ π0^κ is not π0 but a sharper one, and its entropy falls."""
    entropies = []
    for kappa in (1.0, 2.0, 4.0):
        log_p = torch.log_softmax(kappa * BANDIT[0], 0)
        entropies.append(-kl(log_p, torch.zeros_like(log_p)))
    assert entropies[0] > entropies[1] > entropies[2]


@pytest.mark.slow
def test_c11_a_hinge_ends_at_kappa_times_the_references_preference():
    """One pair, Δ0 = 4, κ = 2, small steps of gradient descent: Δπ rises to 8 and stays, twice what the reference says."""
    policy = nats(4.0)
    for _ in range(4000):
        policy = policy + 0.01 * 0.5 * pairs(policy, nats(4.0), beta=0.5, gamma=1.0, link="hinge").weight
    assert policy.item() == pytest.approx(8.0, abs=0.006)


# ---------------------------------------------------------------- C12: SimPO


def test_c12_simpo_is_gamma_zero_with_a_margin_and_log_probs_per_token():
    """β = 2, m = ½: log-probs −4 over 2 and −15 over 5 tokens against −6 over 4 and −3 over 3: Δ̄π = −2 + 1.5 and −3 + 1."""
    found = preference_loss(
        nats(-4, -15), nats(-6, -3), beta=2.0, gamma=0.0, margin=0.5, reduce="mean",
        chosen_lengths=LENGTHS[0], rejected_lengths=LENGTHS[1],
    )  # fmt: skip
    assert found.score.tolist() == pytest.approx([2 * -0.5 - 0.5, 2 * -2.0 - 0.5])
    assert found.loss.tolist() == pytest.approx([softplus(1.5), softplus(4.5)])


def test_c12_the_preset_says_the_same():
    from pe_dpo.recipe import PRESETS

    values = PRESETS["simpo"].values
    assert (values["gamma"], values["reduce"], values["margin"] > 0) == (0.0, "mean", True)
    assert values.get("link", "logistic") == "logistic"


# ---------------------------------------------------------------- C13: mixout


W0, UPDATE = (torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
MASKS = [nats(*mask) for mask in itertools.product((0.0, 1.0), repeat=4)]
"""All masks of four input units."""


def mixout(weight: Tensor, start: Tensor, mask: Tensor, p: float) -> Tensor:
    """The paper's own form: units of `weight` where the mask is 1, of `start` elsewhere, corrected to keep the mean."""
    return (mask * weight + (1 - mask) * start - p * start) / (1 - p)


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_c13_mixout_of_the_weight_is_inverted_dropout_of_the_update(p):
    """For a mask of any shape: W0 + M⊙ΔW/(1−p)."""
    for mask in [*MASKS, (torch.rand(3, 4, generator=torch.Generator().manual_seed(2)) > p).double()]:
        torch.testing.assert_close(mixout(W0 + UPDATE, W0, mask, p), W0 + mask * UPDATE / (1 - p), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_c13_a_mask_of_input_units_is_dropout_on_the_adapters_input_shared_by_all_tokens(p):
    tokens = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for mask in MASKS:
        mixed = tokens @ mixout(W0 + UPDATE, W0, mask, p).T
        dropped = tokens @ W0.T + (tokens * mask / (1 - p)) @ UPDATE.T
        torch.testing.assert_close(mixed, dropped, rtol=1e-12, atol=1e-13)


def test_c13_a_shared_mask_moves_all_tokens_together_and_one_per_token_does_not():
    """Hence lora_dropout = p as a control arm: every token alone is noised alike, but no sampled model is behind the answer.

    Over all 16 masks, the covariance of two tokens' outputs is p/(1−p)·ΔW·diag(x⊙x')·ΔWᵀ; over all pairs of masks it is 0.
    """
    p = 0.5
    one, other = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    noise = [UPDATE @ (torch.stack([one, other]) * (mask / (1 - p) - 1)).T for mask in MASKS]  # (outputs, tokens) each
    shared = sum(torch.outer(both[:, 0], both[:, 1]) for both in noise) / 16
    apart = sum(torch.outer(left[:, 0], right[:, 1]) for left in noise for right in noise) / 256
    expected = p / (1 - p) * UPDATE @ torch.diag(one * other) @ UPDATE.T
    torch.testing.assert_close(shared, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apart, torch.zeros_like(apart), rtol=0, atol=1e-12)
    assert expected.abs().max() > 0.2


def test_c13_the_mean_over_masks_is_the_trained_weight():
    p = 0.3
    chance = [p ** (4 - int(mask.sum())) * (1 - p) ** int(mask.sum()) for mask in MASKS]
    mean = sum(c * mixout(W0 + UPDATE, W0, mask, p) for c, mask in zip(chance, MASKS, strict=True))
    torch.testing.assert_close(mean, W0 + UPDATE, rtol=1e-13, atol=1e-14)

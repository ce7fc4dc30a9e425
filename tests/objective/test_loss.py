"""Behaviour of the loss, with every expected value worked by hand.

Notation in the comments: Δ = chosen − rejected, z = β·Δπ − γ·Δ0 − margin, σ(z) = 1/(1 + e^−z).
"""

import dataclasses
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pe_dpo.objective import Loss, PairLogprobs, apply_link, preference_loss


def nats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens(*counts: int) -> Tensor:
    return torch.tensor(counts)


def logistic(z: float) -> float:
    return math.log1p(math.exp(-z))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


# ---------------------------------------------------------------- the formula


def test_dpo_at_the_reference_is_log_two_with_weight_one_half():
    """Δπ = Δ0 gives z = 0 whatever the pair: the logistic loss has no 'already learned' pairs at the start."""
    at_reference = nats(-12.0, -40.0), nats(-15.0, -22.5)
    out = preference_loss(*at_reference, *at_reference, beta=0.1)
    assert out.loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert out.weight.tolist() == [0.5, 0.5]
    assert out.score.tolist() == [0.0, 0.0]


def test_worked_example_of_the_docstring():
    """Δπ = −1 + 5 = 4, Δ0 = −3 + 5 = 2, z = 0.1·4 − 0.1·2 = 0.2, loss log(1 + e^−0.2) = 0.598."""
    out = preference_loss(nats(-1), nats(-5), nats(-3), nats(-5), beta=0.1, gamma=0.1)
    assert out.score.item() == pytest.approx(0.2, abs=1e-15)
    assert out.loss.item() == pytest.approx(0.5981388693815918, rel=1e-12)


def test_gamma_weighs_the_reference_apart_from_beta():
    """Δπ = 4, Δ0 = 2: z = 0.5·4 − 0.25·2 − 0.3 = 1.2, weight σ(−1.2)."""
    out = preference_loss(nats(-1), nats(-5), nats(-3), nats(-5), beta=0.5, gamma=0.25, margin=0.3)
    assert out.score.item() == pytest.approx(1.2, rel=1e-12)
    assert out.loss.item() == pytest.approx(logistic(1.2), rel=1e-12)
    assert out.weight.item() == pytest.approx(sigmoid(-1.2), rel=1e-12)


def test_gamma_left_out_means_beta():
    """Δπ = 4, Δ0 = 2, β = 0.7: z = 0.7·4 − 0.7·2 = 1.4; γ = 0 would give 2.8, γ = 0.1 would give 2.6."""
    out = preference_loss(nats(-1), nats(-5), nats(-3), nats(-5), beta=0.7)
    assert out.score.item() == pytest.approx(1.4, rel=1e-12)


def test_beta_left_out_is_one_tenth():
    """Δπ = 4, Δ0 = 2: z = 0.1·4 − 0.1·2 = 0.2."""
    assert preference_loss(nats(-1), nats(-5), nats(-3), nats(-5)).score.item() == pytest.approx(0.2, rel=1e-12)


def test_the_four_log_probs_are_positional_and_all_else_is_by_name():
    parameters = inspect.signature(preference_loss).parameters.values()
    positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("link", "loss", "weight"),
    [
        ("logistic", logistic(-0.5), sigmoid(0.5)),
        ("hinge", 0.5, 1.0),
        ("squared", 0.25, 1.0),  # −d(z²)/dz = −2·(−0.5)
        (lambda z: torch.exp(-z), math.exp(0.5), math.exp(0.5)),
    ],
    ids=["logistic", "hinge", "squared", "callable"],
)
def test_each_link_at_a_score_of_minus_one_half(link, loss, weight):
    """γ = 0, β = 0.25, Δπ = −5 + 3 = −2: z = −0.5."""
    out = preference_loss(nats(-5), nats(-3), beta=0.25, gamma=0, link=link)
    assert (out.loss.item(), out.weight.item()) == pytest.approx((loss, weight), rel=1e-12)


def test_a_satisfied_pair_has_no_hinge_loss_and_no_weight():
    """z = 0.25·2 = 0.5 > 0."""
    out = preference_loss(nats(-3), nats(-5), beta=0.25, gamma=0, link="hinge")
    assert (out.loss.item(), out.weight.item()) == (0.0, 0.0)


def test_a_squared_link_pulls_back_a_pair_beyond_its_margin():
    """z = 0.25·2 = 0.5 > 0: the weight −2z = −1 is negative (IPO has a target, not a bound)."""
    assert preference_loss(nats(-3), nats(-5), beta=0.25, gamma=0, link="squared").weight.item() == pytest.approx(-1, rel=1e-12)


def test_per_token_log_probs_are_divided_by_their_own_length():
    """Δ̄π = −6/3 + 20/5 = 2, Δ̄0 = −9/3 + 10/5 = −1: z = 0.5·2 + 0.25·1 = 1.25."""
    out = preference_loss(
        nats(-6), nats(-20), nats(-9), nats(-10),
        beta=0.5, gamma=0.25, reduce="mean", chosen_lengths=tokens(3), rejected_lengths=tokens(5),
    )  # fmt: skip
    assert out.score.item() == pytest.approx(1.25, rel=1e-12)


def test_summed_log_probs_ignore_the_lengths():
    lengths = {"chosen_lengths": tokens(3), "rejected_lengths": tokens(5)}
    with_lengths = preference_loss(nats(-6), nats(-20), nats(-9), nats(-10), **lengths)
    assert with_lengths.score.item() == preference_loss(nats(-6), nats(-20), nats(-9), nats(-10)).score.item()


def test_the_gradient_reaches_both_answers_with_opposite_signs():
    """z = 0: d loss/d log π(chosen) = −β·½ = −0.1, and +0.1 for the rejected answer."""
    chosen, rejected = nats(-4).requires_grad_(), nats(-6).requires_grad_()
    preference_loss(chosen, rejected, nats(-4), nats(-6), beta=0.2).loss.backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.1, 0.1), rel=1e-12)


def test_no_gradient_reaches_the_reference():
    reference = nats(-4).requires_grad_(), nats(-6).requires_grad_()
    preference_loss(nats(-5).requires_grad_(), nats(-5), *reference, beta=0.2).loss.backward()
    assert [answer.grad for answer in reference] == [None, None]


def test_only_the_loss_carries_a_gradient():
    out = preference_loss(nats(-5).requires_grad_(), nats(-5).requires_grad_(), nats(-5), nats(-5))
    carrying = [name for name, value in out._asdict().items() if value.requires_grad]
    assert carrying == ["loss"]


def test_the_weight_is_known_without_gradients_too():
    """Evaluation runs under no_grad; at z = 0 the weight is still ½."""
    with torch.no_grad():
        out = preference_loss(nats(-5), nats(-5), nats(-5), nats(-5))
    assert out.weight.item() == 0.5


def test_the_weight_is_known_in_inference_mode_too():
    with torch.inference_mode():
        out = preference_loss(nats(-5), nats(-5), nats(-5), nats(-5))
    assert out.weight.item() == 0.5


def test_float32_in_gives_float32_out():
    answers = [value.float() for value in (nats(-1), nats(-5), nats(-3), nats(-5))]
    out = preference_loss(*answers, reduce="mean", chosen_lengths=tokens(3), rejected_lengths=tokens(5), sft_weight=1.0)
    assert {value.dtype for value in out} == {torch.float32}


# ---------------------------------------------------------------- the weight of the rejected answer (DPO-Shift)


def test_the_rejected_answer_counts_with_its_weight_under_both_models():
    """λ = ¾: z = 0.5·(−1 + ¾·5) − 0.25·(−3 + ¾·5) = 0.5·2.75 − 0.25·0.75 = 1.1875; rewards stay those of single answers."""
    out = preference_loss(nats(-1), nats(-5), nats(-3), nats(-5), beta=0.5, gamma=0.25, rejected_weight=0.75)
    assert out.score.item() == 1.1875
    assert out.loss.item() == pytest.approx(logistic(1.1875), rel=1e-12)
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == (0.25, -1.25)


@pytest.mark.parametrize("weight", [0.5, 0.95, 1.5])
@pytest.mark.parametrize("link", ["logistic", "hinge", "squared"])
def test_a_rejected_answer_is_pulled_down_so_many_times_as_hard_as_the_chosen_one_is_pulled_up(link, weight):
    chosen, rejected = nats(-1, -7, -3).requires_grad_(), nats(-5, -2, -30).requires_grad_()
    reference = nats(-3, -6, -4), nats(-5, -1, -20)
    out = preference_loss(chosen, rejected, *reference, margin=0.5, link=link, rejected_weight=weight)
    up, down = torch.autograd.grad(out.loss.sum(), (chosen, rejected))
    torch.testing.assert_close(down, -weight * up, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.weight, -up / 0.1, rtol=1e-12, atol=0)


def test_at_the_reference_every_pair_still_starts_at_log_two():
    """γ = β: the score is 0 whatever λ, though log p(chosen) − λ·log p(rejected) is −12 and −43.625."""
    at_reference = nats(-12.0, -60.0), nats(-0.0, -21.8333333)
    out = preference_loss(*at_reference, *at_reference, beta=0.1, rejected_weight=0.75)
    assert (out.score.tolist(), out.weight.tolist()) == ([0.0, 0.0], [0.5, 0.5])


def test_swapped_labels_have_the_weight_on_the_other_answer():
    """λ = ½, γ = 0, β = 1: z = −1 + ½·3 = ½, z′ = −3 + ½·1 = −2½, not −½; gradients −(1−ε)σ(−½) + ½·ε·σ(2½) and so on."""
    policy = nats(-1).requires_grad_(), nats(-3).requires_grad_()
    out = preference_loss(*policy, beta=1.0, gamma=0, rejected_weight=0.5, label_smoothing=0.25)
    assert out.loss.item() == pytest.approx(0.75 * logistic(0.5) + 0.25 * logistic(-2.5), rel=1e-12)
    up, down = torch.autograd.grad(out.loss.sum(), policy)
    assert up.item() == pytest.approx(-0.75 * sigmoid(-0.5) + 0.5 * 0.25 * sigmoid(2.5), rel=1e-12)
    assert down.item() == pytest.approx(0.5 * 0.75 * sigmoid(-0.5) - 0.25 * sigmoid(2.5), rel=1e-12)
    assert out.weight.item() == -up.item()


def test_it_is_the_loss_of_the_papers_own_code():
    """logits = (log π+ − λ·log π−) − (log π0+ − λ·log π0−), −log σ(β·logits): its trainer, without smoothing, in a loop."""
    generator = torch.Generator().manual_seed(0)
    columns = [-80 * torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(4)]
    found = preference_loss(*columns, beta=0.01, rejected_weight=0.7).loss.tolist()
    for row, (chosen, rejected, before_chosen, before_rejected) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        logits = (chosen - 0.7 * rejected) - (before_chosen - 0.7 * before_rejected)
        assert found[row] == pytest.approx(math.log1p(math.exp(-0.01 * logits)), rel=1e-12)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_hinge_that_is_told_to_stay_stays_with_a_rejected_weight_too(reduce):
    """γ = β, margin 0: exactly 0 under every pair, per token too, so that rounding moves nothing."""
    generator = torch.Generator().manual_seed(0)
    at = [-90 * torch.rand(200, generator=generator, dtype=torch.float64) for _ in range(2)]
    lengths = {f"{side}_lengths": torch.randint(1, 40, (200,), generator=generator) for side in ("chosen", "rejected")}
    out = preference_loss(*at, *at, beta=0.1, link="hinge", reduce=reduce, rejected_weight=0.95, **lengths)
    assert not out.weight.any()
    assert not out.score.any()


# ---------------------------------------------------------------- a β and a weight of each pair


def answers(*columns: Tensor) -> PairLogprobs:
    return PairLogprobs(*columns, torch.ones(len(columns[0])), torch.ones(len(columns[0])))


TRAINED, UNTRAINED = answers(nats(-1, -7, -3), nats(-5, -2, -9)), answers(nats(-3, -6, -4), nats(-5, -1, -8))
NO_MARGIN = torch.zeros(3)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
def test_betas_of_pairs_are_the_losses_of_as_many_runs(kappa):
    mixed = Loss(beta=0.7, gamma=0.7 * kappa)(TRAINED, UNTRAINED, NO_MARGIN, nats(0.1, 2.0, 0.1))
    for beta, rows in ((0.1, [0, 2]), (2.0, [1])):
        alone = Loss(beta=beta, gamma=beta * kappa)(TRAINED, UNTRAINED, NO_MARGIN)
        for name in ("loss", "score", "chosen_reward", "rejected_reward"):
            torch.testing.assert_close(getattr(mixed, name)[rows], getattr(alone, name)[rows], rtol=1e-14, atol=0)
        torch.testing.assert_close(mixed.weight[rows], beta / 0.7 * alone.weight[rows], rtol=1e-14, atol=0)


def test_a_pair_without_a_beta_among_others_has_the_losss():
    mixed = Loss(beta=0.7, gamma=0.7)(TRAINED, UNTRAINED, NO_MARGIN, nats(0.1, math.nan, 0.1))
    assert mixed.loss[1] == Loss(beta=0.7, gamma=0.7)(TRAINED, UNTRAINED, NO_MARGIN).loss[1]


def test_dpo_stays_dpo_pair_by_pair():
    """γ = β at the reference: every score is exactly 0, so that a hinge with κ = 1 stays refused to start."""
    out = Loss(beta=0.7, gamma=0.7, link="hinge")(UNTRAINED, UNTRAINED, NO_MARGIN, nats(0.1, 0.3, 1.1))
    assert not out.score.any()
    assert not out.weight.any()


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_a_weight_of_zero_leaves_a_pair_out_and_one_of_two_counts_it_twice(sft_weight):
    loss = Loss(beta=0.5, gamma=0.25, sft_weight=sft_weight)

    def gradients(rows, weight=None):
        policy = [field[rows].clone().requires_grad_() for field in TRAINED[:2]]
        reference = answers(*(field[rows] for field in UNTRAINED[:2]))
        out = loss(answers(*policy), reference, torch.zeros(len(rows)), None, weight)
        total = out.loss.sum()
        return total, [gradient.tolist() for gradient in torch.autograd.grad(total, policy)]

    total, both = gradients([0, 1, 2], nats(1, 0, 2))
    twice, repeated = gradients([0, 2, 2])
    assert total.item() == pytest.approx(twice.item(), rel=1e-14)
    for found, plain in zip(both, repeated, strict=True):
        assert found == pytest.approx([plain[0], 0.0, plain[1] + plain[2]], rel=1e-14)


def test_terms_of_pairs_come_in_the_dtype_of_the_policy():
    policy = answers(*(field.float() for field in TRAINED[:2]))
    out = Loss(beta=0.5, gamma=0.5)(policy, UNTRAINED, NO_MARGIN, nats(0.1, 0.2, 0.3), nats(1, 2, 0))
    assert {field.dtype for field in out} == {torch.float32}


# ---------------------------------------------------------------- the hinge at its kink (TRAPS 8)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_hinge_with_gamma_equal_to_beta_cannot_leave_the_reference(reduce):
    """z is exactly 0 for every pair, and the subgradient there is 0, not 1 (clamp) and not ½ (maximum)."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (-300 * torch.rand(1000, generator=generator) for _ in range(2))
    policy = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    lengths = {
        "chosen_lengths": torch.randint(1, 300, (1000,), generator=generator),
        "rejected_lengths": torch.randint(1, 300, (1000,), generator=generator),
    }
    out = preference_loss(*policy, chosen, rejected, beta=0.1, gamma=0.1, link="hinge", reduce=reduce, **lengths)
    gradients = torch.autograd.grad(out.loss.sum(), policy)
    assert not out.loss.any() and not out.weight.any()
    assert not any(gradient.any() for gradient in gradients)


def test_a_clamped_hinge_would_leave_it():
    """The control: the same scores through clamp(min=0) have slope 1, so the test above can fail."""
    out = preference_loss(nats(-4), nats(-6), nats(-4), nats(-6), beta=0.1, link=lambda z: (-z).clamp(min=0))
    assert out.weight.item() == 1.0


def test_a_kink_away_from_the_reference_is_hit_exactly_per_token():
    """Δ̄π = (−10 + 16)/12 = ½ = Δ̄0 = (−28 + 34)/12; −10/12 + 16/12 and −28/12 + 34/12 differ in the last bit."""
    lengths = {"chosen_lengths": tokens(12), "rejected_lengths": tokens(12)}
    out = preference_loss(nats(-10), nats(-16), nats(-28), nats(-34), beta=0.1, link="hinge", reduce="mean", **lengths)
    assert (out.score.item(), out.weight.item()) == (0.0, 0.0)
    assert -10 / 12 + 16 / 12 != -28 / 12 + 34 / 12


def test_a_margin_makes_the_hinge_start():
    """Δπ = Δ0: z = −0.5, so the loss is 0.5 and the weight 1."""
    out = preference_loss(nats(-4), nats(-6), nats(-4), nats(-6), beta=0.1, margin=0.5, link="hinge")
    assert (out.loss.item(), out.weight.item()) == (0.5, 1.0)


# ---------------------------------------------------------------- numbers at the edge


@pytest.mark.parametrize(
    ("link", "policy_chosen", "loss", "gradient"),
    [
        ("logistic", -10_000.0, 1000.0, -0.1),
        ("logistic", 10_000.0, 0.0, 0.0),
        ("hinge", -10_000.0, 1000.0, -0.1),
        ("hinge", 10_000.0, 0.0, 0.0),
        ("squared", -10_000.0, 1e6, -200.0),
        ("squared", 10_000.0, 1e6, 200.0),
    ],
)
def test_log_ratios_of_ten_thousand_nats_are_exact_in_float32(link, policy_chosen, loss, gradient):
    """β = 0.1: z = ∓1000; e^−1000 is 0 in any float, and the squared link has slope 2z·β = ∓200."""
    chosen = torch.tensor([policy_chosen], requires_grad=True)
    out = preference_loss(chosen, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=0.1, link=link)
    out.loss.backward()
    assert (out.loss.item(), chosen.grad.item()) == pytest.approx((loss, gradient), rel=1e-6)
    assert out.weight.item() == pytest.approx(-gradient / 0.1, rel=1e-6)


def test_logistic_keeps_its_last_digits_at_minus_twenty():
    """log(1 + e^20.25) = 20.25 + log(1 + e^−20.25) = 20.25 + 1.6052280536e−9; softplus drops the second term."""
    tail = math.log1p(math.exp(-20.25))
    assert apply_link("logistic", nats(-20.25)).item() - 20.25 == pytest.approx(tail, abs=4e-15)
    assert F.softplus(nats(20.25)).item() - 20.25 == 0.0


def test_an_empty_batch_gives_empty_results():
    out = preference_loss(nats(), nats(), nats(), nats())
    assert {tuple(value.shape) for value in out} == {(0,)}


# ---------------------------------------------------------------- label smoothing (TRAPS 11)


def test_smoothing_swaps_the_labels_and_keeps_the_margin():
    """SimPO, β = 2, margin ½, Δ̄π = −2/8 + 2/6 = 1/12: z = 1/6 − 1/2 = −1/3, and with labels swapped z′ = −1/6 − 1/2 = −2/3.

    The loss of the swapped pair is log(1 + e^(2/3)) = 1.081; negating z would give log(1 + e^(−1/3)) = 0.540.
    """
    simpo = {"beta": 2.0, "gamma": 0.0, "margin": 0.5, "reduce": "mean"}
    lengths = {"chosen_lengths": tokens(8), "rejected_lengths": tokens(6)}
    smoothed = preference_loss(nats(-2), nats(-2), **simpo, **lengths, label_smoothing=0.125).loss.item()
    straight = math.log1p(math.exp(1 / 3))
    assert (smoothed - 0.875 * straight) / 0.125 == pytest.approx(math.log1p(math.exp(2 / 3)), rel=1e-12)
    assert math.log1p(math.exp(2 / 3)) == pytest.approx(1.081, abs=5e-4)
    assert math.log1p(math.exp(-1 / 3)) == pytest.approx(0.540, abs=5e-4)


def test_conservative_smoothing_is_a_convex_mixture():
    """z = 1, z′ = −1: loss 0.9·log(1 + e^−1) + 0.1·log(1 + e), weight 0.9·σ(−1) − 0.1·σ(1)."""
    out = preference_loss(nats(-5), nats(-10), beta=0.2, gamma=0, label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(0.9 * logistic(1) + 0.1 * logistic(-1), rel=1e-12)
    assert out.weight.item() == pytest.approx(0.9 * sigmoid(-1) - 0.1 * sigmoid(1), rel=1e-12)


def test_unbiased_smoothing_extrapolates_and_rescales():
    """z = 1, z′ = −1, ε = 0.1: (0.9·log(1 + e^−1) − 0.1·log(1 + e)) / 0.8."""
    out = preference_loss(nats(-5), nats(-10), beta=0.2, gamma=0, label_smoothing=0.1, label_smoothing_mode="unbiased")
    assert out.loss.item() == pytest.approx((0.9 * logistic(1) - 0.1 * logistic(-1)) / 0.8, rel=1e-12)


@pytest.mark.parametrize("link", ["logistic", "hinge", "squared"])
def test_unbiased_smoothing_has_the_clean_loss_as_its_mean_over_flipped_labels(link):
    """(1−ε)·L(pair) + ε·L(pair with chosen and rejected exchanged) = clean loss, with margin, floor and length penalty on."""
    policy, reference = (nats(-5, -9, -7), nats(-10, -3, -7)), (nats(-6, -4, -8), nats(-8, -9, -7))
    lengths = tokens(4, 9, 2), tokens(7, 3, 2)
    options = {
        "beta": 0.3, "gamma": 0.2, "margin": 0.4, "link": link, "reference_floor": -0.5,
        "length_penalty": 0.05, "pair_margin": nats(0.1, 0.0, -0.2),
    }  # fmt: skip

    def labelled(first: int, **smoothing: float | str) -> Tensor:
        second = 1 - first
        return preference_loss(
            policy[first], policy[second], reference[first], reference[second],
            chosen_lengths=lengths[first], rejected_lengths=lengths[second], **options, **smoothing,
        ).loss  # fmt: skip

    unbiased = {"label_smoothing": 0.2, "label_smoothing_mode": "unbiased"}
    mean_over_flips = 0.8 * labelled(0, **unbiased) + 0.2 * labelled(1, **unbiased)
    torch.testing.assert_close(mean_over_flips, labelled(0), rtol=1e-13, atol=1e-14)


def test_score_is_of_the_pair_as_labelled_whatever_the_smoothing():
    """z = 0.2·5 = 1."""
    assert preference_loss(nats(-5), nats(-10), beta=0.2, gamma=0, label_smoothing=0.4).score.item() == 1.0


# ---------------------------------------------------------------- margins, floor, length penalty, SFT


def test_a_pair_margin_adds_to_the_constant_margin():
    """Δπ = 5, β = 0.2: z = 1 − 0.5 − (0.25, −2) = (0.25, 2.5)."""
    out = preference_loss(nats(-5, -5), nats(-10, -10), beta=0.2, gamma=0, margin=0.5, pair_margin=nats(0.25, -2))
    assert out.score.tolist() == pytest.approx([0.25, 2.5], rel=1e-12)


def test_a_pair_margin_keeps_its_sign_when_labels_are_swapped():
    """z = 1 − 0.25 = 0.75, z′ = −1 − 0.25 = −1.25."""
    out = preference_loss(nats(-5), nats(-10), beta=0.2, gamma=0, pair_margin=nats(0.25), label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(0.9 * logistic(0.75) + 0.1 * logistic(-1.25), rel=1e-12)


def test_a_floor_of_zero_forgets_a_reference_that_is_wrong():
    """Δπ = 5, Δ0 = (−4, 4), β = γ = 0.2: z = 1 − 0.2·max(Δ0, 0) = (1, 0.2)."""
    out = preference_loss(nats(-5, -5), nats(-10, -10), nats(-9, -5), nats(-5, -9), beta=0.2, reference_floor=0.0)
    assert out.score.tolist() == pytest.approx([1.0, 0.2], rel=1e-12)


def test_the_floor_bounds_the_reference_of_the_swapped_pair_too():
    """Δπ = 5, Δ0 = 4, floor 0: z = 1 − 0.8 = 0.2; swapped, Δ0′ = −4 is floored: z′ = −1 − 0 = −1."""
    out = preference_loss(nats(-5), nats(-10), nats(-5), nats(-9), beta=0.2, reference_floor=0.0, label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(0.9 * logistic(0.2) + 0.1 * logistic(-1), rel=1e-12)


def test_the_floor_counts_per_token_when_the_log_probs_do():
    """Δ̄0 = −12/4 + 6/6 = −2, floor −1.5: z = 0 − 1·(−1.5)."""
    out = preference_loss(
        nats(0), nats(0), nats(-12), nats(-6),
        beta=1.0, reference_floor=-1.5, reduce="mean", chosen_lengths=tokens(4), rejected_lengths=tokens(6),
    )  # fmt: skip
    assert out.score.item() == pytest.approx(1.5, rel=1e-12)


def test_the_length_penalty_asks_less_of_a_chosen_answer_that_is_longer():
    """R-DPO: z = α·(|y+| − |y−|) = 0.125·(8 − 5) = 0.375 at the reference, so the longer chosen answer is pulled less."""
    at_reference = nats(-4), nats(-6), nats(-4), nats(-6)
    out = preference_loss(*at_reference, length_penalty=0.125, chosen_lengths=tokens(8), rejected_lengths=tokens(5))
    assert out.score.item() == 0.375
    assert out.weight.item() == pytest.approx(sigmoid(-0.375), rel=1e-12)


def test_the_length_penalty_changes_sign_when_labels_are_swapped():
    """z = 0.375, z′ = 0.125·(5 − 8) = −0.375."""
    at_reference = nats(-4), nats(-6), nats(-4), nats(-6)
    lengths = {"chosen_lengths": tokens(8), "rejected_lengths": tokens(5)}
    out = preference_loss(*at_reference, length_penalty=0.125, label_smoothing=0.2, **lengths)
    assert out.loss.item() == pytest.approx(0.8 * logistic(0.375) + 0.2 * logistic(-0.375), rel=1e-12)


def test_the_length_penalty_is_as_precise_as_the_log_probs():
    """0.1·(8 − 5) = 0.3 in float64; in float32 it is 0.30000001192."""
    at_reference = nats(-4), nats(-6), nats(-4), nats(-6)
    out = preference_loss(*at_reference, length_penalty=0.1, chosen_lengths=tokens(8), rejected_lengths=tokens(5))
    assert out.score.item() == pytest.approx(0.3, rel=1e-12)


def test_the_sft_term_is_the_per_token_nll_of_the_chosen_answer():
    """log 2 + 0.5·(6 nats / 3 tokens) = log 2 + 1."""
    out = preference_loss(
        nats(-6), nats(-9), nats(-6), nats(-9), sft_weight=0.5, chosen_lengths=tokens(3), rejected_lengths=tokens(4)
    )
    assert out.loss.item() == pytest.approx(math.log(2) + 1, rel=1e-12)


def test_the_sft_term_pulls_the_chosen_answer_only_and_is_not_in_the_weight():
    """−β·½ − 0.5/3 for the chosen answer, +β·½ for the rejected one; the weight stays ½."""
    chosen, rejected = nats(-6).requires_grad_(), nats(-9).requires_grad_()
    lengths = {"chosen_lengths": tokens(3), "rejected_lengths": tokens(4)}
    out = preference_loss(chosen, rejected, nats(-6), nats(-9), beta=0.2, sft_weight=0.5, **lengths)
    out.loss.backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.1 - 0.5 / 3, 0.1), rel=1e-12)
    assert out.weight.item() == 0.5


# ---------------------------------------------------------------- rewards


def test_a_reward_is_beta_log_policy_less_gamma_log_reference():
    """0.5·(−6) − 0.25·(−8) = −1 for the chosen answer, 0.5·(−10) − 0.25·(−4) = −4 for the rejected one."""
    out = preference_loss(nats(-6), nats(-10), nats(-8), nats(-4), beta=0.5, gamma=0.25, margin=7.0)
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == pytest.approx((-1.0, -4.0), rel=1e-12)


def test_the_gap_between_rewards_is_the_score_before_the_margin():
    """Rewards −1 and −4: a gap of 3 = z + margin, with z = 3 − 7."""
    out = preference_loss(nats(-6), nats(-10), nats(-8), nats(-4), beta=0.5, gamma=0.25, margin=7.0)
    assert out.score.item() == pytest.approx(-4.0, rel=1e-12)


def test_rewards_are_per_token_when_the_log_probs_are():
    """−1/2 tokens and −4/5 tokens."""
    lengths = {"chosen_lengths": tokens(2), "rejected_lengths": tokens(5)}
    out = preference_loss(nats(-6), nats(-10), nats(-8), nats(-4), beta=0.5, gamma=0.25, reduce="mean", **lengths)
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == pytest.approx((-0.5, -0.8), rel=1e-12)


def test_without_a_reference_the_reward_is_beta_log_policy():
    out = preference_loss(nats(-6), nats(-10), beta=0.5, gamma=0)
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == (-3.0, -5.0)


# ---------------------------------------------------------------- what is refused


def test_gamma_zero_needs_no_reference():
    """z = 0.1·4 = 0.4."""
    assert preference_loss(nats(-1), nats(-5), gamma=0).score.item() == pytest.approx(0.4, rel=1e-12)


def test_gamma_zero_ignores_even_a_broken_reference():
    """0·NaN would be NaN, in the score and in the rewards."""
    broken = nats(float("nan"))
    out = preference_loss(nats(-1), nats(-5), broken, broken, gamma=0)
    assert out.score.item() == pytest.approx(0.4, rel=1e-12)
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == pytest.approx((-0.1, -0.5), rel=1e-12)


@pytest.mark.parametrize("given", [{}, {"reference_chosen": nats(-1)}, {"reference_rejected": nats(-1)}])
@pytest.mark.parametrize("gamma", [None, 0.05])
def test_a_missing_reference_is_refused_unless_gamma_is_zero(gamma, given):
    with pytest.raises(ValueError, match="reference_chosen and reference_rejected are needed"):
        preference_loss(nats(-1), nats(-5), gamma=gamma, **given)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"beta": 0.0}, r"beta is 0\.0: it must be > 0"),
        ({"beta": -0.1}, r"beta is -0\.1"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"gamma": -0.1}, r"gamma is -0\.1: it must be >= 0"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"gamma": 0.0, "reference_floor": 0.0}, "reference_floor has no effect with gamma=0"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0\.5: it must lie in \[0, 0\.5\)"),
        ({"label_smoothing": -0.01}, r"label_smoothing is -0\.01"),
        ({"label_smoothing_mode": "robust"}, "label_smoothing_mode is 'robust': expected conservative or unbiased"),
        ({"sft_weight": -1.0}, r"sft_weight is -1\.0: it must be >= 0"),
        ({"rejected_weight": 0.0}, r"rejected_weight is 0\.0: it must be finite and > 0"),
        ({"rejected_weight": float("inf")}, "rejected_weight is inf"),
        (
            {"rejected_weight": 0.9, "reference_floor": 0.0},
            "reference_floor bounds Δ0, which is not in the score with rejected_",
        ),
        ({"link": "sigmoid"}, "link is 'sigmoid': expected one of logistic, hinge, squared, or a callable"),
    ],
)
def test_an_impossible_coefficient_is_refused_by_name(option, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(nats(-1), nats(-5), nats(-3), nats(-5), **option)


@pytest.mark.parametrize("option", [{"reduce": "mean"}, {"sft_weight": 0.1}, {"length_penalty": 0.1}])
@pytest.mark.parametrize("given", [{}, {"chosen_lengths": tokens(3)}, {"rejected_lengths": tokens(3)}])
def test_missing_lengths_are_refused_where_they_are_needed(option, given):
    with pytest.raises(ValueError, match="chosen_lengths and rejected_lengths are needed"):
        preference_loss(nats(-1), nats(-5), nats(-3), nats(-5), **option, **given)


@pytest.mark.parametrize(
    "name", ["policy_rejected", "reference_chosen", "reference_rejected", "chosen_lengths", "rejected_lengths", "pair_margin"]
)
def test_a_tensor_of_another_length_is_refused_by_name(name):
    tensors = {
        "policy_chosen": nats(-1, -2), "policy_rejected": nats(-1, -2),
        "reference_chosen": nats(-1, -2), "reference_rejected": nats(-1, -2),
        "chosen_lengths": tokens(1, 2), "rejected_lengths": tokens(1, 2), "pair_margin": nats(0, 0),
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"'{name}': \(3,\)"):
        preference_loss(**{**tensors, name: torch.ones(3)})


def test_a_matrix_of_log_probs_is_refused():
    per_token = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"one number per pair is needed, all of one shape \(B,\)"):
        preference_loss(per_token, per_token, gamma=0)


def test_an_unknown_reduction_is_refused_by_name():
    lengths = {"chosen_lengths": tokens(3), "rejected_lengths": tokens(5)}
    with pytest.raises(ValueError, match="reduce is 'average'"):
        preference_loss(nats(-1), nats(-5), gamma=0, reduce="average", **lengths)


# ---------------------------------------------------------------- the loss as an object

POLICY = PairLogprobs(nats(-4.0, -9.0), nats(-6.0, -5.0), tokens(2, 3), tokens(8, 4))
REFERENCE = PairLogprobs(nats(-5.0, -7.0), nats(-5.5, -6.0), tokens(2, 3), tokens(8, 4))

COEFFICIENTS = {
    "beta": 0.4, "gamma": 0.3, "margin": 0.2, "link": "squared", "reduce": "mean", "reference_floor": -0.1,
    "label_smoothing": 0.1, "label_smoothing_mode": "unbiased", "sft_weight": 0.5, "length_penalty": 0.07,
}  # fmt: skip


@pytest.mark.parametrize("changed", COEFFICIENTS)
def test_a_loss_is_the_formula_with_its_coefficients(changed):
    """To the bit, with all coefficients but one as they are, and that one at its default (γ: without a reference)."""
    defaults = {field.name: field.default for field in dataclasses.fields(Loss)} | {"beta": 0.1, "gamma": 0.0}
    coefficients = COEFFICIENTS | {changed: defaults[changed]}
    if changed == "gamma":
        coefficients["reference_floor"] = None
    assert coefficients != COEFFICIENTS
    found = Loss(**coefficients)(POLICY, None if changed == "gamma" else REFERENCE, nats(1.0, 2.0))
    lengths = {"chosen_lengths": tokens(2, 3), "rejected_lengths": tokens(8, 4)}
    expected = preference_loss(*POLICY[:2], *REFERENCE[:2], **lengths, **coefficients)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_the_margin_of_each_pair_counts_as_often_as_its_scale():
    """Δπ is 2 and −4; β = 1, no reference: z = Δπ − ½·m."""
    out = Loss(beta=1.0, gamma=0.0, margin_scale=0.5)(POLICY, None, nats(1.0, 4.0))
    assert out.score.tolist() == [1.5, -6.0]


def test_a_loss_carries_the_gradient_of_the_policy():
    chosen = nats(-4.0, -9.0).requires_grad_()
    Loss(beta=0.5, gamma=0.5)(POLICY._replace(chosen=chosen), REFERENCE, nats(0.0, 0.0)).loss.sum().backward()
    # z = ½·(2 − ½) and ½·(−4 + 1)
    assert chosen.grad.tolist() == pytest.approx([-0.5 * sigmoid(-0.75), -0.5 * sigmoid(1.5)], rel=1e-12)


def test_only_with_gamma_zero_no_reference_is_needed():
    assert not Loss(beta=0.1, gamma=0.0).needs_reference
    assert Loss(beta=0.1, gamma=0.05).needs_reference
    with pytest.raises(ValueError, match=r"gamma is 0\.05: reference_chosen and reference_rejected are needed"):
        Loss(beta=0.1, gamma=0.05)(POLICY, None, nats(0.0, 0.0))


def test_without_a_reference_its_floor_goes_and_with_another_gamma_it_stays():
    loss = Loss(beta=0.1, gamma=0.1, reference_floor=0.0)
    assert loss.with_gamma(0.0) == Loss(beta=0.1, gamma=0.0)
    assert loss.with_gamma(0.3) == Loss(beta=0.1, gamma=0.3, reference_floor=0.0)

"""What must hold when the same question is put in another way: properties of the loss over random pairs and coefficients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pe_dpo.objective import PreferenceLoss, preference_loss

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)

links = st.sampled_from(["logistic", "hinge", "squared"])
reductions = st.sampled_from(["sum", "mean"])
betas = st.floats(0.01, 5.0)
gammas = st.floats(0.0, 5.0)
positive_gammas = st.floats(0.01, 5.0)  # a floor needs a reference
margins = st.floats(-2.0, 2.0)
floors = st.none() | st.floats(-20.0, 20.0)
constants = st.floats(-100.0, 100.0)
factors = st.floats(0.1, 10.0)
smoothings = st.fixed_dictionaries(
    {"label_smoothing": st.floats(0.0, 0.45), "label_smoothing_mode": st.sampled_from(["conservative", "unbiased"])}
)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """One to four pairs: summed log-probs between −300 and 0, lengths between 1 and 300."""
    size = draw(st.integers(1, 4))

    def column(elements: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(elements, min_size=size, max_size=size))

    answers = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    batch = {name: torch.tensor(column(st.floats(-300.0, 0.0)), dtype=torch.float64) for name in answers}
    return batch | {name: torch.tensor(column(st.integers(1, 300))) for name in ("chosen_lengths", "rejected_lengths")}


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal up to float64 rounding of scores of a few thousand."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def swapped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same pairs with their labels exchanged."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {name: batch[name.replace(side, other[side])] for name in batch for side in other if side in name}


def with_gradients(batch: dict[str, Tensor], **options: Any) -> tuple[PreferenceLoss, Tensor, Tensor]:
    """The loss and its gradient on both answers of the policy."""
    policy = batch["policy_chosen"].requires_grad_(), batch["policy_rejected"].requires_grad_()
    out = preference_loss(**batch, **options)
    return out, *torch.autograd.grad(out.loss.sum(), policy)


# ---------------------------------------------------------------- the reference


@PROPERTY
@given(batches(), betas, positive_gammas, margins, links, reductions, floors, factors)
def test_a_tempered_reference_with_gamma_divided_is_the_same_loss(batch, beta, gamma, margin, link, reduce, floor, factor):
    """(β, γ/α, α·Δ0) ≡ (β, γ, Δ0), the floor scaled too: π0^α with γ/α is π0 with γ."""
    options = {"beta": beta, "margin": margin, "link": link, "reduce": reduce}
    tempered = {name: factor * value if name.startswith("reference") else value for name, value in batch.items()}
    scaled_floor = None if floor is None else factor * floor
    plain = preference_loss(**batch, gamma=gamma, reference_floor=floor, **options)
    other = preference_loss(**tempered, gamma=gamma / factor, reference_floor=scaled_floor, **options)
    assert_same(other.score, plain.score)
    assert_same(other.loss, plain.loss)


@PROPERTY
@given(batches(), betas, margins, links, reductions, smoothings, st.floats(-300.0, 0.0))
def test_gamma_zero_does_not_see_the_reference(batch, beta, margin, link, reduce, smoothing, elsewhere):
    options = {"beta": beta, "gamma": 0.0, "margin": margin, "link": link, "reduce": reduce, **smoothing}
    moved = {**batch, "reference_chosen": torch.full_like(batch["reference_chosen"], elsewhere)}
    absent = {name: value for name, value in batch.items() if not name.startswith("reference")}
    expected = preference_loss(**absent, **options)
    for found in (preference_loss(**batch, **options), preference_loss(**moved, **options)):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


# ---------------------------------------------------------------- the labels


@PROPERTY
@given(batches(), betas, gammas, margins, reductions)
def test_swapping_the_labels_negates_the_score_before_the_margin(batch, beta, gamma, margin, reduce):
    """Δ′ = −Δ for policy and reference, so z + m changes sign: z′ = −z − 2m."""
    options = {"beta": beta, "gamma": gamma, "margin": margin, "reduce": reduce}
    straight, other = preference_loss(**batch, **options), preference_loss(**swapped(batch), **options)
    assert_same(other.score, -straight.score - 2 * margin)


@PROPERTY
@given(batches(), betas, gammas, margins, links, reductions, st.floats(-0.2, 0.2))
def test_smoothing_shrinks_the_gap_between_a_pair_and_its_swap(batch, beta, gamma, margin, link, reduce, length_penalty):
    """Conservative: (1−ε)f + εf′ less (1−ε)f′ + εf is (1 − 2ε)·(f − f′), an eighth at ε = 0.4375."""
    options = {"beta": beta, "gamma": gamma, "margin": margin, "link": link, "reduce": reduce, "length_penalty": length_penalty}
    clean_gap = preference_loss(**batch, **options).loss - preference_loss(**swapped(batch), **options).loss
    smooth = {"label_smoothing": 0.4375, **options}
    gap = preference_loss(**batch, **smooth).loss - preference_loss(**swapped(batch), **smooth).loss
    torch.testing.assert_close(gap, 0.125 * clean_gap, rtol=1e-9, atol=1e-9 * (1 + float(clean_gap.abs().max())))


# ---------------------------------------------------------------- lengths and constants


@PROPERTY
@given(batches(), betas, positive_gammas, margins, links, floors, smoothings)
def test_doubling_every_token_changes_nothing_per_token(batch, beta, gamma, margin, link, floor, smoothing):
    """Twice the log-probs over twice the lengths; powers of two, so bit for bit."""
    options = {"beta": beta, "gamma": gamma, "margin": margin, "link": link, "reduce": "mean"}
    once = preference_loss(**batch, reference_floor=floor, **options, **smoothing)
    twice = preference_loss(**{name: 2 * value for name, value in batch.items()}, reference_floor=floor, **options, **smoothing)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(twice, once, strict=True))


@PROPERTY
@given(batches(), betas, positive_gammas, margins, links, floors, smoothings, st.tuples(constants, constants))
def test_a_constant_on_both_answers_changes_nothing(batch, beta, gamma, margin, link, floor, smoothing, on_models):
    """The prompt's own log-prob, or a normaliser, is common to both answers and cancels in Δ."""
    options = {"beta": beta, "gamma": gamma, "margin": margin, "reference_floor": floor, **smoothing}
    shift = dict(zip(("policy", "reference"), on_models, strict=True))
    moved = {name: value + shift.get(name.split("_")[0], 0) for name, value in batch.items()}
    plain, other = preference_loss(**batch, link=link, **options), preference_loss(**moved, link=link, **options)
    assert_same(other.score, plain.score)
    torch.testing.assert_close(other.loss, plain.loss, rtol=1e-9, atol=1e-8)


@PROPERTY
@given(batches(), betas, positive_gammas, margins, reductions, floors, smoothings, factors)
def test_scaling_beta_gamma_and_margin_scales_a_hinge_loss(batch, beta, gamma, margin, reduce, floor, smoothing, factor):
    options = {"link": "hinge", "reduce": reduce, "reference_floor": floor, **smoothing}
    plain = preference_loss(**batch, beta=beta, gamma=gamma, margin=margin, **options)
    scaled = preference_loss(**batch, beta=factor * beta, gamma=factor * gamma, margin=factor * margin, **options)
    assert_same(scaled.loss, factor * plain.loss)


@PROPERTY
@given(batches(), betas, gammas, margins, links, reductions, smoothings)
@pytest.mark.slow
def test_a_pair_does_not_see_its_batch(batch, beta, gamma, margin, link, reduce, smoothing):
    options = {"beta": beta, "gamma": gamma, "margin": margin, "link": link, "reduce": reduce, **smoothing}
    together = preference_loss(**batch, **options)
    alone = [preference_loss(**{name: value[i : i + 1] for name, value in batch.items()}, **options)
             for i in range(len(together.loss))]  # fmt: skip
    for name, value in together._asdict().items():
        assert_same(torch.cat([getattr(pair, name) for pair in alone]), value)


# ---------------------------------------------------------------- gradients and weights


@PROPERTY
@given(batches(), betas, gammas, margins, links, smoothings)
def test_the_gradient_of_summed_log_probs_is_beta_times_the_weight(batch, beta, gamma, margin, link, smoothing):
    out, on_chosen, on_rejected = with_gradients(batch, beta=beta, gamma=gamma, margin=margin, link=link, **smoothing)
    assert_same(on_chosen, -beta * out.weight)
    assert_same(on_rejected, beta * out.weight)


@PROPERTY
@given(batches(), betas, gammas, margins, links, smoothings)
def test_the_gradient_of_per_token_log_probs_is_that_over_each_length(batch, beta, gamma, margin, link, smoothing):
    options = {"beta": beta, "gamma": gamma, "margin": margin, "link": link, "reduce": "mean", **smoothing}
    out, on_chosen, on_rejected = with_gradients(batch, **options)
    assert_same(on_chosen, -beta * out.weight / batch["chosen_lengths"])
    assert_same(on_rejected, beta * out.weight / batch["rejected_lengths"])


@PROPERTY
@given(batches(), betas, positive_gammas, margins, reductions, floors)
def test_a_logistic_weight_is_sigma_of_minus_the_score(batch, beta, gamma, margin, reduce, floor):
    """So it lies in [0, 1] and falls with z."""
    options = {"beta": beta, "gamma": gamma, "margin": margin, "reduce": reduce, "reference_floor": floor}
    out = preference_loss(**batch, link="logistic", **options)
    assert_same(out.weight, 1 / (1 + torch.exp(out.score.clamp(max=700))))
    assert bool((out.weight >= 0).all())


@PROPERTY
@given(batches(), betas, positive_gammas, margins, reductions, floors)
def test_a_hinge_weight_is_one_below_zero_and_zero_from_there_on(batch, beta, gamma, margin, reduce, floor):
    options = {"beta": beta, "gamma": gamma, "margin": margin, "reduce": reduce, "reference_floor": floor}
    out = preference_loss(**batch, link="hinge", **options)
    # Autograd's slope over beta is 1 up to one rounding, β·(1/β).
    assert_same(out.weight, (out.score < 0).double())
    assert bool((out.weight >= 0).all())


@PROPERTY
@given(batches(), betas, gammas, margins, links, reductions, st.floats(0.0, 4.0))
def test_the_sft_term_leaves_score_weight_and_rewards_alone(batch, beta, gamma, margin, link, reduce, sft_weight):
    options = {"beta": beta, "gamma": gamma, "margin": margin, "link": link, "reduce": reduce}
    without, with_sft = preference_loss(**batch, **options), preference_loss(**batch, sft_weight=sft_weight, **options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(with_sft[1:], without[1:], strict=True))
    assert_same(with_sft.loss - without.loss, -sft_weight * batch["policy_chosen"] / batch["chosen_lengths"])

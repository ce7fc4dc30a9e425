"""The loss: a hinge that never starts, smoothing that is ignored, a term that nobody asked for, ties counted as wrong."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pe_dpo.errors import RecipeError, TrainingError
from pe_dpo.metrics.catalogue import pair_metrics
from pe_dpo.recipe import describe, recipe_from_yaml
from pe_dpo.recipe.loss_section import LossSection
from pe_dpo.training.start import check_start

pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
pytestmark = pytest.mark.peer

DEAD_HINGE = {"link": "hinge", "beta": 0.1, "gamma": 0.1, "margin": 0.0}
SIMPO = {"reduce": "mean", "beta": 2.0, "gamma": 0.0, "margin": 0.5}
THEIR_SIMPO = {"kind": "cpo", "loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}


@pytest.fixture
def our_trainer(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
) -> Callable[..., Any]:
    """Build our trainer over rows with a loss; `noise` gives B ≠ 0."""

    def make(rows: list[dict[str, str]], loss: dict[str, Any], *, noise: bool = True) -> Any:
        return pair_trainer(attach(make_base(), noise=noise), encode(rows), loss)

    return make


def swapped(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


# A hinge with γ = β and margin 0; TRL has no hinge without a margin


def test_a_hinge_with_gamma_equal_to_beta_and_no_margin_has_no_gradient_at_step_0(
    our_trainer: Callable[..., Any], our_step: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    step = our_step(our_trainer(rows, DEAD_HINGE, noise=False))
    assert step.loss == 0
    assert not step.gradient.any()


def test_a_recipe_of_a_hinge_that_cannot_start_is_refused_with_the_remedy() -> None:
    text = "model: {base: b}\ndata: {train: d}\nloss:\n  link: hinge\n  gamma: 1x\noutput: o\n"
    with pytest.raises(RecipeError, match=r"^r\.yaml:5: loss\.gamma: .*; set margin > 0, or gamma different from beta"):
        recipe_from_yaml(text, "r.yaml")


def test_a_hinge_whose_margin_column_is_0_everywhere_is_refused_before_step_1(
    our_trainer: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    trainer = our_trainer(rows, DEAD_HINGE, noise=False)
    with pytest.raises(TrainingError, match="all 6 pairs have score 0 and pull with weight 0"):
        check_start(
            trainer.model,
            trainer.train_dataset,
            trainer.scorer,
            loss=replace(trainer.loss, margin_scale=1.0),
            policy_is_reference=True,
        )


# Label smoothing


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_trl_ignores_label_smoothing_for_its_two_commonest_losses(
    make_base: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    peer_step: Callable[..., Any],
    rows: list[dict[str, str]],
    loss_type: str,
) -> None:
    plain, smoothed = (
        peer_step(peer_trainer(make_base(), rows, loss_type=loss_type, label_smoothing=epsilon)) for epsilon in (0.0, 0.3)
    )
    assert smoothed.loss == plain.loss
    assert torch.equal(smoothed.gradient, plain.gradient)


def test_our_label_smoothing_mixes_the_losses_of_both_labels(
    our_trainer: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    trainer = our_trainer(rows, {"beta": 0.3, "gamma": 0.3, "label_smoothing": 0.3})
    scored, out = trainer.forward_pairs(trainer.model, trainer.train_dataset)
    for index, loss in enumerate(out.loss.tolist()):
        policy = float(scored.policy_chosen[index] - scored.policy_rejected[index])
        reference = float(scored.reference_chosen[index] - scored.reference_rejected[index])
        z = 0.3 * (policy - reference)
        assert loss == pytest.approx(0.7 * math.log1p(math.exp(-z)) + 0.3 * math.log1p(math.exp(z)), rel=1e-9)


def test_trl_smooths_simpo_towards_something_that_is_not_the_loss_of_the_swapped_pair(
    make_base: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    peer_step: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    def loss(rows: list[dict[str, str]], epsilon: float) -> float:
        options = {"cpo_alpha": 0.0, "label_smoothing": epsilon}
        return peer_step(peer_trainer(make_base(), rows, **THEIR_SIMPO, **options)).loss

    mixture = 0.7 * loss(rows, 0.0) + 0.3 * loss(swapped(rows), 0.0)
    assert loss(rows, 0.3) < 0.9 * mixture


def test_our_simpo_is_smoothed_towards_trls_loss_of_the_swapped_pair(
    make_base: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    peer_step: Callable[..., Any],
    our_trainer: Callable[..., Any],
    our_step: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    straight, turned = (
        peer_step(peer_trainer(make_base(), some, **THEIR_SIMPO, cpo_alpha=0.0)) for some in (rows, swapped(rows))
    )
    ours = our_step(our_trainer(rows, SIMPO | {"label_smoothing": 0.3}))
    assert ours.loss == pytest.approx(0.7 * straight.loss + 0.3 * turned.loss, rel=1e-5)
    gradient = 0.7 * straight.gradient + 0.3 * turned.gradient
    assert (ours.gradient - gradient).norm() <= 1e-5 * gradient.norm()


# SimPO's silent term


def test_trl_adds_the_negative_log_likelihood_of_the_chosen_answer_to_simpo_by_default(
    make_base: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    peer_step: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    by_default, alone = (
        peer_step(peer_trainer(make_base(), rows, **THEIR_SIMPO, **options)) for options in ({}, {"cpo_alpha": 0.0})
    )
    assert by_default.loss > alone.loss + 1


def test_our_simpo_preset_is_trls_simpo_without_that_term(
    make_base: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    peer_step: Callable[..., Any],
    our_trainer: Callable[..., Any],
    our_step: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    theirs = peer_step(peer_trainer(make_base(), rows, **(THEIR_SIMPO | {"simpo_gamma": 1.0}), cpo_alpha=0.0))
    assert our_step(our_trainer(rows, {"preset": "simpo"})).loss == pytest.approx(theirs.loss, rel=1e-5)


def test_the_formula_of_a_loss_says_what_is_added() -> None:
    assert "NLL" not in describe(LossSection(preset="simpo")).formula
    assert "+ 1·NLL(chosen)/|chosen|" in describe(LossSection(preset="simpo", sft_weight=1.0)).formula


# Ties


def test_trl_shows_a_reward_accuracy_of_0_at_step_0(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    peer = peer_trainer(make_base(), rows, noise=False, max_steps=1)
    peer.train()
    assert peer.state.log_history[0]["rewards/accuracies"] == 0


def test_our_reward_accuracy_at_step_0_is_one_half(our_trainer: Callable[..., Any], rows: list[dict[str, str]]) -> None:
    trainer = our_trainer(rows, {}, noise=False)
    scored, _ = trainer.forward_pairs(trainer.model, trainer.train_dataset)
    assert pair_metrics(scored)["rewards/accuracies"] == 0.5

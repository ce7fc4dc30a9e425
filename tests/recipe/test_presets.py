"""Named losses: their coefficients written out from the papers, and that nothing else hides in a name."""

import dataclasses
import inspect
from typing import Any

import pytest

from pe_dpo.objective import Loss, preference_loss
from pe_dpo.recipe import PRESETS
from pe_dpo.recipe.loss_section import LossSection

PLAIN = {
    "beta": 0.1, "gamma": 0.1, "margin": 0.0, "link": "logistic", "reduce": "sum", "reference_floor": None,
    "label_smoothing": 0.0, "label_smoothing_mode": "conservative", "sft_weight": 0.0, "length_penalty": 0.0,
    "rejected_weight": 1.0, "margin_scale": 0.0,
}  # fmt: skip

PAPERS: dict[str, dict[str, Any]] = {
    # −log σ(β·(Δπ − Δ0)); Rafailov et al. eq. 7
    "dpo": {},
    # −log σ(β·Δπ − γ·Δ0); Cho's post, half of DPO's reference
    "gdpo": {"gamma": 0.05},
    # −log σ(αβ_H·Δπ − β_H·Δ0): β = αβ_H = 0.1, γ = β_H = 0.11, α = 1/1.1 < 1
    "hdpo": {"gamma": 0.11},
    # (1−ε)·f(z) + ε·f(−z); Mitchell's note
    "cdpo": {"label_smoothing": 0.1},
    # ((1−ε)·f(z) − ε·f(−z)) / (1−2ε); Chowdhury et al.
    "robust": {"label_smoothing": 0.1, "label_smoothing_mode": "unbiased"},
    # (Δπ − Δ0 − 1/(2τ))² times τ²; Azar et al., τ = 0.1
    "ipo": {"margin": 0.5, "link": "squared", "reduce": "mean"},
    # max(0, 1 − γ·(Δπ − Δ0)); Liu et al.
    "hinge": {"margin": 1.0, "link": "hinge"},
    # max(0, γ·Δ0 − β·Δπ) of Cho's post, and a margin
    "gen-hinge": {"gamma": 0.05, "margin": 1.0, "link": "hinge"},
    # max(0, δ − Δπ) − λ·log π(reference answer); Zhao et al.
    "slic": {"beta": 1.0, "gamma": 0.0, "margin": 1.0, "link": "hinge", "sft_weight": 0.1},
    # −log σ(β·Δπ per token − γ); Meng et al.: β = 2, γ/β = 0.5 for Llama-3-Base
    "simpo": {"beta": 2.0, "gamma": 0.0, "margin": 1.0, "reduce": "mean"},
    # max(0, γ − Δπ per token); Wu et al., γ = 0.5
    "repo": {"beta": 1.0, "gamma": 0.0, "margin": 0.5, "link": "hinge", "reduce": "mean"},
    # −log σ(β·Δπ) − log π(chosen); Xu et al.
    "cpo": {"gamma": 0.0, "sft_weight": 1.0},
    # −log σ(β·(Δπ − Δ0) per token); Tülu 3, β = 5
    "dpo-norm": {"beta": 5.0, "gamma": 5.0, "reduce": "mean"},
    # −log σ(β·(Δπ − max(Δ0, 0)))
    "hypo": {"reference_floor": 0.0},
    # −log σ(β·(Δπ − Δ0) + α·(|chosen| − |rejected|)); Park et al., α = 0.01
    "rdpo": {"length_penalty": 0.01},
    # −log σ(β·((log π+ − f(λ)·log π−) − (log π0+ − f(λ)·log π0−))); Yang et al., β and f(λ) of the models that they published
    "dpo-shift": {"beta": 0.01, "gamma": 0.01, "rejected_weight": 0.95},
}


def test_every_preset_is_written_out_here() -> None:
    assert list(PRESETS) == list(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_has_the_coefficients_of_its_paper(name: str) -> None:
    found = LossSection(preset=name).coefficients()
    assert found == {**PLAIN, **PAPERS[name], "gamma": pytest.approx(PAPERS[name].get("gamma", 0.1), rel=1e-12)}


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_leaves_the_margin_column_alone(name: str) -> None:
    assert LossSection(preset=name).margin_scale == 0.0


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_says_where_it_was_published(name: str) -> None:
    assert PRESETS[name].title
    assert PRESETS[name].source.count(" ") >= 1


@pytest.mark.parametrize(("theirs", "ours"), [("sigmoid", "dpo"), ("sigmoid_norm", "dpo-norm"), ("rso", "hinge")])
def test_other_names_of_a_loss_are_that_loss(theirs: str, ours: str) -> None:
    assert LossSection(preset=theirs) == LossSection(preset=ours)


@pytest.mark.parametrize("name", [
    "orpo", "kto", "kto_pair", "apo_zero", "apo_down", "bco_pair", "sppo_hard", "nca_pair", "exo_pair", "aot", "aot_unpaired",
    "discopop", "sft",
])  # fmt: skip
def test_losses_that_are_not_here_say_what_they_are_and_what_is_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is not here: .*(nearest|use an SFT tool)"):
        LossSection(preset=name)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_ipo_aims_where_its_beta_says(beta: float) -> None:
    """(β·x − ½)² is least at x = 1/(2β) nats per token; a resolved recipe read again aims at the same."""
    loss = LossSection(preset="ipo", beta=beta)
    assert loss.margin / loss.beta == pytest.approx(1 / (2 * beta), rel=1e-12)
    assert LossSection(**loss.model_dump()) == loss


def test_gamma_follows_a_beta_that_is_set_beside_a_preset() -> None:
    assert LossSection(preset="hinge", beta=0.4).gamma_value == 0.4
    assert LossSection(preset="gdpo", beta=0.4).gamma_value == pytest.approx(0.2, rel=1e-12)
    assert LossSection(preset="simpo", beta=10.0).gamma_value == 0.0


@pytest.mark.parametrize(("multiple", "gamma"), [("1x", 0.3), ("0x", 0.0), (".5x", 0.15), ("2.5x", 0.75), ("1e-1x", 0.03)])
def test_a_multiple_is_times_beta(multiple: str, gamma: float) -> None:
    assert LossSection(beta=0.3, gamma=multiple).gamma_value == pytest.approx(gamma, rel=1e-12)


def test_the_coefficients_are_the_arguments_of_the_loss() -> None:
    """What a recipe says and what the mathematics takes are the same words; the margin column alone has a scale besides."""
    arguments = {name for name, one in inspect.signature(preference_loss).parameters.items() if one.kind is one.KEYWORD_ONLY}
    fields = arguments - {"chosen_lengths", "rejected_lengths", "pair_margin"} | {"margin_scale"}
    assert set(LossSection().coefficients()) == {field.name for field in dataclasses.fields(Loss)} == fields

"""A loss in words: its formula with the numbers filled in, κ, and the name under which it was published."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pe_dpo.objective import Loss, PairLogprobs
from pe_dpo.recipe import describe
from pe_dpo.recipe.describe import name_loss
from pe_dpo.recipe.loss_section import LossSection

SUMMED = "log p(chosen) − log p(rejected), summed over tokens"
PER_TOKEN = "log p(chosen)/|chosen| − log p(rejected)/|rejected|, per token"

PUBLISHED = {
    "dpo": "DPO (Rafailov et al. 2023, arXiv 2305.18290)",
    "gdpo": "generalized DPO (not the online method GDPO) (Cho, 'Continued musing on DPO')",
    "hdpo": "H-DPO with α = β/γ (Omura et al. 2024, arXiv 2411.07595)",
    "cdpo": "conservative DPO (Mitchell 2023",
    "robust": "robust DPO (Chowdhury et al. 2024, arXiv 2403.00409)",
    "ipo": "IPO with τ =",
    "hinge": "the hinge loss, RSO's hinge-norm (Liu et al. 2023, arXiv 2309.06657)",
    "gen-hinge": "generalized hinge (Cho",
    "slic": "SLiC-HF (Zhao et al. 2023, arXiv 2305.10425)",
    "simpo": "SimPO (Meng et al. 2024, arXiv 2405.14734)",
    "repo": "RePO (Wu et al. 2025, arXiv 2503.07426)",
    "cpo": "CPO (Xu et al. 2024, arXiv 2401.08417)",
    "dpo-norm": "length-normalised DPO (Lambert et al. 2024 (Tülu 3), arXiv 2411.15124)",
    "hypo": "HyPO (arXiv 2602.11902)",
    "rdpo": "R-DPO (Park et al. 2024, arXiv 2403.19159)",
    "dpo-shift": "DPO-Shift with f(λ) fixed (Yang et al. 2025, arXiv 2502.07599)",
}
UNPUBLISHED = "no published loss by itself: a mixture of the terms above"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_called_by_its_published_name(name: str) -> None:
    assert PUBLISHED[name] in describe(LossSection(preset=name)).equals


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"gdpo", "hdpo"}))
def test_a_preset_other_than_generalized_dpo_has_one_name_only(name: str) -> None:
    """gdpo and hdpo are one form with κ on either side of 1; every other form is one paper's."""
    assert ";" not in describe(LossSection(preset=name)).equals


@pytest.mark.parametrize(("loss", "published"), [
    ({"beta": 0.5}, "dpo"),
    ({"beta": 0.3, "gamma": 0.3}, "dpo"),
    ({"gamma": "2x"}, "gdpo"),
    ({"gamma": 0, "reduce": "mean", "margin": 0.3, "beta": 10.0}, "simpo"),
    ({"link": "hinge", "margin": 1.0}, "hinge"),
    ({"preset": "simpo", "link": "hinge"}, "repo"),
    ({"reference_floor": 0.0, "beta": 1.0}, "hypo"),
    ({"rejected_weight": 0.6}, "dpo-shift"),
    ({"preset": "slic", "sft_weight": 0.5, "margin": 2.0}, "slic"),
])  # fmt: skip
def test_a_mixture_that_is_a_published_loss_is_recognised(loss: dict[str, Any], published: str) -> None:
    assert PUBLISHED[published] in describe(LossSection(**loss)).equals


@pytest.mark.parametrize("loss", [
    {"preset": "simpo", "gamma": "0.5x"},
    {"preset": "gen-hinge", "gamma": 0},
    {"margin": 0.5},
    {"preset": "simpo", "margin": 0.0},
    {"reference_floor": -1.0},
    {"margin_scale": 1.0},
    {"length_penalty": -0.01},
    {"rejected_weight": 1.2},
    {"preset": "simpo", "rejected_weight": 0.9},
    {"sft_weight": 0.1},
    {"preset": "slic", "beta": 0.5},
    {"preset": "ipo", "reduce": "sum"},
])  # fmt: skip
def test_a_mixture_that_nobody_published_is_said_to_be_one(loss: dict[str, Any]) -> None:
    assert describe(LossSection(**loss)).equals == UNPUBLISHED


def test_the_temperature_of_ipo_accounts_for_beta() -> None:
    """(β·(Δπ−Δ0) − m)² = β²·(Δπ−Δ0 − m/β)², and IPO's target is 1/(2τ): τ = β/(2m)."""
    assert "τ = β/(2·margin)" in describe(LossSection(preset="ipo", beta=0.5)).equals


@pytest.mark.parametrize(("loss", "formula"), [
    ({}, f"−log σ(z),  z = 0.1·Δπ − 0.1·Δ0,  Δ = {SUMMED}"),
    ({"preset": "simpo"}, f"−log σ(z),  z = 2·Δπ − 1,  Δ = {PER_TOKEN}"),
    ({"preset": "slic"}, f"max(0, −z) + 0.1·NLL(chosen)/|chosen|,  z = 1·Δπ − 1,  Δ = {SUMMED}"),
    ({"preset": "ipo"}, f"z²,  z = 0.1·Δπ − 0.1·Δ0 − 0.5,  Δ = {PER_TOKEN}"),
    ({"preset": "hypo"}, f"−log σ(z),  z = 0.1·Δπ − 0.1·max(Δ0, 0),  Δ = {SUMMED}"),
    ({"preset": "rdpo"}, f"−log σ(z),  z = 0.1·Δπ − 0.1·Δ0 + 0.01·(|chosen| − |rejected|),  Δ = {SUMMED}"),
    ({"preset": "cdpo"}, f"0.9·[−log σ(z)] + 0.1·[−log σ(z′)],  z = 0.1·Δπ − 0.1·Δ0,  Δ = {SUMMED}"),
    ({"preset": "robust"}, f"(0.9·[−log σ(z)] − 0.1·[−log σ(z′)]) / 0.8,  z = 0.1·Δπ − 0.1·Δ0,  Δ = {SUMMED}"),
    ({"preset": "dpo-shift"}, "−log σ(z),  z = 0.01·Δλπ − 0.01·Δλ0,  Δλ = log p(chosen) − 0.95·log p(rejected), "
     "summed over tokens"),
    ({"preset": "simpo", "rejected_weight": 0.5}, "−log σ(z),  z = 2·Δλπ − 1,  Δλ = log p(chosen)/|chosen| − "
     "0.5·log p(rejected)/|rejected|, per token"),
    ({"margin": -2.0, "margin_scale": 0.5}, f"−log σ(z),  z = 0.1·Δπ − 0.1·Δ0 + 2 − 0.5·margin column,  Δ = {SUMMED}"),
])  # fmt: skip
def test_the_formula_is_the_loss_with_its_numbers(loss: dict[str, Any], formula: str) -> None:
    assert describe(LossSection(**loss)).formula == formula


def test_a_negative_length_penalty_is_subtracted_in_the_formula() -> None:
    assert "− 0.01·(|chosen| − |rejected|)" in describe(LossSection(length_penalty=-0.01)).formula


@pytest.mark.parametrize(("loss", "value"), [
    ({"preset": "dpo"}, math.log1p(math.exp(-0.2))),
    ({"preset": "hinge"}, 0.8),
    ({"preset": "hypo", "beta": 0.5}, math.log1p(math.exp(-1.0))),
])  # fmt: skip
def test_the_formula_is_what_the_loss_computes(loss: dict[str, Any], value: float) -> None:
    """Δπ = 4, Δ0 = 2: z = 0.1·4 − 0.1·2 = 0.2; with RSO's margin z = −0.8; with β = 0.5 and floor 0 z = 2 − 1 = 1."""
    chosen, rejected, *before = (torch.tensor([nats], dtype=torch.float64) for nats in (-6.0, -10.0, -7.0, -9.0))
    policy, reference = (PairLogprobs(*both, *torch.ones(2, 1)) for both in ((chosen, rejected), before))
    assert Loss(**LossSection(**loss).coefficients())(policy, reference, torch.zeros(1)).loss.item() == pytest.approx(
        value, rel=1e-12
    )


@pytest.mark.parametrize(("gamma", "note"), [
    (0.2, "κ > 1: learning starts on pairs that the reference already ranks right"),
    (0.05, "κ < 1: learning starts on pairs that the reference ranks wrong"),
    (0.1, "κ = 1: every pair starts with weight ½ and loss log 2"),
    (0, "κ = 0: the reference is never run"),
])  # fmt: skip
def test_the_notes_say_where_learning_starts(gamma: float, note: str) -> None:
    assert describe(LossSection(gamma=gamma)).notes == [note]


def test_a_rejected_weight_says_how_the_answers_are_pulled_and_nothing_of_rankings() -> None:
    """γ ≠ β weighs pairs by log π0(chosen) − λ·log π0(rejected), which is not how the reference ranks them."""
    pull = "a rejected answer is pulled down 0.95 times as hard as its chosen one is pulled up"
    assert describe(LossSection(preset="dpo-shift")).notes == ["κ = 1: every pair starts with weight ½ and loss log 2", pull]
    assert describe(LossSection(preset="dpo-shift", gamma="2x")).notes == [pull]
    (note, _) = describe(LossSection(preset="cdpo", rejected_weight=0.9)).notes
    assert note.endswith("(the margin keeps its sign, and 0.9 is on the other answer)")


@pytest.mark.parametrize(("loss", "columns", "start"), [
    ({}, ("beta",), "−log σ(z),  z = β·Δπ − β·Δ0,  Δ"),
    ({"gamma": "0.5x", "margin": 1.0}, ("beta",), "−log σ(z),  z = β·Δπ − 0.5·β·Δ0 − 1,  Δ"),
    ({"preset": "simpo"}, ("beta",), "−log σ(z),  z = β·Δπ − 1,  Δ"),
    ({"preset": "cpo"}, ("weight",), "weight·(−log σ(z) + 1·NLL(chosen)/|chosen|),  z = 0.1·Δπ,  Δ"),
])  # fmt: skip
def test_numbers_of_each_pair_stay_letters_in_the_formula(loss: dict[str, Any], columns: tuple[str, ...], start: str) -> None:
    found = describe(LossSection(**loss), columns)
    assert found.formula.startswith(start)
    assert not any("log 2" in note for note in found.notes)  # each pair starts with its own weight
    assert any(note.startswith(f"{'β' if columns == ('beta',) else 'weight'} is each pair's own") for note in found.notes)


@pytest.mark.parametrize("loss", [{"link": "hinge", "margin": 1.0}, {"margin": 1.0}])
def test_weight_one_half_is_claimed_for_plain_dpo_only(loss: dict[str, Any]) -> None:
    assert describe(LossSection(**loss)).notes == []


def test_label_smoothing_says_what_the_swapped_score_is() -> None:
    (note, _) = describe(LossSection(preset="cdpo")).notes
    assert note == "z′ is the score of the pair with its labels swapped (the margin keeps its sign)"


def test_the_lines_for_people_hold_formula_kappa_and_name() -> None:
    lines = describe(LossSection(gamma=0.05)).lines()
    assert lines[0].startswith("loss    −log σ(z),  z = 0.1·Δπ − 0.05·Δ0")
    assert lines[1] == "κ = γ/β 0.5"
    assert lines[2].startswith("equals  generalized DPO")


finite = st.floats(-1e6, 1e6)
losses = st.fixed_dictionaries(
    {"beta": st.floats(1e-6, 1e6), "gamma": st.one_of(st.just(0.0), st.floats(0, 1e6))},
    optional={
        "preset": st.sampled_from(sorted({*PUBLISHED} - {"dpo-shift"})),  # which writes Δλ
        "margin": finite,
        "link": st.sampled_from(["logistic", "hinge", "squared"]),
        "reduce": st.sampled_from(["sum", "mean"]),
        "label_smoothing": st.floats(0, 0.5, exclude_max=True),
        "label_smoothing_mode": st.sampled_from(["conservative", "unbiased"]),
        "sft_weight": st.floats(0, 1e6),
        "length_penalty": finite,
        "margin_scale": finite,
    },
)


@given(losses, st.one_of(st.none(), finite))
def test_any_loss_can_be_described_and_kappa_is_gamma_over_beta(loss: dict[str, Any], floor: float | None) -> None:
    section = LossSection(**loss, reference_floor=floor if loss["gamma"] else None)
    description = describe(section)
    assert description.kappa == pytest.approx(loss["gamma"] / loss["beta"], rel=1e-12)
    assert description.formula.count("Δπ") == 1
    assert ("Δ0" in description.formula) == (loss["gamma"] != 0)
    assert len(description.lines()) == 3 + len(description.notes)


@given(beta=st.floats(1e-6, 1e6), kappa=st.floats(0, 1e3))
def test_a_multiple_of_beta_is_kappa(beta: float, kappa: float) -> None:
    assert describe(LossSection(beta=beta, gamma=f"{kappa!r}x")).kappa == pytest.approx(kappa, rel=1e-12)


def test_one_line_has_the_name_what_the_loss_is_made_of_and_where_the_formula_stands():
    lines = [name_loss(loss) for loss in (
        LossSection(), LossSection(gamma="0.5x"), LossSection(preset="ipo"), LossSection(preset="simpo"),
        LossSection(sft_weight=1, margin=2, gamma="auto", label_smoothing=0.1),
    )]  # fmt: skip
    assert [line.removesuffix("; formula: pe-dpo recipes show RECIPE") for line in lines] == [
        "loss: DPO, beta 0.1, gamma 0.1, margin 0, link logistic, reduce sum",
        "loss: generalized DPO, beta 0.1, gamma 0.05, margin 0, link logistic, reduce sum",
        "loss: IPO, beta 0.1, gamma 0.1, margin 0.5, link squared, reduce mean",
        "loss: SimPO, beta 2, gamma 0, margin 1, link logistic, reduce mean",
        "loss: no published one, beta 0.1, gamma auto (found from the data), margin 2, link logistic, reduce sum, "
        "label_smoothing 0.1, sft_weight 1",
    ]

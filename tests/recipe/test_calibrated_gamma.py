"""A γ that is to be found from data: accepted, described, and never taken for a number before it is one."""

import json

import pytest

from pe_dpo.errors import RecipeError
from pe_dpo.recipe import Recipe, describe, recipe_from_yaml, recipe_to_yaml, warnings, with_gamma
from pe_dpo.recipe.loss_section import LossSection

WAYS = ["auto", "balance:0.5", "balance:.25", "scale:1", "scale:2e-1"]


def read(loss: str = "", *overrides: str) -> Recipe:
    return recipe_from_yaml(f"model: {{base: b}}\ndata: {{train: d}}\noutput: o\nloss: {{{loss}}}", "r.yaml", overrides)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_accepted_in_a_file_and_on_the_command_line(way: str) -> None:
    assert read(f"gamma: {way}").loss.gamma == way
    assert read("", f"loss.gamma={way}").loss.is_calibrated


@pytest.mark.parametrize("gamma", ["1x", 0, 0.3, "0.5x"])
def test_a_number_or_a_multiple_is_not_to_be_calibrated(gamma: float | str) -> None:
    assert not LossSection(gamma=gamma).is_calibrated


@pytest.mark.parametrize("way", WAYS)
def test_it_is_no_number_and_says_so(way: str) -> None:
    loss = LossSection(gamma=way)
    words = f"loss.gamma: {way} becomes a number only with the reference's log-probs"
    with pytest.raises(RecipeError, match=words):
        _ = loss.gamma_value
    with pytest.raises(RecipeError, match=words):
        loss.coefficients()


@pytest.mark.parametrize(("gamma", "uses"), [("auto", True), ("1x", True), (0, False), ("0x", False), (0.1, True)])
def test_the_reference_is_needed_unless_gamma_is_zero(gamma: float | str, uses: bool) -> None:
    assert LossSection(gamma=gamma).uses_reference is uses


def test_it_is_described_without_a_number() -> None:
    found = describe(LossSection(gamma="auto"))
    assert found.formula.startswith("−log σ(z),  z = 0.1·Δπ − γ·Δ0,  Δ = ")
    assert found.kappa is None
    assert "κ = γ/β known once γ is" in found.lines()
    assert any("γ is found from the reference's log-probs of the training pairs (auto)" in line for line in found.notes)
    json.dumps(found._asdict(), allow_nan=False)


def test_it_is_a_generalized_loss_by_name_as_kappa_is_any() -> None:
    assert "generalized DPO" in describe(LossSection(gamma="scale:1")).equals


def test_a_floor_is_described_with_it() -> None:
    assert "− γ·max(Δ0, 0)" in describe(LossSection(preset="hypo", gamma="auto")).formula


def test_a_recipe_with_it_has_no_warnings_and_comes_back_from_yaml() -> None:
    recipe = read("gamma: balance:0.6")
    assert warnings(recipe) == []
    assert recipe_from_yaml(recipe_to_yaml(recipe), "again.yaml") == recipe


def test_a_hinge_with_it_is_not_taken_for_a_dead_start() -> None:
    assert read("link: hinge, gamma: auto").loss.link == "hinge"


def test_without_a_reference_there_is_nothing_to_calibrate_on() -> None:
    with pytest.raises(RecipeError, match=r"reference\.policy: skip needs loss.gamma 0, and it is auto"):
        read("gamma: auto", "reference.policy=skip")


def test_the_number_takes_its_place() -> None:
    recipe = read("gamma: auto, beta: 0.2, preset: rso")
    found = with_gamma(recipe, 0.05)
    assert (found.loss.gamma, found.loss.gamma_value, found.loss.beta, found.loss.margin) == (0.05, 0.05, 0.2, 1.0)
    assert found.model_copy(update={"loss": recipe.loss}) == recipe
    assert recipe_from_yaml(recipe_to_yaml(found), "run.yaml") == found


def test_a_number_that_contradicts_the_recipe_is_refused_with_where_it_came_from() -> None:
    with pytest.raises(
        RecipeError, match=r"loss\.gamma: auto came to 0, which cannot be used: .*reference_floor: has no effect"
    ):
        with_gamma(read("gamma: auto, reference_floor: 0"), 0.0)
    with pytest.raises(RecipeError, match=r"loss\.gamma: scale:1 came to 0.1, which cannot be used: .*zero gradient"):
        with_gamma(read("gamma: scale:1, link: hinge"), 0.1)


@pytest.mark.parametrize("way", WAYS)
def test_it_rests_on_what_a_rejected_weight_leaves_out_of_the_score(way: str) -> None:
    with pytest.raises(RecipeError, match=rf"gamma: {way} rests on Δ0, and with rejected_weight 0.9 .*multiple of beta"):
        read(f"gamma: {way}, rejected_weight: 0.9")

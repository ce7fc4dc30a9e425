"""`pe-dpo recipes`: list, show, losses, copy, schema."""

import json
import re

import pytest

from pe_dpo.recipe import PRESETS, load_recipe, recipe_names


def test_list_has_a_line_for_every_recipe_with_its_hardware(pe_dpo):
    lines = pe_dpo("recipes", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all("GPU" in line for line in lines)


@pytest.mark.parametrize("name", recipe_names())
def test_show_prints_the_file_and_its_loss_in_words(pe_dpo, name):
    done = pe_dpo("recipes", "show", name)
    assert (done.code, done.err) == (0, "")
    assert f"base: {load_recipe(name).model.base}" in done.out
    assert "\nloss    " in done.out
    assert "\nκ = γ/β " in done.out


@pytest.mark.parametrize(("name", "first", "second"), [
    ("simpo", "loss    −log σ(z),  z = 2·Δπ − 1,", "κ = γ/β 0"),
    ("rso", "loss    max(0, −z),  z = 0.1·Δπ − 0.1·Δ0 − 1,", "κ = γ/β 1"),
])  # fmt: skip
def test_show_explains_a_named_loss(pe_dpo, name, first, second):
    lines = pe_dpo("recipes", "show", name).out.splitlines()
    assert lines[0].startswith(first)
    assert lines[1] == second


def test_show_takes_a_file_of_ones_own(pe_dpo, recipe_file):
    assert pe_dpo("recipes", "show", recipe_file).out.startswith("model: {base: ")


@pytest.mark.parametrize("arguments", [("list",), ("losses",), *(("show", name) for name in (*PRESETS, *recipe_names()))])
def test_nothing_is_wider_than_the_screen(pe_dpo, arguments):
    assert max(map(len, pe_dpo("recipes", *arguments, columns=80).out.splitlines())) <= 80


def test_what_is_folded_stands_below_its_own_column(pe_dpo):
    assert pe_dpo("recipes", "show", "cdpo", columns=80).out.splitlines()[:4] == [
        "loss    0.9·[−log σ(z)] + 0.1·[−log σ(z′)],  z = 0.1·Δπ − 0.1·Δ0,  Δ = log",
        "        p(chosen) − log p(rejected), summed over tokens",
        "κ = γ/β 1",
        "equals  conservative DPO (Mitchell 2023, 'A note on DPO with noisy preferences')",
    ]


def test_show_of_nothing_names_the_nearest(pe_dpo):
    done = pe_dpo("recipes", "show", "qwen2.5-7b-dp")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: qwen2.5-7b-dp: no such file and no such recipe; did you mean qwen2.5-7b-dpo?")


def test_losses_are_listed_with_formula_source_and_other_names(pe_dpo):
    lines = pe_dpo("recipes", "losses").out.splitlines()
    assert [re.split(r"[ :]", line)[0] for line in lines[::2]] == list(PRESETS)
    assert lines[:2] == [
        "dpo (also sigmoid): DPO; Rafailov et al. 2023, arXiv 2305.18290", "    −log σ(z),  z = 0.1·Δπ − 0.1·Δ0"
    ]  # fmt: skip


def test_show_of_a_loss_that_is_not_here_says_what_is_nearest(pe_dpo):
    done = pe_dpo("recipes", "show", "orpo")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: orpo is not here: odds ratio plus likelihood, without a reference; nearest: simpo")


def test_copy_makes_a_recipe_that_loads(pe_dpo, tmp_path):
    done = pe_dpo("recipes", "copy", "qwen3-0.6b-dpo", tmp_path / "mine.yaml")
    assert (done.code, done.out.splitlines()[0]) == (0, f"copied to {tmp_path / 'mine.yaml'}")
    assert done.out.splitlines()[1].endswith(f"then: pe-dpo check {tmp_path / 'mine.yaml'}")
    assert load_recipe(tmp_path / "mine.yaml").model.base == "Qwen/Qwen3-0.6B"


def test_copy_without_a_place_copies_here(pe_dpo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pe_dpo("recipes", "copy", "qwen3-0.6b-dpo").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3-0.6b-dpo.yaml"]


def test_copy_over_something_is_refused(pe_dpo, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    done = pe_dpo("recipes", "copy", "qwen3-0.6b-dpo", tmp_path / "mine.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {tmp_path / 'mine.yaml'}: exists already; name another file\n"
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_copy_to_an_impossible_place_is_one_message(pe_dpo, tmp_path):
    (tmp_path / "file").write_text("")
    done = pe_dpo("recipes", "copy", "qwen3-0.6b-dpo", tmp_path / "file" / "mine.yaml")
    assert done.code == 2
    assert done.err.startswith(f"error: {tmp_path / 'file' / 'mine.yaml'}: ")


def test_schema_is_json_that_names_the_sections(pe_dpo):
    schema = json.loads(pe_dpo("recipes", "schema").out)
    sections = {"model", "adapter", "data", "loss", "mixout", "generation", "reference", "train", "output"}
    assert set(schema["properties"]) == sections
    assert schema["additionalProperties"] is False

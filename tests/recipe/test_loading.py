"""From files and settings to a recipe and back: who wins, where a fault is laid, and that nothing changes on the way."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pe_dpo.errors import RecipeError
from pe_dpo.recipe import Recipe, load_recipe, recipe_difference, recipe_from_yaml, recipe_names, recipe_to_yaml, warnings
from pe_dpo.recipe.load import far_places
from pe_dpo.recipe.schema import Optimizer, Schedule

RECIPE = """\
model: {base: some/base}
data: {train: pairs.jsonl}
loss:
  beta: 0.2
train: {seed: 7}
output: runs/x
"""


def read(*overrides: str, text: str = RECIPE) -> Recipe:
    return recipe_from_yaml(text, "r.yaml", overrides)


def message_of(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(*overrides)
    return str(caught.value)


def test_importing_the_recipe_room_imports_no_torch() -> None:
    """In a fresh process, because this one has torch already."""
    heavy = ["torch", "transformers", "peft", "datasets", "bitsandbytes", "numpy", "typer", "rich"]
    program = f"import sys, pe_dpo.recipe; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_recipe_that_says_only_what_it_must_gets_the_documented_defaults() -> None:
    recipe = read(text="model: {base: b}\ndata: {train: d}\noutput: o\n").model_dump()
    assert (recipe["adapter"]["rank"], recipe["adapter"]["alpha"], recipe["adapter"]["targets"]) == (16, 32.0, "all-linear")
    assert (recipe["loss"]["preset"], recipe["loss"]["beta"], recipe["loss"]["gamma"]) == ("dpo", 0.1, "1x")
    assert (recipe["train"]["pairs_per_step"], recipe["train"]["learning_rate"], recipe["train"]["epochs"]) == (64, 2e-5, 1.0)
    assert recipe["mixout"] == {"p": 0.0, "form": "column", "draws": "step", "warmup": 0.0}


def test_alpha_is_twice_the_rank_unless_it_is_said() -> None:
    assert read("adapter.rank=64").adapter.alpha == 128.0
    assert read("adapter={rank: 8, alpha: 12}").adapter.alpha == 12.0
    resolved = read("adapter.rank=64")
    assert recipe_from_yaml(recipe_to_yaml(resolved), "again") == resolved


def test_one_tracker_is_a_word() -> None:
    assert read("train.report_to=wandb").train.report_to == ["wandb"]
    assert read("train.report_to=[wandb, tensorboard]").train.report_to == ["wandb", "tensorboard"]


def test_warmup_is_a_share_or_a_number_of_steps() -> None:
    assert [read(f"train.warmup={value}").train.warmup for value in (0, 0.05, 10)] == [0, 0.05, 10]
    assert "train.warmup" in message_of("train.warmup=1.5") and "neither a share" in message_of("train.warmup=1.5")


def test_optimizers_and_schedules_have_the_names_of_transformers() -> None:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(get_args(Optimizer)) <= {one.value for one in OptimizerNames}
    assert set(get_args(Schedule)) <= {one.value for one in SchedulerType}


def test_a_section_with_nothing_under_it_is_its_defaults() -> None:
    assert read(text="model: {base: b}\ndata: {train: d}\nloss:\noutput: o\n").loss.beta == 0.1


def test_a_key_in_the_file_wins_over_its_preset() -> None:
    loss = read(text="model: {base: b}\ndata: {train: d}\noutput: o\nloss: {preset: simpo, margin: 0.3}\n").loss
    assert (loss.beta, loss.gamma_value, loss.margin, loss.reduce) == (2.0, 0.0, 0.3, "mean")


def test_a_setting_wins_over_the_file_and_a_later_one_over_an_earlier() -> None:
    recipe = read("loss.beta=0.3", "train.seed=1", "loss.beta=0.4")
    assert (recipe.loss.beta, recipe.train.seed) == (0.4, 1)


def test_a_setting_reaches_sections_that_the_file_does_not_name() -> None:
    recipe = read("adapter.rank=4", "data.columns.chosen=better", "adapter.targets=[q_proj, v_proj]")
    assert (recipe.adapter.rank, recipe.adapter.targets) == (4, ["q_proj", "v_proj"])
    assert recipe.data.columns == {"chosen": "better"}


def test_a_multiple_follows_the_beta_that_was_set() -> None:
    """0.5 × 0.4."""
    assert read("loss.gamma=0.5x", "loss.beta=0.4").loss.gamma_value == pytest.approx(0.2, rel=1e-12)


@pytest.mark.parametrize(("override", "message"), [
    ("loss.beta=0", "`overrides` loss.beta=0: loss.beta: found 0; input should be greater than 0"),
    ("loss.gama=0", "`overrides` loss.gama=0: loss.gama: unknown key; did you mean loss.gamma?"),
    ("loss.beta=", "`overrides` loss.beta=: loss.beta: found None; input should be a valid number"),
    ("output=7", "`overrides` output=7: output: found 7; input should be a valid string"),
    ("loss.gamma", "`overrides` loss.gamma: write it as section.key=value, for example loss.gamma=0"),
    ("=1", "`overrides` =1: write it as section.key=value, for example loss.gamma=0"),
    ("output.x=1", "`overrides` output.x=1: output is not a section"),
    ("model=x", "`overrides` model=x: model: found 'x'; input should be a valid dictionary or instance of ModelSection"),
])  # fmt: skip
def test_a_fault_of_a_setting_is_laid_at_the_setting(override: str, message: str) -> None:
    assert message_of(override) == message


@pytest.mark.parametrize("override", [
    "loss={beta: 0}", "loss.margin.x=1", "loop.x=1", "adapter.start=sft", "loss.preset=simp",
])  # fmt: skip
def test_a_fault_that_a_setting_brings_is_never_laid_at_the_file(override: str) -> None:
    assert message_of(override).startswith(f"`overrides` {override}: ")


def test_faults_of_file_and_settings_come_together() -> None:
    text = RECIPE.replace("beta: 0.2", "betta: 0.2")
    with pytest.raises(RecipeError) as caught:
        read("train.seed=x", text=text)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["r.yaml:4", "`overrides` train.seed=x"]


def test_a_file_without_an_output_runs_into_a_folder_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "first-try.yaml"
    path.write_text("model: {base: b}\ndata: {train: d}\n")
    assert load_recipe(path).output == "runs/first-try"


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes("output: Läufe".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"x\.yaml: cannot be read: 'utf-8' codec can't decode byte 0xe4"):
        load_recipe(path)


def test_a_line_is_named_with_the_file_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.yaml").write_text("model: {base: b}\ndata: {train: d}\n\nlr: 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^x\.yaml:4: lr: unknown key"):
        load_recipe("x.yaml")


# ---------------------------------------------------------------- and back


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_loads_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_yaml(recipe_to_yaml(recipe), "again") == recipe


def test_a_resolved_recipe_names_every_key_so_that_later_defaults_do_not_change_it() -> None:
    text = recipe_to_yaml(read())
    assert all(f"  {key}:" in text for key in ("rank", "tokens_per_microbatch", "overlong", "label_smoothing_mode", "p"))


@pytest.mark.parametrize("text", ["no", "true", "~", "12:30:45", "010", "a: b", "#5", "- x", "&a", "!t", "a\nb", " x ", "é ✓"])
def test_a_string_that_looks_like_something_else_stays_a_string(text: str) -> None:
    recipe = read().model_copy(update={"output": text})
    assert recipe_from_yaml(recipe_to_yaml(recipe), "again").output == text


@pytest.mark.parametrize("revision", ["1234e56", "5e-6", "08", "1e5"])
def test_a_revision_that_looks_like_a_number_stays_a_string(revision: str) -> None:
    """5·(10/16)⁶/16 = 1.9 % of 7-digit commit hashes are of the form 1234e56; their runs could not be evaluated or resumed."""
    recipe = read(f"model.revision='{revision}'")
    assert recipe_from_yaml(recipe_to_yaml(recipe), "again") == recipe


@pytest.mark.slow
@given(
    beta=st.floats(1e-12, 1e9),
    margin=st.floats(-1e9, 1e9),
    learning_rate=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**32 - 1),
    base=st.text(st.characters(categories=["Lu", "Ll", "Lo", "P", "S", "Zs"]), min_size=1),
)
def test_any_numbers_and_any_text_survive_the_way_to_yaml_and_back(
    beta: float, margin: float, learning_rate: float, seed: int, base: str
) -> None:
    recipe = Recipe.model_validate({
        "model": {"base": base}, "data": {"train": "d"}, "loss": {"beta": beta, "margin": margin},
        "train": {"learning_rate": learning_rate, "seed": seed}, "output": "o",
    })  # fmt: skip
    assert recipe_from_yaml(recipe_to_yaml(recipe), "again") == recipe


def test_the_difference_of_a_recipe_to_itself_is_empty() -> None:
    assert recipe_difference(read(), read()) == []


def test_the_difference_names_each_setting_with_both_values() -> None:
    old, new = read(), read("loss.beta=0.5", "train.max_steps=3", "data.columns={chosen: better}")
    assert recipe_difference(old, new) == [
        "data.columns: None → {'chosen': 'better'}",
        "loss.beta: 0.2 → 0.5",
        "train.max_steps: None → 3",
    ]


def test_the_difference_leaves_out_what_it_is_told_to_ignore() -> None:
    assert recipe_difference(read(), read("output=elsewhere", "train.seed=8"), ignore=["output"]) == ["train.seed: 7 → 8"]


# ---------------------------------------------------------------- allowed, but probably not meant


@pytest.mark.parametrize("loss", ["{link: hinge, gamma: 0, reduce: mean}", "{link: hinge, gamma: 0, reduce: mean, margin: -1}"])
def test_a_hinge_without_reference_and_margin_is_warned_of(loss: str) -> None:
    """The uniform policy has Δπ = 0 for all pairs, so z = 0 and loss 0."""
    (warning,) = warnings(read(f"loss={loss}"))
    assert warning == "loss: hinge with gamma 0 and margin 0 is content with the uniform policy; set margin > 0"


def test_summed_log_probs_without_reference_are_warned_of() -> None:
    (warning,) = warnings(read("loss.gamma=0"))
    assert warning.startswith("loss: with gamma 0 and summed log-probs shorter answers win; consider reduce: mean")


@pytest.mark.parametrize("preset", ["dpo", "simpo", "rso", "cpo", "slic", "hinge", "ipo", "repo"])
def test_published_losses_are_not_warned_of(preset: str) -> None:
    assert warnings(read(f"loss={{preset: {preset}}}")) == []


@pytest.mark.parametrize("preset", ["simpo", "cpo", "slic", "repo"])
def test_a_gamma_beside_a_loss_without_reference_is_taken_for_a_papers_letter(preset: str) -> None:
    (warning,) = warnings(read(f"loss={{preset: {preset}, gamma: 0.5}}"))
    assert "in the paper's letters γ is loss.margin" in warning


def test_a_place_outside_of_the_current_folder_is_named_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(recipe_names()[0])

    def named(**places: str) -> list[str]:
        store = recipe.reference.model_copy(update={"store": places.get("store")})
        return far_places(recipe.model_copy(update={"output": places["output"], "reference": store}))

    assert named(output="runs/x") == named(output=str(tmp_path / "here" / "x")) == []
    assert named(output="../x") == named(output="link/x") == [f"output lies outside of this folder: {tmp_path / 'x'}"]
    assert named(output="x", store="/s.sqlite") == ["reference.store lies outside of this folder: /s.sqlite"]


def test_a_recipe_takes_no_secret_of_the_environment_into_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("DATA", "/data")
    text = "model: {base: b}\ndata: {train: %s}\noutput: x"
    assert recipe_from_yaml(text % "$DATA/a.jsonl", "x").data.train == "/data/a.jsonl"
    with pytest.raises(RecipeError, match="takes a secret of the environment into a path") as error:
        recipe_from_yaml(text % "$HF_TOKEN/a.jsonl", "x")
    assert "abcdef" not in str(error.value)


def test_no_recipe_names_a_program_that_is_run():
    with pytest.raises(RecipeError, match=r"generation\.scorer: unknown key: no recipe names a program that is run"):
        read("generation.scorer=judge.py:score")

"""From a recipe and grids to the runs of a sweep."""

import json

import pytest

from pe_dpo.errors import RecipeError, RunFolderError, UsageError
from pe_dpo.experiments.plan import joined_plan, make_plan, read_plan, save_plan


@pytest.fixture
def source(tiny_base, tiny_pairs, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(f"model: {{base: '{tiny_base}'}}\ndata: {{train: '{tiny_pairs}'}}\nloss: {{beta: 0.1}}\n")
    return path


def names(plan):
    return [point.name for point in plan.points]


def test_a_grid_is_the_product_of_its_axes(source):
    plan = make_plan(source, [["gamma=0,0.5x", "mixout=0,0.5"]])
    assert [recipe.loss.gamma for recipe in plan.recipes] == [0, 0, "0.5x", "0.5x"]
    assert [recipe.mixout.p for recipe in plan.recipes] == [0, 0.5, 0, 0.5]
    assert names(plan) == ["gamma=0", "gamma=0,mixout=0.5", "gamma=0.5x", "gamma=0.5x,mixout=0.5"]


def test_a_point_says_only_what_is_turned_away_from_the_recipe(source):
    plan = make_plan(source, [["gamma=1x,2x", "beta=0.1"]])
    assert [point.settings for point in plan.points] == [{}, {"loss.gamma": "2x"}]
    assert names(plan) == ["base", "gamma=2x"]


def test_further_grids_are_joined_and_a_point_is_run_once(source):
    plan = make_plan(source, [["gamma=0,1x"], ["beta=0.1,0.2"], ["loss.beta=0.2"]])
    assert names(plan) == ["gamma=0", "base", "beta=0.2"]


def test_every_seed_is_a_run_of_its_own(source):
    plan = make_plan(source, [["mixout=0.3"]], seeds=[4, 5])
    assert [point.seed for point in plan.points] == [recipe.train.seed for recipe in plan.recipes] == [4, 5]
    assert [point.folder for point in plan.points] == ["runs/mixout=0.3/seed-4", "runs/mixout=0.3/seed-5"]
    assert len({recipe.output for recipe in plan.recipes}) == 2


def test_one_source_of_chance_is_an_axis(source, tmp_path):
    plan = make_plan(source, [["beta=0.1,0.2", "train.seeds.order=0,1"]], folder=tmp_path / "sweep")
    assert [recipe.train.seed_of("order") for recipe in plan.recipes] == [0, 1, 0, 1]
    assert {recipe.train.seed_of("adapter") for recipe in plan.recipes} == {0}
    assert names(plan)[-1] == "beta=0.2,train.seeds.order=1"
    assert read_plan(save_plan(plan).folder).recipes == plan.recipes
    with pytest.raises(UsageError, match="one set of pairs"):
        make_plan(source, [["train.seeds.data=0,1"]])


def test_seeds_that_would_be_one_run_are_refused(source):
    fixed = [f"train.seeds.{what}=0" for what in ("order", "adapter", "masks")]
    make_plan(source, [], overrides=fixed[1:], seeds=[0, 1])
    with pytest.raises(UsageError, match="would be one run"):
        make_plan(source, [], overrides=fixed, seeds=[0, 1])


def test_the_dropout_control_is_a_twin_without_mixout(source):
    plan = make_plan(source, [["mixout=0,0.3", "gamma=0"]], dropout_control=True)
    assert names(plan) == ["gamma=0", "gamma=0,mixout=0.3", "dropout=0.3,gamma=0"]
    assert (plan.recipes[2].mixout.p, plan.recipes[2].adapter.dropout) == (0, 0.3)


def test_mixout_of_the_recipe_itself_has_its_dropout_twin_too(source):
    plan = make_plan(source, [["gamma=0,1x"], ["mixout=0.3"]], overrides=["mixout.p=0.5"], dropout_control=True)
    assert [(recipe.loss.gamma, recipe.mixout.p, recipe.adapter.dropout) for recipe in plan.recipes] == [
        (0, 0.5, 0), ("1x", 0.5, 0), ("1x", 0.3, 0), (0, 0, 0.5), ("1x", 0, 0.5), ("1x", 0, 0.3),
    ]  # fmt: skip


def test_a_mixout_that_is_no_number_is_listed_with_a_dropout_control_too(source):
    with pytest.raises(RecipeError, match=r"mixout.p=much"):
        make_plan(source, [["mixout=much"]], dropout_control=True)


def test_two_points_never_share_a_folder(source):
    with pytest.raises(RecipeError, match=r"its folder would be"):
        make_plan(source, [["adapter.targets=[q_proj],['q_proj ']"]])


def test_no_grid_is_the_recipe_itself(source):
    assert names(make_plan(source, [], seeds=[0, 1])) == ["base", "base"]


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ("gama=0,1", "gama is neither a hyperparameter"),
        ("rejected_weight=0.9,1", "nor a dotted key of a recipe; did you mean loss.rejected_weight?"),
        ("gamma", "write it as key=value,value"),
        ("gamma=", "write it as key=value,value"),
        ("model.base=a,b", "one base and one set of pairs"),
        ("data.limit=1,2", "one base and one set of pairs"),
        ("seed=1,2", "`seeds`"),
        ("output=a,b", "set by the sweep itself"),
    ],
)
def test_an_axis_that_cannot_be_is_refused(source, axis, words):
    with pytest.raises(UsageError, match=words):
        make_plan(source, [[axis]])


def test_a_key_is_an_axis_once(source):
    """Else the later axis would silently take the place of the earlier one."""
    with pytest.raises(UsageError, match=r"`grids` beta=0.1 loss.beta=0.2: loss.beta is there twice"):
        make_plan(source, [["beta=0.1", "loss.beta=0.2"]])


def test_all_points_that_cannot_be_trained_are_listed(source):
    with pytest.raises(RecipeError, match=r"beta=-1[\s\S]*beta=0") as error:
        make_plan(source, [["beta=0.1,-1,0"]])
    assert "beta=0.1:" not in str(error.value)


def test_a_plan_on_disk_reads_back_the_same(source, tmp_path):
    axes = ["gamma=0,0.5x", "lr=1e-5,0.0003", "loss.label_smoothing=0.1"]
    plan = save_plan(make_plan(source, [axes], folder=tmp_path / "sweep"))
    again = read_plan(tmp_path / "sweep")
    assert again.points == plan.points
    assert again.recipes == plan.recipes
    assert again.recipe == plan.recipe


def test_a_larger_grid_joins_the_sweep_that_is_there(source, tmp_path):
    save_plan(make_plan(source, [["gamma=0"]], folder=tmp_path / "sweep"))
    plan = save_plan(make_plan(source, [["gamma=2x"]], folder=tmp_path / "sweep", seeds=[0, 1]))
    assert [(point.name, point.seed) for point in plan.points] == [("gamma=0", 0), ("gamma=2x", 0), ("gamma=2x", 1)]
    assert read_plan(tmp_path / "sweep").points == plan.points


def test_a_plan_joined_with_what_lies_there_has_the_hash_that_is_stored(source, tmp_path):
    """The older question stands first, and nothing is written before the plan is saved."""
    folder = tmp_path / "sweep"
    save_plan(make_plan(source, [["gamma=0,1x"]], folder=folder, contrasts=["gamma=0 against base"]))
    later = make_plan(source, [["mixout=0.3"]], folder=folder, contrasts=["mixout=0.3 against base"])
    before = (folder / "sweep.json").read_text()
    joined = joined_plan(later)
    assert list(joined.contrasts) == ["gamma=0 against base", "mixout=0.3 against base"]
    assert (folder / "sweep.json").read_text() == before
    assert save_plan(later) == joined
    assert json.loads((folder / "sweep.json").read_text())["contrasts_sha256"] == joined.contrasts_sha256


def test_a_contrast_whose_left_side_lies_in_its_right_one_is_refused(source):
    with pytest.raises(UsageError, match=r"all points of loss.beta=0.2 are points of loss.beta too, on its right"):
        make_plan(source, [["beta=0.1,0.2"]], contrasts=["beta=0.2 against beta"])


def test_a_sweep_from_another_recipe_is_refused(source, tmp_path):
    save_plan(make_plan(source, [["gamma=0"]], folder=tmp_path / "sweep"))
    with pytest.raises(RunFolderError, match=r"loss.beta: 0.1 → 0.3"):
        save_plan(make_plan(source, [["gamma=0"]], folder=tmp_path / "sweep", overrides=["loss.beta=0.3"]))


def test_a_folder_with_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunFolderError, match="not a sweep"):
        save_plan(make_plan(source, [["gamma=0"]], folder=tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


NO_POINT = {"name": "x", "settings": 3, "seed": 0, "folder": "runs/x"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"points": [{"name": "x"}]}',
        json.dumps({"points": []}),
        json.dumps({"points": [NO_POINT], "grids": [], "seeds": []}),
    ],
)
def test_a_broken_sweep_file_is_named(source, tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    (tmp_path / "recipe.yaml").write_text(source.read_text())
    with pytest.raises(UsageError, match=r"sweep\.json"):
        read_plan(tmp_path)

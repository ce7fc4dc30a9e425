"""What a run may write into and remove: only what runs write, and never what it needs itself."""

import json
import shutil

import pytest

from pe_dpo.errors import RecipeError, RunFolderError
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter, check_run_folder, locked
from pe_dpo.training.train import train

SHORT = ("train.max_steps=1",)


def test_a_run_json_of_somebody_else_does_not_make_a_folder_ours(make_recipe, tmp_path):
    (tmp_path / "run" / "src").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text('{"my": 1}')
    (tmp_path / "run" / "src" / "precious.py").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match="not a run of pe-dpo"):
            train(make_recipe(*SHORT), overwrite=overwrite)
    assert (tmp_path / "run" / "src" / "precious.py").read_text() == "x"


@pytest.mark.slow
def test_overwriting_never_removes_the_adapter_that_the_run_starts_from(make_recipe):
    first = train(make_recipe(*SHORT))
    with pytest.raises(RunFolderError, match=r"adapter\.start lies in the output folder"):
        start = (f"adapter.start={first.folder}", "adapter.reference=base", "adapter.rank=16", "adapter.alpha=32")
        train(make_recipe(*SHORT, *start), overwrite=True)
    assert (first.folder / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_overwriting_never_removes_the_data(make_recipe, tiny_pairs, tmp_path):
    first = train(make_recipe(*SHORT))
    shutil.copytree(tiny_pairs, first.folder / "data")
    with pytest.raises(RunFolderError, match=r"data\.train lies in the output folder"):
        train(make_recipe(*SHORT, f"data.train={first.folder / 'data'}"), overwrite=True)
    assert (first.folder / "data" / "train.jsonl").is_file()


@pytest.mark.parametrize(("key", "name"), [("train", "*.jsonl"), ("train", "train.jsonl"), ("eval", "train.jsonl")])
def test_one_of_several_places_in_the_output_folder_is_enough(make_recipe, tiny_pairs, tmp_path, key, name):
    shutil.copytree(tiny_pairs, tmp_path / "run" / "data")
    recipe = make_recipe(f"data.{key}=[{tiny_pairs}, {{path: '{tmp_path / 'run' / 'data' / name}', split: null}}]")
    with pytest.raises(RunFolderError, match=rf"data\.{key} lies in the output folder"):
        check_run_folder(tmp_path / "run", recipe, resume=False, overwrite=True)


def test_an_output_that_is_a_file_is_refused_before_anything_is_read(make_recipe, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="is a file; `output` is a folder"):
        train(make_recipe("model.base=nowhere/at/all"))


@pytest.mark.slow
def test_a_run_that_came_while_the_pairs_were_prepared_is_not_removed(make_recipe, monkeypatch):
    from pe_dpo.training import train as run

    prepare = run.prepare_run

    def slow(recipe, *arguments, **options):
        monkeypatch.setattr(run, "prepare_run", prepare)
        train(make_recipe(*SHORT))
        return prepare(recipe, *arguments, **options)

    monkeypatch.setattr(run, "prepare_run", slow)
    with pytest.raises(RunFolderError, match="holds a run; `resume`"):
        train(make_recipe(*SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["run.json", "recipe.yaml"])
def test_resuming_a_run_whose_record_was_lost_removes_nothing_and_says_what_to_do(make_recipe, lost):
    folder = train(make_recipe(*SHORT)).folder
    (folder / lost).unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(RunFolderError, match=rf"{lost} is missing.*restore it, or start anew with `overwrite`"):
        train(make_recipe(*SHORT), resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before
    assert Run(train(make_recipe(*SHORT), overwrite=True).folder).info.is_finished


def test_a_recipe_of_somebodys_own_beside_checkpoints_that_are_not_sealed_does_not_make_a_folder_ours(make_recipe, tmp_path):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("beta: 1")
    (tmp_path / "run" / "checkpoint-1" / "model.safetensors").write_text("x")
    for options in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(RunFolderError, match=r"no run to resume|not a run of pe-dpo"):
            train(make_recipe(*SHORT), **options)
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").read_text() == "x"


def test_to_resume_and_to_overwrite_at_once_is_refused(make_recipe):
    with pytest.raises(RunFolderError, match="use one of them"):
        train(make_recipe(), resume=True, overwrite=True)


def test_an_unknown_tracker_is_refused_before_the_folder_is_made(make_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"train\.report_to: foo is not a tracker of transformers"):
        train(make_recipe("train.report_to=[foo]"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_one_step_still_learns(make_recipe):
    """A tenth of one step rounds up to one step of warm-up, which would leave a learning rate of zero."""
    result = train(make_recipe("train.pairs_per_step=64", "train.epochs=1", "train.warmup=0.1"))
    assert result.steps == 1
    assert Run(result.folder).metrics[1]["learning_rate"] > 0
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.slow
def test_an_adapter_that_did_not_move_is_remarked_without_held_out_pairs_too(make_recipe):
    result = train(make_recipe("data.eval=0", "loss.preset=rso", "loss.margin=-1000", *SHORT))
    assert result.after == {}
    assert any(remark.startswith("nothing moved") for remark in result.remarks)


def test_tokens_that_the_model_does_not_know_are_named_before_training(make_recipe, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        word: index + (400 if word == "I" else 0) for word, index in tokenizer["model"]["vocab"].items()
    }
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    from pe_dpo.errors import ModelError

    with pytest.raises(ModelError, match=r"train\.jsonl:1: has token \d+, but the model knows 320 tokens"):
        train(make_recipe(f"model.base={base}"))


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "log.txt"])
def test_a_file_that_is_a_link_out_of_the_folder_is_not_written_into(tmp_path, name):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with (
        pytest.raises(RunFolderError, match=f"{name}: is a link to {tmp_path}/precious, and would be written"),
        locked(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "x"


def test_a_link_in_the_place_of_our_folder_is_removed_and_what_it_names_stays(make_recipe, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    recipe = make_recipe(*SHORT)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "failed"}')
    (tmp_path / "run" / "snapshots").symlink_to(tmp_path / "precious")
    with locked(tmp_path / "run") as folder:
        RunWriter(folder).begin(recipe, resume=False)
    assert not (tmp_path / "run" / "snapshots").exists() and (tmp_path / "precious" / "file").read_text() == "x"

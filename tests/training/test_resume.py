"""Nothing is lost: a resumed run is the uninterrupted one, whatever interrupted it."""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import warm_process
from killed import KillAt, Killed
from one_base import train
from safetensors.torch import load_file

from pe_dpo.errors import RunFolderError, TrainingError
from pe_dpo.recipe import recipe_to_yaml
from pe_dpo.runs.checkpoints import MANIFEST, checkpoints, faults
from pe_dpo.runs.files import RUN_FILE, read_object
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import free_to_change
from pe_dpo.training.train import train as train_anew

TIMES = ("tokens_per_second",)
SETTINGS = ("adapter.dropout=0.1", "train.save_every=1", "train.eval_every=2", "train.tokens_per_microbatch=400")


def trace(folder):
    """Every logged line without the clock."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in Run(folder).metrics]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_run(folder, straight):
    assert read_object(folder / RUN_FILE)["status"] == "finished"
    assert trace(folder) == trace(straight)
    left, right = adapter(folder), adapter(straight)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def straight(tiny_recipe, tmp_path_factory):
    """The uninterrupted run of SETTINGS: 6 steps over two epochs."""
    return train(tiny_recipe(tmp_path_factory.mktemp("straight") / "run", *SETTINGS)).folder


@pytest.fixture(scope="module")
def _killed(tiny_recipe, tmp_path_factory):
    recipe = tiny_recipe(tmp_path_factory.mktemp("killed") / "run", *SETTINGS)
    with pytest.raises(Killed):
        train(recipe, callbacks=[KillAt(3)])
    return recipe.output


@pytest.fixture
def killed(_killed, tmp_path):
    """A copy of the run as it was killed after its third step."""
    return Path(shutil.copytree(_killed, tmp_path / "run"))


@pytest.fixture
def finished(straight, tmp_path):
    """A copy of the straight run to do harm to."""
    return Path(shutil.copytree(straight, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.usefixtures("killed")
def test_a_resumed_run_has_the_losses_and_the_adapter_of_the_straight_one(make_recipe, straight):
    """On a base that is loaded anew, at the border of the two epochs; dropout makes every step depend on the random state."""
    result = train_anew(make_recipe(*SETTINGS), resume=True)
    assert result.steps == 6
    assert_same_run(result.folder, straight)


@pytest.mark.slow
def test_a_checkpoint_that_keeps_the_whole_log_is_gone_on_with(make_recipe, killed, straight):
    """As versions wrote it; within an epoch, which is where the second kill falls."""
    with pytest.raises(Killed):
        train(make_recipe(*SETTINGS), resume=True, callbacks=[KillAt(4)])
    newest = checkpoints(killed)[-1]
    state, manifest = (json.loads((newest / name).read_text()) for name in ("trainer_state.json", MANIFEST))
    text = json.dumps(state | {"log_history": Run(killed).metrics})
    (newest / "trainer_state.json").write_text(text)
    seal = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (newest / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"] | {"trainer_state.json": seal}}))
    assert (newest.name, faults(newest)) == ("checkpoint-4", [])
    assert_same_run(train(make_recipe(*SETTINGS), resume=True).folder, straight)


@pytest.mark.slow
def test_a_run_cut_off_after_its_last_step_is_not_trained_further(make_recipe, tmp_path):
    """With max_steps within an epoch Trainer would take one more step before it looks."""
    recipe = make_recipe(*SETTINGS, "train.max_steps=1")
    straight = train(recipe.model_copy(update={"output": str(tmp_path / "straight")})).folder
    with pytest.raises(Killed):
        train(recipe, callbacks=[KillAt(1)])
    result = train(recipe, resume=True)
    assert result.steps == 1
    assert_same_run(result.folder, straight)


@pytest.mark.slow
def test_the_metrics_of_lost_steps_are_written_once(make_recipe, killed, straight):
    with (killed / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 9.0}) + '\n{"step": 5, "lo')
    result = train(make_recipe(*SETTINGS), resume=True)
    assert trace(result.folder) == trace(straight)


@pytest.mark.parametrize("damage", ["delete", "cut", "flip"])
@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "MANIFEST.json"],
)
@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(finished, damage, name):
    newest = checkpoints(finished)[-1]
    victim = newest / name
    content = victim.read_bytes()
    if damage == "delete":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(content[: len(content) // 2])
    elif name == "MANIFEST.json":
        victim.write_bytes(content.replace(b'"sha256": "', b'"sha256": "0', 1))
    else:
        middle = len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert len(faults(newest)) == 1
    found, passed_over = Run(finished).resume_point()
    assert found == checkpoints(finished)[-2]
    assert str(newest) in passed_over[0]


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
@pytest.mark.slow
def test_a_pickle_that_would_run_is_not_read_by_resume(make_recipe, finished, tmp_path, name):
    """Sealed as our own are, by whoever made the folder."""
    last, newest = checkpoints(finished)[-1], checkpoints(finished)[-2]
    shutil.rmtree(last)
    (finished / RUN_FILE).write_text(json.dumps(read_object(finished / RUN_FILE) | {"status": "interrupted"}))
    torch.save({"state": Evil(tmp_path / "ran")}, newest / name)
    content, manifest = (newest / name).read_bytes(), json.loads((newest / MANIFEST).read_text())
    seal = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"] | {name: seal}}))
    assert faults(newest) == []
    with pytest.raises(TrainingError, match="hold more than numbers, or are damaged, and were not read"):
        train(make_recipe(*SETTINGS), resume=True)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_run_without_one_whole_checkpoint_says_so(finished):
    for checkpoint in checkpoints(finished):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(RunFolderError, match=r"(?s)no checkpoint of this run is whole.*optimizer\.pt is missing"):
        Run(finished).resume_point()


def test_only_the_newest_checkpoints_are_kept(straight):
    assert [path.name for path in checkpoints(straight)] == ["checkpoint-5", "checkpoint-6"]
    assert not (straight / ".staging").exists()


def test_a_checkpoint_does_not_grow_with_the_steps_before_it(straight):
    """The log of a step has 2.5 kB: of 100,000 steps it took 290 MB in each checkpoint."""
    before, after = (json.loads((path / "trainer_state.json").read_text()) for path in checkpoints(straight))
    assert (before["global_step"], before["log_history"], after["log_history"]) == (5, [], [])
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in checkpoints(straight)]
    assert abs(sizes[1] - sizes[0]) < 100
    assert len(Run(straight).metrics) > 6


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("loss.beta=0.2", "loss.beta: 0.1 → 0.2"),
        ("train.seed=1", "train.seed: 0 → 1"),
        ("adapter.rank=8", "adapter.rank: 4 → 8"),
    ],
)
def test_resuming_with_another_recipe_is_refused_with_the_difference(make_recipe, finished, change, shown):
    with pytest.raises(RunFolderError, match=shown):
        train(make_recipe(*SETTINGS, change), resume=True)


@pytest.fixture
def start(straight, tmp_path):
    """A finished adapter to start from, with other weights than any run that starts from it."""
    folder = tmp_path / "start"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(straight / name, folder)
    return folder


def from_start(folder, reference):
    """Settings of a run from an adapter; rank and alpha are the adapter's."""
    return (*SETTINGS, "adapter.rank=16", "adapter.alpha=32", f"adapter.start={folder}", f"adapter.reference={reference}")


@pytest.mark.slow
def test_every_checkpoint_is_sealed_with_its_run_and_what_the_run_started_from(make_recipe, start):
    folder = train(make_recipe(*from_start(start, "adapter"), "train.max_steps=2")).folder
    record = read_object(folder / RUN_FILE)
    sealed = [json.loads((checkpoint / "MANIFEST.json").read_text())["inputs"] for checkpoint in checkpoints(folder)]
    inputs = {name: record["hashes"][name] for name in ("data", "held_out", "base", "start")}
    assert sealed == [{"run": record["id"], **inputs}] * 2


@pytest.mark.slow
def test_every_run_has_an_id_of_its_own_which_resuming_keeps(make_recipe, finished):
    first, recipe = read_object(finished / RUN_FILE)["id"], make_recipe(*SETTINGS, "train.max_steps=1")
    assert read_object(train(recipe, overwrite=True).folder / RUN_FILE)["id"] != first
    second = read_object(finished / RUN_FILE)["id"]
    assert read_object(train(recipe, resume=True).folder / RUN_FILE)["id"] == second


@pytest.fixture(scope="module")
def other(tiny_recipe, tmp_path_factory):
    """A run of the same recipe but for its seed: its checkpoints hold another model."""
    return train(tiny_recipe(tmp_path_factory.mktemp("other") / "run", *SETTINGS, "train.seed=1")).folder


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_passed_over_with_the_reason(make_recipe, straight, finished, other, logged: list[str]):
    foreign = finished / "checkpoint-6"
    shutil.rmtree(foreign)
    shutil.copytree(other / "checkpoint-6", foreign)
    said = logged
    result = train(make_recipe(*SETTINGS), resume=True)
    assert f"{foreign}: passed over: is a checkpoint of another run" in said
    assert_same_run(result.folder, straight)


def test_a_run_with_checkpoints_of_another_alone_says_so(make_recipe, finished, other):
    for checkpoint in checkpoints(finished):
        shutil.rmtree(checkpoint)
    shutil.copytree(other / "checkpoint-5", finished / "checkpoint-5")
    with pytest.raises(RunFolderError, match="of another run"):
        train(make_recipe(*SETTINGS), resume=True)


def without_id(folder):
    """Make a run what runs were before they had an id."""
    record = read_object(folder / RUN_FILE)
    del record["id"]
    (folder / "run.json").write_text(json.dumps(record))
    for checkpoint in checkpoints(folder):
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
        del manifest["inputs"]
        (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_run_from_before_runs_had_an_id_is_resumed_and_its_new_checkpoints_too(make_recipe, killed, straight):
    without_id(killed)
    with pytest.raises(Killed):
        train(make_recipe(*SETTINGS), resume=True, callbacks=[KillAt(4)])
    assert_same_run(train(make_recipe(*SETTINGS), resume=True).folder, straight)


@pytest.mark.slow
def test_a_checkpoint_without_an_id_is_none_of_a_run_that_has_one(make_recipe, finished, logged: list[str]):
    manifest = json.loads((finished / "checkpoint-6" / "MANIFEST.json").read_text())
    del manifest["inputs"]
    (finished / "checkpoint-6" / "MANIFEST.json").write_text(json.dumps(manifest))
    said = logged
    train(make_recipe(*SETTINGS), resume=True)
    assert any("checkpoint-6: passed over: is a checkpoint of another run" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "is_free"),
    [
        (["adapter.dropout=0.1"], False),
        (["mixout.p=0.5", "mixout.draws=microbatch"], False),
        (["mixout.p=0.5"], True),
        (["mixout.draws=microbatch"], True),
        ([], True),
    ],
)
def test_how_a_step_is_split_may_change_on_resume_unless_what_is_drawn_depends_on_it(make_recipe, settings, is_free):
    assert ({"train.packing", "train.tokens_per_microbatch"} <= free_to_change(make_recipe(*settings))) == is_free


@pytest.mark.slow
def test_a_run_goes_on_with_steps_that_are_split_otherwise(make_recipe):
    with pytest.raises(Killed):
        train(make_recipe("train.max_steps=2", "train.save_every=1"), callbacks=[KillAt(1)])
    split = ("train.max_steps=2", "train.save_every=1", "train.tokens_per_microbatch=150")
    with pytest.raises(RunFolderError, match=r"adapter\.dropout: 0\.0 → 0\.1"):
        train(make_recipe(*split, "adapter.dropout=0.1"), resume=True)
    assert train(make_recipe(*split), resume=True).steps == 2


def test_a_finished_run_is_not_overwritten_in_silence(make_recipe, finished):
    with pytest.raises(RunFolderError, match="holds a run; `resume`"):
        train(make_recipe(*SETTINGS))
    assert read_object(finished / RUN_FILE)["status"] == "finished"


def test_a_folder_that_is_no_run_is_never_emptied(make_recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match="not a run of pe-dpo"):
        train(make_recipe(), overwrite=True)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_two_runs_cannot_write_into_one_folder(make_recipe):
    from filelock import FileLock

    recipe = make_recipe()
    Path(recipe.output).mkdir(parents=True)
    with FileLock(f"{recipe.output}/.lock"), pytest.raises(RunFolderError, match="another run is writing there"):
        train(recipe)


PROGRAM = """
import sys
from pe_dpo.recipe import load_recipe
from pe_dpo.training.train import train
result = train(load_recipe(sys.argv[1]), resume="resume" in sys.argv)
sys.exit(128 + result.interrupted_by if result.interrupted_by else 0)
"""


def wait_for_steps(folder, steps, process):
    """Wait until a step's metrics are there, or the process has ended."""
    while process.exitcode is None and sum("loss" in line for line in Run(folder).metrics) < steps:
        time.sleep(0.01)


def ended(process, folder):
    """Wait for a process; its exit code, and what it printed."""
    process.join(timeout=120)
    return process.exitcode, warm_process.log(process, folder).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_leaves_a_run_to_resume(make_recipe, straight, tmp_path, number):
    recipe = make_recipe(*SETTINGS, "train.save_every=100")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(recipe))
    process = warm_process.start(PROGRAM, file, folder=tmp_path)
    wait_for_steps(tmp_path / "run", 2, process)
    os.kill(process.pid, number)
    code, said = ended(process, tmp_path)
    assert code == 128 + number, said
    logged = max(line["step"] for line in Run(tmp_path / "run").metrics)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"checkpoint-{logged}"]
    assert read_object(tmp_path / "run" / RUN_FILE)["status"] == "interrupted"
    assert_same_run(train(recipe, resume=True).folder, straight)

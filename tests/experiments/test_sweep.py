"""Many runs from one base: each is the run of `train`, and a kill costs no more than the run it cut off."""

import json
import math
import pickle
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import warm_process
import yaml
from safetensors.torch import load_file

from pe_dpo.errors import DiskError, RunFolderError, UsageError
from pe_dpo.evaluation import judged_runs
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.experiments import on_ray
from pe_dpo.experiments import point as point_module
from pe_dpo.experiments.compare import compare
from pe_dpo.experiments.plan import Point, make_plan, save_plan
from pe_dpo.experiments.point import PointState
from pe_dpo.experiments.sweep import sweep
from pe_dpo.inference.reference import Reference
from pe_dpo.metrics.catalogue import METRICS
from pe_dpo.model import fingerprint, provenance
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.recipe import load_recipe
from pe_dpo.recipe.schema import GenerationSection
from pe_dpo.runs.files import BASE_FILE, RUN_FILE, read_object
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter, locked
from pe_dpo.training import train as train_module
from pe_dpo.training.train import train
from pe_dpo.training.trainer import PairTrainer


@pytest.fixture
def source(tiny_base, tiny_pairs, tmp_path):
    """A recipe of one step, in a file."""
    return write_source(tmp_path / "tiny.yaml", tiny_base, tiny_pairs)


THREE = ["train.max_steps=3"]


def write_source(path, tiny_base, tiny_pairs):
    path.write_text(
        f"model: {{base: '{tiny_base}', quantize: none}}\n"
        "adapter: {rank: 4, alpha: 8}\n"
        f"data: {{train: '{tiny_pairs}'}}\n"
        "train: {max_steps: 1, pairs_per_step: 8, learning_rate: 1.0e-2, warmup: 0, eval_every: 3, save_every: 3}\n"
        f"reference: {{store: '{path.with_name('store.sqlite')}'}}\n"
    )
    return path


@pytest.fixture(scope="module")
def finished(tiny_base, tiny_pairs, tmp_path_factory):
    """The plan of a sweep of one point, which is finished; `swept` sees to its folder."""
    folder = tmp_path_factory.mktemp("finished")
    plan = make_plan(write_source(folder / "tiny.yaml", tiny_base, tiny_pairs), [["gamma=0"]], folder=folder / "sweep")
    sweep(plan)
    shutil.copytree(plan.folder, folder / "kept")
    return plan


@pytest.fixture
def swept(finished):
    """The same, its folder as the sweep left it."""
    shutil.rmtree(finished.folder)
    shutil.copytree(finished.folder.with_name("kept"), finished.folder)
    return finished


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_same_adapter(one, other):
    left, right = adapter(one), adapter(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_every_point_is_the_run_that_train_makes(source, tmp_path):
    """To the bit, whatever ran on the same base before: another loss, mixout, recomputed activations, padded rows, dropout."""
    turns = [["train.gradient_checkpointing=true", "dropout=0.3"], ["mixout=0.5", "train.packing=false"], ["gamma=0.5x"]]
    plan = make_plan(source, turns, folder=tmp_path / "sweep", overrides=["train.max_steps=2"])
    states = sweep(plan)
    assert [state.status for state in states] == ["finished"] * 3
    for recipe in plan.recipes:
        alone = recipe.model_copy(update={"output": str(tmp_path / "alone" / Path(recipe.output).parent.name)})
        assert_same_adapter(recipe.output, train(alone).folder)
        ours, its = (read_object(Path(folder) / RUN_FILE) for folder in (recipe.output, alone.output))
        assert [ours[key] for key in ("before", "after", "start", "loss", "pairs", "hashes", "remarks", "step")] == [
            its[key] for key in ("before", "after", "start", "loss", "pairs", "hashes", "remarks", "step")
        ]
    before = [read_object(Path(recipe.output) / RUN_FILE)["hashes"]["base"] for recipe in plan.recipes]
    assert len(set(before)) == 1


@pytest.mark.slow
def test_the_base_is_loaded_once_and_each_answer_goes_through_the_reference_once(source, tmp_path, monkeypatch):
    loads, computed = [], []
    load = point_module.load_base
    monkeypatch.setattr(point_module, "load_base", lambda *a, **k: loads.append(1) or load(*a, **k))
    monkeypatch.setattr("pe_dpo.inference.policy.load_base", lambda *a, **k: pytest.fail("a run loaded a base of its own"))
    compute = Reference._compute
    monkeypatch.setattr(Reference, "_compute", lambda self, pairs, *a: computed.extend(pairs) or compute(self, pairs, *a))
    calls = Counter()

    def count(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: calls.update([name]) or function(*a, **k))

    for owner, name in (
        (fingerprint, "_hashes"),
        (provenance, "file_fingerprints"),
        (train_module, "choose_scorer"),
        (PairTrainer, "score_model"),
    ):
        count(owner, name)
    plan = make_plan(source, [["beta=0.1,0.2,0.3"]], folder=tmp_path / "sweep")
    sweep(plan)
    assert loads == [1]
    evaluations = sum("eval_loss" in line for recipe in plan.recipes for line in Run(recipe.output).metrics) - len(plan.recipes)
    # Tensors and files of the base once, adapters of each run once; at step 0 the reference is the policy's score in all.
    assert calls == {"_hashes": 1, "file_fingerprints": 1 + 3, "choose_scorer": 1, "score_model": evaluations}
    first, *others = (read_object(Path(recipe.output) / BASE_FILE) for recipe in plan.recipes)
    assert [first, first] == others
    rechecked = 2 * 4  # by each run but the first
    assert len(computed) <= 33 + rechecked


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(swept, monkeypatch):
    told = []
    monkeypatch.setattr(point_module, "train", lambda *a, **k: pytest.fail("ran again"))
    assert [state.status for state in sweep(swept, tell=told.append)] == ["finished"]
    assert len(told) == 1


@pytest.mark.slow
def test_a_failed_point_is_named_and_the_others_go_on(source, tmp_path, monkeypatch):
    """One fails of what nobody foresaw, whereupon the base is loaded anew; one of its numbers, which leaves the base clean."""
    step, loads, load = PairTrainer.training_step, [], point_module.load_base

    def fails(self, *words):
        if self.args.weight_decay == 0 and self.state.global_step == 1:
            raise IndexError("index 7 is out of bounds\nfor dimension 0")
        if self.args.weight_decay == 0.05 and self.state.global_step == 1:
            next(iter(adapter_parameters(self.model))).data.fill_(math.nan)
        return step(self, *words)

    monkeypatch.setattr(PairTrainer, "training_step", fails)
    monkeypatch.setattr(point_module, "load_base", lambda *a, **k: loads.append(1) or load(*a, **k))
    turned = [["train.weight_decay=0,0.05,0.1"]]
    plan = make_plan(source, turned, folder=tmp_path / "sweep", overrides=["train.max_steps=2"])
    states = sweep(plan)
    assert [state.status for state in states] == ["failed", "failed", "finished"]
    assert states[0].why == "IndexError: index 7 is out of bounds"
    assert "not finite" in states[1].why
    assert loads == [1, 1]
    records = [read_object(Path(recipe.output) / RUN_FILE) for recipe in plan.recipes[:2]]
    assert [(record["status"], record["why"]) for record in records] == [("failed", state.why) for state in states[:2]]
    assert "in fails" in (Path(plan.recipes[0].output) / "log.txt").read_text()
    alone = plan.recipes[2].model_copy(update={"output": str(tmp_path / "alone")})
    assert_same_adapter(plan.recipes[2].output, train(alone).folder)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded"),
        (MemoryError(), "MemoryError"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (AssertionError("a\nb"), "AssertionError: a"),
        (DiskError("run: the disk is full"), "run: the disk is full"),
    ],
)
def test_whatever_a_point_raises_is_its_own_failure(source, tmp_path, monkeypatch, error, why):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(point_module, "train", fails)
    plan = make_plan(source, [["beta=0.1,0.2"]], folder=tmp_path / "sweep")
    monkeypatch.setattr("pe_dpo.experiments.sweep.share", lambda recipe, like: "shared")
    states = sweep(plan)
    assert [(state.status, state.why) for state in states] == [("failed", why)] * 2
    assert [read_object(Path(recipe.output) / RUN_FILE)["why"] for recipe in plan.recipes] == [why] * 2
    monkeypatch.setattr(point_module, "write_atomically", fails)
    (Path(plan.recipes[0].output) / "recipe.yaml").unlink()
    if isinstance(error, OSError):  # not even that can be written down
        assert [state.status for state in sweep(plan)] == ["failed"] * 2


@pytest.mark.slow
def test_a_point_that_cannot_begin_leaves_its_recipe_and_the_reason(source, tmp_path):
    """Nor does it hold up the others where it is the first."""
    plan = make_plan(source, [["adapter.targets=[no_such_layer],[q_proj]"]], folder=tmp_path / "sweep")
    assert [state.status for state in sweep(plan)] == ["failed", "finished"]
    record = read_object(Path(plan.recipes[0].output) / RUN_FILE)
    assert record["status"] == "failed"
    assert "no_such_layer" in record["why"]
    assert load_recipe(Path(plan.recipes[0].output) / "recipe.yaml").adapter.targets == ["no_such_layer"]


@pytest.mark.slow
def test_a_point_stopped_before_its_run_began_is_begun_again(source, tmp_path, monkeypatch):
    plan = make_plan(source, [], folder=tmp_path / "sweep")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pe_dpo.training.train.open_reference", stop)
        sweep(plan)
    assert [(state.status, state.why) for state in sweep(plan)] == [("finished", "")]


@pytest.mark.slow
def test_a_run_of_other_settings_in_a_points_folder_stops_the_sweep(swept):
    recipe = Path(swept.recipes[0].output) / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rank: 4", "rank: 8"))
    with pytest.raises(RunFolderError, match=r"adapter.rank: 8 → 4"):
        sweep(swept)


@pytest.mark.slow
def test_a_finished_run_without_its_recipe_is_named(swept):
    (Path(swept.recipes[0].output) / "recipe.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"seed-0.recipe.yaml: cannot be read.*move the run away"):
        sweep(swept)


@pytest.mark.slow
def test_finished_runs_keep_their_adapter_and_not_their_checkpoints(swept):
    left = {path.name for path in Path(swept.recipes[0].output).iterdir()}
    assert {"adapter_model.safetensors", "eval_pairs.parquet", "log.txt"} <= left
    assert not [name for name in left if name.startswith("checkpoint")]


def start(source, folder):
    words = [
        "sweep",
        source,
        "--grid",
        "gamma=0,0.5x,1x",
        "-o",
        folder,
        "--set",
        "train.save_every=1",
        "--prompts",
        "0",
        "--set",
        *THREE,
    ]
    return warm_process.start("from pe_dpo.cli import main; main()", *words, folder=source.parent)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(source, tmp_path):
    folder = tmp_path / "sweep"
    kills = 0
    for wanted in ("runs/gamma=0/seed-0/checkpoint-1", "runs/gamma=0.5x/seed-0/run.json", "runs/base/seed-0/checkpoint-2"):
        process = start(source, folder)
        while process.exitcode is None and not (folder / wanted).exists():
            time.sleep(0.005)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    process = start(source, folder)
    process.join(timeout=200)
    assert process.exitcode == 0, warm_process.log(process, tmp_path).read_text()
    assert kills == 3
    plan = make_plan(source, [["gamma=0,0.5x,1x"]], folder=tmp_path / "straight", overrides=["train.save_every=1", *THREE])
    sweep(plan)
    for point, recipe in zip(plan.points, plan.recipes, strict=True):
        assert_same_adapter(folder / point.folder, recipe.output)


@pytest.mark.slow
def test_snapshots_and_samples_change_nothing_of_the_run(source, tmp_path):
    plan = make_plan(source, [["gamma=1x"]], folder=tmp_path / "plain", overrides=THREE)
    sweep(plan)
    measured = ["generation.prompts=4", "generation.max_new_tokens=5", "generation.snapshots=2"]
    watched = make_plan(source, [["gamma=1x"]], folder=tmp_path / "watched", overrides=[*THREE, *measured])
    sweep(watched)
    assert_same_adapter(plan.recipes[0].output, watched.recipes[0].output)
    run = Path(watched.recipes[0].output)
    assert [path.name for path in sorted((run / "snapshots").iterdir())] == ["step-000001", "step-000002"]
    for folder in (run, *(run / "snapshots").iterdir()):
        assert {"eval_pairs.parquet", "generations.parquet", "evaluation.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_ray_gives_the_same_runs(source, tmp_path):
    pytest.importorskip("ray")
    plan = make_plan(source, [["gamma=0"]], folder=tmp_path / "sweep")
    states = sweep(plan, engine="ray", workers=1)
    assert [state.status for state in states] == ["finished"], [state.why for state in states]
    alone = plan.recipes[0].model_copy(update={"output": str(tmp_path / "alone")})
    assert_same_adapter(plan.recipes[0].output, train(alone).folder)


class StandInForRay(ModuleType):
    """What `run_on_ray` asks of Ray, in this process: a call runs when its result is asked for, if its actor has room."""

    def __init__(self, room: int = 9):
        super().__init__("ray")
        self.room, self.actors = room, []

    class exceptions:
        class RayError(Exception):
            pass

        class RayActorError(RayError):
            pass

    def init(self, **_):
        pass

    def shutdown(self):
        pass

    def cluster_resources(self):
        return {"GPU": 1.0}

    def remote(self, **needs):
        def actor(like):
            worker = on_ray._Worker(like)
            handle = SimpleNamespace(run=SimpleNamespace(remote=lambda *words: partial(worker.run, *words)))
            self.actors.append((worker, handle))
            return handle

        assert needs == {"num_cpus": 1, "num_gpus": 1}
        return lambda _: SimpleNamespace(remote=actor)

    def wait(self, running, num_returns):
        placed = [worker for worker, _ in self.actors[: self.room]]
        ready = [call for call in running if call.func.__self__ in placed]
        assert ready, "it would wait for ever"
        return ready[:num_returns], [call for call in running if call not in ready[:num_returns]]

    def kill(self, handle):
        self.actors = [actor for actor in self.actors if actor[1] is not handle]

    def get(self, call):
        return call()


def test_a_worker_of_ray_that_is_free_gets_the_next_point_and_one_that_died_is_replaced(source, tmp_path, monkeypatch):
    """Two at once; the second point's worker dies. Two workers and the one in its place load a base each, for four points."""
    ray, shared = StandInForRay(), []

    def run(point, recipe, base):
        if point is plan.points[1]:
            raise ray.exceptions.RayActorError("killed\nby the system")
        if point is plan.points[3]:
            raise RuntimeError("RayTaskError: what\nthe worker's traceback was") from None
        return PointState(point, "finished", why=f"on base {base}")

    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(on_ray, "share", lambda recipe, like: shared.append(like) or len(shared))
    monkeypatch.setattr(on_ray, "run_point", run)
    plan = make_plan(source, [["beta=0.1,0.2,0.3,0.4"]], folder=tmp_path / "sweep")
    todo = list(zip(plan.points, plan.recipes, strict=True))
    states = on_ray.run_on_ray(todo, workers=2)
    assert [(plan.points.index(state.point), state.status, state.why) for state in states] == [
        (0, "running", ""),
        (1, "running", ""),
        (0, "finished", "on base 1"),
        (2, "running", ""),
        (1, "failed", "its worker died: killed"),
        (3, "running", ""),
        (2, "finished", "on base 1"),
        (3, "failed", "RuntimeError: RayTaskError: what"),
    ]
    assert shared == [None] * 3


def test_points_of_workers_that_the_cluster_has_no_room_for_run_in_the_end(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", StandInForRay(room=1))
    monkeypatch.setattr(on_ray, "share", lambda recipe, like: "a base")
    monkeypatch.setattr(on_ray, "run_point", lambda point, recipe, base: PointState(point, "finished"))
    plan = make_plan(source, [["beta=0.1,0.2,0.3"]], folder=tmp_path / "sweep")
    states = list(on_ray.run_on_ray(list(zip(plan.points, plan.recipes, strict=True)), workers=2))
    assert [plan.points.index(state.point) for state in states if state.status == "finished"] == [1, 2, 0]


def test_without_ray_its_engine_is_refused_in_words(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="pe-dpo\\[ray\\]"):
        sweep(make_plan(source, [["gamma=0"]], folder=tmp_path / "sweep"), engine="ray")


def test_a_cluster_that_lets_nobody_in_is_named(source, tmp_path, monkeypatch):
    def init(**options):
        raise ConnectionError("Failed to connect to Ray cluster\nat 192.0.2.2:6399")

    ray = StandInForRay()
    ray.init = init
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.2:6399")
    message = r"^RAY_ADDRESS 192.0.2.2:6399: no cluster of Ray lets us in \(Failed to connect to Ray cluster at 192"
    with pytest.raises(UsageError, match=message):
        sweep(make_plan(source, [["gamma=0"]], folder=tmp_path / "sweep"), engine="ray")


@pytest.mark.slow
def test_an_interrupted_point_is_told_from_a_finished_one(swept):
    RunWriter(Path(swept.recipes[0].output)).update(status="interrupted")
    told = []
    assert [state.status for state in sweep(swept, tell=told.append)] == ["finished"]
    assert [states[0].status for states in told] == ["waiting", "running", "finished"]


@pytest.mark.slow
def test_the_written_plan_says_what_runs(swept):
    written = yaml.safe_load((Path(swept.recipes[0].output) / "recipe.yaml").read_text())
    assert written["loss"]["gamma"] == 0


@pytest.mark.slow
def test_a_sweep_with_a_calibrated_gamma_goes_on_where_it_was(source, tmp_path, monkeypatch):
    """The run wrote the number that was found into its recipe."""
    plan = make_plan(source, [["gamma=scale:1"]], folder=tmp_path / "sweep")
    assert [(state.status, state.why) for state in sweep(plan)] == [("finished", "")]
    monkeypatch.setattr(point_module, "train", lambda *a, **k: pytest.fail("ran again"))
    assert [state.status for state in sweep(plan)] == ["finished"]


@pytest.mark.slow
def test_other_rows_in_the_same_file_stop_the_sweep(source, tiny_pairs, tmp_path):
    """Half of the points would be trained on one set of pairs, half on another."""
    rows = (tiny_pairs / "train.jsonl").read_text().splitlines(keepends=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "test.jsonl").write_text((tiny_pairs / "test.jsonl").read_text())
    (mine / "train.jsonl").write_text("".join(rows))
    sweep(make_plan(source, [["gamma=0"]], folder=tmp_path / "sweep", overrides=[f"data.train={mine}"]))
    (mine / "train.jsonl").write_text("".join(rows[:-1]))
    plan = make_plan(source, [["gamma=0,1x"]], folder=tmp_path / "sweep", overrides=[f"data.train={mine}"])
    with pytest.raises(RunFolderError, match="started with other inputs"):
        sweep(plan)
    assert not Path(plan.recipes[1].output).exists()


def test_a_run_that_another_process_writes_is_left_alone(source, tmp_path):
    plan = save_plan(make_plan(source, [["gamma=0"]], folder=tmp_path / "sweep"))
    folder = Path(plan.recipes[0].output)
    with locked(folder):
        RunWriter(folder).update(status="training")
        states = sweep(plan)
        assert [state.status for state in states] == ["failed"]
        assert "another run is writing there" in states[0].why
        assert read_object(folder / RUN_FILE) == {"status": "training"}


SCORER = """
from pathlib import Path

def fails(prompts, answers):
    raise RuntimeError("out of credits")

def score(prompts, answers):
    assert all(prompt.startswith("Number ") for prompt in prompts)
    with Path(__file__).with_name("asked").open("a") as file:
        file.write(f"{len(answers)} ")
    return [sum(answer.encode()) for answer in answers]
"""


@pytest.fixture(scope="module")
def sampled(tiny_base, tiny_pairs, tmp_path_factory):
    """A sweep of two points with answers at their ends, a snapshot and a scale, how it stood, and a file of scorers."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "judges.py").write_text(SCORER)
    write_source(folder / "tiny.yaml", tiny_base, tiny_pairs)
    measured = ["train.max_steps=2", "generation.prompts=5", "generation.max_new_tokens=4", "generation.snapshots=1"]
    measured += ["generation.scales=[0.5]"]
    plan = make_plan(folder / "tiny.yaml", [["gamma=0,1x"]], folder=folder / "sweep", overrides=measured)
    return plan, sweep(plan), folder / "judges.py"


@pytest.mark.slow
def test_the_outcome_of_a_point_has_its_kl_where_answers_were_sampled(sampled):
    plan, first, _ = sampled
    again, written = sweep(plan), json.loads((Path(plan.recipes[0].output) / "evaluation.json").read_text())
    assert first[0].metrics["kl"] == again[0].metrics["kl"] == written["generation"]["kl"]["mean"] > 0
    assert written["pairs"] == read_object(Path(plan.recipes[0].output) / RUN_FILE)["after"]


@pytest.mark.slow
def test_a_scorer_judges_points_snapshots_and_scales_against_answers_that_are_drawn_once(sampled, monkeypatch):
    """What it fails of is the points' failure and loses nothing; the same sweep judges what is there, and trains nothing."""
    plan, _, judges = sampled
    draws, real = [], judged_runs._draw
    monkeypatch.setattr(judged_runs, "_draw", lambda *given: draws.append(1) or real(*given))
    monkeypatch.setattr(point_module, "train", lambda *a, **k: pytest.fail("a finished run was trained again"))
    failed = sweep(plan, scorer=f"{judges}:fails")
    assert [state.status for state in failed] == ["failed"] * 2
    why = f"it is trained and measured, and was not judged: `scorer` {judges}:fails: RuntimeError: out of credits"
    assert failed[0].why == why and Run(plan.recipes[0].output).info.is_finished

    states, folders = sweep(plan, scorer=f"{judges}:score"), [Path(recipe.output) for recipe in plan.recipes]
    assert [state.status for state in states] == ["finished"] * 2 and draws == [1]
    asked = judges.with_name("asked").read_text().split()
    assert asked == ["5"] * 7  # ends, snapshots and scales of two runs, and π0's answers once
    tables = [state.answers() for run in map(Run, folders) for state in (run, *run.snapshots, *run.scaled)]
    for table in tables:
        assert table.reference_answer == tables[0].reference_answer
        assert table.score.tolist() == [sum(answer.encode()) for answer in table.answer]
        assert table.reference_score.tolist() == [sum(answer.encode()) for answer in table.reference_answer]
    wins = [METRICS["win_rate"](tables[at]) for at in (0, 3)]
    assert [state.metrics["win_rate"] for state in states] == wins
    observed = compare([plan.folder], repeats=100)
    assert (observed.metric, len(observed.runs)) == ("win_rate", 6)

    again = GenerationSection(scales=[])
    evaluated = evaluate(folders[1], scorer=f"{judges}:score", generation=again)  # which draws all of it anew
    assert evaluated.generation["win_rate"] == Run(folders[1]).generation["win_rate"]
    assert evaluated.drift.table.reference_answer == tables[3].reference_answer
    sweep(plan, scorer=f"{judges}:score")  # nothing is left to judge
    assert len(judges.with_name("asked").read_text().split()) == len(asked) + 2  # of eval


def test_a_scorer_without_answers_or_that_is_not_there_stops_before_anything_runs(source, tmp_path):
    plan = make_plan(source, [["gamma=0"]], folder=tmp_path / "sweep")
    with pytest.raises(UsageError, match=r"say how many prompts to ask: generation\.prompts"):
        sweep(plan, scorer="operator:eq")
    with pytest.raises(UsageError, match=r"there is no file nowhere\.py"):
        sweep(
            make_plan(source, [["gamma=0"]], folder=plan.folder, overrides=["generation.prompts=3"]), scorer="nowhere.py:score"
        )
    assert not plan.folder.exists()


def test_states_go_between_processes():
    point = Point("base", {}, 0, "runs/base/seed-0")
    state = PointState(point, "interrupted", 1.0)
    assert pickle.loads(pickle.dumps(state)) == state
    assert json.loads(json.dumps(state._asdict()))["metrics"] == {}

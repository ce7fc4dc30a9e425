"""Trackers: one run there for one here, and none that stops training.

Stand-ins have what transformers' own callbacks ask of wandb, mlflow and trackio; tensorboard is the real one.
"""

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pe_dpo.errors import RecipeError
from pe_dpo.experiments.plan import make_plan
from pe_dpo.experiments.sweep import sweep
from pe_dpo.recipe import Recipe
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter
from pe_dpo.training.trackers import Trackers, check_trackers

STEPS = SimpleNamespace(global_step=0, is_world_process_zero=True, is_hyper_param_search=False, trial_name=None)


def arguments(folder: Path) -> Any:
    return SimpleNamespace(output_dir=str(folder), run_name=None, project="huggingface", trackio_space_id=None,
                           hub_private_repo=None, trackio_bucket_id=None, trackio_static_space_id=False,
                           to_dict=lambda: {"seed": 0}, to_json_string=lambda: "{}")  # fmt: skip


class Wandb(ModuleType):
    """wandb, of which a process has one open run."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.run: Any = None
        self.runs: list[dict[str, Any]] = []
        self.network = True
        self.config = type("Config", (dict,), {"update": lambda self, *_, **__: None})()

    Error = ConnectionError
    Settings = SimpleNamespace

    def init(self, **words: Any) -> Any:
        if not self.network and words.get("mode") != "offline":
            raise ConnectionError("api.wandb.ai: Name or service not known")
        self.runs.append({**words, "steps": [], "exit_code": None})
        self.run = SimpleNamespace(_label=lambda **_: None, summary={}, finish=self.finish, dir="wandb/files")
        return self.run

    def log(self, line: dict[str, Any]) -> None:
        self.runs[-1]["steps"].append(line["train/global_step"])

    def finish(self, exit_code: int | None = None) -> None:
        self.runs[-1]["exit_code"], self.run = exit_code, None


class Mlflow(ModuleType):
    """mlflow, of which a thread has one active run."""

    __version__ = "3.0.0"

    def __init__(self) -> None:
        super().__init__("mlflow")
        limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        self.utils, self.runs, self.active = SimpleNamespace(validation=limits), list[dict[str, Any]](), None
        self.experiment = "Default"

    def is_tracking_uri_set(self) -> bool:
        return True

    def get_tracking_uri(self) -> str:
        return "file:"

    def active_run(self) -> Any:
        return self.active

    def set_experiment(self, name: str) -> None:
        self.experiment = name

    def start_run(self, run_name: str, nested: bool) -> None:
        assert self.active is None, "a run is active"
        self.active = SimpleNamespace(info=SimpleNamespace(run_id=str(len(self.runs))))
        self.runs.append({"name": run_name, "experiment": self.experiment, "steps": [], "status": None})

    def end_run(self, status: str = "FINISHED") -> None:
        self.runs[-1]["status"], self.active = status, None

    def log_params(self, params: dict[str, Any], synchronous: bool) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int, synchronous: bool) -> None:
        self.runs[-1]["steps"].append(step)


class Trackio(ModuleType):
    """trackio, which goes on with a run of the same name."""

    def __init__(self) -> None:
        super().__init__("trackio")
        nobody = SimpleNamespace(get=lambda: None)
        self.context_vars = SimpleNamespace(current_space_id=nobody, current_project=nobody)
        self.config = type("Config", (dict,), {"update": lambda self, *_, **__: None})()
        self.runs: dict[str, list[Any]] = {}
        self.open: str | None = None

    def init(self, project: str, name: str, **_: Any) -> None:
        self.open = f"{project}/{name}"
        self.runs.setdefault(self.open, [])

    def log(self, line: dict[str, Any]) -> None:
        assert self.open is not None, "no run is open"
        self.runs[self.open].append(line["train/global_step"])

    def finish(self) -> None:
        self.open = None


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules, in the places of the real ones."""
    for name in [key for key in os.environ if key.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    found = SimpleNamespace(wandb=Wandb(), mlflow=Mlflow(), trackio=Trackio())
    errors = ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = KeyError  # type: ignore[attr-defined]
    for name, module in vars(found).items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, errors.__name__, errors)
    return found


ALL = "train.report_to=[wandb,mlflow,trackio,tensorboard]"


def run_with_trackers(recipe: Recipe, *, fails: BaseException | None = None) -> None:
    """What Trainer tells of a run of three steps."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    writer = RunWriter(folder)
    writer.update(id=Run(folder).info.id or f"{abs(hash(folder)):032x}", status="training")
    args, model = arguments(folder), SimpleNamespace(num_parameters=lambda: 7)
    with Trackers(recipe, writer) as trackers:
        trackers.on_train_begin(args, SimpleNamespace(**vars(STEPS)), None, model=model)
        for step in (1, 2, 3):
            state = SimpleNamespace(**{**vars(STEPS), "global_step": step})
            trackers.on_log(args, state, None, logs={"loss": 0.5, "grad_norm": 1.0}, model=model)
            if fails is not None and step == 2:
                raise fails
        trackers.on_train_end(args, state, None, model=model)


def test_a_sweep_is_one_run_per_point_in_every_tracker(
    stand_ins: SimpleNamespace, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a point fails in the middle, and where all go into one folder of TensorBoard."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "sweep.json").write_text("{}")
    points = ["beta=0.1/seed-0", "beta=0.1/seed-1", "beta=0.2/seed-0"]
    for number, point in enumerate(points):
        recipe = make_recipe(ALL, "train.project=mine", output=f"grid/runs/{point}")
        if number == 1:
            with pytest.raises(MemoryError):
                run_with_trackers(recipe, fails=MemoryError())
        else:
            run_with_trackers(recipe)
    steps = [[1, 2, 3], [1, 2], [1, 2, 3]]
    wandb, mlflow = stand_ins.wandb.runs, stand_ins.mlflow.runs
    assert [(run["name"], run["steps"], run["exit_code"]) for run in wandb] == [*zip(points, steps, (0, 1, 0), strict=True)]
    assert {(run["project"], run["group"], run["resume"]) for run in wandb} == {("mine", "grid", "allow")}
    assert len({run["id"] for run in wandb}) == 3
    ends = ("FINISHED", "FAILED", "FINISHED")
    assert [(run["name"], run["steps"], run["status"]) for run in mlflow] == [*zip(points, steps, ends, strict=True)]
    assert {run["experiment"] for run in mlflow} == {"mine"}
    assert list(stand_ins.trackio.runs.values()) == steps
    assert [name.rpartition("-")[0] for name in stand_ins.trackio.runs] == [f"mine/{point}" for point in points]
    boards = sorted(path.parent.relative_to(tmp_path / "boards").as_posix() for path in tmp_path.rglob("events.out.*"))
    assert boards == points
    assert "MLFLOW_EXPERIMENT_NAME" not in os.environ


def test_a_run_that_goes_on_goes_on_in_the_same_run_there(
    stand_ins: SimpleNamespace, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe("train.report_to=[wandb,trackio]", "train.run_name=first try")
    for _ in range(2):
        run_with_trackers(recipe)
    assert [run["name"] for run in stand_ins.wandb.runs] == ["first try"] * 2
    assert len({run["id"] for run in stand_ins.wandb.runs}) == 1
    assert list(stand_ins.trackio.runs.values()) == [[1, 2, 3, 1, 2, 3]]


def test_somebody_elses_open_run_is_logged_into_and_stays_open(
    stand_ins: SimpleNamespace, make_recipe: Callable[..., Recipe]
) -> None:
    stand_ins.wandb.init(name="of a notebook")
    run_with_trackers(make_recipe("train.report_to=wandb"))
    assert [(run["name"], run["steps"], run["exit_code"]) for run in stand_ins.wandb.runs] == [
        ("of a notebook", [1, 2, 3], None)
    ]


def test_a_tracker_that_fails_is_said_once_written_down_and_stops_nothing(
    stand_ins: SimpleNamespace, make_recipe: Callable[..., Recipe], warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be reached, one that dies on the way, one that cannot end; the fourth gets everything."""

    def dies(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    def cannot(*_: Any) -> None:
        raise ValueError("sync failed\nfor good")

    stand_ins.wandb.network = False
    monkeypatch.setattr(stand_ins.mlflow, "log_metrics", dies)
    monkeypatch.setattr(stand_ins.trackio, "finish", cannot)
    recipe = make_recipe(ALL)
    run_with_trackers(recipe)
    unreachable = (
        "ConnectionError: api.wandb.ai: Name or service not known; recorded offline, to be sent with: wandb sync wandb/files/.."
    )
    whys = {
        "wandb": f"step 0: {unreachable}",
        "mlflow": "step 1: BrokenPipeError: [Errno 32] Broken pipe",
        "trackio": "step 3: ValueError: sync failed",
    }
    assert (Run(recipe.output).info.model_extra or {})["trackers"] == whys
    assert len(warned) == 3
    goes_on = "training goes on, and metrics.jsonl has all"
    assert warned[0] == f"warning: train.report_to: wandb fails at step 0 ({unreachable}); {goes_on}"
    assert [(run["mode"], run["steps"]) for run in stand_ins.wandb.runs] == [("offline", [1, 2, 3])]
    assert len(list(Path(recipe.output).rglob("events.out.*"))) == 1


def test_a_tracker_that_is_missing_or_misspelt_says_what_to_do() -> None:
    for name, said in (
        ("mlflow", "mlflow is not installed: pip install mlflow, or leave it out"),
        ("azure_ml", "pip install azureml-core"),
        ("wandbb", "wandbb is not a tracker of transformers; did you mean wandb?"),
        ("foo", "write one of azure_ml, clearml"),
    ):
        with pytest.raises(RecipeError) as caught:
            check_trackers([name])
        assert said in str(caught.value)
    check_trackers(["tensorboard"])


@pytest.mark.slow
def test_the_real_runs_of_a_sweep_reach_a_tracker_each_as_one(
    stand_ins: SimpleNamespace, tiny_base: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{base: '{tiny_base}', quantize: none}}\n"
        "adapter: {rank: 4}\n"
        f"data: {{train: '{tiny_pairs}'}}\n"
        "train: {max_steps: 1, pairs_per_step: 8, report_to: wandb, run_name: try}\n"
    )
    states = sweep(make_plan(tmp_path / "tiny.yaml", [["beta=0.1,0.2"]], folder=tmp_path / "grid"))
    assert [state.status for state in states] == ["finished"] * 2
    told = [(run["name"], run["group"], set(run["steps"]), run["exit_code"]) for run in stand_ins.wandb.runs]
    assert told == [("try base/seed-0", "grid", {1}, 0), ("try beta=0.2/seed-0", "grid", {1}, 0)]

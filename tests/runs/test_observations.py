"""Run folders, sweeps and TRL's logs as one table; what does not belong together is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_runs
import pyarrow.parquet
import pytest

from pe_dpo.errors import UsageError
from pe_dpo.runs.observations import base_recipe, data_sets, read_observations

WORLD = fake_runs.make_world(30, 20)


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a small run folder."""

    def write(name: str, setting: dict[str, Any] | None = None, world: Any = WORLD, **options: Any) -> Path:
        return fake_runs.write_run(tmp_path / name, setting or {}, world, **({"snapshots": 0, "steps": 4, **options}))

    return write


def change(path: Path, **values: Any) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | values), encoding="utf-8")


@pytest.mark.slow
def test_a_sweep_gives_every_run_and_every_snapshot(tmp_path: Path) -> None:
    folder = fake_runs.write_sweep(tmp_path / "sweep", pairs=30, prompts=20, snapshots=2, steps=6, seeds=(0, 1))
    observations, remarks = read_observations([folder])
    assert len(observations) == 7 * 2 * 3
    assert remarks == []
    assert {(one.step, one.is_final) for one in observations} == {(2, False), (4, False), (6, True)}
    settings = {repr(one.settings) for one in observations}
    assert settings == {
        "{}",
        "{'loss.beta': 0.025}",
        "{'loss.beta': 0.4}",
        "{'loss.gamma': '0x'}",
        "{'loss.gamma': '0.5x'}",
        "{'loss.gamma': '2x'}",
        "{'mixout.p': 0.5}",
    }


@pytest.mark.slow
def test_runs_that_are_not_finished_are_left_out_of_a_sweep_and_said(tmp_path: Path) -> None:
    folder = fake_runs.write_sweep(tmp_path / "sweep", pairs=30, prompts=20, snapshots=0, steps=2, unfinished=["gamma=0x"])
    observations, remarks = read_observations([folder])
    assert len(observations) == 20
    assert remarks == [f"{folder}: 1 of 21 runs are not finished and are left out"]


def test_a_run_that_is_not_finished_is_refused_when_it_is_named(write_run: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"second: is not finished \(status training\); finish it with pe-dpo train"):
        read_observations([write_run("first"), write_run("second", finished=False)])


def test_a_sweep_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    folder = fake_runs.write_sweep(tmp_path / "sweep", [{}], seeds=[0], pairs=30, prompts=20, unfinished=["base"])
    with pytest.raises(UsageError, match="no run of this sweep is finished"):
        read_observations([folder])


def test_settings_of_single_runs_are_turned_away_from_the_first(write_run: Callable[..., Path]) -> None:
    runs = [
        write_run("a", {"loss.beta": 0.2, "loss.gamma": "0.5x"}),
        write_run("b", {"loss.beta": 0.4, "loss.gamma": "0.5x"}),
        write_run(
            "c", {"loss.beta": 0.2, "loss.gamma": "0.5x", "mixout.p": 0.3, "generation.prompts": 5, "train.log_every": 2}
        ),
    ]
    settings = [one.settings for one in read_observations(runs)[0]]
    assert settings == [{}, {"loss.beta": 0.4}, {"mixout.p": 0.3}]


def test_gamma_counts_as_a_multiple_of_beta(write_run: Callable[..., Path]) -> None:
    """γ fixed at 0.1: at β = 0.2 it is half of β, which is another method; γ = 0.2 there is the base's own."""
    runs = [
        write_run("a", {"loss.beta": 0.1, "loss.gamma": 0.1}),
        write_run("b", {"loss.beta": 0.2, "loss.gamma": 0.1}),
        write_run("c", {"loss.beta": 0.2, "loss.gamma": 0.2}),
        write_run("d", {"loss.beta": 0.2, "loss.gamma": "1x"}),
    ]
    settings = [one.settings for one in read_observations(runs)[0]]
    of_beta = {"loss.beta": 0.2}
    assert settings[:3] == [{}, {**of_beta, "loss.gamma": "0.5x"}, of_beta]
    assert settings[3]["loss.beta"] == 0.2
    assert "loss.gamma" not in settings[3]


def test_the_base_recipe_is_that_of_the_first_sweep_or_run_whatever_log_stands_before_it(tmp_path: Path) -> None:
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "trainer_state.json").write_text(json.dumps({"log_history": LOG}), encoding="utf-8")
    sweep = fake_runs.write_sweep(tmp_path / "sweep", [{}], pairs=30, prompts=20, seeds=(0,), snapshots=0, steps=2)
    base = base_recipe([tmp_path / "trl", sweep])
    assert base is not None and base == base_recipe([sweep])
    assert [one.settings for one in read_observations([tmp_path / "trl", sweep])[0]] == [{}, {"run": "TRL trl"}]
    assert base_recipe([tmp_path / "trl"]) is None


def test_a_run_that_did_not_record_its_pairs_is_with_the_first_data_set(write_run: Callable[..., Path]) -> None:
    unknown, first, other = (write_run(name, seed=seed) for seed, name in enumerate("abc"))
    change(unknown / "run.json", hashes={})
    change(other / "run.json", hashes={"base": "b" * 64, "held_out": "e" * 64})
    assert data_sets([unknown, first, other]) == {"a": [unknown, first], "c": [other]}
    assert data_sets([unknown]) == {"a": [unknown]}


def test_a_calibrated_gamma_keeps_its_name(write_run: Callable[..., Path], tmp_path: Path) -> None:
    """Where the recipe still says auto and run.json says which κ it became."""
    first, second = write_run("a"), write_run("b", {"loss.gamma": "0.37x"})
    recipe = (second / "recipe.yaml").read_text(encoding="utf-8")
    (second / "recipe.yaml").write_text(recipe.replace("gamma: 0.37x", "gamma: auto"), encoding="utf-8")
    found = read_observations([first, second])[0][1]
    assert found.settings == {"loss.gamma": "auto"}
    assert found.kappa == pytest.approx(0.37)


def test_a_sweep_whose_recipe_calibrates_gamma_has_its_base_point_and_its_line_of_betas(tmp_path: Path) -> None:
    """γ is found anew for each β, so that κ is another; what was asked for is the same."""
    settings: list[dict[str, Any]] = [{"loss.gamma": "0.5x"}, {"loss.beta": 0.4, "loss.gamma": "0.125x"}, {"loss.gamma": "1x"}]
    sweep = fake_runs.write_sweep(tmp_path / "sweep", settings, pairs=30, prompts=20, seeds=(0,), snapshots=0, steps=2)
    recipe = (sweep / "recipe.yaml").read_text(encoding="utf-8")
    (sweep / "recipe.yaml").write_text(recipe.replace("gamma: 1x", "gamma: auto"), encoding="utf-8")
    for run in (sweep / "runs" / "gamma=0.5x" / "seed-0", sweep / "runs" / "beta=0.4,gamma=0.125x" / "seed-0"):
        change(run / "run.json", gamma_calibration={"asked": "auto", "gamma": 0.05})
    plan = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))
    plan["points"] = [point | {"settings": asked} for point, asked in
                      zip(plan["points"], ({}, {"loss.beta": 0.4}, {"loss.gamma": "1x"}), strict=True)]  # fmt: skip
    (sweep / "sweep.json").write_text(json.dumps(plan), encoding="utf-8")
    found = [one.settings for one in read_observations([sweep])[0]]
    assert found == [{}, {"loss.beta": 0.4}, {"loss.gamma": "1x"}]
    alone = [one.settings for one in read_observations(sorted((sweep / "runs").glob("*gamma=0*/seed-0")))[0]]
    assert alone == [{}, {"loss.beta": 0.1}]


def test_points_that_came_to_the_same_keep_their_seeds_together(tmp_path: Path) -> None:
    """γ = 0.05 and γ = 0.5x are one policy at β = 0.1."""
    settings: list[dict[str, Any]] = [{"loss.gamma": 0.05}, {"loss.gamma": "0.5x"}]
    sweep = fake_runs.write_sweep(tmp_path / "sweep", settings, pairs=30, prompts=20, seeds=(0, 1), snapshots=0, steps=2)
    found = [one.settings for one in read_observations([sweep])[0]]
    second = {"loss.gamma": "0.5x", "run": str(sweep / "runs" / "gamma=0.5x")}
    assert found == [{"loss.gamma": "0.5x"}, {"loss.gamma": "0.5x"}, second, second]


def test_runs_that_differ_in_seeds_alone_are_seeds_of_one_point(write_run: Callable[..., Path]) -> None:
    """However a recipe says by what it drew; a source of chance that is turned alone gets a number of its own."""
    apart = {f"train.seeds.{what}": 1 for what in ("order", "adapter", "masks")}
    runs = [
        write_run("plain"),
        write_run("order", {"train.seeds.order": 3}),
        write_run("order too", {"train.seeds.order": 3, "loss.beta": 0.2}),
        write_run("masks", {"train.seeds.masks": 2}),
        write_run("one", {**apart, "loss.beta": 0.2}),
    ]
    found, remarks = read_observations(runs)
    beta = {"loss.beta": 0.2}
    assert [(one.settings, one.seed) for one in found] == [({}, 0), ({}, 3), (beta, 3), ({}, 2), (beta, 1)]
    assert remarks == ["seeds apart (train.seeds): 2 is order 0, adapter 0, masks 2; 3 is order 3, adapter 0, masks 0"]


def test_a_run_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    sweep = fake_runs.write_sweep(tmp_path / "sweep", [{}], pairs=30, prompts=20, seeds=(0,), snapshots=0, steps=2)
    (sweep / "here").mkdir()
    twice = [sweep, sweep / "here" / ".." / "runs" / "base" / "seed-0"]
    assert [one.settings for one in read_observations(twice)[0]] == [{}]


def test_snapshots_measured_otherwise_than_the_end_of_their_run_are_left_out_and_said(write_run: Callable[..., Path]) -> None:
    """The end was measured again: on other pairs, or with answers of another length."""
    run = write_run("a", snapshots=2)
    assert len(read_observations([run])[0]) == 3
    change(run / "evaluation.json", generation={"max_new_tokens": 256})
    observations, remarks = read_observations([run])
    assert [one.step for one in observations] == [4]
    assert any("2 snapshots" in remark and "are left out" in remark for remark in remarks)
    other = write_run("b", world=fake_runs.make_world(25, 20), snapshots=2)
    run = write_run("c", snapshots=2)
    (run / "eval_pairs.parquet").write_bytes((other / "eval_pairs.parquet").read_bytes())
    assert [one.step for one in read_observations([run])[0]] == [4]


def test_runs_trained_on_other_pairs_are_told_from_each_other(write_run: Callable[..., Path]) -> None:
    first, second = write_run("a"), write_run("b", seed=1)
    assert read_observations([first, second])[1] == []
    hashes = json.loads((second / "run.json").read_text(encoding="utf-8"))["hashes"]
    change(second / "run.json", hashes=hashes | {"data": "another"})
    assert any("trained on other pairs" in remark for remark in read_observations([first, second])[1])


def test_runs_of_equal_settings_and_seed_stay_apart(write_run: Callable[..., Path]) -> None:
    found = read_observations([write_run("a"), write_run("b"), write_run("c", seed=1)])[0]
    assert [one.settings.get("run", "").rsplit("/", 1)[-1] for one in found] == ["", "b", ""]


def test_pairs_are_matched_whatever_their_order(write_run: Callable[..., Path]) -> None:
    first, second = write_run("a"), write_run("b", seed=1)
    table = pyarrow.parquet.read_table(second / "eval_pairs.parquet")
    pyarrow.parquet.write_table(table.take(list(reversed(range(30)))), second / "eval_pairs.parquet")
    one, two = read_observations([first, second])[0]
    assert one.pairs is not None
    assert two.pairs is not None
    assert (one.pairs.prompt_key, one.pairs.where) == (two.pairs.prompt_key, two.pairs.where)
    assert (one.pairs.reference_chosen == two.pairs.reference_chosen).all()


@pytest.mark.parametrize(
    ("key", "words"), [("base", "has another base than .*compare runs from one base"), ("held_out", "has other held-out pairs")]
)
def test_runs_from_another_base_or_on_other_pairs_are_refused(write_run: Callable[..., Path], key: str, words: str) -> None:
    first, second = write_run("a"), write_run("b", seed=1)
    hashes = json.loads((second / "run.json").read_text(encoding="utf-8"))["hashes"]
    change(second / "run.json", hashes=hashes | {key: "another"})
    with pytest.raises(UsageError, match=words):
        read_observations([first, second])


def test_pairs_that_differ_are_refused_even_without_a_hash(write_run: Callable[..., Path]) -> None:
    """30 pairs of 20 prompts against 25 of them: all are among the 30, 5 are missing."""
    first, second = write_run("a"), write_run("b", world=fake_runs.make_world(25, 20), seed=1)
    for run in (first, second):
        change(run / "run.json", hashes={})
    with pytest.raises(UsageError, match=r"0 of its 25 held-out pairs are not among the 30 of .*, and 5 of those are missing"):
        read_observations([first, second])


def test_answers_cut_at_another_length_are_refused(write_run: Callable[..., Path]) -> None:
    """The KL of an answer that is cut is another quantity."""
    first, second = write_run("a"), write_run("b", seed=1)
    generation = json.loads((second / "evaluation.json").read_text(encoding="utf-8"))["generation"]
    change(second / "evaluation.json", generation=generation | {"max_new_tokens": 32})
    with pytest.raises(UsageError, match=r"cut after 32 tokens, those of .* after 64"):
        read_observations([first, second])


def test_what_is_no_run_is_refused_with_what_would_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: is neither a run \(run.json\), nor a sweep .* nor a log of TRL"):
        read_observations([tmp_path / "nowhere"])


def test_a_torn_file_is_named(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    (run / "eval_pairs.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UsageError, match=r"eval_pairs.parquet: cannot be read.*pe-dpo eval"):
        read_observations([run])


def test_a_torn_record_is_named_with_what_to_do(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    (run / "run.json").write_text("")
    with pytest.raises(UsageError, match=r"run.json: cannot be read.*restore the file"):
        read_observations([run])


@pytest.mark.parametrize("content", ['{"generation": 3}', '{"pairs": [1]}'])
def test_an_evaluation_of_another_shape_is_named(write_run: Callable[..., Path], content: str) -> None:
    run = write_run("a")
    (run / "evaluation.json").write_text(content)
    with pytest.raises(UsageError, match=r"evaluation.json: \w+ is .*not an object; write it again"):
        read_observations([run])


LOG = [
    {"epoch": 0.5, "loss": 0.69, "rewards/accuracies": 0.5, "step": 5},
    {"epoch": 0.5, "eval_loss": 0.68, "eval_rewards/accuracies": 0.6, "step": 5},
    {"eval_loss": 0.66, "eval_rewards/accuracies": 0.7, "eval_runtime": 2.0, "eval_samples_per_second": 15.0, "step": 10},
    {"train_runtime": 10.0, "train_loss": 0.67, "step": 10},
]


def test_the_last_evaluation_in_a_log_of_trl_is_read(tmp_path: Path) -> None:
    """From the newest checkpoint of its output folder; pairs are seconds times pairs a second."""
    for step in (5, 10):
        folder = tmp_path / "peer" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        history = [line for line in LOG if line["step"] <= step]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}), encoding="utf-8")
    shutil.rmtree(tmp_path / "peer" / "checkpoint-5", ignore_errors=False)
    for target in (tmp_path / "peer", tmp_path / "peer" / "checkpoint-10" / "trainer_state.json"):
        (found,) = read_observations([target])[0]
        assert (found.source, found.step, found.settings) == ("trl", 10, {"run": "TRL peer"})
        assert found.logged["rewards/accuracies"] == 0.7
        assert found.logged["pairs"] == 30
        assert found.pairs is None


@pytest.mark.parametrize("history", [3, [3, None], [{"eval_loss": None, "step": 1}], [{"eval_loss": 0.5, "step": None}]])
def test_a_log_of_trl_that_is_not_as_trl_writes_it_is_named(tmp_path: Path, history: Any) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"trainer_state.json: (is no log as TRL writes it|logs no evaluation)"):
        read_observations([tmp_path])


def test_a_log_of_trl_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": LOG[:1]}), encoding="utf-8")
    with pytest.raises(UsageError, match="logs no evaluation; give TRL's trainer an eval_dataset"):
        read_observations([tmp_path])

"""The best evaluation's adapter is kept, a run without patience left ends, and how much of the best is luck is said."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from killed import KillAt, Killed
from one_base import train
from safetensors.torch import load_file
from transformers import TrainerCallback

from pe_dpo.chat.side_by_side import open_side_by_side
from pe_dpo.errors import DataError, ModelError, RecipeError, UsageError
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.inference.policy import SavedPolicy
from pe_dpo.merging.merge import merge
from pe_dpo.metrics.catalogue import SELECTING
from pe_dpo.recipe.schema import SelectingMetric
from pe_dpo.runs.checkpoints import checkpoints
from pe_dpo.runs.files import best_folder
from pe_dpo.runs.run import Run
from pe_dpo.runs.serving import steps_to_serve

SETTINGS = (
    *("train.keep_best=loss", "train.patience=2", "train.eval_every=1", "train.save_every=1", "train.epochs=3"),
    *("train.learning_rate=0.1", "train.max_grad_norm=0", "train.schedule=constant", "train.log_every=2"),
)
"""Steps that are far too long: the held-out loss falls, and then rises."""
FILE = "adapter_model.safetensors"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in Run(folder).metrics]


@pytest.fixture(scope="module")
def straight(tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """The uninterrupted run, and its adapter at each evaluation."""
    adapters = {}

    class Look(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            adapters[state.global_step] = {
                name: one.detach().clone() for name, one in model.named_parameters() if "lora" in name
            }

    folder = train(tiny_recipe(tmp_path_factory.mktemp("best") / "run", *SETTINGS), callbacks=[Look()]).folder
    return folder, adapters


def losses(folder: Path) -> dict[int, float]:
    """The held-out loss of each evaluation after training began, from the log."""
    return {line["step"]: line["eval_loss"] for line in Run(folder).metrics if "eval_loss" in line and line["step"]}


@pytest.mark.slow
def test_the_best_is_kept_and_the_run_ends_when_patience_is_at_its_end(straight: tuple[Path, dict[int, Any]]) -> None:
    folder, adapters = straight
    found, info = losses(folder), Run(folder).info
    best = min(found, key=found.__getitem__)
    assert best < len(found) < 9, "the example has a best that is neither its first step nor its last"
    assert len(found) == best + 2 and info.step == best + 2 and info.is_finished
    record = json.loads((folder / "best" / "best.json").read_text())
    assert (record["step"], record["value"], record["metric"]) == (best, found[best], "loss")
    kept = load_file(folder / "best" / FILE)
    for name, tensor in adapters[best].items():
        assert torch.equal(kept[name.replace(".default", "")], tensor)
    assert (
        info.ended == f"ended after step {best + 2} of 9: no better loss since step {best}, in 2 evaluations (train.patience)"
    )
    assert max(line["step"] for line in lines(folder) if "grad_norm" in line) == info.step, "the last step is logged"
    assert (info.best.step, info.best.value, info.best.evaluations) == (best, found[best], len(found))
    card = (folder / "README.md").read_text()
    assert f"| {found[best]:.4f} |" in (folder / "best" / "README.md").read_text()
    assert info.ended in card and f"Best loss {found[best]:.4f} at step {best}, of {len(found)} evaluations" in card


@pytest.mark.slow
def test_killed_before_and_after_the_best_it_is_the_same_to_the_bit(
    straight: tuple[Path, dict[int, Any]], make_recipe: Callable
) -> None:
    folder, _ = straight
    best, last = json.loads((folder / "best" / "best.json").read_text())["step"], Run(folder).info.step
    recipe = make_recipe(*SETTINGS)
    for step in (1, best + 1, last):
        with pytest.raises(Killed):
            train(recipe, resume=step > 1, callbacks=[KillAt(step)])
        if step == 1:  # as if it had been killed later, with a best that is not yet one in the checkpoint
            shutil.rmtree(Path(recipe.output) / "best")
            shutil.copytree(folder / "best", Path(recipe.output) / "best")
        if step == best + 1:  # as if it had been killed while the best was replaced
            (Path(recipe.output) / "best").rename(Path(recipe.output) / ".best.old")
            (Path(recipe.output) / ".best.new").mkdir()
    result = train(recipe, resume=True)  # patience ended with the checkpoint: it is only read back
    assert result.steps == last
    assert lines(result.folder) == lines(folder)
    assert not [*result.folder.glob(".best*")]
    for name in (f"best/{FILE}", "best/evaluation.json", FILE):
        assert (result.folder / name).read_bytes() == (folder / name).read_bytes(), name
    left, right = Run(result.folder).info, Run(folder).info
    assert (left.best, left.ended, left.after) == (right.best, right.ended, right.after)
    assert json.loads((result.folder / "best" / "best.json").read_text())["step"] == best
    assert (checkpoints(result.folder)[-1] / "best" / FILE).read_bytes() == (folder / "best" / FILE).read_bytes()


@pytest.fixture
def run(straight: tuple[Path, dict[int, Any]], tmp_path: Path) -> Path:
    """A copy of the straight run."""
    return Path(shutil.copytree(straight[0], tmp_path / "run"))


@pytest.mark.slow
def test_the_best_is_evaluated_merged_talked_to_and_served(run: Path, tmp_path: Path) -> None:
    best = Run(run).best
    assert best is not None and best.step == Run(run).info.best.step
    found = evaluate(run, best=True)
    assert found.kind == "run"
    assert found.metrics["loss"] == pytest.approx(Run(run).info.best.value, abs=1e-6)
    assert best.metrics_of_pairs["loss"] == Run(run).info.best.value != Run(run).info.after["loss"]
    verdict = merge(run, tmp_path / "merged", pairs=4, best=True)
    assert verdict.describe().startswith("serves what was trained")
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["adapter_sha256"] == json.loads((run / "best" / "best.json").read_text())["adapter"][FILE]
    tuned = open_side_by_side(run, best=True).policy.model
    weight = next(one for name, one in tuned.named_parameters() if "lora_B" in name)
    assert any(torch.equal(weight, tensor) for tensor in load_file(run / "best" / FILE).values())
    commands = [step.lines for step in steps_to_serve(best_folder(run))]
    assert any("pe-dpo merge" in line and f"{run.name} --best" in line for lines in commands for line in lines)


@pytest.mark.slow
def test_a_damaged_best_is_refused_and_so_is_none(run: Path, make_recipe: Callable) -> None:
    shutil.copy(run / FILE, run / "best" / FILE)
    with pytest.raises(ModelError, match=rf"best/{FILE}: is not what training wrote"):
        SavedPolicy(run, best=True)
    shutil.rmtree(run / "best")
    with pytest.raises(UsageError, match=r"has no best adapter; a run keeps one with train\.keep_best"):
        SavedPolicy(run, best=True)
    with pytest.raises(DataError, match=r"train\.keep_best: loss is measured on held-out pairs, and none are held out"):
        train(make_recipe("train.keep_best=loss", "data.eval=0.0", output="other"))


def test_metrics_are_named_as_in_the_catalogue_and_as_others_do(make_recipe: Callable) -> None:
    assert set(get_args(SelectingMetric)) == set(SELECTING)
    assert SELECTING["loss"] == SELECTING["nll/chosen_per_token"] == -1 and SELECTING["rewards/accuracies"] == 1
    for name, meant in {
        "eval_loss": "loss",
        "accuracy": "accuracy/policy",
        "eval_rewards/accuracies": "rewards/accuracies",
    }.items():
        assert make_recipe(f"train.keep_best={name}").train.keep_best == meant
    with pytest.raises(RecipeError, match=r"train\.keep_best: found 'speed'; input should be 'loss', 'accuracy/policy'"):
        make_recipe("train.keep_best=speed")
    with pytest.raises(RecipeError, match=r"train\.patience: counts evaluations without a better keep_best"):
        make_recipe("train.patience=3")


def test_how_much_of_the_best_is_luck_is_a_number_and_a_sentence() -> None:
    """Ten equal points of 400 pairs, right with chance 0.7: the largest of ten normal draws is 1.54 of their errors above."""
    from pe_dpo.training.best import KeepBest

    class Trainer:
        held_out = range(400)

    random = np.random.default_rng(0)
    found = []
    for _ in range(6):
        keeper = KeepBest(Trainer(), None, "accuracy/policy", None)  # type: ignore[arg-type]
        keeper.steps = [*range(10, 110, 10)]
        keeper.sums = [((random.random(400) < 0.7).astype(float), np.ones(400)) for _ in keeper.steps]
        summary = keeper.summary({"accuracy/policy": 0.1})
        assert summary is not None
        assert summary.expected == summary.value - summary.luck and summary.value == keeper.values.max()
        found.append(summary.luck)
    error = math.sqrt(0.7 * 0.3 / 400)
    assert np.mean(found) == pytest.approx(1.54 * error, rel=0.2)
    words = summary.describe()
    assert re.fullmatch(
        r"Best accuracy, summed log-probs 0\.7\d\d at step \d+, of 10 evaluations \(the last: 0\.\d+\)\. It was picked on the "
        r"400 pairs that measured it: about 0\.0\d+ of it is luck, so that 0\.\d+ is to be expected on others\.",
        words,
    ), words

"""Runs whose score weighs the rejected answer apart, or whose pairs have a β and a weight of their own.

Each is trained, resumed, evaluated, audited and reported as what it is.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_base import train
from safetensors.torch import load_file

from pe_dpo.audit.audit import audit
from pe_dpo.errors import DataError, RunFolderError
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.report.run_report import report_run
from pe_dpo.runs.run import Run
from pe_dpo.training.train import train as train_anew

pytestmark = pytest.mark.slow
SHIFT = ("loss.preset=dpo-shift", "loss.beta=0.5", "loss.rejected_weight=0.5", "train.save_every=2", "train.eval_every=3")


@pytest.fixture(scope="module")
def shifted(tiny_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of six steps with λ = ½."""
    return train(tiny_recipe(tmp_path_factory.mktemp("shifted") / "run", *SHIFT))


def assert_same_adapter(folder: Path, other: Path) -> None:
    one, two = (load_file(each / "adapter_model.safetensors") for each in (folder, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_with_a_rejected_weight_has_its_scores(shifted: Any) -> None:
    """z = ½·((log π+ − ½·log π−) − (log π0+ − ½·log π0−)), from the log-probs of eval_pairs.parquet in NumPy."""
    table = Run(shifted.folder).pairs()
    assert table is not None
    moved_chosen, moved_rejected = (table.displacement(side) for side in ("chosen", "rejected"))
    np.testing.assert_allclose(table.score, 0.5 * (moved_chosen - 0.5 * moved_rejected), rtol=0, atol=1e-9)
    np.testing.assert_allclose(table.weight, 1 / (1 + np.exp(table.score)), rtol=1e-9)
    np.testing.assert_allclose(table.reward_margin, 0.5 * (moved_chosen - moved_rejected), rtol=0, atol=1e-9)
    assert abs(moved_rejected).max() > 1e-3
    assert shifted.before["loss"] == pytest.approx(np.log(2), rel=1e-12)
    assert shifted.after["margin/q50"] == pytest.approx(np.median(table.delta() - table.score / 0.5), rel=1e-12)


def test_it_lets_rejected_answers_fall_less_than_dpo_does(shifted: Any, make_recipe: Any) -> None:
    plain = train(make_recipe("loss.beta=0.5"))
    assert shifted.after["displacement/rejected"] > plain.after["displacement/rejected"] + 0.1
    assert shifted.after["displacement/chosen"] > plain.after["displacement/chosen"]


def test_evaluation_and_report_read_it_as_it_was_trained(shifted: Any) -> None:
    assert evaluate(shifted.folder).metrics == pytest.approx(shifted.after, rel=1e-9)
    section = next(section for section in report_run(shifted.folder).sections if section.name == "preferences")
    start, end = (next(plot for plot in section.plots if plot.name == f"preferences-{when}") for when in ("start", "end"))
    assert "Margins differ between pairs; the line is that of the median margin." in end.caption
    (line,) = (line for line in start.figure.axes[0].get_lines() if str(line.get_label()).startswith("z = 0"))
    assert line.get_ydata()[-1] == pytest.approx(line.get_xdata()[-1], abs=1e-9)  # π is π0: z = 0 where Δπ = Δ0


def stop_at_the_first_save() -> Any:
    """A callback that ends the run behind its first checkpoint."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    return Stop()


def test_it_resumes_to_the_bit(shifted: Any, make_recipe: Any) -> None:
    recipe = make_recipe(*SHIFT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[stop_at_the_first_save()])
    again = train(recipe, resume=True)
    assert again.after == shifted.after
    assert_same_adapter(again.folder, shifted.folder)


def test_an_audit_foretells_step_0_and_gives_no_gamma_that_rests_on_other_scores(make_recipe: Any) -> None:
    """All 24 pairs are in the first step."""
    recipe = make_recipe(*SHIFT, "loss.beta=0.1", "loss.gamma=1.1x", "train.pairs_per_step=24", "train.max_steps=1")
    found, first = audit(recipe), Run(train(recipe).folder).metrics[1]
    assert found.recipe.loss == pytest.approx(first["loss"], rel=1e-6)
    assert found.recipe.weight_right == pytest.approx(first["regimes/policy_right_reference_right/weight_share"], rel=1e-6)
    assert found.recipe.loss != pytest.approx(np.log(2), rel=1e-3)
    assert {*map(type, found.ways.values())} == {str}
    assert all("rests on Δ0, which is not in the score with rejected_weight 0.5" in str(why) for why in found.ways.values())


# ---------------------------------------------------------------- a β and a weight of each pair

OWN = ("data.columns={beta: b, weight: w}", "loss.gamma=0.5x", "train.save_every=2", "train.eval_every=3")


def write_pairs(source: Path, folder: Path, terms: Any) -> Path:
    """Copies the tiny pairs, each row as often as `terms` has something to add to it, with that."""
    folder.mkdir(exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        rows = [json.loads(line) for line in (source / name).read_text().splitlines()]
        new = [{**row, **more} for number, row in enumerate(rows) for more in terms(number)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in new))
    return folder


def own_terms(number: int) -> list[dict[str, float]]:
    return [{"b": (0.1, 0.3, 1.0)[number % 3], "w": (1, 0.5, 0, 2)[number % 4]}]


@pytest.fixture(scope="module")
def own_pairs(tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tiny_pairs, tmp_path_factory.mktemp("own") / "pairs", own_terms)


@pytest.fixture(scope="module")
def own(tiny_recipe: Any, own_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of six steps whose pairs have β 0.1, 0.3 and 1 and weights 1, ½, 0 and 2."""
    return train(tiny_recipe(tmp_path_factory.mktemp("own") / "run", f"data.train={own_pairs}", *OWN))


def test_a_run_has_the_scores_of_each_pairs_beta_and_the_losses_of_its_weight(own: Any, own_pairs: Path) -> None:
    """z = b·Δπ − ½·b·Δ0, loss = −w·log σ(z), weight = w·b/0.1·σ(−z): from the file's numbers and log-probs in NumPy."""
    table = Run(own.folder).pairs()
    assert table is not None
    lines = [int(where.rpartition(":")[2]) - 1 for where in table.where]
    beta, weight = (np.array([own_terms(line)[0][name] for line in lines]) for name in "bw")
    assert (table.pair_beta.tolist(), table.pair_weight.tolist()) == (beta.tolist(), weight.tolist())  # type: ignore[union-attr]
    score = beta * (table.delta() - 0.5 * table.delta("reference"))
    np.testing.assert_allclose(table.score, score, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(table.loss, weight * np.logaddexp(0, -score), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(table.weight, weight * beta / 0.1 / (1 + np.exp(score)), rtol=1e-9, atol=1e-12)
    assert own.after["loss"] == pytest.approx(table.loss.mean(), rel=1e-12)
    np.testing.assert_allclose(table.effective_margin(), 0.5 * table.delta("reference"), rtol=0, atol=1e-9)


def test_what_a_run_leaves_says_so_and_evaluation_report_and_audit_take_it(own: Any, make_recipe: Any, own_pairs: Path) -> None:
    run = Run(own.folder)
    assert run.info.loss["formula"].startswith("weight·(−log σ(z)),  z = β·Δπ − 0.5·β·Δ0,  Δ")
    assert (run.data_report or {})["pair_numbers"]["weight"] == {"min": 0, "mean": 0.875, "max": 2}
    assert "β is each pair's own" in (own.folder / "README.md").read_text()
    assert evaluate(own.folder).metrics == pytest.approx(own.after, rel=1e-9)
    assert any(section.name == "preferences" and section.plots for section in report_run(own.folder).sections)
    recipe = make_recipe(f"data.train={own_pairs}", *OWN, "train.pairs_per_step=24", "train.max_steps=1")
    found, first = audit(recipe), Run(train(recipe).folder).metrics[1]
    assert found.recipe.loss == pytest.approx(first["loss"], rel=1e-6)
    assert found.recipe.weight_right == pytest.approx(first["regimes/policy_right_reference_right/weight_share"], rel=1e-6)


def test_other_pairs_are_evaluated_with_the_losss_beta_and_weight_one(own: Any, tiny_pairs: Path, logged: list[str]) -> None:
    """They need not bring numbers that are about training; where they do, these count."""
    found = evaluate(own.folder, data=str(tiny_pairs / "test.jsonl"))
    table = found.scored
    score = 0.1 * (table.delta() - 0.5 * table.delta("reference"))
    np.testing.assert_allclose(table.loss, np.logaddexp(0, -score), rtol=1e-9)
    assert any("has no column 'b', so all its pairs have the loss's β" in line for line in logged)
    assert any("has no column 'w', so all its pairs have weight 1" in line for line in logged)
    assert not any("weight of each pair from its column: 1 to 1" in line for line in logged)


def test_it_resumes_to_the_bit_and_not_with_other_weights(own: Any, make_recipe: Any, tiny_pairs: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tiny_pairs, tmp_path / "pairs", own_terms)
    recipe = make_recipe(f"data.train={pairs}", *OWN)
    with pytest.raises(KeyboardInterrupt):
        train_anew(recipe, callbacks=[stop_at_the_first_save()])
    write_pairs(tiny_pairs, pairs, lambda number: [{**own_terms(number)[0], "w": 1}])
    with pytest.raises(RunFolderError, match="other inputs"):
        train_anew(recipe, resume=True)
    write_pairs(tiny_pairs, pairs, own_terms)
    again = train_anew(recipe, resume=True)
    assert again.after == own.after
    assert_same_adapter(again.folder, own.folder)


def test_betas_and_weights_that_all_are_the_losss_give_its_run_to_the_bit(
    make_recipe: Any, tiny_pairs: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tiny_pairs, tmp_path / "pairs", lambda number: [{"b": 0.1, "w": 1}])
    one = train(make_recipe(f"data.train={pairs}", *OWN, "train.max_steps=2", output="one"))
    assert_same_adapter(one.folder, train(make_recipe("loss.gamma=0.5x", "train.max_steps=2", output="other")).folder)


def test_weights_are_copies_and_missing_pairs_in_a_step(make_trainer: Any, tiny_pairs: Path, tmp_path: Path) -> None:
    """Σ of the gradients: weights 0, 1 and 2 against rows left out, kept and doubled; a step divides by its pairs."""
    pairs = write_pairs(tiny_pairs, tmp_path / "weights", lambda number: [{"w": number % 3}])
    copies = write_pairs(tiny_pairs, tmp_path / "copies", lambda number: [{}] * (number % 3))
    found = []
    for changes in ((f"data.train={pairs}", "data.columns={weight: w}"), (f"data.train={copies}",)):
        trainer = make_trainer(*changes)
        count = len(trainer.train_dataset)
        loss = count * float(trainer.training_step(trainer.model, trainer.train_dataset))
        found.append((loss, count * torch.cat([p.grad.flatten() for p in adapter_parameters(trainer.model)])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert (found[0][1] - found[1][1]).norm() <= 1e-5 * found[1][1].norm()
    assert found[0][1].norm() > 1e-3


def test_a_first_step_of_pairs_without_weight_is_no_fault_and_a_run_of_them_is(
    make_recipe: Any, tiny_pairs: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tiny_pairs, tmp_path / "pairs", lambda number: [{"w": 0}])
    settings = (f"data.train={pairs}", "data.columns={weight: w}", "train.max_steps=1")
    with pytest.raises(DataError, match="all pairs have weight 0, so that nothing would be learned"):
        train_anew(make_recipe(*settings))
    write_pairs(tiny_pairs, pairs, lambda number: [{"w": float(number == 23)}])
    assert train_anew(make_recipe(*settings, "train.pairs_per_step=1", "train.seed=3")).steps == 1

"""Runs whose score weighs the rejected answer apart: trained, resumed, evaluated, audited and reported as they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pe_dpo.audit.audit import audit
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.report.run_report import report_run
from pe_dpo.runs.run import Run
from pe_dpo.training.train import train

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


def test_it_resumes_to_the_bit(shifted: Any, make_recipe: Any) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    recipe = make_recipe(*SHIFT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[Stop()])
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

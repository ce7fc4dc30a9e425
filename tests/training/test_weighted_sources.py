"""A run on several places with weights: its page and report name them, resume and evaluation find the same pairs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from killed import KillAt, Killed

from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.report.run_report import report_run
from pe_dpo.runs.run import Run
from pe_dpo.training.train import train


@pytest.mark.slow
def test_a_run_on_weighted_places_is_resumed_and_evaluated_on_the_same_pairs(make_recipe: Callable, tmp_path: Path) -> None:
    for name, letter in (("one", "a"), ("other", "b")):
        rows = [{"prompt": f"Number {letter}{n}?", "chosen": "Yes!", "rejected": "No."} for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = f"[{{path: {tmp_path}/one.jsonl, weight: 0.5}}, {{path: '{tmp_path}/oth*.jsonl', weight: 2}}]"
    recipe = make_recipe(f"data.train={places}", "data.eval=0.2", "train.save_every=1", "train.max_steps=2")
    with pytest.raises(Killed):
        train(recipe, callbacks=[KillAt(1)])
    begun = Run(recipe.output).info
    train(recipe, resume=True)
    run = Run(recipe.output)
    assert run.recipe == recipe
    assert (run.info.hashes.data, run.info.hashes.held_out) == (begun.hashes.data, begun.hashes.held_out)
    report = json.loads((run.folder / "data_report.json").read_text())
    (one, other) = report["sources"]
    assert other["trained_on"] == 2 * other["pairs"]
    assert one["trained_on"] == round(one["pairs"] / 2)
    assert report["kept"] == run.info.pairs["train"] == one["trained_on"] + other["trained_on"]
    assert run.info.pairs["held_out"] == 8 == len(set(report["held_out_rows"]))
    assert evaluate(recipe.output)
    facts = {name: value for section in report_run(run.folder).sections for name, value in section.facts}
    assert facts["Data"] == f"{tmp_path}/one.jsonl (weight 0.5), {tmp_path}/oth*.jsonl (weight 2)"

"""A run goes on with, is evaluated and merged on the rows that it held out, also one from before runs named them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from killed import KillAt, Killed

from pe_dpo.audit.audit import audit
from pe_dpo.data import data_hash
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.experiments.point import share
from pe_dpo.inference import inputs
from pe_dpo.merging.source import Source
from pe_dpo.recipe import Recipe
from pe_dpo.runs.run import Run
from pe_dpo.training.train import train

PROMPTS = 12


@pytest.fixture(scope="module")
def colliding(tiny_base: Path, tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Recipe]:
    """A recipe whose pairs have each prompt with and without a final line break, which the template of its base trims."""
    folder = tmp_path_factory.mktemp("colliding")
    base = Path(shutil.copytree(tiny_base, folder / "base"))
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "(message['content'] | trim)"))
    rows = [{"prompt": f"Number {n}?{end}", "chosen": "Yes!", "rejected": "No."} for n in range(PROMPTS) for end in ("", "\n")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"model.base={base}",
        f"data.train={folder / 'pairs.jsonl'}",
        "data.eval=0.29",
        "train.max_steps=2",
        "train.save_every=1",
    )
    return lambda name: tiny_recipe(folder / name, *settings)


@pytest.fixture(scope="module")
def runs(colliding: Callable[[str], Recipe]) -> Callable[[bool], Recipe]:
    """Recipes of a run that was killed after its first step, of now or of before."""

    def make(is_old: bool) -> Recipe:
        recipe = colliding("old" if is_old else "new")
        if Run(recipe.output).exists:
            return recipe
        with pytest.MonkeyPatch.context() as patch:
            if is_old:
                prepare = inputs.prepare_pairs
                patch.setattr(inputs, "prepare_pairs", lambda *args, **options: prepare(*args, **{**options, "recorded": {}}))
            with pytest.raises(Killed):
                train(recipe, callbacks=[KillAt(1)])
        return recipe

    return make


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
def test_a_run_is_gone_on_with_evaluated_and_merged_on_what_it_held_out(runs: Callable[[bool], Recipe], is_old: bool) -> None:
    recipe = runs(is_old)
    run = Run(recipe.output)
    hashes, report = run.info.hashes, run.data_report
    assert report is not None
    assert (report["held_out_rows"] is None) == is_old
    assert audit(recipe).pairs == run.info.pairs["train"]

    train(recipe, resume=True)
    found = evaluate(recipe.output)
    assert data_hash(found.pairs) == hashes.held_out == Run(recipe.output).info.hashes.held_out
    assert found.metrics["accuracy/policy"] == run.info.after["accuracy/policy"]
    assert found.scored.initial_chosen == pytest.approx(run.pairs().initial_chosen)
    source = Source(Path(recipe.output), data=None, pairs=99, base=None, quantize=None, allow_base_mismatch=False)
    assert data_hash(source.pairs) == hashes.held_out


@pytest.mark.slow
def test_only_the_old_run_trains_on_held_out_prompts(runs: Callable[[bool], Recipe]) -> None:
    for is_old in (True, False):
        data = inputs.read_inputs(recipe := runs(is_old), recorded=Run(recipe.output).data_report).data
        sides = [{pair.prompt_ids.tobytes() for pair in side} for side in (data.train, data.held_out)]
        assert bool(sides[0] & sides[1]) == is_old
        assert any("read in training too" in line for line in data.report.warnings) == is_old


@pytest.mark.slow
def test_the_runs_of_a_sweep_share_what_its_first_run_held_out(runs: Callable[[bool], Recipe]) -> None:
    for is_old in (True, False):
        recipe = runs(is_old)
        shared = share(recipe, Path(recipe.output))
        assert data_hash(shared.data.held_out) == Run(recipe.output).info.hashes.held_out

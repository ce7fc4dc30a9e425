"""Run folders as version 0.1.0 wrote them: one finished, one killed after its first checkpoint.

Their base and pairs are the quickstart's, which lay in /srv/quickstart then; those of the package today are the same.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pe_dpo import compare, evaluate
from pe_dpo.export.public_adapter import write_public_adapter
from pe_dpo.merging.merge import merge
from pe_dpo.quickstart.demo import BASE, PAIRS
from pe_dpo.recipe.schema import GenerationSection
from pe_dpo.runs.run import Run
from pe_dpo.runs.serving import steps_to_serve
from pe_dpo.training.train import train

OLD = Path(__file__).parent / "old"


@pytest.fixture
def old_run(tmp_path: Path) -> Callable[[str], Run]:
    """A copy of an old run, with base and pairs where they lie today."""

    def copy(name: str) -> Run:
        folder = tmp_path / name
        shutil.copytree(OLD / name, folder)
        recipe = folder / "recipe.yaml"
        text = recipe.read_text(encoding="utf-8")
        for then, now in (
            ("/srv/quickstart/base", BASE),
            ("/srv/quickstart/pairs", PAIRS),
            (f"/srv/quickstart/{name}", folder),
        ):
            text = text.replace(then, str(now))
        recipe.write_text(text, encoding="utf-8")
        return Run(folder)

    return copy


def test_a_finished_run_is_read_whole(old_run: Callable[[str], Run]) -> None:
    run = old_run("finished")
    assert (run.info.status, run.info.step, run.info.id, run.info.base["quantize"]) == ("finished", 8, None, "nf4")
    assert run.kappa == 1
    pairs, answers = run.pairs(), run.answers()
    assert pairs is not None
    assert answers is not None
    assert len(pairs) == run.info.pairs["held_out"]
    assert np.mean(pairs.delta() > 0) == pytest.approx(run.info.after["accuracy/policy"])
    assert np.mean(answers.kl) > 0
    assert [state.step for state in run.snapshots] == [4]
    assert run.curve("loss").steps[-1] == 8
    assert run.curve("watched/loss").values[0] == pytest.approx(np.log(2))


@pytest.mark.slow
def test_a_finished_run_is_evaluated_as_it_evaluated_itself(old_run: Callable[[str], Run]) -> None:
    run = old_run("finished")
    metrics = evaluate(run.folder, generation=GenerationSection(prompts=0)).metrics  # its answers are another matter
    after = run.info.after
    assert {key: metrics[key] for key in after} == pytest.approx(after, rel=1e-4, abs=1e-4)


def test_finished_runs_are_compared(old_run: Callable[[str], Run]) -> None:
    found = compare([old_run("finished").folder], metric="accuracy/policy")
    assert found.runs[0].value == pytest.approx(Run(OLD / "finished").info.after["accuracy/policy"])


@pytest.mark.slow
def test_a_finished_run_is_merged_with_proof(old_run: Callable[[str], Run], tmp_path: Path) -> None:
    verdict = merge(old_run("finished").folder, tmp_path / "merged", pairs=4)
    assert verdict.describe().startswith("serves what was trained")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_as_the_one_that_was_not(old_run: Callable[[str], Run], logged: list[str]) -> None:
    run = old_run("interrupted")
    assert (run.info.status, [path.name for path in run.checkpoints()]) == ("training", ["checkpoint-4"])
    result = train(run.recipe, resume=True)
    assert any("resuming from" in line and "checkpoint-4" in line for line in logged)
    assert result.steps == 8
    now, then = (load_file(folder / "adapter_model.safetensors") for folder in (run.folder, OLD / "finished"))
    assert now.keys() == then.keys()
    for name, tensor in then.items():
        assert (now[name] - tensor).abs().max() <= 1e-5


def test_an_old_run_is_served_and_sent_with_a_card_of_today(old_run: Callable[[str], Run], tmp_path: Path) -> None:
    """Its own card names paths and no way to load it; its base.json says less, and enough."""
    run, sent = old_run("finished"), tmp_path / "sent"
    loaded = next(step for step in steps_to_serve(run.folder) if "import torch" in step.lines)
    assert "        bnb_4bit_quant_type='nf4'," in loaded.lines and "    'BASE'," in loaded.lines
    assert loaded.why.startswith("BASE is where the base of training, base, lies now. Not merged: the adapter")
    assert steps_to_serve(run.folder)[0].lines[0].split()[-2:] == ["--base", "BASE"]
    sent.mkdir()
    write_public_adapter(run.folder, sent, name="me/mine")
    card = (sent / "README.md").read_text(encoding="utf-8")
    assert "PeftModel.from_pretrained(base, 'me/mine')" in card and "Trained by pe-dpo on `pairs`." in card
    assert not [path.name for path in sent.iterdir() if b"/srv/quickstart" in path.read_bytes()]
    (run.folder / "base.json").unlink()  # the first runs had none
    assert "    'BASE'," in next(step.lines for step in steps_to_serve(run.folder) if "import torch" in step.lines)

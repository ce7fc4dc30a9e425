"""The finished adapter scaled toward the reference: measured by the run, and by `evaluate` afterwards, to the same bits."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from one_base import train
from pyarrow import parquet
from pydantic import ValidationError

from pe_dpo.errors import UsageError
from pe_dpo.evaluation.evaluate import evaluate
from pe_dpo.inference.scorer import Scorer
from pe_dpo.recipe import recipe_to_yaml
from pe_dpo.recipe.schema import GenerationSection
from pe_dpo.runs.files import RUN_FILE, read_object, scaled_folder
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import RunWriter
from pe_dpo.training.callbacks import StopOnSignal

SCALES = (0.5, 0.75)
FILES = ("eval_pairs.parquet", "generations.parquet", "evaluation.json")
SETTINGS = (
    "train.learning_rate=1.0e-2",
    "generation.prompts=5",
    "generation.samples=2",
    "generation.max_new_tokens=6",
    "train.max_steps=2",
)
MEASURED = (*SETTINGS, "generation.scales=[0.5, 0.75]")


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """A run that measures its adapter at two scales; not to be changed."""
    return train(tiny_recipe(tmp_path_factory.mktemp("runs") / "run", *MEASURED)).folder


@pytest.fixture(scope="module")
def plain(tiny_recipe, tmp_path_factory):
    """The same run, which measures nothing at other scales; not to be changed."""
    return train(tiny_recipe(tmp_path_factory.mktemp("runs") / "plain", *SETTINGS)).folder


def contents(run):
    return {(path.parent.name, path.name): path.read_bytes() for path in run.glob("scaled/*/*")}


def kl_of(folder):
    return json.loads((folder / "evaluation.json").read_text())["generation"]["kl"]["mean"]


@pytest.mark.slow
def test_a_run_measures_its_adapter_at_each_scale(run):
    assert {state.scale: state.folder for state in Run(run).scaled} == {
        scale: run / "scaled" / f"a-{scale}" for scale in SCALES
    }
    assert set(contents(run)) == {(f"a-{scale}", name) for scale in SCALES for name in FILES}
    whole = parquet.read_table(run / "eval_pairs.parquet").to_pydict()
    for scale in SCALES:
        pairs = parquet.read_table(scaled_folder(run, scale) / "eval_pairs.parquet").to_pydict()
        assert pairs.keys() == whole.keys()
        for name in ("where", "prompt_key", "reference_chosen", "reference_rejected", "initial_chosen", "chosen_lengths"):
            assert pairs[name] == whole[name]
        assert pairs["policy_chosen"] != whole["policy_chosen"]


@pytest.mark.slow
def test_kl_falls_with_the_scale(run):
    half, more = (kl_of(scaled_folder(run, scale)) for scale in SCALES)
    assert 0 < half < more < kl_of(run)


@pytest.mark.slow
def test_what_else_the_run_leaves_is_that_of_a_run_without_scales(run, plain):
    assert not (plain / "scaled").exists()
    for name in ("adapter_model.safetensors", *FILES):
        assert (plain / name).read_bytes() == (run / name).read_bytes()
    kept = ("before", "after", "remarks", "step", "loss", "pairs")
    assert {key: read_object(plain / RUN_FILE)[key] for key in kept} == {key: read_object(run / RUN_FILE)[key] for key in kept}


@pytest.mark.slow
def test_evaluating_a_finished_run_gives_the_files_that_it_would_have_written(run, plain, tmp_path):
    folder = Path(shutil.copytree(plain, tmp_path / "run"))
    evaluate(folder, generation=GenerationSection(scales=list(SCALES))).save(folder)
    assert contents(folder) == contents(run)


@pytest.mark.slow
def test_without_a_word_a_run_is_evaluated_at_its_own_scales(run, tmp_path):
    found = evaluate(run)
    assert list(found.scaled) == list(SCALES)
    found.save(tmp_path)
    assert contents(tmp_path) == contents(run)
    assert evaluate(run, generation=GenerationSection(scales=[])).scaled == {}


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter", "base"])
def test_a_run_that_started_from_an_adapter_is_evaluated_as_it_was_measured(run, make_recipe, reference):
    """Half way to the frozen copy, or to the base."""
    start = (f"adapter.start={run}", f"adapter.reference={reference}", "adapter.rank=16", "adapter.alpha=32")
    again = train(make_recipe(*MEASURED, *start)).folder
    measured = contents(again)
    shutil.rmtree(again / "scaled")
    evaluate(again).save(again)
    assert contents(again) == measured
    assert 0 < kl_of(scaled_folder(again, 0.5)) < kl_of(again)


@pytest.mark.slow
def test_a_run_that_was_killed_before_it_measured_goes_on(run, make_recipe):
    folder = Path(shutil.copytree(run, make_recipe().output))
    recipe = make_recipe(*MEASURED)
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    shutil.rmtree(folder / "scaled" / "a-0.75")
    (folder / "scaled" / "a-0.5" / "evaluation.json").unlink()
    RunWriter(folder).update(status="training")
    train(recipe, resume=True)
    assert read_object(folder / RUN_FILE)["status"] == "finished"
    assert contents(folder) == contents(run)


@pytest.mark.slow
def test_a_run_started_anew_leaves_no_old_measurements(run, make_recipe):
    shutil.copytree(run, make_recipe().output)
    folder = train(make_recipe("train.max_steps=1"), overwrite=True).folder
    assert Run(folder).scaled == []


@pytest.mark.slow
def test_out_of_memory_at_a_scale_begins_it_again_with_smaller_rows(run, make_recipe, monkeypatch, logged: list[str]):
    failed = []
    score = Scorer.logprobs

    def fails_once(scorer, model, pairs):
        scalings = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
        if scalings == {0.5 * 8 / 4} and not failed:
            failed.append(scorer.token_budget)
            raise torch.OutOfMemoryError
        return score(scorer, model, pairs)

    monkeypatch.setattr(Scorer, "logprobs", fails_once)
    lines = logged
    folder = train(make_recipe(*MEASURED, "generation.prompts=0")).folder
    assert len(failed) == 1
    assert f"warning: out of memory; going on with {failed[0] // 2} tokens per forward (nothing is lost)" in lines
    for scale in SCALES:
        ours, theirs = (parquet.read_table(scaled_folder(one, scale) / FILES[0]) for one in (folder, run))
        assert ours.equals(theirs)


@pytest.mark.slow
def test_without_held_out_pairs_nothing_is_measured_and_the_run_says_so(make_recipe, logged: list[str]):
    lines = logged
    folder = train(make_recipe(*MEASURED, "data.eval=0", "train.max_steps=1")).folder
    assert not (folder / "scaled").exists()
    assert [line for line in lines if "generation.scales" in line] == [
        "warning: generation.scales: no pairs are held out, so nothing will be measured at other scales; set data.eval"
    ]


def test_what_is_no_run_has_nowhere_to_keep_it(run, tiny_pairs, tiny_base, tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(run / name, tmp_path)
    data = str(tiny_pairs / "test.jsonl")
    with pytest.raises(UsageError, match=r"is a bare adapter, and what `scales` measures is kept in the folder of a run"):
        evaluate(tmp_path, data=data, generation=GenerationSection(scales=list(SCALES)))
    with pytest.raises(UsageError, match=r"is a whole model, and what `scales` measures"):
        evaluate(tiny_base, data=data, generation=GenerationSection(scales=list(SCALES)))


@pytest.mark.parametrize(("scales", "words"), [([0.5, 1.0], "1 does not lie between 0"), ([0.5, 0.5], "0.5 is there twice")])
def test_scales_that_are_no_fractions_are_refused(scales, words):
    with pytest.raises(ValidationError, match=words):
        GenerationSection(scales=scales)


def test_folders_of_others_are_no_scales(tmp_path):
    for name in ("a-0.5", "a-0.50", "a-half", "b-0.5"):
        (tmp_path / "scaled" / name).mkdir(parents=True)
    assert {state.scale: state.folder for state in Run(tmp_path).scaled} == {0.5: tmp_path / "scaled" / "a-0.5"}


def test_a_signal_that_another_process_got_after_the_last_step_counts_here_too(monkeypatch):
    """Else one process would measure at other scales, and wait for the others for ever."""

    def take_over(signals, op):
        signals.fill_(15)

    monkeypatch.setattr(torch.distributed, "all_reduce", take_over)
    stop = StopOnSignal()
    stop.on_train_end(SimpleNamespace(world_size=2, device="cpu"), None, None)
    assert stop.received == 15


@pytest.mark.slow
def test_two_processes_measure_what_one_does(make_recipe, tmp_path, train_on_two):
    settings = (*MEASURED, "train.pairs_per_step=7")
    alone = train(make_recipe(*settings, output="alone")).folder
    together = train_on_two(make_recipe(*settings, output="together"))
    for scale in SCALES:
        one, two = (parquet.read_table(scaled_folder(run, scale) / FILES[0]).to_pydict() for run in (alone, together))
        assert two["where"] == one["where"]
        for name in ("policy_chosen", "policy_rejected", "reference_chosen", "score"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4)
        assert kl_of(scaled_folder(together, scale)) == pytest.approx(kl_of(scaled_folder(alone, scale)), rel=1e-2)

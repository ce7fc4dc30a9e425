"""Scripts that people copy: each fits on a page, runs, and its numbers are right."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pe_dpo.runs.run import Run

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """The folder of a run of two steps, far enough that adapter and base differ."""
    from one_base import train

    folder = tmp_path_factory.mktemp("examples") / "run"
    return train(tiny_recipe(folder, "train.max_steps=2", "train.learning_rate=0.05")).folder


def test_each_fits_on_a_page_and_stands_in_the_list() -> None:
    scripts = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(scripts) == 5 and max(scripts.values()) < 60
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in scripts if f"({name})" not in listed] == []


@pytest.mark.slow
def test_the_plain_loop_has_the_losses_of_the_trainer(make_recipe):
    import one_base

    from pe_dpo.inference.policy import load_policy

    recipe = make_recipe("loss.gamma=0.05")
    trained = [line["loss"] for line in Run(one_base.train(recipe).folder).metrics if "loss" in line]
    pairs = one_base.inputs(recipe).data.train
    plain = list(example("plain_loop").train(load_policy(recipe, device="cpu").model, pairs, gamma=0.05))
    assert len(plain) == 6
    assert plain[0] != plain[-1]
    assert plain == pytest.approx(trained, abs=1e-6)


@pytest.mark.slow
def test_the_scorer_counts_polite_words_and_its_win_rate_is_kept(run):
    """By hand: two of four words; none; one of two. The win rate is that of the texts that were written down."""
    scorer = example("own_scorer")
    assert scorer.polite([], ["Thank you, dear friend.", "It is grey.", "Certainly. Grey."]) == [5.0, 0.0, 5.0]
    won = scorer.win_rate(str(run), prompts=3)
    answers = Run(run).answers()
    difference = np.subtract(scorer.polite([], answers.answer), scorer.polite([], answers.reference_answer))
    assert len(difference) == 3
    assert won["mean"] == pytest.approx(np.mean((np.sign(difference) + 1) / 2))
    assert Run(run).generation["win_rate"] == won


@pytest.mark.slow
def test_the_metric_stands_in_front_of_the_report(run):
    said = example("own_metric").write(str(run))
    table = Run(run).pairs()
    policy, reference = (
        np.mean(getattr(table, f"{model}_chosen") - getattr(table, f"{model}_rejected") > 1)
        for model in ("policy", "reference")
    )
    assert f"Of 9 held-out pairs, {policy:.1%}" in said
    assert f"Change {policy - reference:+.1%}" in said
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.index("right by more than a nat") < page.index("What this cannot show")


@pytest.mark.slow
def test_mixout_at_one_is_the_base_and_at_zero_plain_lora(tiny_base):
    """Texts come round after three steps: under p = 1 the base answers, whose loss stays; without mixout it is learned."""
    script = example("mixout_anywhere")
    losses = {}
    for p in (0.0, 0.5, 1.0):
        model, tokenizer = script.load(str(tiny_base))
        losses[p] = list(script.train(model, tokenizer, p, steps=6, learning_rate=1e-2))
    assert losses[1.0][:3] == losses[1.0][3:]
    assert losses[0.5][0] == losses[0.0][0] == losses[1.0][0]
    assert np.all(np.subtract(losses[0.0][3:], losses[1.0][3:]) < -0.01)
    assert losses[0.5][3:] != losses[0.0][3:]


@pytest.mark.slow
def test_two_runs_of_trl_are_held_against_each_other(run, tiny_base, tiny_pairs, tmp_path):
    """As TRL leaves them: adapters, and logs of means. The second is the base (B = 0), so that the change is known."""
    from safetensors.torch import load_file, save_file

    script, folders = example("compare_trl_runs"), [tmp_path / "first", tmp_path / "second"]
    for folder, accuracy in zip(folders, (0.5, 0.75), strict=True):
        for step in (9, 10):
            (folder / f"checkpoint-{step}").mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(run / name, folder / name)
        evaluated = {"epoch": 1.0, "eval_loss": 0.6, "eval_rewards/margins": 0.1}
        log = [{"step": 9, "eval_rewards/accuracies": 0.25, **evaluated}]
        for step in (9, 10):
            state = {"global_step": step, "log_history": log}
            (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
            log = [*log, {"step": 10, "eval_rewards/accuracies": accuracy, **evaluated}]
    weights = load_file(folders[1] / "adapter_model.safetensors")
    save_file(
        {key: 0 * one if "lora_B" in key else one for key, one in weights.items()}, folders[1] / "adapter_model.safetensors"
    )

    assert [line.split()[-1] for line in script.logged(folders).splitlines()] == ["0.5000", "0.7500"]
    said = script.difference(folders, str(tiny_pairs / "test.jsonl"), str(tiny_base))
    table = Run(run).pairs()
    first, second = (
        np.sign(getattr(table, f"{model}_chosen") - getattr(table, f"{model}_rejected")) / 2
        for model in ("policy", "reference")
    )
    assert said.startswith(f"accuracy/policy: {np.mean(second - first):+.3f} [")
    assert "on 9 pairs" in said

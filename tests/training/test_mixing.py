"""When a run samples another model, how p rises, what p came to, and what is said of a p that cannot work."""

import json
import re

import pytest
import torch
from transformers import TrainerCallback

from pe_dpo.errors import ModelError
from pe_dpo.model.mixout import Mixout, attach
from pe_dpo.training.mixing import Mixing
from pe_dpo.training.run import prepare_run, train

ON = "mixout.p=0.5"


@pytest.fixture
def drawn(monkeypatch):
    """Draw and p of every forward under mixout, once where several layers ask."""
    seen = []
    factors = Mixout.factors

    def noting(self, layer, like):
        if torch.is_grad_enabled() and (self.draw, self.p) not in seen[-1:]:
            seen.append((self.draw, self.p))
        return factors(self, layer, like)

    monkeypatch.setattr(Mixout, "factors", noting)
    return seen


def test_p_rises_over_the_first_steps_and_stays(make_recipe, drawn):
    train(make_recipe(ON, "mixout.warmup=0.5", "train.max_steps=6"))
    assert [draw for draw, _ in drawn] == [0, 1, 2, 3, 4, 5]
    assert [p for _, p in drawn] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_every_microbatch_may_have_a_draw_of_its_own(make_recipe, drawn):
    train(make_recipe(ON, "mixout.draws=microbatch", "train.max_steps=2", "train.tokens_per_microbatch=1"))
    steps = [[micro for step, _, micro in (draw for draw, _ in drawn) if step == number] for number in (0, 1)]
    assert all(len(step) > 2 and step == list(range(len(step))) for step in steps)


def test_a_draw_per_step_is_one_however_many_microbatches(make_recipe, drawn):
    train(make_recipe(ON, "train.max_steps=2", "train.tokens_per_microbatch=1"))
    assert [draw for draw, _ in drawn] == [0, 1]


def test_a_run_says_and_writes_down_how_strong_p_was(make_recipe):
    lines = []
    run = train(make_recipe(ON, "train.max_steps=3"), say=lines.append).folder
    (line,) = [line for line in lines if line.startswith("mixout 0.5 (column): a mask moves a score by ")]
    found = json.loads((run / "run.json").read_text())["mixout"]
    assert (found["p"], found["form"], found["draws"], found["warmup"], found["masks"]) == (0.5, "column", "step", 0.0, 16)
    assert f"by {found['margin_noise']:.2f} of what" in line
    assert found["margin_noise"] == pytest.approx(found["noise"] / found["shift"])


def test_more_mixout_is_more_noise(make_recipe):
    def noise(*settings, output):
        run = train(make_recipe(*settings, "train.max_steps=3", output=output)).folder
        return json.loads((run / "run.json").read_text())["mixout"]["margin_noise"]

    weak, strong = noise("mixout.p=0.1", output="weak"), noise("mixout.p=0.9", output="strong")
    assert strong > 2 * weak > 0


def test_a_plain_run_has_nothing_of_mixout(make_recipe):
    run = train(make_recipe("train.max_steps=1")).folder
    assert "mixout" not in json.loads((run / "run.json").read_text())


def test_an_interrupted_run_is_not_measured(make_recipe):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    recipe = make_recipe(ON, "train.max_steps=3")
    run = train(recipe, callbacks=[Stop()]).folder
    assert "mixout" not in json.loads((run / "run.json").read_text())


def test_a_layer_that_learns_past_its_mask_ends_the_run(make_recipe, monkeypatch):
    monkeypatch.setattr(attach, "_attach", lambda mixout, updates, whole: None)
    with pytest.raises(ModelError, match="14 layers were trained without mixout"):
        train(make_recipe(ON))


# ---------------------------------------------------------------- before the base is loaded


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("mixout.p=0.95", "train.max_steps=100"), r"keeps 3\.2 of the 64 input units of the narrowest layer"),
        (("mixout.p=0.5", "train.max_steps=4"), r"trains each unit in 2\.0 of 4 steps"),
        (("mixout.p=0.5", "mixout.form=element"), "two to four times the work of each"),
    ],
)
def test_a_p_that_makes_little_sense_is_said_before_training(make_recipe, settings, words):
    lines = []
    prepare_run(make_recipe(*settings), lines.append)
    assert any(line.startswith("look: mixout") for line in lines)
    assert any(re.search(words, line) for line in lines)


def test_a_sensible_p_is_not_talked_about(make_recipe):
    lines = []
    prepare_run(make_recipe(ON, "train.max_steps=100"), lines.append)
    assert not any("mixout" in line for line in lines)


def test_a_layer_that_cannot_be_mixed_is_found_without_the_weights(make_recipe, monkeypatch):
    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("pe_dpo.evaluation.inputs.load_base", no_weights)
    recipe = make_recipe(ON, 'adapter.targets=["embed_tokens", "q_proj"]')
    with pytest.raises(ModelError, match=r"lora_embedding_A.* is trained, and mixout covers LoRA on linear layers"):
        prepare_run(recipe)


def test_the_trainer_knows_mixout_by_its_events_alone(make_trainer):
    trainer = make_trainer(ON)
    assert [type(one) for one in trainer.callback_handler.callbacks].count(Mixing) == 1
    assert not any(isinstance(value, Mixout) for value in vars(trainer).values())

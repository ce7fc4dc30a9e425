"""When a run samples another model, how p rises, what p came to, and what is said of a p that cannot work."""

import json
import re

import pytest
import torch
from one_base import train
from transformers import TrainerCallback

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.model.lora import InBaseDtype
from pe_dpo.model.mixout import Mixout, attach
from pe_dpo.training.mixing import Mixing
from pe_dpo.training.preparation import prepare_run
from pe_dpo.training.start import check_start

ON = "mixout.p=0.5"


@pytest.fixture
def drawn(monkeypatch):
    """Draw and p of every forward under mixout, once where several layers ask; what p came to is not measured."""
    monkeypatch.setattr(Mixing, "on_train_end", lambda *_, **__: None)
    seen = []
    factors = Mixout.factors

    def noting(self, layer, like):
        if torch.is_grad_enabled() and (self.draw, self.p) not in seen[-1:]:
            seen.append((self.draw, self.p))
        return factors(self, layer, like)

    monkeypatch.setattr(Mixout, "factors", noting)
    return seen


def mixing_of(trainer):
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, Mixing))


@pytest.mark.slow
def test_p_rises_over_the_first_steps_and_stays(make_recipe, drawn):
    train(make_recipe(ON, "mixout.warmup=0.5", "train.max_steps=4"))
    assert [draw for draw, _ in drawn] == [0, 1, 2, 3]
    assert [p for _, p in drawn] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5])


@pytest.mark.parametrize(("warmup", "steps", "first"), [(0.96, 5, 0.1), (0.9, 1, 0.5)])
@pytest.mark.slow
def test_the_last_step_has_all_of_p_however_long_the_rise(make_trainer, warmup, steps, first):
    """It is the p that run.json names, and that the noise of the masks is measured at."""
    trainer = make_trainer(ON, f"mixout.warmup={warmup}", f"train.max_steps={steps}")
    mixing, rise = mixing_of(trainer), []
    for trainer.state.global_step in range(steps):
        mixing.on_step_begin(trainer.args, trainer.state, trainer.control)
        rise.append(mixing.mixout.p)
    assert (rise[0], rise[-1]) == (pytest.approx(first), 0.5)


@pytest.mark.slow
def test_every_microbatch_may_have_a_draw_of_its_own(make_recipe, drawn):
    train(
        make_recipe(
            ON, "mixout.draws=microbatch", "train.max_steps=2", "train.pairs_per_step=3", "train.tokens_per_microbatch=1"
        )
    )
    steps = [[micro for step, _, micro in (draw for draw, _ in drawn) if step == number] for number in (0, 1)]
    assert all(len(step) > 2 and step == list(range(len(step))) for step in steps)


@pytest.mark.slow
def test_a_draw_per_step_is_one_however_many_microbatches(make_recipe, drawn):
    train(make_recipe(ON, "train.max_steps=2", "train.pairs_per_step=3", "train.tokens_per_microbatch=1"))
    assert [draw for draw, _ in drawn] == [0, 1]


@pytest.mark.slow
def test_a_run_says_and_writes_down_how_strong_p_was(make_recipe, logged: list[str]):
    lines = logged
    run = train(make_recipe(ON, "train.max_steps=1")).folder
    (line,) = [line for line in lines if line.startswith("mixout 0.5 (column): a mask moves a score by ")]
    found = json.loads((run / "run.json").read_text())["mixout"]
    assert (found["p"], found["form"], found["draws"], found["warmup"], found["masks"]) == (0.5, "column", "step", 0.0, 16)
    assert f"by {found['margin_noise']:.2f} of what" in line
    assert found["margin_noise"] == pytest.approx(found["noise"] / found["shift"])


@pytest.mark.slow
def test_a_plain_run_has_nothing_of_mixout(make_recipe):
    run = train(make_recipe("train.max_steps=1")).folder
    assert "mixout" not in json.loads((run / "run.json").read_text())


@pytest.mark.slow
def test_an_interrupted_run_is_not_measured(make_recipe):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    recipe = make_recipe(ON, "train.max_steps=2")
    run = train(recipe, callbacks=[Stop()]).folder
    assert "mixout" not in json.loads((run / "run.json").read_text())


@pytest.mark.slow
def test_a_layer_that_learns_past_its_mask_ends_the_run(make_recipe, monkeypatch):
    class Unmixed(InBaseDtype):
        def __new__(cls, *arguments):
            return InBaseDtype()

    monkeypatch.setattr(attach, "MixedUpdate", Unmixed)
    with pytest.raises(ModelError, match="14 layers were trained without mixout"):
        train(make_recipe(ON))


def test_a_check_before_the_first_step_does_not_stand_for_training(make_trainer):
    """check_start scores a batch in training mode; a layer that training then computes in another way must still be found."""
    trainer = make_trainer(ON, fresh=True)
    check_start(
        trainer.model, trainer.train_dataset[:4], trainer.scorer, loss=trainer.loss,
        policy_is_reference=True,
    )  # fmt: skip
    assert not any(layer.is_reached for layer in mixing_of(trainer).mixout.layers.values())


def test_a_process_without_pairs_in_a_step_has_nothing_to_check(make_trainer):
    """More processes than pairs: its gradients are those of the others, and it computed none of its layers."""
    trainer = make_trainer(ON)
    mixing = mixing_of(trainer)
    event = trainer.args, trainer.state, trainer.control
    mixing.on_step_begin(*event)
    for parameter in adapter_parameters(trainer.model):
        parameter.grad = torch.ones_like(parameter)
    mixing.on_pre_optimizer_step(*event)
    mixing.on_substep_end(*event)
    with pytest.raises(ModelError, match="14 layers were trained without mixout"):
        mixing.on_pre_optimizer_step(*event)


# ---------------------------------------------------------------- before the base is loaded


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("mixout.p=0.95", "train.max_steps=100"), r"keeps 3\.2 of the 64 input units of the narrowest layer"),
        (("mixout.p=0.5", "train.max_steps=4"), r"trains each unit in 2\.0 of 4 steps"),
        (("mixout.p=0.5", "mixout.form=element"), "two to four times the work of each"),
    ],
)
def test_a_p_that_makes_little_sense_is_said_before_training(make_recipe, settings, words, warned: list[str]):
    prepare_run(make_recipe(*settings))
    assert any(line.startswith("warning: mixout") for line in warned)
    assert any(re.search(words, line) for line in warned)


def test_a_sensible_p_is_not_talked_about(make_recipe, logged: list[str]):
    prepare_run(make_recipe(ON, "train.max_steps=100"))
    assert not any("mixout" in line for line in logged)


def test_a_layer_that_cannot_be_mixed_is_found_without_the_weights(make_recipe, monkeypatch):
    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("pe_dpo.inference.policy.load_base", no_weights)
    recipe = make_recipe(ON, 'adapter.targets=["embed_tokens", "q_proj"]')
    with pytest.raises(ModelError, match=r"lora_embedding_A.* is trained, and mixout covers LoRA on linear layers"):
        prepare_run(recipe)


def test_the_trainer_knows_mixout_by_its_events_alone(make_trainer):
    trainer = make_trainer(ON)
    assert [type(one) for one in trainer.callback_handler.callbacks].count(Mixing) == 1
    assert not any(isinstance(value, Mixout) for value in vars(trainer).values())

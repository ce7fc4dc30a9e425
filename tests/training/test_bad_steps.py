"""A bad row is not the end: its step is skipped before the optimizer sees it, and its pairs are named."""

import math
from dataclasses import replace

import pytest
import torch
from killed import KillAt, Killed
from one_base import train
from safetensors.torch import load_file
from transformers import TrainerCallback

from pe_dpo.errors import TrainingError
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.runs.checkpoints import checkpoints
from pe_dpo.runs.files import RUN_FILE, read_object
from pe_dpo.runs.run import Run
from pe_dpo.training.bad_steps import BadSteps, bisect

SETTINGS = (
    *("loss.link=squared", "loss.margin=1", "loss.margin_scale=1", "adapter.dropout=0.1"),
    *("train.save_every=1", "train.eval_every=6", "train.tokens_per_microbatch=300"),
)
LOSS, GRADIENT = "train.jsonl:20", "train.jsonl:12"
"""Under the squared link a margin of 1e200 has an infinite loss, one of 1e25 a finite loss and a gradient whose norm is not."""
SKIPPED = {2: {LOSS: "loss is inf", GRADIENT: "gradient"}, 5: {GRADIENT: "gradient"}, 6: {LOSS: "loss is inf"}}
"""By the order of seed 0, in which the first of them is in steps 2 and 6 and the second in steps 2 and 5 of six."""


@pytest.fixture(scope="module", autouse=True)
def _bad_rows():
    """Rows that what is checked before training let pass."""
    from pe_dpo.training import train as module

    prepare, margins = module.prepare_run, {LOSS: 1e200, GRADIENT: 1e25}

    def spoilt(recipe, **options):
        prepared = prepare(recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"margin_scale": 0.0})}), **options)
        pairs = [replace(pair, margin=margins.get(pair.where, 0.0)) for pair in prepared.data.train]
        return prepared._replace(data=replace(prepared.data, train=pairs, held_out=[*prepared.data.held_out]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepare_run", spoilt)
        yield


@pytest.fixture(scope="module")
def straight(tiny_recipe, tmp_path_factory):
    """A run of six steps of which three are skipped."""
    return train(tiny_recipe(tmp_path_factory.mktemp("bad") / "run", *SETTINGS)).folder


def trace(folder):
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in Run(folder).metrics]


@pytest.mark.slow
def test_a_step_with_a_bad_row_is_skipped_and_its_pairs_are_named_and_counted_everywhere(straight):
    lines, record = Run(straight).metrics, read_object(straight / RUN_FILE)
    assert {line["step"]: line["skipped"] for line in lines if "skipped" in line} == SKIPPED
    assert record["status"] == "finished"
    assert record["skipped_steps"] == [2, 5, 6]
    assert record["bad_pairs"] == {LOSS: "loss is inf", GRADIENT: "gradient"}
    words = (
        "3 steps were skipped (2, 5, 6), since loss or gradient were not finite: "
        "train.jsonl:20 (loss is inf), train.jsonl:12 (gradient)"
    )
    assert words in record["remarks"]
    assert f"\n{words}.\n" in (straight / "README.md").read_text()
    assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    logged = {line["step"]: line for line in lines if "learning_rate" in line}
    assert [(step, line.get("skipped_steps"), "loss" in line, "grad_norm" in line) for step, line in logged.items()] == [
        *((1, None, True, True), (2, 1, False, False), (3, None, True, True)),
        *((4, None, True, True), (5, 1, False, False), (6, 1, False, False)),
    ]
    # The learning rate is a function of the step's number: 1e-3 that falls to 0 after six.
    assert [line["learning_rate"] for line in logged.values()] == pytest.approx([1e-3 * (6 - done) / 6 for done in range(6)])


def test_steps_that_were_skipped_are_not_in_the_means_of_their_window(bad_trainer):
    trainer, pairs = bad_trainer, bad_trainer.train_dataset
    losses = []
    for step, first in enumerate((0, 18, 2)):
        trainer.state.global_step = step
        losses.append(float(trainer.training_step(trainer.model, pairs[first : first + 2])))
    trainer.state.global_step = 3
    logs = {"loss": sum(losses) / 3, "grad_norm": 1.0}
    trainer.log(logs)
    assert (logs["skipped_steps"], losses[1]) == (1, 0.0)
    assert logs["loss"] == pytest.approx((losses[0] + losses[2]) / 2)
    assert logs["pairs"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "adamw_bnb_8bit"])
def test_adapter_and_optimizer_are_to_the_bit_what_they_were(bad_trainer, name):
    trainer = bad_trainer
    trainer.args.optim, trainer.optimizer = name, None
    optimizer, good, bad = trainer.create_optimizer(), trainer.train_dataset[:1], trainer.train_dataset[10:12]

    def state():
        weights = [parameter.detach().clone() for parameter in adapter_parameters(trainer.model)]
        return weights + [value.clone() for one in optimizer.state.values() for value in one.values() if torch.is_tensor(value)]

    trainer.training_step(trainer.model, good)
    optimizer.step()
    before = state()
    assert float(trainer.training_step(trainer.model, bad)) == 0.0
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, state(), strict=True))
    trainer.training_step(trainer.model, good)
    optimizer.step()
    assert not all(torch.equal(old, new) for old, new in zip(before, state(), strict=True))


class BlowUp(TrainerCallback):
    """Makes every product of the adapter infinite after the first step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for parameter in adapter_parameters(model) if state.global_step == 1 else ():
            parameter.data.fill_(1e30)


@pytest.fixture(scope="module")
def bad_trainer(tiny_recipe, tmp_path_factory):
    from pe_dpo.training import train as module

    recipe = tiny_recipe(tmp_path_factory.mktemp("trainer") / "run", *SETTINGS, "train.bad_steps=100")
    return module.build_trainer(recipe, module.prepare_run(recipe))


@pytest.mark.slow
def test_memory_that_runs_out_in_a_bad_step_changes_nothing_of_what_is_found(bad_trainer, monkeypatch):
    trainer = bad_trainer
    logprobs, budget = type(trainer.scorer).logprobs, trainer.scorer.token_budget

    def forward(self, model, pairs):
        if self.tokens(pairs) > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logprobs(self, model, pairs)

    monkeypatch.setattr(type(trainer.scorer), "logprobs", forward)
    trainer.bad_steps = BadSteps()
    trainer.state.global_step = 0
    trainer.training_step(trainer.model, trainer.train_dataset[8:20])
    trainer.scorer.token_budget = budget
    assert trainer.bad_steps.pairs == {1: {LOSS: "loss is inf", GRADIENT: "gradient"}}


def test_a_step_that_another_process_finds_bad_is_skipped_here_too(bad_trainer, monkeypatch):
    """Two processes, of which this one has pairs that are fine."""
    trainer = bad_trainer
    trainer.bad_steps, trainer.state.global_step, theirs = BadSteps(), 3, {GRADIENT: "gradient"}
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    monkeypatch.setattr(type(trainer.args), "process_index", property(lambda self: 0))
    monkeypatch.setattr("pe_dpo.training.trainer.gather_object", lambda own: [*own, theirs])

    def add_theirs(values):
        if len(values) == 2:  # loss and whether it is bad; else the gradients, of which they have none
            values += torch.tensor([0.5, 1.0])

    monkeypatch.setattr(torch.distributed, "all_reduce", add_theirs)
    assert float(trainer.training_step(trainer.model, trainer.train_dataset[:4])) == 0.0
    assert trainer.bad_steps.pairs == {4: theirs}
    assert all(parameter.grad is None for parameter in adapter_parameters(trainer.model))


@pytest.mark.slow
def test_as_many_bad_steps_in_a_row_as_the_recipe_says_stop_the_run(make_recipe, tmp_path):
    recipe = make_recipe("train.max_steps=6", "train.bad_steps=2", "train.save_every=1", "train.eval_every=100")
    with pytest.raises(
        TrainingError, match=r"^steps 2 to 3: loss or gradient were not finite, and train\.bad_steps is 2.*lower"
    ):
        train(recipe, callbacks=[BlowUp()])
    record = read_object(tmp_path / "run" / RUN_FILE)
    assert (record["status"], record["skipped_steps"]) == ("failed", [2, 3])
    assert "log-prob of its chosen answer is nan" in record["why"]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]


def test_the_count_of_steps_in_a_row_begins_anew_with_a_step_that_is_taken():
    steps = BadSteps(limit=3)
    steps.recall([{"step": 4, "skipped": {"a:1": "loss is inf"}}, {"step": 5, "skipped": {}}, {"step": 5, "loss": 1.0}])
    steps.add(7, {"a:1": "loss is inf"})
    steps.add(8, {})
    with pytest.raises(TrainingError, match=r"^steps 7 to 9: .*a:2 \(gradient\)"):
        steps.add(9, {"a:2": "gradient"})


def test_a_run_of_which_every_step_was_skipped_has_failed():
    steps = BadSteps()
    steps.add(1, {"a:1": "loss is inf"})
    steps.check_some_step_was_taken(2)
    with pytest.raises(TrainingError, match="all 1 steps were skipped"):
        steps.check_some_step_was_taken(1)


@pytest.mark.parametrize(("bad", "most", "found"), [({5}, 5, [5]), ({0, 7, 8}, 5, [0, 7, 8]), (set(range(16)), 3, [0, 1, 2])])
def test_bad_items_are_found_in_two_passes(bad, most, found):
    asked = []

    def is_good(items):
        asked.extend(items)
        return not bad & {*items}

    assert bisect(range(16), is_good, most=most) == found
    if len(bad) == 1:
        assert len(asked) == 2 * 16 - 2


def test_items_that_are_bad_together_alone_are_nobody_s_fault():
    assert bisect([1, 2, 3, 4], lambda items: sum(items) < 10, most=5) == []


@pytest.mark.slow
def test_a_resumed_run_skips_what_the_straight_one_skips(make_recipe):
    """Killed after its first skipped step and before the others, between two lines of metrics."""
    recipe = make_recipe(*SETTINGS, "train.log_every=4")
    folder = train(recipe).folder
    straight = trace(folder), read_object(folder / RUN_FILE), load_file(folder / "adapter_model.safetensors")
    with pytest.raises(Killed):
        train(recipe, overwrite=True, callbacks=[KillAt(3)])
    train(recipe, resume=True)
    assert trace(folder) == straight[0]
    assert [line["skipped_steps"] for line in straight[0] if "learning_rate" in line] == [1, 2]
    record = read_object(folder / RUN_FILE)
    for key in ("skipped_steps", "bad_pairs", "remarks", "status"):
        assert record[key] == straight[1][key]
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], straight[2][name]) for name in weights)

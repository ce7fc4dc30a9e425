"""Mixout in a run: one sampled model per optimizer step, whatever the step is split into."""

import pytest
import torch
from killed import KillAt, Killed
from one_base import train
from safetensors.torch import load_file

from pe_dpo.data.pairs import row_length
from pe_dpo.inference.scorer import Scorer
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.model.mixout import Mixout
from pe_dpo.runs.run import Run
from pe_dpo.training.mixing import Mixing
from pe_dpo.training.start import check_start

ON = "mixout.p=0.5"
SETTINGS = (ON, "train.max_steps=3", "train.save_every=1", "train.eval_every=2", "train.tokens_per_microbatch=400")


@pytest.fixture(scope="module", autouse=True)
def _few_masks():
    """What p came to is measured at the end of a run, with more forwards than a tiny run has; test_mixing reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixing, "on_train_end", lambda *_, **__: None)
        yield


def mixout_of(trainer):
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, Mixing)).mixout


def loss_and_gradient(trainer, pairs):
    """The step's loss and the flattened gradient of the adapter."""
    trainer.model.zero_grad()
    trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)
    loss = trainer.training_step(trainer.model, pairs)
    return float(loss), torch.cat([p.grad.flatten() for p in adapter_parameters(trainer.model)])


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def micro_batches(trainer, pairs, at_once):
    """The gradient of a step split into micro-batches of `at_once` pairs."""
    trainer.scorer.token_budget = 2 * at_once * max(row_length(pair) for pair in pairs)
    return loss_and_gradient(trainer, pairs)


@pytest.mark.parametrize("packing", ["auto", "false"])
@pytest.mark.slow
def test_a_step_has_one_gradient_however_it_is_split(make_trainer, packing):
    trainer = make_trainer(ON, f"train.packing={packing}")
    pairs = trainer.train_dataset[:8]
    (whole_loss, whole), (loss, single) = micro_batches(trainer, pairs, 8), micro_batches(trainer, pairs, 1)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert (single - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.slow
def test_a_mask_per_micro_batch_would_give_another_gradient(make_trainer, monkeypatch):
    """So that the test above can fail."""
    trainer = make_trainer(ON)
    pairs = trainer.train_dataset[:8]
    _, whole = micro_batches(trainer, pairs, 8)
    forward = trainer.forward_pairs

    def with_a_new_mask(model, pairs):
        mixout_of(trainer).draw += 1
        return forward(model, pairs)

    monkeypatch.setattr(trainer, "forward_pairs", with_a_new_mask)
    _, single = micro_batches(trainer, pairs, 1)
    assert (single - whole).norm() > 0.3 * whole.norm()


def test_chosen_and_rejected_go_through_one_sampled_model(make_trainer):
    """A pair of the same answer twice has Δ = 0 under one model, and would not under two."""
    from dataclasses import replace

    trainer = make_trainer(ON, "train.packing=false")
    pairs = [replace(pair, rejected_ids=pair.chosen_ids) for pair in trainer.train_dataset[:4]]
    trainer.model.train()
    with torch.no_grad():
        scored = trainer.scorer.logprobs(trainer.model, pairs)
        mixout_of(trainer).draw = 1
        other = trainer.scorer.logprobs(trainer.model, pairs)
    assert torch.allclose(scored.chosen, scored.rejected, rtol=0, atol=1e-5)
    assert (scored.chosen - other.rejected).abs().min() > 1e-3


def test_packed_and_padded_rows_agree_under_one_draw(make_trainer):
    trainer = make_trainer(ON)
    assert trainer.scorer.path == "segments"
    trainer.model.train()
    mixout_of(trainer).draw = 5
    with torch.no_grad():
        packed = trainer.scorer.logprobs(trainer.model, trainer.train_dataset[:4])
        padded = Scorer("padded", torch.device("cpu")).logprobs(trainer.model, trainer.train_dataset[:4])
    assert torch.allclose(packed.chosen, padded.chosen, atol=1e-4)
    assert torch.allclose(packed.rejected, padded.rejected, atol=1e-4)


@pytest.mark.slow
def test_checkpointed_activations_change_neither_loss_nor_gradient(make_trainer):
    plain, trainer = make_trainer(ON), make_trainer(ON, "train.gradient_checkpointing=true")
    one, other = (loss_and_gradient(each, each.train_dataset[:6]) for each in (plain, trainer))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


@pytest.mark.slow
def test_every_optimizer_step_is_a_draw_of_its_own(make_trainer):
    trainer = make_trainer(ON, "train.max_steps=3")
    pairs, gradients = trainer.train_dataset[:8], []
    for step in (0, 1, 0):
        trainer.state.global_step = step
        gradients.append(loss_and_gradient(trainer, pairs)[1])
    assert (gradients[1] - gradients[0]).norm() > 0.3 * gradients[0].norm()
    assert torch.equal(gradients[2], gradients[0])


@pytest.mark.slow
def test_the_draws_of_a_run_are_its_steps(make_recipe, monkeypatch):
    seen = []
    check = Mixout.check_reached
    monkeypatch.setattr(Mixout, "check_reached", lambda self: (seen.append(self.draw), check(self)))
    train(make_recipe(ON, "train.max_steps=2"))
    assert seen == [0, 1]


@pytest.fixture(scope="module")
def straight(tiny_recipe, tmp_path_factory):
    """The uninterrupted run of SETTINGS."""
    return train(tiny_recipe(tmp_path_factory.mktemp("straight") / "run", *SETTINGS)).folder


@pytest.mark.slow
def test_a_resumed_run_is_the_straight_one_to_the_bit(make_recipe, straight):
    with pytest.raises(Killed):
        train(make_recipe(*SETTINGS), callbacks=[KillAt(1)])
    resumed = train(make_recipe(*SETTINGS), resume=True).folder
    left, right = weights(resumed), weights(straight)
    assert all(torch.equal(left[name], right[name]) for name in right)
    one, other = ([line | {"tokens_per_second": 0} for line in Run(folder).metrics] for folder in (resumed, straight))
    assert one == other


@pytest.mark.slow
def test_p_0_is_the_run_without_mixout_and_p_above_0_is_another(make_recipe):
    runs = {p: weights(train(make_recipe("train.max_steps=1", *settings, output=p)).folder) for p, settings in
            {"none": (), "zero": ("mixout.p=0",), "half": (ON,)}.items()}  # fmt: skip
    assert all(torch.equal(runs["zero"][name], tensor) for name, tensor in runs["none"].items())
    assert any(not torch.equal(runs["half"][name], tensor) for name, tensor in runs["none"].items())


@pytest.mark.slow
def test_evaluation_between_steps_is_that_of_the_plain_adapter(make_trainer):
    mixed, plain = make_trainer(ON), make_trainer()
    assert mixed.model.training
    one, other = (t.scorer.score_pairs(t.model, t.held_out) for t in (mixed, plain))
    assert torch.equal(one.chosen, other.chosen)
    assert mixed.evaluate() == plain.evaluate()
    assert mixed.model.training


def test_policy_and_reference_are_equal_to_the_bit_before_the_first_step(make_trainer):
    trainer = make_trainer(ON, fresh=True)
    start = check_start(
        trainer.model, trainer.train_dataset[:4], trainer.scorer, loss=trainer.loss,
        policy_is_reference=True,
    )  # fmt: skip
    assert trainer.model.training
    assert start.largest_difference == 0


@pytest.mark.slow
def test_a_run_on_a_4_bit_base_moves(make_recipe):
    result = train(make_recipe(ON, "model.quantize=nf4", "train.max_steps=1"))
    assert any(tensor.any() for name, tensor in weights(result.folder).items() if "lora_B" in name)

"""One optimizer step: the same loss and gradient however its pairs are split, and no reference where none is needed."""

import math

import pytest
import torch
from one_base import train

from pe_dpo.data.batches import split_by_tokens
from pe_dpo.data.pairs import row_length
from pe_dpo.errors import TrainingError, UsageError
from pe_dpo.model.adapter import adapter_parameters


def loss_and_gradient(trainer, pairs):
    """The step's loss and the flattened gradient of the adapter."""
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, pairs)
    return float(loss), torch.cat([p.grad.flatten() for p in adapter_parameters(trainer.model)])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["dpo", "simpo", "rso", "cpo"])
def test_eight_pairs_at_once_in_twos_and_fours_and_singly_give_one_gradient(make_trainer, preset):
    trainer = make_trainer(f"loss.preset={preset}")
    pairs = trainer.train_dataset[:8]
    longest = max(row_length(pair) for pair in pairs)
    results = {}
    for at_once in (8, 4, 2, 1):
        trainer.scorer.token_budget = 2 * at_once * longest
        assert max(map(len, split_by_tokens(pairs, trainer.scorer.token_budget))) >= at_once
        results[at_once] = loss_and_gradient(trainer, pairs)
    loss, gradient = results[8]
    assert gradient.norm() > 1e-3
    for at_once in (4, 2, 1):
        assert results[at_once][0] == pytest.approx(loss, rel=1e-6)
        assert (results[at_once][1] - gradient).norm() <= 2e-6 * gradient.norm()


def test_the_step_is_the_mean_of_its_pairs_taken_alone(make_trainer):
    trainer = make_trainer()
    pairs = trainer.train_dataset[:5]
    loss, gradient = loss_and_gradient(trainer, pairs)
    alone = [loss_and_gradient(trainer, [pair]) for pair in pairs]
    assert loss == pytest.approx(sum(one for one, _ in alone) / 5, rel=1e-6)
    assert (gradient - sum(one for _, one in alone) / 5).norm() <= 2e-6 * gradient.norm()


def test_a_short_last_step_still_counts_each_pair_once(make_trainer):
    trainer = make_trainer("train.pairs_per_step=7", "train.epochs=1")
    batches = list(trainer.get_train_dataloader())
    assert [len(batch) for batch in batches] == [7, 7, 7, 3]
    assert sorted(pair.where for batch in batches for pair in batch) == sorted(p.where for p in trainer.train_dataset)


@pytest.mark.slow
def test_pairs_of_one_prompt_share_a_step_if_the_recipe_says_so(make_trainer, tmp_path):
    import json

    rows = [
        {"prompt": f"Question {prompt}?", "chosen": f"Yes, {prompt} {left}.", "rejected": f"No {prompt} {right}!"}
        for prompt in range(5)
        for left, right in ((0, 1), (0, 2), (1, 2))
    ]
    (tmp_path / "several.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = (f"data.train={tmp_path / 'several.jsonl'}", "data.eval=0.0", "train.pairs_per_step=6", "train.epochs=1")
    together, apart = (
        [
            [pair.prompt_key for pair in batch]
            for batch in make_trainer(*settings, f"train.prompts_together={choice}").get_train_dataloader()
        ]
        for choice in ("true", "false")
    )
    assert [len(batch) for batch in together] == [len(batch) for batch in apart] == [6, 6, 3]
    assert [len(set(batch)) for batch in together] == [2, 2, 1]
    assert len(set(apart[0])) > 2
    assert sorted(key for batch in together for key in batch) == sorted(key for batch in apart for key in batch)


def count_forwards_without_adapter(trainer):
    """Count forwards of the base's first adapted layer while adapters are off."""
    seen = []
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(module.disable_adapters))
    return seen


def test_gamma_zero_never_runs_the_reference(make_trainer):
    trainer = make_trainer("loss.gamma=0", "loss.margin=1")
    seen = count_forwards_without_adapter(trainer)
    trainer.training_step(trainer.model, trainer.train_dataset[:4])
    assert seen
    assert not any(seen)


def test_gamma_above_zero_runs_it_once_for_each_pair_and_never_again(make_trainer):
    trainer = make_trainer("reference.store=/dev/null/none")
    seen = count_forwards_without_adapter(trainer)
    trainer.training_step(trainer.model, trainer.train_dataset[:4])
    assert seen == [True, False]
    trainer.training_step(trainer.model, trainer.train_dataset[:4])
    assert seen == [True, False, False]


def test_the_policy_step_runs_the_reference_in_every_step(make_trainer):
    trainer = make_trainer("reference.policy=step")
    seen = count_forwards_without_adapter(trainer)
    for _ in range(2):
        trainer.training_step(trainer.model, trainer.train_dataset[:4])
    assert seen == [True, False] * 2


@pytest.mark.slow
def test_a_whole_run_at_gamma_zero_asks_for_the_reference_of_the_held_out_pairs_alone(make_recipe, monkeypatch):
    from pe_dpo.inference.reference import Reference

    asked = []
    logprobs = Reference.logprobs
    monkeypatch.setattr(Reference, "logprobs", lambda self, pairs, *rest: asked.append(pairs) or logprobs(self, pairs, *rest))
    result = train(make_recipe("loss.gamma=0", "loss.margin=1", "train.max_steps=2", "reference.policy=skip"))
    assert [len(pairs) for pairs in asked] == [9]
    assert result.after["accuracy/reference"] == result.before["accuracy/policy"]


def test_hinge_pairs_beyond_the_margin_add_nothing_to_the_gradient(make_trainer):
    trainer = make_trainer("loss.preset=rso", "loss.margin=-1000")
    _, gradient = loss_and_gradient(trainer, trainer.train_dataset[:4])
    assert not gradient.any()


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_where_the_recipe_wants_that(make_trainer):
    trainer = make_trainer("train.bad_steps=1")
    weight = adapter_parameters(trainer.model)[0]
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = [p.detach().clone() for p in adapter_parameters(trainer.model)]
    with pytest.raises(TrainingError, match=r"^step 1: .*train\.jsonl:\d+ \(gradient\)"):
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, adapter_parameters(trainer.model), strict=True))


@pytest.mark.slow
def test_adapters_are_float32_on_a_bfloat16_base_and_nearly_all_of_them_move_at_a_tiny_rate(make_trainer):
    trainer = make_trainer("model.dtype=bfloat16", "train.learning_rate=5e-6", "train.max_steps=3")
    assert {p.dtype for p in adapter_parameters(trainer.model)} == {torch.float32}
    assert trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    before = torch.cat([p.detach().clone().flatten() for p in adapter_parameters(trainer.model)])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in adapter_parameters(trainer.model)])
    assert (before != after).double().mean() > 0.95


@pytest.mark.slow
def test_checkpointed_activations_change_neither_loss_nor_gradient(make_trainer):
    plain = loss_and_gradient(make_trainer(), make_trainer().train_dataset[:6])
    trainer = make_trainer("train.gradient_checkpointing=true")
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    checkpointed = loss_and_gradient(trainer, trainer.train_dataset[:6])
    assert checkpointed[0] == plain[0]
    assert torch.equal(checkpointed[1], plain[1])


@pytest.mark.slow
def test_adapter_dropout_is_done_and_not_set_to_zero(make_trainer):
    pairs = make_trainer().train_dataset[:4]
    trainer = make_trainer("adapter.dropout=0.5")
    assert loss_and_gradient(trainer, pairs)[0] != loss_and_gradient(trainer, pairs)[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_launcher_that_asks_for_mixed_precision_is_refused(make_trainer, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(UsageError, match=f"mixed precision {precision}; unset ACCELERATE_MIXED_PRECISION"):
        make_trainer()

"""Before the first step: policy = reference where it must be, and a loss that pulls."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tables
import torch
from safetensors.torch import load_file, save_file

from pe_dpo.errors import DataError, ModelError, TrainingError, UsageError
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.objective import Loss, PairLogprobs
from pe_dpo.training.preparation import prepare_run
from pe_dpo.training.start import check_diagonal, check_held_out, check_start
from pe_dpo.training.train import train


def start(trainer, *, policy_is_reference=True, **changes):
    trainer.scorer.token_budget = 1024  # for all eight pairs
    return check_start(
        trainer.model,
        trainer.train_dataset[:8],
        trainer.scorer,
        loss=replace(trainer.loss, **changes),
        policy_is_reference=policy_is_reference,
    )


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dpo_starts_at_log_two_with_policy_and_reference_equal_to_the_bit(make_trainer, quantize, dtype):
    check = start(make_trainer(f"model.quantize={quantize}", f"model.dtype={dtype}", "adapter.dropout=0.3", fresh=True))
    assert check.largest_difference == 0.0
    assert check.loss == pytest.approx(math.log(2), rel=1e-12)
    assert (check.pairs, check.score) == (8, 0.0)


def test_with_gamma_half_of_beta_the_loss_is_the_link_of_the_references_own_preference(make_trainer):
    trainer = make_trainer(fresh=True)
    check = start(trainer, gamma=0.05)

    scored = trainer.scorer.score_pairs(trainer.model, trainer.train_dataset[:8])
    expected = torch.log1p(torch.exp(-0.05 * (scored.chosen - scored.rejected))).mean()
    assert check.loss == pytest.approx(float(expected), rel=1e-6)


def test_a_reference_that_is_not_where_training_starts_is_refused(make_trainer):
    """Any of: a moved base, an adapter restored as if it were fresh, an init with B ≠ 0."""
    trainer = make_trainer(fresh=True)
    with torch.no_grad():
        adapter_parameters(trainer.model)[1].add_(0.02)
    with pytest.raises(ModelError, match=r"policy and reference differ by .* nats.*name adapter\.reference"):
        start(trainer)


def test_starting_from_an_adapter_against_the_raw_base_they_may_differ(make_trainer):
    assert start(make_trainer(), policy_is_reference=False).largest_difference is None


def test_without_a_reference_only_the_loss_is_checked(make_trainer):
    check = start(make_trainer(fresh=True), gamma=0.0, margin=1.0)
    assert check.largest_difference is None
    assert check.score != 0


def test_a_start_at_which_no_pair_pulls_is_refused(make_trainer):
    with pytest.raises(TrainingError, match=r"all 8 pairs have score 0 and pull with weight 0.*set loss\.margin > 0"):
        start(make_trainer(fresh=True), link="hinge")


def test_margins_that_the_loss_asks_for_and_the_data_lack_are_missed_before_the_base_is_loaded(make_recipe, monkeypatch):
    monkeypatch.setattr("pe_dpo.inference.policy.load_base", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    with pytest.raises(DataError, match=r"margin_scale is 1, but no pair has a margin; name its column in data\.columns"):
        train(make_recipe("loss.margin_scale=1"))


def test_a_loss_that_is_not_finite_at_the_start_names_the_rows(make_trainer):
    with pytest.raises(TrainingError, match=r"not finite for train\.jsonl:\d, train\.jsonl:\d.*look at these rows"):
        start(make_trainer(fresh=True), margin=math.nan)


@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4-single"])
def test_a_tensor_of_the_base_that_is_not_finite_is_named(make_trainer, tiny_base, tmp_path, quantize):
    name, base = "model.layers.1.mlp.up_proj.weight", tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[100] = math.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"base: {name} has values that are not finite .*; fetch the model again"):
        start(make_trainer(f"model.base={base}", f"model.quantize={quantize}", "reference.policy=step", fresh=True))


def test_a_row_that_is_not_finite_and_no_pair_reaches_is_named(make_trainer, tiny_base, tmp_path):
    """A merge writes all rows, and would refuse it after training."""
    shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.embed_tokens.weight"][255] = math.inf
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"base: model\.embed_tokens\.weight has values that are not finite"):
        start(make_trainer(f"model.base={tmp_path / 'base'}", "reference.policy=step", fresh=True))


@pytest.mark.parametrize("fails_in", ["eval", "train", "backward"])
def test_a_forward_that_fails_is_a_line(make_trainer, fails_in, monkeypatch):
    """A router that returns two tensors, say, to which LoRA cannot add; some bases fail in train mode alone."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        found = plain(self, x)
        if fails_in == "backward":
            if found.requires_grad:
                found.register_hook(fail)
        elif self.training == (fails_in == "train"):
            fail()
        return found

    def fail(*_):
        raise AttributeError("'tuple' object has no attribute 'dtype'")

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(
        ModelError,
        match=r"base: the forward of LlamaForCausalLM \(transformers 5.*\) fails on pairs of the data \(Attrib.* 'tuple'",
    ):
        start(make_trainer(fresh=True, anew=True))


def watched(chosen_shift):
    """40 pairs that the reference ranks right, and a policy that moved the chosen answers by so much."""
    lengths = torch.full((40,), 20), torch.full((40,), 20)
    rejected = torch.full((40,), -60.0, dtype=torch.float64)
    reference = PairLogprobs(rejected + 20, rejected, *lengths)
    policy = reference._replace(chosen=reference.chosen + chosen_shift)
    return tables.table_of(policy, reference, Loss(beta=0.1, gamma=0.0)(policy, reference, torch.zeros(40)))


def test_a_reference_that_ranks_pairs_in_another_way_than_the_policy_at_step_0_is_refused():
    """Two of them lost what they were ahead by, and 20 nats more; with gamma 0 the loss would never notice."""
    shift = torch.zeros(40, dtype=torch.float64)
    shift[-2:] = -40.0
    with pytest.raises(ModelError, match=r"rank 2 of 40 pairs in opposite ways.*reference\.policy: step"):
        check_diagonal(watched(shift))


def test_a_near_tie_that_rounding_turns_is_no_other_reference():
    """Δ0 = 1e-4 and Δπ = −1e-4, of answers of −60 nats."""
    pairs = watched(torch.full((40,), -20.0001, dtype=torch.float64))
    check_diagonal(replace(pairs, reference_chosen=pairs.reference_rejected + 1e-4))


def test_a_base_that_cannot_recompute_activations_is_told(make_trainer, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"^train\.gradient_checkpointing: LlamaForCausalLM of transformers cannot recompute"):
        make_trainer("train.gradient_checkpointing=true", fresh=True)


def test_what_a_gpu_and_a_configuration_change_is_said_before_training(make_recipe, tmp_path, tiny_base, monkeypatch, logged):
    from transformers import AutoModelForCausalLM

    from benchmarks.architectures.models import ARCHITECTURES

    config = ARCHITECTURES["mixtral"].config()
    config.update({"router_jitter_noise": 0.02, "vocab_size": 320})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    for path in (*tiny_base.glob("token*"), *tiny_base.glob("*.jinja")):
        shutil.copy(path, tmp_path / "base")
    monkeypatch.setattr("pe_dpo.training.preparation.lacks_bfloat16", lambda: True)
    prepare_run(make_recipe(f"model.base={tmp_path / 'base'}"))
    assert "computed in float32: this GPU has no bfloat16 (emulated it is slower), and float16 loses small gradients" in logged
    assert any(
        line.endswith("that its configuration switches on in training is off: router_jitter_noise 0.02") for line in logged
    )


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_what_divides_a_base_over_cards_is_refused_with_the_reason(make_trainer, monkeypatch, kind):
    from accelerate import Accelerator, DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    message = f"^launched as {kind}: the base lies whole on each card, and the step is its own all-reduce .* with torchrun$"
    with pytest.raises(UsageError, match=message):
        make_trainer(fresh=True)


def test_a_pair_that_is_not_finite_among_others_is_named_and_left_to_its_step(make_trainer, warned):
    trainer = make_trainer("loss.link=squared", "loss.margin=1", fresh=True)
    pairs = [replace(pair, margin=1e200 if at == 3 else 0.0) for at, pair in enumerate(trainer.train_dataset[:8])]
    loss, trainer.scorer.token_budget = replace(trainer.loss, margin_scale=1.0), 1024
    check = check_start(trainer.model, pairs, trainer.scorer, loss=loss, policy_is_reference=True)
    assert (check.pairs, check.loss) == (7, 1.0)
    said = "before training, log-probs or loss are not finite for train.jsonl:4 (1 of 8 pairs that were tried); their steps"
    assert warned == [f"warning: {said} will be skipped"]


def test_a_held_out_pair_that_cannot_be_measured_is_refused_before_training():
    table = watched(0.0)
    check_held_out(None)
    check_held_out(table)
    with pytest.raises(TrainingError, match=r"1 of the held-out pairs cannot be measured; not finite: .* \(loss is inf\)"):
        check_held_out(replace(table, loss=np.array([*table.loss[1:], math.inf])))


@pytest.mark.parametrize(
    ("column", "value", "setting", "words"),
    [
        (
            "margin",
            1e200,
            "loss.margin_scale=2",
            r"margin comes to 2e\+200, and none beyond -1e\+06 to 1e\+06",
        ),
        (
            "pull",
            1e8,
            "data.columns={beta: pull}",
            r"β comes to 1e\+08, and none beyond .* \(1 such pairs\)",
        ),
    ],
)
def test_a_margin_or_beta_of_a_row_that_no_loss_bears_is_refused_before_the_base_is_loaded(
    make_recipe, tiny_pairs, tmp_path, column, value, setting, words
):
    rows = [json.loads(line) | {column: 1.0} for line in (tiny_pairs / "train.jsonl").read_text().splitlines()]
    rows[2][column] = value
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"^train\.jsonl:3: its {words}"):
        prepare_run(make_recipe(f"data.train={tmp_path / 'train.jsonl'}", setting))


def test_settings_of_the_steps_that_so_many_pairs_make_meaningless_are_pointed_at(make_recipe, warned):
    prepare_run(make_recipe("train.pairs_per_step=64", "train.warmup=50", "train.epochs=4"))
    assert warned == [
        "warning: train.warmup: 50 lets the learning rate rise for 4 of 4 steps; a tenth is usual",
        "warning: train.pairs_per_step: 64 is more than the 24 pairs that there are: a step is an epoch",
    ]


def test_what_a_recipe_says_by_itself_is_pointed_at_before_the_data_are_read(make_recipe, tmp_path, warned):
    with pytest.raises(DataError):
        prepare_run(make_recipe(f"data.train={tmp_path / 'nowhere.jsonl'}", "loss.gamma=0"))
    assert len(warned) == 1 and warned[0].startswith("warning: loss: with gamma 0 and summed log-probs shorter answers win")

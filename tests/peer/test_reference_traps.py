"""The reference π0: how it moves unseen in TRL and PEFT, and that here it is the model it should be, or an error."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pe_dpo.data.batches import pad
from pe_dpo.errors import ModelError, RecipeError
from pe_dpo.inference.logprobs import pair_logprobs
from pe_dpo.inference.scorer import Scorer
from pe_dpo.model import base as base_module
from pe_dpo.model.adapter import as_reference, save_adapter, start_from_adapter
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.model.quantization import check_weights_unpacked
from pe_dpo.objective import Loss
from pe_dpo.recipe import recipe_from_yaml
from pe_dpo.training.start import StartCheck, check_start

pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
pytestmark = pytest.mark.peer

LOG_2 = math.log(2)
PADDED = Scorer("padded", torch.device("cpu"))
DPO = {"beta": 0.1, "gamma": 0.1}
CPUINFO = Path("/proc/cpuinfo")
only_where_weights_are_packed = pytest.mark.skipif(
    not CPUINFO.is_file() or "avx512_bf16" not in CPUINFO.read_text(),
    reason="bitsandbytes packs 4-bit weights only on CPUs with avx512_bf16",
)
moves_the_base = pytest.mark.parametrize("init", ["pissa", "olora"])
biased = {"attention_bias": True, "mlp_bias": True}
FEW_STEPS = {"max_steps": 6, "optim": "adamw_torch"}


def recipe_with(adapter: str) -> Any:
    return recipe_from_yaml(f"model: {{base: b}}\ndata: {{train: d}}\nadapter: {{{adapter}}}\noutput: o\n", "r.yaml")


def their_reference(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    return torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)).double()


def logprobs(model: Any, pairs: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        scored = pair_logprobs(model, *pad(pairs))
    return torch.cat([scored.chosen, scored.rejected])


def our_reference(model: Any, pairs: list[Any]) -> torch.Tensor:
    with as_reference(model) as frozen:
        return logprobs(frozen, pairs)


def start(model: Any, pairs: list[Any]) -> StartCheck:
    return check_start(model, pairs, PADDED, loss=Loss(**DPO), policy_is_reference=True)


# An initialisation that changes the base


@moves_the_base
def test_trl_takes_what_such_an_init_leaves_of_the_base_as_the_reference(
    make_base: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    peer_batch: Callable[..., Any],
    summed_logprobs: Callable[..., torch.Tensor],
    rows: list[dict[str, str]],
    init: str,
) -> None:
    peer = peer_trainer(make_base(), rows, noise=False, lora={"init_lora_weights": init})
    batch = peer_batch(peer)
    assert (their_reference(peer, batch) - summed_logprobs(make_base(), batch)).abs().max() > 1


@moves_the_base
def test_a_recipe_with_such_an_init_is_refused_with_the_reason(init: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r\.yaml:3: adapter\.init: {init} changes the base weights"):
        recipe_with(f"init: {init}")


@moves_the_base
def test_a_finished_adapter_with_such_an_init_is_refused_with_the_reason(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], rows: list[dict[str, str]], tmp_path: Path, init: str
) -> None:
    peer_trainer(make_base(), rows, noise=False, lora={"init_lora_weights": init}).save_model(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match=rf"was initialised by {init}, which changed its base"):
        start_from_adapter(make_base(), tmp_path / "adapter", reference="base")


def test_our_reference_is_the_untouched_base_before_and_after_training(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    pairs = encode(rows)
    base = logprobs(make_base(), pairs)
    model = attach(make_base(), noise=False)
    assert torch.equal(our_reference(model, pairs), base)
    pair_trainer(model, pairs, DPO, **FEW_STEPS).train()
    assert (logprobs(model, pairs) - base).abs().max() > 1
    assert torch.equal(our_reference(model, pairs), base)


# Trained biases


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
def test_trl_lets_the_reference_drift_with_trained_biases(
    make_base: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    peer_batch: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    peer = peer_trainer(make_base(**biased), rows, noise=False, lora={"bias": "lora_only"}, **FEW_STEPS)
    batch = peer_batch(peer)
    before = their_reference(peer, batch)
    peer.train()
    assert (their_reference(peer, batch) - before).abs().max() > 1


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_recipe_with_trained_biases_is_refused_with_the_reason(bias: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r\.yaml:3: adapter\.bias: with bias: {bias} the trained biases stay on"):
        recipe_with(f"bias: {bias}")


def test_a_finished_adapter_with_trained_biases_is_refused_with_the_reason(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], rows: list[dict[str, str]], tmp_path: Path
) -> None:
    peer = peer_trainer(make_base(**biased), rows, noise=False, lora={"bias": "lora_only"})
    peer.save_model(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="has bias=lora_only, which stays on when adapters are off"):
        start_from_adapter(make_base(**biased), tmp_path / "adapter", reference="base")


def test_our_reference_of_a_base_with_biases_does_not_drift(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    pairs = encode(rows)
    model = attach(make_base(**biased), noise=False)
    pair_trainer(model, pairs, DPO, **FEW_STEPS).train()
    assert torch.equal(our_reference(model, pairs), logprobs(make_base(**biased), pairs))


# A new start from one's own checkpoint


def test_trl_makes_the_checkpoint_that_it_starts_from_the_reference(
    make_base: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    peer_batch: Callable[..., Any],
    peer_step: Callable[..., Any],
    summed_logprobs: Callable[..., torch.Tensor],
    rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    first = peer_trainer(make_base(), rows, noise=False, **FEW_STEPS)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(make_base(), str(tmp_path / "adapter"), is_trainable=True)
    second = peer_trainer(again, rows, noise=False, data={"peft_config": None})
    batch = peer_batch(second)
    assert peer_step(first).loss < 0.5
    assert peer_step(second).loss == pytest.approx(LOG_2, abs=1e-6)
    assert (their_reference(second, batch) - summed_logprobs(make_base(), batch)).abs().max() > 1


def test_a_recipe_that_starts_from_an_adapter_must_name_its_reference() -> None:
    with pytest.raises(RecipeError, match=r"^r\.yaml:3: adapter\.reference: the run starts from the adapter a: say which"):
        recipe_with("start: a")


def test_a_new_start_against_the_base_goes_on_from_the_checkpoint_and_keeps_the_base_as_reference(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
    rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    pairs = encode(rows)
    model = attach(make_base(), noise=False)
    pair_trainer(model, pairs, DPO, **FEW_STEPS).train()
    save_adapter(model, tmp_path / "adapter")
    again = start_from_adapter(make_base().requires_grad_(False), tmp_path / "adapter", reference="base")
    assert torch.equal(logprobs(again, pairs), logprobs(model, pairs))
    assert torch.equal(our_reference(again, pairs), logprobs(make_base(), pairs))


# Step 0


def test_trl_trains_although_policy_and_reference_differ_at_step_0(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    peer = peer_trainer(make_base(), rows, noise=False, lora={"init_lora_weights": False}, max_steps=1)
    peer.train()
    assert abs(peer.state.log_history[0]["loss"] - LOG_2) > 0.01


def test_policy_and_reference_are_exactly_equal_at_step_0_with_adapter_dropout_on(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    rows: list[dict[str, str]],
) -> None:
    begun = start(attach(make_base(), noise=False, dropout=0.3), encode(rows))
    assert begun.largest_difference == 0
    assert begun.loss == pytest.approx(LOG_2, abs=1e-12)


def test_a_start_with_a_policy_that_is_not_the_reference_is_an_error(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    rows: list[dict[str, str]],
) -> None:
    with pytest.raises(ModelError, match=r"policy and reference differ by \S+ nats on one batch"):
        start(attach(make_base(), noise=True), encode(rows))


def test_policy_and_frozen_copy_are_equal_at_step_0_when_the_adapter_was_made_with_dropout(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    save_adapter(attach(make_base(), dropout=0.1), tmp_path / "sft")
    model = start_from_adapter(make_base().requires_grad_(False), tmp_path / "sft", reference="adapter")
    assert start(model, encode(rows)).largest_difference == 0


def test_the_reference_of_a_pair_is_the_same_in_every_step_when_the_adapter_was_made_with_dropout(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    save_adapter(attach(make_base(), dropout=0.1), tmp_path / "sft")
    model = start_from_adapter(make_base().requires_grad_(False), tmp_path / "sft", reference="adapter").train()
    pairs = encode(rows)
    assert torch.equal(our_reference(model, pairs), our_reference(model, pairs))


@moves_the_base
def test_a_start_from_an_init_that_moved_the_base_is_an_error_even_when_it_slipped_in(
    make_base: Callable[..., Any], encode: Callable[..., list[Any]], rows: list[dict[str, str]], init: str
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_base(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init))
    with pytest.raises(ModelError, match="the reference is not the model that training starts from"):
        start(model, encode(rows))


# Four-bit weights on a CPU


def load_four_bits(folder: str) -> Any:
    return load_base(inspect_base(folder, quantize="nf4", dtype="float32"))


@only_where_weights_are_packed
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
def test_trl_trains_four_bit_weights_with_a_wrong_gradient_after_its_reference_pass(
    saved_for_four_bits: str,
    peer_trainer: Callable[..., Any],
    peer_step: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    steps = {}
    for is_precomputed in (False, True):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        )
        model = AutoModelForCausalLM.from_pretrained(saved_for_four_bits, dtype=torch.float32, quantization_config=quantization)
        steps[is_precomputed] = peer_step(peer_trainer(model, rows, precompute_ref_log_probs=is_precomputed))
    right, wrong = steps[False], steps[True]
    assert wrong.loss == pytest.approx(right.loss, rel=0.02)
    assert (wrong.gradient - right.gradient).norm() > 0.5 * right.gradient.norm()


@only_where_weights_are_packed
def test_an_evaluation_packs_four_bit_weights_that_are_not_guarded_and_training_is_refused(
    saved_for_four_bits: str,
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    rows: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base_module, "keep_weights_unpacked", lambda model: None)
    model = attach(load_four_bits(saved_for_four_bits))
    PADDED.score_pairs(model, encode(rows))
    with pytest.raises(ModelError, match="4-bit weights were repacked for the CPU's inference kernel"):
        check_weights_unpacked(model)


def test_our_four_bit_gradient_is_the_same_after_an_evaluation(
    saved_for_four_bits: str,
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
    our_step: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    pairs = encode(rows)
    fresh = our_step(pair_trainer(attach(load_four_bits(saved_for_four_bits)), pairs, DPO))
    model = attach(load_four_bits(saved_for_four_bits))
    PADDED.score_pairs(model, pairs)
    evaluated = our_step(pair_trainer(model, pairs, DPO))
    check_weights_unpacked(model)
    assert fresh.gradient.norm() > 0
    assert evaluated.loss == fresh.loss
    assert torch.equal(evaluated.gradient, fresh.gradient)


def test_our_four_bit_reference_pass_equals_the_policy_pass_exactly_at_step_0(
    saved_for_four_bits: str, attach: Callable[..., Any], encode: Callable[..., list[Any]], rows: list[dict[str, str]]
) -> None:
    assert start(attach(load_four_bits(saved_for_four_bits), noise=False), encode(rows)).largest_difference == 0

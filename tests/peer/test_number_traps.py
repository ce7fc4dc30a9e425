"""The numbers: adapters that do not move, metrics and gradients that depend on how pairs were put into batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pe_dpo.data.batches import split_by_tokens
from pe_dpo.inference.pairs import pair_table
from pe_dpo.inference.scorer import Scorer
from pe_dpo.metrics.catalogue import pair_metrics
from pe_dpo.model.adapter import as_reference
from pe_dpo.model.base import inspect_base, load_base
from pe_dpo.objective import Loss

pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
pytestmark = pytest.mark.peer


def padded(token_budget: int) -> Scorer:
    return Scorer("padded", torch.device("cpu"), token_budget=token_budget)


DPO = {"beta": 0.1, "gamma": 0.1}
SMALL_STEPS = {"max_steps": 10, "learning_rate": 5e-6, "optim": "adamw_torch"}


# Adapters in half precision


def share_moved(trainer: Any) -> float:
    """Train, and return the share of entries of all A that are no longer what they were."""
    matrices = [parameter for name, parameter in trainer.model.named_parameters() if "lora_A" in name]
    before = [matrix.detach().clone() for matrix in matrices]
    trainer.train()
    moved = sum(int((now != then).sum()) for now, then in zip(matrices, before, strict=True))
    return moved / sum(matrix.numel() for matrix in matrices)


def test_trl_casts_the_adapter_of_a_four_bit_base_to_bfloat16_and_few_of_its_entries_move(
    saved_for_four_bits: str, peer_trainer: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    base = load_base(inspect_base(saved_for_four_bits, quantize="nf4", dtype="float32"))
    assert share_moved(peer_trainer(base, rows, noise=False, **SMALL_STEPS)) < 0.05


@pytest.mark.parametrize(("quantize", "dtype"), [("nf4", "float32"), ("nf4", "bfloat16"), ("none", "bfloat16")])
def test_nearly_all_entries_of_our_adapter_move(
    saved_for_four_bits: str,
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
    rows: list[dict[str, str]],
    quantize: str,
    dtype: str,
) -> None:
    model = attach(load_base(inspect_base(saved_for_four_bits, quantize=quantize, dtype=dtype)), noise=False)
    assert share_moved(pair_trainer(model, encode(rows), DPO, **SMALL_STEPS)) > 0.95


# Dropout of the adapter


def adapter_dropouts(model: Any) -> set[float]:
    layers = [module for name, module in model.named_modules() if ".lora_dropout." in name]
    return {layer.p for layer in layers if isinstance(layer, torch.nn.Dropout)}


def test_trl_sets_the_dropout_that_was_asked_for_to_0_and_still_says_it_is_there(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    model = peer_trainer(make_base(), rows, lora={"lora_dropout": 0.3}).model
    assert adapter_dropouts(model) == {0.0}
    assert model.peft_config["default"].lora_dropout == 0.3


def test_our_adapter_has_the_dropout_that_was_asked_for(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    trainer = pair_trainer(attach(make_base(), dropout=0.3), encode(rows), DPO)
    assert adapter_dropouts(trainer.model) == {0.3}


# Held-out metrics


def test_trls_evaluation_accuracy_depends_on_the_batch_size(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    from datasets import Dataset

    def accuracy(pairs_per_batch: int) -> float:
        data = {"eval_dataset": Dataset.from_list(rows[:5])}
        peer = peer_trainer(make_base(), rows, data=data, per_device_eval_batch_size=pairs_per_batch)
        return peer.evaluate()["eval_rewards/accuracies"]

    assert accuracy(5) == pytest.approx(accuracy(1))
    assert abs(accuracy(4) - accuracy(5)) > 0.1


def test_our_held_out_metrics_do_not_depend_on_the_token_budget(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    rows: list[dict[str, str]],
) -> None:
    model, pairs = attach(make_base()), encode(rows[:5])

    def metrics(token_budget: int) -> dict[str, float]:
        policy = padded(token_budget).score_pairs(model, pairs)
        with as_reference(model) as frozen:
            reference = padded(token_budget).score_pairs(frozen, pairs)
        loss = Loss(**DPO)
        return pair_metrics(pair_table(pairs, policy, reference, loss(policy, reference, torch.zeros(5)), loss))

    budgets = {1: [1, 1, 1, 1, 1], 160: [1, 2, 2], 4096: [5]}
    assert {budget: sorted(map(len, split_by_tokens(pairs, budget))) for budget in budgets} == budgets
    one_by_one, some, together = map(metrics, budgets)
    assert together["rewards/accuracies"] == 0.4  # two of five, as TRL counts them in one batch
    assert one_by_one == pytest.approx(together, rel=1e-6, nan_ok=True)
    assert some == pytest.approx(together, rel=1e-6, nan_ok=True)


def test_our_scores_come_back_in_the_order_of_the_pairs(
    make_base: Callable[..., Any], encode: Callable[..., list[Any]], rows: list[dict[str, str]]
) -> None:
    model, pairs = make_base(), encode(rows)
    alone = torch.cat([padded(1).score_pairs(model, [pair]).chosen for pair in pairs])
    assert split_by_tokens(pairs, 160) != sorted(split_by_tokens(pairs, 160))
    together = padded(160).score_pairs(model, pairs).chosen
    assert together.tolist() == pytest.approx(alone.tolist(), rel=1e-6)


# One optimizer step


def their_first_loss(peer: Any) -> float:
    peer.train()
    return peer.state.log_history[0]["loss"]


def test_trls_loss_of_an_optimizer_step_depends_on_an_uneven_split(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    together, split = (
        their_first_loss(
            peer_trainer(make_base(), rows, max_steps=1, per_device_train_batch_size=pairs, gradient_accumulation_steps=batches)
        )
        for pairs, batches in ((6, 1), (4, 2))
    )
    assert abs(split / together - 1) > 0.01


def test_trls_loss_with_an_sft_term_depends_on_an_even_split_too(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], rows: list[dict[str, str]]
) -> None:
    together, split = (
        their_first_loss(
            peer_trainer(
                make_base(),
                rows,
                loss_type=["sigmoid", "sft"],
                max_steps=1,
                per_device_train_batch_size=pairs,
                gradient_accumulation_steps=batches,
            )
        )
        for pairs, batches in ((6, 1), (1, 6))
    )
    assert abs(split / together - 1) > 0.01


@pytest.mark.parametrize("sft_weight", [0.0, 1.0])
@pytest.mark.parametrize(("token_budget", "sizes"), [(1, [1] * 6), (160, [1, 1, 2, 2]), (200, [2, 2, 2])])
def test_our_optimizer_step_does_not_depend_on_its_split(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
    our_step: Callable[..., Any],
    rows: list[dict[str, str]],
    token_budget: int,
    sizes: list[int],
    sft_weight: float,
) -> None:
    pairs = encode(rows)
    assert sorted(map(len, split_by_tokens(pairs, token_budget))) == sizes
    loss = DPO | {"sft_weight": sft_weight}
    together = our_step(pair_trainer(attach(make_base()), pairs, loss))
    split = our_step(pair_trainer(attach(make_base()), pairs, loss, token_budget=token_budget))
    assert split.loss == pytest.approx(together.loss, rel=1e-6)
    assert (split.gradient - together.gradient).norm() <= 1e-5 * together.gradient.norm()

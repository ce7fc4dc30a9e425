"""The same token ids and the same weights give the same loss and gradient as TRL's own trainers, where both have the loss."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pe_dpo.data.batches import pad
from pe_dpo.metrics.catalogue import pair_metrics
from pe_dpo.model.adapter import save_adapter, start_from_adapter

pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
pytestmark = pytest.mark.peer

TOLERANCE = 1e-5
LOG_2 = math.log(2)

NAMES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dpo": ("dpo", {"loss_type": "sigmoid"}, {}),
    "hinge": ("dpo", {"loss_type": "hinge"}, {}),
    "ipo": ("dpo", {"loss_type": "ipo"}, {}),
    "dpo-norm": ("dpo", {"loss_type": "sigmoid_norm"}, {}),
    "robust": ("dpo", {"loss_type": "robust", "label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "simpo": ("cpo", {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0}, {"margin": 0.7}),
    "cdpo": ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.0, "label_smoothing": 0.2}, {"label_smoothing": 0.2, "gamma": 0.0}),
}
"""Preset: TRL's trainer, what it calls the loss, and what the preset needs beside its β."""
BETAS = {"simpo": (1.0, 2.0, 10.0), "dpo-norm": (1.0, 5.0, 10.0)}


def loss_of(name: str, beta: float) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """TRL's trainer, its arguments, and our loss section."""
    kind, theirs, ours = NAMES[name]
    return kind, {**theirs, "beta": beta}, {"preset": name, "beta": beta, **ours}


LOSSES = {(name, beta): loss_of(name, beta) for name in NAMES for beta in BETAS.get(name, (0.05, 0.3, 0.7))}
every_loss = pytest.mark.parametrize(("name", "beta"), LOSSES)


def marked(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def their_rows(batch: dict[str, Any], kind: str, mask: str) -> list[list[int]]:
    """What a batch of TRL's marks, chosen before rejected, whichever of its two layouts it has."""
    if kind == "dpo":
        return marked(batch["input_ids"], batch[mask])
    marks = {"attention_mask": lambda side: batch[f"{side}_attention_mask"],
             "completion_mask": lambda side: batch[f"{side}_labels"] != -100}  # fmt: skip
    sides = ("chosen", "rejected")
    return [row for side in sides for row in marked(batch[f"{side}_input_ids"], marks[mask](side))]


@pytest.fixture
def both(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    rows: list[dict[str, str]],
) -> Callable[..., tuple[Any, Any]]:
    """Ours and TRL's trainer on equal bases, equal adapters with B ≠ 0, and the same rows."""

    def make(kind: str, theirs: dict[str, Any], ours: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        mine = pair_trainer(attach(make_base()), encode(rows), ours, **options)
        peer = peer_trainer(make_base(), rows, kind=kind, **theirs, **options)
        return mine, peer

    return make


@every_loss
def test_one_step_has_the_loss_and_the_adapter_gradient_of_trl(
    both: Callable[..., Any],
    our_step: Callable[..., Any],
    peer_step: Callable[..., Any],
    name: str,
    beta: float,
) -> None:
    """Under one name and one β, at three β; IPO's loss here is β² times that of the paper.

    In float64: in float32 the order of sums, which is the processor's, moves a gradient by 1.1e-5.
    """
    mine, peer = both(*LOSSES[name, beta])
    mine.model.double()
    peer.model.double()
    our, their = our_step(mine), peer_step(peer)
    factor = beta**2 if name == "ipo" else 1
    assert our.loss == pytest.approx(factor * their.loss, rel=TOLERANCE)
    assert our.gradients.keys() == their.gradients.keys()
    assert len(their.gradients) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    for weight, gradient in their.gradients.items():
        assert gradient.norm() > 0, weight
        assert (our.gradients[weight] - factor * gradient).norm() <= TOLERANCE * factor * gradient.norm(), weight


@pytest.mark.parametrize("name", ["dpo", "hinge", "robust", "cdpo"])
def test_the_metrics_that_bear_trls_names_have_trls_values(
    both: Callable[..., Any], peer_step: Callable[..., Any], name: str
) -> None:
    mine, peer = both(*LOSSES[name, 0.3])
    peer_step(peer)
    theirs = peer._metrics["train"] if NAMES[name][0] == "dpo" else peer._stored_metrics["train"]
    ours = pair_metrics(mine.forward_pairs(mine.model, mine.train_dataset)[0])
    shared = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"]
    assert {key: ours[key] for key in shared} == pytest.approx({key: theirs[key][0] for key in shared}, rel=3e-5)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("dpo", "adamw_torch"), ("simpo", "adamw_torch"), ("hinge", "sgd"), ("dpo-norm", "sgd")],
)
def test_three_optimizer_steps_have_the_losses_of_trl(
    both: Callable[..., Any],
    name: str,
    optimizer: str,
) -> None:
    """Of both of TRL's trainers; that the losses are one step's is shown for each of them above."""
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "optim": optimizer, "learning_rate": 1e-3}
    mine, peer = both(*loss_of(name, BETAS.get(name, (0, 0.3))[1]), **options)
    batches = list(mine.get_train_dataloader())
    order = [int(pair.where.split(":")[1]) - 1 for batch in batches for pair in batch]
    peer.train_dataset = peer.train_dataset.select(order)
    untrained = [float(mine.forward_pairs(mine.model, batch)[1].loss.detach().mean()) for batch in batches]
    mine.train()
    peer.train()
    our_losses, their_losses = (
        [line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (mine, peer)
    )
    assert len(their_losses) == 3
    assert our_losses == pytest.approx(their_losses, rel=TOLERANCE)
    assert min(abs(now - then) for now, then in zip(our_losses[1:], untrained[1:], strict=True)) > 10 * TOLERANCE


def test_a_start_from_an_adapter_against_its_frozen_copy_has_the_loss_and_gradient_of_trl(
    make_base: Callable[..., Any],
    attach: Callable[..., Any],
    renew_noise: Callable[..., Any],
    encode: Callable[..., list[Any]],
    pair_trainer: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    our_step: Callable[..., Any],
    peer_step: Callable[..., Any],
    rows: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    save_adapter(attach(make_base()), tmp_path / "sft")
    model = start_from_adapter(make_base().requires_grad_(False), tmp_path / "sft", reference="adapter")
    mine = pair_trainer(model, encode(rows), {"beta": 0.3})
    theirs = PeftModel.from_pretrained(make_base(), str(tmp_path / "sft"), is_trainable=True)
    peer = peer_trainer(theirs, rows, noise=False, beta=0.3, data={"peft_config": None})
    for trainer in (mine, peer):
        renew_noise(trainer.model)
    our, their = our_step(mine), peer_step(peer)
    assert abs(their.loss - LOG_2) > 0.01
    assert our.loss == pytest.approx(their.loss, rel=TOLERANCE)
    assert (our.gradient - their.gradient).norm() <= TOLERANCE * their.gradient.norm()


@pytest.mark.parametrize("kind", ["dpo", "cpo"])
@pytest.mark.parametrize("bos", ["<s>", None])
def test_the_token_ids_that_are_scored_are_those_of_trl(
    make_base: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    peer_batch: Callable[..., Any],
    encode: Callable[..., list[Any]],
    rows: list[dict[str, str]],
    kind: str,
    bos: str | None,
) -> None:
    tokenizer = make_tokenizer(bos=bos)
    peer = peer_trainer(make_base(), rows, kind=kind, data={"processing_class": tokenizer})
    batch = peer_batch(peer)
    input_ids, attention_mask, completion_mask = pad(encode(rows, tokenizer=tokenizer))
    read, scored = (input_ids, attention_mask), (input_ids, completion_mask)
    assert marked(*read) == their_rows(batch, kind, "attention_mask")
    assert marked(*scored) == their_rows(batch, kind, "completion_mask")
    assert {row[-1] for row in marked(*scored)} == {tokenizer.eos_token_id}

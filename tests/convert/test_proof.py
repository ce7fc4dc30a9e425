"""Converted losses against TRL's own trainers, each name of a loss once, with its factor and weights worked out by hand."""

import json
from pathlib import Path

import pytest

from pe_dpo.convert.proof import prove
from pe_dpo.quickstart.demo import PAIRS

pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
pytestmark = [pytest.mark.slow, pytest.mark.peer]


@pytest.mark.parametrize(("text", "factor"), [
    ("loss_type: hinge\nbeta: 0.3", 1.0),
    ("loss_type: ipo\nbeta: 0.3", 0.09),
    ("loss_type: [ipo, sft]\nloss_weights: [2.0, 0.5]\nbeta: 0.3", 0.045),
    ("loss_type: robust\nlabel_smoothing: 0.2", 1.0),
    ("loss_type: sigmoid_norm\nbeta: 2.0", 1.0),
    ("loss_type: [sigmoid, sft]\nloss_weights: [0.5, 0.2]", 2.0),
    ("loss_type: hinge\ncpo_alpha: 0.5", 1.0),
    ("loss_type: ipo\ncpo_alpha: 0.5\nbeta: 0.3", 0.09),
    ("loss_type: sigmoid\ncpo_alpha: 0.5\nlabel_smoothing: 0.1", 1.0),
    ("loss_type: simpo\nsimpo_gamma: 0.7\nbeta: 2.0", 1.0),
])  # fmt: skip
def test_a_loss_is_trls_times_its_factor(converted, text: str, factor: float) -> None:
    proof = prove(converted("trl", text), count=2)
    assert proof.factor == pytest.approx(factor)
    assert (proof.loss, proof.gradient) == pytest.approx((0, 0), abs=2e-5)


def test_a_loss_with_another_number_is_found(converted) -> None:
    """The proof can fail: SimPO with the margin left out."""
    found = converted("trl", "loss_type: simpo\nsimpo_gamma: 0.7\nbeta: 2.0\ncpo_alpha: 0")
    loss = found.recipe.loss.model_copy(update={"margin": 0.0})
    object.__setattr__(found, "recipe", found.recipe.model_copy(update={"loss": loss}))
    proof = prove(found, count=2)
    assert not proof.holds
    assert proof.gradient > 0.1
    assert proof.lines()[0].startswith("proof: NOT the same loss as TRL 1.16.0's CPOTrainer")


def test_pairs_that_are_here_are_those_of_the_file(converted, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (PAIRS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:9]]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    proof = prove(converted("trl", f"dataset_name: {tmp_path / 'mine.jsonl'}"))
    assert proof.pairs == "8 pairs (of the recipe's data) and the embedded model"
    assert proof.holds


@pytest.mark.parametrize(("tool", "text", "words"), [
    ("llama-factory", "dpo_label_smoothing: 0.1", "does not smooth sigmoid, as this tool does (cdpo here)"),
    ("trl", "loss_type: apo_zero", "no preset is that loss"),
    ("trl", "gamma_beta_ratio: 0.5\nloss_type: hinge", "has no simpo_hinge"),
])  # fmt: skip
def test_where_trl_has_no_such_loss_the_proof_says_so(converted, tool: str, text: str, words: str) -> None:
    proof = prove(converted(tool, text))
    assert words in proof.lines()[0]
    assert not proof.holds

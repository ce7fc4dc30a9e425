"""Tokens per forward: measured where there is a GPU, halved when memory runs out, and no step lost."""

from dataclasses import replace

import pytest
import torch

from pe_dpo.errors import TrainingError
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.training import memory
from pe_dpo.training.memory import fitting_tokens, plan_memory


def gradient(trainer):
    return torch.cat([p.grad.flatten() for p in adapter_parameters(trainer.model)])


def out_of_memory_beyond(trainer, tokens, monkeypatch):
    """Let forwards of more tokens run out of memory, as they would on a card; return the sizes of all forwards."""
    sizes = []
    logprobs = type(trainer.scorer).logprobs

    def forward(self, model, pairs):
        sizes.append(self.tokens(pairs))
        if sizes[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logprobs(self, model, pairs)

    monkeypatch.setattr(type(trainer.scorer), "logprobs", forward)
    return sizes


def test_a_step_out_of_memory_is_done_with_smaller_rows_and_gives_the_same_gradient(make_trainer, monkeypatch, warned):
    trainer = make_trainer()
    pairs = trainer.train_dataset[:8]
    loss = trainer.training_step(trainer.model, pairs)
    wanted = gradient(trainer)
    trainer.model.zero_grad()
    trainer._window.clear()
    sizes = out_of_memory_beyond(trainer, 200, monkeypatch)
    again = trainer.training_step(trainer.model, pairs)
    assert max(sizes) > 200 >= sizes[-1]
    assert again == pytest.approx(float(loss), rel=1e-6)
    assert (gradient(trainer) - wanted).norm() <= 2e-6 * wanted.norm()
    assert sum(len(part.loss) for part in trainer._window) == 8
    assert trainer.scorer.token_budget < 1024
    assert all(line.startswith("warning: out of memory; going on with ") for line in warned)
    assert (
        warned[-1]
        == f"warning: out of memory; going on with {trainer.scorer.token_budget} tokens per forward (nothing is lost)"
    )


def test_memory_that_runs_out_inside_of_what_runs_out_leaves_the_pairs_their_turn_alone(make_trainer):
    """The reference may go on with smaller rows while the policy still has the rows of before: no pair was alone yet."""
    trainer = make_trainer()
    scorer, pairs = trainer.scorer, trainer.train_dataset[:4]
    tried = []

    def work():
        tried.append(max(map(len, scorer.split(pairs))))
        if tried[-1] > 1:
            scorer.token_budget = 1  # as the reference leaves it
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert scorer.within_memory(pairs, work) == "done"
    assert tried == [4, 1]


def test_a_step_that_is_begun_again_draws_the_dropout_of_its_first_try(make_trainer, monkeypatch):
    settings = ("adapter.dropout=0.3", "train.tokens_per_microbatch=150")
    undisturbed, disturbed = make_trainer(*settings), make_trainer("adapter.dropout=0.3", "train.tokens_per_microbatch=300")
    pairs = undisturbed.train_dataset[:6]
    undisturbed.reference.logprobs(pairs)
    torch.manual_seed(5)
    undisturbed.training_step(undisturbed.model, pairs)
    disturbed.reference.logprobs(pairs)
    sizes = out_of_memory_beyond(disturbed, 150, monkeypatch)
    torch.manual_seed(5)
    disturbed.training_step(disturbed.model, pairs)
    assert max(sizes) > 150
    assert torch.equal(gradient(disturbed), gradient(undisturbed))


def test_memory_that_runs_out_in_the_backward_leaves_no_half_of_a_gradient(make_trainer, monkeypatch):
    trainer = make_trainer("train.tokens_per_microbatch=300")
    pairs = trainer.train_dataset[:8]
    trainer.training_step(trainer.model, pairs)
    wanted = gradient(trainer)
    trainer.model.zero_grad()
    backward, calls = torch.Tensor.backward, []

    def fail_once(self, *args, **kwargs):
        calls.append(self)
        backward(self, *args, **kwargs)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", fail_once)
    trainer.training_step(trainer.model, pairs)
    assert len(calls) > 3
    assert (gradient(trainer) - wanted).norm() <= 2e-6 * wanted.norm()


def test_a_pair_that_does_not_fit_alone_stops_the_run_with_what_to_do(make_trainer, monkeypatch):
    trainer = make_trainer()
    out_of_memory_beyond(trainer, 5, monkeypatch)
    message = r"out of memory with one pair at a time; the longest is train\.jsonl:\d+ with \d+ tokens.*checkpointing: true"
    with pytest.raises(TrainingError, match=message):
        trainer.training_step(trainer.model, trainer.train_dataset[:4])


def test_held_out_pairs_are_scored_with_smaller_rows_too(make_trainer, monkeypatch):
    trainer = make_trainer()
    wanted = trainer.score_model()
    sizes = out_of_memory_beyond(trainer, 150, monkeypatch)
    assert trainer.score_model().chosen.tolist() == wanted.chosen.tolist()
    assert max(sizes) > 150


def test_a_hinge_row_whose_pairs_are_all_satisfied_runs_no_backward_and_the_optimizer_moves_as_with_zeros(
    make_trainer, monkeypatch
):
    """Adam's averages of the first step go on moving the adapter: a gradient that is missing would freeze it."""
    backwards, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a, **k: backwards.append(1) or backward(self, *a, **k))
    trainer = make_trainer("loss.preset=rso", "loss.margin=1000")
    parameters = adapter_parameters(trainer.model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    trainer.training_step(trainer.model, trainer.train_dataset[:4])
    optimizer.step()
    trainer.model.zero_grad()
    assert len(backwards) == 1
    trainer.loss = replace(trainer.loss, margin=-1000.0)
    trainer.training_step(trainer.model, trainer.train_dataset[:4])
    assert len(backwards) == 1
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


def test_a_hinge_with_an_sft_term_is_never_skipped(make_trainer):
    trainer = make_trainer("loss.preset=rso", "loss.margin=-1000", "loss.sft_weight=1")
    trainer.training_step(trainer.model, trainer.train_dataset[:4])
    assert gradient(trainer).norm() > 0


def test_tokens_that_fit_lie_on_the_line_through_two_peaks():
    """10 kB of fixed cost and 100 bytes a token: 0.85 · 1 MB − 10 kB leaves 8,400 tokens."""
    peaks = {500: 60_000, 1000: 110_000}
    found = fitting_tokens(lambda row: peaks[row[0]], [[500], [1000]], lambda row: row[0], 1_000_000)
    assert found == (850_000 - 10_000) // 100


def test_a_probe_that_does_not_fit_leaves_nothing():
    def peak(row):
        raise torch.OutOfMemoryError

    assert fitting_tokens(peak, [[500], [1000]], lambda row: row[0], 1_000_000) == 0


class OnCuda:
    """A scorer that says it is on a GPU and counts tokens as the real one."""

    def __init__(self, scorer):
        self.device, self.tokens = torch.device("cuda"), scorer.tokens


@pytest.fixture
def card(monkeypatch):
    """A card of given free bytes on which a token takes 1,000 bytes, or 100 if activations are recomputed."""

    def make(model, free):
        base = model.get_base_model()
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)

        def peak(model, row, scorer):
            return scorer.tokens(row) * (100 if base.is_gradient_checkpointing else 1000)

        monkeypatch.setattr(memory, "peak_bytes", peak)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("free", "wish", "checkpointing", "plan"),
    [
        (10_000_000, "auto", "auto", (8500, False)),  # 0.85 · 10⁷ / 1000
        (100_000_000, "auto", "auto", (memory.MOST_TOKENS, False)),
        (1_400_000, "auto", "auto", (11900, True)),  # 1,190 tokens would fit: too few, so activations are recomputed
        (1_400_000, "auto", False, (1190, False)),
        (1_400_000, 700, "auto", (700, False)),
        (1_400_000, 1500, "auto", (1500, True)),
        (1_400_000, 1500, False, (1500, False)),
        (10_000_000, "auto", True, (memory.MOST_TOKENS, True)),
    ],
)
def test_activations_are_recomputed_only_if_memory_asks_for_it(make_trainer, card, free, wish, checkpointing, plan):
    trainer = make_trainer()
    card(trainer.model, free + memory.OPTIMIZER_BYTES * sum(p.numel() for p in adapter_parameters(trainer.model)))
    found = plan_memory(trainer.model, trainer.train_dataset, OnCuda(trainer.scorer), tokens=wish, checkpointing=checkpointing)
    assert found == plan
    assert trainer.model.get_base_model().is_gradient_checkpointing == found[1]


def test_on_a_cpu_nothing_is_measured(make_trainer):
    trainer = make_trainer()
    plan = plan_memory(trainer.model, trainer.train_dataset, trainer.scorer, tokens="auto", checkpointing="auto")
    assert plan == (memory.CPU_TOKENS, False)

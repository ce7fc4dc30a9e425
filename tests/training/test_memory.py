"""Tokens per forward: measured where there is a GPU, halved when memory runs out, and no step lost."""

import errno
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
import torch

from pe_dpo.errors import TrainingError
from pe_dpo.estimate import rows
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.model.base import checkpoint_activations
from pe_dpo.model.out_of_memory import is_out_of_memory
from pe_dpo.training import memory
from pe_dpo.training.memory import fitting_tokens, plan_memory


def gradient(trainer):
    return torch.cat([p.grad.flatten() for p in adapter_parameters(trainer.model)])


def out_of_memory_beyond(trainer, tokens, monkeypatch, error=None, recomputed=0):
    """Let forwards of more tokens run out of memory, or of so many where activations are recomputed, as on a card; return the
    sizes of all forwards."""
    sizes, base = [], trainer.model.get_base_model()
    logprobs = type(trainer.scorer).logprobs

    def forward(self, model, pairs):
        sizes.append(self.tokens(pairs))
        if sizes[-1] > (recomputed if recomputed and base.is_gradient_checkpointing else tokens):
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return logprobs(self, model, pairs)

    monkeypatch.setattr(type(trainer.scorer), "logprobs", forward)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
@pytest.mark.slow
def test_a_step_out_of_memory_is_done_with_smaller_rows_and_gives_the_same_gradient(make_trainer, monkeypatch, warned, error):
    trainer = make_trainer()
    pairs = trainer.train_dataset[:8]
    loss = trainer.training_step(trainer.model, pairs)
    wanted = gradient(trainer)
    trainer.model.zero_grad()
    trainer._window._parts.clear()
    sizes = out_of_memory_beyond(trainer, 200, monkeypatch, error)
    again = trainer.training_step(trainer.model, pairs)
    assert max(sizes) > 200 >= sizes[-1]
    assert again == pytest.approx(float(loss), rel=1e-6)
    assert (gradient(trainer) - wanted).norm() <= 2e-6 * wanted.norm()
    assert sum(len(part.loss) for part in trainer._window._parts) == 8
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


@pytest.mark.slow
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


def test_what_is_no_lack_of_memory_is_not_taken_for_it(make_trainer, monkeypatch):
    trainer = make_trainer()
    sizes = out_of_memory_beyond(trainer, 200, monkeypatch, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.training_step(trainer.model, trainer.train_dataset[:8])
    assert len(sizes) == 1


@pytest.mark.slow
def test_rows_above_a_number_of_tokens_recompute_their_activations_and_no_others(make_trainer):
    trainer = make_trainer("train.tokens_per_microbatch=150")
    pairs = trainer.train_dataset[:8]
    trainer.training_step(trainer.model, pairs)
    wanted = gradient(trainer)
    layer, forwards = trainer.model.get_base_model().get_decoder().layers[0].input_layernorm, []
    layer.register_forward_hook(lambda module, given, out: forwards.append(given[0].shape[1]))
    sizes = [trainer.scorer.tokens([pairs[index] for index in row]) for row in trainer.scorer.split(pairs)]
    threshold = min(sizes)
    assert threshold < max(sizes)
    trainer.recomputation.above = threshold
    trainer.training_step(trainer.model, pairs)
    assert len(forwards) == len(sizes) + sum(size > threshold for size in sizes)
    assert torch.equal(gradient(trainer), wanted)


@pytest.mark.slow
def test_a_pair_that_does_not_fit_alone_recomputes_and_draws_the_dropout_of_its_first_try(make_trainer, monkeypatch, warned):
    settings = ("adapter.dropout=0.3", "train.tokens_per_microbatch=1")
    undisturbed, disturbed = make_trainer(*settings), make_trainer(*settings)
    pairs = undisturbed.train_dataset[:4]
    for trainer in (undisturbed, disturbed):
        trainer.reference.logprobs(pairs)
        if trainer is disturbed:
            longest = max(trainer.scorer.tokens([pair]) for pair in pairs)
            out_of_memory_beyond(trainer, longest - 1, monkeypatch, recomputed=longest)
        torch.manual_seed(5)
        trainer.training_step(trainer.model, pairs)
    assert torch.equal(gradient(disturbed), gradient(undisturbed))
    wanted = "a pair does not fit alone: from here on activations are recomputed in every row (nothing is lost)"
    assert [line for line in warned if "alone" in line] == [f"warning: {wanted}"]
    assert disturbed.recomputation.describe() == ", activations recomputed in the backward"


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
        (10_000_000, "auto", "auto", (8500, None)),  # 0.85 · 10⁷ / 1000
        (100_000_000, "auto", "auto", (rows.MOST_TOKENS, None)),
        (1_400_000, "auto", "auto", (1190, None)),
        (1_100_000, "auto", "auto", (9350, 935)),  # 935 tokens would fit: too few, so that longer rows recompute
        (1_100_000, "auto", False, (935, None)),
        (1_100_000, 700, "auto", (700, None)),
        (1_100_000, 1500, "auto", (1500, 935)),
        (1_100_000, 1500, False, (1500, None)),
        (10_000_000, "auto", True, (rows.MOST_TOKENS, 0)),
    ],
)
def test_activations_are_recomputed_only_if_memory_asks_for_it(make_trainer, card, free, wish, checkpointing, plan):
    trainer = make_trainer()
    card(trainer.model, free + memory.OPTIMIZER_BYTES * sum(p.numel() for p in adapter_parameters(trainer.model)))
    tokens, recomputation = plan_memory(
        trainer.model, trainer.train_dataset, OnCuda(trainer.scorer), tokens=wish, checkpointing=checkpointing
    )
    assert (tokens, recomputation.above) == plan
    base = trainer.model.get_base_model()
    for row in (1, 935, 936, 10**6):
        recomputation.of(row)
        assert base.is_gradient_checkpointing == (plan[1] is not None and row > plan[1])


def test_one_long_pair_does_not_make_the_others_recompute(make_trainer, card):
    """A pair of 1,500 tokens where 1,275 fit: rows of 1,275 tokens keep their activations, it alone does not."""
    trainer = make_trainer()
    long = replace(trainer.train_dataset[0], prompt_ids=np.full(1500, 5, np.int32))
    card(trainer.model, 1_500_000 + memory.OPTIMIZER_BYTES * sum(p.numel() for p in adapter_parameters(trainer.model)))
    pairs = [*trainer.train_dataset, long]
    tokens, recomputation = plan_memory(trainer.model, pairs, OnCuda(trainer.scorer), tokens="auto", checkpointing="auto")
    assert (tokens, recomputation.above) == (1275, 1275)
    assert recomputation.describe() == ", activations of rows with more than 1275 recomputed in the backward"
    scorer = trainer.scorer
    scorer.token_budget = tokens
    rows = [[pairs[index] for index in row] for row in scorer.split(pairs)]
    assert [row for row in rows if recomputation.of(scorer.tokens(row))] == [[long]]


def test_what_layers_begin_with_goes_to_the_host_where_even_recomputing_does_not_do(make_trainer, card, monkeypatch):
    trainer, settings = make_trainer(), []
    base = trainer.model.get_base_model()
    monkeypatch.setattr(type(base), "device", torch.device("cuda"))
    monkeypatch.setattr(
        memory, "checkpoint_activations", lambda model, *, offload: settings.append(offload) or checkpoint_activations(model)
    )
    card(trainer.model, 20_000 + memory.OPTIMIZER_BYTES * sum(p.numel() for p in adapter_parameters(trainer.model)))
    long = replace(trainer.train_dataset[0], prompt_ids=np.full(1500, 5, np.int32))
    _, recomputation = plan_memory(
        trainer.model, [*trainer.train_dataset, long], OnCuda(trainer.scorer), tokens="auto", checkpointing="auto"
    )
    assert settings == [False, True]
    assert recomputation.describe().endswith(" recomputed in the backward, and kept on the host")
    assert recomputation.grow() == "activations are recomputed in every row" and recomputation.grow() is None


def test_layers_can_leave_what_they_begin_with_on_the_host():
    """The lever of transformers that is pulled on a card; its copies themselves need one."""
    import inspect

    from transformers import LlamaForCausalLM as Llama

    enable = getattr(Llama, "activation_checkpointing_enable", None) or Llama.gradient_checkpointing_enable
    assert "offload" in inspect.signature(enable).parameters


def test_on_a_cpu_nothing_is_measured(make_trainer, monkeypatch):
    """Rows of 512 tokens, as all pairs are shorter; a tree may take an eighth of the memory at 128 bytes a hidden number."""
    trainer = make_trainer()
    config = trainer.model.get_base_model().config
    monkeypatch.setattr(memory, "host_memory", lambda: 8 * 3000 * 128 * config.hidden_size * config.num_hidden_layers)
    tokens, recomputation = plan_memory(
        trainer.model, trainer.train_dataset, trainer.scorer, tokens="auto", checkpointing="auto"
    )
    assert (tokens, trainer.scorer.tree_budget, recomputation.above) == (512, 3000, None)
    tokens, _ = plan_memory(trainer.model, trainer.train_dataset, trainer.scorer, tokens=700, checkpointing="auto")
    assert (tokens, trainer.scorer.tree_budget) == (700, 0)


def test_rows_on_a_cpu_are_as_long_as_the_longest_pair_between_512_and_1024():
    """24 GiB: an eighth of it is 3 · 2³⁰ bytes, 12,288 tokens of 4 layers × 512 · 32 · 4 bytes; of 1 GiB 512."""
    for longest, tokens in ((80, 512), (700, 700), (5000, 1024)):
        assert rows.cpu_rows(longest, 24 * 2**30, hidden=512, layers=4) == (tokens, 12288)
    assert rows.cpu_rows(5000, 2**30, hidden=512, layers=4) == (1024, 1024)
    assert rows.cpu_rows(80, 2**40, hidden=512, layers=4) == (512, rows.MOST_TOKENS)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8"
        ),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 8 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        pyarrow.ArrowMemoryError("malloc of size 8 failed"),
        np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(float)),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_on_a_cpu_is_known_in_all_its_words(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space left on device"), ValueError("x")]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)

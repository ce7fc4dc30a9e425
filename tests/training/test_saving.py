"""When a run saves, and that it does not matter for what it comes to."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from killed import KillAt, Killed
from one_base import train
from safetensors.torch import load_file
from transformers import TrainerControl

from pe_dpo.runs.checkpoints import checkpoints
from pe_dpo.runs.run import Run
from pe_dpo.training import train as training
from pe_dpo.training.clock import SaveClock

SETTINGS = ("adapter.dropout=0.1", "train.log_every=4", "train.save_every=100", "train.tokens_per_microbatch=400")


def lines(folder):
    """Every logged line without the clock."""
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in Run(folder).metrics]


def asked(saver, *, rank=0, world=1):
    """Whether the clock asks for a checkpoint at the end of a step."""
    control = TrainerControl()
    saver.on_step_end(SimpleNamespace(world_size=world, process_index=rank, device="cpu"), None, control)
    return control.should_save


def test_a_checkpoint_is_due_so_many_minutes_after_the_last_one():
    moments = iter([0.0, 0.0, 899.0, 900.0, 1000.0, 1899.0, 1900.0])
    saver = SaveClock(15, now=lambda: next(moments))
    saver.on_train_begin(None, None, None)
    assert [asked(saver), asked(saver)] == [False, True]
    saver.on_save(None, None, None)
    assert [asked(saver), asked(saver)] == [False, True]
    assert not asked(SaveClock(0, now=itertools.count(step=10**6).__next__))


@pytest.mark.parametrize(("rank", "first_says"), [(0, 1), (1, 1), (1, 0)])
def test_the_first_process_decides_for_all(monkeypatch, rank, first_says):
    """Clocks differ: a process that saved alone would wait for the others for ever."""
    sent = []

    def broadcast(flag, src):
        sent.append((int(flag), src))
        flag.fill_(first_says)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    saver = SaveClock(1, now=iter([0.0, 61.0]).__next__)
    assert asked(saver, rank=rank, world=2) == bool(first_says)
    assert sent == [(1, 0)]


@pytest.mark.slow
def test_a_run_saved_at_other_times_and_killed_between_two_lines_of_metrics_is_the_straight_one(make_recipe, monkeypatch):
    """Lines are of four steps each: the window of a line, too, is part of what is restored."""
    straight = train(make_recipe(*SETTINGS, "train.save_minutes=0", output="straight")).folder
    assert [path.name for path in checkpoints(straight)] == ["checkpoint-6"]
    recipe = make_recipe(*SETTINGS, "train.save_minutes=1")
    seconds = itertools.count(step=40)  # asked at the start, each save and each step: every second step is late
    monkeypatch.setattr(training, "SaveClock", lambda minutes: SaveClock(minutes, now=seconds.__next__))
    for step in (2, 4):
        with pytest.raises(Killed):
            train(recipe, resume=step > 2, callbacks=[KillAt(step)])
    assert [path.name for path in checkpoints(straight.parent / "run")] == ["checkpoint-2", "checkpoint-4"]
    folder = train(recipe, resume=True).folder
    assert lines(folder) == lines(straight)
    left, right = (load_file(one / "adapter_model.safetensors") for one in (folder, straight))
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.slow
def test_rows_that_memory_made_smaller_stay_smaller_after_a_kill(make_recipe, monkeypatch):
    """Where a row ends moves the last bits of a gradient, and what dropout draws. The recipe says auto before and after.

    How often is evaluated may change on resume, and does: Trainer's state in a checkpoint has the old number.
    """
    from pe_dpo.inference.scorer import Scorer

    logprobs = Scorer.logprobs

    def out_of_memory(self, model, pairs):
        if model.training and torch.is_grad_enabled() and len(pairs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logprobs(self, model, pairs)

    settings = ("adapter.dropout=0.1", "train.max_steps=3", "train.save_every=1", "train.eval_every=2")
    with monkeypatch.context() as patched:
        patched.setattr(Scorer, "logprobs", out_of_memory)
        straight = train(make_recipe(*settings, output="straight")).folder
        with pytest.raises(Killed):
            train(make_recipe(*settings[:-1], "train.eval_every=100"), callbacks=[KillAt(1)])
    kept = json.loads((straight.parent / "run" / "checkpoint-1" / "run_state.json").read_text())
    assert kept["tokens"] < 1024 and kept["tokens_asked"] == "auto"
    folder = train(make_recipe(*settings), resume=True).folder  # here is memory enough
    assert lines(folder) == lines(straight)
    assert [line["step"] for line in lines(folder) if "eval_loss" in line] == [0, 2, 3]

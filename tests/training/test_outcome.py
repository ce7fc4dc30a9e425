"""How a run begins to go wrong and how it ends: said before the first step, logged to the last one, never finished with NaN."""

import math
import os
import shutil
import signal

import pytest
import torch
from one_base import train
from transformers import TrainerCallback

from pe_dpo.errors import ModelError, TrainingError
from pe_dpo.progress import showing
from pe_dpo.runs.checkpoints import checkpoints
from pe_dpo.runs.files import RUN_FILE, read_object
from pe_dpo.runs.run import Run
from pe_dpo.training.trainer import PairTrainer


class At(TrainerCallback):
    """Calls something at the end of an optimizer step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.do(model)


class Within(At):
    """Calls something while an optimizer step is made."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            self.do(model)

    def on_step_end(self, args, state, control, **kwargs):
        """Then it is over."""


# ---------------------------------------------------------------- before the first step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        (["loss.beta=2.0", "loss.gamma=0.2x"], "held-out pairs"),
        (["loss.beta=2.0", "loss.gamma=0.2x", "data.eval=0"], "watched training pairs"),
        (["loss.beta=2.0", "loss.gamma=scale:1"], "held-out pairs"),
    ],
)
def test_a_gamma_out_of_scale_is_said_before_the_first_step(make_recipe, settings, pairs, logged: list[str]):
    said = logged
    train(
        make_recipe(*settings, "train.max_steps=1"),
        callbacks=[At(1, lambda model: said.append("a step"))],
    )
    warnings = [line for line in said[: said.index("a step")] if "δ = (γ−β)·sd(Δ0)" in line]
    assert len(warnings) == 1
    assert f"over the {pairs}" in warnings[0]


@pytest.mark.slow
def test_a_gamma_in_scale_is_not_spoken_of(make_recipe, logged: list[str]):
    said = logged
    train(make_recipe("train.max_steps=1"))
    assert not any("sd(Δ0)" in line for line in said)


@pytest.mark.slow
def test_a_run_without_a_trainable_parameter_is_refused_before_training(make_recipe, monkeypatch, tmp_path):
    """Older PEFT froze the trained adapter when it loaded the frozen copy: nothing was trained, and nothing was said."""
    from peft import PeftModel

    load = PeftModel.load_adapter

    def freeze_all(self, *arguments, **options):
        loaded = load(self, *arguments, **options)
        self.requires_grad_(False)
        return loaded

    first = train(make_recipe("train.max_steps=1", output="first"))
    monkeypatch.setattr(PeftModel, "load_adapter", freeze_all)
    start = (f"adapter.start={first.folder}", "adapter.reference=adapter", "adapter.rank=16", "adapter.alpha=32")
    with pytest.raises(ModelError, match="no parameter of the adapter is trainable"):
        train(make_recipe(*start, "train.max_steps=1"))
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


# ---------------------------------------------------------------- the end


def spoil(value):
    """What turns one number of the trained adapter into another."""

    def do(model):
        parameter = next(p for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad)
        parameter.data[0, 0] = value

    return do


@pytest.mark.slow
@pytest.mark.parametrize(("value", "held_out"), [(math.nan, []), (math.inf, ["data.eval=0"])])
def test_a_run_whose_adapter_is_not_finite_at_its_end_has_failed(make_recipe, tmp_path, value, held_out):
    recipe = make_recipe("train.max_steps=2", *held_out)
    with pytest.raises(TrainingError, match="not finite"):
        train(recipe, callbacks=[At(2, spoil(value))])
    record = read_object(tmp_path / "run" / RUN_FILE)
    assert record["status"] == "failed"
    assert "not finite" in record["why"]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_run_whose_last_log_probs_are_not_finite_has_failed(make_recipe, tmp_path):
    """Every number of the adapter is finite, and their product is not."""

    def blow_up(model):
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.data.fill_(1e30)

    with pytest.raises(TrainingError, match=r"not finite.*test\.jsonl:1"):
        train(make_recipe("train.max_steps=2"), callbacks=[At(2, blow_up)])
    assert read_object(tmp_path / "run" / RUN_FILE)["status"] == "failed"


@pytest.mark.slow
def test_a_run_that_cannot_go_on_has_failed_and_is_no_longer_so_when_it_was_resumed(make_recipe, tmp_path):
    recipe = make_recipe("train.max_steps=3", "train.save_every=1")
    with pytest.raises(TrainingError, match="not finite"):
        train(recipe, callbacks=[At(2, spoil(math.nan))])
    record = read_object(tmp_path / "run" / RUN_FILE)
    assert record["status"] == "failed"
    assert record["why"].startswith("step 2: the adapter is not finite")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]  # nothing to go on with was lost
    train(recipe, resume=True)
    record = read_object(tmp_path / "run" / RUN_FILE)
    assert record["status"] == "finished"
    assert "why" not in record


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [2, 100])
def test_the_last_step_is_always_logged(make_recipe, log_every):
    folder = train(make_recipe("train.max_steps=3", f"train.log_every={log_every}")).folder
    logged = [line["step"] for line in Run(folder).metrics if "loss" in line]
    assert logged == ([2, 3] if log_every == 2 else [3])


@pytest.fixture
def _attended():
    """Whoever starts the tests in the background may have Ctrl-C and SIGHUP ignored, and Ray leaves a handler of SIGTERM."""
    attended = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in attended.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("_attended")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(make_recipe, number):
    recipe = make_recipe("train.max_steps=5", "train.save_every=100", "train.log_every=100")
    result = train(recipe, callbacks=[Within(2, lambda model: os.kill(os.getpid(), number))])
    assert (result.interrupted_by, result.steps) == (number, 2)
    assert (result.folder / "checkpoint-2").is_dir()
    assert read_object(result.folder / RUN_FILE)["status"] == "interrupted"
    assert not any("loss" in line for line in Run(result.folder).metrics)  # the checkpoint keeps the window of the next line
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.usefixtures("_attended")
@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_the_run_does_not_say_that_it_trains(make_recipe, tmp_path):
    def impatient(model):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stop:
        train(make_recipe("train.max_steps=5", "train.save_every=1"), callbacks=[Within(2, impatient)])
    again = f"pe-dpo train {tmp_path / 'run' / 'recipe.yaml'} --resume"
    assert stop.value.__notes__ == [f"the checkpoint of step 1 is kept; go on with: {again}"]
    record = read_object(tmp_path / "run" / RUN_FILE)
    assert (record["status"], record["step"]) == ("interrupted", 1)


@pytest.mark.usefixtures("_attended")
@pytest.mark.slow
def test_a_terminal_that_closes_may_say_so_twice(make_recipe):
    """The kernel and the shell both send SIGHUP: the second one is no order to leave without a checkpoint."""

    def close(model):
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)

    result = train(make_recipe("train.max_steps=5", "train.save_every=100"), callbacks=[Within(2, close)])
    assert (result.interrupted_by, result.steps) == (signal.SIGHUP, 2)
    assert (result.folder / "checkpoint-2").is_dir()


@pytest.mark.slow
def test_a_terminal_that_is_gone_does_not_keep_the_last_checkpoint_from_being_saved(make_recipe, monkeypatch):
    from pe_dpo.cli import console
    from pe_dpo.cli.live import progress_callback

    def gone(line="", **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("typer.echo", gone)
    terminal, work = console.Terminal(is_silent=False), set()
    with console._logging_to(terminal), showing(lambda what, done, total: work.add(what)):
        result = train(make_recipe("train.max_steps=2"), callbacks=[progress_callback(terminal.live)])
    assert (result.folder / "checkpoint-2").is_dir()
    assert "scoring, held-out pairs" in work  # else nothing would be shown while they are


@pytest.mark.slow
def test_a_run_that_fails_gives_the_signals_back(make_recipe):
    """Else Ctrl-C between two runs of a sweep would be swallowed by the run that failed."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)
    with pytest.raises(TrainingError):
        train(make_recipe("train.max_steps=2"), callbacks=[At(1, spoil(math.nan))])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)) == before


@pytest.mark.slow
def test_a_run_that_nohup_shields_from_the_terminal_s_end_goes_on(make_recipe):
    """Nohup starts a program with SIGHUP ignored; whoever asks for that does not want the run to stop."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = train(
            make_recipe("train.max_steps=2"), callbacks=[Within(1, lambda model: os.kill(os.getpid(), signal.SIGHUP))]
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.interrupted_by, result.steps) == (None, 2)


@pytest.mark.parametrize("when", ["in a step", "at the end"])
@pytest.mark.slow
def test_a_folder_that_is_removed_while_the_run_writes_is_a_line_and_not_made_anew(make_recipe, tmp_path, monkeypatch, when):
    folder = tmp_path / "run"
    recipe = make_recipe("train.max_steps=2", "train.save_every=1", "train.log_every=5")
    if when == "at the end":
        measure = PairTrainer.save_measurements
        monkeypatch.setattr(PairTrainer, "save_measurements", lambda *a: shutil.rmtree(folder) or measure(*a))
    callbacks = [Within(2, lambda model: shutil.rmtree(folder))] if when == "in a step" else []
    with pytest.raises(TrainingError, match=r"was removed or moved while the run was writing there, and run\.json with it"):
        train(recipe, callbacks=callbacks)
    assert not (folder / RUN_FILE).exists()
    assert not checkpoints(folder)


# ---------------------------------------------------------------- what lies there already


@pytest.mark.slow
def test_overwriting_removes_the_old_run_only_once_the_new_one_s_base_and_adapter_are_loaded(make_recipe, tiny_base, tmp_path):
    old = train(make_recipe("train.max_steps=1"))
    torn = tmp_path / "torn"
    shutil.copytree(tiny_base, torn)
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for fault in (f"model.base={torn}", "adapter.targets=[no_such_layer]"):
        with pytest.raises(ModelError):
            train(make_recipe("train.max_steps=1", fault), overwrite=True)
        assert read_object(old.folder / RUN_FILE)["status"] == "finished"
        assert (old.folder / "adapter_model.safetensors").is_file()
    assert torch.isfinite(torch.tensor(train(make_recipe("train.max_steps=1"), overwrite=True).after["loss"]))

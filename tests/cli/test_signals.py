"""A signal at any stage of any command: a message, a true status, 128 + its number, and nothing half-done left behind."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from pe_dpo.interruption import Interrupted, finishing, listening
from pe_dpo.progress import progress
from pe_dpo.runs.files import RUN_FILE, read_object


@pytest.fixture(autouse=True)
def _attended():
    """Whoever starts the tests in the background may have Ctrl-C and SIGHUP ignored, which programs inherit."""
    attended = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in attended.items()}
    yield
    after = {number: signal.getsignal(number) for number in attended}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == attended  # given back


@pytest.fixture
def signal_at(monkeypatch):
    """Lets a signal come when a function is called, given by its module and its name there."""

    def at(place, name, number):
        owner = import_module(place.partition(":")[0])
        owner = getattr(owner, place.partition(":")[2]) if ":" in place else owner
        original = getattr(owner, name)

        def called(*arguments, **options):
            os.kill(os.getpid(), number)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, called)

    return at


def test_the_first_signal_is_an_exception_that_says_what_it_met_and_the_second_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as met, listening(), listening(), progress("scoring, reference"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) is before
            os.kill(os.getpid(), signal.SIGHUP)  # comes twice without meaning more
    assert (str(met.value), met.value.number) == ("stopped by SIGTERM while scoring, reference", signal.SIGTERM)


def test_where_a_step_is_finished_first_nothing_is_raised():
    with listening() as outer:
        with finishing() as signals:
            for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1):  # what follows means nothing more
                os.kill(os.getpid(), number)
            assert (signals, signals.received) == (outer, signal.SIGUSR1)
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGTERM)  # that is impatience
        outer.listen()  # it was dealt with
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGUSR1)


STAGES = [
    ("pe_dpo.training.train", "prepare_run", signal.SIGHUP, None, "start the same command again"),
    ("pe_dpo.inference.policy", "load_base", signal.SIGTERM, None, "nothing of this run was written yet; start it again"),
    ("pe_dpo.training.train", "check_start", signal.SIGUSR1, "interrupted", "no step was saved yet; go on with: pe-dpo train "),
    ("pe_dpo.training.trainer:PairTrainer", "save_measurements", signal.SIGINT, "interrupted", "step 2 is kept; go on with: "),
]


@pytest.mark.parametrize(("place", "name", "number", "status", "words"), STAGES)
@pytest.mark.slow
def test_a_signal_outside_of_a_run_s_steps(
    pe_dpo, recipe_file, tmp_path, signal_at, monkeypatch, place, name, number, status, words
):
    folder, command = tmp_path / "run", ["train", recipe_file, "-o", tmp_path / "run"]
    with monkeypatch.context():
        signal_at(place, name, number)
        ended = pe_dpo(*command)
    assert ended.code == 128 + number
    assert ended.err.startswith(f"stopped by {signal.Signals(number).name}")
    assert words in " ".join(ended.err.split())
    assert (read_object(folder / RUN_FILE) or {"status": None})["status"] == status
    assert folder.exists() == (status is not None)  # neither lock nor folder
    if status:
        monkeypatch.undo()
        assert pe_dpo(*command, "--resume").code == 0
        assert read_object(folder / RUN_FILE)["status"] == "finished"


@pytest.mark.parametrize(
    ("command", "place", "name"),
    [
        (["eval", "RUN"], "pe_dpo.evaluation.evaluate:_Measuring", "measure_adapter"),
        (["merge", "RUN", "-o", "OUT"], "pe_dpo.merging.merge", "write"),
        (["audit", "RECIPE"], "pe_dpo.inference.inputs", "prepare_pairs"),
        (["chat", "RUN", "--prompts", "PROMPTS", "-o", "OUT"], "pe_dpo.chat.prompts", "answer_prompts"),
        (["sweep", "RECIPE", "--grid", "beta=0.1,0.2", "-o", "OUT"], "pe_dpo.experiments.point", "load_base"),
    ],
)
def test_a_signal_in_another_command_leaves_nothing_half_done(
    pe_dpo, recipe_file, trained, tmp_path, signal_at, command, place, name
):
    (tmp_path / "prompts.txt").write_text("Hello?\n")
    words = {"RUN": trained[0], "RECIPE": recipe_file, "OUT": tmp_path / "out", "PROMPTS": tmp_path / "prompts.txt"}
    before = {path.name for path in trained[0].iterdir()}
    signal_at(place, name, signal.SIGTERM)
    ended = pe_dpo(*(words.get(word, word) for word in command))
    assert ended.code == 143, ended.err
    assert ended.err.startswith("stopped by SIGTERM")
    assert "start the same command again" in ended.err
    assert {path.name for path in trained[0].iterdir()} == before
    if command[0] != "sweep":
        assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt"}


@pytest.mark.slow
def test_a_signal_while_libraries_are_imported_is_two_lines(recipe_file, tmp_path):
    command = [sys.executable, "-m", "pe_dpo", "train", recipe_file, "-o", tmp_path / "run"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1].splitlines()
    assert (process.returncode, said[0], len(said)) == (143, "stopped by SIGTERM", 2)

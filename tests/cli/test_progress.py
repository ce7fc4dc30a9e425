"""How far long work is, told without a terminal."""

import io
import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
from rich.console import Console

from pe_dpo.cli import console, live

LONG = "both answers became less likely than before"


def test_without_a_terminal_a_line_every_half_minute_says_how_far_how_quick_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    count = live.LiveLines().count
    for seconds, done, total in (
        (0, 0, 9000), (29, 2900, 9000), (30, 3000, 9000), (45, 4500, 9000), (61, 6100, 9000), (90, 9000, 9000),
    ):  # fmt: skip
        now[0] = 100.0 + seconds
        count("encoding", done, total)
    for seconds, done, total in ((200, 10, 0), (231, 320, 0), (240, 400, 400), (241, 0, 400)):  # how many, nobody knows yet
        now[0] = float(seconds)
        count("encoding", done, total)
    assert capsys.readouterr().out.splitlines() == [
        "encoding: 3,000 of 9,000, 100 a second, 60 s left",
        "encoding: 6,100 of 9,000, 100 a second, 29 s left",
        "encoding: 320, 10 a second",
    ]
    silent = live.LiveLines(is_silent=True).count
    for seconds, done in ((300, 0), (1300, 3)):
        now[0] = float(seconds)
        silent("scoring", done, 400)
    assert capsys.readouterr() == ("", "scoring: 3 of 400, 0.003 a second, 36.8 h left\n")


def shown_of_a_run(monkeypatch, steps, *, is_terminal, log_every=1, seconds=10.0):
    """What `TrainingLine` says of a run whose steps take so long each; returned is what is drawn half a step on."""
    now, drawn = [0.0], []
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    lines = live.LiveLines()
    lines.is_terminal = is_terminal
    monkeypatch.setattr(lines, "show", lambda what, words: drawn.append(words))
    line, state = live.TrainingLine(lines), SimpleNamespace(global_step=0, max_steps=steps)
    line.begin(state)
    screens = [drawn[0]()] if drawn else []
    for step in range(1, steps + 1):
        now[0], state.global_step = seconds * step, step
        line.step(state, is_logged=step % log_every == 0)
        if step % log_every == 0:
            line.log(state, 1 / step, 0.5)
        if drawn:
            now[0] += seconds / 2
            screens.append(drawn[0]())
    now[0] = seconds * steps
    line.end(state)
    return screens


def test_the_line_of_a_run_in_a_terminal_has_step_loss_reward_accuracy_and_both_times_within_80_columns(monkeypatch, capsys):
    """Ten seconds a step: 5 s after step 1 of 20,000, 199,985 s are left, 55.6 h."""
    screens = shown_of_a_run(monkeypatch, 20_000, is_terminal=True)
    assert screens[:2] == [
        "step 0/20000  0 s",
        "step 1/20000  loss 1.0000  reward accuracy 0.50  15 s, 55.6 h left",
    ]
    assert screens[-2] == "step 19999/20000  loss 0.0001  reward accuracy 0.50  55.6 h, 5 s left"
    assert max(map(len, screens)) <= 80
    assert capsys.readouterr().out == "step 20000/20000  loss 0.0001  reward accuracy 0.50  55.6 h\n"


def test_the_line_of_a_run_without_a_terminal_comes_every_half_minute_also_between_lines_of_metrics(monkeypatch, capsys):
    """100 steps of 10 s, one line of metrics for 7 of them; each tenth that is logged has a line too: step 70."""
    shown_of_a_run(monkeypatch, 100, is_terminal=False, log_every=7)
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "step 4/100  10 s a step, 16 min left",
        "step 7/100  loss 0.1429  reward accuracy 0.50  10 s a step, 16 min left",
        "step 10/100  loss 0.1429  reward accuracy 0.50  10 s a step, 15 min left",
    ]
    steps = [int(line.partition("/")[0].removeprefix("step ")) for line in said]
    assert max(after - before for before, after in pairwise(steps)) <= 4
    assert said[-1] == "step 100/100  loss 0.0102  reward accuracy 0.50  17 min"


def test_slow_steps_and_a_large_loss_have_numbers_that_can_be_read(monkeypatch, capsys):
    """Steps of two minutes were 1.2e+02 s; a squared loss of 2,000,000 has no use for four decimals."""
    line, state = live.TrainingLine(live.LiveLines()), SimpleNamespace(global_step=0, max_steps=10)
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    line.begin(state)
    now[0], state.global_step = 120.0, 1
    line.step(state, is_logged=True)
    line.log(state, 2e6, 0.5)
    assert capsys.readouterr().out == "step 1/10  loss 2e+06  reward accuracy 0.50  2 min a step, 18 min left\n"


@pytest.mark.parametrize("what", ["encoding", "sampling, policy scaled to 0.75"])
def test_a_bar_gives_way_to_what_is_said_beside_it_within_80_columns(monkeypatch, what):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "80")
    lines = live.LiveLines()
    lines.is_terminal = True
    lines.count(what, 0, 20_000)
    now[0] = 10.0
    lines.count(what, 10_240, 20_000)
    (column,), (task,) = lines._screen.columns, lines._screen.tasks
    paper = Console(width=80, file=io.StringIO())
    paper.print(column.render(task))
    lines.stop()
    (said,) = paper.file.getvalue().splitlines()
    assert said.startswith(what) and said.rstrip().endswith(" 10,240 of 20,000, 1,024 a second, 10 s left")
    assert said.count("━") + said.count("╸") + said.count("╺") == (8 if what == "encoding" else 2)  # half of it


@pytest.mark.parametrize("say", [
    lambda: console.Terminal(is_silent=False).emit(logging.LogRecord("pe_dpo", logging.WARNING, "", 0, LONG, (), None)),
    lambda: console.warn(LONG),
    lambda: console.show_lines([f"warning: {LONG}"]),
])  # fmt: skip
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_long_line_is_folded_between_words_in_a_terminal_and_whole_in_a_file(monkeypatch, capsys, is_terminal, say):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(is_terminal)))
    say()
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    folded = ["warning: both answers became", "less likely than before"]
    assert said == (folded if is_terminal else [" ".join(folded)])

"""How far long work is, told without a terminal."""

import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest

from pe_dpo.cli import console, live


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
    """Ten seconds a step: 5 s after step 1 of 20,000, 199,985 s are left, 55:33:05."""
    screens = shown_of_a_run(monkeypatch, 20_000, is_terminal=True)
    assert screens[:2] == [
        "step 0/20000  0:00:00, -:--:-- left",
        "step 1/20000  loss 1.0000  reward accuracy 0.50  0:00:15, 55:33:05 left",
    ]
    assert screens[-2] == "step 19999/20000  loss 0.0001  reward accuracy 0.50  55:33:15, 0:00:05 left"
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


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_long_line_is_folded_between_words_in_a_terminal_and_whole_in_a_file(monkeypatch, capsys, is_terminal):
    monkeypatch.setenv("COLUMNS", "30")
    handler = console.Terminal(is_silent=False)
    handler.live.is_terminal = is_terminal
    handler.emit(logging.LogRecord("pe_dpo", logging.WARNING, "", 0, "both answers became less likely than before", (), None))
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    folded = ["warning: both answers became", "less likely than before"]
    assert said == (folded if is_terminal else [" ".join(folded)])

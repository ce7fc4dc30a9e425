"""How far long work is, told without a terminal."""

import pytest

from pe_dpo.cli import console


def test_without_a_terminal_a_line_every_half_minute_says_how_far_how_quick_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    count = console.counter()
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
    silent = console.counter(is_silent=True)
    for seconds, done in ((300, 0), (1300, 3)):
        now[0] = float(seconds)
        silent("scoring", done, 400)
    assert capsys.readouterr() == ("", "scoring: 3 of 400, 0.003 a second, 36.8 h left\n")

"""How engines are found, asked and ended; the engine here is a few lines of Python."""

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.engines.compare import greedy_faults, largest_difference, unequal
from benchmarks.engines.texts import varied_texts
from benchmarks.engines.worker import EngineError, ask, why_missing


def program(folder: Path, *lines: str) -> None:
    """An engine `toy` that is a program of these lines of Python, with the request as `request`."""
    start = ["#!" + sys.executable, "import json, os, subprocess, sys, time", "request = json.load(open(sys.argv[2]))"]
    (folder / "toy").mkdir()
    (folder / "toy" / "toy").write_text("\n".join([*start, *lines]))
    (folder / "toy" / "toy").chmod(0o755)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PE_DPO_ENGINES", str(tmp_path))
    return tmp_path


def test_an_engine_answers_in_its_own_environment(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    program(engines, "answer = [sys.argv[1], request['ids'], os.environ.get('PYTHONPATH'), os.environ['PATH'].split(':')[0]]",
            "json.dump({'engine': 'toy', 'said': answer}, open(sys.argv[3], 'w'))")  # fmt: skip
    assert why_missing("toy") == ""
    said = ask("toy", Path("model"), {"ids": [[1, 2]]})["said"]
    assert said == ["model", [[1, 2]], None, str(engines / "toy")]


def test_an_engine_that_is_not_there_names_its_target(engines: Path) -> None:
    assert why_missing("toy") == "toy is not installed: make engine-toy"
    with pytest.raises(EngineError, match="make engine-toy"):
        ask("toy", Path("model"), {})


def test_what_a_failing_worker_said_last_is_shown(engines: Path) -> None:
    program(engines, "print('reading'); raise SystemExit('no such tensor')")
    with pytest.raises(EngineError, match=r"ended with 1 on model; it said last:\nreading\nno such tensor"):
        ask("toy", Path("model"), {})


def test_a_worker_that_leaves_no_answer_is_an_error(engines: Path) -> None:
    program(engines, "pass")
    with pytest.raises(EngineError, match="left no answer"):
        ask("toy", Path("model"), {})


def test_a_worker_that_hangs_is_ended_with_its_server(engines: Path) -> None:
    program(engines, "server = subprocess.Popen(['sleep', '60'])",
            f"open({str(engines / 'pid')!r}, 'w').write(str(server.pid)); time.sleep(60)")  # fmt: skip
    with pytest.raises(EngineError, match=r"was not done after 0\.3 s"):
        ask("toy", Path("model"), {}, seconds=0.3)
    server = int((engines / "pid").read_text())
    for _ in range(100):
        if not is_running(server):
            return
        time.sleep(0.01)
    raise AssertionError(f"{server} still runs")


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_differences_are_the_largest_and_a_missing_place_is_infinite() -> None:
    expected = {"logprobs": [[-1.0, -2.0], [-3.0]]}
    assert largest_difference({"logprobs": [[-1.0, -2.25], [-3.125]]}, expected) == 0.25
    assert largest_difference({"logprobs": [[-1.0], [-3.0]]}, expected) == float("inf")
    assert largest_difference({"logprobs": [[-1.0, float("nan")], [-3.0]]}, expected) == float("inf")


def test_a_prompt_may_be_left_at_a_near_tie_only() -> None:
    expected = {"greedy": [[1, 2, 3]] * 4, "leads": [[1.0, 0.01, 1.0]] * 4}
    answer = {"greedy": [[1, 2, 3], [1, 9, 9], [1, 2, 9], [1]]}
    assert unequal(answer, expected, "greedy") == [1, 2, 3]
    assert greedy_faults(answer, expected) == [2]


def test_the_texts_are_400_and_always_the_same() -> None:
    texts = varied_texts()
    assert len(set(texts)) == len(texts) == 400
    assert texts == varied_texts()
    assert not any("<|im_" in text for text in texts)

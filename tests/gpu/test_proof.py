"""The proof for a card, on a CPU: its checks on tiny sizes, and what becomes of a check that ends badly or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def _root_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_what_a_cpu_computes_passes_the_checks_of_a_card(tmp_path):
    from benchmarks.gpu import arithmetic
    from benchmarks.gpu.device import Device

    device = Device(is_rehearsal=True, scratch=tmp_path, out=tmp_path)
    for check in (arithmetic.attention, arithmetic.head):
        found = check(device)
        assert found.is_right, found.facts


@pytest.mark.parametrize("fault", ["values of another head", "logits rounded to bfloat16"])
def test_arithmetic_that_is_off_is_found(tmp_path, monkeypatch, fault):
    from benchmarks.gpu import arithmetic
    from benchmarks.gpu.device import Device

    attend = arithmetic.packed_attention
    if "head" in fault:

        def mixed(module, q, k, v, *args, packing, **more):
            return attend(module, q, k, v.flip(1) if packing.kind == "segments" else v, *args, packing=packing, **more)

        monkeypatch.setattr(arithmetic, "packed_attention", mixed)
        check = arithmetic.attention
    else:

        def rounded(hidden, targets, linear):
            return linear(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]

        monkeypatch.setattr(arithmetic, "head_logprobs", rounded)
        check = arithmetic.head
    assert check(Device(is_rehearsal=True, scratch=tmp_path, out=tmp_path)).is_right is False


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ('print("PROOF {\\"is_right\\": true, \\"facts\\": {\\"a\\": 1}}")', "right"),
        ('print("PROOF {\\"is_right\\": null, \\"facts\\": {}}")', "measured"),
        ('print("PROOF {\\"is_right\\": false, \\"facts\\": {}}")', "failed"),
        ("raise RuntimeError", "failed"),
        ("import os; os.abort()", "failed"),
        ("import time; time.sleep(60)", "failed"),
        ("pass", "failed"),
    ],
)
def test_the_end_of_a_check_is_its_verdict(program, verdict):
    from benchmarks.gpu.checks import CHECKS
    from benchmarks.gpu.proof import _finish

    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.stdin.readline()\n{program}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert _finish(process, CHECKS[0], 0.1 if "sleep" in program else 60.0)["verdict"] == verdict

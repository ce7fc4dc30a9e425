"""What was measured of real runs, committed under benchmarks/results, against what is counted of them."""

import json
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "estimate.json"
CASES = json.loads(FILE.read_text(encoding="utf-8"))["cases"]
BEYOND = {"llama 69 M, bfloat16": 0.20}
"""Counted less well. The rows of such a model are right to 3 % in torch's allocator (test_memory.py): what is missing lies
outside of it, perhaps oneDNN's own copies of weights, with which a CPU multiplies bfloat16. Not traced."""


def test_peaks_of_real_runs_on_the_cpu_are_as_counted_to_10_per_cent() -> None:
    off = {name: abs(case["counted_mib"] / case["measured_mib"] - 1) for name, case in CASES.items()}
    assert {name: share for name, share in off.items() if share > BEYOND.get(name, 0.10)} == {}
    assert len(CASES.keys() - BEYOND) >= 10

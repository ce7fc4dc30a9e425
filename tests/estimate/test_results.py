"""What was measured of real runs, committed under benchmarks/results, against what is counted of them."""

import json
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "estimate.json"
CASES = json.loads(FILE.read_text(encoding="utf-8"))["cases"]
BEYOND = {"llama 69 M, bfloat16": 0.20, "gemma2 28 M": 0.11}
"""Those that are counted less well. oneDNN, with which a CPU multiplies bfloat16, keeps weights in an order of its own, outside
of torch's memory; capped scores of attention have gradients that come and go, which are not counted."""


def test_peaks_of_real_runs_on_the_cpu_are_as_counted_to_10_per_cent() -> None:
    off = {name: abs(case["counted_mib"] / case["measured_mib"] - 1) for name, case in CASES.items()}
    assert {name: share for name, share in off.items() if share > BEYOND.get(name, 0.10)} == {}
    assert len(CASES.keys() - BEYOND) >= 8

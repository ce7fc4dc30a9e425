"""The README's numbers are those of the results that were committed."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.peer


def test_the_readme_has_the_table_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.table import table

    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_what_ways_of_merging_keep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.table import merge_table

    assert merge_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_result_was_checked_for_agreement_before_it_was_timed():
    """Losses and gradients of every timed variant, against TRL's default, within the limits that the README states."""
    import json

    limits = {"fp32": 1e-4, "bf16": 2e-2, "nf4": 2e-2}
    results = sorted((ROOT / "benchmarks" / "results").glob("step-*.json"))
    assert len(results) >= 4
    for path in results:
        found = json.loads(path.read_text(encoding="utf-8"))
        limit = limits[found["settings"]["dtype"]]
        assert found["round_seconds"].keys() <= found["agreement"].keys()
        for differences in found["agreement"].values():
            for difference in differences.values():
                assert difference["loss"] <= limit
                assert difference["gradient"] <= limit


@pytest.fixture(autouse=True)
def _forget_benchmarks():
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]

"""Each promise of docs/reliability.md has tests that are there, and the figures that were measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_a_promise_names_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named, file = [], ""
    for place, test in re.findall(r"`([\w/]*(?:\.py)?)::(\w+)`", page):
        file = place or file  # `::test_…` is of the file named last
        named.append((file, test))
    assert len(named) > 30
    sources = {file: (ROOT / "tests" / file).read_text(encoding="utf-8") for file, _ in named}
    assert [(file, test) for file, test in named if f"\ndef {test}(" not in sources[file]] == []


def test_what_the_page_says_of_kills_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "crash.json").read_text(encoding="utf-8"))
    jobs = found["jobs"].values()
    commands, faults = sum(job["chains"] for job in jobs), sum(len(job["faults"]) for job in jobs)
    assert f"**{found['kills']} kills of {commands} commands, {faults} differences**" in page

"""`make test-lowest` installs the floors that pyproject.toml names."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def test_the_lowest_that_is_tested_is_the_lowest_that_is_let_in():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name in ("test", "gguf", "ray", "trackers") for line in project["optional-dependencies"][name]]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras]]
    floors = {one.name: part.version for one in wanted for part in one.specifier if part.operator == ">="}
    lines = [Requirement(line) for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if line[0] != "#"]
    pinned = {one.name: next(iter(one.specifier)).version for one in lines}
    assert floors.pop("torch") == "2.11"  # tried is one torch alone, in README.md by name
    assert {name: pinned.get(name) for name in floors} == floors

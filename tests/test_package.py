"""What the package says of itself: one version everywhere, a README that a package index can show, sources that are whole."""

import re
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import yaml

import pe_dpo

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_one() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == pe_dpo.__version__ == cited["version"]
    assert PROJECT["license"] == cited["license"]
    assert [one["name"] for one in PROJECT["authors"]] == [one["name"] for one in cited["authors"]] == ["pe-dpo developers"]


def test_forks_run_what_is_run_here_on_every_python_that_is_named() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["run"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == named
    assert named[0] == PROJECT["requires-python"].removeprefix(">=")
    assert job["steps"][-1]["run"] == "bash .ci/run"
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make lint"]
    assert all(f"make {target}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8") for target in ("lint", "docs", "test"))


def test_the_readme_of_the_package_index_has_no_link_that_leads_nowhere_there() -> None:
    spec = spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    setup = module_from_spec(spec)
    spec.loader.exec_module(setup)
    links = re.findall(r"\]\(([^)]*)\)", setup.readme())
    assert [link for link in links if not link.startswith(("http", "#"))] == []
    assert setup.readme().startswith("# pe-dpo")


def test_a_source_distribution_has_what_its_tests_need() -> None:
    """Every folder and file that tests read beside the package; `make dist` builds it."""
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    grafted = {line.split()[1] for line in lines if line.startswith("graft ")}
    assert {"tests", "benchmarks", "docs", "examples", "tools"} <= grafted
    assert all((ROOT / folder).is_dir() for folder in grafted)
    named = [word for line in lines if line.startswith("include ") for word in line.split()[1:]]
    assert all([*ROOT.glob(word)] for word in named)

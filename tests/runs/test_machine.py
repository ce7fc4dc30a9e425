"""What a run is made with: the commit of a package that runs from a checkout, and never a failure for want of one."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pe_dpo.runs.machine import cpu_name, made_with, package_commit
from pe_dpo.runs.run import RunInfo

NEEDS_GIT = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package in a checkout of its own, and another that is no part of it."""
    for name in ("package", "environment"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "package" / "text.txt").write_bytes(b"a\nb\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()


def commit_of(package: Path) -> str | None:
    package_commit.cache_clear()
    return package_commit(package)


@NEEDS_GIT
def test_the_commit_of_a_checkout_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))  # as in a hook of another checkout
    assert commit_of(checkout / "package") == commit
    assert commit_of(checkout / "environment") is None  # lies there, and is none of its files
    monkeypatch.setenv("PATH", str(checkout))
    assert commit_of(checkout / "package") is None


@NEEDS_GIT
@pytest.mark.parametrize(("name", "content", "is_dirty"), [
    ("package/__init__.py", "1", True),
    ("package/__init__.py", None, True),
    ("package/new.py", "", True),  # which what is there may import
    ("package/eval_pairs.parquet", "results", False),
    ("runs/run.json", "results", False),
    ("environment/__init__.py", "1", False),
    ("package/text.txt", "a\r\nb\r\n", False),  # as Windows checks it out
    ("package/text.txt", "a\nc\n", True),
])  # fmt: skip
def test_a_package_is_dirty_where_what_it_runs_is_not_the_commit(checkout: Path, name: str, content, is_dirty: bool) -> None:
    path = checkout / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content.encode())
    assert commit_of(checkout / "package") == git(checkout, "rev-parse", "HEAD") + "-dirty" * is_dirty


@NEEDS_GIT
def test_nothing_that_a_checkout_configures_is_run(checkout: Path) -> None:
    """A filter makes git read a changed file through a program."""
    (checkout / ".gitattributes").write_text("*.py filter=mine\n")
    git(checkout, "config", "filter.mine.clean", f"touch {checkout / 'was-run'}; cat")
    git(checkout, "config", "core.fsmonitor", f"touch {checkout / 'was-run'}")
    (checkout / "package" / "__init__.py").write_text("1")
    assert str(commit_of(checkout / "package")).endswith("-dirty")
    assert not (checkout / "was-run").exists()


def test_a_package_outside_of_every_checkout_has_no_commit(tmp_path: Path) -> None:
    assert package_commit(tmp_path / "package") is None


def test_what_a_run_is_made_with_is_said_in_words() -> None:
    assert {"cpu", "threads"} <= set(made_with(3)) and made_with(3)["threads"] == 3
    assert cpu_name()
    said = {"commit": "a" * 40 + "-dirty", "cpu": "Some CPU @ 2 GHz", "threads": 2}
    assert (
        RunInfo(made_with=said).describe_machine() == "Some CPU @ 2 GHz, 2 threads, commit aaaaaaaaaaaa of pe-dpo with changes"
    )
    assert RunInfo(made_with={"threads": 1}).describe_machine() == "1 thread"
    assert RunInfo().describe_machine() == ""

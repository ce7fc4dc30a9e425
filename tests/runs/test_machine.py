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
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()


@NEEDS_GIT
def test_the_commit_of_a_checkout_is_named_and_changes_are_said(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))  # as in a hook of another checkout
    package_commit.cache_clear()
    assert package_commit(checkout / "package") == commit
    assert package_commit(checkout / "environment") is None  # lies there, and is none of its files
    (checkout / "package" / "__init__.py").write_text("1")
    package_commit.cache_clear()
    assert package_commit(checkout / "package") == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(checkout))
    package_commit.cache_clear()
    assert package_commit(checkout / "package") is None


def test_a_package_outside_of_every_checkout_has_no_commit(tmp_path: Path) -> None:
    assert package_commit(tmp_path / "package") is None


def test_what_a_run_is_made_with_is_said_in_words() -> None:
    import torch

    assert {"cpu", "threads"} <= set(made_with()) and made_with()["threads"] == torch.get_num_threads()
    assert cpu_name()
    said = {"commit": "a" * 40 + "-dirty", "cpu": "Some CPU @ 2 GHz", "threads": 2}
    assert (
        RunInfo(made_with=said).describe_machine() == "Some CPU @ 2 GHz, 2 threads, commit aaaaaaaaaaaa of pe-dpo with changes"
    )
    assert RunInfo(made_with={"threads": 1}).describe_machine() == "1 thread"
    assert RunInfo().describe_machine() == ""

"""What a run is made with, written down once and compared with nothing: the package's commit, the CPU, the threads."""

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pe_dpo

_SECONDS = 10
"""For which git is waited."""


def made_with() -> dict[str, Any]:
    """Return `commit`, where the package runs from a checkout, `cpu` and `threads`, as run.json has them."""
    import torch

    found = {"commit": package_commit(Path(pe_dpo.__file__).parent), "cpu": cpu_name(), "threads": torch.get_num_threads()}
    return {key: value for key, value in found.items() if value is not None}


@cache
def package_commit(package: Path) -> str | None:
    """Return the commit that a package's files are, with "-dirty" where they were changed since.

    None without git, for an installed package, whose version says it, and for one that only lies in somebody's checkout (an
    environment below a project) and is no part of it. Nothing that the checkout configures is run.

    Args:
        package: The folder of the package.
    """
    if not any((folder / ".git").exists() for folder in package.parents):
        return None
    git = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C", str(package)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}

    def answer(*words: str) -> str:
        done = subprocess.run([*git, *words], capture_output=True, text=True, timeout=_SECONDS, env=environment, check=True)
        return done.stdout

    try:
        commit = answer("rev-parse", "HEAD", "HEAD:./__init__.py").split()[0]
        changed = answer("status", "-s", "-uno", ".")
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError, IndexError):
        return None
    return f"{commit}-dirty" if changed.strip() else commit


@cache
def cpu_name() -> str:
    """Return what the CPU calls itself, or the kind of machine where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()

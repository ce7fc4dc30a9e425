"""What a run is made with, written down once and compared with nothing: the package's commit, the CPU, the threads."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pe_dpo

_SECONDS = 10
"""For which git is waited."""


def made_with(threads: int) -> dict[str, Any]:
    """Return `commit`, where the package runs from a checkout, `cpu` and `threads`, as run.json has them.

    Args:
        threads: With how many the run computes.
    """
    found = {"commit": package_commit(Path(pe_dpo.__file__).parent), "cpu": cpu_name(), "threads": threads}
    return {key: value for key, value in found.items() if value is not None}


@cache
def package_commit(package: Path) -> str | None:
    """Return the commit that a package's files are, with "-dirty" where what is run is not what that commit has.

    That is: a file of the package has other bytes than there (ends of lines aside), is gone, or is a module that the commit
    does not have. Nothing outside the package counts, such as results, nor whether a change was added.

    None without git, for an installed package, whose version says it, and for one that only lies in somebody's checkout (an
    environment below a project) and is no part of it. Files are read here and not by git, which would run the filters, hooks
    and monitors that the checkout configures.

    Args:
        package: The folder of the package.
    """
    if not any((folder / ".git").exists() for folder in package.parents):
        return None
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}

    def answer(*words: str) -> str:
        git = ["git", "-C", str(package), *words]
        return subprocess.run(git, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=True).stdout

    try:
        commit = answer("rev-parse", "HEAD").strip()
        listed = [line.partition("\t") for line in answer("ls-tree", "-r", "-z", commit).split("\0") if line]
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    known = {name: about.split()[2] for about, _, name in listed}
    if "__init__.py" not in known:
        return None
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    is_clean = modules <= known.keys() and all(_is_blob(package / name, blob) for name, blob in known.items())
    return commit if is_clean else f"{commit}-dirty"


def _is_blob(path: Path, blob: str) -> bool:
    """Return whether a file has the bytes of a blob of git, as they are or with the ends of lines that Windows has."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    hashed = hashlib.sha1 if len(blob) == 40 else hashlib.sha256
    texts = content, content.replace(b"\r\n", b"\n")
    return any(hashed(b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest() == blob for text in texts)


@cache
def cpu_name() -> str:
    """Return what the CPU calls itself, or the kind of machine where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()

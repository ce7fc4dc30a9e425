"""Commands as processes: the CPU seconds of a process and its children, its peak memory, and its output.

"before" is the package as it was at a commit, laid out in the scratch folder; a process runs one package or the other by its
PYTHONPATH alone.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.pairs import scratch

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "dcd198b"
"""The commit that "before" is: the last one ahead of the work that these tables are about."""


class Spent(NamedTuple):
    """What one process took."""

    cpu_seconds: float
    """User and system, of the process and the children that it waited for."""
    wall_seconds: float
    peak_mib: float
    """High-water mark of the resident set, of the largest of these processes."""


class CommandFailed(RuntimeError):
    """A command that is timed did not end well, so that its time means nothing."""


def package_root(commit: str = "") -> Path:
    """Return the folder of this checkout, or one with the files of a commit, laid out on first use."""
    if not commit:
        return ROOT
    folder = scratch() / f"before-{commit}"
    if not folder.is_dir():
        partial = Path(tempfile.mkdtemp(dir=scratch()))
        archive = subprocess.run(["git", "archive", commit, "src", "benchmarks"], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", partial], input=archive.stdout, check=True)
        partial.replace(folder)
    return folder


def environment(root: Path = ROOT, *, threads: int = 1, **more: str) -> dict[str, str]:
    """Return the variables of a process that runs the package of a folder, as from a shell but for the threads.

    Args:
        root: from `package_root`.
        threads: of torch and the libraries below it; 0 leaves them to the process.
        **more: further variables.
    """
    removed = {"TOKENIZERS_PARALLELISM", "TQDM_DISABLE", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    kept = {key: value for key, value in os.environ.items() if key not in removed and not key.endswith("_NUM_THREADS")}
    counts = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    paths = os.pathsep.join([str(root / "src"), str(root)])
    return kept | (counts if threads else {}) | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"} | more


def pe_dpo(*arguments: str) -> list[str]:
    """Return the command line of `pe-dpo` in this interpreter."""
    return [sys.executable, "-m", "pe_dpo", *arguments]


def run_process(command: Sequence[str], variables: Mapping[str, str], folder: Path) -> Spent:
    """Run a command in a folder until it ends and return what it took.

    Raises:
        CommandFailed: it ended with another code than 0; with the end of what it said.
    """
    with tempfile.TemporaryDirectory(dir=scratch()) as place:
        found, said = Path(place) / "spent.json", Path(place) / "said.txt"
        launcher = [sys.executable, "-I", "-S", str(ROOT / "benchmarks" / "launch.py"), str(found), *command]
        with said.open("wb") as output:
            done = subprocess.run(
                launcher, cwd=folder, env=dict(variables), stdout=output, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode != 0:
            text = said.read_text(encoding="utf-8", errors="replace")
            raise CommandFailed(f"{' '.join(command)}: ended with {done.returncode}:\n{text[-3000:]}")
        spent = json.loads(found.read_text(encoding="utf-8"))
    return Spent(spent["cpu_seconds"], spent["wall_seconds"], spent["peak_mib"])


def emptied(folder: Path) -> Path:
    """Return a folder, made anew and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

"""What is written down: every number of every round, and what is needed to read it. No paths, no host name."""

import atexit
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import Dtype, ModelName
from benchmarks.pairs import ShapeName
from pe_dpo.runs.machine import cpu_name

CPU = Path("/proc/cpuinfo")

PACKAGES = (
    "pe-dpo",
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "liger-kernel",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a command was asked for."""

    command: str
    shape: ShapeName = "hh"
    dtype: Dtype = "fp32"
    model: ModelName = "m8k"
    rounds: int = 5
    is_quick: bool = False
    out: Path = Path("benchmarks/results")

    @property
    def name(self) -> str:
        """Name of the results."""
        shape = [self.shape, self.dtype, self.model] if self.command == "step" else []
        return "-".join([self.command, *shape] + ["quick"] * self.is_quick)


def machine() -> dict[str, Any]:
    """Return the facts without which a number says nothing."""
    return {
        "cpu": cpu_name(),
        "avx512_bf16": CPU.is_file() and "avx512_bf16" in CPU.read_text(encoding="utf-8"),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "unit": "CPU seconds (user + system) of the process, one thread",
    }


def save(settings: Settings, content: Mapping[str, Any]) -> Path:
    """Write results as JSON, atomically, and return the file."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"{settings.name}.json"
    partial = path.with_suffix(".partial")
    command = "python -m benchmarks " + " ".join(_arguments())
    partial.write_text(json.dumps({"command": command, "machine": machine(), **content}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def load(path: Path) -> dict[str, Any]:
    """Return saved results."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def temporary_folder() -> Path:
    """Return a new empty folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="pe-dpo-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _arguments() -> list[str]:
    """The command line without the folder of the results, which may tell where things lie."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and not argument.startswith("--out"):
            kept.append(f'"{argument}"' if " " in argument else argument)
        skip = argument == "--out"
    return kept


def _version(name: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit, `-dirty` where something was changed that is no result; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    return f"{git('describe', '--always')}{'-dirty' if changed else ''}".removeprefix("-dirty") or None

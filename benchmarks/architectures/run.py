"""All architectures, each in a process of its own with a time limit; what is measured is written as it comes."""

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from benchmarks.architectures.measure import measure
from benchmarks.architectures.models import ARCHITECTURES
from benchmarks.results import Settings, load, machine, save

SECONDS = 180
"""For one architecture; most take five."""
PROCESSES = 2


def run_architectures(settings: Settings, *, names: Sequence[str] = (), again: bool = False) -> Path:
    """Measure the architectures that this version of the code has not measured yet, and return the file of results.

    Args:
        settings: where the results go.
        names: which; all by default.
        again: measure those that are there already, too.
    """
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise SystemExit(f"{unknown[0]}: is no architecture of the table; there are {', '.join(ARCHITECTURES)}")
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    path, commit = settings.out / f"{settings.command}.json", machine()["commit"]
    rows: dict[str, Any] = load(path)["rows"] if path.is_file() else {}
    todo = [name for name in names or ARCHITECTURES if again or name in names or rows.get(name, {}).get("commit") != commit]
    with ThreadPoolExecutor(PROCESSES) as pool:  # each thread waits for a process
        for name, row in zip(todo, pool.map(_measure_apart, todo), strict=True):
            rows[name] = {"stands_for": ARCHITECTURES[name].stands_for, "commit": commit, **row}
            ordered = {name: rows[name] for name in ARCHITECTURES if name in rows}
            path = save(settings, {"rows": ordered})
            print(f"{name}: {_summary(row)}", flush=True)
    return path


def _summary(row: Mapping[str, Any]) -> str:
    """How far each quantization came, in a line."""
    said = []
    for quantize, one in row.get("found", {}).items():
        failed = next((step for step in ("check", "train", "merge") if step in one and one[step]["code"]), None)
        said.append(f"{quantize}: " + (f"{failed}: {one[failed]['said']}" if failed else one["verdict"]))
    return "; ".join(said) or row["failed"]


def _measure_apart(name: str) -> dict[str, Any]:
    """Measure in a forked process, so that the libraries are read once and nothing that it breaks stays broken."""
    with tempfile.TemporaryDirectory(prefix="pe-dpo-architecture-") as scratch:
        answer = Path(scratch) / "answer.json"
        process = multiprocessing.get_context("fork").Process(target=_child, args=(name, scratch, answer))
        began = time.perf_counter()
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return {"failed": f"not done after {SECONDS} s"}
        if not answer.is_file():
            return {"failed": f"the process ended with {process.exitcode}"}
        text = answer.read_text(encoding="utf-8").replace(f"{scratch}/", "")  # where things lie is nobody's business
        return {**json.loads(text), "seconds": round(time.perf_counter() - began, 1)}


def _child(name: str, scratch: str, answer: Path) -> None:
    os.nice(10)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        found = {"found": measure(name, Path(scratch))}
    except Exception as error:  # noqa: BLE001 -- one row less does not end the table
        found = {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc().splitlines()[-6:]}
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(answer)

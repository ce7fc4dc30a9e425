"""Runs the checks in order of their value, each in a process of its own that ends when its time is up.

A card that has seen an illegal access, or memory that nobody gives back, ends one check and not the proof. The next process
imports its libraries while the one before is at work, and touches the card only when its turn comes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import CHECKS, Check
from benchmarks.gpu.device import here
from benchmarks.gpu.found import Found

RESULT = "PROOF "
"""Before the line of a check's process that holds its result."""


def run_proof(out: Path, *, is_rehearsal: bool, seconds: float, names: Sequence[str] = ()) -> bool:
    """Run the checks, print a line for each, and write `proof.json` (or `rehearsal.json`) after every one.

    Args:
        out: folder of the results.
        is_rehearsal: on a CPU with tiny bases: every line but those of `cuda_only`.
        seconds: of all together; a check that needs more than is left is skipped.
        names: of the checks; default all.

    Returns:
        Whether none failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    start, rows = time.monotonic(), []
    checks = [check for check in CHECKS if not names or check.name in names]
    waiting = _begin(checks[0], out, is_rehearsal)
    for number, check in enumerate(checks):
        process, waiting = waiting, _begin(checks[number + 1], out, is_rehearsal) if number + 1 < len(checks) else None
        left = seconds - (time.monotonic() - start)
        begun = time.monotonic()
        if check.seconds > left and not is_rehearsal:
            process.kill()
            row: dict[str, Any] = {"verdict": "skipped", "facts": {"left_s": round(left)}}
        else:
            row = _finish(process, check, min(left, 2 * check.seconds) if not is_rehearsal else 600)
        row = {"check": check.name, **row, "seconds": round(time.monotonic() - begun, 1)}
        rows.append(row)
        print(f"{row['verdict']:8}{row['seconds']:7.1f} s  {check.name}: {json.dumps(row['facts'])[:600]}", flush=True)
        _write(out / ("rehearsal.json" if is_rehearsal else "proof.json"), rows)
    return all(row["verdict"] != "failed" for row in rows)


def run_check(name: str, out: Path, *, is_rehearsal: bool) -> None:
    """Run one check in this process, once a line comes from its parent, and print its result for it."""
    import bitsandbytes  # noqa: F401  (what takes seconds to import is there before the clock starts)
    import peft  # noqa: F401
    import transformers  # noqa: F401

    [check] = [check for check in CHECKS if check.name == name]
    print("ready", flush=True)
    sys.stdin.readline()
    if is_rehearsal:
        import torch

        torch.set_num_threads(1)
    found = check.run(here(is_rehearsal=is_rehearsal, out=out))
    print(RESULT + json.dumps(found._asdict()), flush=True)


def _begin(check: Check, out: Path, is_rehearsal: bool) -> subprocess.Popen[str]:
    arguments = ["--check", check.name, "--out", str(out), *(["--rehearse"] if is_rehearsal else [])]
    with (out / f"{check.name}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "gpu", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"},
        )


def _finish(process: subprocess.Popen[str], check: Check, limit: float) -> dict[str, Any]:
    """Give a waiting check its turn, and return its verdict and facts."""
    try:
        printed, _ = process.communicate("go\n", timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        return {"verdict": "failed", "facts": {"ended_after_s": round(limit)}}
    lines = [line for line in printed.splitlines() if line.startswith(RESULT)]
    if process.returncode or not lines:
        return {"verdict": "failed", "facts": {"exit": process.returncode, "see": f"{check.name}.log"}}
    found = Found(**json.loads(lines[-1].removeprefix(RESULT)))
    verdict = "measured" if found.is_right is None else "right" if found.is_right else "failed"
    return {"verdict": verdict, "facts": found.facts}


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from benchmarks.results import machine

    skipped = {check.name: list(check.cuda_only) for check in CHECKS if check.cuda_only}
    content = {"machine": machine() | {"unit": "wall seconds"}, "not_rehearsed": skipped, "checks": rows}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)

"""All engines that are there on all artefacts that they read; what is measured is written as it comes, and into the docs."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from benchmarks.engines.artefacts import fill, full_request
from benchmarks.engines.measure import CASES, Case, expected_of, file_of, measure, reference_of, request_for
from benchmarks.engines.table import PAGE, engines_table, put_table
from benchmarks.engines.worker import EngineError, ask, why_missing
from benchmarks.results import Settings, load, machine, save, temporary_folder

SECONDS = 900
"""Of one case, on a machine that does other things as well."""


def run_engines(settings: Settings, *, names: Sequence[str] = (), page: Path = PAGE) -> Path:
    """Measure engines, write the results and the table of the page, and return the file of results.

    Args:
        settings: where the results go.
        names: which engines; all by default. The rows of the others stay.
        page: the page with the table.

    Raises:
        SystemExit: an engine is unknown; or, after all was written, one is beyond its bounds.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise SystemExit(f"{unknown[0]}: is no engine of the table; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    scratch, expected = temporary_folder(), dict[str, Any]()

    def get(name: str) -> Path:
        folder = scratch / name
        if not folder.exists():
            folder.mkdir()
            fill(name, folder, get)
        return folder

    path = settings.out / f"{settings.command}.json"
    engines: dict[str, Any] = load(path)["engines"] if path.is_file() else {}
    for engine in names or CASES:
        rows = []
        for case in [] if why_missing(engine) else CASES[engine]:
            row = _row(engine, case, get, expected)
            rows.append(row)
            print(f"{engine}, {case.artefact}{', ' * bool(case.as_in)}{case.as_in}: {_summary(row)}", flush=True)
        if not rows:
            print(why_missing(engine), flush=True)
        engines[engine] = {"commit": machine()["commit"], "rows": rows}
        path = save(settings, {"engines": {name: engines[name] for name in CASES if name in engines}})
    put_table(page, engines_table(path))
    broken = [(name, row) for name, engine in engines.items() for row in engine["rows"] if row["broken"]]
    if broken:
        lines = [f"{name}, {row['artefact']}: {_summary(row)}" for name, row in broken]
        raise SystemExit("\n".join(["not as they should be:", *lines]))
    return path


def _row(engine: str, case: Case, get: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """What came of a case."""
    request = full_request(get("base"))
    name = reference_of(case)
    if name not in expected:
        expected[name] = expected_of(name, request, get)
    began = time.perf_counter()
    row: dict[str, Any] = {"artefact": case.artefact, "as_in": case.as_in, "bound": case.bound, "known": case.known}
    try:
        answer = ask(engine, file_of(engine, get(case.artefact)), request_for(case, request, get), seconds=SECONDS)
    except EngineError as error:
        said = re.sub(r"(/[\w.-]+)+/", "", str(error).splitlines()[-1])  # where things lie is nobody's business
        return {**row, "failed": said, "broken": [said]}
    row |= {"version": answer["version"], "seconds": round(time.perf_counter() - began, 1)}
    return row | measure(case, answer, expected[name])


def _summary(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    parts = [f"{row['difference']:.1e} nats"] if "difference" in row else []
    parts += [f"{name} {row[name][0]} of {row[name][1]}" for name in ("tokens", "chats", "prompts") if name in row]
    return ", ".join(parts) + (f"; beyond its bounds: {', '.join(row['broken'])}" if row["broken"] else "")

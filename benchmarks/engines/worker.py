"""Ask an engine: a worker of its own under its own Python, a request and an answer as JSON files between.

ENVIRONMENT/bin/python -I benchmarks/engines/NAME.py ARTEFACT REQUEST.json ANSWER.json
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECONDS = 300
"""Of one request; a tiny model takes a few, and the import of a large engine up to a minute."""
LINES = 25
"""Of what a worker said last that an error repeats."""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class EngineError(RuntimeError):
    """An engine's worker failed, took too long, or left no answer."""


def environment(engine: str) -> Path:
    """Return where an engine's environment lies, or would: under PE_DPO_ENGINES, or .engines of the checkout."""
    return Path(os.environ.get("PE_DPO_ENGINES") or ROOT / ".engines") / engine


def worker_command(engine: str) -> list[str] | None:
    """Return how an engine's worker is started, or None where the engine is not installed.

    A program of the engine's name in its environment is the worker itself. Otherwise NAME.py is run by the environment's
    Python, or by this one where the engine's package is installed here. Python runs it isolated (-I): the worker's folder is
    not on the path, where a file that is named as its engine would be imported in its place, and neither is PYTHONPATH.
    """
    folder, script = environment(engine), HERE / f"{engine}.py"
    program = folder / engine
    if program.is_file() and os.access(program, os.X_OK):
        return [str(program)]
    python = folder / "bin" / "python"
    if python.is_file() and script.is_file():
        return [str(python), "-I", str(script)]
    if script.is_file() and importlib.util.find_spec(engine) is not None:
        return [sys.executable, "-I", str(script)]
    return None


def why_missing(engine: str) -> str:
    """Return the sentence of what lacks, for whoever skips an engine; empty where it is there."""
    return "" if worker_command(engine) else f"{engine} is not installed: make engine-{engine}"


def ask(engine: str, artefact: Path, request: Mapping[str, Any], *, seconds: float = SECONDS) -> dict[str, Any]:
    """Return what an engine answers about an artefact.

    Args:
        engine: name of its worker.
        artefact: a model folder, an adapter or a file, whatever the worker reads.
        request: parts as README.md lists them.
        seconds: after which the worker and all that it started are ended.

    Raises:
        EngineError: the engine is not installed, or its worker failed; with the last lines that it printed.
    """
    command = worker_command(engine)
    if command is None:
        raise EngineError(why_missing(engine))
    folder = Path(tempfile.mkdtemp(prefix=f"pe-dpo-{engine}-"))
    try:
        question, answer, said = folder / "request.json", folder / "answer.json", folder / "said.txt"
        question.write_text(json.dumps(request), encoding="utf-8")
        variables = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        }
        variables |= QUIET | {"PATH": os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", os.defpath)])}
        with said.open("wb") as out:
            process = subprocess.Popen(
                [*command, str(artefact), str(question), str(answer)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=variables,
                start_new_session=True,  # a server that the worker started is ended with it
            )
            try:
                process.wait(seconds)
                how = f"ended with {process.returncode}" if process.returncode else ""
            except subprocess.TimeoutExpired:
                how = f"was not done after {seconds:g} s"
            finally:
                _end(process)
        if how or not answer.is_file():
            last = "\n".join(said.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:])
            raise EngineError(f"{engine}: the worker {how or 'left no answer'} on {artefact}; it said last:\n{last}")
        return dict(json.loads(answer.read_text(encoding="utf-8")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a worker's process group; the group of one that ended and left nobody behind is gone."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()

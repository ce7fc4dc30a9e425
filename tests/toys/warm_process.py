"""Programs in processes of their own, which can be killed: forked from one that has the libraries loaded, to start at once."""

import gc
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.crash.process import PRELOADED

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)  # one process serves both, whoever begins


def start(program: str, *words: object, folder: Path, environment: dict[str, str] | None = None) -> BaseProcess:
    """Start a program, given as its source, in a folder; what it prints goes to the file that `log` names.

    Args:
        program: is run as `__main__`.
        words: its `sys.argv[1:]`.
        folder: where it works.
        environment: variables besides those of this process.

    Returns:
        The process; its exit code is minus the signal where one ended it, as those of `subprocess`.
    """
    arguments = program, [str(word) for word in words], folder, environment or {}
    process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
    process.start()
    return process


def log(process: BaseProcess, folder: Path) -> Path:
    """The file with all that a process printed."""
    return folder / f"process-{process.pid}.log"


def end() -> None:
    """End the process that others are forked from and wait for it, so that its time counts as that of the tests."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _run(program: str, words: list[str], folder: Path, environment: dict[str, str]) -> None:
    gc.freeze()
    os.chdir(folder)
    os.environ.update(environment)
    with log(multiprocessing.current_process(), folder).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["program", *words]
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})

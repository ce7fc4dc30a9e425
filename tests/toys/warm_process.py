"""Programs in processes of their own, which can be killed: forked from one that has the libraries loaded, to start at once."""

import atexit
import gc
import multiprocessing
import os
import select
import sys
import warnings
from collections.abc import Sequence
from multiprocessing import forkserver, util
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from benchmarks.crash.process import PRELOADED

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)  # one process serves both, whoever begins


def begin() -> None:
    """Fork that process from the one of the tests, as long as none has run, so that it need not load the libraries anew.

    They take six seconds of a core. Later it would be too late: who was forked from a process that has computed a gradient
    can compute none.
    """

    pipes: list[tuple[int, int]] = []
    pipe = os.pipe

    def noted() -> tuple[int, int]:
        pipes.append(pipe())
        return pipes[-1]

    def fork(executable: str, arguments: Sequence[str], handles: Sequence[int]) -> int:
        if child := os.fork():
            return child
        try:
            patch.undo()
            os.close(pipes[-1][1])  # the end that is the tests': they are over when it closes
            atexit._clear()
            select.select(handles, [], [])  # what nobody imported yet is loaded when the first program is started
            exec(arguments[-1], {})
        finally:
            os._exit(0)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setattr(os, "pipe", noted)
        patch.setattr(util, "spawnv_passfds", fork)
        forkserver.ensure_running()


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
    """End that process and wait for it, so that its time counts as that of the tests."""
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

"""A `pe-dpo` command in a process of its own that SIGKILL ends: at a random moment, or before a certain change of the disk.

Changes of the disk are counted in the process itself: files opened for writing, renames, removals, new folders (Python's audit
events), fsync, and every statement to SQLite, BEGIN and COMMIT among them. A process that dies at an fsync may leave a part of
the file behind, as a machine without power does.

Processes are forked from one that has the libraries loaded, which takes the five seconds of a start once.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sqlite3
import stat
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = [
    *("pe_dpo.cli.sweep", "pe_dpo.cli.merge", "pe_dpo.cli.export", "pe_dpo.training.train", "pe_dpo.merging.merge"),
    *("pe_dpo.experiments.sweep", "pe_dpo.export.gguf_file", "transformers.models.llama.modeling_llama", "bitsandbytes"),
    *("pe_dpo.audit.audit", "peft.tuners.lora.bnb", "transformers.integrations.bitsandbytes", "rich.console", "rich.table"),
    "benchmarks.crash.preloaded",
]
CONTEXT.set_forkserver_preload(PRELOADED)

OPENED_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"})
DEADLINE = 600.0
"""Seconds after which a process is stuck."""


class Death(NamedTuple):
    """Where a process is to die."""

    change: int | None = None
    """Before this change of the disk, counted from 1."""
    seconds: float | None = None
    """So long after its start, from outside."""
    torn: float | None = None
    """Where it dies at an fsync, the share of the file that is left; None to leave it whole."""


class Ending(NamedTuple):
    """How a command ended."""

    was_killed: bool
    code: int
    changes: list[str]
    """The changes of the disk in the first process, in their order; none where it was killed."""
    said: str
    at: str
    """The change that it died at; empty where it died at none."""


def run_command(
    attempts: Sequence[Sequence[str]],
    *,
    folder: Path,
    death: Death | None = None,
    processes: int = 1,
    environment: Mapping[str, str] = {},
) -> Ending:
    """Run a command to its end or its death.

    Args:
        attempts: The words of `pe-dpo`, and those to use where the first are refused, and so on.
        folder: Where it works and what it may change.
        death: Where it dies; None to let it live.
        processes: How many work together, as torchrun starts them; the first of them dies, and then the others.
        environment: Variables beside those of this process.
    """
    notes = folder.with_name(f"{folder.name}-notes")
    notes.mkdir(exist_ok=True)
    for old in notes.iterdir():
        old.unlink()
    environment = dict(environment)
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started: list[BaseProcess] = []
    for rank in range(processes):
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        arguments = (attempts, folder, notes, rank, own, death if rank == 0 else None)
        started.append(CONTEXT.Process(target=_run, args=arguments, daemon=True))
        started[-1].start()
    if death and death.seconds is not None:
        started[0].join(timeout=death.seconds)
        started[0].kill()
    started[0].join(timeout=DEADLINE)
    is_stuck = started[0].exitcode is None
    was_killed = started[0].exitcode == -signal.SIGKILL
    for process in started:
        if is_stuck or was_killed:
            process.kill()
        process.join(timeout=DEADLINE)
    said = "".join(path.read_text(errors="replace") for path in sorted(notes.glob("said-*")))
    changes, at = (notes / name for name in ("changes", "at"))
    return Ending(
        was_killed,
        signal.SIGALRM if is_stuck else max((process.exitcode or 0 for process in started), key=abs),
        changes.read_text().splitlines() if changes.exists() else [],
        said,
        at.read_text() if at.exists() else "",
    )


def _run(
    attempts: Sequence[Sequence[str]], folder: Path, notes: Path, rank: int, environment: Mapping[str, str], death: Death | None
) -> None:
    """Be the process."""
    import torch

    from pe_dpo.cli import main

    gc.freeze()
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(environment)
    with (notes / f"said-{rank}").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    changes = _Changes(folder, death or Death(), notes)
    changes.watch()
    code: Any = 0
    for words in attempts:
        sys.argv = ["pe-dpo", *words]
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        if not code:
            break
    sys.stdout.flush()
    if rank == 0:
        changes.stop()
        (notes / "changes").write_text("\n".join(changes.seen))
    os._exit(code if isinstance(code, int) else 1)


class _Changes:
    """Notes what a process changes in a folder, and ends it at one of these changes."""

    def __init__(self, folder: Path, death: Death, notes: Path) -> None:
        self.folder, self.death, self.notes, self.is_watching = str(folder), death, notes, True
        self.seen: list[str] = []

    def watch(self) -> None:
        """Begin; an audit hook stays as long as the process."""
        sys.addaudithook(self._hear)
        sync, connect = os.fsync, sqlite3.connect

        def fsync(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            self._happens("fsync", str(Path(f"/proc/self/fd/{number}").readlink()), number)
            sync(handle)

        def connected(database: Any, *args: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(database, *args, **options)
            connection.set_trace_callback(lambda statement: self._happens(statement[:30], os.fspath(database)))
            return connection

        os.fsync, sqlite3.connect = fsync, connected  # type: ignore[assignment]

    def stop(self) -> None:
        """Note no more."""
        self.is_watching = False

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.is_watching:
            return
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & OPENED_FOR_WRITING):
            path = args[0]
            if isinstance(path, str | bytes | os.PathLike):
                self._happens(event, str(Path(os.fsdecode(path)).absolute()))

    def _happens(self, what: str, path: str, handle: int | None = None) -> None:
        if not path.startswith(self.folder) or not self.is_watching:
            return
        change = " ".join(f"{what} {os.path.relpath(path, self.folder)}".split())
        self.seen.append(change)
        if len(self.seen) != self.death.change:
            return
        self.is_watching = False
        if handle is not None and self.death.torn is not None and stat.S_ISREG(os.fstat(handle).st_mode):
            os.truncate(path, int(Path(path).stat().st_size * self.death.torn))
        (self.notes / "at").write_text(change)
        os.kill(os.getpid(), signal.SIGKILL)

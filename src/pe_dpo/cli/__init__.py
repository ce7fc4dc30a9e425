"""The front door: one small function per command; each imports the room it needs when it runs.

Only this room prints. It turns the errors of `pe_dpo.errors` into one message and an exit code: 0 ok, 1 findings or a failed
run, 2 usage.
"""

import os
import sys
from pathlib import Path

import typer

from pe_dpo import startup
from pe_dpo.cli.audit import audit
from pe_dpo.cli.chat import chat
from pe_dpo.cli.check import check
from pe_dpo.cli.compare import compare
from pe_dpo.cli.console import command
from pe_dpo.cli.convert import convert
from pe_dpo.cli.data import data
from pe_dpo.cli.estimate import estimate
from pe_dpo.cli.evaluate import evaluate
from pe_dpo.cli.export import export
from pe_dpo.cli.golden import golden
from pe_dpo.cli.merge import merge
from pe_dpo.cli.options import OnceEach, in_flags
from pe_dpo.cli.quickstart import quickstart
from pe_dpo.cli.recipes import recipes
from pe_dpo.cli.report import report
from pe_dpo.cli.serve import serve
from pe_dpo.cli.sweep import sweep
from pe_dpo.cli.train import train
from pe_dpo.disk import disk_errors_named
from pe_dpo.errors import PeDpoError, UsageError

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where torch's allocator on a card takes its settings from: today, and before 2.9."""

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What tells OpenMP runtimes how long a thread spins for another before it sleeps."""
SPINS = "5000"
"""A tenth of a millisecond. GNU's own 300,000 are 6 to 13 ms, spent again and again where another process has the core that is
waited for; none at all (OMP_WAIT_POLICY=PASSIVE) cost 1.7 times a step on idle cores (`python -m benchmarks threads`)."""
GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Devices of the drivers of NVIDIA, of Windows' Linux, and of AMD."""

app = typer.Typer(
    name="pe-dpo",
    help="Fine-tune a language model on preference pairs, on one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(cls=OnceEach)(command(quickstart))
app.add_typer(recipes, name="recipes")
app.command(cls=OnceEach)(command(convert))
app.command(cls=OnceEach)(command(data))
app.command(cls=OnceEach)(command(estimate))
app.command(cls=OnceEach)(command(check))
app.command(cls=OnceEach)(command(audit))
app.command(cls=OnceEach)(command(train))
app.command("eval", cls=OnceEach)(command(evaluate))
app.command(cls=OnceEach)(command(sweep))
app.command(cls=OnceEach)(command(compare))
app.command(cls=OnceEach)(command(report))
app.command(cls=OnceEach)(command(merge))
app.command(cls=OnceEach)(command(export))
app.command(cls=OnceEach)(command(serve))
app.command(cls=OnceEach)(command(golden))
app.command(cls=OnceEach)(command(chat))


def main() -> None:
    """Run the command line and leave with its exit code."""
    startup.begin()
    if not os.environ.keys() & ALLOCATOR:  # torch reads it when it is imported; rows of many lengths fray a card's memory
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    if not os.environ.keys() & set(WAITING) and computes_on_cpu():  # likewise, with torch's OpenMP runtime
        os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        try:
            here = Path.cwd()
        except FileNotFoundError as error:
            raise UsageError("the working folder was removed; change to one that is there, and start again") from error
        with disk_errors_named(here, name="the output"):
            app()
    except PeDpoError as error:
        print(f"error: {in_flags(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def computes_on_cpu() -> bool:
    """Return whether torch can have no GPU here: none of their drivers is there, or all cards are hidden from this process."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return hidden or not any(Path(device).exists() for device in GPUS)

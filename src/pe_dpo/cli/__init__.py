"""The front door: one small function per command; each imports the room it needs when it runs.

Only this room prints. It turns the errors of `pe_dpo.errors` into one message and an exit code: 0 ok, 1 findings or a failed
run, 2 usage.
"""

import os
import sys
from pathlib import Path

import typer

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
    if not os.environ.keys() & ALLOCATOR:  # torch reads it when it is imported; rows of many lengths fray a card's memory
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    try:
        try:
            here = Path.cwd()
        except FileNotFoundError as error:
            raise UsageError("the working folder was removed; change to one that is there, and start again") from error
        with disk_errors_named(here):
            app()
    except PeDpoError as error:
        print(f"error: {in_flags(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

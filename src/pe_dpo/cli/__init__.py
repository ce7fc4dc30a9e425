"""The front door: one small function per command; each imports the room it needs when it runs.

Only this room prints. It turns the errors of `pe_dpo.errors` into one message and an exit code: 0 ok, 1 findings or a failed
run, 2 usage.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import pe_dpo
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

COMMANDS = (
    (quickstart, "Train and explain a first run: embedded, offline, about a minute", "--gamma 0.5x"),
    (convert, "Make a recipe of another tool's configuration", "trl_config.yaml -o recipe.yaml"),
    (data, "Show what a data set trains, and all that looks off in it", "--recipe runs/quickstart/recipe.yaml"),
    (estimate, "Say how much memory and time a run takes on a card", "qwen3-4b-dpo --gpu 'RTX 4090'"),
    (check, "Check recipe, base and data before training; exit 1 with why", "runs/quickstart/recipe.yaml"),
    (audit, "Say what to do before training: what the reference knows of it", "runs/quickstart/recipe.yaml"),
    (train, "Train an adapter by a recipe", "runs/quickstart/recipe.yaml -o runs/other --gamma 0.5x"),
    (evaluate, "Measure a run, an adapter or a merged model on held-out pairs", "runs/quickstart --prompts 64"),
    (sweep, "Train a grid of settings from one base, with seeds", "runs/quickstart/recipe.yaml --grid gamma=0,1x -o sweep"),
    (compare, "Say which runs can be told apart, at equal KL", "sweep"),
    (report, "Show a run or a sweep on one page, with plots", "runs/quickstart"),
    (merge, "Merge adapter and base into one model, and prove it", "runs/quickstart -o model"),
    (export, "Write a model as GGUF, with a Modelfile for Ollama", "model -o model-gguf --gguf q8_0"),
    (serve, "Print the commands that serve it in vLLM, llama.cpp and others", "runs/quickstart"),
    (golden, "Ask a server the golden prompts of an export", "model-gguf http://127.0.0.1:8080"),
    (chat, "Talk to base and tuned model side by side", "runs/quickstart"),
)
"""Every command, what the list of commands says of it, and arguments that show it: most are for what `pe-dpo quickstart` has
left. Its name is that of its function, but for `eval`."""

app = typer.Typer(
    name="pe-dpo",
    help="Fine-tune a language model on preference pairs, on one GPU.",
    epilog="Example: pe-dpo quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _function, _words, _arguments in COMMANDS:
    _name = "eval" if _function is evaluate else _function.__name__
    app.command(_name, cls=OnceEach, short_help=_words, epilog=f"Example: pe-dpo {_name} {_arguments}")(command(_function))
app.add_typer(recipes, name="recipes", short_help="List, show and copy recipes and named losses; the schema")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"pe-dpo {pe_dpo.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options of no command."""


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

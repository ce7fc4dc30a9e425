"""`pe-dpo serve`."""

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from pe_dpo.cli import console


def serve(
    target: Annotated[Path, typer.Argument(help="A finished run, a packaged adapter, a merged model or an export.")],
    made: Annotated[
        list[Path] | None, typer.Argument(help="What was made of it: a merged model, a packaged adapter, an export.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Of a run: the adapter of its best evaluation (train.keep_best).")
    ] = False,
) -> None:
    """Print the commands that serve it in vLLM, llama.cpp and transformers, each with its reason; start nothing."""
    from pe_dpo.runs.files import best_folder
    from pe_dpo.runs.serving import describe_folder, steps_to_serve

    target = best_folder(target) if best else target
    steps = steps_to_serve(target, made or [])
    console.say(f"# {describe_folder(target)}")
    engine = None
    for step in steps:
        if step.engine != engine:
            console.say(f"\n# {step.engine}")
            engine = step.engine
        for line in textwrap.wrap(step.why, 76, break_long_words=False, break_on_hyphens=False):
            console.say(f"#   {line}")
        for line in step.lines:
            console.say(line)

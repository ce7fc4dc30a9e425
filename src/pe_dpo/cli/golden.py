"""`pe-dpo golden`: whether a running server answers golden prompts as the model that was exported."""

from pathlib import Path
from typing import Annotated

import typer

from pe_dpo.cli import console


def golden(
    file: Annotated[Path, typer.Argument(help="golden_prompts.jsonl, or the folder of an export.")],
    url: Annotated[str, typer.Argument(help="Where the server listens, such as http://127.0.0.1:8080.")],
    model: Annotated[str | None, typer.Option(help="The model's name there; default: the first that the server names.")] = None,
) -> None:
    """Ask a server the golden prompts of an export: equal answers, near ties, others (exit code 1)."""
    from pe_dpo.errors import UsageError
    from pe_dpo.export.golden_server import compare_server

    if file.is_dir():
        file = file / "golden_prompts.jsonl"
    if not file.is_file():
        raise UsageError(f"{file}: no such file; pe-dpo export writes golden_prompts.jsonl beside a GGUF file")
    console.start()
    verdicts = []
    for one, found in compare_server(url, file, model=model):
        verdicts.append(found.verdict)
        if found.verdict == "equal":
            console.say(f"equal      {one.prompt!r}")
        elif found.verdict == "near tie":
            console.say(f"near tie   {one.prompt!r}: {found.why}; below {one.near_tie:g} rounding may choose otherwise")
        else:
            console.say(f"OTHER      {one.prompt!r}: {found.why}")
    others = verdicts.count("other")
    if others:
        console.say(
            f"{others} of {len(verdicts)} answers are another model's: compare the file, its adapter, its chat template, the "
            "scaling of positions, and the sampling that the server does at temperature 0"
        )
        raise typer.Exit(1)
    console.say(f"{len(verdicts)} answers are the model's, {verdicts.count('near tie')} of them up to a near tie")

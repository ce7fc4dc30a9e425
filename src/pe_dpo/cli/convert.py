"""`pe-dpo convert`: another tool's configuration as a recipe."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_dpo.cli import console

if TYPE_CHECKING:
    from pe_dpo.convert.convert import Conversion


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="YAML, JSON or a script with arguments of TRL, alignment-handbook, SimPO, Axolotl, LLaMA-Factory, "
            "torchtune or ms-swift."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the recipe to this file, not to the screen.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over a file that is there.")] = False,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Cards that the file is run on there; default: as many as it starts.")
    ] = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Hold loss and gradients against TRL's own trainer, on 8 pairs and a small model.")
    ] = False,
) -> None:
    """Make a recipe of another tool's file; exit 1 where it is another objective."""
    from pe_dpo.convert.convert import convert as convert_file
    from pe_dpo.errors import UsageError

    if output is not None and output.exists() and not overwrite:
        raise UsageError(f"{output}: exists already; name another file, or write over it with --overwrite")
    found = convert_file(file, cards=gpus)
    if output is None:
        typer.echo(found.text, nl=False)
    else:
        try:
            output.write_text(found.text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{output}: cannot be written: {error.strerror}; name another file") from error
    _show_tables(found)
    if prove:
        console.start(is_silent=True)
        from pe_dpo.convert.proof import prove as prove_conversion

        console.show_lines(prove_conversion(found).lines(), is_error=True)
    if output is not None:
        typer.echo(f"written to {output}; next: pe-dpo check {shlex.quote(str(output))}", err=True)
    if found.is_another_objective:
        typer.echo("the recipe is not the same objective: see the lines with ! above", err=True)
        raise typer.Exit(1)


def _show_tables(found: "Conversion") -> None:
    """Print what means something else, what was left out, and unknown keys; to stderr, where the recipe may be on stdout."""
    tables = {"means something else here": found.differences, "dropped": found.dropped}
    for title, rows in tables.items():
        if rows:
            typer.echo(f"\n{title}", err=True)
            console.show_pairs(
                [
                    (f"{'! ' if row.breaks else ''}{row.there}", row.words)
                    for row in sorted(rows, key=lambda row: not row.breaks)
                ]
            )
    if found.unknown:
        typer.echo(f"\nno key of {found.title} that is known", err=True)
        console.show_pairs([(words, "left out; see whether it matters") for words in found.unknown])

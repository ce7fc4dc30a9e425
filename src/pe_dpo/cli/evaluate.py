"""`pe-dpo eval`."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    target: Annotated[Path, typer.Argument(help="A run folder, a LoRA adapter, or a merged model.")],
    data: Annotated[str | None, typer.Option(help="Pairs to evaluate on; default: those the run held out.")] = None,
    base: Annotated[str | None, typer.Option(help="The adapter's base, or the reference of a merged model.")] = None,
    quantize: Annotated[str | None, typer.Option(help="nf4, nf4-single, int8 or none; default: as in the run.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print metrics and intervals as JSON.")] = False,
    pairs: Annotated[Path | None, typer.Option(help="Write every pair into this parquet file.")] = None,
) -> None:
    """Measure a run, an adapter or a merged model on held-out pairs."""
    from pe_dpo.errors import UsageError

    if not target.is_dir():
        raise UsageError(f"{target}: no such folder; name a run, an adapter or a model on disk")
    if quantize not in (None, "nf4", "nf4-single", "int8", "none"):
        raise UsageError(f"--quantize {quantize}: write nf4, nf4-single, int8 or none")
    if pairs is not None and not pairs.parent.is_dir():
        raise UsageError(f"--pairs {pairs}: there is no folder {pairs.parent}; make it first")

    from pe_dpo.cli import console

    console.quiet_libraries()
    from pe_dpo.evaluation.held_out import save_pairs
    from pe_dpo.evaluation.run import evaluate as run

    def quiet(line: str) -> None:
        return None

    found = run(
        target,
        data=data,
        base=base,
        quantize=quantize,  # type: ignore[arg-type]  # checked above
        say=quiet if json else console.say,
        progress=console.counter(),
    )
    if pairs is not None:
        save_pairs(found.scored, found.pairs, pairs)
    if json:
        typer.echo(json_module.dumps({"kind": found.kind, "metrics": found.metrics, "intervals": found.intervals}, indent=1))
        return
    rows = [
        [key, f"{value:.4f}", "[{:.3f}, {:.3f}]".format(*found.intervals[key]) if key in found.intervals else ""]
        for key, value in found.metrics.items()
        if not key.startswith("regimes") and key != "pairs"
    ]
    console.show_table(f"{len(found.pairs)} held-out pairs ({found.kind})", ["", "value", "95 % Wilson interval"], rows)
    console.show_regimes(found.metrics, "By summed log-probs (these mostly measure length)")
    console.show_regimes(found.metrics, "By log-probs per token", "regimes_per_token")

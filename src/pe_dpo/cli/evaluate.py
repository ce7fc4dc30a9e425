"""`pe-dpo eval`."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pe_dpo.cli import console, options
from pe_dpo.printable import counted
from pe_dpo.quantizations import QUANTIZATIONS, QUANTIZATIONS_IN_WORDS

if TYPE_CHECKING:
    from pe_dpo.evaluation.evaluate import Evaluation


def evaluate(
    target: Annotated[Path, typer.Argument(help="A run folder, a LoRA adapter, or a merged model.")],
    data: Annotated[str | None, typer.Option(help="Pairs to evaluate on; default: those the run held out.")] = None,
    base: Annotated[str | None, typer.Option(help="The adapter's base, or the reference of a merged model.")] = None,
    quantize: Annotated[str | None, typer.Option(help=f"{QUANTIZATIONS_IN_WORDS}; default: as in the run.")] = None,
    prompts: Annotated[
        int | None, typer.Option(min=0, help="Sample answers to this many held-out prompts; default: as in the run's recipe.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Where an answer that does not end is cut.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampled answers; keep it to compare runs.")] = 0,
    scale: Annotated[
        str | None,
        typer.Option(help="Measure a run's adapter scaled toward the reference too: 0.5,0.75 or none; default: its recipe's."),
    ] = None,
    scorer: options.Scorer = None,
    best: Annotated[
        bool, typer.Option("--best", help="Of a run: the adapter of its best evaluation (train.keep_best).")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write what was measured into this folder; default: into the run.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print metrics and intervals as JSON.")] = False,
    pairs: Annotated[Path | None, typer.Option(help="Write every pair into this parquet file.")] = None,
) -> None:
    """Measure a run, an adapter or a merged model on held-out pairs, and on answers that it gives to held-out prompts."""
    _check_request(target, quantize, pairs, output)
    scales = options.scales("--scale", scale)

    console.start(is_silent=json)
    from pe_dpo.evaluation.evaluate import evaluate as run
    from pe_dpo.recipe.schema import GenerationSection

    asked = {"prompts": prompts, "samples": samples, "max_new_tokens": max_new_tokens, "scales": scales}

    def folder(found: "Evaluation") -> Path | None:
        is_the_run = found.kind == "run" and (data, base, quantize) == (None, None, None)
        return output or ((target / "best" if best else target) if is_the_run else None)

    def keep(found: "Evaluation") -> None:
        place = folder(found)
        if place is not None:
            found.save(place)

    found = run(
        target,
        data=data,
        base=base,
        quantize=quantize,  # type: ignore[arg-type]  # checked above
        generation=GenerationSection.model_validate({name: value for name, value in asked.items() if value is not None}),
        seed=seed,
        scorer=scorer,
        best=best,
        keep=keep,
    )
    if pairs is not None:
        found.save_pairs(pairs)
    keep(found)
    if json:
        typer.echo(json_module.dumps(_report(found), indent=1))
        return
    _show(found)
    if found.kind == "run":  # whose loss is known, as its warnings ask
        from pe_dpo.runs.run import Run
        from pe_dpo.training.diagnostics import diagnose_pairs, gravest_first

        before = found.before if found.before_of == "start" else {}
        remarks = diagnose_pairs(found.metrics, before, Run(target).recipe.loss)
        console.show_lines([f"warning: {remark}" for remark in gravest_first(remarks)])
    place = folder(found)
    written = "--json prints" if place is None else f"written to {place}: evaluation.json has"
    console.say(f"{written} all {len(found.metrics)} metrics")
    if found.generation is None and found.metrics.get("accuracy/reference") is not None:
        console.say("to measure KL(π‖π0) on sampled answers: --prompts 100")


def _check_request(target: Path, quantize: str | None, pairs: Path | None, output: Path | None) -> None:
    from pe_dpo.disk import check_can_be_written
    from pe_dpo.errors import UsageError

    if not target.is_dir():
        raise UsageError(f"{target}: no such folder; name a run, an adapter or a model on disk")
    if quantize not in (None, *QUANTIZATIONS):
        raise UsageError(f"--quantize {quantize}: write {QUANTIZATIONS_IN_WORDS}")
    if pairs is not None and not pairs.parent.is_dir():
        raise UsageError(f"--pairs {pairs}: there is no folder {pairs.parent}; make it first")
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.absolute().parent}; make it first")
    for place in filter(None, (pairs and pairs.parent, output)):  # before hours of measuring
        check_can_be_written(place)


def _report(found: "Evaluation") -> dict[str, Any]:
    from pe_dpo.disk import json_without_nan
    from pe_dpo.metrics.sides import RANKINGS, shares_by_side

    generation = {} if found.generation is None else {"generation": found.generation}
    scaled = {"scaled": {f"{scale:g}": _report(one) for scale, one in found.scaled.items()}} if found.scaled else {}
    sides: dict[str, Any] = {}
    for by in RANKINGS:
        for key, parts in shares_by_side(found.scored, by).items():
            sides.setdefault(f"by_{by}", {})[key] = {side: json_without_nan(part._asdict()) for side, part in parts.items()}
    before = {"before": found.before, "before_of": found.before_of}
    measured = {"metrics": found.metrics, **before, "intervals": found.intervals}
    return {"kind": found.kind, **measured, **sides, **generation, **scaled}


def _show_sides(found: "Evaluation") -> None:
    """Every share apart by what the reference ranks right and wrong, and by what the policy does."""
    from pe_dpo.metrics.catalogue import METRICS
    from pe_dpo.metrics.sides import RANKINGS, shares_by_side

    for by, name in RANKINGS.items():
        shares = shares_by_side(found.scored, by)
        counts = [f"{name} {side} ({part.pairs})" for side, part in next(iter(shares.values()), {}).items()]
        rows = [[METRICS[key].title, *(part.describe() for part in parts.values())] for key, parts in shares.items()]
        if rows:
            way = "per token" if found.scored.reduce == "mean" else "by summed log-probs"
            console.show_table(f"Shares where {name} ranks right and where wrong, {way}", ["", *counts], rows)


def _show(found: "Evaluation") -> None:
    from pe_dpo.cli.held_out import show_change

    columns = ("before", "after") if found.before_of == "start" else ("reference", found.kind)
    show_change(found.before, found.metrics, reduce=found.scored.reduce, columns=columns)
    _show_sides(found)
    if found.generation is not None:
        _show_generation(found.generation)
    if found.scaled:
        _show_scaled(found)


def _show_scaled(found: "Evaluation") -> None:
    """The adapter at each scale, as it is last."""
    from pe_dpo.metrics.catalogue import METRICS

    shown = [key for key in ("accuracy/policy", "accuracy/policy_per_token", "accuracy/shift", "loss") if key in found.metrics]
    rows = []
    for scale, one in [*sorted(found.scaled.items()), (1.0, found)]:
        kl = ["", ""] if one.generation is None else [*_with_error(one.generation["kl"])]
        rows.append([f"{scale:g}", *kl, *(f"{one.metrics[key]:.4f}" for key in shown)])
    header = ["scale a", "KL(π‖π0)", "standard error", *(METRICS[key].title for key in shown)]
    console.show_table("The adapter scaled toward the reference, W0 + a·ΔW", header, rows)


def _show_generation(generation: dict[str, Any]) -> None:
    data_prefix = generation["data_prefix_kl"]
    from pe_dpo.metrics.catalogue import METRICS

    sampled = [metric for metric in METRICS.values() if metric.kind == "answers" and not metric.is_share]
    rows = [
        *([metric.title, *_with_error(generation[metric.key])] for metric in sampled if metric.key in generation),
        ["KL along the data's chosen answers, nats per answer", *_with_error(data_prefix["per_answer"])],
        ["answers that ended", f"{generation['ended']:.1%}", ""],
        ["distinct tokens, pairs of tokens", f"{generation['distinct_1']:.3f}, {generation['distinct_2']:.3f}", ""],
    ]
    prompts, samples = generation["prompts"], generation["samples"]
    count = f"{counted(prompts, 'held-out prompt')} × {counted(samples, 'sampled answer')}"
    console.show_table(f"{count}, at most {generation['max_new_tokens']} tokens", ["", "value", "standard error"], rows)
    if "win_rate" in generation:
        won, rows = generation["win_rate"], []
        for name, part in (("raw", won), ("length-controlled", won["length_controlled"])):
            interval = "" if part["interval"] is None else "[{:.3f}, {:.3f}]".format(*part["interval"])
            rows.append([name, f"{part['mean']:.3f}", interval])
        title = f"Win rate against the reference, by {won['scorer']} ({won['ties']:.0%} ties)"
        console.show_table(title, ["", "share", "95 % interval"], rows)


def _with_error(part: dict[str, float | None]) -> tuple[str, str]:
    error = part["standard_error"]
    return f"{part['mean']:.4f}", "" if error is None else f"{error:.4f}"

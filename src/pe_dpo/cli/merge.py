"""`pe-dpo merge`."""

import json as json_module
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pe_dpo.cli import console
from pe_dpo.errors import UsageError
from pe_dpo.printable import counted, printable_json
from pe_dpo.quantizations import QUANTIZATIONS, QUANTIZATIONS_IN_WORDS


def merge(
    target: Annotated[Path, typer.Argument(help="A finished run, or any LoRA adapter.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the merged model; must not exist.")] = None,
    onto: Annotated[str, typer.Option(help="dequantized (what was trained), original, or adapter (no merge).")] = "dequantized",
    compare: Annotated[bool, typer.Option("--compare", help="Measure all ways to serve; with -o, merge after it.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), bf16, fp16 or fp32.")] = "auto",
    rounding: Annotated[str, typer.Option(help="auto, nearest or stochastic.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of stochastic rounding.")] = 0,
    sft: Annotated[Path | None, typer.Option(help="An adapter that was active under this one in training.")] = None,
    scale: Annotated[float, typer.Option(help="Serve W0 + a·ΔW: a < 1 is toward the reference, a > 1 beyond.")] = 1.0,
    best: Annotated[
        bool, typer.Option("--best", help="Of a run: the adapter of its best evaluation (train.keep_best).")
    ] = False,
    data: Annotated[str | None, typer.Option(help="Pairs to verify on; default: those the run held out.")] = None,
    pairs: Annotated[int | None, typer.Option(min=0, help="How many: default 32, and 200 to compare; 0: tensors only.")] = None,
    base: Annotated[str | None, typer.Option(help="Where the base lies now, if it moved.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help=f"How a foreign adapter's base is loaded: {QUANTIZATIONS_IN_WORDS}.")
    ] = None,
    allow_base_mismatch: Annotated[bool, typer.Option("--allow-base-mismatch", help="Merge onto another base.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write a merge that failed verification; its report says so.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Merge adapter and base into one model, and prove that it does what was trained; write nothing where it does not."""
    ignored = {"--dtype": dtype != "auto", "--rounding": rounding != "auto", "--force": force}
    is_copied = (
        sft is None and scale == 1 and not (target / ("best/trained" if best else "trained")).is_dir()
    )  # there a run over an adapter has its own
    if is_copied:
        ignored |= {"--pairs": pairs is not None, "--data": data is not None}
    words = {"--onto": onto, "--dtype": dtype, "--rounding": rounding, "--quantize": quantize}
    _check_request(target, output, words, compare=compare, ignored=[name for name, given in ignored.items() if given])
    if compare and pairs == 0:
        raise UsageError("--compare needs pairs to compare on; leave --pairs out, or name a number")

    console.start(is_silent=json)
    source: dict[str, Any] = {
        "data": data,
        "base": base,
        "quantize": quantize,
        "sft": sft,
        "scale": scale,
        "allow_base_mismatch": allow_base_mismatch,
        "best": best,
    }
    plan: dict[str, Any] = {"dtype": dtype, "rounding": rounding, "seed": seed}
    found: dict[str, Any] = {}
    if compare:
        place = output.absolute().parent if output else None
        found |= _compare(target, place, {**source, "pairs": 200 if pairs is None else pairs}, plan, show=not json)
    if output is not None:
        source["pairs"] = 32 if pairs is None else pairs
        if onto == "adapter":
            found |= _package(target, output, source | ({"pairs": 0} if is_copied else {}), show=not json)
        else:
            found |= _merge(target, output, {**source, **plan, "onto": onto, "force": force}, show=not json)
    if json:
        typer.echo(printable_json(json_module.dumps(found, indent=1, ensure_ascii=False)))


def _check_request(
    target: Path, output: Path | None, words: dict[str, str | None], *, compare: bool, ignored: list[str]
) -> None:
    """Refuse words that there are not, and options that `--onto adapter` ignores."""
    for name, known in (
        ("--onto", ("dequantized", "original", "adapter")),
        ("--dtype", ("auto", "bf16", "fp16", "fp32")),
        ("--rounding", ("auto", "nearest", "stochastic")),
        ("--quantize", (None, *QUANTIZATIONS)),
    ):
        if words[name] not in known:
            raise UsageError(f"{name} {words[name]}: write {', '.join(word for word in known if word)}")
    if words["--onto"] == "adapter" and not compare and ignored:
        raise UsageError(f"--onto adapter merges nothing; leave {', '.join(ignored)} out")
    if not target.is_dir():
        raise UsageError(f"{target}: no such folder; name a run or an adapter on disk")
    if output is None and not compare:
        raise UsageError("name the folder of the merged model with -o, or ask for --compare")


def _merge(target: Path, output: Path, settings: dict[str, Any], *, show: bool) -> dict[str, Any]:
    from pe_dpo.merging.merge import merge as run
    from pe_dpo.runs.serving import model_commands

    report = run(target, output, **settings).report
    if not show:
        return report
    kept = [tensor["kept"] for tensor in report["tensors"] if tensor["kept"] is not None]
    if kept:
        spread = f"per tensor {min(kept):.3f} to {max(kept):.3f}"
        console.say(f"{report['mean_kept']:.4f} of the update is in the files ({spread}, {len(report['tensors'])} tensors)")
    if kept and 6 * report["mean_noise"] > 0.5:
        console.warn(f"the update is small beside the rounding of {report['dtype']}; --dtype fp16 or fp32 keeps it better")
    if report["held_out"]:
        _show_held_out(report)
    for fault in report["faults"]:
        console.warn(fault)
    console.say(f"{report['verdict']}: {output}")
    for command in (
        *model_commands(str(output)),
        shlex.join(["pe-dpo", "export", str(output), "-o", f"{output}-gguf", "--gguf", "q8_0"]),
    ):
        console.say(f"next: {command}")
    console.say(f"all ways, and why: {shlex.join(['pe-dpo', 'serve', str(output)])}")
    return report


def _show_held_out(report: dict[str, Any]) -> None:
    from pe_dpo.merging.behaviour import name_expected

    name, cause = name_expected(report["scale"])
    rows = []
    for title, key, shape in (
        (f"KL({name} ‖ it), nats a position", "kl", "{:.2e}"),
        (f"… of what {cause} changed", "relative_kl", "{:.2e}"),
        ("preference shift, nats a pair", "shift", "{:+.4f}"),
        (f"… share of the {name} one kept", "shift_kept", "{:.4f}"),
        ("same most likely token", "top1", "{:.2%}"),
    ):
        columns = [report["held_out"], *([report["noise_floor"]] if report["noise_floor"] else [])]
        rows.append([title, *("–" if one is None or one[key] is None else shape.format(one[key]) for one in columns)])
    pairs, moved = counted(report["held_out_pairs"], "held-out pair"), report["held_out"]["shift_trained"]
    title = f"What it keeps of training, on {pairs}; {name} shift {moved:+.4f} nats"
    header = ["", "merged", *([f"{name}, {report['noise_floor_is']}"] if report["noise_floor"] else [])]
    console.show_table(title, header, rows)
    change = report["against_the_quantized_base"]
    if change and change["relative_kl"] is not None:
        console.warn(
            f"against the {name} adapter on the quantized base: relative KL {change['relative_kl']:.2e}, "
            f"shift {change['shift']:+.4f} ({name} {change['shift_trained']:+.4f})"
        )


def _package(target: Path, output: Path, settings: dict[str, Any], *, show: bool) -> dict[str, Any]:
    from pe_dpo.merging.adapter_package import package_adapter
    from pe_dpo.merging.servers import shell_lines
    from pe_dpo.merging.source import open_source
    from pe_dpo.runs.staging import check_free

    check_free(output)
    with open_source(target, **settings) as source:
        servings, held_out = package_adapter(source, output)
    if show:
        console.say(f"adapter, tokenizer and the recipe of its base: {output}")
        if held_out is not None and held_out.shift_kept is not None:
            pairs = len(source.pairs)
            console.say(f"on {pairs} held-out pairs it keeps {held_out.shift_kept:.4f} of the preference shift of training")
        for line in shell_lines(servings):
            console.say(line)
    commands = [serving.command for serving in servings if serving.command is not None]
    measured = held_out.to_dict() if held_out else None
    return {"folder": str(output), "scale": source.scale, "held_out": measured, "commands": commands}


def _compare(target: Path, place: Path | None, settings: dict[str, Any], plan: dict[str, Any], *, show: bool) -> dict[str, Any]:
    from pe_dpo.merging.compare import compare_merges
    from pe_dpo.merging.source import describe_scale, open_source
    from pe_dpo.metrics.catalogue import METRICS
    from pe_dpo.metrics.estimates import wilson_interval

    with open_source(target, **settings) as source:
        candidates = compare_merges(source, work=place, **plan)
    pairs, scale = len(source.pairs), source.scale
    prompts = len({pair.prompt_key for pair in source.pairs})  # as if the pairs of each were all alike: never too narrow
    rows = []
    for name, found, kept in candidates:
        low, high = wilson_interval(found.accuracy, prompts)
        relative = "–" if found.relative_kl is None else f"{found.relative_kl:.1e}"
        accuracy = f"{found.accuracy:.3f} [{low:.2f}, {high:.2f}]"
        share = "–" if kept is None else f"{kept:.3f}"
        rows.append([name, accuracy, f"{found.shift:+.4f}", relative, f"{found.nll:.4f}", share])
    if show:
        titles = METRICS["accuracy/policy"].title, METRICS["nll/chosen_per_token"].title
        header = ["", titles[0], "preference shift, nats a pair", "relative KL", titles[1], "update kept"]
        scaled = f", {describe_scale(scale)}" if scale != 1 else ""
        console.show_table(f"{pairs} held-out pairs{scaled} (95 % Wilson intervals; nats)", header, rows)
    return {"scale": scale, "compared": [{"name": name, **found.to_dict(), "kept": kept} for name, found, kept in candidates]}

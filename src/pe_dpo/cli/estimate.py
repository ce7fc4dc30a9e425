"""`pe-dpo estimate`: memory, hours and disk of a run, before anything of it is fetched or loaded."""

import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

from pe_dpo.cli import console, options

if TYPE_CHECKING:
    from pe_dpo.estimate import Estimate


def estimate(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help='A card ("RTX 4090", H200) or a size (24GB), or cpu; default: the one here, else 24GB.'),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", help="Mean tokens of prompt, chosen and rejected, as 170,320,320; default: the data's own."),
    ] = None,
    pairs: Annotated[int | None, typer.Option("--pairs", min=1, help="With --tokens: how many pairs there are.")] = None,
    set_: options.Settings = None,
    json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON, in bytes and seconds.")] = False,
) -> None:
    """Say what a run takes: memory by part, the rows that fit, hours, disk, the merge; exit 1 where it does not fit."""
    from pe_dpo.errors import DataError, UsageError
    from pe_dpo.recipe import load_recipe

    plan = load_recipe(recipe, options.overrides(set_))
    console.start(is_silent=True)
    from pe_dpo.estimate import estimate_run, find_card, local_card
    from pe_dpo.estimate.cards import DEFAULT
    from pe_dpo.estimate.lengths import made_up_lengths

    if pairs is not None and tokens is None:
        raise UsageError("--pairs: says how many pairs there are whose mean lengths --tokens gives; give both")
    lengths = None
    if tokens is not None:
        try:
            means = [float(word) for word in tokens.split(",")]
        except ValueError as error:
            raise UsageError(f"--tokens {tokens}: write three numbers with commas between them, as 170,320,320") from error
        lengths = made_up_lengths(plan, means, pairs=pairs or 10_000)
    card = None
    if gpu is None:
        card = local_card() or find_card(DEFAULT)
    elif gpu.lower() != "cpu":
        card = find_card(gpu)
    try:
        found = estimate_run(plan, card, lengths=lengths)
    except DataError as error:
        raise DataError(f"{error}; of data that are not here give mean lengths, --tokens 170,320,320, and --pairs") from error
    if json:
        typer.echo(json_module.dumps(found.to_dict(), indent=1))
    else:
        typer.echo("\n".join(_screen(plan.model.base, found)))
    if not found.fits:
        raise typer.Exit(1)


def _screen(base: str, found: "Estimate") -> list[str]:
    """The estimate on one screen of 80 columns."""
    from pe_dpo.estimate import CARDS, knobs
    from pe_dpo.estimate.estimate import duration

    setup, card, shape = found.setup, found.card, found.setup.shape
    dtype = "bfloat16" if setup.width == 2 else "float32"
    unit, name_of = (1e9, "GB") if found.peak > 1e8 else (1e6, "MB")
    lines = [
        f"{base}: {_billions(shape.parameters)} parameters, {setup.quantize}, {dtype}, rank {setup.rank:g}",
        f"on {card.name}: {card.bytes / 1e9:.1f} GB, {card.usable / 1e9:.1f} without CUDA's own" if card else "on the CPU",
        "",
    ]
    how = {None: "activations kept", 0: "activations recomputed"}.get(
        setup.recomputes_above, f"recomputed above {setup.recomputes_above:,}" if setup.recomputes_above else ""
    )
    names = {
        "codes": f"{_billions(setup.coded)} weights as codes, with scales",
        "weights": ("what is not codes" if setup.coded else "all") + (", in 16 bits" if setup.width == 2 else ", in 32 bits"),
        "adapters": f"{setup.trained / 1e6:,.1f} M parameters trained, in 32 bits",
        "gradients": "of these",
        "optimizer": setup.optimizer,
    }
    fixed = {name: found.parts[name] for name in names}
    activations = sum(size for name, size in found.parts.items() if name not in names)
    lines += [f"  {name:<12} {size / unit:>6.2f} {name_of}   {names[name]}" for name, size in fixed.items() if size]
    lines.append(f"  {'rows':<12} {activations / unit:>6.2f} {name_of}   of up to {found.budget:,} tokens; {how}")
    lines.append(f"  {'at the worst':<12} {found.peak / unit:>6.2f} {name_of}   {_verdict(found)}")
    if not found.fits:
        lines.append("what saves memory, each by itself:")
        lines += [f"  {knob.saved / 1e9:>5.2f} GB   {knob.setting} ({knob.costs})" for knob in knobs(found)[:6]]
    prompt, chosen, rejected = found.lengths.means()
    lines += [
        "",
        *_folded(
            f"{found.lengths.pairs:,} pairs of {prompt:.0f} + {chosen:.0f} + {rejected:.0f} tokens ({found.lengths.source})"
        ),
    ]
    if card is not None:
        reference = f", {found.reference.seconds:.1f} s more for the reference" if found.uses_reference else ""
        if found.fits:
            steps = f"{found.steps:,} steps of {found.step.seconds:.1f} s{reference}"
            lines.append(f"{steps}; {duration(found.seconds)} in all")
        others = [name for name in ("RTX 3090", "RTX 4090", "A100 80GB", "H100", "H200") if name != card.name]
        times = [(name, found.on(next(one for one in CARDS if one.name == name))) for name in others]
        lines += _folded("elsewhere: " + ", ".join(f"{name} {duration(one.seconds)}" for name, one in times if one.fits))
        if found.fits:
            lines.append(f"counted with {card.reached:.0%} of {card.tflops:g} TFLOP/s, 90% of {card.bandwidth:g} GB/s")
    disk = ", ".join(f"{name} {_size(size)}" for name, size in found.disk.items())
    lines += _folded(f"disk: {disk}")
    written, *verified = ((name.removeprefix("verified "), _size(size)) for name, size in found.merging.items())
    ways = ", ".join(f"{name} {size}" for name, size in verified)
    lines += _folded(f"merge: {written[1]} of RAM; to verify it, there or on the card: {ways}")
    return lines + [line for note in found.notes for line in _folded(f"note: {note}")]


def _verdict(found: "Estimate") -> str:
    if found.card is None:
        return "beside Python and its libraries"
    if not found.fits and found.check >= found.least:
        return f"does not fit: the check before training needs {found.needed / 1e9:.1f} GB"
    if not found.fits:
        return f"does not fit: {found.needed / 1e9:.1f} GB are needed"
    if found.check >= sum(found.parts.values()):
        return "fits; the check before training is the worst"
    return f"fits; {found.needed / 1e9:.1f} GB at least, with smaller rows"


def _billions(count: float) -> str:
    return f"{count / 1e9:,.2f} B" if count > 1e8 else f"{count / 1e6:,.1f} M"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _folded(line: str) -> list[str]:
    import textwrap

    return textwrap.wrap(line, 80, subsequent_indent="  ")

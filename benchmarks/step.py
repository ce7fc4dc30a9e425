"""The command `step`: TRL's grid, agreement, the ladder in interleaved rounds, and memory."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import agreement, memory, plot
from benchmarks.models import saved_base
from benchmarks.ours import FULL_STACK, IN_STEP, ONE_ROW, OurStep, ladder
from benchmarks.pairs import draw, facts, facts_lines, graph_tokens, histogram, population
from benchmarks.results import Settings, save
from benchmarks.rounds import Step, ratio, run_rounds, spread, timed
from benchmarks.trl_side import PeerStep, default_point, grid, smallest_point

FINALISTS = 2
"""Points of TRL's grid that go into the rounds for their speed in the screening; one round of it may err about the first."""

WITHOUT_MEMORY = ("+ head on answers only", "full stack, dense mask", "package's padded path (reference in step)")
"""Variants whose memory teaches nothing that the others' does not."""


class Peer(NamedTuple):
    """A grid point that goes into the rounds."""

    step: PeerStep
    outcome: agreement.Outcome


Differences = dict[str, dict[str, dict[str, float]]]


def run_step(settings: Settings) -> None:
    """Time the step of every variant and write and print what was found."""
    everything = population(settings.shape)
    pairs = draw(everything, settings.shape)
    token_facts = {"population": facts(everything), "batch": facts(pairs)}
    for name, found in token_facts.items():
        print("\n".join(facts_lines(f"{settings.shape} {name}", found)))
    peers, screening, differences = _screen_grid(settings, pairs)
    ours = _check_ladder(settings, pairs, peers, differences)
    agreement.print_table(differences, peers[0].step.name, settings.dtype)
    steps: dict[str, Step] = {peer.step.name: peer.step for peer in peers} | {step.name: step for step in ours}
    print(f"\nRounds: {len(steps)} variants, {settings.rounds} rounds", flush=True)
    seconds = run_rounds(steps, settings.rounds)
    default = peers[0].step.name
    best = min((peer.step.name for peer in peers), key=lambda name: spread(seconds[name]).median)
    _print_rounds(seconds, default, best, token_facts["batch"])
    content: dict[str, Any] = {
        "settings": {"shape": settings.shape, "dtype": settings.dtype, "model": settings.model, "quick": settings.is_quick},
        "tokens": {name: found._asdict() for name, found in token_facts.items()} | {"histogram": histogram(everything)},
        "tokens_with_each_answer_once": graph_tokens(pairs),
        "agreement": differences,
        "screening_seconds": screening,
        "trl_default": default,
        "trl_best": best,
        "round_seconds": seconds,
        "ratios": {name: _ratios(seconds, name, default, best) for name in seconds},
    }
    save(settings, content)
    if not settings.is_quick:
        measured = [name for name in steps if name not in WITHOUT_MEMORY]
        content["peak_mib"] = _measure_memory(settings, measured, default, best)
        save(settings, content)
    print(f"\nwritten: {save(settings, content).name}, {plot.plot_step(settings.out / f'{settings.name}.json').name}")


def _screen_grid(settings: Settings, pairs: Sequence[Any]) -> tuple[list[Peer], dict[str, float], Differences]:
    """Check every grid point against TRL's default, time it once, and return those that go into the rounds, default first."""
    default = default_point(settings.shape, settings.dtype)
    always = {default.name, smallest_point(settings.dtype).name}
    peers: dict[str, Peer] = {}
    seconds: dict[str, float] = {}
    differences: Differences = {}
    reference: dict[str, agreement.Outcome] = {}
    print(f"\nTRL's grid, {settings.dtype}, one round, CPU seconds per optimizer batch")
    for point in grid(settings.shape, settings.dtype, quick=settings.is_quick):
        step = PeerStep(point, pairs, saved_base(settings.model))
        taken, loss = timed(step)
        found = agreement.outcome(step.trainer.model, loss)
        step.model.zero_grad(set_to_none=True)
        reference = reference or {point.name: found}
        differences[point.name] = agreement.compare(point.name, found, reference, settings.dtype)
        seconds[point.name], peers[point.name] = taken, Peer(step, found)
        print(f"  {point.name:<60} {taken:6.2f}", flush=True)
        fastest = sorted(seconds, key=seconds.__getitem__)[:FINALISTS]
        peers = {name: peer for name, peer in peers.items() if name in always or name in fastest}
    return list(peers.values()), seconds, differences


def _check_ladder(settings: Settings, pairs: Sequence[Any], peers: Sequence[Peer], differences: Differences) -> list[OurStep]:
    """Return our variants, warmed up and checked against TRL's default and the fast points of its grid."""
    outcomes = {peer.step.name: peer.outcome for peer in peers}
    steps = []
    for rung in ladder(quick=settings.is_quick):
        step = OurStep(rung, pairs, settings.model, settings.dtype)
        found = agreement.outcome(step.model, step())
        step.model.zero_grad(set_to_none=True)
        differences[step.name] = agreement.compare(step.name, found, outcomes, settings.dtype)
        steps.append(step)
    return steps


def _ratios(seconds: Mapping[str, Sequence[float]], name: str, default: str, best: str) -> dict[str, list[float]]:
    """Times faster than TRL's default and best: median, smallest, largest over the rounds."""
    return {
        "over_trl_default": list(ratio(seconds, name, default)),
        "over_trl_best": list(ratio(seconds, name, best)),
    }


def _print_rounds(seconds: Mapping[str, Sequence[float]], default: str, best: str, batch: Any) -> None:
    print(f"\nTRL default: {default}\nTRL best:    {best}")
    print(f"plain/shared {batch.plain_over_shared:.2f}, padded/plain {batch.padded_over_plain}")
    print(f"{'':<60} {'CPU s':>18} {'plain tok/s':>11} {'pairs/s':>7}   {'× TRL default':>19} {'× TRL best':>19}")
    for name, values in seconds.items():
        middle = spread(values)
        speeds = f"{batch.plain / middle.median:11.0f} {batch.pairs / middle.median:7.2f}"
        over = f"{ratio(seconds, name, default)!s:>19} {ratio(seconds, name, best)!s:>19}"
        print(f"{name:<60} {middle!s:>18} {speeds}   {over}")


def _measure_memory(settings: Settings, names: Sequence[str], default: str, best: str) -> dict[str, float]:
    print("\nPeak memory of one step above what was resident before it, each in a fresh process")
    peaks = memory.measure(names, settings)
    for name in (IN_STEP, FULL_STACK, ONE_ROW):
        if name in peaks:
            print(f"  {name}: {peaks[name] / peaks[default]:.2f} of TRL default, {peaks[name] / peaks[best]:.2f} of TRL best")
    return peaks

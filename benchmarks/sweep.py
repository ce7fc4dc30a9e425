"""The command `sweep`: eight values of the loss's coefficient, three epochs each, one after another.

Ours sweeps γ over one store of references. TRL has no γ and sweeps β. Its references are computed anew for each run, since
their cache lies in a temporary folder of the process when the data set is in memory. With a data set on disk, and the same seed
and adapter, it would be found again; the line "TRL best, cache found" says what the sweep would then cost.
"""

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.epochs import Timeline, best_point, new_store, train_ours, train_trl
from benchmarks.pairs import PAIRS_PER_STEP, draw, facts, facts_lines, population
from benchmarks.results import Settings, save
from benchmarks.trl_side import default_point, parse_point
from pe_dpo.data.pairs import EncodedPair

VALUES = (0.0125, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
"""Of γ for us, of β for TRL."""


def run_sweep(settings: Settings) -> None:
    """Run every point on every side and write and print the totals."""
    size = PAIRS_PER_STEP[settings.shape]
    pairs = draw(population(settings.shape), settings.shape, steps=(settings.pairs or size) // size)
    values = VALUES[:2] if settings.is_quick else VALUES
    print("\n".join(facts_lines(f"{settings.shape} sweep", facts(pairs))))
    points = {
        "TRL default": default_point(settings.shape, settings.dtype).name,
        "TRL best": best_point(settings).name,
    }
    timelines = _run_points(settings, pairs, size, values, points)
    totals = {name: sum(timeline.until(settings.epochs) for timeline in runs) for name, runs in timelines.items()}
    first, *others = timelines["TRL best"]
    totals["TRL best, cache found"] = totals["TRL best"] - sum(t.reference for t in others)
    ratios = {name: total / totals["ours"] for name, total in totals.items()}
    print(f"\n{len(first.epochs)} epochs × {len(timelines['ours'])} values, {len(pairs)} pairs, CPU seconds:")
    for name, total in totals.items():
        print(f"  {name:<24} {total:7.1f}   {ratios[name]:5.2f} × ours   {points.get(name, '')}")
    content: dict[str, Any] = {
        "tokens": facts(pairs)._asdict(),
        "values": values,
        "trl_points": points,
        "timelines": {name: [timeline._asdict() for timeline in runs] for name, runs in timelines.items()},
        "total_seconds": totals,
        "over_ours": ratios,
    }
    print(f"\nwritten: {save(settings, content).name}")


def _run_points(
    settings: Settings, pairs: Sequence[EncodedPair], size: int, values: Sequence[float], points: dict[str, str]
) -> dict[str, list[Timeline]]:
    """Run the sides of each value in random order; Ctrl-C ends after the values that are complete."""
    order = random.Random(0)
    store = new_store()
    timelines: dict[str, list[Timeline]] = {"TRL default": [], "TRL best": [], "ours": []}
    try:
        for value in values:
            one: dict[str, Timeline] = {}
            for name in order.sample(list(timelines), len(timelines)):
                if name == "ours":
                    one[name] = train_ours(pairs, settings, size, gamma=value, store=store)
                else:
                    one[name] = train_trl(parse_point(points[name]), pairs, settings, size, beta=value)
            for name, timeline in one.items():
                timelines[name].append(timeline)
            print(f"  {value}: " + ", ".join(f"{n} {t.until(settings.epochs):.1f} s" for n, t in one.items()), flush=True)
    except KeyboardInterrupt:
        print("  interrupted: complete values are kept")
        if not timelines["ours"]:
            raise
    return timelines

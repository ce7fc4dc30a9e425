"""The command `run`: whole training runs of one and of three epochs, the reference pass and the optimizer included."""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from benchmarks.models import LEARNING_RATE, adapter_of, base_facts, load_policy, saved_base
from benchmarks.ours import dpo_loss
from benchmarks.pairs import PAIRS_PER_STEP, draw, facts, facts_lines, population
from benchmarks.results import Settings, load, save, temporary_folder
from benchmarks.rounds import Spread, ratio, spread, timed
from benchmarks.trl_side import GridPoint, default_point, make_trainer, parse_point, smallest_point
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.estimate.rows import CPU_TOKENS
from pe_dpo.inference.policy import Policy
from pe_dpo.inference.reference import open_reference
from pe_dpo.inference.scorer import choose_scorer

STEPS = 4
"""Optimizer batches per epoch, by default."""
MAX_GRADIENT_NORM = 1.0
"""TRL's default."""
LOSS_TOLERANCES = {"fp32": 1e-3, "bf16": 3e-2, "nf4": 3e-2}
"""Largest relative difference of the first epoch's losses; small differences grow from step to step under Adam."""


class Timeline(NamedTuple):
    """CPU seconds of one run, and its losses."""

    setup: float
    """Loading, the adapter, and the reference pass where there is one."""
    epochs: list[float]
    """Of each epoch: data, forward, backward, clipping, optimizer."""
    losses: list[float]
    """Of each optimizer step."""
    reference: float
    """Of the reference pass, part of `setup`."""

    def until(self, epochs: int) -> float:
        """Return the seconds of a run of so many epochs."""
        return self.setup + sum(self.epochs[:epochs])


def run_epochs(settings: Settings) -> None:
    """Time whole runs of TRL's default, TRL's best and ours, interleaved, and write and print the ratios."""
    size = PAIRS_PER_STEP[settings.shape]
    steps = (settings.pairs or size * (1 if settings.is_quick else STEPS)) // size
    pairs = draw(population(settings.shape), settings.shape, steps=steps)
    print("\n".join(facts_lines(f"{settings.shape} run", facts(pairs))))
    contestants = contestants_of(settings, pairs, size)
    order = random.Random(0)
    timelines: dict[str, list[Timeline]] = {name: [] for name in contestants}
    try:
        for number in range(1, settings.rounds + 1):
            one = {name: contestants[name]() for name in order.sample(list(contestants), len(contestants))}
            for name, timeline in one.items():
                timelines[name].append(timeline)
            check_losses({name: timeline.losses[: len(pairs) // size] for name, timeline in one.items()}, settings.dtype)
            print(
                f"  round {number}: " + ", ".join(f"{n} {t.until(settings.epochs):.0f} s" for n, t in one.items()), flush=True
            )
    except KeyboardInterrupt:
        print("  interrupted: complete rounds are kept")
        if not timelines["ours"]:
            raise
    totals = {n: {name: [t.until(n) for t in runs] for name, runs in timelines.items()} for n in (1, settings.epochs)}
    content = {
        "tokens": facts(pairs)._asdict(),
        "trl_points": {"TRL default": _default(settings).name, "TRL best": best_point(settings).name},
        "timelines": {name: [timeline._asdict() for timeline in runs] for name, runs in timelines.items()},
        "ratios": {f"{n} epochs": _ratios(seconds) for n, seconds in totals.items()},
    }
    _print_totals(totals, content["trl_points"])
    print(f"\nwritten: {save(settings, content).name}")


def contestants_of(settings: Settings, pairs: Sequence[EncodedPair], size: int) -> dict[str, Callable[[], Timeline]]:
    """Return what to run: TRL's default, TRL's best, and ours."""
    return {
        "TRL default": lambda: train_trl(_default(settings), pairs, settings, size),
        "TRL best": lambda: train_trl(best_point(settings), pairs, settings, size),
        "ours": lambda: train_ours(pairs, settings, size, store=new_store()),
    }


def new_store() -> Path:
    """Return the file of an empty reference store."""
    return temporary_folder() / "references.sqlite"


def best_point(settings: Settings) -> GridPoint:
    """Return TRL's best point: as asked, or as `step` found it, or one pair at a time without checkpointing."""
    if settings.best:
        return parse_point(settings.best)
    found = settings.out / f"step-{settings.shape}-{settings.dtype}-{settings.model}.json"
    return parse_point(load(found)["trl_best"]) if found.is_file() else smallest_point(settings.dtype)


def train_trl(
    point: GridPoint, pairs: Sequence[EncodedPair], settings: Settings, size: int, *, beta: float | None = None
) -> Timeline:
    """Run TRL's `trainer.train()`, with its precomputation if the point has one."""
    options = {} if beta is None else {"beta": beta}
    setup, trainer = timed(
        lambda: make_trainer(
            point,
            pairs,
            saved_base(settings.model),
            pairs_per_step=size,
            epochs=settings.epochs,
            **options,
        )
    )
    clock = _EpochClock()
    trainer.add_callback(clock)
    gc.collect()
    clock.start()
    trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return Timeline(setup, clock.seconds, losses, trainer.reference_seconds)


def train_ours(
    pairs: Sequence[EncodedPair], settings: Settings, size: int, *, store: Path, gamma: float | None = None
) -> Timeline:
    """Run our training in a plain loop over the package's parts.

    The set-up has all that `pe-dpo train` does before its first step with the model: the packed path tried against the padded
    one, the base's fingerprint, the store opened, and the references that are not in it.

    Args:
        pairs: optimizer batch after optimizer batch.
        settings: give model and dtype.
        size: pairs per optimizer batch.
        store: file of the reference store.
        gamma: of the loss; None for β.
    """
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]

    def prepare() -> Any:
        model = load_policy(settings.model, settings.dtype)
        scorer = choose_scorer(model, pairs, packing=True, token_budget=CPU_TOKENS)
        policy = Policy(model, None, base_facts(settings.model, settings.dtype), ())
        reference = open_reference(policy, scorer, caching="store", path=str(store))
        parameters = list(adapter_of(model).values())
        return model, scorer, reference, parameters, torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def score_references() -> None:
        reference.logprobs(pairs)
        reference.flush()

    loading, (model, scorer, reference, parameters, optimizer) = timed(prepare)
    reference_seconds, _ = timed(score_references)
    losses: list[float] = []

    def epoch() -> None:
        for batch in batches:
            losses.append(0.0)
            known = reference.logprobs(batch)
            for row in scorer.split(batch):
                policy = scorer.logprobs(model, [batch[index] for index in row])
                loss = dpo_loss(policy, type(known)(*(field[row] for field in known)), gamma=gamma).sum() / size
                loss.backward()
                losses[-1] += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    epochs = [timed(epoch)[0] for _ in range(settings.epochs)]
    return Timeline(loading + reference_seconds, epochs, losses, reference_seconds)


def check_losses(losses: Mapping[str, Sequence[float]], dtype: str) -> None:
    """Check that the losses of the first epoch are the same everywhere.

    Raises:
        RuntimeError: they differ by more than `LOSS_TOLERANCES`.
    """
    for name, values in losses.items():
        worst = max(abs(a / b - 1) for a, b in zip(values, losses["TRL default"], strict=True))
        if worst > LOSS_TOLERANCES[dtype]:
            raise RuntimeError(f"{name}: losses differ from TRL's default by {worst:.1e}: {values} {losses['TRL default']}")


class _EpochClock(TrainerCallback):
    """CPU seconds of each epoch of a Trainer."""

    def start(self) -> None:
        """Start the first epoch's clock; Trainer's own set-up counts."""
        self.seconds: list[float] = []
        self.last = time.process_time()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Note the end of an epoch."""
        now = time.process_time()
        self.seconds.append(now - self.last)
        self.last = now


def _default(settings: Settings) -> GridPoint:
    return default_point(settings.shape, settings.dtype)


def _ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {f"ours over {peer}": list(ratio(seconds, "ours", peer)) for peer in ("TRL default", "TRL best")}


def _print_totals(totals: Mapping[int, Mapping[str, Sequence[float]]], points: Mapping[str, str]) -> None:
    print("\n" + "\n".join(f"{name}: {point}" for name, point in points.items()))
    for epochs, seconds in totals.items():
        print(f"{epochs} epoch{'s' * (epochs > 1)}, CPU seconds with loading, reference and optimizer:")
        for name, values in seconds.items():
            print(f"  {name:<12} {spread(values)}")
        for name, values in _ratios(seconds).items():
            print(f"  {name:<22} {Spread(*values)}×")

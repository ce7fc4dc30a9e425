"""What a run will take, before anything of it is loaded: memory and what it is made of, the row that fits, hours, disk, the
merge.

recipe ── config.json ──► shape ──┐
       ── data, or means ──► lengths ──► rows ──► memory ──► fits?   knobs that would make it
card ─────────────────────────────┘                └──► hours
"""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pe_dpo.data import EncodedPair
from pe_dpo.data.encoded import lengths as sizes_of
from pe_dpo.errors import ModelError, RecipeError
from pe_dpo.estimate.bases import find_config
from pe_dpo.estimate.cards import Card
from pe_dpo.estimate.lengths import Lengths, encoded_lengths, known_lengths, row_of, rows_of
from pe_dpo.estimate.memory import Row, Setup
from pe_dpo.estimate.merging import DISK_DTYPE_BYTES, measuring_ways
from pe_dpo.estimate.rows import MOST_TOKENS, SHARE_OF_FREE, cpu_rows, plan_rows
from pe_dpo.estimate.shape import BaseShape, Weight, shape_of
from pe_dpo.estimate.time import NOTHING, StepTime, rows_time
from pe_dpo.inference.scorer import DENSE_TOKENS, ScoringPath, possible_paths
from pe_dpo.model.base import LARGE_BASE, BaseInfo, as_it_comes
from pe_dpo.model.out_of_memory import host_memory
from pe_dpo.model.road import files_here, stored_codes
from pe_dpo.model.tensor_files import TensorFiles
from pe_dpo.recipe import Recipe

logger = logging.getLogger(__name__)

LAID_STEPS = 6
"""Optimizer steps whose rows are laid out; the fullest of them stands for the run's."""
EVALUATIONS = 10
"""Of a run, unless it says how often: each tenth."""
STORED_ANSWER_BYTES = 120
"""Of an answer in the store of the reference, index included."""
TOKENIZER_BYTES = 12_000_000


class Estimate(NamedTuple):
    """What a run will take."""

    recipe: Recipe
    setup: Setup
    lengths: Lengths
    card: Card | None
    """None for the CPU."""
    budget: int
    """Most tokens of a row."""
    row: Row
    """The fullest of the rows that were laid out."""
    parts: dict[str, float]
    """Bytes at the worst moment, by what takes them."""
    check: float
    """Bytes at the worst moment of the check before training."""
    least: float
    """Bytes with the longest pair alone in its row: less than that does not do."""
    steps: int
    step: StepTime
    """Forward and backward of one optimizer step; of a CPU nothing is known."""
    reference: StepTime
    """The reference's share of a step in which it is computed."""
    seconds: float
    """Of the run, with its evaluations; 0 for the CPU."""
    disk: dict[str, int]
    merging: dict[str, float]
    notes: list[str]

    @property
    def uses_reference(self) -> bool:
        """Whether training runs the reference."""
        return self.recipe.loss.uses_reference

    @property
    def needed(self) -> float:
        """Bytes without which it cannot run: with the longest pair alone in its row, or in the check before training."""
        return max(self.least, self.check)

    @property
    def peak(self) -> float:
        """Bytes at the worst moment of the run."""
        return max(sum(self.parts.values()), self.check)

    @property
    def fits(self) -> bool:
        """Whether the longest pair fits alone, and the check before training; smaller rows are found by the run itself."""
        return self.card is None or self.needed <= self.card.usable

    def on(self, card: Card) -> "Estimate":
        """Return the same run on another card."""
        above = 0 if self.recipe.train.gradient_checkpointing is True else None
        setup = self.setup._replace(recomputes_above=above, offloads=False)
        return finish(self.recipe, setup, self.lengths, card, self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, in bytes and seconds; docs/estimate.md says what each key is."""
        setup, lengths, shape = self.setup, self.lengths, self.setup.shape
        return {
            "base": {
                "kind": shape.kind,
                "parameters": shape.parameters,
                "quantize": setup.quantize,
                "coded": setup.coded,
                "is_counted": shape.is_counted,
            },
            "card": self.card and {**self.card._asdict(), "bytes": self.card.bytes, "usable": self.card.usable},
            "fits": self.fits,
            "peak": round(self.peak),
            "needed": round(self.needed),
            "check": round(self.check),
            "parts": {name: round(size) for name, size in self.parts.items()},
            "rows": {
                "most_tokens": self.budget,
                "recomputed_above": setup.recomputes_above,
                "path": setup.path,
                **self.row._asdict(),
            },
            "data": {
                "pairs": lengths.pairs,
                "held_out": lengths.held_out,
                "mean_tokens": dict(zip(("prompt", "chosen", "rejected"), lengths.means(), strict=True)),
                "source": lengths.source,
            },
            "time": {
                "steps": self.steps,
                "step": self.step._asdict(),
                "reference": self.reference._asdict(),
                "seconds": self.seconds,
            },
            "disk": self.disk,
            "merge": {name: round(size) for name, size in self.merging.items()},
            "notes": self.notes,
        }

    def describe(self) -> str:
        """Return memory and hours in a line, as `pe-dpo check` ends with."""
        if self.card is None:
            return f"about {_gigabytes(self.peak)} of RAM beside Python's own"
        of = f"of {self.card.box} on {self.card.name}"
        if not self.fits:
            return f"does not fit: {_gigabytes(self.needed)} at least {of}; `pe-dpo estimate` says what saves memory"
        return f"about {_gigabytes(self.peak)} {of}, {duration(self.seconds)}"


def least(recipe: Recipe, setup: Setup, longest: EncodedPair) -> float:
    """Return the bytes of training with the longest pair alone in its row, recomputed where that is left open."""
    if recipe.train.gradient_checkpointing == "auto" and setup.device == "cuda":
        setup = setup._replace(recomputes_above=0, offloads=True)
    return sum(setup.fixed().values()) + sum(setup.row_peak(row_of([longest], setup.path)).values())


def check_before(setup: Setup, lengths: Lengths) -> float:
    """Return the bytes of the check before training: the longest pair scored the plain way, or two with gradients."""
    fixed = setup.fixed()
    plain, gradients = row_of([lengths.longest], "padded"), row_of(lengths.short, "padded")
    before = sum(fixed.values()) - fixed["gradients"] - fixed["optimizer"]
    return before + max(setup.plain_check(plain), setup.gradient_check(gradients))


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Return a time for people: 50 s, 12 min, 2 h 10, 3 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 1:
        return "under a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d}" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def estimate_run(recipe: Recipe, card: Card | None, *, lengths: Lengths | None = None) -> Estimate:
    """Return what a run of a recipe will take on a card.

    Args:
        recipe: of the run.
        card: None for the CPU.
        lengths: of its pairs; None to encode them, or to take what is known of their data set.

    Raises:
        ModelError: the base, its tokenizer or an adapter cannot be read.
        DataError: the data cannot be read, and nothing is known of them.
        RecipeError: an adapter's target matches nothing.
    """
    notes: list[str] = []
    config, source = find_config(recipe.model.base, recipe.model.revision)
    if source != "config.json":
        notes.append(f"{source}, as its files are not here")
    shape = shape_of(recipe.model.base, config)
    if not shape.is_counted:
        notes.append(f"{shape.kind}: an empty model was built to count its weights; what it keeps is counted as of a Llama")
    if shape.delta_layers:
        notes.append(f"{shape.delta_layers} of {shape.layers} layers do not attend; they are counted as if they did")
    setup = _setup(recipe, config, shape, card)
    if setup.stored is not None:
        try:
            info = BaseInfo(recipe.model.base, recipe.model.revision, config, 0, None, setup.quantize, torch.float32)
            setup = setup._replace(stored=_codes_in_files(files_here(info)) or setup.stored)
        except ModelError as error:
            notes.append(f"codes are counted as config.json says: {error}")
    if lengths is None:
        lengths = _lengths(recipe, shape)
    return finish(recipe, setup, lengths, card, notes)


def finish(
    recipe: Recipe,
    setup: Setup,
    lengths: Lengths,
    card: Card | None,
    notes: list[str] | None = None,
    *,
    tree_budget: int | None = None,
) -> Estimate:
    """Return what a run takes whose base and pairs are known already; see `estimate_run`.

    Args:
        recipe: of the run.
        setup: of its base.
        lengths: of its pairs.
        card: what it runs on; None for a CPU.
        notes: what is to be said besides.
        tree_budget: tokens of a row that spares reading something twice, where that is known.
    """
    setup, budget, counted_trees = _budget(recipe, setup, lengths, card)
    tree_budget = counted_trees if tree_budget is None else tree_budget
    if setup.path == "dense":
        budget = min(budget, DENSE_TOKENS)
    size = recipe.train.pairs_per_step
    batches = [lengths.sample[start : start + size] for start in range(0, len(lengths.sample), size)]
    steps = recipe.train.max_steps or -(-lengths.pairs // size) * recipe.train.epochs
    batches = batches[: max(1, int(min(len(batches), steps, LAID_STEPS)))]
    fixed, is_free = setup.fixed(), recipe.train.tokens_per_microbatch == "auto" and card is not None
    while True:
        laid = [rows_of(batch, budget, setup.path, tree_budget) for batch in batches]
        row = max((row for rows in laid for row in rows), key=lambda row: sum(setup.row_peak(row).values()))
        is_full = card is not None and sum(fixed.values()) + sum(setup.row_peak(row).values()) > card.usable
        if not (is_free and is_full and max(len(rows) for rows in laid) < size):
            break
        budget = int(0.9 * budget)  # as a run does that runs out of memory

    step = reference = NOTHING
    seconds = 0.0
    if card is not None:
        times = [rows_time(setup, rows, card) for rows in laid]
        asked = [rows_time(setup, rows, card, is_reference=True) for rows in laid]
        step = StepTime(*(sum(part) / len(times) for part in zip(*times, strict=True)))
        reference = StepTime(*(sum(part) / len(asked) for part in zip(*asked, strict=True)))
        seconds = _run_seconds(recipe, lengths, int(steps), step, reference)
    return Estimate(
        recipe=recipe,
        setup=setup,
        lengths=lengths,
        card=card,
        budget=budget,
        row=row,
        parts={**fixed, **setup.row_peak(row)},
        check=check_before(setup, lengths),
        least=least(recipe, setup, lengths.longest),
        steps=int(steps),
        step=step,
        reference=reference,
        seconds=seconds,
        disk=_disk(recipe, setup, lengths),
        merging=_merging(setup, lengths),
        notes=notes or [],
    )


def _setup(recipe: Recipe, config: Any, shape: BaseShape, card: Card | None) -> Setup:
    """How the recipe trains the base."""
    stored = getattr(config, "quantization_config", None)
    quantize = recipe.model.quantize
    if stored:
        quantize = as_it_comes(recipe.model.base, stored, quantize)
    elif quantize == "auto":
        quantize = "nf4" if shape.parameters >= LARGE_BASE else "none"
    dtype = recipe.model.dtype
    if dtype == "auto":
        dtype = "float32" if card is None else "bfloat16"
    device = "cpu" if card is None else "cuda"
    paths = possible_paths(device, getattr(torch, dtype), recipe.train.packing)
    usable = [path for path in paths if path == "padded" or shape.can_be_packed]
    path: ScoringPath = next((path for path in usable if not (path == "varlen" and shape.has_softcap)), "padded")

    adapter = recipe.adapter
    frozen = _adapter_sizes(adapter.of_reference)
    if adapter.start:
        sizes = _adapter_sizes(adapter.start)
        adapted = _matched(shape, sizes)
        trained = sum(numbers for _, numbers in sizes.values())
        rank = sum(rank for rank, _ in sizes.values()) / max(1, len(sizes))
    else:
        adapted = shape.adapted(adapter.targets, adapter.exclude)
        rank = adapter.rank
        trained = sum(adapter.rank * (weight.inputs + weight.outputs) * layers for weight, layers in adapted)
    return Setup(
        shape=shape,
        quantize=quantize,
        width=getattr(torch, dtype).itemsize,
        adapted=tuple(adapted),
        rank=rank,
        trained=trained,
        frozen=sum(numbers for _, numbers in frozen.values()),
        has_dropout=adapter.dropout > 0,
        optimizer=recipe.train.optimizer,
        path=path,
        device=device,
        recomputes_above=0 if recipe.train.gradient_checkpointing is True else None,
        with_experts=recipe.model.quantize_experts and not stored,
        stored=shape.coded_but_for(stored.get("llm_int8_skip_modules")) if stored else None,
    )


def _codes_in_files(files: TensorFiles | None) -> int:
    """How many weights lie in a base's files as codes, by their headers; 0 where the files are not here."""
    return 0 if files is None else sum(math.prod(files.info(name).shape) for name in stored_codes(files))


def _adapter_sizes(folder: str | None) -> dict[str, tuple[int, int]]:
    """Rank and numbers of each layer's adapter in a folder, by the path of the layer, from the headers of its files."""
    if folder is None:
        return {}
    sizes: dict[str, tuple[int, int]] = {}
    for info in TensorFiles(folder, "adapter_model"):
        path, _, part = info.name.partition(".lora_")
        if part.startswith(("A", "B")):
            rank, numbers = sizes.get(path, (0, 0))
            sizes[path] = (info.shape[0] if part.startswith("A") else rank, numbers + info.shape[0] * info.shape[1])
    return sizes


def _matched(shape: BaseShape, sizes: dict[str, tuple[int, int]]) -> list[tuple[Weight, int]]:
    """The weights that have an adapter by the paths in an adapter's files, and in how many layers."""
    paths = {path.removeprefix("base_model.model.") for path in sizes}
    counts = [(weight, len(paths & {*weight.paths})) for weight in shape.of_text]
    return [(weight, layers) for weight, layers in counts if layers]


def _lengths(recipe: Recipe, shape: BaseShape) -> Lengths:
    """The lengths of the recipe's pairs: encoded, or what is known of their data set.

    Raises:
        RecipeError: neither is there; says how to give them.
    """
    known = known_lengths(recipe)
    if known is not None and not Path(recipe.model.base).exists():
        return known
    try:
        return encoded_lengths(recipe, context_length=shape.context_length)
    except ModelError as error:
        raise RecipeError(f"{error}; or give the mean lengths of its pairs in `tokens`, and how many in `pairs`") from error


def _budget(recipe: Recipe, setup: Setup, lengths: Lengths, card: Card | None) -> tuple[Setup, int, int]:
    """Which rows recompute their activations, the most tokens of a row, and of one that spares reading something twice."""
    asked, recompute = recipe.train.tokens_per_microbatch, recipe.train.gradient_checkpointing
    if card is None:
        if asked != "auto":
            return setup, asked, 0
        longest = row_of([lengths.sample[int(sizes_of(lengths.sample).sum(axis=1).argmax())]], setup.path).tokens
        rows = cpu_rows(longest, host_memory(), hidden=setup.shape.hidden, layers=setup.shape.layers)
        return setup, *rows
    longest = row_of([lengths.longest], setup.path).tokens
    every = setup._replace(recomputes_above=0)
    ways = {"as asked": setup, "recomputed": every, "offloaded": every._replace(offloads=True)}
    plan = plan_rows(asked, recompute, longest, lambda keeping: _fitting(ways[keeping], lengths, card))
    if plan.above is not None:
        setup = setup._replace(recomputes_above=plan.above, offloads=plan.offloads)
    return setup, plan.tokens, 0


def _fitting(setup: Setup, lengths: Lengths, card: Card) -> int:
    """The tokens of a row that fits on a card beside what lies there all the time."""
    free = SHARE_OF_FREE * (card.usable - sum(setup.fixed().values()))
    many = row_of(lengths.sample[: max(2, min(8, len(lengths.sample)))], setup.path)

    def peak(tokens: int) -> float:
        scale = tokens / many.tokens
        row = Row(tokens, *(round(part * scale) for part in many[1:]))
        return sum(setup.row_peak(row).values())

    low, high = 0, MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle) <= free else (low, middle - 1)
    return low


def _run_seconds(recipe: Recipe, lengths: Lengths, steps: int, step: StepTime, reference: StepTime) -> float:
    """The seconds of a run: its steps, the reference once for each pair or in every step, and the held-out pairs along the
    way."""
    pairs_per_step = recipe.train.pairs_per_step
    seconds = steps * step.seconds
    per_pair = reference.seconds / pairs_per_step
    if recipe.loss.uses_reference:
        scored = steps * pairs_per_step
        seconds += per_pair * (scored if recipe.reference.policy == "step" else min(scored, lengths.pairs))
    evaluations = 2 + (steps // recipe.train.eval_every if recipe.train.eval_every else min(EVALUATIONS, steps))
    return seconds + per_pair * lengths.held_out * evaluations


def _disk(recipe: Recipe, setup: Setup, lengths: Lengths) -> dict[str, int]:
    """Bytes that a run and what follows write."""
    fixed = setup.fixed()
    adapter = 4 * setup.trained
    kept = 2 if recipe.train.keep_best else 1  # checkpoints hold the best one by links
    checkpoint = adapter + fixed["optimizer"]
    answers = 2 * (lengths.pairs + lengths.held_out) if recipe.loss.uses_reference else 2 * lengths.held_out
    return {
        "run": kept * adapter + max(2, recipe.train.keep_checkpoints) * checkpoint + TOKENIZER_BYTES,
        "reference store": answers * STORED_ANSWER_BYTES,
        "merged model": DISK_DTYPE_BYTES * setup.shape.parameters,
    }


def _merging(setup: Setup, lengths: Lengths) -> dict[str, float]:
    """Bytes that `pe-dpo merge` takes beside the files: its largest tensor, and measuring whole or layer by layer."""
    shape = setup.shape
    longest = lengths.longest
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in lengths.sample[:32])
    answer = max(len(longest.chosen_ids), len(longest.rejected_ids))
    sizes: dict[str, Any] = {
        "parameters": shape.parameters,
        "layers": shape.layers * [shape.largest_layer()],
        "vocabulary": shape.vocabulary,
        "hidden": shape.hidden,
        "longest": answer,
        "tokens": tokens,
    }
    whole, layerwise = measuring_ways(**sizes)
    found: dict[str, float] = {"verified whole": whole, "verified layer by layer": layerwise}
    if setup.quantize != "none":
        codes = setup._replace(width=4).fixed()
        found["as trained"] = measuring_ways(**sizes, codes=codes["codes"] + codes["weights"])[0]
    largest = max((weight.numbers for weight in shape.weights), default=0)
    return {"without verification": 3.0 * 4 * largest, **found}

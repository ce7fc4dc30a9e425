"""How long the pairs of a run are: encoded where tokenizer and data are here, else made up around means that are known or
given.

A made-up pair has lengths and no meaning: the rest of the estimate splits, packs and counts it with the functions of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pe_dpo.data import EncodedPair, prepare_pairs
from pe_dpo.data.batches import PackedRow, divide, pack, pack_completions, split_by_tokens, split_into_rows
from pe_dpo.data.encoded import column
from pe_dpo.data.pairs import row_length
from pe_dpo.data.preparation import DEFAULT_MAX_LENGTH, HELD_OUT_MOST, HELD_OUT_SHARE
from pe_dpo.data.template import set_template
from pe_dpo.errors import UsageError
from pe_dpo.estimate.memory import Row
from pe_dpo.inference.scorer import ScoringPath
from pe_dpo.model.attention import Kind, Packing, even_keys, even_queries
from pe_dpo.model.base import answer_end_tokens, load_tokenizer
from pe_dpo.recipe import Recipe, describe_sources

STEPS = 32
"""Optimizer steps of which the pairs are looked at, or made up."""
SPREAD = {"prompt": 0.7, "answer": 0.46}
"""Standard deviation of the logarithm of made-up lengths, as in UltraFeedback (benchmarks/pairs.py)."""
KNOWN: dict[str, tuple[int, int, float, float, float]] = {
    "trl-lib/ultrafeedback_binarized": (62_135, 1_000, 166, 323, 323),
}
"""Data sets of the shipped recipes: pairs, held-out pairs (the data set's card), mean tokens of prompt, chosen and rejected (as
in benchmarks/pairs.py)."""


@dataclass(frozen=True)
class Lengths:
    """The pairs of a run, as far as their cost goes."""

    sample: list[EncodedPair]
    """Some of them in the order of training, or all."""
    pairs: int
    held_out: int
    source: str
    """Where this is known from, for people."""

    def means(self) -> tuple[float, float, float]:
        """Return the mean tokens of prompt, chosen and rejected answer."""
        parts = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in self.sample]
        prompt, chosen, rejected = np.mean(parts, axis=0)
        return float(prompt), float(chosen), float(rejected)

    @cached_property
    def longest(self) -> EncodedPair:
        """The pair whose prompt and longer answer have the most tokens."""
        return max(self.sample, key=row_length)

    @cached_property
    def short(self) -> list[EncodedPair]:
        """The two shortest pairs, of which the check before training has gradients."""
        return sorted(self.sample, key=row_length)[:2]


def encoded_lengths(recipe: Recipe, *, context_length: int | None) -> Lengths:
    """Return the lengths of a recipe's own pairs, encoded as training does it.

    Args:
        recipe: names tokenizer and data.
        context_length: of the base.

    Raises:
        ModelError: there is no tokenizer.
        DataError: the data cannot be read or encoded.
    """
    base, revision = recipe.model.base, recipe.model.revision
    tokenizer = load_tokenizer(base, revision=revision)
    set_template(tokenizer, recipe.data)
    ends = answer_end_tokens(tokenizer, base, revision=revision)
    data = prepare_pairs(
        recipe.data,
        tokenizer=tokenizer,
        context_length=context_length,
        end_token_ids=ends,
        seed=recipe.train.seeds.data,
    )
    return of_pairs(data.train, len(data.held_out), recipe)


def of_pairs(train: Sequence[EncodedPair], held_out: int, recipe: Recipe) -> Lengths:
    """Return the lengths of pairs that are encoded already.

    Args:
        train: to train on.
        held_out: how many are not.
        recipe: of the run, for the order of the pairs.
    """
    from pe_dpo.data.order import OptimizerBatches

    keys = column(train, "prompt_key") if recipe.train.prompts_together else range(len(train))
    batches = OptimizerBatches(keys, recipe.train.pairs_per_step, recipe.train.seed_of("order"))
    sample = [train[index] for _, batch in zip(range(STEPS), batches, strict=False) for index in batch]
    return Lengths(sample, len(train), held_out, f"the pairs of {describe_sources(recipe.data.train)}, encoded")


def known_lengths(recipe: Recipe) -> Lengths | None:
    """Return the lengths of a recipe's data if that is a set of which they are kept; else None."""
    facts = KNOWN.get(describe_sources(recipe.data.train))
    if facts is None:
        return None
    pairs, held_out, *means = facts
    limit = recipe.data.limit or pairs
    return made_up_lengths(
        recipe, means, pairs=min(pairs, limit), held_out=held_out, source="mean lengths known of these data", cut=True
    )


def made_up_lengths(
    recipe: Recipe,
    means: Sequence[float],
    *,
    pairs: int,
    held_out: int | None = None,
    source: str = "around the means given",
    cut: bool = False,
) -> Lengths:
    """Return lengths that scatter around means, none above the recipe's longest.

    Args:
        recipe: of the run.
        means: tokens of prompt, chosen and rejected answer.
        pairs: to train on.
        held_out: pairs that are not; None for the recipe's share.
        source: where the means are from.
        cut: whether what is too long is cut, as in a set whose means were taken so; else its pair is left out, as a run does.

    Raises:
        UsageError: a length is no number of tokens, or all pairs are too long.
    """
    if len(means) != 3 or not all(1 <= mean <= 10**7 for mean in means):
        raise UsageError("`tokens`: three mean lengths in tokens are expected, of prompt, chosen and rejected: 170,320,320")
    limit = recipe.data.max_length or DEFAULT_MAX_LENGTH
    generator = np.random.default_rng(0)
    count = max(1, min(pairs, STEPS * recipe.train.pairs_per_step))
    parts = [
        np.exp(generator.normal(np.log(mean) - spread**2 / 2, spread, count))
        for mean, spread in zip(means, (SPREAD["prompt"], SPREAD["answer"], SPREAD["answer"]), strict=True)
    ]
    sample = []
    for number, (prompt, chosen, rejected) in enumerate(zip(*parts, strict=True)):
        size, answers = max(2, round(prompt)), [max(2, round(one)) for one in (chosen, rejected)]
        if cut:
            size = min(size, max(1, limit // 2))
            answers = [min(one, limit - size) for one in answers]
        elif size + max(answers) > limit:
            continue
        ids = np.full(size, 5, dtype=np.int32)
        ids[0] = 10 + number  # another prompt for each pair
        sample.append(
            EncodedPair(ids, np.full(answers[0], 6, np.int32), np.full(answers[1], 7, np.int32), 0.0, str(number), str(number))
        )
    if not sample:
        given = ", ".join(f"{mean:g}" for mean in means)
        raise UsageError(
            f"`tokens`: pairs of {given} tokens are longer than {limit}, and would all be left out; raise data.max_length"
        )
    if len(sample) < count:
        source += f"; {1 - len(sample) / count:.0%} of them, longer than data.max_length {limit}, are left out"
        pairs = round(pairs * len(sample) / count)
    if held_out is None:
        asked = recipe.data.eval
        held_out = round(pairs * asked) if isinstance(asked, float) else min(round(pairs * HELD_OUT_SHARE), HELD_OUT_MOST)
        pairs -= held_out
    return Lengths(sample, pairs, held_out, source)


def rows_of(pairs: Sequence[EncodedPair], budget: int, path: ScoringPath, tree_budget: int = 0) -> list[Row]:
    """Return the rows that some pairs are split into, in the order of training.

    Args:
        pairs: of one optimizer step.
        budget: tokens of a row.
        path: how pairs go through the model.
        tree_budget: tokens of a row that spares reading something twice.
    """
    if path == "padded" or path == "handed":  # at most: prompts are counted for each answer
        return [row_of([pairs[index] for index in members], path) for members in split_by_tokens(pairs, budget)]
    rows = []
    for members in split_into_rows(pairs, budget, tree_budget):
        completions, parts, _ = divide([pairs[index] for index in members], max(budget, tree_budget))
        rows += [_packed_row(pack_completions([completions[number] for number in part]), path) for part in parts]
    return rows


def row_of(pairs: Sequence[EncodedPair], path: ScoringPath) -> Row:
    """Return what the row of some pairs takes."""
    if path == "padded" or path == "handed":  # at most: prompts are counted for each answer
        longest, starts = max(map(row_length, pairs)), min(len(pair.prompt_ids) for pair in pairs)
        tokens = 2 * len(pairs) * longest
        scored = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
        return Row(tokens, scored, tokens, tokens * longest, 2 * len(pairs) * (longest - starts))
    return _packed_row(pack(pairs), path)


def _packed_row(packed: PackedRow, path: Kind) -> Row:
    stretches = list(Packing(packed.tree, path).stretches())
    if path == "segments":
        stretches = [(even_queries(queries), even_keys(keys)) for queries, keys in stretches]
    keys, scores = sum(keys for _, keys in stretches), sum(queries * keys for queries, keys in stretches)
    return Row(packed.input_ids.shape[1], len(packed.targets), keys, scores)

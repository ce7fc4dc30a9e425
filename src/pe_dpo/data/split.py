"""Which pairs are held out: those of files and splits that are called so, and none whose prompt the model reads in training.

    as rows say it       "Hi"   [{user: "Hi"}]   "Hi\\n"      three keys
    as the model reads   12 5   12 5             12 5         one prompt: keys that share token ids are one group

A group is on one side, under the smallest of its keys, so that pairs whose keys share no ids lie as they lay before.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from pe_dpo.data.pairs import EncodedPair

HELD_OUT_NAMES = ("validation", "valid", "val", "eval", "dev", "test")
"""How files and splits that are held out begin; the first that is there is used."""
HELD_OUT_WORDS = (*HELD_OUT_NAMES, "evaluation", "testing", "heldout", "held_out", "held-out", "held out", "holdout")
"""Words anywhere in a name that say so, in the order in which one is taken before another."""
_BEGINS = re.compile(rf"(?:(train)|{'|'.join(HELD_OUT_NAMES)})(?:[-_].*)?")
_WORDS = re.compile(rf"(?<![^-_. ])(?:(train(?:ing)?)|{'|'.join(HELD_OUT_WORDS)})(?![^-_. ])", re.IGNORECASE)


class Sides(NamedTuple):
    """The pairs of both sides, each in the order of their rows."""

    train: list[EncodedPair]
    held_out: list[EncodedPair]
    left_out: list[EncodedPair]
    """Of those that were brought to be held out: the ones whose prompt is in training."""
    held_out_rows: list[str] | None
    """The rows held out, for the report; None where a run from before runs named them is repeated."""


def named_side(name: str, *, by_words: bool = True) -> Literal["train", "held_out"] | None:
    """Return the side that a name says: by how it begins, else by its words; None for no side or both.

    Args:
        name: Of a file without its suffix, of a folder or of a split.
        by_words: Whether words further behind count.

    Example:
        train_prefs, helpful-train and training are to train on; test-train, Evaluation and v1.held_out are held out.
    """
    begins = _BEGINS.fullmatch(name)
    sides = {bool(found[1]) for found in ([begins] if begins else _WORDS.finditer(name) if by_words else [])}
    return None if len(sides) != 1 else "train" if sides == {True} else "held_out"


def divide(
    encoded: Sequence[EncodedPair],
    brought: Sequence[EncodedPair],
    *,
    share: float,
    most: int | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Sides:
    """Return pairs to train on and pairs held out, with no prompt on both sides.

    Args:
        encoded: The pairs of the training side.
        brought: The pairs of held-out data of its own, empty where a share of `encoded` is held out.
        share: Of `encoded` to hold out, see `split_by_prompt`; 0 where there are others.
        most: Pairs of that share at most, see there; None for no bound.
        recorded: The data report of a run that is gone on with or evaluated: the rows that it held out are held out again. An
            older one names no rows; its pairs are split as then, where prompts were told apart as their rows say them. Where
            a row is not there any more, under its name, the pairs are split anew: the same data in another file give the same.
    """
    is_old = recorded is not None and recorded.get("held_out_rows") is None
    pairs = [*encoded, *brought] if is_old else join_prompts([*encoded, *brought])
    own, brought = pairs[: len(encoded)], pairs[len(encoded) :]
    rows = set(() if recorded is None or is_old else recorded["held_out_rows"])
    if recorded is None or is_old or not rows <= {pair.where for pair in brought or own}:
        train, held_out = split_by_prompt(own, share, most)
        trained = {pair.prompt_key for pair in train}
        is_held_out = [pair.prompt_key not in trained for pair in brought]
    else:
        train = [pair for pair in own if brought or pair.where not in rows]
        held_out = [pair for pair in own if not brought and pair.where in rows]
        is_held_out = [pair.where in rows for pair in brought]
    held_out += [pair for pair, is_out in zip(brought, is_held_out, strict=True) if is_out]
    left_out = [pair for pair, is_out in zip(brought, is_held_out, strict=True) if not is_out]
    return Sides(train, held_out, left_out, None if is_old else [pair.where for pair in held_out])


def join_prompts(encoded: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Return the pairs with one prompt key for all prompts that the model reads alike: the smallest of their keys.

    Example:
        Keys b and c share their prompt ids, c and a share others: all three pairs get the key a.
    """
    parents: dict[str | bytes, str | bytes] = {}

    def root(key: str | bytes) -> str | bytes:
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = key = parents[parent]  # halves the path
        return key

    for pair in encoded:
        parents[root(hashlib.sha256(pair.prompt_ids.tobytes()).digest())] = root(pair.prompt_key)
    smallest: dict[str | bytes, str] = {}
    for pair in encoded:
        group = root(pair.prompt_key)
        smallest[group] = min(pair.prompt_key, smallest.get(group, pair.prompt_key))
    joined = []
    for pair in encoded:
        key = smallest[root(pair.prompt_key)]
        joined.append(pair if key == pair.prompt_key else replace(pair, prompt_key=key))
    return joined


def split_by_prompt(
    encoded: Sequence[EncodedPair], share: float, most: int | None = None
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Return pairs to train on and pairs held out, each in the order of the rows, with no prompt on both sides.

    Args:
        encoded: All pairs.
        share: Of the pairs to hold out, in [0, 1). Prompts are taken in the order of their hashes until it is reached,
            so the split depends on no seed and no row order. A prompt with so many pairs that it would take more than
            twice the share, and more than half of what is left, stays to train on; one prompt always does.
        most: Pairs at most, of which a prompt that would exceed them is left to training; None for no bound. Where each prompt
            has more, the one of the fewest pairs is held out.
    """
    wanted = share * len(encoded) if most is None else min(share * len(encoded), most)
    counts: dict[str, int] = {}
    for pair in encoded:
        counts[pair.prompt_key] = counts.get(pair.prompt_key, 0) + 1
    taken: set[str] = set()
    pairs_taken = 0
    for key in sorted(counts):
        if pairs_taken >= wanted or len(taken) == len(counts) - 1:
            break
        if pairs_taken + counts[key] > max(2 * share * len(encoded), 1) and 2 * counts[key] > len(encoded) - pairs_taken:
            continue
        if most is not None and pairs_taken + counts[key] > most:
            continue
        taken.add(key)
        pairs_taken += counts[key]
    if most is not None and wanted and not taken and len(counts) > 1:
        taken = {min(counts, key=lambda key: (counts[key], key))}
    return ([pair for pair in encoded if pair.prompt_key not in taken], [pair for pair in encoded if pair.prompt_key in taken])

"""Which pairs are held out: those of files and splits that are called so, and none whose prompt the model reads in training.

    as rows say it       "Hi"   [{user: "Hi"}]   "Hi\\n"      three keys
    as the model reads   12 5   12 5             12 5         one prompt: keys that share token ids are one group

A group is on one side, under the smallest of its keys, so that pairs whose keys share no ids lie as they lay before.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pe_dpo.data.encoded import column, take, with_keys
from pe_dpo.data.pairs import EncodedPair

HELD_OUT_NAMES = ("validation", "valid", "val", "eval", "dev", "test")
"""How files and splits that are held out begin; the first that is there is used."""
HELD_OUT_WORDS = (*HELD_OUT_NAMES, "evaluation", "testing", "heldout", "held_out", "held-out", "held out", "holdout")
"""Words anywhere in a name that say so, in the order in which one is taken before another."""
_BEGINS = re.compile(rf"(?:(train)|{'|'.join(HELD_OUT_NAMES)})(?:[-_].*)?")
_WORDS = re.compile(rf"(?<![^-_. ])(?:(train(?:ing)?)|{'|'.join(HELD_OUT_WORDS)})(?![^-_. ])", re.IGNORECASE)


class Sides(NamedTuple):
    """The pairs of both sides, each in the order of their rows."""

    train: Sequence[EncodedPair]
    held_out: Sequence[EncodedPair]
    left_out: Sequence[EncodedPair]
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
    digests: np.ndarray | None = None,
    seed: int | None = None,
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
        digests: Of both, see `join_prompts`.
        seed: Of the prompts that a share takes, see `split_by_prompt`.
    """
    is_old = recorded is not None and recorded.get("held_out_rows") is None
    pairs: Any = encoded + brought  # type: ignore[operator]  # both lists, or both of one table
    pairs, own = pairs if is_old else join_prompts(pairs, digests), len(encoded)
    rows = set(() if recorded is None or is_old else recorded["held_out_rows"])
    count, keys = len(pairs), column(pairs, "prompt_key")
    side = slice(own, count) if own < count else slice(0, own)
    names = column(pairs[side], "where") if recorded is not None else []
    is_held_out = np.zeros(count, dtype=bool)
    if recorded is None or is_old or not rows <= {*names}:
        taken = _held_out_prompts(keys[:own], share, most, seed)
        is_held_out[:own] = [key in taken for key in keys[:own]]
        trained = {key for key in keys[:own] if key not in taken} if own < count else set()
        is_held_out[own:] = [key not in trained for key in keys[own:]]
    else:
        is_held_out[side] = [where in rows for where in names]
    places = np.arange(count)
    train, held_out = (take(pairs, places[mask]) for mask in (~is_held_out & (places < own), is_held_out))
    left_out = take(pairs, places[~is_held_out & (places >= own)])
    return Sides(train, held_out, left_out, None if is_old else column(held_out, "where"))


def join_prompts(pairs: Sequence[EncodedPair], digests: np.ndarray | None = None) -> Sequence[EncodedPair]:
    """Return the pairs with one prompt key for all prompts that the model reads alike: the smallest of their keys.

    Args:
        pairs: All pairs of both sides.
        digests: uint8 (N, 16), equal for equal prompt ids alone; None to compute them.

    Example:
        Keys b and c share their prompt ids, c and a share others: all three pairs get the key a.
    """
    keys = column(pairs, "prompt_key")
    ids = (
        [pair.prompt_ids.tobytes() for pair in pairs]
        if digests is None
        else np.ascontiguousarray(digests).view("V16")[:, 0].tolist()
    )
    first: dict[bytes, str] = {}
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while (parent := parents.get(key, key)) != key:
            parents[key] = key = parents.get(parent, parent)  # halves the path
        return key

    for key, read in zip(keys, ids, strict=True):
        other = first.setdefault(read, key)
        if other != key:
            smaller, larger = sorted((root(key), root(other)))
            parents[larger] = smaller
    return with_keys(pairs, [root(key) for key in keys]) if parents else pairs


def split_by_prompt(
    encoded: Sequence[EncodedPair], share: float, most: int | None = None, seed: int | None = None
) -> tuple[Sequence[EncodedPair], Sequence[EncodedPair]]:
    """Return pairs to train on and pairs held out, each in the order of the rows, with no prompt on both sides.

    Args:
        encoded: All pairs.
        share: Of the pairs to hold out, in [0, 1). Prompts are taken in the order of their hashes until it is reached,
            so the split depends on no row order. A prompt with so many pairs that it would take more than
            twice the share, and more than half of what is left, stays to train on; one prompt always does.
        most: Pairs at most, of which a prompt that would exceed them is left to training; None for no bound. Where each prompt
            has more, the one of the fewest pairs is held out.
        seed: Hashed with the prompts, so that another one holds out others; None for the prompts alone.
    """
    keys = column(encoded, "prompt_key")
    taken = _held_out_prompts(keys, share, most, seed)
    is_taken = np.array([key in taken for key in keys], dtype=bool)
    return take(encoded, np.flatnonzero(~is_taken)), take(encoded, np.flatnonzero(is_taken))


def seeded(key: str, seed: int | None) -> str:
    """Return by what a prompt takes its place among others when some are drawn: its own key, or a hash of seed and key."""
    return key if seed is None else hashlib.blake2b(f"{seed} {key}".encode(), digest_size=16).hexdigest()


def _held_out_prompts(keys: Sequence[str], share: float, most: int | None, seed: int | None) -> set[str]:
    """Return the prompts that a share of pairs with these keys holds out, see `split_by_prompt`."""
    wanted = share * len(keys) if most is None else min(share * len(keys), most)
    counts = Counter(keys) if wanted else Counter()
    taken: set[str] = set()
    pairs_taken = 0
    for key in sorted(counts, key=lambda key: seeded(key, seed)):
        if pairs_taken >= wanted or len(taken) == len(counts) - 1:
            break
        if pairs_taken + counts[key] > max(2 * share * len(keys), 1) and 2 * counts[key] > len(keys) - pairs_taken:
            continue
        if most is not None and pairs_taken + counts[key] > most:
            continue
        taken.add(key)
        pairs_taken += counts[key]
    if most is not None and not taken and len(counts) > 1:
        taken = {min(counts, key=lambda key: (counts[key], key))}
    return taken

"""Pairs of a path; the keywords are settings of a recipe's data section."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pe_dpo import data
from pe_dpo.data.reading import read_places
from pe_dpo.data.sources import find_places
from pe_dpo.recipe import DataSection


def load_pairs(
    path: str | Path, *, split: Literal["train", "held_out"] = "train", **settings: Any
) -> tuple[list[data.Pair], data.DataReport]:
    """Return the pairs of one side before tokenization, and what happened to the rows."""
    report = data.DataReport()
    section = DataSection(train=str(path), **settings)
    (pairs,) = read_places(find_places(section.train), section, report, side=split)
    return pairs, report


def prepare_pairs(
    path: str | Path, *, tokenizer: Any, end_token_ids: Collection[int] = (), **settings: Any
) -> data.PreparedData:
    """Return both sides as token ids."""
    return data.prepare_pairs(DataSection(train=str(path), **settings), tokenizer=tokenizer, end_token_ids=end_token_ids)

"""The words for columns that pe-dpo does not know: what was found, and the column map to write."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pe_dpo.errors import DataError

MAPPABLE = ("prompt", "chosen", "rejected", "margin", "system", "chosen_score", "rejected_score")

_PROMPT_WORDS = ("prompt", "question", "instruction", "query", "problem", "post", "context", "input", "user")
_CHOSEN_WORDS = (
    "chosen",
    "preferred",
    "accepted",
    "winner",
    "winning",
    "win",
    "better",
    "best",
    "good",
    "positive",
    "pos",
    "w",
    "j",
)
_REJECTED_WORDS = (
    "rejected",
    "dispreferred",
    "nonpreferred",
    "loser",
    "losing",
    "lose",
    "worse",
    "worst",
    "bad",
    "negative",
    "neg",
    "l",
    "k",
)
_NO_TEXT_WORDS = {"id", "score", "model", "source", "rating", "logps", "system", "metadata"}


def explain_map(columns: Mapping[str, str], names: Sequence[str], *, where: str) -> None:
    """Raise unless a column map names things that are there.

    Args:
        columns: The map, from a name of `MAPPABLE` to a column.
        names: The columns that the data has.
        where: The file, for messages.

    Raises:
        DataError: At the first key or column that does not exist.
    """
    for key, column in columns.items():
        if key not in MAPPABLE:
            raise DataError(f"data.columns.{key}: there is no such name; one of {', '.join(MAPPABLE)} is due")
        if column not in names:
            raise DataError(f"data.columns.{key}: {where} has no column '{column}'; found {', '.join(names)}")


def explain_columns(names: Sequence[str], rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, where: str) -> str:
    """The message for data of no known shape.

    Args:
        names: The columns found.
        rows: The first rows.
        columns: The column map that was given.
        where: The file.

    Returns:
        What the data is (unpaired, or unknown columns) and what to write in the recipe, names guessed where possible.
    """
    found = f"{where}: the columns are {', '.join(names) or 'none'}"
    if "label" in names and not {"chosen", "rejected"} <= set(names):
        return (
            f"{found}: this is unpaired (KTO-style) data, one answer with one label a row; pairs are needed: "
            "put two answers to one prompt into each row, as prompt, chosen, rejected"
        )
    guess = {**_guess_map(names, rows), **columns}
    if "chosen" not in guess and "rejected" not in guess and {"completion", "output", "messages"} & set(names):
        return (
            f"{found}: there is one answer a row and nothing to prefer it to; pairs are needed: "
            "put two answers to one prompt into each row, as prompt, chosen, rejected"
        )
    wanted = ("prompt", "chosen", "rejected", *(key for key in columns if key not in ("prompt", "chosen", "rejected")))
    entries = ", ".join(f"{key}: {_yaml_name(guess.get(key, '<column>'))}" for key in wanted)
    return (
        f"{found}; which of them are prompt, chosen and rejected is not clear. Say it in the recipe:\n"
        f"data: {{columns: {{{entries}}}}}"
    )


def _guess_map(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    texts = [name for name in names if any(isinstance(row.get(name), str | list | dict) for row in rows)]
    words = {name: _words(name) for name in texts if not _NO_TEXT_WORDS & set(_words(name))}
    guess: dict[str, str] = {}
    for key, hints in (("rejected", _REJECTED_WORDS), ("chosen", _CHOSEN_WORDS), ("prompt", _PROMPT_WORDS)):
        free = [name for name in words if name not in guess.values()]
        match = next((name for hint in hints for name in free if hint in words[name]), None)
        if match is not None:
            guess[key] = match
    return guess


def _words(name: str) -> list[str]:
    """`non_preferred_answer` -> [nonpreferred, answer]."""
    return re.findall(r"[a-z]+", re.sub(r"non[^a-z]?preferred", "nonpreferred", name.lower()))


def _yaml_name(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_<][\w.\->]*", name) else json.dumps(name)

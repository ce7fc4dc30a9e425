"""The numbers of a row: how much better its chosen answer is, and β and weight of the pair where `data.columns` names them.

margin                                             read
chosen_score, rejected_score                       the margin is their difference
chosen_rating, rewards_rejected, {"score": …}, …   compared with the order of the answers alone
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pe_dpo.data.pairs import RowError
from pe_dpo.recipe.section import LARGEST

OBJECT_SCORES = ("score", "rating", "overall_score", "reward")
"""Where answers that are objects or messages have a score."""
_KINDS = ("score", "rating", "reward", "avg_rating", "overall_score", "scores", "ratings", "rewards")
_PAIRS = (
    *(
        (joint.join(before_after), joint.join(before_after).replace("chosen", "rejected"))
        for joint in "_-"
        for kind in _KINDS
        for before_after in (("chosen", kind), (kind, "chosen"))
    ),
    *((f"{kind}_w", f"{kind}_l") for kind in _KINDS),
)
"""Columns with a score of the chosen and of the rejected answer, of which more is better."""


def read_margin(row: Mapping[str, Any], names: Mapping[str, str]) -> float | None:
    """Return the margin column, or the difference of two scores; numbers may be text, which is all that CSV has.

    Args:
        row: The columns, under our names.
        names: From our names to those of the columns, for messages.

    Raises:
        RowError: What stands there is no number.
    """

    def read(column: str) -> float | None:
        if row[column] is None or row[column] == "":
            return None
        number = _as_number(row[column])
        if number is None:
            raise RowError(
                f"column '{names[column]}' is {repr(row[column])[:60]}; a finite number is expected (null where there is none)"
            )
        return number

    if "margin" in row:
        return read("margin")
    for chosen, rejected in (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")):
        if chosen in row and rejected in row:
            better, worse = read(chosen), read(rejected)
            return None if better is None or worse is None else better - worse
    return None


def read_pair_number(row: Mapping[str, Any], names: Mapping[str, str], column: Literal["beta", "weight"]) -> float | None:
    """Return β or the weight of a pair, which every row has where `data.columns` names its column; None where it does not.

    Args:
        row: The columns, under our names.
        names: From our names to those of the columns that `data.columns` maps.
        column: Which of the two.

    Raises:
        RowError: There is no number, or one that neither can be.
    """
    if column not in names:
        return None
    number, least = _as_number(row.get(column)), "> 0" if column == "beta" else ">= 0"
    least += f" and up to {LARGEST:g}" if number and number > LARGEST else ""
    if number is None or not 0 <= number <= LARGEST or (column == "beta" and number == 0):
        found = repr(row[column])[:60] if column in row else "missing"
        raise RowError(
            f"column '{names[column]}' is {found}; a finite number {least} is expected in every row, since "
            f"data.columns.{column} names it"
        )
    return number


def compare_scores(row: Mapping[str, Any]) -> tuple[list[float], set[str]]:
    """Return by how much each kind of score prefers the chosen answer, and the columns of scores.

    Args:
        row: The columns, under our names.

    Returns:
        Differences that contradict the order of the answers are negative; a margin counts where it is.
    """
    pairs = [(one, other) for one, other in _PAIRS if one in row and other in row]
    scores = [(row[one], row[other]) for one, other in pairs]
    both = {kind for kind in _KINDS if isinstance(row.get(kind), Mapping) and row[kind].keys() >= {"chosen", "rejected"}}
    scores += [(row[kind]["chosen"], row[kind]["rejected"]) for kind in both]
    answers = [row.get(side) for side in ("chosen", "rejected")]
    answers = [answer[-1] if isinstance(answer, list) and answer else answer for answer in answers]
    if isinstance(answers[0], Mapping) and isinstance(answers[1], Mapping):
        scores += [(answers[0].get(key), answers[1].get(key)) for key in OBJECT_SCORES]
    numbers = [(_as_number(better), _as_number(worse)) for better, worse in scores]
    differences = [better - worse for better, worse in numbers if better is not None and worse is not None]
    margin = _as_number(row.get("margin"))
    differences += [margin] if margin is not None and margin < 0 else []
    return differences, both.union(*pairs)


def _as_number(value: Any) -> float | None:
    """Return a cell as a finite number, None where it is none."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None

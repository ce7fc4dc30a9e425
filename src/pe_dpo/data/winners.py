"""Which of two answers won, where a column says it: by its plain values, or by a comparison that the recipe writes.

winner: better_response_id         0 or 1, a or b, response_0 or response_1, a signed overall_preference
winner: "labels = 1"               the answer mapped as chosen won where it holds, the other one elsewhere
winner: "overall_preference < 0"   and where it is exactly 0 nobody won
"""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pe_dpo.data.columns import carries
from pe_dpo.data.messages import list_names
from pe_dpo.data.pairs import RowError
from pe_dpo.errors import DataError

_OPERATORS = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "==": operator.eq, "=": operator.eq,
    "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_COMPARISON = re.compile(r"\s*(?P<column>.+?)\s*(?P<sign><=|>=|!=|==|=|<|>)\s*(?P<value>[^<>=!]+?)\s*")
_SIGNED = ("overall_preference", "preference_strength")
"""Columns of which negative numbers mean the first answer, as in HelpSteer2 and HelpSteer3."""
_TIES = re.compile(r"(tie|both|neither|equal|draw|same)\b.*")
_PLAIN = (
    {"chosen": True, "rejected": False},
    {"a": True, "b": False},
    {"1": True, "2": False},
    {"first": True, "second": False},
)


class Winner:
    """Reads which of two answers won.

    Attributes:
        column: Where it stands.
        words: How it is read, for people.
    """

    def __init__(self, said: str, rows: Sequence[Mapping[str, Any]], chosen: str, rejected: str, *, where: str) -> None:
        """Understand what the column map says of the winner.

        Args:
            said: A column, or a comparison.
            rows: The columns of the first rows.
            chosen: The column that is mapped as chosen.
            rejected: The column that is mapped as rejected.
            where: The file, for messages.

        Raises:
            DataError: There is no such column, or what its values mean is not plain.
        """
        names = {name for row in rows for name in row}
        match = None if said in names else _COMPARISON.fullmatch(said)
        self.column = match["column"] if match else said
        if self.column not in names:
            raise DataError(f"data.columns.winner: {where} has no column '{self.column}'; found {list_names(sorted(names))}")
        self.comparison: tuple[str, str] | None = None
        self.table: dict[str, bool] | None = None
        self.other: str | None = None
        if match:
            self.comparison = match["sign"], _key(match["value"].strip("'\""))
            self.words = f"{chosen} is the chosen answer where {said}, {rejected} elsewhere"
            return
        values = [row[self.column] for row in rows if carries(row.get(self.column))]
        self.table = _meanings(self.column, chosen, rejected, values)
        if self.table is None and not (self.column.lower() in _SIGNED and _numbers(values)):
            ways = self.comparisons(self.column, values)
            shown = ", ".join(sorted({_key(value)[:40] for value in values})[:5]) or "nothing"
            raise DataError(
                f"data.columns.winner: column '{self.column}' has {shown}, which does not say by itself whether {chosen} or "
                f'{rejected} won; write winner: "{ways[0]}" if {chosen} won there, winner: "{ways[1]}" if it lost there'
            )
        if self.table is None:
            self.words = f"{chosen} is the chosen answer where {self.column} is negative, {rejected} where it is positive"
        else:
            said = ", ".join(f"{value} is {chosen if won else rejected}" for value, won in self.table.items())
            self.words = f"the chosen answer is the one that {self.column} names ({said})"

    @staticmethod
    def is_plain(column: str, chosen: str, rejected: str, values: Sequence[Any]) -> bool:
        """Return whether a column says by itself which of two answers won.

        Args:
            column: Its name.
            chosen: The first answer's column.
            rejected: The second answer's.
            values: Some of its cells that are not null.
        """
        is_signed = column.lower() in _SIGNED and _numbers(values) is not None
        return is_signed or _meanings(column, chosen, rejected, values) is not None

    @staticmethod
    def comparisons(column: str, values: Sequence[Any]) -> list[str]:
        """Return both ways to write which answer won, that the first did and that it did not, for some values of a column."""
        numbers = _numbers(values) or []
        if any(number < 0 for number in numbers) or any(not number.is_integer() for number in numbers):
            return [f"{column} < 0", f"{column} > 0"]
        keys = [key for key in dict.fromkeys(_key(value)[:40] for value in values) if not _TIES.fullmatch(key)] or ["1"]
        if {*keys} <= {"0", "1"}:
            keys = ["1", "0"]
        elif {*keys} <= {"true", "false"}:
            keys = ["true", "false"]
        return [f"{column} = {keys[0]}", f"{column} = {keys[1]}" if len(keys) > 1 else f"{column} != {keys[0]}"]

    def first_won(self, values: Mapping[str, Any]) -> bool | None:
        """Return whether the answer mapped as chosen won in a row; None where nobody did.

        Args:
            values: The columns of the row, under their own names.

        Raises:
            RowError: The row does not say it, or says something that no row said before.
        """
        value = values.get(self.column)
        if not carries(value):
            raise RowError(f"column '{self.column}' is {'missing' if self.column not in values else 'empty'}; "
                           "which of the answers won is expected")  # fmt: skip
        key = _key(value)
        if _TIES.fullmatch(key):
            return None
        if self.comparison is None and self.table is not None:
            won = next((self.table[name] for name in (key, _end(key)) if name in self.table), None)
            if won is None:
                raise RowError(f"column '{self.column}' is {repr(value)[:40]}; one of {', '.join(self.table)} is expected")
            return won
        sign, bound = self.comparison or ("<", "0")
        numbers = _numbers([key, bound])
        if numbers is None and sign in ("<", ">", "<=", ">="):
            raise RowError(f"column '{self.column}' is {repr(value)[:40]}; a number is expected, to compare it with {bound}")
        one, other = numbers or (key, bound)
        if sign in ("<", ">"):
            return None if one == other else bool(_OPERATORS[sign](one, other))
        if sign in ("=", "==", "!=") and one != other:
            if self.other not in (None, key):
                raise RowError(
                    f"column '{self.column}' is {repr(value)[:40]}, after {self.other} and {bound}; a winner is one of two"
                )
            self.other = key
        return bool(_OPERATORS[sign](one, other))


def _meanings(column: str, chosen: str, rejected: str, values: Sequence[Any]) -> dict[str, bool] | None:
    """Return what each value of a column means, whether the first answer won; None where that is not plain."""
    seen = {key for key in map(_key, values) if not _TIES.fullmatch(key)}
    if column.lower() in _SIGNED and _numbers(values):  # 1 and 2 are strengths of the second answer, no numbers of answers
        return None
    if seen <= {"0", "1"} and "label" in column.lower():  # 1 may mean the second of them, or that the first is right
        return None
    ends = _end(chosen.lower()), _end(rejected.lower())
    tables = [{chosen.lower(): True, rejected.lower(): False}]
    if ends[0] != ends[1]:
        tables.append({ends[0]: True, ends[1]: False})
    if not seen:
        return tables[-1] if values else None
    if column.lower().endswith(("_id", "_idx", "_index")):
        tables.append({"0": True, "1": False})
    for table in (*tables, *_PLAIN):
        is_counted = table == {"1": True, "2": False} and "2" not in seen and ends != ("1", "2")  # 1 may be the second after 0
        if not is_counted and all(key in table or (key[:1].isalpha() and _end(key) in table) for key in seen):
            return table
    return None


def _key(value: Any) -> str:
    """Return a value of a winner's column as text that is the same for 1, 1.0 and "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


def _end(name: str) -> str:
    """Return what a name ends with, as 0 of response_0 and a of model_a."""
    return re.findall(r"[a-z]+|\d+|[^a-z\d]+", name)[-1] if name else ""


def _numbers(values: Sequence[Any]) -> list[float] | None:
    try:
        return [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError):
        return None

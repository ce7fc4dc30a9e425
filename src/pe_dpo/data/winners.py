"""Which of two answers won, where a column says it: by its plain values, or by a comparison that the recipe writes.

winner: better_response_id         0 or 1, a or b, response_0 or response_1, A>B, the name in model_a, a signed number
winner: "labels = 1"               the answer mapped as chosen won where it holds, the other one elsewhere
winner: "overall_preference < 0"   and where it is exactly 0 nobody won
"""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pe_dpo.data.columns import carries, quote
from pe_dpo.data.messages import list_names
from pe_dpo.data.pairs import RowError
from pe_dpo.errors import DataError

Outcome = Literal["first", "second", "tie"]

_OPERATORS = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "==": operator.eq, "=": operator.eq,
    "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_COMPARISON = re.compile(
    r"\s*(?P<column>.+?)\s*(?P<sign><=|>=|!=|==|=|<|>)\s*(?P<value>'[^']*'|\"[^\"]*\"|[^<>=!]+?)\s*"
)  # a value with signs of its own stands in quotes
_SIGNED = ("overall_preference", "preference_strength")
"""Columns of which negative numbers mean the first answer, as in HelpSteer2 and HelpSteer3."""
_TIES = re.compile(r"(?:(?:(?:a|the) )?(?:tied?|both|neither|none|equal(?:ly)?|draw|same)|no (?:preference|winner))(?![a-z]).*")
_PLAIN = (
    {"chosen": True, "rejected": False},
    {"a": True, "b": False},
    {"1": True, "2": False},
    {"first": True, "second": False},
)
_STEMS = (
    r"agent|answer|assistant|best|better|bot|candidate|chatbot|choice|completion|conversation|example|generation|human|llm|"
    r"message|model|option|output|player|prefer|preferred|prefers|ref|reply|response|result|sample|side|summary|system|text|"
    r"version|winner"
)
"""What may stand before the letter or number of an answer: model_a, Response 1."""
_REVERSED = (("b", "a"), ("1", "0"), ("2", "1"), ("second", "first"))
"""Ends of the names of two answers of which the one mapped as rejected is the first."""
_TRUTHS = {"true": "1", "false": "0"}
_HOW_MUCH = r"(?:(?:is )?(?:(?:slightly|somewhat|marginally|clearly|significantly|considerably|strongly|much|far) )?)"
_RELATION = re.compile(
    rf"(?P<one>.+?)\s*(?:(?P<first>>+|\bover\b|\bbeats\b|\b{_HOW_MUCH}better than\b)|"
    rf"(?P<second><+|\b{_HOW_MUCH}worse than\b)|(?P<tie>=+|~+))\s*(?P<other>.+)"
)
"""A>B, A>>B, A=B, "Response 1 is slightly better than Response 2"; what it relates must be both answers."""
_MODELS = {"engine", "generator", "llm", "model", "models", "name", "policy", "source", "system"}
"""Words in the names of columns that say what an answer is called."""
_LONGEST = 60  # characters of a value that a comparison may be offered for


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
        self.models: tuple[str, str] | None = None
        self.table: dict[str, bool] | None = None
        self.stems = _stems(chosen, rejected)
        self.other: str | None = None
        if match:
            said_value = match["value"]
            is_quoted = len(said_value) > 1 and said_value[0] == said_value[-1] and said_value[0] in "'\""
            self.comparison = match["sign"], _key(said_value[1:-1] if is_quoted else said_value.strip("'\""))
            self.words = f"{chosen} is the chosen answer where {said}, {rejected} elsewhere"
            return
        values = [row[self.column] for row in rows if carries(row.get(self.column))]
        self.models = _models(self.column, chosen, rejected, rows)
        if self.models:
            self.words = f"the chosen answer is the one whose {self.models[0]} or {self.models[1]} {self.column} names"
            return
        self.table = _meanings(self.column, chosen, rejected, values)
        if self.table is None and not _is_signed(self.column, chosen, rejected, values):
            ways = self.comparisons(self.column, values)
            shown = ", ".join(sorted({_key(value)[:_LONGEST] for value in values})[:5]) or "nothing"
            remedy = "write a column with the name of the better one, or tie"
            if ways:
                won, lost = (quote(way) for way in ways)
                remedy = f"write winner: {won} if {chosen} won there, winner: {lost} if it lost there"
            raise DataError(
                f"data.columns.winner: column '{self.column}' has {shown}, which does not say by itself whether {chosen} or "
                f"{rejected} won; {remedy}"
            )
        if self.table is None:
            self.words = f"{chosen} is the chosen answer where {self.column} is negative, {rejected} where it is positive"
        else:
            said = ", ".join(f"{value} is {chosen if won else rejected}" for value, won in self.table.items())
            self.words = f"the chosen answer is the one that {self.column} names ({said})"

    @staticmethod
    def is_plain(column: str, chosen: str, rejected: str, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether a column says by itself which of two answers won.

        Args:
            column: Its name.
            chosen: The first answer's column.
            rejected: The second answer's.
            rows: The columns of some rows.
        """
        values = [row[column] for row in rows if carries(row.get(column))]
        is_named = _models(column, chosen, rejected, rows) is not None
        is_signed = _is_signed(column, chosen, rejected, values)
        return is_signed or is_named or _meanings(column, chosen, rejected, values) is not None

    @staticmethod
    def comparisons(column: str, values: Sequence[Any]) -> list[str]:
        """Return both ways to write which answer won, that the first did and that it did not, for some values of a column.

        None are returned for more than two values that are no signed numbers and no shares: no comparison of one of them
        says it of all.
        """
        numbers = _numbers(values) or []
        if any(number < 0 for number in numbers):
            return [f"{column} < 0", f"{column} > 0"]
        if any(not number.is_integer() for number in numbers) and max(numbers) <= 1:
            return [f"{column} > 0.5", f"{column} < 0.5"]
        keys = [key for key in dict.fromkeys(map(_key, values)) if not _TIES.fullmatch(key)] or ["1"]
        if len(keys) > 2 or any(len(key) > _LONGEST for key in keys):
            return []
        if {*keys} <= {"0", "1"}:
            keys = ["1", "0"]
        elif {*keys} <= {"true", "false"}:
            keys = ["true", "false"]
        quotes = {key: '"' if "'" in key else "'" for key in keys if re.search("[<>=!'\"]", key)}
        one, other = (f"{quotes.get(key, '')}{key}{quotes.get(key, '')}" for key in (keys[0], keys[-1]))
        return [f"{column} = {one}", f"{column} = {other}" if len(keys) > 1 else f"{column} != {one}"]

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
        if self.models:
            return self._first_is_named(key, values)
        if self.table is not None:
            outcome = _outcome(key, self.table, self.stems)
            if outcome is None:
                raise RowError(f"column '{self.column}' is {repr(value)[:40]}; one of {', '.join(self.table)} is expected")
            return None if outcome == "tie" else outcome == "first"
        return None if _TIES.fullmatch(key) else self._first_is_compared(key, value)

    def _first_is_compared(self, key: str, value: Any) -> bool | None:
        """Return whether a winner is where the comparison says that the answer mapped as chosen won; None on its border."""
        sign, bound = self.comparison or ("<", "0")
        if {key, bound} <= {*_TRUTHS, *_TRUTHS.values()}:
            key, bound = _TRUTHS.get(key, key), _TRUTHS.get(bound, bound)
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

    def _first_is_named(self, key: str, values: Mapping[str, Any]) -> bool | None:
        """Return whether a winner is what the answer mapped as chosen is called in a row; None for a tie."""
        assert self.models is not None
        one, other = (_key(values.get(model)) for model in self.models)
        if key in (one, other) and one != other:
            return key == one
        if key != one and _TIES.fullmatch(key):
            return None
        raise RowError(
            f"column '{self.column}' is {key[:40]!r}; what one of {self.models[0]} and {self.models[1]} has, and the other has "
            "not, is expected"
        )


def _models(column: str, chosen: str, rejected: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Return the columns with what the answers are called, as model_a and model_b, where a winner's column always names one."""
    names = {name for row in rows for name in row if {*re.findall("[a-z]+", name.lower())} & _MODELS}
    names -= {column, chosen, rejected}
    one, other = _ends(chosen, rejected)
    pairs = [
        (first, second)
        for first in names
        for at in (found.start() for found in re.finditer(re.escape(one), first.lower()))
        for second in names
        if one != other and second.lower() == f"{first[:at]}{other}{first[at + len(one) :]}".lower()
    ]
    said = [row for row in rows if carries(row.get(column)) and not _TIES.fullmatch(_key(row[column]))]
    if not all(isinstance(row[column], str) and re.search(r"[^\W\d_].|.[^\W\d_]", row[column].strip()) for row in said):
        return None  # a letter or a number is none of their names
    for first, second in sorted(pairs):
        if said and all(_key(row[column]) in (_key(row.get(first)), _key(row.get(second))) for row in said):
            return first, second
    return None


def _is_signed(column: str, chosen: str, rejected: str, values: Sequence[Any]) -> bool:
    """Return whether negative numbers of a column mean that the answer mapped as chosen won."""
    is_first = _ends(chosen, rejected) not in _REVERSED
    return is_first and column.lower() in _SIGNED and _numbers(values) is not None


def _meanings(column: str, chosen: str, rejected: str, values: Sequence[Any]) -> dict[str, bool] | None:
    """Return what each value of a column means, whether the first answer won; None where that is not plain."""
    seen = {key for key in map(_key, values) if not _TIES.fullmatch(key)}
    if column.lower() in _SIGNED and _numbers(values):  # 1 and 2 are strengths of the second answer, no numbers of answers
        return None
    if seen <= {"0", "1"} and "label" in column.lower():  # 1 may mean the second of them, or that the first is right
        return None
    ends = _ends(chosen, rejected)
    tables = [{chosen.lower(): True, rejected.lower(): False}]
    if ends[0] != ends[1]:
        tables.append({ends[0]: True, ends[1]: False})
    if not seen:
        return tables[-1] if values else None
    if column.lower().endswith(("_id", "_idx", "_index")) and ends not in _REVERSED:
        tables.append({"0": True, "1": False})
    has_two = any("2" in re.findall(r"\d+", key) for key in seen)
    for table in (*tables, *(_PLAIN[:1] if ends in _REVERSED else _PLAIN)):
        is_counted = table == {"1": True, "2": False} and not has_two and ends != ("1", "2")  # 1 may be the second after 0
        if not is_counted and all(_outcome(key, table, _stems(chosen, rejected)) for key in seen):
            return table
    return None


def _outcome(key: str, table: Mapping[str, bool], stems: str) -> Outcome | None:
    """Return what a value says of two answers; None where it says nothing, or not for sure.

    Args:
        key: The value.
        table: What the answers are called, and whether it is the first of them.
        stems: What may stand before that, as a pattern.
    """
    if _TIES.fullmatch(key):
        return "tie"
    name = re.compile(rf"(?:(?:{stems})[\s_\-.:#(]*)?({'|'.join(map(re.escape, table))})\)?")
    alone = name.fullmatch(key)
    if alone:
        return "first" if table[alone[1]] else "second"
    related = _RELATION.fullmatch(key)
    named = [name.fullmatch(related[side].strip()) for side in ("one", "other")] if related else []
    sides = [table[match[1]] for match in named if match]
    if related is None or len(sides) < 2 or sides[0] == sides[1]:
        return None
    return "tie" if related["tie"] else "first" if sides[0] is bool(related["first"]) else "second"


def _stems(chosen: str, rejected: str) -> str:
    """Return a pattern of what may stand before what an answer is called, that of its own columns among it."""
    own = [name.lower().removesuffix(end) for name, end in zip((chosen, rejected), _ends(chosen, rejected), strict=True)]
    words = [r"[\s_\-.]*".join(map(re.escape, re.findall(r"[^\s_\-.]+", stem))) for stem in own]
    return "|".join([*filter(None, words), _STEMS])


def _ends(chosen: str, rejected: str) -> tuple[str, str]:
    """Return what the names of two answers end with, as 0 and 1 of response_0 and response_1 or output[0] and output[1]."""
    one, other = (re.findall(r"[a-z]+|\d+|[^a-z\d]+", name.lower().rstrip("])")) for name in (chosen, rejected))
    return (one or [""])[-1], (other or [""])[-1]


def _key(value: Any) -> str:
    """Return a value of a winner's column as text that is the same for 1, 1.0 and "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower()
    wrapped = re.fullmatch(r"[\[(\"'*]+(.*?)[\])\"'*]+", text)  # [[A]], as judges write it
    return wrapped[1].strip() if wrapped else text


def _numbers(values: Sequence[Any]) -> list[float] | None:
    try:
        return [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError):
        return None

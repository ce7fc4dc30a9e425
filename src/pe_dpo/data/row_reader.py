"""How a row of a recognised shape becomes a pair, and what is noticed on the way."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise
from typing import Any

from pe_dpo.data.columns import (
    SPLITS,
    begins_with_prompt,
    carries,
    names_rejected,
    quote,
    read_as,
    refuse_keys,
    refuse_row,
    refuse_unread,
)
from pe_dpo.data.dialogues import behind_prompt, ends_with_tag, is_transcript, messages_from_transcript, split_transcripts
from pe_dpo.data.messages import holds_messages, list_names, parse_written, read_messages, read_tools, without_nulls
from pe_dpo.data.pairs import Cut, Pair, RowError, describe_value
from pe_dpo.data.scores import compare_scores, read_margin, read_pair_number
from pe_dpo.data.shapes import Shape
from pe_dpo.data.sides import (
    Names,
    Sides,
    add_context,
    check_sides,
    drop_keys,
    kind_of,
    read_answer,
    read_prompt,
    read_sides,
    unread_keys,
)
from pe_dpo.data.split import named_side
from pe_dpo.errors import DataError

Values = Mapping[str, Any]

_CONTEXT = ("history", "input", "system", "tools", "chat_template_kwargs")
"""What stands beside the prompt, and belongs to it."""
_PRINTED = re.compile(r"\s*(?:\['.*'\]|\{'\w+': .*\})\s*", re.DOTALL)
"""A list of texts or an object as Python prints it, and pandas writes it into CSV."""


class RowReader:
    """Reads the rows of one shape.

    Attributes:
        unread: The columns that had content in some row that was read, and were not used.
        noted: The rows that are used and suspicious, by what is to be looked at.
    """

    def __init__(self, shape: Shape) -> None:
        """Begin with no row read.

        Args:
            shape: What all rows are.
        """
        self.shape = shape
        self.unread: list[str] = []
        self.noted: defaultdict[str, list[str]] = defaultdict(list)
        self._sides: dict[str, tuple[str, Any, str]] = {}
        """For each column that says whether a row is to train on, what the first row said that did, and its name."""

    def read(self, values: Values, *, where: str) -> Pair | None:
        """Return one row as a pair, prompt and answers all text or all messages; None where neither answer won.

        Args:
            values: The row's columns.
            where: The row, for people.

        Raises:
            RowError: The row is not of the shape; its message lacks `where`.
            DataError: A column that belongs to the prompt, or otherwise matters, has content and is not read.
        """
        given = {name: cell for name, cell in values.items() if name not in self.shape.ignored}
        mapped = self.shape.columns.values()
        refuse_row({name: given[name] for name in given if name not in mapped}, where, of_all=self.shape.refused)
        row = self.shape.rename(given)
        names = {name: self.shape.column(name) for name in (*row, *self.shape.required)}
        missing = [names[name] for name in self.shape.required if name not in row]
        if missing:
            raise RowError(f"has no column '{missing[0]}'; found {list_names(given)}")
        first_won = self.shape.winner.first_won(given) if self.shape.winner else True
        if first_won is None:
            return None
        row |= {name: self.shape.parse(row[name], names[name]) for name in self.shape.required}
        for name, kind in self.shape.kinds.items():
            if kind_of(row[name], name) != kind:
                others = ", or a file of its own for such rows" if kind_of(row[name], name) else ""
                found = describe_value(row[name])
                raise RowError(f"column '{names[name]}' is {found}; {kind}, as in the first rows, is expected{others}")
        for one, other in () if first_won else (("chosen", "rejected"), ("chosen_score", "rejected_score")):
            if one in row and other in row:
                row[one], row[other] = row[other], row[one]
                names[one], names[other] = names[other], names[one]
        sides, cut, read_from = self._read_sides(row, names, first_won=first_won)
        sides = add_context(sides, row, names)
        sides = drop_keys(sides, self.shape.ignored) if self.shape.ignored else sides
        check_sides(*sides, names=read_from)
        pair = Pair(
            *sides,
            margin=read_margin(row, names),
            tools=_read_tools(row, names),
            where=where,
            template_args=_read_template_args(row.get("chat_template_kwargs"), names.get("chat_template_kwargs", "")),
            cut=cut,
            beta=read_pair_number(row, self.shape.columns, "beta"),
            weight=read_pair_number(row, self.shape.columns, "weight"),
        )
        differences, scores = compare_scores(row)
        self._note_suspicious(row, sides, differences, where)
        self._account_for_unread(given, row, sides, scores, where)
        return pair

    def _note_suspicious(self, row: Values, sides: Sides, differences: Sequence[float], where: str) -> None:
        """Note what is suspicious in a row that is used; `differences` are those of its scores."""
        prompt = sides[0]
        texts = [row[name] for name in self.shape.required if isinstance(row[name], str)]
        if any(map(holds_messages, texts)):
            self.noted["text that looks like messages"].append(where)
        if any(map(_PRINTED.fullmatch, texts)):
            self.noted["text that looks like a printed list or object"].append(where)
        asked, *said = (side if isinstance(side, str) else side[0 if at else -1]["content"] for at, side in enumerate(sides))
        if behind_prompt(asked, *said) and (isinstance(prompt, str) or " " in asked.strip()):
            self.noted["answers that begin with the whole prompt"].append(where)
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            self.noted["prompt that ends with an assistant turn, with which the answers go on"].append(where)
        turns = pairwise(prompt) if "history" in row and not isinstance(prompt, str) else ()
        if any(
            (not one["content"].strip() and "tool_calls" not in one) or one["role"] == next_one["role"] == "user"
            for one, next_one in turns
        ):
            self.noted["history with a blank turn, or two user turns in a row"].append(where)
        if min([0.0, *differences]) < 0:
            self.noted["scores that contradict the labels"].append(where)
        elif 0 in differences:
            self.noted["scores that are equal"].append(where)

    def _account_for_unread(self, given: Values, row: Values, sides: Sides, scores: Set[str], where: str) -> None:
        """Keep the names of the columns that were not read, nor as `scores`; refuse those that matter."""
        required, column = self.shape.required, self.shape.column
        read = {*scores, *required, "margin", "history", "tools", "chat_template_kwargs"}
        read |= {"beta", "weight"} & self.shape.columns.keys()
        columns = {*map(column, read), *([self.shape.winner.column] if self.shape.winner else [])}
        rest = {name: cell for name, cell in given.items() if name not in columns and name.strip() and carries(cell)}
        first = required[0]
        is_whole = required == ("chosen", "rejected")  # the dialogues bring what they answer
        taken = {name: column(name) for name in _CONTEXT if carries(row.get(name))}
        if not is_whole and "rejected_response" not in required:
            taken["prompt"] = column(first)
        refuse_unread(
            {name: rest[name] for name in rest if not (is_whole and read_as(name) == "prompt")},
            sides,
            where,
            taken=taken,
            is_text=isinstance(row[first], str)
            and (first == "instruction" or (first == "prompt" and not carries(row.get("instruction")))),
        )
        refuse_keys(sides)
        self._compare_marks(rest, where)
        in_prompt = {column("system"), column("input")}
        inside = [f"{column(name)}.{key}" for name in required for key in unread_keys(row[name])]
        self.unread += [name for name in (*rest, *inside) if name not in in_prompt and name not in self.unread]

    def _compare_marks(self, rest: Values, where: str) -> None:
        """Compare what a row says of itself, in columns that were not read, with what is made of it."""
        if names_rejected(rest, self.shape.column("rejected")):
            self.noted["a winner that contradicts the order of the answers"].append(where)
        for name, value in rest.items():
            side = named_side(str(value)) if name.strip().lower() in SPLITS else None
            if side is None:
                continue
            first_side, first, first_where = self._sides.setdefault(name, (side, value, where))
            if first_side != side:
                raise DataError(
                    f"{where}: column '{name}' is {repr(value)[:40]}, and {repr(first)[:40]} in {first_where}; rows of one "
                    "place are not divided by it: write a file of each, for data.train and data.eval, or use all alike with "
                    f"data.ignore: [{quote(name)}]"
                )

    def _read_sides(self, row: Values, names: Mapping[str, str], *, first_won: bool) -> tuple[Sides, Cut, Names]:
        """Return prompt and answers of one kind, where the answers were cut off, and the columns of the three.

        Args:
            row: The columns under our names; where `chosen` is among them, its answer is the one that won.
            names: From our names to those of the columns.
            first_won: Whether of answers elsewhere the first is chosen.
        """
        first = self.shape.required[0]
        columns = names[first], names.get("chosen", "chosen"), names.get("rejected", "rejected")
        prompt, chosen, rejected = row[first], row.get("chosen"), row.get("rejected")
        match self.shape.required:
            case ("input", *answers):
                if not isinstance(prompt, Mapping) or "messages" not in prompt:
                    raise RowError(f"column 'input' is {describe_value(prompt)}; an object with messages is expected")
                prompt, chosen, rejected = prompt["messages"], *(row[name] for name in answers)
                columns = columns[0], names[answers[0]], names[answers[1]]
            case ("messages", "rejected_response"):
                *prompt, last = read_messages(prompt, columns[0])
                if last["role"] != "assistant" or not prompt:
                    raise RowError(
                        f"column '{columns[0]}' ends with a {last['role']} turn after {len(prompt)} others; "
                        "a prompt and then the chosen assistant turn are expected"
                    )
                chosen, rejected = [last], row["rejected_response"]
                columns = columns[0], columns[0], names["rejected_response"]
            case (_, "output"):
                if not isinstance(row["output"], list) or len(row["output"]) != 2:
                    found = describe_value(row["output"])
                    raise RowError(f"column '{names['output']}' is {found}; two answers, the better one first, are expected")
                chosen, rejected = row["output"]
                columns = columns[0], f"{names['output']}[0]", f"{names['output']}[1]"
        if not first_won and "chosen" not in self.shape.required:
            chosen, rejected, columns = rejected, chosen, (columns[0], columns[2], columns[1])
        one, other = read_answer(chosen, columns[1]), read_answer(rejected, columns[2])
        if prompt is None and self.shape.required != ("chosen", "rejected") and not begins_with_prompt(one):
            asked = next((name for name in row if read_as(name) in ("prompt", "input") and carries(row[name])), None)
            remedy = f"read it from another column with data: {{columns: {{prompt: {quote(asked)}}}}}" if asked else "write it"
            raise RowError(f"column '{columns[0]}' is null, where the prompt is expected; {remedy}")
        prompt = read_prompt(self.shape.required, prompt, one, row, names)
        if isinstance(one, str) and isinstance(other, str):
            return *self._read_texts(prompt, row[first], one, other, columns), columns
        return read_sides(prompt, one, other, columns), None, columns

    def _read_texts(self, prompt: Any, asked: Any, chosen: str, rejected: str, columns: Names) -> tuple[Sides, Cut]:
        """Return the sides of a row whose answers are texts, without the prompt, or what it asks alone, that they repeat."""
        if prompt is None:
            sides = self.shape.split(chosen, rejected, columns[1:])
            is_whole = self.shape.split is split_transcripts or sides[0].endswith("\n") or ends_with_tag(sides[0])
            return sides, None if is_whole else "words"
        turn = {"role": "user", "content": prompt.strip() if isinstance(prompt, str) else None}
        if all(is_transcript(text) and turn in messages_from_transcript("", text) for text in (chosen, rejected)):
            return split_transcripts(chosen, rejected, columns[1:]), None
        if self.shape.repeats_prompt:
            behind = behind_prompt(prompt, chosen, rejected) or behind_prompt(asked, chosen, rejected)
            if behind:
                return (prompt, *behind), "prompt"
        return read_sides(prompt, chosen, rejected, columns), None


def _read_tools(row: Values, names: Mapping[str, str]) -> list[Any] | None:
    """Return the descriptions of functions in a row, or within its input.

    Raises:
        RowError: Both have some, and they are not the same.
    """
    given = row.get("input")
    tools = read_tools(row.get("tools"), names.get("tools", "tools"))
    inside = read_tools(given.get("tools"), "input.tools") if isinstance(given, Mapping) else None
    if tools and inside and tools != inside:
        within, beside = names["input"], names["tools"]
        raise RowError(f"has tools within '{within}' and others in column '{beside}'; write all of them into one")
    return tools or inside


def _read_template_args(cell: Any, column: str) -> Mapping[str, Any]:
    """Return the arguments of the chat template for one row, from an object or its JSON text."""
    if not carries(cell):
        return {}
    given = parse_written(cell, column) if isinstance(cell, str) else without_nulls(cell)
    if not isinstance(given, Mapping):
        raise RowError(
            f"column '{column}' is {describe_value(cell)}; an object with arguments of the chat template is expected"
        )
    return given

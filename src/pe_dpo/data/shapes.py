"""The shapes in which preference data comes, told apart by their columns, and how a row of each becomes a pair.

input, preferred_output, non_preferred_output  OpenAI's preference fine-tuning
messages, rejected_response                    the last assistant turn of messages is the chosen answer
conversations, chosen, rejected                ShareGPT {from, value}
prompt (input), chosen, rejected               text, or lists of messages (the answers may repeat the prompt)
instruction (input), chosen, rejected          Alpaca; `output` is ignored
messages, chosen, rejected                     the dialogue so far, and two answers
instruction or prompt, output                  output is a list of two answers, of which the first is chosen
chosen, rejected                               whole dialogues (also messages and rejected_messages), transcripts, texts

Each of them may have system, history (turns before the prompt), tools, chat_template_kwargs, margin or scores, and a winner.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pe_dpo.data.column_maps import explain_columns, is_labelled
from pe_dpo.data.columns import (
    SPLITS,
    begins_with_prompt,
    carries,
    find_spellings,
    find_winner,
    names_rejected,
    quote,
    read_as,
    refuse_keys,
    refuse_row,
    refuse_unread,
    what_matters,
)
from pe_dpo.data.dialogues import ends_with_tag, is_transcript, messages_from_transcript, split_texts, split_transcripts
from pe_dpo.data.messages import holds_messages, list_names, parse_written, read_messages, read_text, read_tools, without_nulls
from pe_dpo.data.pairs import Cut, Pair, RowError, describe_value
from pe_dpo.data.scores import compare_scores, read_margin
from pe_dpo.data.sides import (
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
from pe_dpo.data.winners import Winner
from pe_dpo.errors import DataError
from pe_dpo.recipe.schema import Column

Values = Mapping[str, Any]

_SHAPES = {
    ("input", "preferred_output", "non_preferred_output"): (
        "OpenAI preference data (input, preferred_output, non_preferred_output)"
    ),
    ("messages", "rejected_response"): "messages whose last assistant turn is chosen, and rejected_response",
    ("conversations", "chosen", "rejected"): "ShareGPT conversations with a chosen and a rejected answer",
    ("prompt", "chosen", "rejected"): "prompt ({prompt}), chosen and rejected ({chosen})",
    ("instruction", "chosen", "rejected"): "instruction with optional input and system, chosen, rejected",
    ("messages", "chosen", "rejected"): "messages with a chosen and a rejected answer ({chosen})",
    ("instruction", "output"): "instruction with optional input, and output with two answers, the first of them chosen",
    ("prompt", "output"): "prompt ({prompt}), and output with two answers, the first of them chosen",
    ("chosen", "rejected"): "whole dialogues (messages); the prompt is what chosen and rejected share",
}
"""The columns of each shape, and the shape in words; the first whose columns are there is taken."""
_CONTEXT = ("history", "input", "system", "tools", "chat_template_kwargs")
"""What stands beside the prompt, and belongs to it."""
_LISTED = re.compile(r'\["(?:[^"\\]|\\.)*"(?:, *"(?:[^"\\]|\\.)*")*\]', re.DOTALL)
"""A JSON list of texts."""
_PRINTED = re.compile(r"\s*(?:\['.*'\]|\{'\w+': .*\})\s*", re.DOTALL)
"""A list of texts or an object as Python prints it, and pandas writes it into CSV."""
_TRANSCRIPTS = "whole Human/Assistant transcripts; the prompt ends at the last Assistant tag that chosen and rejected share"
_TEXTS = (
    "whole texts; the prompt is what chosen and rejected share up to the last tag of an answer, else line break, else space "
    "(such texts want data.template: plain)"
)


class Shape:
    """How every row of a data set is read.

    Attributes:
        words: What it is, for people.
        required: The columns that every row must have, by our names.
        kinds: For each column with an answer or prompt, `text`, `messages` and so on, as in the first rows.
        unread: The columns that had content in some row that was read, and were not used.
        refused: The columns for which every one of the first rows cannot be trained on, as images.
        sides: For each column that says whether a row is to train on, what the first row said that did, and its name.
        noted: The rows that are used and suspicious, by what is to be looked at.
    """

    def __init__(
        self,
        rows: Sequence[Values],
        *,
        where: str,
        columns: Mapping[Column, str] | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        """Recognise the shape of a data set from its first rows; all rows are then held to it.

        Args:
            rows: The columns of the first rows, at least one.
            where: The file, for messages.
            columns: From names that pe-dpo knows to the names of the columns that hold them; for `winner` a comparison too.
            ignore: Columns, and keys of messages, that are left unread on purpose.

        Raises:
            DataError: The columns are those of no shape (the message shows the column map to write), of unpaired
                data, or the column map names what is not there.
        """
        self.ignored = frozenset(ignore)
        self.unread: list[str] = []
        self.sides: dict[str, tuple[str, Any, str]] = {}
        self.noted: defaultdict[str, list[str]] = defaultdict(list)
        self.columns: dict[str, str] = {str(ours): theirs for ours, theirs in (columns or {}).items()}
        said_winner = self.columns.pop("winner", None)
        rows = [{name: cell for name, cell in row.items() if name not in self.ignored} for row in rows]
        names = list(dict.fromkeys(name for row in rows for name in row))
        for key, column in self.columns.items():
            if column not in names:
                raise DataError(f"data.columns.{key}: {where} has no column '{column}'; found {list_names(names)}")
        self.as_text = {name for name in names if _holds_written([row[name] for row in rows if name in row])}
        parsed = [{name: self._parsed(cell, name, is_tried=True) for name, cell in row.items()} for row in rows]
        examples = {name: next((row[name] for row in parsed if carries(row.get(name))), None) for name in names}
        mapped, spelled = self.columns, find_spellings(examples, self.columns)
        self.columns = mapped | spelled

        renamed = [self._rename(row) for row in parsed]
        self.required = _find_shape(renamed)
        answers = self.columns.get("chosen", "chosen"), self.columns.get("rejected", "rejected")
        unused = {
            name: [example] for name, example in examples.items() if name not in self.columns.values() and carries(example)
        }
        is_unlabelled = "output" in self.required or ("chosen" in self.required and not is_labelled(*answers))
        if not self.required or (is_unlabelled and find_winner(unused) and not said_winner):
            raise DataError(explain_columns(names, rows, mapped, where=where))
        if all(isinstance(row.get("prompt"), str) and _LISTED.fullmatch(row["prompt"].strip()) for row in renamed):
            raise DataError(
                f"{where}: column '{self.columns.get('prompt', 'prompt')}' holds lists of texts, written as text; write "
                "each row as messages, or as one text"
            )
        self.kinds: dict[str, str] = {}
        for name in self.required:
            kinds = Counter(filter(None, (kind_of(row[name], name) for row in renamed if name in row)))
            if kinds and name != "input":
                self.kinds[name] = kinds.most_common(1)[0][0]  # of equally many the first
        are_texts = self.required == ("chosen", "rejected") and self.kinds.get("chosen") != "messages"
        is_tagged = any(isinstance(row.get("chosen"), str) and is_transcript(row["chosen"]) for row in renamed)
        self.split = split_transcripts if is_tagged else split_texts
        if are_texts and not is_tagged and not _share_beginnings(renamed):
            raise DataError(explain_columns(names, rows, mapped, where=where))
        repeated = [row[self.required[0]].strip() for row in renamed if _behind_prompt(*map(row.get, self.required))]
        # Answers to "Hi" may begin with that word, and repeat nothing.
        are_words = len({*repeated}) < 3 and all(re.fullmatch(r"\w*", prompt) for prompt in repeated)
        self.repeats_prompt = 2 * len(repeated) > len(renamed) and not are_words
        self.winner = Winner(said_winner, rows, *answers, where=where) if said_winner else None
        self.refused = {name for name in rows[0] if all(what_matters(name, row.get(name)) for row in rows)}
        self.words = self._describe(spelled)

    def _describe(self, spelled: Mapping[str, str]) -> str:
        """Return the shape in words, with the columns that were `spelled` otherwise."""
        words = _SHAPES[self.required].format(**{"prompt": "text", "chosen": "text"} | self.kinds)
        if self.required == ("chosen", "rejected") and self.kinds.get("chosen") != "messages":
            words = _TEXTS if self.split is split_texts else _TRANSCRIPTS
        words += "".join(f"; '{theirs}' read as {ours}" for ours, theirs in spelled.items())
        required = [self.columns.get(name, name) for name in self.required]
        written = [column for column in required if column in self.as_text]
        words += "; the answers repeat the prompt, which is left out of them" if self.repeats_prompt else ""
        words += f"; messages written as text in {', '.join(written)}" if written else ""
        return words + (f"; {self.winner.words}" if self.winner else "")

    def read(self, values: Values, *, where: str) -> Pair | None:
        """Return one row as a pair, prompt and answers all text or all messages; None where neither answer won.

        Args:
            values: The row's columns.
            where: The row, for people.

        Raises:
            RowError: The row is not of the shape; its message lacks `where`.
            DataError: A column that belongs to the prompt, or otherwise matters, has content and is not read.
        """
        given = {name: cell for name, cell in values.items() if name not in self.ignored}
        mapped = self.columns.values()
        refuse_row({name: given[name] for name in given if name not in mapped}, where, of_all=self.refused)
        row = self._rename(given)
        names = {name: self.columns.get(name, name) for name in (*row, *self.required)}
        missing = [names[name] for name in self.required if name not in row]
        if missing:
            raise RowError(f"has no column '{missing[0]}'; found {list_names(given)}")
        if self.winner:
            first_won = self.winner.first_won(given)
            if first_won is None:
                return None
            for one, other in () if first_won else (("chosen", "rejected"), ("chosen_score", "rejected_score")):
                if one in row and other in row:
                    row[one], row[other] = row[other], row[one]
                    names[one], names[other] = names[other], names[one]
        row |= {name: self._parsed(row[name], names[name]) for name in self.required}
        for name, kind in self.kinds.items():
            if kind_of(row[name], name) != kind:
                others = ", or a file of its own for such rows" if kind_of(row[name], name) else ""
                found = describe_value(row[name])
                raise RowError(f"column '{names[name]}' is {found}; {kind}, as in the first rows, is expected{others}")
        sides, cut = self._read_sides(row, names)
        sides = add_context(sides, row, names)
        sides = drop_keys(sides, self.ignored) if self.ignored else sides
        check_sides(*sides, names=(names[self.required[0]], names.get("chosen", "chosen"), names.get("rejected", "rejected")))
        pair = Pair(
            *sides,
            margin=read_margin(row, names),
            tools=_read_tools(row, names),
            where=where,
            template_args=_read_template_args(row.get("chat_template_kwargs"), names.get("chat_template_kwargs", "")),
            cut=cut,
        )
        self._look_at(given, row, sides, where)
        return pair

    def _look_at(self, given: Values, row: Values, sides: Sides, where: str) -> None:
        """Note what is suspicious in a row, and the columns that were not read; refuse those that matter."""
        prompt = sides[0]
        if any(isinstance(row[name], str) and holds_messages(row[name]) for name in self.required):
            self.noted["text that looks like messages"].append(where)
        if any(isinstance(row[name], str) and _PRINTED.fullmatch(row[name]) for name in self.required):
            self.noted["text that looks like a printed list or object"].append(where)
        asked, *said = (side if isinstance(side, str) else side[0 if at else -1]["content"] for at, side in enumerate(sides))
        if _behind_prompt(asked, *said) and (isinstance(prompt, str) or " " in asked.strip()):
            self.noted["answers that begin with the whole prompt"].append(where)
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            self.noted["prompt that ends with an assistant turn, with which the answers go on"].append(where)
        turns = pairwise(prompt) if "history" in row and not isinstance(prompt, str) else ()
        if any(
            (not one["content"].strip() and "tool_calls" not in one) or one["role"] == next_one["role"] == "user"
            for one, next_one in turns
        ):
            self.noted["history with a blank turn, or two user turns in a row"].append(where)
        differences, scores = compare_scores(row)
        if min([0.0, *differences]) < 0:
            self.noted["scores that contradict the labels"].append(where)
        elif 0 in differences:
            self.noted["scores that are equal"].append(where)
        read = {*scores, *self.required, "margin", "history", "tools", "chat_template_kwargs"}
        columns = {self.columns.get(name, name) for name in read} | ({self.winner.column} if self.winner else set())
        rest = {name: cell for name, cell in given.items() if name not in columns and name.strip() and carries(cell)}
        is_whole = self.required == ("chosen", "rejected")  # the dialogues bring what they answer
        first = self.required[0]
        taken = {name: self.columns.get(name, name) for name in _CONTEXT if carries(row.get(name))}
        taken |= {} if is_whole or "rejected_response" in self.required else {"prompt": self.columns.get(first, first)}
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
        in_prompt = {self.columns.get(name, name) for name in ("system", "input")}
        inside = [f"{self.columns.get(name, name)}.{key}" for name in self.required for key in unread_keys(row[name])]
        self.unread += [name for name in (*rest, *inside) if name not in in_prompt and name not in self.unread]

    def _compare_marks(self, rest: Values, where: str) -> None:
        """Compare what a row says of itself, in columns that were not read, with what is made of it."""
        if names_rejected(rest, self.columns.get("rejected", "rejected")):
            self.noted["a winner that contradicts the order of the answers"].append(where)
        for name, value in rest.items():
            side = named_side(str(value)) if name.strip().lower() in SPLITS else None
            if side is None:
                continue
            first_side, first, first_where = self.sides.setdefault(name, (side, value, where))
            if first_side != side:
                raise DataError(
                    f"{where}: column '{name}' is {repr(value)[:40]}, and {repr(first)[:40]} in {first_where}; rows of one "
                    "place are not divided by it: write a file of each, for data.train and data.eval, or use all alike with "
                    f"data.ignore: [{quote(name)}]"
                )

    def _rename(self, values: Values) -> dict[str, Any]:
        """Return a row under our names; a column of another meaning that has such a name already is left out."""
        taken = {*self.columns.values()}
        kept = {name: cell for name, cell in values.items() if name not in taken and name not in self.columns}
        return kept | {name: values[column] for name, column in self.columns.items() if column in values}

    def _parsed(self, cell: Any, column: str, *, is_tried: bool = False) -> Any:
        """Return a cell, with the messages in it where its column holds messages written as text."""
        if column not in self.as_text or not isinstance(cell, str) or not cell.strip():
            return cell
        try:
            return parse_written(cell, column)
        except RowError:
            if is_tried:
                return cell
            raise

    def _read_sides(self, row: Values, names: Mapping[str, str]) -> tuple[Sides, Cut]:
        """Return prompt and answers of one kind, from the columns of the shape, and where the answers were cut off."""
        first = self.required[0]
        columns = names[first], names.get("chosen", "chosen"), names.get("rejected", "rejected")
        prompt, chosen, rejected = row[first], row.get("chosen"), row.get("rejected")
        match self.required:
            case ("input", *answers):
                if not isinstance(prompt, Mapping) or "messages" not in prompt:
                    raise RowError(f"column 'input' is {describe_value(prompt)}; an object with messages is expected")
                prompt, chosen, rejected = prompt["messages"], *(row[name] for name in answers)
                columns = "input", answers[0], answers[1]
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
        one, other = read_answer(chosen, columns[1]), read_answer(rejected, columns[2])
        if prompt is None and self.required != ("chosen", "rejected") and not begins_with_prompt(one):
            asked = next((name for name in row if read_as(name) in ("prompt", "input") and carries(row[name])), None)
            remedy = f"read it from another column with data: {{columns: {{prompt: {quote(asked)}}}}}" if asked else "write it"
            raise RowError(f"column '{columns[0]}' is null, where the prompt is expected; {remedy}")
        prompt = read_prompt(self.required, prompt, one, row, names)
        if isinstance(one, str) and isinstance(other, str):
            return self._read_texts(prompt, one, other, columns)
        return read_sides(prompt, one, other, columns), None

    def _read_texts(self, prompt: Any, chosen: str, rejected: str, columns: tuple[str, str, str]) -> tuple[Sides, Cut]:
        """Return the sides of a row whose answers are texts, without the prompt that they may repeat."""
        if prompt is None:
            sides = self.split(chosen, rejected, columns[1:])
            is_whole = self.split is split_transcripts or sides[0].endswith("\n") or ends_with_tag(sides[0])
            return sides, None if is_whole else "words"
        asked = {"role": "user", "content": prompt.strip() if isinstance(prompt, str) else None}
        if all(is_transcript(text) and asked in messages_from_transcript("", text) for text in (chosen, rejected)):
            return split_transcripts(chosen, rejected, columns[1:]), None
        behind = _behind_prompt(prompt, chosen, rejected) if self.repeats_prompt else None
        if behind:
            return (prompt, *behind), "prompt"
        return read_sides(prompt, chosen, rejected, columns), None


def _find_shape(rows: Sequence[Values]) -> tuple[str, ...]:
    """Return the required columns of the first shape that renamed rows have; empty for none."""
    found = {name for row in rows for name in row}
    for shape in _SHAPES:
        if not found.issuperset(shape):
            continue
        values = [row[shape[0]] for row in rows if shape[0] in row]
        is_list = any(isinstance(row.get("output"), list) and len(row["output"]) == 2 for row in rows)
        if shape[0] == "input" and all(isinstance(value, str) for value in values):
            continue
        if ("output" in shape and not is_list) or ("rejected_response" in shape and "chosen" in found):
            continue
        return shape
    return ()


def _holds_written(cells: Sequence[Any]) -> bool:
    """Return whether most texts of a column are messages written as text."""
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    return bool(texts) and 2 * sum(map(holds_messages, texts)) >= len(texts)


def _behind_prompt(prompt: Any, chosen: Any = None, rejected: Any = None) -> tuple[str, str] | None:
    """Return what two texts say behind the prompt that both begin with, apart from white space around it.

    None where they do not begin with all of it, or go on inside a word or a sentence.
    """
    stem = prompt.strip() if isinstance(prompt, str) else ""
    rests = []
    for text in (chosen, rejected) if stem else ():
        if not isinstance(text, str) or not text.lstrip().startswith(stem):
            return None
        is_exact = text.startswith(prompt)
        rest = text[len(prompt) :] if is_exact else text.lstrip()[len(stem) :]
        is_inside = (prompt if is_exact else stem)[-1].isalnum() and not rest[:1].isspace()
        if not rest.strip() or is_inside:
            return None
        rests.append(rest if is_exact or not prompt[-1].isspace() else rest.lstrip())
    return (rests[0], rests[1]) if rests else None


def _share_beginnings(rows: Sequence[Values]) -> bool:
    """Return whether chosen and rejected share a beginning in all rows, and no other column may be the prompt."""
    for row in rows:
        others = [cell for name, cell in row.items() if name not in ("chosen", "rejected")]
        if any(isinstance(cell, str) and " " in cell.strip() for cell in others):
            return False
        try:
            split_texts(read_text(row.get("chosen"), "chosen"), read_text(row.get("rejected"), "rejected"))
        except RowError:
            return False
    return True


def _read_tools(row: Values, names: Mapping[str, str]) -> list[Any] | None:
    given = row.get("input")
    inside = given.get("tools") if isinstance(given, Mapping) else None
    return read_tools(row.get("tools"), names.get("tools", "tools")) or read_tools(inside, "input.tools")


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

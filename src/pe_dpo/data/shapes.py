"""The shapes in which preference data comes, told apart by their columns.

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
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pe_dpo.data.column_maps import explain_columns, explain_winner, is_labelled
from pe_dpo.data.columns import (
    carries,
    find_spellings,
    find_winner,
    what_matters,
)
from pe_dpo.data.dialogues import behind_prompt, is_transcript, split_texts, split_transcripts
from pe_dpo.data.messages import holds_messages, list_names, parse_written, read_text
from pe_dpo.data.pairs import RowError
from pe_dpo.data.sides import (
    kind_of,
)
from pe_dpo.data.winners import Winner
from pe_dpo.errors import DataError
from pe_dpo.recipe.data_section import Column

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
_LISTED = re.compile(r'\["(?:[^"\\]|\\.)*"(?:, *"(?:[^"\\]|\\.)*")*\]', re.DOTALL)
"""A JSON list of texts."""
_TRANSCRIPTS = "whole Human/Assistant transcripts; the prompt ends at the last Assistant tag that chosen and rejected share"
_TEXTS = (
    "whole texts; the prompt is what chosen and rejected share up to the last tag of an answer, else line break, else space "
    "(such texts want data.template: plain)"
)


class Shape:
    """What the rows of a data set are, to which all of them are held.

    Attributes:
        words: What it is, for people.
        required: The columns that every row must have, by our names.
        kinds: For each column with an answer or prompt, `text`, `messages` and so on, as in the first rows.
        columns: From our names to those of the columns, where these differ.
        ignored: The columns, and keys of messages, that are left unread on purpose.
        split: How two whole texts become a prompt and two answers.
        repeats_prompt: Whether answers begin with the whole prompt, which is left out of them.
        winner: What says which answer won; None where the first always did.
        refused: The columns for which every one of the first rows cannot be trained on, as images.
    """

    def __init__(
        self,
        rows: Sequence[Values],
        *,
        where: str,
        columns: Mapping[Column, str] | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        """Recognise the shape of a data set from its first rows.

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
        self.columns: dict[str, str] = {str(ours): theirs for ours, theirs in (columns or {}).items()}
        said_winner = self.columns.pop("winner", None)
        rows = [{name: cell for name, cell in row.items() if name not in self.ignored} for row in rows]
        names = list(dict.fromkeys(name for row in rows for name in row))
        _check_map(self.columns, said_winner, names, self.ignored, where=where)
        self._as_text = {name for name in names if _holds_written([row[name] for row in rows if name in row])}
        parsed = [{name: self.parse(cell, name, is_tried=True) for name, cell in row.items()} for row in rows]
        examples = {name: next((row[name] for row in parsed if carries(row.get(name))), None) for name in names}
        mapped, spelled = self.columns, find_spellings(examples, self.columns)
        self.columns = mapped | spelled

        renamed = [self.rename(row) for row in parsed]
        self.required = _find_shape(renamed)
        answers = self._name_answers()
        unused = {
            name: [example] for name, example in examples.items() if name not in self.columns.values() and carries(example)
        }
        known_winner = None if said_winner is not None else find_winner(unused)
        if known_winner and "output" in self.required:
            found = f"{where}: the columns are {list_names(names)}"
            raise DataError(explain_winner(found, mapped, known_winner, rows, answers, may_be_other=True))
        if not self.required or (known_winner and "chosen" in self.required and not is_labelled(*answers)):
            raise DataError(explain_columns(names, rows, mapped, where=where))
        if all(isinstance(row.get("prompt"), str) and _LISTED.fullmatch(row["prompt"].strip()) for row in renamed):
            raise DataError(
                f"{where}: column '{self.column('prompt')}' holds lists of texts, written as text; write "
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
        repeated = [row[self.required[0]].strip() for row in renamed if behind_prompt(*map(row.get, self.required))]
        # Answers to "Hi" may begin with that word, and repeat nothing.
        are_words = len({*repeated}) < 3 and all(re.fullmatch(r"\w*", prompt) for prompt in repeated)
        self.repeats_prompt = 2 * len(repeated) > len(renamed) and not are_words
        self.winner = None if said_winner is None else Winner(said_winner, rows, *answers, where=where)
        self.refused = {name for name in rows[0] if all(what_matters(name, row.get(name)) for row in rows)}
        self.words = self._describe(spelled)

    def _describe(self, spelled: Mapping[str, str]) -> str:
        """Return the shape in words, with the columns that were `spelled` otherwise."""
        words = _SHAPES[self.required].format(**{"prompt": "text", "chosen": "text"} | self.kinds)
        if self.required == ("chosen", "rejected") and self.kinds.get("chosen") != "messages":
            words = _TEXTS if self.split is split_texts else _TRANSCRIPTS
        if self.winner:  # which says what the shape alone would say
            words = words.replace(", the first of them chosen", "").replace("turn is chosen", "turn is one answer")
        words += "".join(f"; '{theirs}' read as {ours}" for ours, theirs in spelled.items())
        required = [self.column(name) for name in self.required]
        written = [column for column in required if column in self._as_text]
        words += "; the answers repeat the prompt, which is left out of them" if self.repeats_prompt else ""
        words += f"; messages written as text in {', '.join(written)}" if written else ""
        return words + (f"; {self.winner.words}" if self.winner else "")

    def _name_answers(self) -> tuple[str, str]:
        """Return what the answer that is chosen where there is no winner is called, and the other one."""
        match self.required:
            case ("input", one, other) | (_, one, other):
                return self.column(one), self.column(other)
            case (dialogue, "rejected_response"):
                return self.column(dialogue), self.column("rejected_response")
            case (_, "output"):
                return f"{self.column('output')}[0]", f"{self.column('output')}[1]"
        return self.column("chosen"), self.column("rejected")

    def column(self, ours: str) -> str:
        """Return the name of the column that is read under one of ours.

        Args:
            ours: A name that pe-dpo knows.
        """
        return self.columns.get(ours, ours)

    def rename(self, values: Values) -> dict[str, Any]:
        """Return a row under our names; a column of another meaning that has such a name already is left out.

        Args:
            values: The columns of the row, under their own names.
        """
        taken = {*self.columns.values()}
        kept = {name: cell for name, cell in values.items() if name not in taken and name not in self.columns}
        return kept | {name: values[column] for name, column in self.columns.items() if column in values}

    def parse(self, cell: Any, column: str, *, is_tried: bool = False) -> Any:
        """Return a cell, with the messages in it where its column holds messages written as text.

        Args:
            cell: The cell.
            column: Its own name.
            is_tried: Whether a text that cannot be read is returned as it is.

        Raises:
            RowError: The text cannot be read.
        """
        if column not in self._as_text or not isinstance(cell, str) or not cell.strip():
            return cell
        try:
            return parse_written(cell, column)
        except RowError:
            if is_tried:
                return cell
            raise


def _check_map(
    columns: Mapping[str, str], winner: str | None, names: Sequence[str], ignored: frozenset[str], *, where: str
) -> None:
    """Refuse a column map with a column that is not there, is ignored, or is read as two things."""
    for ours, column in (*columns.items(), *([("winner", winner)] if winner in ignored else [])):
        if column in ignored:
            raise DataError(f"data.columns.{ours}: column '{column}' is in data.ignore too; take it out of one of them")
        if column not in names:
            raise DataError(f"data.columns.{ours}: {where} has no column '{column}'; found {list_names(names)}")
        twice = next((name for name, other in columns.items() if other == column and name != ours), None)
        if twice in ("chosen", "rejected") and ours in ("prompt", "instruction", "chosen", "rejected"):
            raise DataError(f"data.columns: {ours} and {twice} both name column '{column}'; name another for one of them")


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

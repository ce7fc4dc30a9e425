"""The message for data of no known shape: what it is, and the column map to write."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pe_dpo.data.columns import begins_with_prompt, carries, find_winner, guess_winner, quote, read_as
from pe_dpo.data.messages import list_names
from pe_dpo.data.winners import Winner

Values = Mapping[str, Any]

_SEVERAL = (
    "completions",
    "answers",
    "responses",
    "candidates",
    "generations",
    "outputs",
    "choices",
    "replies",
    "output",
    "summaries",
)
"""Columns with a list of answers."""
_SINGLE = ("completion", "completions", "output", "response", "answer", "messages", "conversations", "text")
_GOOD = "chosen preferred accepted winner winning win better best good positive pos"
_BAD = "rejected dispreferred nonpreferred loser losing lose worse worst bad negative neg"
_HINTS = {
    "rejected": f"{_BAD} l k",
    "chosen": f"{_GOOD} w j",
    "prompt": "prompt question instruction query problem q post context input user messages conversations conversation "
    "dialogue history",
}
"""Words in the names of other people's columns that hint at ours, the likeliest first."""
_NO_TEXT = {"id", "score", "model", "source", "rating", "logps", "system", "metadata"}


def is_labelled(chosen: str, rejected: str) -> bool:
    """Return whether two names of columns say themselves which of the answers is the better one."""
    good, bad = _words(chosen), _words(rejected)
    return bool({*_GOOD.split()} & {*good}) or bool({*_BAD.split()} & {*bad})


def explain_columns(names: Sequence[str], rows: Sequence[Values], columns: Mapping[str, str], *, where: str) -> str:
    """Return the message for data of no known shape: what it is, and the column map to write, guessed where possible.

    Args:
        names: The columns found.
        rows: The first rows.
        columns: The column map that was given.
        where: The file.
    """
    found = f"{where}: the columns are {list_names(names)}"
    values = {name: [row[name] for row in rows if carries(row.get(name))] for name in names}
    inner = next((name for name in values if any(map(_holds_rows, values[name]))), None)
    if inner:
        return f"{found}; the rows lie deeper, in '{inner}': write the objects there as the rows, in a list or one a line"
    winner = find_winner(values)
    guess, free = _guess(values, columns, winner)
    chosen, rejected = guess.pop("chosen", None), guess.pop("rejected", None)
    lacking = [side for side in (chosen, rejected) if side is None]
    refusal = _refuse_single_answers(values, winner, is_alone=len(free) < len(lacking)) if lacking else None
    if refusal and (len(lacking) == 2 or len(free) < len(lacking)):
        return f"{found}: {refusal}"
    order = ("prompt", "instruction", "input", "system", "history")
    others = {key: guess[key] for key in (*(key for key in order if key in guess), *guess)}
    is_dialogue = any(begins_with_prompt(value) for value in values.get(chosen or "", ()))
    if not {"prompt", "instruction", "messages"} & others.keys() and free and not is_dialogue:
        others = {"prompt": "<column>", **others}
    if (chosen, rejected) == ("chosen", "rejected") and not others:
        return (
            f"{found}: none of them is the prompt, and chosen and rejected are no whole dialogues, nor do they begin with one "
            "prompt; add column 'prompt'"
        )
    entries = {**others, "chosen": chosen or "<column>", "rejected": rejected or "<column>"}
    if chosen and rejected and not is_labelled(chosen, rejected):
        several = [name for name in values if name.startswith("winner_")]
        if len(several) > 1:
            return (
                f"{found}; {', '.join(several)} say which answer won: write one column with the name of the better one, or tie"
            )
        winner = winner or guess_winner({name: values[name] for name in values if name not in entries.values()})
        if winner:
            return explain_winner(found, entries, winner, rows, (chosen, rejected), may_be_other=bool(columns))
        alike = [name for name in values if name[:-1] == chosen[:-1] and name[-1:].isalnum()]
        if len(alike) > 2 and len(chosen) > 1 and rejected in alike:
            answers = f"{list_names(alike)} are {len(alike)} answers, and no column map can say which two of them make a pair"
            return f"{found}; {answers}: put two answers to one prompt into each row, as prompt, chosen, rejected"
        if chosen[:-1] == rejected[:-1] and chosen[-1] in "01aA":
            found += (
                f"; no column is known to say which of {chosen} and {rejected} is better. If it always is the first, say it"
            )
            return f"{found} in the recipe:\n{_write_map(entries)}"
    return f"{found}; which of them are prompt, chosen and rejected is not clear. Say it in the recipe:\n{_write_map(entries)}"


def _guess(
    values: Mapping[str, Sequence[Any]], columns: Mapping[str, str], winner: str | None
) -> tuple[dict[str, str], list[str]]:
    """Return the likeliest column map, and the columns with text that are not in it."""
    texts = [name for name in values if any(isinstance(value, str | list | Mapping) for value in values[name])]
    texts = [name for name in texts if name != winner and name not in columns.values()]
    free = [name for name in texts if not _NO_TEXT & {*_words(name)} or _words(name)[-1] in _SINGLE]
    rivals = [
        (name, name[:-1] + other) for name in free for one, other in ("01", "12", "ab", "AB")
        if name[-1:] == one and name[:-1] + other in free
    ]  # fmt: skip
    guess = dict(columns)
    for key, hints in _HINTS.items():
        hinted = (name for hint in hints.split() for name in free if hint in _words(name))
        match = key if key in free else next(hinted, None)
        if key not in guess and match is not None and not (key == "prompt" and {"instruction", "messages"} & guess.keys()):
            key = "instruction" if match == "instruction" else key
            guess[key] = match
            free.remove(match)
        if key == "chosen" and rivals and not is_labelled(guess.get("chosen", ""), guess.get("rejected", "")):
            guess |= {"chosen": rivals[0][0], "rejected": rivals[0][1]}
            free = [name for name in free if name not in rivals[0]]
    for name in texts:  # what belongs to the prompt is never lost on the way
        ours = read_as(name)
        if ours in ("history", "input", "system", "tools", "chat_template_kwargs") and name not in guess.values():
            guess.setdefault(ours, name)
            free = [one for one in free if one != name]
    return guess, free


def _holds_rows(value: Any, depth: int = 3) -> bool:
    """Return whether a cell holds a whole row, or a list of such, so many levels down."""
    row = value[0] if isinstance(value, list) and value else value
    if not isinstance(row, Mapping):
        return False
    is_row = len({"prompt", "instruction", "question", "chosen", "rejected"} & row.keys()) > 1
    return is_row or (depth > 1 and any(_holds_rows(inner, depth - 1) for inner in row.values()))


def _refuse_single_answers(values: Mapping[str, Sequence[Any]], winner: str | None, *, is_alone: bool) -> str | None:
    """Return what data are that have no two columns for answers; None where that is not known."""
    to_do = "put two answers to one prompt into each row, as prompt, chosen, rejected"
    lists = (name for name in values if name.strip().lower() in _SEVERAL)
    several = next((name for name in lists if any(isinstance(value, list) and len(value) > 1 for value in values[name])), None)
    if several:
        return f"'{several}' is a list of answers, and no column map can say which two of them make a pair; {to_do}"
    if winner in ("label", "labels"):
        return f"this is unpaired (KTO-style) data, one answer with one label a row; pairs are needed: {to_do}"
    if is_alone and not {*_SINGLE, "chosen"} & values.keys():
        return f"they have no two answers; pairs are needed: {to_do}"
    if is_alone or {*_SINGLE} & values.keys():
        return f"there is one answer a row and nothing to prefer it to; pairs are needed: {to_do}"
    return None


def explain_winner(
    found: str, entries: Mapping[str, str], winner: str, rows: Sequence[Values], answers: tuple[str, str], *, may_be_other: bool
) -> str:
    """Return the message for two answers of which another column names the better one, with the map or both that it may be.

    Args:
        found: What the columns are, for people.
        entries: The column map without the winner.
        winner: The column that names the better one.
        rows: The first rows.
        answers: What the two answers are called, the one taken as chosen first.
        may_be_other: Whether the message says how the column is left unread.
    """
    one, other = answers
    if Winner.is_plain(winner, one, other, rows):
        written = _write_map({**entries, "winner": winner})
    elif ways := Winner.comparisons(winner, [row[winner] for row in rows if carries(row.get(winner))]):
        won, lost = (_write_map({**entries, "winner": way}) for way in ways)
        written = f"{won}\nif {one} is the better one there, else\n{lost}"
    else:
        written = (
            f"{_write_map({**entries, 'winner': '<column>'})}\nwith a column that has the name of the better one, {one} or "
            f"{other}, or tie"
        )
    ignore = f"\n(or, if it says something else, data.ignore: [{quote(winner)}])" if may_be_other else ""
    seems = f"{found}; '{winner}' seems to say which of {one} and {other} is the better one"
    return f"{seems}. Say it in the recipe:\n{written}{ignore}"


def _write_map(entries: Mapping[str, str]) -> str:
    return f"data: {{columns: {{{', '.join(f'{key}: {quote(name)}' for key, name in entries.items())}}}}}"


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"non[^a-z]?preferred", "nonpreferred", name.lower()))

"""What other people call the columns of preference data: spellings with one plain meaning, columns that matter, maps to write.

spelling with one meaning    question -> prompt, response_chosen -> chosen     read, and said
name that only hints         response_j, pos_answer                            an error that prints the map to write
column that matters          history, images, weight                           an error where it has content and is not read
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pe_dpo.data.dialogues import is_transcript, read_history
from pe_dpo.data.messages import ROLES, holds_messages, list_names, parse_written
from pe_dpo.data.pairs import RowError, Text
from pe_dpo.errors import DataError

Values = Mapping[str, Any]

_ANSWERS = (
    ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"),
    ("chosen_answer", "rejected_answer"), ("answer_chosen", "answer_rejected"),
    ("chosen_output", "rejected_output"), ("output_chosen", "output_rejected"),
    ("chosen_completion", "rejected_completion"), ("completion_chosen", "completion_rejected"),
    ("chosen_text", "rejected_text"), ("text_chosen", "text_rejected"),
    ("chosen_messages", "rejected_messages"), ("messages_chosen", "messages_rejected"),
    ("chosen_conversation", "rejected_conversation"), ("chosen_conversations", "rejected_conversations"),
    ("messages", "rejected_messages"), ("conversations", "rejected_conversations"), ("response", "rejected_response"),
    ("preferred_output", "non_preferred_output"), ("preferred_response", "dispreferred_response"),
    ("preferred", "dispreferred"), ("preferred", "non_preferred"), ("accepted", "rejected"), ("better", "worse"),
)  # fmt: skip
_PROMPTS = ("question", "query")
_DIALOGUES = ("messages", "conversations", "conversation", "context", "dialogue", "trajectory")
"""Columns of messages that are the prompt where there is no other."""
_SYSTEMS = ("system_prompt", "system_message")
_OURS = ("prompt", "instruction", "input", "system", "history", "chosen", "rejected", "messages", "conversations", "tools",
         "margin", "preferred_output", "non_preferred_output", "rejected_response", "rejected_messages")  # fmt: skip

_MEDIA = tuple(
    f"{side}{medium}{end}"
    for side in ("", "chosen_", "rejected_")
    for medium in ("image", "image_path", "image_url", "img", "picture", "photo", "pixel_value", "video", "audio")
    for end in ("", "s")
)
_WEIGHTS = ("weight", "weights", "sample_weight")
_TRAINED = ("train", "train_on", "training", "use_for_training")
"""Columns that leave a row out of training, where they are false or 0."""
_IN_ANSWERS = {
    name
    for side in ("chosen", "rejected")
    for part in ("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "tool_calls", "function_call")
    for joint in "_-"
    for name in (f"{side}{joint}{part}", f"{part}{joint}{side}")
}
"""Columns that belong to an answer."""
SPLITS = ("split", "splits", "split_name", "data_split", "dataset_split", "subset", "partition", "fold", "set")
"""Columns that say of a row to which part of a data set it belongs."""
_IN_PROMPT = {
    "history": "history chat_history conversation_history dialogue_history",
    "input": "input context contexts document documents passage passages background knowledge",
    "system": "system system_prompt system_message system_instruction systemprompt",
    "tools": "tools functions",
    "prompt": "prompt instruction question query",
    "messages": "messages conversation conversations dialogue dialog",
    "prefill": "prefill prefix answer_prefix response_prefix assistant_prefix initial_reason_steps",
    "chat_template_kwargs": "chat_template_kwargs template_kwargs template_args",
}
"""Columns that belong to the prompt, by the name under which the column map reads them; none reads a prefill."""
_READ_AS = {name: ours for ours, names in _IN_PROMPT.items() for name in names.split()}
_NOT_SCORED = ("weight", "train", "train_on_turn", "training", "loss")
"""Keys by which other tools leave an assistant turn out of the loss, where they are false or 0."""

_WINNERS = (
    "winner", "winner_id", "winner_index", "label", "labels", "preference", "preference_label", "preference_strength",
    "overall_preference", "choice", "better", "better_id", "better_response_id", "preferred", "preferred_id",
    "preferred_response", "chosen_id", "chosen_idx", "chosen_index",
)  # fmt: skip
"""Columns that say which of two answers is the better one, as published sets call them."""
_WINNING = {"winner", "won", "preference", "preferred", "label", "labels", "better", "best", "verdict", "vote", "choice"}
"""Words in the names of others that may say it."""

_YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


def find_spellings(examples: Mapping[str, Any], mapped: Mapping[str, str]) -> dict[str, str]:
    """Return which columns are read under our names without a map, because their own have one plain meaning.

    Args:
        examples: A value of each column, one with content where there is one.
        mapped: The column map that was given, from our names to theirs.

    Returns:
        From our names to theirs; names that only differ in case or in spaces around them among these.
    """
    names = [name for name in examples if name not in mapped.values()]
    plain = {name.strip().lower(): name for name in reversed(names)}
    found = {name: plain[name] for name in _OURS if name in plain and name not in examples and name not in mapped}
    read_from = {**plain, **mapped}
    present = read_from.keys()
    if not {"chosen", "rejected"} & mapped.keys() and not present >= {"chosen", "rejected"}:
        is_openai = isinstance(examples.get(plain.get("input", "")), Mapping)
        pairs = [pair for pair in _ANSWERS if present >= {*pair} and not (is_openai and pair[0] == "preferred_output")]
        if len(pairs) > 1:
            pairs = [pair for pair in pairs if pair[0] not in ("messages", "conversations", "response")]
        if len(pairs) == 1:
            found |= {"chosen": read_from[pairs[0][0]], "rejected": read_from[pairs[0][1]]}
    if "rejected" in present and not {"chosen", "rejected_response"} & present:
        dialogues = (name for name in ("messages", "conversations") if name in present)
        dialogue = next((name for name in dialogues if _role(examples[read_from[name]], -1) == "assistant"), None)
        found |= {"rejected_response": read_from["rejected"]} if dialogue else {}
        found |= {"messages": read_from[dialogue]} if dialogue == "conversations" else {}
    systems = [name for name in _SYSTEMS if name in plain]
    if "system" not in present and len(systems) == 1:
        found["system"] = plain[systems[0]]
    prompt = _find_prompt({name: examples[theirs] for name, theirs in plain.items() if theirs not in found.values()})
    answer = examples.get(mapped.get("chosen") or found.get("chosen") or plain.get("chosen", ""))
    if prompt and not {"prompt", "instruction"} & present and not begins_with_prompt(answer):
        found.pop(prompt, None)
        found["prompt"] = plain[prompt]
    return found


def _find_prompt(examples: Mapping[str, Any]) -> str | None:
    """Return the column that is the prompt under another name; None where none is, or more than one may be."""
    asked = [name for name in _PROMPTS if name in examples]
    lists = {name: value for name, value in examples.items() if isinstance(value, list)}
    dialogues = [name for name in _DIALOGUES if name in lists and all(isinstance(turn, Mapping) for turn in lists[name])]
    if len(asked) + len(dialogues) == 1:
        return (asked or dialogues)[0] if dialogues not in (["messages"], ["conversations"]) else None
    is_input = not asked and not dialogues and isinstance(examples.get("input"), str)
    return "input" if is_input else None


def find_winner(values: Mapping[str, Sequence[Any]]) -> str | None:
    """Return the column that says which of two answers is the better one, by its name and its short values; None without such.

    Args:
        values: Cells with content of each column that may be it.
    """
    found = (name for name in values if name.strip().lower() in _WINNERS and values[name])
    return next((name for name in found if all(map(_is_short, values[name]))), None)


def guess_winner(values: Mapping[str, Sequence[Any]]) -> str | None:
    """Return the column of `find_winner`, or else one that may be it because its name speaks of a winner."""
    found = (name for name in values if {*re.findall("[a-z]+", name.lower())} & _WINNING and values[name])
    return find_winner(values) or next((name for name in found if all(map(_is_short, values[name]))), None)


def _is_short(cell: Any) -> bool:
    return not isinstance(cell, list | Mapping) and len(str(cell)) < 60


def begins_with_prompt(answer: Any) -> bool:
    """Return whether an answer is a whole dialogue: a transcript, or messages of which the first is not the assistant's."""
    if isinstance(answer, str):
        return is_transcript(answer)
    return _role(answer, 0) not in ("assistant", None)


def _role(messages: Any, place: int) -> str | None:
    """Return the role of one of some messages; None where there are none."""
    if not isinstance(messages, list | tuple) or not messages or not isinstance(messages[place], Mapping):
        return None
    said = next((messages[place][key] for key in ("from", "role", "speaker") if messages[place].get(key)), "")
    return ROLES.get(str(said).strip().lower(), "assistant")


def carries(value: Any) -> bool:
    """Return whether a value is content: not null, NaN, blank, or empty at every depth."""
    rest = [value]
    while rest:  # a stack, since cells may be deeper than Python recurses
        value = rest.pop()
        if isinstance(value, Mapping):
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)
        elif isinstance(value, str):
            if value.strip() not in ("", "null", "None", "nan", "NaN", "[]", "{}"):
                return True
        elif value is not None and not (isinstance(value, float) and math.isnan(value)):
            return True
    return False


def read_as(name: str) -> str | None:
    """Return the name under which the column map reads a column that belongs to the prompt; None for another column."""
    return _READ_AS.get(name.strip().lower())


def what_matters(name: str, value: Any) -> str | None:
    """Return why a pair cannot be trained on as its row or message says; None where it can.

    Args:
        name: A column that is not read, or a key of a message.
        value: Its cell.
    """
    name = name.strip()
    if name.lower() in _MEDIA and carries(value):
        return f"'{name}' has content, and pe-dpo trains on text alone"
    if name.lower() in _WEIGHTS and carries(value) and str(value).strip() not in ("1", "1.0"):
        return f"column '{name}' is {repr(value)[:40]}, and all pairs weigh the same"
    if name.lower() in _TRAINED and str(value).strip().lower() in ("false", "0", "0.0", "no"):
        return f"column '{name}' is {repr(value)[:40]}, and all pairs are trained on"
    return None


def refuse_row(values: Values, where: str = "", *, of_all: Collection[str] = ()) -> None:
    """Refuse media, a weight, and a row that is not to be trained on.

    Args:
        values: The columns of a row that are not read, or keys of a message.
        where: The row, for people.
        of_all: The columns for which all rows would be refused.

    Raises:
        RowError: The row is to be refused.
        DataError: All rows are.
    """
    for name, value in values.items():
        reason = what_matters(name, value)
        without = f"train without it: data.ignore: [{quote(name)}]"
        if reason and name.strip().lower() in _WEIGHTS:
            without = f"{without}, or multiply the losses of pairs by it: {_map('weight', name)}"
        if reason and name in of_all:
            raise DataError(f"{where}: {reason}, and so it is in every row; {without}")
        if reason:
            raise RowError(f"{reason}; take such rows out, or {without}")


def names_rejected(values: Values, rejected: str) -> bool:
    """Return whether a column that says which answer is the better one names the rejected answer.

    Args:
        values: The columns that were not read.
        rejected: That of the rejected answer.
    """
    said = (str(values[name]).strip().lower() for name in values if name.strip().lower() in _WINNERS)
    return any(value in ("rejected", rejected.lower()) for value in said)


def refuse_unread(
    unread: Mapping[str, Any], sides: Sequence[Text], where: str, *, taken: Mapping[str, str], is_text: bool
) -> None:
    """Refuse what was not read of a row where training without it would be another training.

    That is a column that belongs to the prompt or an answer, unless its texts are found there.

    Args:
        unread: The columns with content that were not read.
        sides: Prompt, chosen and rejected answer, as read.
        where: The row, for people.
        taken: From our names to the columns that were read under them; `prompt` to that of the prompt, where it has its own.
        is_text: Whether the row's prompt is text, after which an input would be read.

    Raises:
        DataError: There is such a column; the message has the remedy.
    """
    missing = {}
    for name, value in unread.items():
        ours = read_as(name)
        if name.strip().lower() in _IN_ANSWERS and not _is_found(value, sides[1:]):
            raise DataError(
                f"{where}: column '{name}' has content, was not read and belongs to an answer; write the answers as messages "
                f"with it: {{role: assistant, reasoning_content: …, tool_calls: …, content: …}}, or leave it out: "
                f"data.ignore: [{quote(name)}]"
            )
        if ours is None:
            continue
        if ours == "messages":
            is_read = _is_found(value, sides, is_dialogue=True)
        elif ours == "prefill":  # both answers may begin with it
            is_read = all(_is_found(value, (sides[0], answer)) for answer in sides[1:])
        else:  # the same words in an answer are not those that the answer follows
            is_read = ours not in ("tools", "chat_template_kwargs") and _is_found(value, sides[:1])
        if not is_read:
            missing[name] = value
    if missing:
        name = min(missing, key=lambda name: read_as(name) != "prompt")  # an instruction takes its input along
        raise DataError(
            f"{where}: column '{name}' has content, was not read and belongs to the prompt; "
            f"{_remedy(name, missing, sides[0], taken, is_text=is_text)}, or leave it out: data.ignore: [{quote(name)}]"
        )


def _remedy(name: str, missing: Mapping[str, Any], prompt: Text, taken: Mapping[str, str], *, is_text: bool) -> str:
    """Return how a column that was not read can be, such that the next error is not its reverse."""
    ours, asked = str(read_as(name)), taken.get("prompt")
    alike = [other for other in missing if read_as(other) == ours]
    written = "write it into the prompt" if isinstance(prompt, str) else "write it into the messages of the prompt"
    if ours == "prefill":
        return "write it as an assistant turn at the end of the prompt"
    if ours == "messages" and "history" not in taken:
        with suppress(RowError):
            if read_history(missing[name], name)[-1]["role"] == "assistant":
                return f"read it as the turns before the prompt with {_map('history', name)}"
    if ours in ("messages", "prompt"):
        if asked is None:
            return written
        can_follow = is_text and "input" not in taken and isinstance(missing[name], str) and not holds_messages(missing[name])
        after = f"after '{asked}' with {_map('input', name)}, or " if can_follow else ""
        instead = f"data: {{columns: {{prompt: {quote(name)}}}, ignore: [{quote(asked)}]}}"
        return f"read it {after}in the place of '{asked}' with {instead}"
    if ours == "system" and not isinstance(prompt, str) and prompt[0]["role"] in ("system", "developer"):
        return "the prompt has another system turn; take one of the two out"
    if (ours == "input" and not is_text) or ours == name or taken.get(ours) == name:
        return written
    if ours in taken or len(alike) > 1:
        several = list_names([*alike, *(taken[ours] for _ in range(ours in taken))])
        return f"one column alone is read as {ours}, so write {several} into one"
    is_list = ours == "input" and not isinstance(missing[name], str)
    return f"{'write it as one text, and ' if is_list else ''}read it with {_map(ours, name)}"


def refuse_keys(sides: Sequence[Text]) -> None:
    """Refuse keys of messages without which the training is another: media, and turns of answers not to be trained on.

    Args:
        sides: Prompt, chosen and rejected answer, as read.

    Raises:
        RowError: There is such a key; the message has the remedy.
    """
    for side, is_answer in zip(sides, (False, True, True), strict=True):
        for turn in () if isinstance(side, str) else side:
            for key in turn if len(turn) > 2 else ():
                if key.strip().lower() in _MEDIA:
                    refuse_row({key: turn[key]})
            tools = next((key for key in ("tools", "functions") if carries(turn.get(key))), None)
            if tools:
                raise RowError(f"a message has {tools}; move them to column 'tools', or train without: data.ignore: [{tools}]")
            for key in _NOT_SCORED if is_answer and len(turn) > 2 and turn["role"] == "assistant" else ():
                if key in turn and str(turn[key]).strip().lower() not in ("1", "1.0", "true"):
                    raise RowError(
                        f"an assistant turn of an answer has {key} {repr(turn[key])[:40]}, and all are trained on "
                        f"(or the last alone with data.score: last); train so with data.ignore: [{key}]"
                    )


def _map(ours: str, theirs: str) -> str:
    return f"data: {{columns: {{{ours}: {quote(theirs)}}}}}"


def _is_found(value: Any, sides: Sequence[Text], *, is_dialogue: bool = False) -> bool:
    """Return whether all texts of a value stand in what was read; of a dialogue all but the last, which is an answer."""
    read = " ".join(" ".join(_texts(sides)).split())

    def stands(text: str) -> bool:
        text = " ".join(text.split())
        place = read.find(text)
        while place >= 0 and (joined(place) or joined(place + len(text))):
            place = read.find(text, place + 1)
        return place >= 0

    def joined(place: int) -> bool:  # inside a word or number; scripts without spaces between words have no such borders
        around = read[max(place - 1, 0) : place + 1]
        return len(around) == 2 and around.isascii() and around.isalnum()

    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        if stands(value):
            return True
        with suppress(RowError):  # a text that only begins so
            value = parse_written(value, "")
    texts = [*_texts(value)]
    but_last = is_dialogue and isinstance(value, list)
    texts = texts[:-1] if but_last else texts
    return bool(texts or but_last) and all(map(stands, texts))


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts at every depth that are not blank; those of a message without its role, of a part without its type."""
    if isinstance(value, str):
        yield from [value] if value.strip() else []
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            is_role = key in ("role", "from", "speaker") and str(inner).strip().lower() in ROLES
            yield from () if is_role or key == "type" else _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def quote(name: str) -> str:
    """Return a name as YAML wants it inside braces."""
    is_plain = re.fullmatch(r"[A-Za-z_<][\w.\->]*", name) and name.lower() not in _YAML_WORDS
    return name if is_plain else json.dumps(name, ensure_ascii=False)

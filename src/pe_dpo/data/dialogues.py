"""Dialogues: earlier turns in their common spellings, and where the prompt of two whole dialogues ends.

    chosen    [user, assistant, user | assistant: yes]          the prompt is what both share before
    rejected  [user, assistant, user | assistant: no ]          the first assistant turn that differs

Transcripts (`\\n\\nHuman: ... \\n\\nAssistant: ...`) follow the same rule: the prompt ends at the last Assistant tag that
both texts share, never at the last character that they share, which may lie inside an answer or a word.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pe_dpo.data.messages import parse_written, read_messages, read_text
from pe_dpo.data.pairs import Message, RowError, Turns, describe_value

ASSISTANT_TAG = "\n\nAssistant:"
TAG = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ANSWER_TAG = re.compile(
    r"(?:^|(?<=\n))(?:### )?(?:Response|Answer|AI|Bot|A):\n?|(?:^|(?<=\s))(?:### )?(?:Assistant|ASSISTANT):\n?"
    r"|\[/INST\]|<\|assistant\|>\n?|<\|im_start\|>assistant\n|<start_of_turn>model\n|<\|end_header_id\|>\n\n"
)
"""What stands before an answer in rendered texts, apart from the tags of a transcript."""
_EXCHANGES = (("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("input", "output"), ("prompt", "response"),
              ("query", "response"), ("question", "answer"))  # fmt: skip


def read_history(value: Any, column: str) -> Turns:
    """Return the turns before a prompt: pairs of what the user and the assistant said, messages, or a transcript.

    Args:
        value: A list of [user, assistant], of {user, assistant} and the like, or of messages; as JSON text too.
        column: Its name, for messages.

    Raises:
        RowError: It is something else.
    """
    if isinstance(value, str) and is_transcript(value):
        return messages_from_transcript("", value)
    if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        raise RowError(
            f"column '{column}' is text; earlier turns are pairs [user, assistant] or messages, and a text that belongs to the "
            f"prompt is read with data: {{columns: {{input: {column}}}}}"
        )
    given = parse_written(value, column) if isinstance(value, str) else value
    given = [given] if isinstance(given, Mapping) else given
    if isinstance(given, list) and given and all(isinstance(turn, Mapping) for turn in given):
        keys = next((keys for keys in _EXCHANGES if {*keys} <= given[0].keys()), None)
        if keys is None:
            return read_messages(given, column)
        given = [[turn.get(key) for key in keys] for turn in given]
    turns: list[Message] = []
    for number, exchange in enumerate(given if isinstance(given, list) else [given]):
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise RowError(
                f"column '{column}[{number}]' is {describe_value(exchange)}; pairs [user, assistant] or messages are expected"
            )
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            if text is not None:
                turns.append({"role": role, "content": read_text(text, f"{column}[{number}]")})
    return tuple(turns)


def split_dialogues(
    chosen: Turns, rejected: Turns, names: tuple[str, str] = ("chosen", "rejected")
) -> tuple[Turns, Turns, Turns]:
    """Return the prompt that two whole dialogues share, and the answer of each.

    The prompt is the longest shared beginning after which both go on with an assistant turn.

    Args:
        chosen: The whole dialogue with the preferred answer.
        rejected: The other one.
        names: Their columns, for messages.

    Raises:
        RowError: There is none; the message shows where the prompts differ.
    """
    shared = shared_length(chosen, rejected)
    for end in range(min(shared, len(chosen) - 1, len(rejected) - 1), 0, -1):
        if chosen[end]["role"] == rejected[end]["role"] == "assistant" != chosen[end - 1]["role"]:
            return chosen[:end], chosen[end:], rejected[end:]
    if shared == 0 and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        raise RowError(
            f"columns '{names[0]}' and '{names[1]}' begin with the answer and there is no prompt; add column 'prompt'"
        )
    difference = describe_difference(chosen[: shared + 1], rejected[: shared + 1], *names)
    raise RowError(f"the prompts inside columns '{names[0]}' and '{names[1]}' differ: {difference}; make them equal")


def describe_difference(one: Turns, other: Turns, one_name: str, other_name: str) -> str:
    """Return where two dialogues differ first, for people."""
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if left["role"] != right["role"]:
            return f"turn {number + 1} is a {left['role']} turn in {one_name}, a {right['role']} turn in {other_name}"
        if left != right:
            start = shared_length(left["content"], right["content"])
            left_text, right_text = (repr(turn["content"][max(0, start - 20) : start + 20]) for turn in (left, right))
            return (
                f"turn {number + 1} ({left['role']}) at character {start + 1} is {left_text} in {one_name}, "
                f"{right_text} in {other_name}"
            )
    return f"{one_name} has {len(one)} turns, {other_name} {len(other)}"


def split_transcripts(chosen: str, rejected: str, names: tuple[str, str] = ("chosen", "rejected")) -> tuple[str, str, str]:
    """Return the prompt that two whole transcripts share, and the answer of each, as raw text.

    The prompt goes up to and with the last Assistant tag that both share; answers keep their leading space.

    Args:
        chosen: The whole transcript with the preferred answer.
        rejected: The other one.
        names: Their columns, for messages.

    Raises:
        RowError: The texts share no Assistant tag.
    """
    start = shared_length(chosen, rejected)
    end = chosen.rfind(ASSISTANT_TAG, 0, start)
    if end < 0:
        raise RowError(
            f"columns '{names[0]}' and '{names[1]}' share no Assistant tag: they differ from character {start + 1}, "
            f"{chosen[start : start + 20]!r} against {rejected[start : start + 20]!r}; make the prompts equal, "
            "or add column 'prompt'"
        )
    end += len(ASSISTANT_TAG)
    return chosen[:end], chosen[end:], rejected[end:]


def split_texts(chosen: str, rejected: str, names: tuple[str, str] = ("chosen", "rejected")) -> tuple[str, str, str]:
    """Return the prompt that two whole texts without tags share, and the answer of each.

    The prompt goes up to and with the last tag before an answer that both share (`ASSISTANT:`, `### Response:`, `[/INST]`),
    else the last line break, else up to the last space, which the answers keep. A word is never cut. Whatever of the answers is
    in the prompt so has the same log-prob on both sides.

    Args:
        chosen: The whole text with the preferred answer.
        rejected: The other one.
        names: Their columns, for messages.

    Raises:
        RowError: The texts share no beginning.
    """
    shared = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    tags = [tag.end() for tag in _ANSWER_TAG.finditer(chosen, 0, max(shared, 0))]
    end = tags[-1] if tags else chosen.rfind("\n", 0, max(shared, 0)) + 1
    if not chosen[:end].strip():
        end = max(chosen.rfind(" ", 0, max(shared, 0)), 0)
    if not chosen[:end].strip():
        raise RowError(
            f"columns '{names[0]}' and '{names[1]}' share no beginning that could be the prompt: {chosen[:20]!r} against "
            f"{rejected[:20]!r}; add column 'prompt'"
        )
    return chosen[:end], chosen[end:], rejected[end:]


def ends_with_tag(prompt: str) -> bool:
    """Return whether a text ends with what stands before an answer in rendered texts."""
    return any(tag.end() == len(prompt) for tag in _ANSWER_TAG.finditer(prompt))


def behind_prompt(prompt: Any, chosen: Any = None, rejected: Any = None) -> tuple[str, str] | None:
    """Return what two texts say behind the prompt that both begin with, apart from white space around it.

    Args:
        prompt: A text, else nothing is behind it.
        chosen: What may begin with it.
        rejected: The other one.

    Returns:
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


def is_transcript(text: str) -> bool:
    """Return whether a text begins with a Human tag and has an Assistant tag."""
    return text.lstrip().startswith("Human:") and ASSISTANT_TAG in text


@lru_cache(maxsize=4)  # a pair's own: each of them is asked for up to six times
def messages_from_transcript(prompt: str, answer: str) -> Turns:
    """Return the messages of a transcript and its answer, without the spaces around the texts.

    Args:
        prompt: A text for which `is_transcript` holds and that ends with the Assistant tag.
        answer: What follows; may go on with further turns. Empty for the prompt alone.

    Returns:
        User and assistant messages by turns; an empty assistant turn at the end of the prompt alone is left out.
    """
    _, *pieces = TAG.split(prompt + answer)
    roles = ("user" if tag == "Human" else "assistant" for tag in pieces[::2])
    turns = tuple({"role": role, "content": text.strip()} for role, text in zip(roles, pieces[1::2], strict=True))
    return turns if answer else turns[:-1]


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items (characters, turns) two sequences share from their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halved, since comparing slices is a hundred times quicker than comparing letters
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

"""Pairs as text: by the tokenizer's chat template, or as the plain text that they are.

chat    render(prompt, generation prompt)   and   render(prompt + answer)
plain   prompt                              and   prompt + answer
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

from pe_dpo.data.arrival import REASONING, REASONING_KEYS, loses_tools, lost_parts
from pe_dpo.data.dialogues import ASSISTANT_TAG, TAG, is_transcript, messages_from_transcript, shared_length
from pe_dpo.data.pairs import Message, Pair, RowError, Text, Turns
from pe_dpo.data.template import PROBES, Template
from pe_dpo.errors import DataError

Spans = list[tuple[int, int]]
"""[start, end) of the assistant's turns in a text."""


class Rendered(NamedTuple):
    """A pair as text."""

    opened: str
    """The prompt as it stands before an answer."""
    answered: tuple[str, str]
    """The prompt with the chosen and with the rejected answer."""
    spans: tuple[Spans | None, Spans | None]
    """What of each answered text is scored; None where all after the prompt is."""
    lost: frozenset[str] = frozenset()
    """Kinds of the parts of the answers that the chat template left out."""
    lost_before: frozenset[str] = frozenset()
    """Kinds of the parts of the prompt that it left out; of the earlier turns of an answer their reasoning, by design."""
    is_whole_alone: bool = False
    """Whether the template writes the whole prompt only where no answer follows; then the answers stand behind that."""
    begins_alike: bool = True
    """Whether the template writes the same before both answers (Qwen3 writes an empty thought before the last turn alone)."""


def render_pair(pair: Pair, template: Template, *, score: Literal["all", "last", "everything"] = "all") -> Rendered:
    """Return a pair as text, and what of it is scored.

    Args:
        pair: A pair of texts or of messages.
        template: How it becomes text.
        score: Of an answer of several turns: all of the assistant's, its last one alone, or everything is scored.

    Raises:
        DataError: There are messages and no chat template.
        RowError: The template refuses the messages, or which part of its text is the assistant's cannot be told.
    """
    prompt, sides = pair.prompt, (pair.chosen, pair.rejected)
    if not template.is_chat:
        if not (isinstance(prompt, str) and isinstance(sides[0], str) and isinstance(sides[1], str)):
            raise DataError(
                f"{pair.where}: this pair is a list of messages, and the tokenizer has no chat template, or "
                "plain text was asked for; take an instruct model with data.template: chat, or data "
                "whose prompt, chosen and rejected are text (data.template: plain)"
            )
        spans = [None if score == "everything" else _transcript_spans(prompt, str(side), score == "last") for side in sides]
        return Rendered(prompt, (prompt + sides[0], prompt + sides[1]), (spans[0], spans[1]))
    turns = as_messages(prompt)
    prefill = turns[-1] if turns[-1]["role"] == "assistant" else None
    start = turns if prefill is None else turns[:-1]
    opened = template.render(start, opens=True, tools=pair.tools, args=pair.template_args)
    answers = _answers(pair)
    if prefill is not None:
        answers = [(_continued(prefill, answer[0]), *answer[1:]) for answer in answers]
    lost_alone = _lost_of_prompt(start, pair, opened)
    chosen_side, rejected_side = (_render_side(pair, template, start, opened, lost_alone, answer, score) for answer in answers)
    spans = [chosen_side.spans, rejected_side.spans]
    if prefill is not None:
        ends = [_prefill_end(prefill, opened, side.text) for side in (chosen_side, rejected_side)]
        if score != "everything" and chosen_side.text[: ends[0]] != rejected_side.text[: ends[1]]:
            # Where the template begins the two otherwise, the prompt ends before the prefill; still it is not scored.
            spans = [
                [(max(begin, end), until) for begin, until in side.spans or [(0, len(side.text))]]
                for side, end in zip((chosen_side, rejected_side), ends, strict=True)
            ]
        opened = chosen_side.text[: ends[0]]
    return Rendered(
        opened,
        (chosen_side.text, rejected_side.text),
        (spans[0], spans[1]),
        chosen_side.lost | rejected_side.lost,
        chosen_side.lost_before | rejected_side.lost_before,
        is_whole_alone=chosen_side.is_whole_alone or rejected_side.is_whole_alone,
        begins_alike=None in (chosen_side.head, rejected_side.head) or chosen_side.head == rejected_side.head,
    )


class _Side(NamedTuple):
    """A prompt with one of its answers, as `Rendered` has the two."""

    text: str
    spans: Spans | None
    lost: frozenset[str]
    lost_before: frozenset[str]
    is_whole_alone: bool
    head: str | None
    """What the template writes between generation prompt and answer; None for an answer with more than its text."""


def _render_side(
    pair: Pair,
    template: Template,
    start: Turns,
    opened: str,
    lost_alone: set[str],
    answer: Turns,
    score: Literal["all", "last", "everything"],
) -> _Side:
    """Return a prompt, which loses something alone already, with one answer as text, and what became of it.

    Raises:
        RowError: See `render_pair`.
    """
    text = template.render((*start, *answer), tools=pair.tools, args=pair.template_args)
    read = opened
    if not text.startswith(opened):
        silent: Turns = (*start, {"role": "assistant", "content": PROBES[0]})
        read = template.render(silent, tools=pair.tools, args=pair.template_args).partition(PROBES[0])[0]
    lost: set[str] = set()
    lost_before = {*lost_alone} if read == opened else _lost_of_prompt(start, pair, read)
    # Mistral's template writes a system turn before an answer, and no more when the answer is there.
    is_whole_alone = lost_alone < lost_before and score != "everything" and text.startswith(read)
    lost_before = {*lost_alone} if is_whole_alone else lost_before
    begin = shared_length(opened, text)
    for index, kind in lost_parts(answer, text[begin:]):
        if kind == REASONING and index < len(answer) - 1:
            lost_before.add(f"{kind} of an answer's earlier turns")
        else:
            lost.add(kind)
    said, is_plain = (
        answer[0]["content"].strip(),
        answer[0].keys() <= {"role", "content"} and "<think>" not in answer[0]["content"],
    )
    head = text[begin : text.find(said, begin)] if said and is_plain and said in text[begin:] else None
    has_spans = len(answer) > 1 and not lost and score != "everything"
    spans = _spans(pair, template, start, answer, text, score == "last") if has_spans else None
    if is_whole_alone:
        moved = len(opened) - len(read)
        text = opened + text[len(read) :]
        spans = None if spans is None else [(begin + moved, end + moved) for begin, end in spans]
    return _Side(text, spans, frozenset(lost), frozenset(lost_before), is_whole_alone, head)


def _answers(pair: Pair) -> list[Turns]:
    """Return both answers as messages.

    Raises:
        RowError: They were cut off where no turn of the user's ends.
    """
    if pair.cut == "words":
        raise RowError(
            "chosen and rejected share their first words alone, which are no prompt that a chat template could write; add "
            "column 'prompt' (or train on them as plain text, with data.template: plain)"
        )
    answers = [answer_turns(pair.prompt, side) for side in (pair.chosen, pair.rejected)]
    if pair.cut == "prompt":  # the space between prompt and answer is the template's to write
        answers = [({**first, "content": first["content"].lstrip()}, *rest) for first, *rest in answers]
    return answers


def _lost_of_prompt(turns: Turns, pair: Pair, read: str) -> set[str]:
    """Return the kinds of what a rendered prompt does not have of its messages and tools."""
    lost = {f"{kind} of the prompt" for _, kind in lost_parts(turns, read)}
    return lost | ({"tools"} if pair.tools and loses_tools(pair.tools, read) else set())


def _continued(prefill: Message, answer: Message) -> Message:
    """Return an answer's first turn with what the assistant turn that ends the prompt has of it in front.

    Raises:
        RowError: The prompt's turn is a call, with which no text goes on.
    """
    if prefill.get("tool_calls"):
        raise RowError("the prompt ends with a tool call without its result; add the tool's turn, or write it into the answers")
    joined = {key: prefill[key] + answer.get(key, "") for key in REASONING_KEYS if isinstance(prefill.get(key), str)}
    return {**prefill, **answer, **joined, "content": prefill["content"] + answer["content"]}


def _prefill_end(prefill: Message, opened: str, answered: str) -> int:
    """Return where in a rendered text the beginning of an answer ends that the prompt brings.

    Raises:
        RowError: It is not there.
    """
    said = prefill["content"].lstrip() or next((prefill[key].strip() for key in REASONING_KEYS if key in prefill), "")
    place = answered.find(said, shared_length(opened, answered))
    if place < 0:
        raise RowError(
            "the chat template does not write the assistant turn that ends the prompt as it is; write the whole answers "
            "into chosen and rejected instead"
        )
    return place + len(said)


def _spans(pair: Pair, template: Template, start: Turns, answer: Turns, text: str, last_turn_alone: bool) -> Spans:
    """Return which parts of a rendered text the assistant's turns of an answer of several turns are.

    Raises:
        RowError: They cannot be told apart.
    """
    render = partial(template.render, tools=pair.tools, args=pair.template_args)
    before, opened = render(start), render(start, opens=True)
    generation_prompt = opened[len(before) :] if opened.startswith(before) else ""
    spans: Spans = []
    cursor = shared_length(before, text)
    for index, turn in enumerate(answer):
        if turn["role"] != "assistant" or (last_turn_alone and index < len(answer) - 1):
            continue
        for silent in _silent_turns(turn):
            try:
                begun = render((*start, *answer[:index]), opens=True)
                other = render((*start, *answer[:index], silent, *answer[index + 1 :]))
                last, silent_last = (render((*start, *answer[:index], one)) for one in (turn, silent))
            except RowError:
                continue  # the template wants the call that a tool's turn answers
            # It begins after the generation prompt; where a template writes earlier turns otherwise in the middle, after the
            # last of its likes; and without one, where the text changes when the turn says something else.
            changed = shared_length(text, other)
            header = text.rfind(generation_prompt, cursor, changed) if generation_prompt else -1
            begin = len(begun) if text.startswith(begun) else header + len(generation_prompt) if header >= 0 else changed
            # It ends as it would if it were the last turn; where a template writes that otherwise (Qwen3, with its
            # reasoning), at the last change.
            own = last[shared_length(last, silent_last) :]
            ends = (
                changed + shared_length(own, text[changed:]),
                len(text) - shared_length(text[changed:][::-1], other[changed:][::-1]),
            )
            found = [
                (begin, end)
                for end in ends
                if cursor <= begin < end
                and {kind for _, kind in lost_parts([turn], text[begin:end])} <= {REASONING}
                and {kind for _, kind in lost_parts(answer[index + 1 :], text[end:])} <= {REASONING}
            ]
            if found:
                break
        else:
            raise RowError(
                f"which part of its answer's turn {index + 1} is the assistant's cannot be told under this chat template; "
                "write data.score: last, or one turn a pair"
            )
        spans.append(found[0])
        cursor = found[0][1]
    return spans


def _transcript_spans(prompt: str, answer: str, last_turn_alone: bool) -> Spans | None:
    """Return the assistant's parts of a raw transcript that goes on after its first answer."""
    text = prompt + answer
    tags = [tag for tag in TAG.finditer(text) if tag.start() >= len(prompt)] if is_open_transcript(prompt) else []
    if not tags:
        return None
    starts = [len(prompt), *(tag.end() for tag in tags)]
    ends = [*(tag.start() for tag in tags), len(text)]
    speakers = ["Assistant", *(tag[1] for tag in tags)]
    parts = zip(speakers, starts, ends, strict=True)
    spans = [(start, end) for speaker, start, end in parts if speaker == "Assistant" and start < end]
    return spans[-1:] if last_turn_alone else spans


def _silent_turns(turn: Message) -> Iterator[Message]:
    """Yield turns that say something else in an assistant's place: text alone, and the same calls with other arguments."""
    said = turn["content"].strip()
    probe = next((probe for probe in PROBES if said[:1] != probe[0] and said[-1:] != probe[-1]), "jxq")
    yield {"role": "assistant", "content": probe}
    calls = turn.get("tool_calls") or ()
    if calls:
        others = [call["function"] | {"arguments": dict.fromkeys(call["function"]["arguments"], probe)} for call in calls]
        changed = [{**call, "function": function} for call, function in zip(calls, others, strict=True)]
        yield {"role": "assistant", "content": probe if said else "", "tool_calls": changed}


def as_messages(prompt: Text) -> Turns:
    """Return a prompt as messages: itself, the turns of a Human/Assistant transcript, or one user turn."""
    if not isinstance(prompt, str):
        return prompt
    if is_open_transcript(prompt):
        return messages_from_transcript(prompt, "")
    return ({"role": "user", "content": prompt},)


def answer_turns(prompt: Text, answer: Text) -> Turns:
    """Return an answer as messages: itself, the turns that go on with a transcript, or one assistant turn."""
    if not isinstance(answer, str):
        return answer
    if isinstance(prompt, str) and is_open_transcript(prompt) and answer:
        said = prompt[prompt.rindex(ASSISTANT_TAG) + len(ASSISTANT_TAG) :] + answer
        if "\n\nHuman:" in said or ASSISTANT_TAG in said:
            return messages_from_transcript(prompt, answer)[len(messages_from_transcript(prompt, "")) :]
        answer = said.strip()  # as nearly every answer is: one turn
    return ({"role": "assistant", "content": answer},)


def is_blank(answer: Text) -> bool:
    """Return whether an answer, or one of its assistant's turns, has nothing but white space, no tool call and no reasoning."""
    if isinstance(answer, str):
        return not answer.strip()
    keys = ("tool_calls", *REASONING_KEYS)
    return any(
        turn["role"] == "assistant" and not (turn["content"].strip() or any(turn.get(key) for key in keys)) for turn in answer
    )


def is_open_transcript(prompt: str) -> bool:
    """Return whether a prompt is a Human/Assistant transcript that ends where an answer begins."""
    return is_transcript(prompt) and prompt.rstrip().endswith(ASSISTANT_TAG)

"""Where the prompt of two Human/Assistant transcripts ends, and which messages they hold."""

import pytest

from pe_dpo.data.dialogues import messages_from_transcript, split_dialogues, split_transcripts
from pe_dpo.data.rendering import answer_turns

ASK = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), [
    (f"{ASK} yes", f"{ASK} no", ASK),
    (f"{ASK} I can help", f"{ASK} I can't", ASK),
    (f"{ASK} a\n\nHuman: b\n\nAssistant: c", f"{ASK} a\n\nHuman: b\n\nAssistant: d",
     f"{ASK} a\n\nHuman: b\n\nAssistant:"),
    (f"{ASK} a\n\nHuman: b\n\nAssistant: c", f"{ASK} a\n\nHuman: B\n\nAssistant: c", ASK),
    (f"{ASK} a\n\nHuman: b\n\nAssistant: c", f"{ASK} a", ASK),
    (f"{ASK} a\n\nAssistant: c", f"{ASK} a\n\nAssist me", ASK),
    (f"{ASK} a", f"{ASK} a b", ASK),
], ids=["first word", "inside a word", "later turn", "human turns differ", "turn more", "half a tag", "prefix"])  # fmt: skip
def test_the_prompt_of_transcripts_ends_at_the_last_shared_assistant_tag(chosen: str, rejected: str, prompt: str) -> None:
    assert split_transcripts(chosen, rejected) == (prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))


def test_a_transcript_becomes_stripped_messages_and_its_open_turn_is_left_out() -> None:
    assert messages_from_transcript("\n\nHuman: Hi \n\nAssistant: a\n\nHuman: b\n\nAssistant:", "") == (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    )


def test_tags_inside_a_line_are_text() -> None:
    turns = messages_from_transcript("\n\nHuman: say Assistant: or Human:\n\nAssistant:", " ok")
    assert [turn["content"] for turn in turns] == ["say Assistant: or Human:", "ok"]


def test_whole_dialogues_whose_user_turns_part_go_back_to_the_last_shared_answer() -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    start = (turn("user", "Hi"), turn("assistant", "a"))
    chosen, rejected = ((*start, turn("user", said), turn("assistant", "c")) for said in "bB")
    assert split_dialogues(chosen, rejected) == (start[:1], chosen[1:], rejected[1:])


def test_equal_dialogues_keep_their_last_answer_apart_from_the_prompt() -> None:
    dialogue = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"})
    assert split_dialogues(dialogue, dialogue) == (dialogue[:1], dialogue[1:], dialogue[1:])


@pytest.mark.parametrize("space", ["", " ", "\n", "\n\n"])
@pytest.mark.parametrize(
    ("answer", "turns"),
    [
        (" yes", [("assistant", "yes")]),
        ("Human: is a word", [("assistant", "Human: is a word")]),
        ("yes\n\nHuman: and\n\nAssistant: no", [("assistant", "yes"), ("user", "and"), ("assistant", "no")]),
    ],
)
def test_an_answer_is_divided_at_tags_behind_an_empty_line_alone(answer, turns, space):
    """An empty line that ends the prompt makes a tag of what the answer begins with."""
    if space == "\n\n" and answer.startswith("Human:"):
        turns = [("assistant", ""), ("user", "is a word")]
    found = answer_turns(f"\n\nHuman: a\n\nAssistant:{space}", answer)
    assert [(turn["role"], turn["content"]) for turn in found] == turns

"""What a row holds and nobody reads is named, and stops where training without it would be another training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths_to_pairs import load_pairs, prepare_pairs

from pe_dpo.data.characters import Characters
from pe_dpo.data.row_reader import RowReader
from pe_dpo.data.shapes import Shape
from pe_dpo.errors import DataError

ROW = {"prompt": "How old is he?", "chosen": "Two.", "rejected": "No idea."}
PAIRS = [["My dog is Otto.", "Nice name."], ["He is two.", "Young."]]
USER = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


@pytest.fixture
def read(write_lines: Callable[..., Path]) -> Callable[..., Any]:
    """Return the pairs of some rows and the report."""
    return lambda *rows, **settings: load_pairs(write_lines(*rows), **settings)


@pytest.mark.parametrize("row", [
    {**ROW, "history": PAIRS},
    {"instruction": ROW["prompt"], "input": "", "history": PAIRS, "chosen": "Two.", "rejected": "No idea."},
    {"question": ROW["prompt"], "history": PAIRS, "response_chosen": "Two.", "response_rejected": "No idea."},
    {**ROW, "history": '[["My dog is Otto.", "Nice name."], ["He is two.", "Young."]]'},
    {**ROW, "history": [{"user": user, "assistant": assistant} for user, assistant in PAIRS]},
    {**ROW, "history": [{"role": role, "content": text} for pair in PAIRS
                        for role, text in zip(("user", "assistant"), pair, strict=True)]},
    {**ROW, "prompt": [{"role": "user", "content": ROW["prompt"]}], "history": PAIRS},
    {**ROW, "history": "\n\nHuman: My dog is Otto.\n\nAssistant: Nice name.\n\nHuman: He is two.\n\nAssistant: Young."},
], ids=["prompt", "instruction", "medical", "JSON text", "objects", "messages", "before messages", "transcript"])  # fmt: skip
def test_earlier_turns_stand_before_the_prompt(read: Callable[..., Any], row: dict[str, Any]) -> None:
    (pair,), report = read(row)
    assert [(turn["role"], turn["content"]) for turn in pair.prompt] == [
        ("user", "My dog is Otto."), ("assistant", "Nice name."), ("user", "He is two."), ("assistant", "Young."),
        ("user", "How old is he?"),
    ]  # fmt: skip
    assert pair.chosen == ({"role": "assistant", "content": "Two."},)
    assert report.unread_columns == []


def test_the_system_turn_stands_before_the_history(read: Callable[..., Any]) -> None:
    (pair,), _ = read({**ROW, "system": "Be short.", "history": PAIRS[:1]})
    assert [turn["role"] for turn in pair.prompt] == ["system", "user", "assistant", "user"]


def test_a_history_that_begins_with_the_system_turn_brings_it_once(read: Callable[..., Any]) -> None:
    system = {"role": "system", "content": "Be short."}
    history = [system, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (pair,), _ = read({**ROW, "history": history})
    assert [turn["role"] for turn in pair.prompt] == ["system", "user", "assistant", "user"]
    assert read({**ROW, "history": history, "system": "Be short."})[0][0].prompt == pair.prompt
    with pytest.raises(DataError, match="column 'system' has content, was not read"):
        read({**ROW, "history": history, "system": "Be long."})
    with pytest.raises(DataError, match="column 'history' begins with another system turn than the prompt"):
        read({**ROW, "prompt": [{**system, "content": "x"}, USER], "history": history})


def test_a_history_that_the_dialogue_already_has_is_not_said_twice(read: Callable[..., Any]) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER]
    (pair,), _ = read({"chosen": [*turns, YES], "rejected": [*turns, NO], "history": [["a", "b"]]})
    assert pair.prompt == tuple(turns)


def test_a_transcript_with_a_system_column_keeps_its_turns(read: Callable[..., Any]) -> None:
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: Hi\n\nAssistant:"
    (pair,), _ = read({"prompt": prompt, "system": "Be kind.", "chosen": " yes", "rejected": " no"})
    assert [(turn["role"], turn["content"]) for turn in (*pair.prompt, *pair.chosen)] == [
        ("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "Hi"), ("assistant", "yes")
    ]  # fmt: skip


def test_an_empty_history_leaves_text_as_it_is(read: Callable[..., Any]) -> None:
    (pair,), _ = read({**ROW, "history": []})
    assert pair.prompt == ROW["prompt"]


def test_a_history_of_another_form_is_an_error_that_says_the_forms(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"column 'history' is text; .*read with data: \{columns: \{input: history\}\}"):
        read({**ROW, "history": "He was born in 2020."})
    (pair,), _ = read({**ROW, "history": "He was born in 2020."}, columns={"input": "history"})
    assert pair.prompt == "How old is he?\n\nHe was born in 2020."
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: column 'history\[0\]' is text; pairs \[user, assistant\] or messages"
    ):
        read({**ROW, "history": ["Hi", "Hello"]})


@pytest.mark.parametrize(("row", "prompt"), [
    ({"instruction": "Is it polite?", "input": "Give me that!", "chosen_response": "No.", "rejected_response": "Yes."},
     "Is it polite?\n\nGive me that!"),
    ({"prompt": "Is it polite?", "input": "Give me that!", "chosen": "No.", "rejected": "Yes."},
     "Is it polite?\n\nGive me that!"),
    ({"question": "Is it polite?", "input": "Give me that!", "chosen": "No.", "rejected": "Yes."},
     "Is it polite?\n\nGive me that!"),
    ({"instruction": "Reverse it", "input": "[10, 20]", "chosen": "No.", "rejected": "Yes."}, "Reverse it\n\n[10, 20]"),
    ({"instruction": "Is it polite?", "input": None, "chosen": "No.", "rejected": "Yes."}, "Is it polite?"),
    ({"instruction": "Is it polite?", "input": "nan", "chosen": "No.", "rejected": "Yes."}, "Is it polite?"),
    ({"input": "Is it polite?", "chosen": "No.", "rejected": "Yes."}, "Is it polite?"),
    ({"instruction": "Is it polite?", "input": "Give!", "prompt": "Is it polite? Give!", "chosen": "No.", "rejected": "Yes."},
     "Is it polite? Give!"),
])  # fmt: skip
def test_the_input_reaches_the_prompt_once(read: Callable[..., Any], row: dict[str, Any], prompt: str) -> None:
    (pair,), _ = read(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "No.", "Yes.")


def test_columns_that_nobody_read_are_named_once_and_in_the_report(
    read: Callable[..., Any], write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    rows = {**ROW, "id": 1, "source": "x", "note": ""}, {**ROW, "id": 2, "note": None}, {**ROW, "topic": "dogs"}
    _, report = read(*rows)
    assert report.unread_columns == ["id", "source", "topic"]
    saved = prepare_pairs(write_lines(*rows), tokenizer=tokenizer, max_length=99).report.to_dict()
    assert saved["unread_columns"] == ["id", "source", "topic"]


def test_what_objects_hold_beside_their_text_is_named(read: Callable[..., Any]) -> None:
    row = {
        "prompt": "Hi",
        "chosen": {"answer": "yes", "score": 1, "why": "x"},
        "rejected": {"answer": "no", "score": 0, "why": ""},
    }
    assert read(row)[1].unread_columns == ["chosen.why"]
    row = {"input": {"messages": [USER], "system": "x", "tools": []}, "preferred_output": [YES], "non_preferred_output": [NO]}
    assert read(row)[1].unread_columns == ["input.system"]


def test_ignored_columns_are_not_named(read: Callable[..., Any]) -> None:
    assert read({**ROW, "id": 1, "note": "x"}, ignore=["id"])[1].unread_columns == ["note"]


MATTERING = {
    "context": ({"context": "He was born in 2020."}, r"data: \{columns: \{input: context\}\}"),
    "chat_history": ({"chat_history": PAIRS}, r"data: \{columns: \{history: chat_history\}\}"),
    "question beside prompt": ({"question": "And his name?"}, r"data: \{columns: \{input: question\}\}"),
    "conversation": ({"conversation": [USER, YES, USER]}, r"data: \{columns: \{prompt: conversation\}, ignore: .prompt.\}"),
    "dialogue as text": ({"dialogue": "He was born in 2020."}, r"after 'prompt' with data: \{columns: \{input: dialogue\}\}"),
    "initial_reason_steps": ({"initial_reason_steps": "Step 1:"}, "write it as an assistant turn at the end of the prompt"),
    "functions": ({"functions": [{"name": "f"}]}, r"data: \{columns: \{tools: functions\}\}"),
    "chosen_reasoning": (
        {"chosen_reasoning": "He was born so."},
        "belongs to an answer; write the answers as messages with it",
    ),
    "tool_calls_rejected": ({"tool_calls_rejected": [{"name": "f"}]}, "belongs to an answer"),
    "prefix": ({"prefix": "Step 1:"}, "write it as an assistant turn at the end of the prompt"),
    "template_kwargs": ({"template_kwargs": {"a": 1}}, r"\{chat_template_kwargs: template_kwargs\}"),
}


NOT_TRAINED_ON = {
    "images": (["cat.png"], "pe-dpo trains on text alone"), "image": ({"bytes": "x"}, "text alone"),
    "audio": ("x.wav", "text alone"), "videos": (["x.mp4"], "text alone"),
    "weight": (0.5, "is 0.5, and all pairs weigh the same"), "train": (False, "is False, and all pairs are trained on"),
}  # fmt: skip
"""Columns for which single rows, or all, cannot be trained on as they say."""


@pytest.mark.parametrize(("name", "value", "why"), [(name, *said) for name, said in NOT_TRAINED_ON.items()])
def test_single_rows_that_cannot_be_trained_on_as_they_say_are_refused_as_rows(
    read: Callable[..., Any], name: str, value: Any, why: str
) -> None:
    rows = ROW, {**ROW, name: value}, {**ROW, name: None}
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*'{name}' .*{why}; take such rows out.*data\.ignore: \[{name}\]"):
        read(*rows)
    pairs, report = read(*rows, bad_rows="drop")
    assert [pair.where for pair in pairs] == ["train.jsonl:1", "train.jsonl:3"]
    ((_, (malformed,)),) = report.dropped.items()
    assert malformed.startswith("train.jsonl:2: ")
    assert len(read(*rows, ignore=[name])[0]) == 3


@pytest.mark.parametrize(("name", "value", "why"), [(name, *said) for name, said in NOT_TRAINED_ON.items()])
def test_what_all_rows_say_is_one_error(read: Callable[..., Any], name: str, value: Any, why: str) -> None:
    rows = [{**ROW, name: value}] * 3
    with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{why}, and so it is in every row; .*data\.ignore: \[{name}\]"):
        read(*rows, bad_rows="drop")
    pairs, report = read(*rows, ignore=[name])
    assert (len(pairs), report.unread_columns) == (3, [])


def test_a_weight_that_is_mapped_as_the_margin_is_read(read: Callable[..., Any]) -> None:
    assert read({**ROW, "weight": 0.5}, columns={"margin": "weight"})[0][0].margin == 0.5


def test_a_row_that_is_to_train_on_is_only_named(read: Callable[..., Any]) -> None:
    assert read({**ROW, "train": True, "chosen_reasoning": "Two"})[1].unread_columns == ["train", "chosen_reasoning"]


def test_a_column_of_both_splits_in_one_file_is_refused_and_can_be_ignored(read: Callable[..., Any]) -> None:
    rows = [{**ROW, "split": side} for side in ("train", "train_prefs", "other", "held_out")]
    why = r"train\.jsonl:4: column 'split' is 'held_out', and 'train' in train\.jsonl:1; .*data\.ignore: \[split\]"
    with pytest.raises(DataError, match=why):
        read(*rows, bad_rows="drop")
    assert len(read(*rows, ignore=["split"])[0]) == 4
    for one in (rows[:3], rows[2:]):  # a file of its own for each
        assert read(*one)[1].unread_columns == ["split"]
    assert len(read({**ROW, "source": "train"}, {**ROW, "source": "test"})[0]) == 2


@pytest.mark.parametrize("column", ["winner", "preferred", "label"])
def test_a_winner_that_contradicts_the_order_of_the_answers_is_counted(read: Callable[..., Any], column: str) -> None:
    rows = [{**ROW, column: value} for value in ("chosen", "rejected", "Rejected", "a", None)]
    pairs, report = read(*rows)
    assert (len(pairs), report.unread_columns) == (5, [column])
    assert report.noted == {"a winner that contradicts the order of the answers": ["train.jsonl:2", "train.jsonl:3"]}
    row = {"prompt": "Hi", "response_chosen": "yes", "response_rejected": "no", column: "response_rejected"}
    assert [*read(row)[1].noted] == ["a winner that contradicts the order of the answers"]


def test_one_odd_first_row_does_not_decide_how_the_others_are_read(read: Callable[..., Any]) -> None:
    odd = {**ROW, "prompt": [USER]}
    pairs, report = read(odd, *[ROW] * 30, bad_rows="drop")
    assert (len(pairs), pairs[0].prompt) == (30, ROW["prompt"])
    assert report.dropped["malformed"] == [
        "train.jsonl:1: column 'prompt' is a list; text, as in the first rows, is expected, or a file of its own for such rows"
    ]
    odd = {"prompt": [USER], "chosen": "yes", "rejected": "no"}
    rows = [{"prompt": [USER], "chosen": [YES], "rejected": [NO]}] * 3
    assert [pair.where for pair in read(odd, *rows, bad_rows="drop")[0]] == [f"train.jsonl:{row}" for row in (2, 3, 4)]


@pytest.mark.parametrize(("extra", "remedy"), MATTERING.values(), ids=MATTERING.keys())
def test_what_matters_and_is_not_read_stops_with_its_remedy(
    read: Callable[..., Any], extra: dict[str, Any], remedy: str
) -> None:
    (name,) = extra
    empty = dict.fromkeys(extra)
    with pytest.raises(DataError, match=rf"train\.jsonl:2: (column )?'{name}'.*{remedy.replace('[', chr(92) + '[')}") as raised:
        read({**ROW, **empty}, {**ROW, **extra}, bad_rows="drop")
    assert f"data.ignore: [{name}]" in str(raised.value)
    pairs, report = read({**ROW, **extra}, ignore=[name])
    assert (pairs[0].prompt, report.unread_columns) == (ROW["prompt"], [])


def test_the_remedies_of_unread_columns_work(read: Callable[..., Any]) -> None:
    (pair,), _ = read({**ROW, "context": "He was born in 2020."}, columns={"input": "context"})
    assert pair.prompt == "How old is he?\n\nHe was born in 2020."
    (pair,), _ = read({**ROW, "chat_history": PAIRS[:1]}, columns={"history": "chat_history"})
    assert len(pair.prompt) == 3
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    question = {"role": "user", "content": ROW["prompt"]}
    for column, conversation in (("history", turns), ("prompt", [*turns, question])):
        (pair,), _ = read({**ROW, "conversation": conversation}, columns={column: "conversation"})
        assert pair.prompt == (*turns, question)
    (pair,), _ = read({**ROW, "functions": [{"name": "f"}]}, columns={"tools": "functions"})
    assert pair.tools == [{"name": "f"}]


@pytest.mark.parametrize("extra", [
    {"weight": 1.0}, {"context": ""}, {"images": []}, {"history": None}, {"question": "How old is he?"}, {"weight": None},
    {"messages": [{"role": "user", "content": "How old  is he?"}, {"role": "assistant", "content": "Two."}]},
    {"conversation": [{"input": "How old is he?", "output": "A third answer."}]},
    {"conversation": "[{'input': 'How old is he?', 'output': 'A third answer.'}]"},
])  # fmt: skip
def test_what_is_empty_or_read_anyway_does_not_stop(read: Callable[..., Any], extra: dict[str, Any]) -> None:
    assert read({**ROW, **extra})[0][0].prompt == ROW["prompt"]


def test_a_system_column_that_differs_from_the_system_turn_stops(read: Callable[..., Any]) -> None:
    prompt = [{"role": "system", "content": "Be kind."}, USER]
    assert read({"prompt": prompt, "system": "Be kind.", "chosen": [YES], "rejected": [NO]})[1].unread_columns == []
    with pytest.raises(DataError, match=r"column 'system' has content, was not read.*data\.ignore: \[system\]"):
        read({"prompt": prompt, "system": "Be rude.", "chosen": [YES], "rejected": [NO]})


def test_a_question_beside_whole_dialogues_is_only_named(read: Callable[..., Any]) -> None:
    (pair,), report = read({"question": "Is it?", "chosen": [USER, YES], "rejected": [USER, NO]})
    assert (pair.prompt, report.unread_columns) == ((USER,), ["question"])
    with pytest.raises(DataError, match="column 'context' has content"):
        read({"context": "Is it?", "chosen": [USER, YES], "rejected": [USER, NO]})


def test_a_prompt_that_the_map_replaces_is_not_lost(read: Callable[..., Any]) -> None:
    with pytest.raises(
        DataError, match=r"column 'prompt' has content.*read it after 'q' with data: \{columns: \{input: prompt\}\}"
    ):
        read({**ROW, "q": "Hi"}, columns={"prompt": "q"})


def test_ignoring_a_column_called_content_leaves_the_messages_whole(read: Callable[..., Any]) -> None:
    assert read({"content": "x", "prompt": [USER], "chosen": [YES], "rejected": [NO]}, ignore=["content"])[0][0].chosen == (
        YES,
    )


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("train", False), ("images", ["x.png"])])
def test_keys_of_messages_that_matter_stop_and_can_be_ignored(read: Callable[..., Any], key: str, value: Any) -> None:
    row = {"prompt": [USER], "chosen": [{**YES, key: value}], "rejected": [NO]}
    with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{key}.*data\.ignore: \[{key}\]"):
        read(row)
    assert read(row, ignore=[key])[0][0].chosen == (YES,)


def test_tools_in_a_message_stop(read: Callable[..., Any]) -> None:
    system = {"role": "system", "content": "x", "tools": [{"name": "f"}]}
    with pytest.raises(DataError, match=r"a message has tools; move them to column 'tools', or train without: data\.ignore"):
        read({"prompt": [system, USER], "chosen": [YES], "rejected": [NO]})


def test_turns_of_the_prompt_that_ask_not_to_be_trained_on_are_not(read: Callable[..., Any]) -> None:
    earlier = {"role": "assistant", "content": "x", "weight": 0}
    (pair,), _ = read({"prompt": [USER, earlier, USER], "chosen": [{**YES, "weight": 1}], "rejected": [NO]})
    assert pair.prompt[1]["content"] == "x"


@pytest.mark.parametrize("given", [{"enable_thinking": False, "x": None}, '{"enable_thinking": false}'])
def test_arguments_of_the_template_are_read_from_their_column(read: Callable[..., Any], given: Any) -> None:
    assert read({**ROW, "chat_template_kwargs": given})[0][0].template_args == {"enable_thinking": False}
    assert read({**ROW, "kw": given}, columns={"chat_template_kwargs": "kw"})[0][0].template_args == {"enable_thinking": False}


def test_arguments_of_the_template_that_are_none_are_an_error(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"column 'chat_template_kwargs' is a list; an object with arguments"):
        read({**ROW, "chat_template_kwargs": [1]})
    assert read({**ROW, "chat_template_kwargs": {"enable_thinking": None}})[0][0].template_args == {}


@pytest.mark.parametrize("names", [
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"), ("chosen_reward", "rejected_reward"), ("chosen_avg_rating", "rejected_avg_rating"),
])  # fmt: skip
def test_scores_that_contradict_the_labels_are_counted_and_named(read: Callable[..., Any], names: tuple[str, str]) -> None:
    scores = [(2.0, 9.0), (5, 5), ("5", "4"), (None, 3), (1, 0)]
    pairs, report = read(*({**ROW, **dict(zip(names, both, strict=True))} for both in scores))
    assert len(pairs) == 5
    assert report.noted["scores that contradict the labels"] == ["train.jsonl:1"]
    assert report.noted["scores that are equal"] == ["train.jsonl:2"]
    assert report.unread_columns == []


def test_a_negative_margin_contradicts_the_labels(read: Callable[..., Any]) -> None:
    _, report = read({**ROW, "margin": -1}, {**ROW, "margin": 0}, {**ROW, "margin": 2})
    assert report.noted == {"scores that contradict the labels": ["train.jsonl:1"]}


def test_errors_and_penalties_are_no_scores(read: Callable[..., Any]) -> None:
    _, report = read({**ROW, "chosen_mqm": "0.0", "rejected_mqm": "5.0"})
    assert (dict(report.noted), report.unread_columns) == ({}, ["chosen_mqm", "rejected_mqm"])


@pytest.mark.parametrize("scores", [
    {"score": {"chosen": 1, "rejected": 3}},
    {"rewards_chosen": 1, "rewards_rejected": 3},
    {"score_w": "1", "score_l": "3"},
    {"chosen": [YES | {"score": 1}], "rejected": [NO | {"score": 3}]},
])  # fmt: skip
def test_scores_wherever_they_stand_are_compared_with_the_labels(read: Callable[..., Any], scores: dict[str, Any]) -> None:
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO]} | scores
    _, report = read(row)
    assert report.noted["scores that contradict the labels"] == ["train.jsonl:1"]
    assert report.unread_columns == []


def test_without_a_tokenizer_scores_of_messages_are_no_part_of_the_answer() -> None:
    messages = [USER | {"id": "7"}, YES | {"score": "1", "reasoning_content": "Why not."}]
    assert Characters().apply_chat_template(messages) == "[user]\nHi\n[assistant]\nWhy not.\nyes"


def test_hundreds_of_unread_columns_are_a_few_lines(read: Callable[..., Any]) -> None:
    _, report = read({**ROW, **{f"a_column_of_number_{number}": 1 for number in range(300)}})
    (line,) = (line for line in report.facts() if line.startswith("columns not read"))
    assert line.startswith("columns not read: a_column_of_number_0, a_column_of_number_1, ")
    assert line.endswith(" and 274 more")
    assert len(line) < 640


ANSWER = {"role": "assistant", "content": "b"}
MAPS = {
    "earlier turns": ({"prompt": "Ho", "dialogue": [USER, ANSWER]}, ["Hi", "b", "Ho"]),
    "the dialogue that is asked": ({"prompt": "Ho", "dialogue": [USER, ANSWER, USER]}, ["Hi", "b", "Hi"]),
    "instruction and input": ({"prompt": "Q17", "instruction": "Add.", "input": "1, 2"}, ["Add.\n\n1, 2"]),
    "input before the instruction": ({"prompt": "Q17", "input": "1, 2", "instruction": "Add."}, ["Add.\n\n1, 2"]),
    "question beside messages": ({"prompt": [USER], "question": "Who?"}, ["Who?"]),
    "prompt beside a dialogue": ({"conversations": [USER], "prompt": "Who?"}, ["Who?"]),
    "context": ({"prompt": "Who?", "context": "He is two."}, ["Who?\n\nHe is two."]),
    "system": ({"prompt": "Hi", "systemprompt": "Be kind."}, ["Be kind.", "Hi"]),
    "chat history": ({"prompt": "Hi", "chat_history": PAIRS[:1]}, ["My dog is Otto.", "Nice name.", "Hi"]),
}


@pytest.mark.parametrize(("row", "contents"), MAPS.values(), ids=MAPS.keys())
def test_the_map_that_an_error_prints_reads_the_column(
    read: Callable[..., Any], row: dict[str, Any], contents: list[str]
) -> None:
    row = row | {"chosen": "yes", "rejected": "no"}
    with pytest.raises(DataError, match="was not read and belongs to the prompt") as error:
        read(row)
    written = re.search(r"data: (\{columns: \{.*?\}(?:, ignore: \[.*?\])?\})", str(error.value))
    assert written
    (pair,), _ = read(row, **yaml.safe_load(written[1]))
    assert [pair.prompt] == contents or [turn["content"] for turn in pair.prompt] == contents


@pytest.mark.parametrize(("row", "remedy"), [
    ({"background": "B", "knowledge": "K"}, "one column alone is read as input, so write background, knowledge into one"),
    ({"context": "C", "input": "I"}, "one column alone is read as input, so write context, input into one"),
    ({"documents": ["B", "K"]}, r"write it as one text, and read it with data: \{columns: \{input: documents\}\}"),
    ({"prompt": None, "question": "Q?", "context": ["B", "K"]}, r"write it as one text, and read it with .*input: context"),
    ({"instruction": "I", "query": "Q", "prompt": "P"}, r"read it in the place of 'prompt' with data: \{columns: \{prompt: in"),
    ({"prompt": [USER], "context": "C"}, "write it into the messages of the prompt, or leave it out"),
    ({"prompt": [{"role": "system", "content": "x"}, USER], "systemprompt": "S"}, "the prompt has another system turn"),
    ({"system": "x", "systemprompt": "S"}, "the prompt has another system turn; take one"),
])  # fmt: skip
def test_what_no_map_can_read_is_answered_without_one(read: Callable[..., Any], row: dict[str, Any], remedy: str) -> None:
    with pytest.raises(DataError, match=remedy):
        read({name: cell for name, cell in ({"prompt": "Hi", "chosen": "yes", "rejected": "no"} | row).items() if cell})


def test_a_history_with_a_blank_turn_or_two_of_the_users_in_a_row_is_noted(read: Callable[..., Any]) -> None:
    _, report = read(
        {**ROW, "history": [["a", ""], ["c", "d"]]},
        {**ROW, "history": [USER]},
        {**ROW, "history": PAIRS},
        {**ROW, "history": []},
    )
    assert report.noted == {"history with a blank turn, or two user turns in a row": ["train.jsonl:1", "train.jsonl:2"]}


CONTEXT = [
    "history",
    "chat_history",
    "input",
    "context",
    "documents",
    "system",
    "systemprompt",
    "functions",
    "prompt",
    "instruction",
    "question",
    "query",
    "messages",
    "dialogue",
    "conversation",
    "prefill",
    "template_kwargs",
]
PROMPTS = [
    {"prompt": "Hi"},
    {"prompt": [{"role": "system", "content": "Be kind."}, USER]},
    {"instruction": "Hi"},
    {"question": "Hi"},
    {"conversations": [USER]},
]


@pytest.mark.parametrize("asked", PROMPTS, ids=lambda asked: " ".join(map(str, asked)))
@pytest.mark.parametrize("more", CONTEXT)
def test_no_remedy_leads_to_itself(asked: dict[str, Any], more: str) -> None:
    for other in CONTEXT:
        texts = {name: f"{name} says" for name in (other, more)}
        row: dict[str, Any] = {**texts, **asked, "chosen": "yes", "rejected": "no"}
        row |= {name: [["a", f"{name} says"]] for name in texts if "history" in name}
        row |= {
            name: [USER, {"role": "assistant", "content": f"{name} says"}] for name in texts if name[:2] in ("me", "di", "co")
        }
        row |= {
            name: [{"name": "f"}] if name == "functions" else {"a": 1}
            for name in texts
            if name in ("functions", "template_kwargs")
        }
        settings: dict[str, Any] = {"columns": {}, "ignore": []}
        errors: list[str] = []
        while True:
            try:
                RowReader(Shape([row], where="f", **settings)).read(row, where="f:1")
            except DataError as error:
                assert str(error) not in errors
                errors.append(str(error))
                written = re.search(r"data: (\{columns: \{.*?\}(?:, ignore: \[.*?\])?\})", str(error))
                if not written or "<column>" in str(error):
                    break  # it says what to write
                said = yaml.safe_load(written[1])
                settings = {
                    "columns": settings["columns"] | said["columns"],
                    "ignore": settings["ignore"] + said.get("ignore", []),
                }
            else:
                break


@pytest.mark.parametrize("row", [
    {**ROW, "system": [{"type": "text", "text": "Be short."}]},
    {**ROW, "messages": [{"role": "user", "content": [{"type": "text", "text": ROW["prompt"]}]}, YES]},
], ids=["system", "messages"])  # fmt: skip
def test_typed_parts_are_found_by_their_text(read: Callable[..., Any], row: dict[str, Any]) -> None:
    (pair,), _ = read(row)
    assert pair.chosen in ("Two.", ({"role": "assistant", "content": "Two."},))


def test_tools_within_the_input_and_beside_it_must_be_the_same(read: Callable[..., Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {
        "input": {"messages": [USER], "tools": tools},
        "tools": tools,
        "preferred_output": [YES],
        "non_preferred_output": [NO],
    }
    assert read(row)[0][0].tools == tools
    with pytest.raises(DataError, match="has tools within 'input' and others in column 'tools'; write all of them into one"):
        read({**row, "tools": [{"type": "function", "function": {"name": "g"}}]})


def test_a_cell_of_many_levels_is_looked_through(read: Callable[..., Any]) -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    shape = Shape([{**ROW, "meta": deep}], where="f")
    reader = RowReader(shape)
    assert reader.read({**ROW, "meta": deep}, where="f:1") is not None
    assert reader.unread == ["meta"]

"""Each known shape of a row becomes the same pair; unknown ones are answered with the map to write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths_to_pairs import load_pairs

from pe_dpo.errors import DataError

USER = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "yes"}}

TEXTS = {
    "text": {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
    "instruction": {"instruction": "Hi", "input": "", "output": "ignored", "chosen": "yes", "rejected": "no"},
    "empty system": {"instruction": "Hi", "system": "", "chosen": "yes", "rejected": "no"},
}
MESSAGES = {
    "messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "messages and text answers": {"prompt": [USER], "chosen": "yes", "rejected": "no"},
    "messages with the prompt repeated": {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
    "whole dialogues": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "UltraFeedback": {"prompt": "Hi", "prompt_id": "1", "chosen": [USER, YES], "rejected": [USER, NO]},
    "text prompt and message answers": {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
    "rejected_response": {"messages": [USER, YES], "rejected_response": "no"},
    "ShareGPT": {**SHAREGPT, "rejected": {"from": "gpt", "value": "no"}},
    "ShareGPT with texts": {**SHAREGPT, "chosen": "yes", "rejected": "no"},
    "OpenAI": {"input": {"messages": [USER]}, "preferred_output": [YES], "non_preferred_output": [NO]},
    "content parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "chosen": "yes",
                      "rejected": "no"},
    "null keys": {"prompt": [{**USER, "tool_calls": None}], "chosen": [YES], "rejected": [NO]},
}  # fmt: skip


def only_pair(path: Path, **options: Any) -> Any:
    (pair,), _ = load_pairs(path, **options)
    return pair


@pytest.mark.parametrize("row", TEXTS.values(), ids=TEXTS.keys())
def test_every_shape_of_text_becomes_the_same_pair(write_lines: Callable[..., Path], row: dict[str, Any]) -> None:
    pair = only_pair(write_lines(row))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Hi", "yes", "no")


@pytest.mark.parametrize("row", MESSAGES.values(), ids=MESSAGES.keys())
def test_every_shape_of_messages_becomes_the_same_pair(write_lines: Callable[..., Path], row: dict[str, Any]) -> None:
    pair = only_pair(write_lines(row))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (YES,), (NO,))


def test_the_input_of_an_instruction_follows_after_a_blank_line(write_lines: Callable[..., Path]) -> None:
    row = {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"}
    assert only_pair(write_lines(row)).prompt == "Add.\n\n1, 2"


def test_a_system_column_makes_messages_that_begin_with_it(write_lines: Callable[..., Path]) -> None:
    pair = only_pair(write_lines({"instruction": "Hi", "system": "Be kind.", "chosen": "yes", "rejected": "no"}))
    assert (pair.prompt, pair.chosen) == ((SYSTEM, USER), (YES,))


def test_an_answer_with_a_tool_turn_keeps_all_of_its_turns(write_lines: Callable[..., Path]) -> None:
    result = {"role": "tool", "content": "2"}
    pair = only_pair(write_lines({"chosen": [USER, CALL, result, YES], "rejected": [USER, NO]}))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (CALL, result, YES), (NO,))


def test_a_shared_tool_call_belongs_to_the_prompt(write_lines: Callable[..., Path]) -> None:
    result = {"role": "tool", "content": "2"}
    pair = only_pair(write_lines({"chosen": [USER, CALL, result, YES], "rejected": [USER, CALL, result, NO]}))
    assert pair.prompt == (USER, CALL, result)


def test_arguments_of_a_tool_call_in_openai_text_become_an_object(write_lines: Callable[..., Path]) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}
    assert only_pair(write_lines({"prompt": [USER], "chosen": [call], "rejected": [NO]})).chosen == (CALL,)


def test_a_sharegpt_function_call_becomes_a_tool_call(write_lines: Callable[..., Path]) -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
    ]
    pair = only_pair(write_lines({"conversations": turns, "chosen": "yes", "rejected": "no"}))
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "tool"]
    assert pair.prompt[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'], ids=["list", "JSON text"])
def test_tools_are_kept_for_the_template(write_lines: Callable[..., Path], tools: Any) -> None:
    row = {"input": {"messages": [USER], "tools": tools}, "preferred_output": [YES], "non_preferred_output": [NO]}
    assert only_pair(write_lines(row)).tools == [{"name": "f"}]


@pytest.mark.parametrize(("extra", "margin"), [
    ({"margin": 1.5}, 1.5),
    ({"margin": None}, None),
    ({"chosen_score": 4, "rejected_score": 1}, 3.0),
    ({"score_chosen": 4, "score_rejected": 6.5}, -2.5),
    ({"chosen_score": 4}, None),
    ({}, None),
])  # fmt: skip
def test_the_margin_is_its_column_or_the_difference_of_two_scores(
    write_lines: Callable[..., Path], extra: dict[str, Any], margin: float | None
) -> None:
    assert only_pair(write_lines({**TEXTS["text"], **extra})).margin == margin


def test_rows_without_the_margin_that_others_have_are_noted(write_lines: Callable[..., Path]) -> None:
    _, report = load_pairs(write_lines({**TEXTS["text"], "margin": 1}, {**TEXTS["text"], "margin": None}))
    assert report.noted["without a margin where others have one"] == ["train.jsonl:2"]


def test_a_column_map_names_the_columns(write_lines: Callable[..., Path]) -> None:
    row = {"q": "Hi", "j": "yes", "k": "no", "sj": 3, "sk": 1, "chosen": "not this"}
    columns = {"prompt": "q", "chosen": "j", "rejected": "k", "chosen_score": "sj", "rejected_score": "sk"}
    pair = only_pair(write_lines(row), columns=columns)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == ("Hi", "yes", "no", 2.0)


def test_unknown_columns_are_answered_with_the_map_to_write(write_lines: Callable[..., Path]) -> None:
    path = write_lines({"qid": 7, "question": "Hi", "response_j": "yes", "response_k": "no"})
    with pytest.raises(DataError) as raised:
        load_pairs(path)
    assert "the columns are qid, question, response_j, response_k" in str(raised.value)
    assert str(raised.value).splitlines()[-1] == (
        "data: {columns: {prompt: question, chosen: response_j, rejected: response_k}}"
    )


def test_the_map_to_write_quotes_names_and_leaves_open_what_cannot_be_guessed(write_lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as raised:
        load_pairs(write_lines({"thing": "Hi", "the best": "yes", "non_preferred": "no"}))
    assert str(raised.value).splitlines()[-1] == (
        'data: {columns: {prompt: <column>, chosen: "the best", rejected: non_preferred}}'
    )


def test_answers_without_a_prompt_that_are_no_transcripts_ask_for_the_prompt(write_lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"prompt: my_question, chosen: chosen, rejected: rejected"):
        load_pairs(write_lines({"my_question": "Hi", "chosen": "yes", "rejected": "no"}))
    with pytest.raises(DataError, match=r"none of them is the prompt.*add column 'prompt'"):
        load_pairs(write_lines({"chosen": "yes", "rejected": "no"}))


@pytest.mark.parametrize("row", [
    {"prompt": "Hi", "completion": "yes", "label": True},
    {"messages": [USER, YES], "label": 0},
])  # fmt: skip
def test_unpaired_data_is_refused_by_its_name(write_lines: Callable[..., Path], row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"unpaired \(KTO-style\) data.*pairs are needed"):
        load_pairs(write_lines(row))


def test_data_with_one_answer_a_row_is_refused(write_lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"one answer a row.*pairs are needed"):
        load_pairs(write_lines({"instruction": "Hi", "output": "yes"}))


def test_a_column_map_to_nowhere_lists_the_columns(write_lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"data\.columns\.chosen: train\.jsonl has no column 'good'; found prompt, chosen"):
        load_pairs(write_lines(TEXTS["text"]), columns={"chosen": "good"})


def test_text_beside_messages_is_an_error_that_names_both(write_lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: column 'chosen' is text and 'rejected' a list"):
        load_pairs(write_lines({"prompt": "Hi", "chosen": "yes", "rejected": [NO]}))


def test_a_prompt_that_is_no_turn_of_the_dialogue_is_an_error_with_the_difference(write_lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"'prompt' is no turn of the dialogue.*'Ho' in prompt, 'Hi' in chosen"):
        load_pairs(write_lines({"prompt": "Ho", "chosen": [USER, YES], "rejected": [USER, NO]}))


def test_rows_say_their_line_and_their_file(write_lines: Callable[..., Path], tmp_path: Path) -> None:
    pairs, _ = load_pairs(write_lines(TEXTS["text"], TEXTS["text"]))
    assert [pair.where for pair in pairs] == ["train.jsonl:1", "train.jsonl:2"]
    (tmp_path / "x.json").write_text(json.dumps({"data": [TEXTS["text"]]}))
    assert only_pair(tmp_path / "x.json").where == "x.json row 1"


def test_the_shape_is_said_in_words(write_lines: Callable[..., Path]) -> None:
    assert load_pairs(write_lines(TEXTS["text"]))[1].shape == "prompt (text), chosen and rejected (text)"


def test_one_column_is_not_read_as_two_things(write_lines: Callable[..., Path]) -> None:
    path = write_lines({"prompt": "Hi", "good": "yes", "bad": "no"})
    with pytest.raises(DataError, match=r"data\.columns: chosen and rejected both name column 'good'; name another for one"):
        load_pairs(path, columns={"chosen": "good", "rejected": "good"})


@pytest.mark.parametrize("key", ["prompt", "winner"])
def test_a_column_is_not_both_mapped_and_ignored(write_lines: Callable[..., Path], key: str) -> None:
    path = write_lines({"prompt": "Hi", "chosen": "yes", "rejected": "no", "q": "chosen"})
    with pytest.raises(
        DataError, match=rf"data\.columns\.{key}: column 'q' is in data\.ignore too; take it out of one of them"
    ):
        load_pairs(path, columns={key: "q"}, ignore=["q"])


def test_a_transcript_before_answers_of_messages_is_its_turns(write_lines: Callable[..., Path]) -> None:
    pair = only_pair(write_lines({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": [YES], "rejected": [NO]}))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (YES,), (NO,))


def test_a_column_of_exactly_that_name_is_guessed_first(write_lines: Callable[..., Path]) -> None:
    path = write_lines({"chosen_prompt": "Hi", "chosen": "yes", "rejected_prompt": "Hi", "rejected": "no"})
    with pytest.raises(DataError) as error:
        load_pairs(path)
    assert str(error.value).endswith("data: {columns: {prompt: chosen_prompt, chosen: chosen, rejected: rejected}}")


@pytest.mark.parametrize(("row", "columns"), [
    ({"messages": [USER, YES], "bad": "no"}, {"rejected": "bad"}),
    ({"talk": [USER, YES], "rejected": "no"}, {"messages": "talk"}),
    ({"talk": [USER, YES], "rejected_messages": [USER, NO]}, {"messages": "talk"}),
], ids=["rejected", "messages", "both dialogues"])  # fmt: skip
def test_one_mapped_column_and_one_by_its_own_name_make_a_shape(
    write_lines: Callable[..., Path], row: dict[str, Any], columns: dict[str, str]
) -> None:
    pairs, report = load_pairs(write_lines(row), columns=columns)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [((USER,), (YES,), (NO,))]
    assert report.unread_columns == []

"""Shapes and column names of published data sets and other tools: read where their meaning is plain, else answered truly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths_to_pairs import load_pairs, prepare_pairs
from toy_tokenizers import CHATML, build_tokenizer

from pe_dpo.errors import DataError

USER = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "Be kind."}
EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def share(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


MESSAGES = {
    "ms-swift, rejected_messages": {"messages": [USER, YES], "rejected_messages": [USER, NO]},
    "chosen_messages": {"chosen_messages": [USER, YES], "rejected_messages": [USER, NO]},
    "ShareGPT, rejected_conversations": {"conversations": share(("human", "Hi"), ("gpt", "yes")),
                                         "rejected_conversations": share(("human", "Hi"), ("gpt", "no"))},
    "Axolotl, chat_template": {"messages": [USER], "chosen": YES, "rejected": NO},
    "Axolotl, speakers": {"conversation": [{"speaker": "human", "text": "Hi"}], "better": {"speaker": "agent", "text": "yes"},
                          "worse": {"speaker": "agent", "text": "no"}},
    "messages and texts": {"messages": [USER], "chosen": "yes", "rejected": "no"},
    "messages with the chosen answer": {"messages": [USER, YES], "chosen": "yes", "rejected": "no"},
    "messages that are the chosen dialogue": {"messages": [USER, YES], "chosen": [USER, YES], "rejected": [USER, NO]},
    "UltraFeedback binarized": {"prompt": "Hi", "messages": [USER, YES], "chosen": [USER, YES], "rejected": [USER, NO]},
    "Capybara": {"conversation": [{"input": "Hi", "output": "x"}], "prompt": "Hi", "chosen": [USER, YES],
                 "rejected": [USER, NO]},
    "conversation": {"conversation": [USER], "chosen": "yes", "rejected": "no"},
    "UltraInteract": {"trajectory": share(("user", "Hi")), "chosen": "yes", "rejected": "no"},
    "OpenHermesPreferences": {"prompt": "Hi", "candidates_completions": ["yes", "no"], "ranks": [1, 2], "chosen": [USER, YES],
                              "rejected": [USER, NO]},
    "H4 Orca": {"question": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]},
    "context of messages": {"context": [USER], "chosen": "yes", "rejected": "no"},
    "OpenAI": {"input": {"messages": [USER], "tools": [], "parallel_tool_calls": True}, "preferred_output": [YES],
               "non_preferred_output": [NO]},
    "prompt and responses of messages": {"prompt": [USER], "chosen_response": [YES], "rejected_response": [NO]},
    "objects with messages": {"prompt": {"messages": [USER]}, "chosen": {"messages": [USER, YES]},
                              "rejected": {"messages": [USER, NO]}},
    "one message each": {"prompt": USER, "chosen": YES, "rejected": NO},
}  # fmt: skip
TEXTS = {
    "Orca": {"system": "", "question": "Hi", "chosen": "yes", "rejected": "no"},
    "argilla math": {"instruction": "Hi", "chosen_response": "yes", "rejected_response": "no", "metadata": "{}"},
    "ms-swift, query": {"query": "Hi", "response": "yes", "rejected_response": "no"},
    "input": {"input": "Hi", "chosen": "yes", "rejected": "no"},
    "input and outputs": {"input": "Hi", "preferred_output": "yes", "non_preferred_output": "no"},
    "LLaMA-Factory, old": {"instruction": "Hi", "input": "", "output": ["yes", "no"]},
    "prompt and output": {"prompt": "Hi", "output": ["yes", "no"]},
    "lists of one answer": {"prompt": "Hi", "chosen": ["yes"], "rejected": ["no"]},
    "objects": {"prompt": "Hi", "chosen": {"answer": "yes", "score": 1}, "rejected": {"answer": "no", "score": 0}},
    "objects with content": {"prompt": "Hi", "chosen": {"content": "yes"}, "rejected": {"content": "no"}},
    "capital letters": {"Prompt": "Hi", "Chosen": "yes", "Rejected": "no"},
    "spaces around names": {"prompt": "Hi", " chosen": "yes", " rejected": "no"},
    "accepted": {"question": "Hi", "accepted": "yes", "rejected": "no"},
    "answer_chosen": {"prompt": "Hi", "answer_chosen": "yes", "answer_rejected": "no"},
    "output_chosen": {"prompt": "Hi", "chosen_output": "yes", "rejected_output": "no"},
}
REPEATED = {
    "system turn in the prompt alone": {"prompt": [SYSTEM, USER], "chosen": [USER, YES], "rejected": [USER, NO]},
    "system turn in the dialogues alone": {"prompt": [USER], "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
    "system turn in both": {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
    "text and dialogues with a system turn": {"prompt": "Hi", "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
    "system column": {"prompt": "Hi", "system": "Be kind.", "chosen": [USER, YES], "rejected": [USER, NO]},
    "system_prompt column": {"prompt": "Hi", "system_prompt": "Be kind.", "chosen": "yes", "rejected": "no"},
    "messages and a system column": {"messages": [USER, YES], "rejected_response": "no", "system": "Be kind."},
    "two dialogues": {"messages": [SYSTEM, USER, YES], "rejected_messages": [SYSTEM, USER, NO]},
}


@pytest.fixture
def read(write_lines: Callable[..., Path]) -> Callable[..., Any]:
    """Return the pairs of some rows and the report."""
    return lambda *rows, **settings: load_pairs(write_lines(*rows), **settings)


@pytest.mark.parametrize("row", MESSAGES.values(), ids=MESSAGES.keys())
def test_published_shapes_of_messages_become_the_same_pair(read: Callable[..., Any], row: dict[str, Any]) -> None:
    (pair,), _ = read(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (YES,), (NO,))


@pytest.mark.parametrize("row", TEXTS.values(), ids=TEXTS.keys())
def test_published_shapes_of_text_become_the_same_pair(read: Callable[..., Any], row: dict[str, Any]) -> None:
    (pair,), _ = read(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Hi", "yes", "no")


@pytest.mark.parametrize("row", REPEATED.values(), ids=REPEATED.keys())
def test_the_system_turn_and_the_prompt_are_said_once(read: Callable[..., Any], row: dict[str, Any]) -> None:
    (pair,), _ = read(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((SYSTEM, USER), (YES,), (NO,))


def test_texts_that_repeat_the_prompt_lose_it_and_that_is_said(read: Callable[..., Any]) -> None:
    pairs, report = read({"prompt": "Q: Hi\nA:", "chosen": "Q: Hi\nA: yes", "rejected": "Q: Hi\nA: no"},
                         {"prompt": "Q: Ho\nA:", "chosen": "Q: Ho\nA: yea", "rejected": "Q: Ho\nA: nay"})  # fmt: skip
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        ("Q: Hi\nA:", " yes", " no"), ("Q: Ho\nA:", " yea", " nay")
    ]  # fmt: skip
    assert report.shape == "prompt (text), chosen and rejected (text); the answers repeat the prompt, which is left out of them"


def test_one_row_of_many_that_repeats_the_prompt_is_noted(read: Callable[..., Any]) -> None:
    row = {"prompt": "Rust?", "chosen": "Rust? A language.", "rejected": "Rust? A metal."}
    pairs, report = read(row, {"prompt": "Hi", "chosen": "yes", "rejected": "no"})
    assert pairs[0].chosen == "Rust? A language."
    assert report.noted == {"answers that begin with the whole prompt": ["train.jsonl:1"]}


@pytest.mark.parametrize("printed", ["['yes']", "{'answer': 'yes', 'score': 1}"])
def test_lists_and_objects_that_pandas_printed_into_text_are_noted(read: Callable[..., Any], printed: str) -> None:
    _, report = read(
        {"prompt": "Hi", "chosen": printed, "rejected": "no"}, {"prompt": "Hi", "chosen": "[1]", "rejected": "{x}"}
    )
    assert report.noted == {"text that looks like a printed list or object": ["train.jsonl:1"]}


def test_long_dialogues_under_other_names_share_their_beginning(read: Callable[..., Any]) -> None:
    for chosen, rejected in (("messages", "rejected_messages"), ("chosen_messages", "rejected_messages")):
        (pair,), report = read({chosen: [*EARLIER, USER, YES], rejected: [*EARLIER, USER, NO]})
        assert (pair.prompt, pair.chosen, pair.rejected) == ((*EARLIER, USER), (YES,), (NO,))
        assert report.shape == (
            "whole dialogues (messages); the prompt is what chosen and rejected share; "
            f"'{chosen}' read as chosen; '{rejected}' read as rejected"
        )


def test_other_spellings_are_said_in_the_shape(read: Callable[..., Any]) -> None:
    _, report = read({"question": "Hi", "response_chosen": "yes", "response_rejected": "no"})
    assert report.shape == (
        "prompt (text), chosen and rejected (text); 'response_chosen' read as chosen; 'response_rejected' read as rejected; "
        "'question' read as prompt"
    )


def test_two_spellings_of_the_prompt_are_ambiguous(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"data: \{columns: \{prompt: question, .*chosen: chosen, rejected: rejected\}\}"):
        read({"question": "Hi", "query": "Ho", "chosen": "yes", "rejected": "no"})


@pytest.mark.parametrize("row", [
    {"instruction": "Is it polite?", "input": "Give me that!", "good": "no", "bad": "yes"},
    {"prompt": "Is it polite?", "input": "Give me that!", "good": "no", "bad": "yes"},
    {"question": "Is it polite?", "context": "Give me that!", "response_j": "no", "response_k": "yes"},
    {"question": "Is it polite?\n\nGive me that!", "pos_answer": {"answer": "no"}, "neg_answer": {"answer": "yes"}},
])  # fmt: skip
@pytest.mark.parametrize("extra", [{}, {"system": "Be kind."}, {"system_prompt": "Be kind."}, {"history": [["a", "b"]]}])
def test_the_map_that_an_error_prints_loses_no_column(
    read: Callable[..., Any], row: dict[str, Any], extra: dict[str, Any]
) -> None:
    with pytest.raises(DataError) as raised:
        read({**row, **extra})
    printed = yaml.safe_load(str(raised.value).splitlines()[-1])["data"]["columns"]
    (pair,), report = read({**row, **extra}, columns=printed)
    text = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"]
    assert text == "Is it polite?\n\nGive me that!"
    assert [pair.chosen, pair.rejected] == ["no", "yes"] or [pair.chosen[0]["content"], pair.rejected[0]["content"]] == [
        "no",
        "yes",
    ]
    assert len(pair.prompt) == (2 if "history" not in extra else 3) or not extra
    assert report.unread_columns == []


@pytest.mark.parametrize(("row", "found"), [
    ({"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}, "'answers' is a list of answers"),
    ({"instruction": "Hi", "completions": [{"response": "a"}, {"response": "b"}]}, "'completions' is a list of answers"),
    ({"prompt": "Hi", "response_0": "a", "response_1": "b", "response_2": "c"},
     "response_0, response_1, response_2 are 3 answers"),
    ({"prompt": "Hi", "output": ["a", "b", "c"], "label": 1}, "'output' is a list of answers"),
    ({"prompt": "Hi", "replies": ["a", "b"]}, "'replies' is a list of answers"),
    ({"info": {"post": "x"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "'summaries' is a list of answers"),
    ({"prompt": "Hi", "response": "x", "helpfulness": 3}, "there is one answer a row"),
    ({"prompt": "Hi", "chosen": "x"}, "there is one answer a row"),
    ({"a": 1}, "they have no two answers"),
    ({"chosen": "yes", "rejected": "no"}, "none of them is the prompt"),
])  # fmt: skip
def test_what_no_map_can_say_is_said_and_no_map_is_printed(read: Callable[..., Any], row: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError, match=found) as raised:
        read(row)
    assert "data: {columns" not in str(raised.value)


def test_two_answers_of_which_nothing_says_the_better_one_are_answered_so(read: Callable[..., Any]) -> None:
    with pytest.raises(
        DataError, match=r"no column is known to say which of answer_0 and answer_1 is better\. If it always is the first"
    ):
        read({"question": "Hi", "answer_0": "a", "answer_1": "b"})


def test_many_columns_fill_no_screen(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError) as raised:
        read({f"column_number_{number}": "x y" for number in range(500)})
    assert len(str(raised.value)) < 80 * 20


def test_lists_of_texts_written_as_text_are_refused(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"column 'prompt' holds lists of texts, written as text; write each row as messages"):
        read({"prompt": '["Hi", "And \\"now\\"?"]', "chosen": '["yes", "no"]', "rejected": '["no", "no"]'})
    assert read({"prompt": '["Hi"] or "Ho"?', "chosen": "yes", "rejected": "no"})[0]


@pytest.mark.parametrize(("column", "value", "found"), [
    ("chosen", ["a", "b"], "column 'chosen' is a list of 2 texts; one answer is expected"),
    ("rejected", {"x": "no"}, "column 'rejected' is an object with x; text, messages"),
    ("rejected", {"answer": "no", "text": "yes"}, "column 'rejected' is an object with answer, text"),
])  # fmt: skip
def test_answers_of_another_form_are_said_as_what_they_are(
    read: Callable[..., Any], column: str, value: Any, found: str
) -> None:
    with pytest.raises(DataError, match=rf"train\.jsonl:1: {found}"):
        read({"prompt": "Hi", "chosen": "yes", "rejected": "no", column: value})


def test_more_or_fewer_than_two_outputs_are_an_error(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:2: column 'output' is a list; two answers, the better one first"):
        read({"instruction": "Hi", "output": ["yes", "no"]}, {"instruction": "Hi", "output": ["a", "b", "c"]})


def test_errors_name_the_columns_of_the_file(read: Callable[..., Any]) -> None:
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    for row, found in (
        ({"q": "Hi", "good": None, "bad": "no"}, "column 'good' is null"),
        ({"q": "Hi", "good": "yes"}, "has no column 'bad'; found q, good"),
        ({"q": "a\0", "good": "yes", "bad": "no"}, "column 'q' holds a NUL"),
    ):
        with pytest.raises(DataError, match=rf"train\.jsonl:2: {found}"):
            read({"q": "Hi", "good": "yes", "bad": "no"}, row, columns=columns)
    with pytest.raises(DataError, match=r"prompts inside columns 'messages' and 'rejected_messages' differ.*'Hi' in messages"):
        read({"messages": [USER, YES], "rejected_messages": [{**USER, "content": "Ho"}, NO]})


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), [
    ("The sky is", " blue.", " green."),
    ("Is it blue?\n", "I think so", "I think not"),
    ("Q: Hi\nA:", " I am fine", " I am ill"),
    ("### Instruction:\nHi\n\n### Response:\n", "I am\nfine", "I am\nill"),
    ("USER: Hi ASSISTANT:", " I am fine", " I am ill"),
    ("[INST] Hi [/INST]", " I am fine", " I am ill"),
    ("Name A: or B:\n", "it is A", "it is B"),
])  # fmt: skip
def test_texts_that_begin_alike_are_cut_where_an_answer_may_begin(
    read: Callable[..., Any], prompt: str, chosen: str, rejected: str
) -> None:
    (pair,), report = read({"chosen": prompt + chosen, "rejected": prompt + rejected})
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
    assert report.shape.startswith("whole texts; the prompt is what chosen and rejected share up to the last tag")


@pytest.mark.parametrize("rows", [
    [{"chosen": "The sky is blue.", "rejected": "Grass is green."}],
    [{"chosen": "The sky is blue.", "rejected": "The sky is red."}, {"chosen": "Yes", "rejected": "No"}],
    [{"chosen": "Bluebird", "rejected": "Bluebell"}],
    [{"chosen": "I think so", "rejected": "I do not", "thing": "Is it blue?"}],
], ids=["nothing shared", "in one row", "inside a word", "another text"])  # fmt: skip
def test_texts_without_a_prompt_in_front_are_refused(read: Callable[..., Any], rows: list[dict[str, str]]) -> None:
    with pytest.raises(DataError, match=r"add column 'prompt'|prompt: <column>"):
        read(*rows)


def test_a_prefill_stays_with_the_prompt(write_lines: Callable[..., Path]) -> None:
    begun = {"role": "assistant", "content": "{"}
    row = {"chosen": [{"role": "assistant", "content": '"a": 1}'}], "rejected": [NO]}
    tokenizer = build_tokenizer(template=CHATML, eos="<|im_end|>")
    texts = []
    for column in ("prompt", "messages"):
        path = write_lines({column: [USER, begun], **row})
        (pair,) = prepare_pairs(path, tokenizer=tokenizer, max_length=99, eval=0).train
        texts.append([tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)])
    assert texts[0] == texts[1] == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{", '"a": 1}<|im_end|>', "no<|im_end|>"
    ]  # fmt: skip


def test_answers_that_go_on_with_the_prompt_are_noted(read: Callable[..., Any]) -> None:
    _, report = read(
        {"prompt": [USER, YES], "chosen": "!", "rejected": "?"}, {"prompt": [USER], "chosen": "yes", "rejected": "no"}
    )
    assert report.noted == {"prompt that ends with an assistant turn, with which the answers go on": ["train.jsonl:1"]}


@pytest.mark.parametrize(("chosen", "rejected"), [("yes", "no"), ("yes, sir", "yes, my lady")])
def test_answers_that_bring_the_prefill_once_more_are_an_error(read: Callable[..., Any], chosen: str, rejected: str) -> None:
    with pytest.raises(
        DataError, match=r"column 'prompt' ends with the assistant turn 'yes', which the answers bring once more"
    ):
        read({"prompt": [USER, YES], "chosen": chosen, "rejected": rejected})


def test_a_column_map_reads_texts_that_are_messages_in_a_csv(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('q,a,b\n"' + json.dumps([USER]).replace('"', '""') + '",yes,no\n')
    (pair,), _ = load_pairs(tmp_path / "x.csv", columns={"prompt": "q", "chosen": "a", "rejected": "b"})
    assert (pair.prompt, pair.chosen) == ((USER,), (YES,))


@pytest.mark.parametrize("row", [
    {"messages": [USER, YES], "rejected": "no"},
    {"messages": [USER, YES], "rejected": [USER, NO]},
    {"conversations": share(("human", "Hi"), ("gpt", "yes")), "rejected": {"from": "gpt", "value": "no"}},
])  # fmt: skip
def test_a_dialogue_with_the_rejected_answer_beside_it_is_a_pair(read: Callable[..., Any], row: dict[str, Any]) -> None:
    (pair,), report = read(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (YES,), (NO,))
    assert "'rejected' read as rejected_response" in report.shape


@pytest.mark.parametrize("row", [
    {"instances": [{"prompt": "Hi", "chosen": "yes", "rejected": "no"}]},
    {"row_idx": 0, "row": {"prompt": "Hi", "chosen": "yes", "rejected": "no"}, "truncated_cells": []},
    {"result": {"page": {"items": [{"prompt": "Hi", "chosen": "yes", "rejected": "no"}]}}},
])  # fmt: skip
def test_rows_that_lie_deeper_are_told_so(read: Callable[..., Any], row: dict[str, Any]) -> None:
    inner = "row" if "row" in row else next(iter(row))
    with pytest.raises(DataError, match=f"the rows lie deeper, in '{inner}': write the objects there as the rows"):
        read(row)


def test_two_answers_of_unknown_names_are_two_answers(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"not clear.*\n.*\{prompt: prompt, chosen: <column>, rejected: <column>\}"):
        read({"prompt": "a", "model_output": "b", "gold": "c"})


def test_a_dialogue_that_ends_with_a_question_has_no_answer_beside_the_rejected_one(read: Callable[..., Any]) -> None:
    row = {"messages": [USER], "good_reply": "yes", "rejected": "no"}
    with pytest.raises(DataError, match=r"\{columns: \{prompt: messages, chosen: good_reply, rejected: rejected\}\}"):
        read(row)
    (pair,), _ = read(row, columns={"prompt": "messages", "chosen": "good_reply", "rejected": "rejected"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (YES,), (NO,))

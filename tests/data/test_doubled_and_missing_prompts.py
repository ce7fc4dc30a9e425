"""What the prompt has is said once, and a row whose prompt is missing, or stands elsewhere, is no pair."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths_to_pairs import load_pairs, prepare_pairs

from pe_dpo.errors import DataError

ASKED = {"role": "user", "content": "Next?"}
EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
ANSWERS = {"chosen": "yes", "rejected": "no"}


@pytest.fixture
def read(write_lines: Callable[..., Path]) -> Callable[..., Any]:
    """Return the pairs of some rows and the report."""
    return lambda *rows, **settings: load_pairs(write_lines(*rows), **settings)


@pytest.fixture
def refusal(read: Callable[..., Any]) -> Callable[..., str]:
    """Return the message with which some rows are refused."""

    def refuse(*rows: Any, **settings: Any) -> str:
        with pytest.raises(DataError) as error:
            read(*rows, **settings)
        return str(error.value)

    return refuse


def decoded(path: Path, tokenizer: Any) -> tuple[str, str, str]:
    """Return the only pair of a file as the texts of its token ids."""
    (pair,) = prepare_pairs(path, tokenizer=tokenizer, max_length=400, eval=0.0).train
    prompt, chosen, rejected = (tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return prompt, chosen, rejected


@pytest.mark.parametrize("history", [
    [["a", "b"], ["Next?", None]],
    [["a", "b"], ["Next?", ""]],
    [["a", "b"], ["Next? ", ""]],
    [*EARLIER, ASKED],
    "\n\nHuman: a\n\nAssistant: b\n\nHuman: Next?",
], ids=["null", "empty answer", "space", "messages", "transcript"])  # fmt: skip
@pytest.mark.parametrize("prompt", ["Next?", [ASKED]], ids=["text", "messages"])
def test_a_history_that_ends_with_the_question_says_it_once(read: Callable[..., Any], history: Any, prompt: Any) -> None:
    if isinstance(history, str):
        history += "\n\nAssistant:"
    (pair,), _ = read({"history": history, "prompt": prompt, **ANSWERS})
    assert [turn["content"] for turn in pair.prompt] == ["a", "b", "Next?"]


def test_a_history_that_ends_with_another_question_stays_as_it_is(read: Callable[..., Any]) -> None:
    (pair,), _ = read({"history": [["a", "b"], ["Who?", ""]], "prompt": "Next?", **ANSWERS})
    assert [turn["content"] for turn in pair.prompt] == ["a", "b", "Who?", "", "Next?"]


@pytest.mark.parametrize(("prompt", "found"), [
    ("", "column 'prompt' is blank; write the prompt, or take the row out"),
    (" \n", "column 'prompt' is blank"),
    ("nan", "column 'prompt' is the text 'nan', which stands where a value was missing"),
    ([{"role": "user", "content": ""}], "the last user turn in column 'prompt' is blank"),
    ([*EARLIER, {"role": "user", "content": "nan"}], "the last user turn in column 'prompt' is the text 'nan'"),
    ("\n\nHuman: \n\nAssistant:", "the last user turn in column 'prompt' is blank"),
])  # fmt: skip
def test_a_missing_prompt_is_no_prompt(refusal: Callable[..., str], prompt: Any, found: str) -> None:
    assert found in refusal({"prompt": prompt, **ANSWERS})


def test_rows_without_a_prompt_are_left_out_where_that_is_asked_for(read: Callable[..., Any]) -> None:
    pairs, report = read({"prompt": "Hi", **ANSWERS}, {"prompt": " ", **ANSWERS}, bad_rows="drop")
    assert [pair.prompt for pair in pairs] == ["Hi"]
    assert [len(rows) for rows in report.dropped.values()] == [1]


@pytest.mark.parametrize(("row", "columns"), [
    ({"prompt": None, "chosen": "It is 4", "rejected": "It is 5"}, None),
    ({"prompt": None, "question": "Hi", "chosen": "It is 4", "rejected": "It is 5"}, {"prompt": "question"}),
    ({"instruction": None, "input": "Hi", "chosen": "4", "rejected": "5"}, {"prompt": "input"}),
])  # fmt: skip
def test_a_prompt_that_is_null_is_never_what_the_answers_share(
    read: Callable[..., Any], refusal: Callable[..., str], row: dict[str, Any], columns: dict[str, str] | None
) -> None:
    message = refusal(row, row)
    assert f"column '{next(iter(row))}' is null, where the prompt is expected" in message
    if columns:
        assert f"data: {{columns: {{prompt: {columns['prompt']}}}}}" in message
        (pair, _), _ = read(row, row, columns=columns)
        assert (pair.prompt, pair.chosen, pair.rejected) == ("Hi", row["chosen"], row["rejected"])


def test_whole_dialogues_beside_a_null_prompt_bring_their_own(read: Callable[..., Any]) -> None:
    (pair,), _ = read({"prompt": None, "chosen": [ASKED, YES], "rejected": [ASKED, NO]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASKED,), (YES,), (NO,))


@pytest.mark.parametrize("given", ["None", "null", "  ", "NaN", "", None])
@pytest.mark.parametrize("name", ["instruction", "prompt"])
def test_an_input_that_is_missing_adds_nothing(read: Callable[..., Any], name: str, given: str | None) -> None:
    (pair,), _ = read({name: "Do it", "input": given, **ANSWERS})
    assert pair.prompt == "Do it"


@pytest.mark.parametrize("row", [
    {"question": "Where?", "context": "Paris is in France.", "chosen": "Paris is in France. Yes", "rejected": "no"},
    {"question": "15 or 50?", "context": "5", **ANSWERS},
    {"question": "Which dogs?", "context": "dog", **ANSWERS},
])  # fmt: skip
def test_a_context_that_stands_in_an_answer_or_inside_a_word_was_not_read(
    refusal: Callable[..., str], row: dict[str, Any]
) -> None:
    assert "column 'context' has content, was not read and belongs to the prompt" in refusal(row)


@pytest.mark.parametrize("row", [
    {"question": "Paris is\nin France. Where?", "context": "Paris is in France.", **ANSWERS},
    {"question": "他五岁了吗?", "context": "五岁", **ANSWERS},
    {"prompt": "Hi", "initial_reason_steps": "Step 1:", "chosen": "Step 1: a", "rejected": "Step 1: b"},
])  # fmt: skip
def test_a_context_of_which_the_prompt_is_made_was_read(read: Callable[..., Any], row: dict[str, Any]) -> None:
    (pair,), _ = read(row)
    assert pair.prompt == row.get("question", "Hi")


def test_a_transcript_whose_answer_ends_with_a_human_turn_is_malformed(refusal: Callable[..., str]) -> None:
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " yes\n\nHuman: thanks", "rejected": " no"}
    assert "the answer in column 'chosen' ends with a Human turn; an Assistant turn is expected" in refusal(row)


def test_answers_that_share_words_alone_want_a_prompt_under_a_chat_template(
    write_lines: Callable[..., Path], tokenizer: Any, chat_tokenizer: Any
) -> None:
    path = write_lines({"chosen": "I think so", "rejected": "I do not"})
    assert decoded(path, tokenizer) == ("I", " think so<e>", " do not<e>")
    with pytest.raises(DataError, match=r"share their first words alone.*add column 'prompt'"):
        decoded(path, chat_tokenizer)
    path = write_lines({"chosen": "What?\nyes", "rejected": "What?\nno"})
    assert decoded(path, chat_tokenizer)[1:] == ("yes<|im_end|>", "no<|im_end|>")


def test_answers_behind_the_prompt_that_they_repeat_begin_without_the_space(
    write_lines: Callable[..., Path], tokenizer: Any, chat_tokenizer: Any
) -> None:
    path = write_lines({"prompt": "2+2?", "chosen": "2+2? 4", "rejected": "2+2? 5"})
    assert decoded(path, tokenizer) == ("2+2?", " 4<e>", " 5<e>")
    assert decoded(path, chat_tokenizer)[1:] == ("4<|im_end|>", "5<|im_end|>")
    path = write_lines({"prompt": "2+2?", "system": "Add.", "chosen": "2+2? 4", "rejected": "2+2? 5"})
    assert decoded(path, chat_tokenizer)[1:] == ("4<|im_end|>", "5<|im_end|>")


def test_prompts_as_keys_of_json_are_the_prompts(tmp_path: Path) -> None:
    document = {"What is 2+2?": {"chosen": "It is 4", "rejected": "It is 5"}, "Why": {"chosen": "So", "rejected": "No"}}
    (tmp_path / "x.json").write_text(json.dumps(document))
    pairs, _ = load_pairs(tmp_path / "x.json")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        ("What is 2+2?", "It is 4", "It is 5"), ("Why", "So", "No")
    ]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt"), [
    ({"question": "Hi", **ANSWERS}, "Hi"),
    ({"chosen": [ASKED, YES], "rejected": [ASKED, NO]}, (ASKED,)),
    ({"chosen": "### Instruction: a\n### Response: b", "rejected": "### Instruction: a\n### Response: c"},
     "### Instruction: a\n### Response:"),
])  # fmt: skip
def test_keys_of_rows_that_bring_their_prompt_are_ids(tmp_path: Path, row: dict[str, Any], prompt: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"first": row, "second": row}))
    pairs, _ = load_pairs(tmp_path / "x.json")
    assert [pair.prompt for pair in pairs] == [prompt] * 2


def test_keys_beside_another_text_are_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"item one": {"problem": "What is it?", **ANSWERS}}))
    with pytest.raises(DataError, match=r"data: \{columns: \{prompt: problem, "):
        load_pairs(tmp_path / "x.json")


def test_keys_of_json_of_which_some_look_like_ids_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"What?": ANSWERS, "row_17": ANSWERS}))
    with pytest.raises(DataError, match="'row_17' looks like the id of a row; write the rows as a list, each"):
        load_pairs(tmp_path / "x.json")


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), [
    ("Hi", "Hi there", "Hi. Go away"),
    ("Hi", "Hi there", "Hi you"),
    ("Yes", "Yesterday I", "Yes no"),
    ("Say it", "Say its name", "Say it now"),
])  # fmt: skip
def test_answers_that_begin_with_the_word_of_a_prompt_are_not_cut(
    read: Callable[..., Any], prompt: str, chosen: str, rejected: str
) -> None:
    (pair,), _ = read({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)


def test_whole_transcripts_beside_the_question_that_they_ask_have_it_once(read: Callable[..., Any]) -> None:
    asked = "\n\nHuman: a\n\nAssistant: b\n\nHuman: Hi you\n\nAssistant:"
    (pair,), _ = read({"prompt": "Hi you", "chosen": f"{asked} yes", "rejected": f"{asked} no"})
    assert (pair.prompt, pair.chosen, pair.rejected) == (asked, " yes", " no")
    row = {"prompt": "Write a scene.", "chosen": f"{asked} yes", "rejected": "Human: b\n\nAssistant: c"}
    (pair,), _ = read(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], row["chosen"], row["rejected"])


@pytest.mark.parametrize(("prompt", "begun", "space"), [("2 + 2?\n", "2 + 2? ", ""), ("\n2 + 2?", "2 + 2? ", " ")])
def test_a_repeated_prompt_is_found_without_the_white_space_around_it(
    read: Callable[..., Any], prompt: str, begun: str, space: str
) -> None:
    (pair,), _ = read({"prompt": prompt, "chosen": f"{begun}4", "rejected": f"{begun}5"})
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, f"{space}4", f"{space}5")


def test_answers_that_repeat_the_last_message_are_noted(read: Callable[..., Any]) -> None:
    _, report = read({"prompt": [{"role": "user", "content": "2 + 2?"}], "chosen": "2 + 2? 4", "rejected": "2 + 2? 5"})
    assert report.noted == {"answers that begin with the whole prompt": ["train.jsonl:1"]}


def test_one_row_that_does_not_repeat_its_prompt_changes_nothing_for_the_others(read: Callable[..., Any]) -> None:
    rows = [{"prompt": asked, "chosen": f"{asked} yes", "rejected": f"{asked} no"} for asked in ("Is it?", "Was it?")]
    pairs, _ = read({"prompt": "Who?", **ANSWERS}, *rows)
    assert [(pair.prompt, pair.chosen) for pair in pairs] == [("Who?", "yes"), ("Is it?", " yes"), ("Was it?", " yes")]


def test_single_words_that_answers_repeat_in_several_rows_are_their_prompts(read: Callable[..., Any]) -> None:
    rows = [{"prompt": asked, "chosen": f"{asked} yes", "rejected": f"{asked} no"} for asked in ("one", "two", "三")]
    pairs, _ = read(*rows)
    assert [(pair.prompt, pair.chosen) for pair in pairs] == [("one", " yes"), ("two", " yes"), ("三", " yes")]


@pytest.mark.parametrize(("history", "prompt"), [
    ([["a ", " b"]], [*EARLIER, ASKED]),
    ([["x", "y"], ["a", "b"]], [*EARLIER, ASKED]),
])  # fmt: skip
def test_exchanges_that_history_and_prompt_both_have_are_said_once(read: Callable[..., Any], history: Any, prompt: Any) -> None:
    (pair,), _ = read({"history": history, "prompt": prompt, **ANSWERS})
    assert [turn["content"] for turn in pair.prompt] == [*(["x", "y"] if len(history) > 1 else []), "a", "b", "Next?"]


def test_an_input_alone_is_the_prompt_but_not_that_of_a_missing_instruction(
    read: Callable[..., Any], refusal: Callable[..., str]
) -> None:
    pairs, _ = read(*({"instruction": asked, "input": "Hi", **ANSWERS} for asked in ("", "  ")))
    assert [pair.prompt for pair in pairs] == ["Hi", "Hi"]
    found = refusal({"instruction": "nan", "input": "Hi", **ANSWERS})
    assert "column 'instruction' is the text 'nan', which stands where a value was missing" in found


def test_answers_that_repeat_the_instruction_without_its_input_lose_it_too(write_lines: Callable[..., Path]) -> None:
    said = [f"Name a colour, number {number}." for number in range(4)]
    rows = [{"instruction": one, "input": "of a sea", "chosen": f"{one} Blue", "rejected": f"{one} Red"} for one in said]
    pairs, report = load_pairs(write_lines(*rows))
    assert "the answers repeat the prompt, which is left out of them" in report.shape
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (f"{one}\n\nof a sea", " Blue", " Red") for one in said
    ]

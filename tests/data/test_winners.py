"""Which of two answers won, from a column that says it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths_to_pairs import load_pairs

from pe_dpo.errors import DataError

USER = {"role": "user", "content": "Hi"}


def map_in(message: str, number: int = 0) -> dict[str, str]:
    """The column map that an error prints."""
    lines = [line for line in message.splitlines() if line.startswith("data: ")]
    return yaml.safe_load(lines[number])["data"]["columns"]


@pytest.fixture
def read(write_lines: Callable[..., Path]) -> Callable[..., list[tuple[str, str]]]:
    """Return chosen and rejected of some rows, in each of which the column X has one of the values."""

    def read_values(names: tuple[str, str], winner: str, *values: Any, said: str | None = None) -> list[tuple[str, str]]:
        one, other = names
        rows = [{"prompt": "Hi", one: f"A{n}", other: f"B{n}", winner: value} for n, value in enumerate(values)]
        columns = {"chosen": one, "rejected": other, "winner": said or winner}
        return [(pair.chosen, pair.rejected) for pair in load_pairs(write_lines(*rows), columns=columns)[0]]

    return read_values


@pytest.mark.parametrize(("names", "winner", "values"), [
    (("response_0", "response_1"), "better_response_id", (0, 1)),
    (("response_0", "response_1"), "safer", ("response_0", "response_1")),
    (("response_1", "response_2"), "better", (1, 2)),
    (("response_1", "response_2"), "better", (1.0, 2.0)),
    (("one", "two"), "best_idx", (0, 1)),
    (("one", "two"), "w", (1, 2)),
    (("one", "two"), "w", ("a", "B")),
    (("one", "two"), "w", ("chosen", "rejected")),
    (("human_ref_A", "human_ref_B"), "w", ("A", "B")),
    (("answer_a", "answer_b"), "winner", ("model_a", "model_b")),
    (("answer_b", "answer_a"), "winner", ("b", "a")),
    (("response1", "response2"), "overall_preference", (-2, 1)),
    (("response_1", "response_2"), "preference_strength", (-1, 3)),
    (("answer_a", "answer_b"), "winner", ("A>B", "B>A")),
    (("answer_a", "answer_b"), "winner", ("[[A>>B]]", "[[B > A]]")),
    (("answer_b", "answer_a"), "winner", ("B>A", "A>B")),
    (("answer_a", "answer_b"), "winner", ("[[A]]", "[[B]]")),
    (("answer_a", "answer_b"), "winner", ("A is better than B", "A is much worse than B")),
    (("answer_a", "answer_b"), "winner", ("A over B", "B over A")),
    (("answer_a", "answer_b"), "winner", ("Assistant A", "Option (B)")),
    (("response_1", "response_2"), "preference",
     ("Response 1 is slightly better than Response 2", "Response 2 is better than Response 1")),
    (("response_1", "response_2"), "w", ("response_1 > response_2", "response_1 < response_2")),
    (("response_1", "response_2"), "w", ("1 > 2", "2 > 1")),
    (("human_ref_A", "human_ref_B"), "w", ("human ref A", "human-ref-B")),
])  # fmt: skip
def test_a_column_whose_values_are_plain_says_which_answer_won(
    read: Callable[..., list[tuple[str, str]]], names: tuple[str, str], winner: str, values: tuple[Any, Any]
) -> None:
    assert read(names, winner, *values) == [("A0", "B0"), ("B1", "A1")]


@pytest.mark.parametrize(("said", "values"), [
    ("w = 1", (1, 0)), ("w == 1", ("1", "0")), ("w != 1", (0, 1)), ("w < 0", (-1, 1)), ("w > 0.5", (0.9, 0.1)),
    ("w >= 2", (2, 1)),
    ("w = true", (True, False)), ("w = yes", ("Yes", "no")), ("w = 'left'", ("left", "right")), ("w<=3", (3, 4)),
])  # fmt: skip
def test_a_comparison_says_where_the_answer_mapped_as_chosen_won(
    read: Callable[..., list[tuple[str, str]]], said: str, values: tuple[Any, Any]
) -> None:
    assert read(("one", "two"), "w", *values, said=said) == [("A0", "B0"), ("B1", "A1")]


def test_ties_are_dropped_and_counted(write_lines: Callable[..., Path]) -> None:
    rows = [{"prompt": "Hi", "a": "x", "b": "y", "w": value} for value in (-1, 0, 2)]
    columns = {"chosen": "a", "rejected": "b", "winner": "w < 0"}
    pairs, report = load_pairs(write_lines(*rows), columns=columns)
    assert [(pair.where, pair.chosen) for pair in pairs] == [("train.jsonl:1", "x"), ("train.jsonl:3", "y")]
    assert report.dropped["no winner"] == ["train.jsonl:2"]


def test_words_for_a_tie_are_no_winner(read: Callable[..., list[tuple[str, str]]]) -> None:
    values = ("model_a", "tie", "tie (bothbad)", "model_b")
    assert read(("answer_a", "answer_b"), "winner", *values) == [("A0", "B0"), ("B3", "A3")]
    assert read(("one", "two"), "w", "x", "tie", "y", said="w = x") == [("A0", "B0"), ("B2", "A2")]


def test_answers_that_are_said_to_be_equal_have_no_winner(read: Callable[..., list[tuple[str, str]]]) -> None:
    assert read(("answer_a", "answer_b"), "winner", "A>B", "A=B", "[[A ~ B]]", "B>>A") == [("A0", "B0"), ("B3", "A3")]
    ties = ("tied", "both_bad", "the same", "A tie", "no preference", "none")
    assert read(("answer_a", "answer_b"), "winner", "A", *ties, "B") == [("A0", "B0"), ("B7", "A7")]


@pytest.mark.parametrize(("values", "shown"), [
    (("not B", "not A"), "not a, not b"), (("B", "not A"), "b, not a"), (("A > B > C", "B"), "a > b > c, b"),
    (("A is hardly better than B", "B"), "a is hardly better than b, b"), (("gpt-b", "claude-a"), "claude-a, gpt-b"),
])  # fmt: skip
def test_a_value_that_only_ends_with_an_answer_does_not_name_it(
    read: Callable[..., list[tuple[str, str]]], values: tuple[str, ...], shown: str
) -> None:
    with pytest.raises(DataError, match=rf"column 'winner' has {shown}, which does not say by itself"):
        read(("answer_a", "answer_b"), "winner", *values)


def test_a_later_value_that_only_ends_with_an_answer_is_an_error(read: Callable[..., list[tuple[str, str]]]) -> None:
    with pytest.raises(
        DataError, match=r"train\.jsonl:31: column 'winner' is 'not B'; one of answer_a, answer_b|a, b is expected"
    ):
        read(("answer_a", "answer_b"), "winner", *("ab" * 15), "not B")


MODELS = [("llama-2", "mistral-1", "llama-2"), ("mistral-1", "llama-2", "llama-2"), ("m2", "m1", "m1")]


@pytest.mark.parametrize(("answers", "names"), [
    (("response_1", "response_2"), ("model_1", "model_2")), (("answer_a", "answer_b"), ("model_a", "model_b")),
    (("response_a", "response_b"), ("response_a_model", "response_b_model")),
    (("output1", "output2"), ("generator1", "generator2")),
])  # fmt: skip
def test_a_winner_called_as_its_model_is_the_answer_of_that_model(
    write_lines: Callable[..., Path], answers: tuple[str, str], names: tuple[str, str]
) -> None:
    rows = [
        {"prompt": "Hi", answers[0]: f"A{n}", answers[1]: f"B{n}", names[0]: one, names[1]: other, "winner": winner}
        for n, (one, other, winner) in enumerate([*MODELS, ("x", "y", "tie")])
    ]
    with pytest.raises(DataError, match="'winner' seems to say which of") as raised:
        load_pairs(write_lines(*rows))
    pairs, report = load_pairs(write_lines(*rows), columns=map_in(str(raised.value)))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("A0", "B0"), ("B1", "A1"), ("B2", "A2")]
    assert report.dropped["no winner"] == ["train.jsonl:4"]
    assert f"the chosen answer is the one whose {names[0]} or {names[1]} winner names" in report.shape


def test_a_winner_that_both_or_none_of_the_models_is_called_is_malformed(write_lines: Callable[..., Path]) -> None:
    row = {"prompt": "Hi", "r_1": "A", "r_2": "B", "model_1": "phi", "model_2": "yi", "w": "yi"}
    for model, winner in (("yi", "yi"), ("zephyr", "phi")):
        path = write_lines(*[row] * 20, {**row, "model_1": model, "w": winner})
        with pytest.raises(
            DataError, match=r"train\.jsonl:21: column 'w' is '(yi|phi)'; what one of model_1 and model_2 has, and"
        ):
            load_pairs(path, columns={"chosen": "r_1", "rejected": "r_2", "winner": "w"})


def test_numbers_and_letters_are_no_names_of_models(write_lines: Callable[..., Path]) -> None:
    row = {"prompt": "Hi", "r_1": "A", "r_2": "B", "source_1": "2", "source_2": "1", "w": 2}
    columns = {"chosen": "r_1", "rejected": "r_2", "winner": "w"}
    assert load_pairs(write_lines(row), columns=columns)[0][0].chosen == "B"
    assert load_pairs(write_lines({**row, "source_1": "b", "w": "b"}), columns=columns)[0][0].chosen == "B"


def test_a_winner_that_names_the_place_of_its_model_goes_by_the_place(write_lines: Callable[..., Path]) -> None:
    row = {"prompt": "Hi", "answer_a": "A", "answer_b": "B", "model_a": "llama-2", "model_b": "gpt-1", "winner": "model_b"}
    columns = {"chosen": "answer_a", "rejected": "answer_b", "winner": "winner"}
    assert load_pairs(write_lines(row), columns=columns)[0][0].chosen == "B"


@pytest.mark.parametrize("values", [("1 > 3", "3 > 1"), ("[[x>y]]", "[[y>x]]"), ("x=y", "x!=y"), ("it's x", "y")])
def test_the_ways_that_an_error_offers_can_be_followed_to_the_letter(
    write_lines: Callable[..., Path], read: Callable[..., list[tuple[str, str]]], values: tuple[str, str]
) -> None:
    rows = [{"prompt": "Hi", "answer_a": f"A{n}", "answer_b": f"B{n}", "preference": said} for n, said in enumerate(values)]
    with pytest.raises(DataError, match="'preference' seems to say which of") as raised:
        load_pairs(write_lines(*rows))
    maps = [map_in(str(raised.value), number) for number in (0, 1)]
    found = [[pair.chosen for pair in load_pairs(write_lines(*rows), columns=one)[0]] for one in maps]
    assert found == [["A0", "B1"], ["B0", "A1"]]
    with pytest.raises(DataError, match="does not say by itself") as raised:
        read(("answer_a", "answer_b"), "preference", *values)
    ways = [yaml.safe_load(f"{{{way}}}")["winner"] for way in re.findall(r"(winner: [^c].+?) if ", str(raised.value))]
    assert ways == [one["winner"] for one in maps]


def test_a_winner_of_many_values_is_answered_without_a_comparison(write_lines: Callable[..., Path]) -> None:
    rows = [{"prompt": "Hi", "answer_a": "x", "answer_b": "y", "preference": word} for word in ("left", "right", "middle")]
    with pytest.raises(DataError, match="answer_a or answer_b, or tie") as raised:
        load_pairs(write_lines(*rows))
    columns = map_in(str(raised.value))
    assert columns == {"prompt": "prompt", "chosen": "answer_a", "rejected": "answer_b", "winner": "<column>"}
    with pytest.raises(DataError, match="write a column with the name of the better one, or tie"):
        load_pairs(write_lines(*rows), columns={**columns, "winner": "preference"})
    named = [{**row, "better": better} for row, better in zip(rows, ("answer_b", "answer_a", "tie"), strict=True)]
    pairs, _ = load_pairs(write_lines(*named), columns={**columns, "winner": "better"})
    assert [pair.chosen for pair in pairs] == ["y", "x"]


@pytest.mark.parametrize("value", [None, "", float("nan")])
def test_a_row_without_a_winner_is_malformed(write_lines: Callable[..., Path], value: Any) -> None:
    rows = [{"prompt": "Hi", "a": "x", "b": "y", "w": found} for found in ("a", value)]
    columns = {"chosen": "a", "rejected": "b", "winner": "w"}
    with pytest.raises(DataError, match=r"train\.jsonl:2: column 'w' is empty; which of the answers won is expected"):
        load_pairs(write_lines(*rows), columns=columns)
    assert len(load_pairs(write_lines(*rows), columns=columns, bad_rows="drop")[0]) == 1


@pytest.mark.parametrize("values", [(0, 1), (1,), (True, False), ("x", "y"), (-0.5, 0.25), (0.9, 0.1)])
def test_a_column_whose_values_may_mean_either_is_refused_with_both_ways_to_write_it(
    read: Callable[..., list[tuple[str, str]]], values: tuple[Any, ...]
) -> None:
    with pytest.raises(DataError, match=r"data\.columns\.winner: column 'labels' has .* does not say by itself") as raised:
        read(("one", "two"), "labels", *values)
    ways = re.findall(r'winner: "(.*?)"', str(raised.value))
    one, other = (read(("one", "two"), "labels", *values, said=way) for way in ways)
    assert [pair[::-1] for pair in one] == other


def test_a_third_value_is_an_error_and_not_a_defeat(read: Callable[..., list[tuple[str, str]]]) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:3: column 'w' is 2, after 0 and 1; a winner is one of two"):
        read(("one", "two"), "w", 1, 0, 2, said="w = 1")
    with pytest.raises(DataError, match=r"column 'w' is 'c'; one of"):
        read(("x_a", "x_b"), "w", *("ab" * 20), "c")


def test_scores_follow_the_answers_to_which_they_belong(write_lines: Callable[..., Path]) -> None:
    row = {"history": "Hi", "human_ref_A": "x", "human_ref_B": "y", "labels": 0, "score_A": 3, "score_B": 7}
    columns = {"prompt": "history", "chosen": "human_ref_A", "rejected": "human_ref_B", "winner": "labels = 1",
               "chosen_score": "score_A", "rejected_score": "score_B"}  # fmt: skip
    (pair,), report = load_pairs(write_lines(row), columns=columns)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == ("Hi", "y", "x", 4.0)
    assert report.noted == {}
    assert "human_ref_A is the chosen answer where labels = 1, human_ref_B elsewhere" in report.shape


def test_errors_of_a_swapped_row_name_the_column_itself(write_lines: Callable[..., Path]) -> None:
    rows = [{"prompt": "Hi", "a": "x", "b": value, "w": "b"} for value in ("y", None)]
    with pytest.raises(DataError, match=r"train\.jsonl:2: column 'b' is null"):
        load_pairs(write_lines(*rows), columns={"chosen": "a", "rejected": "b", "winner": "w"})


@pytest.mark.parametrize("values", [(1, 2, 3), (1,), (2,)])
def test_positive_strengths_alone_are_the_second_answers(
    read: Callable[..., list[tuple[str, str]]], values: tuple[int, ...]
) -> None:
    for names, winner in (
        (("response1", "response2"), "overall_preference"),
        (("response_1", "response_2"), "preference_strength"),
    ):
        assert read(names, winner, *values) == [(f"B{n}", f"A{n}") for n in range(len(values))]


def test_a_two_alone_is_the_second_answer_and_a_one_alone_may_be_either(read: Callable[..., list[tuple[str, str]]]) -> None:
    assert read(("one", "two"), "w", 2) == [("B0", "A0")]
    with pytest.raises(DataError, match="does not say by itself"):
        read(("one", "two"), "w", 1)


def test_a_column_that_speaks_of_a_winner_is_offered(write_lines: Callable[..., Path]) -> None:
    path = write_lines({"prompt": "Hi", "answer_a": "A", "answer_b": "B", "human vote": "b", "source": "x"})
    with pytest.raises(DataError, match="'human vote' seems to say which of answer_a and answer_b") as raised:
        load_pairs(path)
    assert load_pairs(path, columns=map_in(str(raised.value)))[0][0].chosen == "B"


PUBLISHED = {
    "HelpSteer3": ({"domain": "x", "context": [USER], "response1": "A", "response2": "B", "overall_preference": 2,
                    "individual_preference": [{"score": 2}]}, ("B", "A")),
    "HelpSteer2": ({"prompt": "Hi", "response_1": "A", "response_2": "B", "preference_strength": -1}, ("A", "B")),
    "PKU-SafeRLHF": ({"prompt": "Hi", "response_0": "A", "response_1": "B", "is_response_0_safe": True,
                      "better_response_id": 1, "safer_response_id": 0}, ("B", "A")),
    "arena": ({"question_id": "x", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "j",
               "conversation_a": [USER, {"role": "assistant", "content": "A"}],
               "conversation_b": [USER, {"role": "assistant", "content": "B"}]}, ("B", "A")),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_sets_with_a_winner_are_answered_with_a_map_that_works(
    write_lines: Callable[..., Path], row: dict[str, Any], expected: tuple[str, str]
) -> None:
    path = write_lines(row)
    with pytest.raises(DataError, match="seems to say which of") as raised:
        load_pairs(path)
    assert "<column>" not in str(raised.value)
    (pair,), _ = load_pairs(path, columns=map_in(str(raised.value)))
    answers = [side if isinstance(side, str) else side[-1]["content"] for side in (pair.chosen, pair.rejected)]
    assert (*answers,) == expected
    assert pair.prompt in ("Hi", (USER,))


def test_shp_is_answered_with_both_maps_and_each_does_what_it_says(write_lines: Callable[..., Path]) -> None:
    path = write_lines({"post_id": "x", "history": "Hi", "c_root_id_A": "i", "c_root_id_B": "j", "human_ref_A": "A",
                        "human_ref_B": "B", "labels": 1, "score_A": 3, "score_B": 1})  # fmt: skip
    with pytest.raises(DataError, match="if human_ref_A is the better one there, else") as raised:
        load_pairs(path)
    chosen = [load_pairs(path, columns=map_in(str(raised.value), number))[0][0].chosen for number in (0, 1)]
    assert chosen == ["A", "B"]


def test_a_map_that_forgets_the_winner_is_an_error_with_the_whole_map(write_lines: Callable[..., Path]) -> None:
    path = write_lines({"prompt": "Hi", "response_0": "A", "response_1": "B", "better_response_id": 1})
    columns = {"chosen": "response_0", "rejected": "response_1"}
    with pytest.raises(
        DataError, match=r"'better_response_id' seems to say.*\n.*\n.*data\.ignore: \[better_response_id\]"
    ) as raised:
        load_pairs(path, columns=columns)
    assert map_in(str(raised.value)) == {"prompt": "prompt", **columns, "winner": "better_response_id"}
    assert load_pairs(path, columns=columns, ignore=["better_response_id"])[0][0].chosen == "A"


def test_a_label_beside_answers_that_are_named_is_only_unread(write_lines: Callable[..., Path]) -> None:
    row = {"prompt": "Hi", "answer_chosen": "yes", "answer_rejected": "no", "label": 1}
    (pair,), report = load_pairs(write_lines(row))
    assert (pair.chosen, pair.rejected, report.unread_columns) == ("yes", "no", ["label"])


def test_a_winner_in_a_column_that_is_not_there_is_an_error(read: Callable[..., list[tuple[str, str]]]) -> None:
    with pytest.raises(DataError, match=r"data\.columns\.winner: train\.jsonl has no column 'x'; found one, prompt, two, w"):
        read(("one", "two"), "w", 1, said="x = 1")


@pytest.mark.parametrize(("row", "winner", "values"), [
    ({"prompt": "Hi", "output": ["A", "B"]}, "w", (0, 1)),
    ({"prompt": "Hi", "output": ["A", "B"]}, "w", (1, 2)),
    ({"instruction": "Hi", "output": ["A", "B"]}, "w = left", ("left", "right")),
    ({"messages": [USER, {"role": "assistant", "content": "A"}], "rejected_response": "B"}, "w", ("chosen", "rejected")),
    ({"messages": [USER, {"role": "assistant", "content": "A"}], "rejected": "B"}, "w < 0", (-1, 1)),
    ({"input": {"messages": [USER]}, "preferred_output": [{"role": "assistant", "content": "A"}],
      "non_preferred_output": [{"role": "assistant", "content": "B"}]}, "w", ("preferred_output", "non_preferred_output")),
], ids=["0 and 1", "1 and 2", "a comparison", "rejected_response", "rejected beside messages", "OpenAI"])  # fmt: skip
def test_a_winner_counts_wherever_the_answers_stand(
    write_lines: Callable[..., Path], row: dict[str, Any], winner: str, values: tuple[Any, Any]
) -> None:
    pairs, report = load_pairs(write_lines(*({**row, "w": value} for value in values)), columns={"winner": winner})
    assert not re.search(r"first of them chosen|turn is chosen", report.shape)
    texts = [[side if isinstance(side, str) else side[0]["content"] for side in (one.chosen, one.rejected)] for one in pairs]
    assert texts == [["A", "B"], ["B", "A"]]


def test_a_winner_of_two_answers_in_one_column_is_asked_for(write_lines: Callable[..., Path]) -> None:
    path = write_lines({"instruction": "Hi", "output": ["A", "B"], "preference": "second"})
    with pytest.raises(DataError) as error:
        load_pairs(path)
    assert str(error.value) == (
        "train.jsonl: the columns are instruction, output, preference; 'preference' seems to say which of output[0] and "
        "output[1] is the better one. Say it in the recipe:\ndata: {columns: {winner: preference}}\n"
        "(or, if it says something else, data.ignore: [preference])"
    )
    assert load_pairs(path, columns=map_in(str(error.value)))[0][0].chosen == "B"
    assert load_pairs(path, ignore=["preference"])[0][0].chosen == "A"


@pytest.mark.parametrize(("names", "winner", "values"), [
    (("response2", "response1"), "overall_preference", (-2, 1)),
    (("answer_b", "answer_a"), "w", (1, 2)),
    (("answer_b", "answer_a"), "w", ("first", "second")),
    (("answer_2", "answer_1"), "w", ("a", "b")),
    (("answer_b", "answer_a"), "best_idx", (0, 1)),
])  # fmt: skip
def test_which_answer_is_the_first_is_not_plain_where_they_are_mapped_in_reverse(
    read: Callable[..., list[tuple[str, str]]], names: tuple[str, str], winner: str, values: tuple[Any, Any]
) -> None:
    with pytest.raises(DataError, match=f"does not say by itself whether {names[0]} or {names[1]} won; write winner: "):
        read(names, winner, *values)


@pytest.mark.parametrize(("said", "values"), [("w = 1", (True, False)), ("w = true", (1, 0)), ("w != 1", (False, True))])
def test_true_is_1_in_a_comparison(read: Callable[..., list[tuple[str, str]]], said: str, values: tuple[Any, Any]) -> None:
    assert read(("a", "b"), "w", *values, said=said) == [("A0", "B0"), ("B1", "A1")]


def test_a_winner_without_a_name_is_an_error(write_lines: Callable[..., Path]) -> None:
    with pytest.raises(
        DataError, match=r"data\.columns\.winner: train\.jsonl has no column ''; found chosen, prompt, rejected"
    ):
        load_pairs(write_lines({"prompt": "Hi", "chosen": "A", "rejected": "B"}), columns={"winner": ""})


def test_answers_of_two_kinds_may_both_win(write_lines: Callable[..., Path]) -> None:
    rows = [{"prompt": "Hi", "a": "A", "b": ["B"], "w": winner} for winner in ("a", "b")]
    pairs, _ = load_pairs(write_lines(*rows), columns={"chosen": "a", "rejected": "b", "winner": "w"})
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("A", "B"), ("B", "A")]

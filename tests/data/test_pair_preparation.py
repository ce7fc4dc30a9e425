"""Both sides of a run: what is held out, what is counted, what the report says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths_to_pairs import prepare_pairs

import pe_dpo.data
from pe_dpo.data import EncodedPair, split_by_prompt
from pe_dpo.data.pairs import prompt_key
from pe_dpo.errors import DataError
from pe_dpo.recipe import DataSection

IDS = np.array([1], dtype=np.int32)


def row(prompt: str, chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def pair_of(prompt: str, number: int) -> EncodedPair:
    return EncodedPair(IDS, IDS, IDS, 0.0, f"x:{number}", prompt_key(prompt))


@given(prompts=st.lists(st.sampled_from("abcdefghij"), max_size=40), share=st.floats(0, 0.9))
@settings(max_examples=200, deadline=None)
def test_no_prompt_is_on_both_sides_and_no_pair_is_lost(prompts: list[str], share: float) -> None:
    pairs = [pair_of(prompt, number) for number, prompt in enumerate(prompts)]
    train, held_out = split_by_prompt(pairs, share)
    assert not {pair.prompt_key for pair in train} & {pair.prompt_key for pair in held_out}
    assert sorted(pair.where for pair in train + held_out) == sorted(pair.where for pair in pairs)
    assert bool(train) == bool(pairs)


@given(prompts=st.lists(st.sampled_from("abcdefghij"), max_size=40), data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_split_does_not_depend_on_the_order_of_rows(prompts: list[str], data: st.DataObject) -> None:
    pairs = [pair_of(prompt, number) for number, prompt in enumerate(prompts)]
    shuffled = data.draw(st.permutations(pairs))
    one, other = split_by_prompt(pairs, 0.3), split_by_prompt(shuffled, 0.3)
    assert {pair.where for pair in one[1]} == {pair.where for pair in other[1]}


def test_the_share_of_pairs_is_reached_and_passed_by_less_than_one_prompt() -> None:
    pairs = [pair_of(str(number // 2), number) for number in range(200)]
    assert len(split_by_prompt(pairs, 0.05)[1]) == 10
    assert len(split_by_prompt(pairs, 0.052)[1]) == 12


def test_a_twentieth_is_held_out_when_the_data_brings_nothing(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    data = prepare_pairs(write_lines(*(row(f"p{n}") for n in range(100))), tokenizer=tokenizer, max_length=99)
    assert (len(data.train), len(data.held_out)) == (95, 5)
    assert data.report.held_out_from == "5.0% of the pairs, split by prompt"


def test_zero_holds_nothing_out(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    data = prepare_pairs(write_lines(row("a"), row("b")), tokenizer=tokenizer, max_length=99, eval=0)
    assert (len(data.train), len(data.held_out), data.report.held_out_from) == (2, 0, "none")


@pytest.mark.parametrize("held_out", [None, "own"])
def test_held_out_rows_whose_prompt_is_in_training_are_left_out_and_counted(
    write_lines: Callable[..., Path], tokenizer: Any, held_out: str | None
) -> None:
    folder = write_lines(row("a"), row("b")).parent
    own = write_lines(row("b", "other"), row("c"), name="test.jsonl")
    data = prepare_pairs(
        folder if held_out is None else folder / "train.jsonl",
        tokenizer=tokenizer, max_length=99, eval=None if held_out is None else str(own),
    )  # fmt: skip
    assert [pair.where for pair in data.held_out] == ["test.jsonl:2"]
    assert data.report.dropped["held-out row whose prompt is in training"] == ["test.jsonl:1"]
    assert data.report.files == {"train.jsonl": 2, "test.jsonl": 2}


def test_a_share_asked_for_leaves_the_held_out_file_of_a_folder_unused(
    write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    write_lines(row("c"), name="test.jsonl")
    folder = write_lines(row("a"), row("b")).parent
    data = prepare_pairs(folder, tokenizer=tokenizer, max_length=99, eval=0.5)
    assert {pair.where for pair in data.train + data.held_out} == {"train.jsonl:1", "train.jsonl:2"}
    assert data.report.unused_files == ["test.jsonl"]


def test_one_prompt_alone_is_trained_on_and_remarked(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    data = prepare_pairs(write_lines(row("a"), row("a", "x")), tokenizer=tokenizer, max_length=99)
    assert (len(data.train), len(data.held_out)) == (2, 0)
    assert "no pair is held out: all pairs have one prompt" in data.report.remarks[0]


def test_nothing_left_is_an_error_with_the_counts(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    path = write_lines(row("a" * 50), row("b", "x", "x"), row("c", " "))
    with pytest.raises(DataError) as raised:
        prepare_pairs(path, tokenizer=tokenizer, max_length=9)
    assert "no pair is left of 3 rows: 1 empty answer, 1 identical answers, 1 longer than max_length" in str(raised.value)
    assert "raise data.max_length (9)" in str(raised.value)


def test_duplicates_contradictions_and_prefixes_are_noted_and_used(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    rows = row("a"), row("a"), row("a", "no", "yes"), row("b", "yes", "yes, sir"), row("b", "no", "yes")
    data = prepare_pairs(write_lines(*rows), tokenizer=tokenizer, max_length=99, eval=0)
    assert data.report.noted == {
        "exact duplicate": ["train.jsonl:2"],
        "contradicts an earlier pair (a over b, b over a)": ["train.jsonl:3"],
        "one answer is the beginning of the other": ["train.jsonl:4"],
    }
    assert len(data.train) == 5


def test_a_limit_reads_the_first_rows(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    data = prepare_pairs(write_lines(*(row(f"p{n}") for n in range(50))), tokenizer=tokenizer, max_length=99,
                         eval=0, limit=30)  # fmt: skip
    assert [pair.where for pair in data.train] == [f"train.jsonl:{n}" for n in range(1, 31)]
    assert data.report.rows_read == 30


@pytest.mark.parametrize(("limit", "files"), [
    (1, {"train-0.jsonl": 1}), (2, {"train-0.jsonl": 2}), (3, {"train-0.jsonl": 2, "train-1.jsonl": 1}),
])  # fmt: skip
def test_a_limit_counts_over_all_files_and_opens_none_behind_it(
    write_lines: Callable[..., Path], tokenizer: Any, limit: int, files: dict[str, int]
) -> None:
    write_lines(row("a"), row("b"), name="train-0.jsonl")
    folder = write_lines(row("c"), row("d"), name="train-1.jsonl").parent
    data = prepare_pairs(folder, tokenizer=tokenizer, max_length=99, eval=0, limit=limit)
    assert (data.report.files, len(data.train)) == (files, limit)


@pytest.mark.parametrize(
    ("asked", "context", "fits"), [(None, None, 2048), (None, 100, 100), (50, 100, 50), (5000, None, 5000)]
)
def test_pairs_may_be_as_long_as_asked_for_or_as_the_context(
    write_lines: Callable[..., Path], tokenizer: Any, asked: int | None, context: int | None, fits: int
) -> None:
    path = write_lines(row("a" * (fits - 4)), row("b" * (fits - 3)))  # an answer and its end token have four tokens
    settings = DataSection(train=str(path), max_length=asked, eval=0)
    data = pe_dpo.data.prepare_pairs(settings, tokenizer=tokenizer, context_length=context)
    assert [pair.where for pair in data.train] == ["train.jsonl:1"]


def test_longer_pairs_than_the_context_are_refused(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    settings = DataSection(train=str(write_lines(row("a"))), max_length=101)
    with pytest.raises(DataError, match=r"data\.max_length: 101 tokens, but the model's context is 100; lower it"):
        pe_dpo.data.prepare_pairs(settings, tokenizer=tokenizer, context_length=100)


def test_the_report_measures_lengths_by_hand(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    rows = row("ab", "c", "defg"), row("abcd", "cde", "f"), row("abc", "x", "y")  # EOS counts: 2+5, 4+4, 3+2 tokens
    report = prepare_pairs(write_lines(*rows), tokenizer=tokenizer, max_length=99, eval=0).report
    assert report.tokens["pair"] == {"min": 5, "5%": 5, "50%": 7, "95%": 7, "max": 8}
    assert report.tokens["prompt"]["50%"] == 3
    assert report.chosen_longer == 0.5  # shorter, longer, equal


def test_the_report_is_json_and_names_at_most_twenty_rows(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    path = write_lines(*(row(f"p{n}", "") for n in range(30)), row("a"))
    report = prepare_pairs(path, tokenizer=tokenizer, max_length=99).report
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["rows_read"] == 31
    assert saved["dropped"]["empty answer"]["count"] == 30
    assert len(saved["dropped"]["empty answer"]["rows"]) == 20


def test_the_lines_for_people_tell_the_story_in_short(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    path = write_lines(row("ab", ""), row("ab"), row("ab"))
    assert prepare_pairs(path, tokenizer=tokenizer, max_length=99, eval=0).report.lines() == [
        "read 3 rows: train.jsonl (3)",
        "understood as prompt (text), chosen and rejected (text)",
        "written with plain text without a BOS token",
        "2 pairs to train on, 0 held out (none)",
        "median tokens: prompt 2, chosen 4, rejected 3; longest pair 6; chosen longer in 100% of pairs",
        "left out: 1 empty answer (train.jsonl:1)",
        "used, but look at: 1 exact duplicate (train.jsonl:3)",
    ]


def test_margins_reach_the_encoded_pairs_and_are_zero_without(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    path = write_lines({**row("a"), "margin": 2}, {**row("b"), "margin": None})
    train = prepare_pairs(path, tokenizer=tokenizer, max_length=99, eval=0).train
    assert [pair.margin for pair in train] == [2.0, 0.0]


def test_prompts_of_equal_messages_have_one_key_whatever_the_order_of_their_keys() -> None:
    one = ({"role": "user", "content": "é"},)
    assert prompt_key(one) == prompt_key(({"content": "é", "role": "user"},)) != prompt_key("é")


def test_a_prompt_with_nearly_all_pairs_stays_to_train_on():
    import numpy as np

    from pe_dpo.data import EncodedPair, split_by_prompt

    ids = np.array([1], dtype=np.int32)
    for large, small in (("0", "1"), ("1", "0")):
        pairs = [EncodedPair(ids, ids, ids, 0.0, f"x:{n}", large if n else small) for n in range(100)]
        train, held_out = split_by_prompt(pairs, 0.05)
        assert {pair.prompt_key for pair in train} == {large}
        assert {pair.prompt_key for pair in held_out} == {small}

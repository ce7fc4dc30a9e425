"""Held out means held out by what the model reads: prompts written in two ways and read alike are one prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths_to_pairs import prepare_pairs
from toy_tokenizers import CHATML, build_tokenizer

import pe_dpo.data
from pe_dpo.data import EncodedPair, split_by_prompt
from pe_dpo.data.encoded import data_hash
from pe_dpo.data.split import divide, join_prompts
from pe_dpo.recipe import DataSection

TRIMMING = CHATML.replace("m['content'] +", "m['content'] | trim +")
NUMBERS = range(12)


def pair_of(key: str, prompt: int, where: str) -> EncodedPair:
    ids = np.array([prompt], dtype=np.int32)
    return EncodedPair(ids, np.array([7], dtype=np.int32), np.array([8], dtype=np.int32), 0.0, where, key)


def as_text(number: int, after: str = "") -> dict[str, Any]:
    return {"prompt": f"question {number}{after}", "chosen": "good", "rejected": "bad"}


def as_messages(number: int) -> dict[str, Any]:
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": f"question {number}"}], **answers}


def prompts_of(pairs: list[EncodedPair], tokenizer: Any) -> set[str]:
    return {tokenizer.decode(pair.prompt_ids) for pair in pairs}


@pytest.mark.parametrize("after", ["\n", "  "], ids=["final line break", "final spaces"])
def test_no_held_out_prompt_is_read_in_training_however_it_was_written(write_lines: Callable[..., Path], after: str) -> None:
    tokenizer = build_tokenizer(template=TRIMMING, eos="<|im_end|>")
    path = write_lines(*map(as_text, NUMBERS), *(as_text(n, after) for n in NUMBERS))
    data = prepare_pairs(path, tokenizer=tokenizer, max_length=200, eval=0.3)
    read = prompts_of(data.train, tokenizer), prompts_of(data.held_out, tokenizer)
    assert read[0] & read[1] == set()
    assert read[0] | read[1] == {f"<|im_start|>user\nquestion {n}<|im_end|>\n<|im_start|>assistant\n" for n in NUMBERS}
    assert (len(data.train), len(data.held_out)) == (16, 8)  # 0.3 of 24 is 7.2, and a prompt has two rows
    assert len({pair.prompt_key for pair in data.held_out}) == 4


@pytest.mark.parametrize("written", [as_text, as_messages, lambda n: as_text(n, "\n")], ids=["text", "messages", "line break"])
def test_a_held_out_file_leaves_out_what_training_reads(
    write_lines: Callable[..., Path], written: Callable[[int], dict[str, Any]]
) -> None:
    tokenizer = build_tokenizer(template=TRIMMING, eos="<|im_end|>")
    write_lines(*map(written, (1, 9, 3)), name="test.jsonl")
    folder = write_lines(*map(as_text, (1, 2, 3))).parent
    data = prepare_pairs(folder, tokenizer=tokenizer, max_length=200)
    assert [pair.where for pair in data.held_out] == ["test.jsonl:2"]
    assert data.report.dropped["held-out row whose prompt is in training"] == ["test.jsonl:1", "test.jsonl:3"]


def test_prompts_that_are_alike_once_they_are_cut_are_one(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    path = write_lines(*({"prompt": f"{n} ends alike", "chosen": "good", "rejected": "bad"} for n in NUMBERS))
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_length": 15, "overlong": "truncate_prompt", "eval": 0.3}
    data = prepare_pairs(path, **options)  # ten of the prompt's bytes are left beside "good" and its end
    assert prompts_of(data.train, tokenizer) == {"ends alike"}
    assert data.held_out == []


def test_a_group_takes_the_smallest_key_along_a_chain() -> None:
    pairs = [pair_of("c", 1, "1"), pair_of("b", 1, "2"), pair_of("c", 2, "3"), pair_of("a", 2, "4"), pair_of("d", 3, "5")]
    assert [pair.prompt_key for pair in join_prompts(pairs)] == ["a", "a", "a", "a", "d"]
    assert [pair.where for pair in join_prompts(pairs)] == ["1", "2", "3", "4", "5"]


KEYS_AND_IDS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 5)), max_size=30)


@given(rows=KEYS_AND_IDS, share=st.floats(0, 0.9))
@settings(max_examples=200, deadline=None)
def test_neither_a_key_nor_token_ids_are_on_both_sides(rows: list[tuple[str, int]], share: float) -> None:
    pairs = [pair_of(key, prompt, str(where)) for where, (key, prompt) in enumerate(rows)]
    sides = divide(pairs, [], share=share)
    for what in (lambda where: rows[int(where)][0], lambda where: rows[int(where)][1]):
        assert not {what(pair.where) for pair in sides.train} & {what(pair.where) for pair in sides.held_out}
    assert sorted(int(pair.where) for pair in sides.train + sides.held_out) == list(range(len(rows)))


@given(keys=st.lists(st.sampled_from("abcdefgh"), max_size=30), share=st.floats(0, 0.9))
@settings(max_examples=100, deadline=None)
def test_where_no_prompts_collide_nothing_moves(keys: list[str], share: float) -> None:
    pairs = [pair_of(key, ord(key), str(where)) for where, key in enumerate(keys)]
    sides, (train, held_out) = divide(pairs, [], share=share), split_by_prompt(pairs, share)
    assert (sides.train, sides.held_out, sides.left_out) == (train, held_out, [])


def test_a_seed_holds_out_other_prompts_and_none_those_of_their_hashes() -> None:
    pairs = [pair_of(f"{number:03}", number, str(number)) for number in range(100)]
    sides = [[pair.prompt_key for pair in split_by_prompt(pairs, 0.2, seed=seed)[1]] for seed in (None, 0, 0, 1)]
    assert sides[0] == [f"{number:03}" for number in range(20)]  # as ever: the smallest keys
    assert sides[1] == sides[2] and [len(side) for side in sides] == [20] * 4
    assert len({*sides[1]} & {*sides[3]}) < 12 and len({*sides[0]} & {*sides[1]}) < 12  # 4 of 20 by chance


def test_the_rows_of_a_run_are_held_out_again_whatever_came_after(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    first = prepare_pairs(write_lines(*map(as_text, range(20))), tokenizer=tokenizer, max_length=99, eval=0.2)
    recorded = first.report.to_dict()
    assert recorded["held_out_rows"] == [pair.where for pair in first.held_out]
    path = write_lines(*map(as_text, range(200)))
    settings = DataSection(train=str(path), max_length=99, eval=0.2)
    again = pe_dpo.data.prepare_pairs(settings, tokenizer=tokenizer, recorded=recorded)
    anew = pe_dpo.data.prepare_pairs(settings, tokenizer=tokenizer)
    assert data_hash(again.held_out) == data_hash(first.held_out) != data_hash(anew.held_out)
    assert again.report.held_out_rows == first.report.held_out_rows


def test_a_default_share_has_a_bound_in_new_runs_alone(
    write_lines: Callable[..., Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pe_dpo.data.preparation.HELD_OUT_MOST == 2000
    rows = [as_text(number) for number in range(100)]  # a twentieth is 5
    path, moved = write_lines(*rows), write_lines(*rows, name="moved.jsonl")
    before = prepare_pairs(path, tokenizer=tokenizer, max_length=99).report
    assert before.held_out_from == "5.0% of the pairs, split by prompt"
    monkeypatch.setattr(pe_dpo.data.preparation, "HELD_OUT_MOST", 3)
    new = prepare_pairs(path, tokenizer=tokenizer, max_length=99)
    assert (len(new.train), len(new.held_out)) == (97, 3)
    assert new.report.facts()[3] == "97 pairs to train on, 3 held out (5.0% of the pairs but at most 3, split by prompt)"
    assert len(prepare_pairs(path, tokenizer=tokenizer, max_length=99, eval=0.05).held_out) == 5  # which was asked for
    old = before.to_dict()
    del old["held_out_most"]
    for recorded, place, count in (
        (old, path, 5), (old, moved, 5), (new.report.to_dict(), path, 3), (new.report.to_dict(), moved, 3),
    ):  # fmt: skip
        settings = DataSection(train=str(place), max_length=99)
        assert len(pe_dpo.data.prepare_pairs(settings, tokenizer=tokenizer, recorded=recorded).held_out) == count


@pytest.mark.parametrize(("sizes", "held_out"), [([2] * 50, 4), ([2] * 3 + [10] * 9, 4), ([9, 7, 30], 7), ([40], 0)])
def test_a_bound_is_kept_by_whole_prompts_unless_each_is_larger(sizes: list[int], held_out: int) -> None:
    keys = [f"{number:02}" for number, size in enumerate(sizes) for _ in range(size)]
    sides = split_by_prompt([pair_of(key, 1, str(where)) for where, key in enumerate(keys)], 0.2, 5 if sizes[0] == 2 else 3)
    assert len(sides[1]) == held_out


def test_the_same_data_in_a_file_of_another_name_are_split_as_the_run_was(
    write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    rows = [as_text(number) for number in range(20)]
    first = prepare_pairs(write_lines(*rows), tokenizer=tokenizer, max_length=99, eval=0.2)
    moved = DataSection(train=str(write_lines(*rows, name="moved.jsonl")), max_length=99, eval=0.2)
    again = pe_dpo.data.prepare_pairs(moved, tokenizer=tokenizer, recorded=first.report.to_dict())
    assert data_hash(again.held_out) == data_hash(first.held_out)
    assert {pair.where.partition(":")[0] for pair in again.held_out} == {"moved.jsonl"}


def test_the_rows_of_a_held_out_file_are_those_of_the_run(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    write_lines(as_text(8), as_text(9), name="test.jsonl")
    folder = write_lines(as_text(1), as_text(2)).parent
    recorded = prepare_pairs(folder, tokenizer=tokenizer, max_length=99).report.to_dict()
    write_lines(as_text(8), as_text(9), as_text(10), name="test.jsonl")
    again = pe_dpo.data.prepare_pairs(DataSection(train=str(folder)), tokenizer=tokenizer, recorded=recorded)
    assert [pair.where for pair in again.held_out] == ["test.jsonl:1", "test.jsonl:2"]
    assert [pair.where for pair in again.train] == ["train.jsonl:1", "train.jsonl:2"]


def test_a_run_that_named_no_rows_is_split_as_it_was(write_lines: Callable[..., Path]) -> None:
    """Before runs named them, prompts were told apart as rows write them, a final line break counted."""
    tokenizer = build_tokenizer(template=TRIMMING, eos="<|im_end|>")
    path = write_lines(*map(as_text, NUMBERS), *(as_text(n, "\n") for n in NUMBERS))
    settings = DataSection(train=str(path), max_length=200, eval=0.3)
    data = pe_dpo.data.prepare_pairs(settings, tokenizer=tokenizer, recorded={"held_out": 8})
    assert len({pair.prompt_key for pair in data.train + data.held_out}) == 24
    assert prompts_of(data.train, tokenizer) & prompts_of(data.held_out, tokenizer)
    assert data.report.held_out_rows is None

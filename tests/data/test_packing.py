"""Rows without padding: written out token by token, and rebuilt into prompts and answers for any pairs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pe_dpo.data import EncodedPair
from pe_dpo.data.batches import divide, on_device, pack, pack_completions, shared_tokens, split_into_rows
from pe_dpo.data.pairs import common_start


def pair(prompt, chosen, rejected, margin=0.0, where="x:1"):
    return EncodedPair(*(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)), margin, where, prompt_key="k")


def sized(prompt, chosen=1, rejected=1, mark=0):
    """A pair by its lengths; its answers differ from their first token on, its prompt is its own if its length or mark is."""
    return pair([mark] + [1] * (prompt - 1), [3] * chosen, [4] * rejected)


def written_out(row):
    tensors = {name: field for name, field in row._asdict().items() if name != "tree"}
    return {name: field.squeeze(0).tolist() if field.dim() == 2 else field.tolist() for name, field in tensors.items()}


# ---------------------------------------------------------------- token by token


def test_a_common_start_stands_in_the_prefix_and_last_tokens_stand_nowhere():
    """Prompt 1 2, answers 5 6 7 and 5 8: after 1 2 comes 5, after that 6 or 8, after 6 comes 7."""
    row = pack([pair([1, 2], [5, 6, 7], [5, 8])])
    assert written_out(row) == {
        "input_ids": [1, 2, 5, 6],
        "position_ids": [0, 1, 2, 3],
        "predicting": [1, 2, 3, 2],
        "targets": [5, 6, 7, 8],
        "members": [0, 1, 2, 0, 3],
        "owners": [0, 0, 0, 1, 1],
        "lengths": [3, 2],
        "chosen": [0],
        "rejected": [1],
    }
    assert row.tree == ((0, 4, -1),)  # nothing forks


def test_suffixes_go_on_at_the_position_where_their_prefix_ends():
    """Prompt 1 2 3, answers 4 5 6 and 7 8 9 10; a second prompt starts at 0 again; one-token answers take no room."""
    row = pack([pair([1, 2, 3], [4, 5, 6], [7, 8, 9, 10]), pair([11, 12], [13], [14])])
    assert written_out(row) == {
        "input_ids": [1, 2, 3, 4, 5, 7, 8, 9, 11, 12],
        "position_ids": [0, 1, 2, 3, 4, 3, 4, 5, 0, 1],
        "predicting": [2, 3, 4, 2, 5, 6, 7, 9, 9],
        "targets": [4, 5, 6, 7, 8, 9, 10, 13, 14],
        "members": [0, 1, 2, 3, 4, 5, 6, 7, 8],
        "owners": [0, 0, 0, 1, 1, 1, 1, 2, 3],
        "lengths": [3, 4, 1, 1],
        "chosen": [0, 2],
        "rejected": [1, 3],
    }
    assert row.tree == ((0, 3, -1), (3, 5, 0), (5, 8, 0), (8, 10, -1))


def test_an_answer_that_is_the_beginning_of_the_other_lies_in_the_prefix():
    """Prompt 3, answers 4 9 and 4 9 2 6: the second goes on from the last token of the first."""
    row = pack([pair([3], [4, 9], [4, 9, 2, 6])])
    assert written_out(row) == {
        "input_ids": [3, 4, 9, 2],
        "position_ids": [0, 1, 2, 3],
        "predicting": [0, 1, 2, 3],
        "targets": [4, 9, 2, 6],
        "members": [0, 1, 0, 1, 2, 3],
        "owners": [0, 0, 1, 1, 1, 1],
        "lengths": [2, 4],
        "chosen": [0],
        "rejected": [1],
    }
    assert row.tree == ((0, 4, -1),)  # nothing forks


def test_four_answers_to_one_prompt_stand_once_and_their_six_pairs_are_edges():
    """Answers 5 6, 7 8 9, 4 and 5 9 3: the first and the last begin alike. Another prompt between."""
    a, b, c, d = [5, 6], [7, 8, 9], [4], [5, 9, 3]
    edges = [(a, b), (a, c), (a, d), (b, c), (d, b), (d, c)]
    six = [pair([1, 2], *edge) for edge in edges]
    row = pack([*six[:2], pair([6], [7, 2], [8, 2]), *six[2:]])
    assert written_out(row) == {
        "input_ids": [1, 2, 5, 9, 7, 8, 6, 7, 8],
        "position_ids": [0, 1, 2, 3, 2, 3, 0, 1, 1],
        "predicting": [1, 2, 1, 4, 5, 1, 2, 3, 6, 7, 6, 8],
        "targets": [5, 6, 7, 8, 9, 4, 9, 3, 7, 2, 8, 2],
        "members": [0, 1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 10, 11],
        "owners": [0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 5, 5],
        "lengths": [2, 3, 1, 3, 2, 2],
        "chosen": [0, 0, 4, 0, 1, 3, 3],
        "rejected": [1, 2, 5, 3, 2, 1, 2],
    }
    assert row.tree == ((0, 2, -1), (2, 4, 0), (4, 6, 0), (6, 7, -1), (7, 8, 3), (8, 9, 3))


def test_without_sharing_every_answer_has_its_own_prompt_and_no_suffixes():
    """Prompt 1 2, answers 5 6 7 and 5 8, each read up to its last token but one."""
    row = pack([pair([1, 2], [5, 6, 7], [5, 8])], share=False)
    assert written_out(row) == {
        "input_ids": [1, 2, 5, 6, 1, 2, 5],
        "position_ids": [0, 1, 2, 3, 0, 1, 2],
        "predicting": [1, 2, 3, 5, 6],
        "targets": [5, 6, 7, 5, 8],
        "members": [0, 1, 2, 3, 4],
        "owners": [0, 0, 0, 1, 1],
        "lengths": [3, 2],
        "chosen": [0],
        "rejected": [1],
    }
    assert row.tree == ((0, 4, -1), (4, 7, -1))


def test_a_pair_of_equal_answers_is_one_answer():
    row = pack([pair([1], [5, 6], [5, 6])])
    assert (row.input_ids.tolist(), row.lengths.tolist()) == ([[1, 5]], [2])
    assert (row.chosen.tolist(), row.rejected.tolist()) == ([0], [0])


def test_integers_are_64_bits_and_tokens_have_a_batch_dimension():
    row = pack([pair([1, 2], [5, 6, 7], [5, 8])])
    assert {field.dtype for name, field in row._asdict().items() if name != "tree"} == {torch.int64}
    assert row.input_ids.shape == row.position_ids.shape == (1, 4)


def test_a_row_moves_to_a_device_with_all_its_tensors():
    row = pack([sized(2, 3, 4)])
    moved, others = row.on("meta", [torch.arange(3)])
    assert {field.device.type for name, field in moved._asdict().items() if name != "tree"} == {"meta"}
    assert moved.tree == row.tree
    assert [(one.device.type, one.shape) for one in others] == [("meta", (3,))]


def test_tensors_that_go_to_a_device_together_come_apart_as_they_were(monkeypatch):
    """As on a GPU, whose copy is one to the CPU here."""
    row = pack([sized(2, 3, 4), sized(5, 1, 1)])
    tensors = [field for name, field in row._asdict().items() if name != "tree"]
    monkeypatch.setattr(torch, "device", lambda device: SimpleNamespace(type="elsewhere"))
    assert all(map(torch.equal, on_device(tensors, "cpu"), tensors))


@pytest.mark.parametrize(
    ("texts", "common"),
    [([[5, 6], [5, 7]], 1), ([[5], [6]], 0), ([[5, 6], [5, 6, 7]], 2), ([[5, 6, 7], [5, 6, 8], [5, 9]], 1), ([[5, 6, 7]], 3)],
)
def test_answers_have_their_longest_common_start_in_common(texts, common):
    assert common_start([np.array(ids) for ids in texts]) == common


# ---------------------------------------------------------------- any pairs

prompts, answers = st.lists(st.integers(1, 2), min_size=1, max_size=4), st.lists(st.integers(1, 3), min_size=1, max_size=6)
any_pairs = st.lists(st.builds(pair, prompts, answers, answers), min_size=1, max_size=9)
"""Few tokens, so that prompts repeat, answers start alike, and one is the beginning of another."""


def contexts(row):
    """What each token of the row has read, itself included: the spans that its own goes on from, and its own up to it."""
    ids = row.input_ids[0].tolist()
    read, whole = [], []
    for number, (start, end, parent) in enumerate(row.tree):
        assert start == len(read) < end and parent < number
        before = whole[parent] if parent >= 0 else []
        whole.append(before + ids[start:end])
        read += [before + ids[start : index + 1] for index in range(start, end)]
    assert len(read) == len(ids)
    return read


@given(any_pairs, st.booleans())
@pytest.mark.slow
def test_positions_count_what_a_token_has_read(pairs, share):
    row = pack(pairs, share=share)
    assert row.position_ids[0].tolist() == [len(read) - 1 for read in contexts(row)]


@given(any_pairs, st.booleans())
@pytest.mark.slow
def test_every_token_of_every_answer_is_predicted_once_from_all_before_it(pairs, share):
    row = pack(pairs, share=share)
    read = contexts(row)
    predicting, targets, members, owners = (field.tolist() for field in (row.predicting, row.targets, row.members, row.owners))
    for number, one in enumerate(pairs):
        for answer, ids in ((row.chosen[number], one.chosen_ids), (row.rejected[number], one.rejected_ids)):
            mine = [member for member, owner in zip(members, owners, strict=True) if owner == answer]
            whole, start = one.prompt_ids.tolist() + ids.tolist(), len(one.prompt_ids)
            assert [(read[predicting[member]], targets[member]) for member in mine] == [
                (whole[:end], whole[end]) for end in range(start, len(whole))
            ]
            assert row.lengths[answer] == len(ids)
    assert set(members) == set(range(len(targets)))


@given(any_pairs)
def test_an_answer_to_a_prompt_stands_once_however_many_pairs_it_is_in(pairs):
    different = {(*one.prompt_ids, -1, *ids) for one in pairs for ids in (one.chosen_ids, one.rejected_ids)}
    assert len(pack(pairs).lengths) == len(different)


@given(any_pairs)
@pytest.mark.slow
def test_the_tokens_of_a_row_are_known_without_packing_it(pairs):
    assert shared_tokens(pairs) == pack(pairs).input_ids.numel()


@given(any_pairs)
def test_sharing_never_makes_a_row_longer(pairs):
    assert pack(pairs).input_ids.numel() <= pack(pairs, share=False).input_ids.numel()


# ---------------------------------------------------------------- rows by a token budget

budgets = st.integers(1, 60)


@given(any_pairs, budgets)
@pytest.mark.slow
def test_every_pair_is_in_one_row_and_rows_are_in_the_order_of_the_data(pairs, budget):
    rows = split_into_rows(pairs, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(pairs)))
    assert all(row == sorted(row) for row in rows)


@given(any_pairs, budgets)
@example([pair([1], [1], [1]), pair([1], [1], [1, 1]), pair([1], [1], [1] * 5), pair([1], [2, 1], [2, 1, 1, 1])], 9)
@pytest.mark.slow
def test_no_row_exceeds_the_budget_but_of_one_pair_or_answer(pairs, budget):
    for row in split_into_rows(pairs, budget):
        completions, parts, edges = divide([pairs[index] for index in row], budget)
        assert sorted(number for part in parts for number in part) == list(range(len(completions)))
        for part in parts:
            packed = pack_completions([completions[number] for number in part])
            assert packed.input_ids.numel() <= budget or len(completions) <= 2 or len(part) == 1
        for index, (chosen, rejected) in zip(row, edges.tolist(), strict=True):
            assert completions[chosen][1].ids.tolist() == pairs[index].chosen_ids.tolist()
            assert completions[rejected][1].ids.tolist() == pairs[index].rejected_ids.tolist()


@given(any_pairs, budgets, st.permutations([1, 2, 3]))
@pytest.mark.slow
def test_rows_do_not_depend_on_which_tokens_they_are_on_margins_or_on_names(pairs, budget, other):
    name = np.array([0, *other])
    renamed = [
        pair(name[one.prompt_ids], name[one.chosen_ids], name[one.rejected_ids], margin=float(number), where=f"y:{number}")
        for number, one in enumerate(pairs)
    ]
    assert split_into_rows(renamed, budget) == split_into_rows(pairs, budget)


@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=12), budgets)
def test_the_fullest_row_comes_first(lengths, budget):
    pairs = [sized(*length, mark=100 + number) for number, length in enumerate(lengths)]
    tokens = [shared_tokens([pairs[index] for index in row]) for row in split_into_rows(pairs, budget)]
    assert tokens == sorted(tokens, reverse=True)


def test_rows_are_filled_evenly():
    """6, 5, 4 and 3 tokens are 18, two rows of at most 10: 6 + 3 and 5 + 4, not 6 + 4 and 5 + 3."""
    assert split_into_rows([sized(size, mark=size) for size in (5, 3, 6, 4)], 10) == [[1, 2], [0, 3]]


def test_a_pair_larger_than_the_budget_goes_alone():
    assert split_into_rows([sized(3), sized(30)], 7) == [[1], [0]]


def test_a_pair_larger_than_the_budget_does_not_part_the_others():
    """3 and 4 tokens still fit into one row of 7."""
    assert split_into_rows([sized(3), sized(30), sized(4)], 7) == [[1], [0, 2]]


def test_pairs_of_one_prompt_stay_together_though_others_lie_between():
    """9 tokens of prompt, one-token answers: both pairs of it in 9 tokens, beside 8 others."""
    first, second = pair([7] * 9, [1], [2]), pair([7] * 9, [3], [4])
    assert split_into_rows([first, sized(8), second], 10) == [[0, 2], [1]]


def test_a_large_group_of_one_prompt_is_broken_within_the_budget():
    """100 tokens of prompt and 9 + 9 for each pair: 50 pairs make 1,000 tokens, so 200 pairs make 4 rows of 50."""
    pairs = [pair([7] * 100, [10 + number, *[2] * 9], [500 + number, *[2] * 9]) for number in range(200)]
    rows = split_into_rows(pairs, 1000)
    assert [len(row) for row in rows] == [50] * 4
    assert {shared_tokens([pairs[index] for index in row]) for row in rows} == {1000}

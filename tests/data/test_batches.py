"""Micro-batches by a token budget, and padding that means nothing."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pe_dpo.data import EncodedPair
from pe_dpo.data.batches import pad, pad_rows, split_by_tokens
from pe_dpo.data.pairs import row_length


def pair(prompt, chosen, rejected):
    ids = (np.arange(10, 10 + n, dtype=np.int32) for n in (prompt, chosen, rejected))
    return EncodedPair(*ids, margin=0.0, where="x:1", prompt_key="k")


sizes = st.integers(1, 30)


@given(st.lists(st.builds(pair, sizes, sizes, sizes), min_size=1, max_size=30), st.integers(1, 400))
def test_every_pair_is_in_one_batch_and_no_batch_of_several_exceeds_the_budget(pairs, budget):
    batches = split_by_tokens(pairs, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(pairs)))
    for batch in batches:
        padded = 2 * len(batch) * max(row_length(pairs[index]) for index in batch)
        assert padded <= budget or len(batch) == 1
        assert {one.numel() for one in pad([pairs[index] for index in batch])} == {padded}


def test_the_longest_pair_comes_first():
    pairs = [pair(2, 2, 2), pair(9, 9, 1), pair(3, 3, 3)]
    assert split_by_tokens(pairs, 1) == [[1], [2], [0]]


def test_rows_hold_prompt_and_answer_then_padding_and_masks_say_which_is_which():
    input_ids, attention_mask, completion_mask = pad([pair(2, 1, 3), pair(1, 1, 1)])
    assert input_ids.tolist() == [[10, 11, 10, 0, 0], [10, 10, 0, 0, 0], [10, 11, 10, 11, 12], [10, 10, 0, 0, 0]]
    assert attention_mask.sum(1).tolist() == [3, 2, 5, 2]
    assert completion_mask.tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]


def test_rows_may_be_padded_on_the_left():
    input_ids, attention_mask = pad_rows([np.array([5, 6, 7], dtype=np.int32), np.array([8], dtype=np.int32)], on_the_left=True)
    assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64

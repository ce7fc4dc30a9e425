"""Batches of pairs: split by a token budget, padded on the right.

budget counts what a forward really processes: 2 answers × pairs × the longest row, padding included
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pe_dpo.data.pairs import EncodedPair


class PaddedBatch(NamedTuple):
    """2B rows, first the chosen then the rejected answers; every field (2B, T) int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor

    def to(self, device: torch.device | str) -> "PaddedBatch":
        """Return the batch on a device."""
        return PaddedBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def row_length(pair: EncodedPair) -> int:
    """Return the tokens of the longer of a pair's two rows."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def split_by_tokens(pairs: Sequence[EncodedPair], token_budget: int) -> list[list[int]]:
    """Return micro-batches as lists of indices into `pairs`, each index once.

    Pairs of like length go together, the longest first (so that a batch that does not fit in memory shows at once); a pair
    that alone exceeds the budget goes alone.

    Args:
        pairs: the pairs of one optimizer step, or of an evaluation.
        token_budget: most tokens of one micro-batch, padding included.
    """
    order = sorted(range(len(pairs)), key=lambda index: (-row_length(pairs[index]), index))
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        if batches and 2 * (len(batches[-1]) + 1) * longest <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = row_length(pairs[index])
    return batches


def pad(pairs: Sequence[EncodedPair]) -> PaddedBatch:
    """Return the pairs as one right-padded batch. Padding is token 0: no mask lets it through, whatever it means."""
    answers = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    prompts = [pair.prompt_ids for pair in pairs] * 2
    shape = (len(answers), max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
    input_ids, attention_mask, completion_mask = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = answer
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = 1
    return PaddedBatch(*map(torch.from_numpy, (input_ids, attention_mask, completion_mask)))

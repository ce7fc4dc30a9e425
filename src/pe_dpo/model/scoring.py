"""Log-probs of pairs from a model: one forward over chosen and rejected answers together."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pe_dpo.objective import answer_logprobs


class PairLogprobs(NamedTuple):
    """Log-probs of both answers of each pair; every field (B,)."""

    chosen: Tensor
    """float64, nats, summed over the answer's tokens."""
    rejected: Tensor
    chosen_lengths: Tensor
    """int64, tokens."""
    rejected_lengths: Tensor


def pair_logprobs(model: Any, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> PairLogprobs:
    """Return the log-probs of a padded batch whose first half of rows is chosen and second half rejected.

    Args:
        model: a causal LM; see `objective.answer_logprobs` for the tensors, here (2B, T).
    """
    rows = answer_logprobs(model, input_ids, attention_mask, completion_mask)
    chosen, rejected = rows.logprob.chunk(2)
    chosen_lengths, rejected_lengths = rows.length.chunk(2)
    return PairLogprobs(chosen, rejected, chosen_lengths, rejected_lengths)


def concatenate(parts: list[PairLogprobs]) -> PairLogprobs:
    """Return the log-probs of several batches as one."""
    return PairLogprobs(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

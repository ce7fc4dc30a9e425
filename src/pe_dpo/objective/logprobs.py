"""Log-probabilities of answers: the padded path, simple on purpose, against which every faster path is tested.

input_ids        p p p p c c c . .       one row per answer, padded on the right
completion_mask  0 0 0 0 1 1 1 0 0       the answer's tokens, the end token among them
log-prob         Σ log π(input_ids[t] | input_ids[<t])  over the marked t
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AnswerLogprobs(NamedTuple):
    """Log-prob and length of each answer."""

    logprob: Tensor
    """(B,) float64, nats, summed over the answer's tokens."""
    length: Tensor
    """(B,) int64, number of tokens summed over."""


class PairLogprobs(NamedTuple):
    """Log-probs of both answers of each pair; every field (B,)."""

    chosen: Tensor
    """float64, nats, summed over the answer's tokens."""
    rejected: Tensor
    chosen_lengths: Tensor
    """int64, tokens."""
    rejected_lengths: Tensor


def completion_logprobs(
    model: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> AnswerLogprobs:
    """Return the log-probability of each row's answer given its prompt.

    Args:
        model: a Hugging Face causal LM, or anything called with `input_ids`, `attention_mask`, `use_cache` and
            `logits_to_keep` (int64 positions) that returns an object with `logits` (B, K, V) for those positions.
        input_ids: (B, T) int64, padded on the right.
        attention_mask: (B, T) 1 on tokens, 0 on padding.
        completion_mask: (B, T) 1 on the answer's tokens; position 0 cannot be scored and must be 0.

    Returns:
        AnswerLogprobs. Softmax in float32 (float64 where the model computes in it), the sum over tokens in float64: a
        float32 sum of 350 tokens is off by 1e-3 nats, as much as a small adapter moves.

    Raises:
        ValueError: shapes differ, padding is not on the right, or `completion_mask` marks position 0 or padding.
    """
    per_token, _ = completion_token_logprobs(model, input_ids, attention_mask, completion_mask)
    return AnswerLogprobs(logprob=per_token.sum(dim=1), length=completion_mask.sum(dim=1))


answer_logprobs = completion_logprobs
"""The same function by an earlier name."""


def completion_token_logprobs(
    model: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each of the answers' tokens: the terms of `completion_logprobs`, with its arguments.

    Returns:
        (B, K) float64, 0 where a row has no token of its answer, and (B, K) bool, where it has one.

    Raises:
        ValueError: as `completion_logprobs`.
    """
    shapes = {tuple(tensor.shape) for tensor in (input_ids, attention_mask, completion_mask)}
    if len(shapes) != 1 or input_ids.dim() != 2:
        raise ValueError(f"input_ids, attention_mask and completion_mask must share one shape (B, T); found {shapes}")
    if completion_mask[:, 0].any():
        raise ValueError("completion_mask marks position 0, which nothing precedes: an answer needs a prompt or a BOS")
    if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("attention_mask has padding before tokens: rows must be padded on the right")
    if (completion_mask.bool() & ~attention_mask.bool()).any():
        raise ValueError("completion_mask marks padding: it must be 0 wherever attention_mask is 0")
    scored = completion_mask[:, 1:].bool()
    positions = scored.any(dim=0).nonzero().squeeze(1)
    scored, targets = scored[:, positions], input_ids[:, 1:][:, positions]
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=positions, use_cache=False).logits
    per_token = torch.zeros(scored.shape, dtype=torch.float64, device=input_ids.device)
    per_token[scored] = token_logprobs(logits[scored], targets[scored]).double()
    return per_token, scored


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(logits)[target] of each token.

    Args:
        logits: (N, V) of any floating dtype; half precisions are widened to float32 first.
        targets: (N,) int64.

    Returns:
        (N,) nats, float32 or float64.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(wide, targets, reduction="none")


def owner_sums(values: Tensor, owners: Tensor, count: int, longest: int | None = None) -> Tensor:
    """Return for each owner the sum of its values, the same bits every time.

    On a CPU they are added one after the other. On a GPU `index_add` adds floats in the order in which they happen to arrive;
    there the values are laid out as rows, one for each owner, filled up with zeros, and the rows summed.

    Args:
        values: (N,) or (N, …).
        owners: (N,) int64, ascending.
        count: of owners.
        longest: most values that one owner has, where it is known.
    """
    if values.device.type == "cpu":
        return values.new_zeros(count, *values.shape[1:]).index_add(0, owners, values)
    return _sums_of_rows(values, owners, count, len(values) if longest is None else longest)


def _sums_of_rows(values: Tensor, owners: Tensor, count: int, longest: int) -> Tensor:
    place = torch.arange(len(owners), device=owners.device) - torch.searchsorted(owners, owners)
    rows = values.new_zeros(count * longest, *values.shape[1:]).index_copy(0, owners * longest + place, values)
    return rows.view(count, longest, *values.shape[1:]).sum(dim=1)

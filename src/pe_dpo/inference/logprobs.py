"""Log-probs of pairs from a model: one forward over chosen and rejected answers together, padded or packed."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pe_dpo.data.batches import Completion, PackedRow, on_device, pack_completions
from pe_dpo.errors import ModelError
from pe_dpo.model.attention import Kind, Packing
from pe_dpo.objective import LogitTransform, PairLogprobs, completion_logprobs, head_logprobs
from pe_dpo.objective.head import SMALLEST, wide_logits
from pe_dpo.objective.logprobs import owner_sums


def pair_logprobs(model: Any, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> PairLogprobs:
    """Return the log-probs of a padded batch whose first half of rows is chosen and second half rejected.

    Args:
        model: a causal LM; see `objective.completion_logprobs` for the tensors, here (2B, T).
    """
    with wide_logits(model.get_output_embeddings()):
        rows = completion_logprobs(model, input_ids, attention_mask, completion_mask)
    chosen, rejected = rows.logprob.chunk(2)
    chosen_lengths, rejected_lengths = rows.length.chunk(2)
    return PairLogprobs(chosen, rejected, chosen_lengths, rejected_lengths)


def packed_pair_logprobs(model: Any, row: PackedRow, *, kind: Kind) -> PairLogprobs:
    """Return the log-probs of the pairs in a packed row, on the model's device.

    Args:
        model: a causal LM whose attention is switched to `model.attention.NAME`, under PEFT or not.
        row: on the CPU.
        kind: how attention is computed.

    Raises:
        ModelError: some layer of the model does not attend through transformers' interface, so that pairs would mix.
    """
    sums, row = _answer_logprobs(model, row, kind)
    lengths = row.lengths
    return PairLogprobs(sums[row.chosen], sums[row.rejected], lengths[row.chosen], lengths[row.rejected])


def divided_pair_logprobs(
    model: Any, completions: Sequence[Completion], rows: Sequence[Sequence[int]], edges: np.ndarray, *, kind: Kind
) -> PairLogprobs:
    """Return the log-probs of pairs whose answers stand in several rows, the numbers of `packed_pair_logprobs`.

    Where gradients are on, all rows but the last go forward without, and again in the backward, one after the other: a row's
    gradient needs what the loss makes of answers in other rows. No more than one row's activations are kept at a time.

    Args:
        model: as in `packed_pair_logprobs`.
        completions: all answers.
        rows: those of each row, as indices.
        edges: the pairs' chosen and rejected answers, as indices, (B, 2).
        kind: how attention is computed.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    here = torch.empty(0, device=causal_lm.device)  # tells `checkpoint` whose random states dropout draws from

    def score(number: int, _: Tensor) -> Tensor:
        row = pack_completions([completions[index] for index in rows[number]])
        return _answer_logprobs(model, row, kind)[0]

    last = len(rows) - 1
    parts = [
        checkpoint(score, number, here, use_reentrant=False)
        if number < last and torch.is_grad_enabled()
        else score(number, here)
        for number in range(len(rows))
    ]
    places = torch.from_numpy(np.concatenate(rows).argsort()[edges.T].copy())
    lengths = torch.tensor([answer.scored_tokens for _, answer in completions])[torch.from_numpy(edges.T.copy())]
    chosen, rejected, *both_lengths = on_device([*places, *lengths], causal_lm.device)
    sums = torch.cat(parts)
    return PairLogprobs(sums[chosen], sums[rejected], *both_lengths)


def packed_token_logprobs(model: Any, row: PackedRow, *, kind: Kind) -> Tensor:
    """Return the log-prob of each scored token of a packed row's answers, (M,) float64 in the order of `row.members`.

    Arguments and errors are those of `packed_pair_logprobs`.
    """
    return _token_logprobs(model, row, kind)[0]


def _answer_logprobs(model: Any, row: PackedRow, kind: Kind) -> tuple[Tensor, PackedRow]:
    """Return the sum of each answer's log-probs, (A,) float64, and the row; both on the model's device."""
    longest = int(row.lengths.max())
    per_token, row = _token_logprobs(model, row, kind)
    # In float64 like the padded path, and one after the other in the order of the tokens.
    return owner_sums(per_token, row.owners, len(row.lengths), longest), row


def _token_logprobs(model: Any, row: PackedRow, kind: Kind) -> tuple[Tensor, PackedRow]:
    """Return `packed_token_logprobs`, and the row on the model's device.

    Only the hidden states that predict an answer's token reach the head, and no matrix of all logits is made.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = row.input_ids.shape[1]
    filling = max(0, SMALLEST - tokens)  # a tree of its own, which nobody reads
    packing = Packing((*row.tree, (tokens, tokens + filling, -1)) if filling else row.tree, kind)
    input_ids, position_ids = (F.pad(one, (0, filling)) for one in (row.input_ids, row.position_ids))
    row = row._replace(input_ids=input_ids, position_ids=position_ids)
    row, layout = row.on(causal_lm.device, packing.layout())
    packing.put(layout)
    hidden = causal_lm.get_decoder()(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=_no_mask(row.input_ids.device),
        use_cache=False,
        packing=packing,
    ).last_hidden_state
    layers = causal_lm.config.get_text_config().num_hidden_layers
    if packing.calls != layers:
        raise ModelError(f"{packing.calls} of its {layers} layers attend through transformers' attention interface")
    head, transform = causal_lm.get_output_embeddings(), logit_transform(causal_lm)
    per_token = head_logprobs(hidden[0].index_select(0, row.predicting), row.targets, head, transform)
    return per_token.double().index_select(0, row.members), row


def logit_transform(causal_lm: Any) -> LogitTransform:
    """Return what a model does to its logits after the head, as its configuration says (Gemma, Cohere, Granite)."""
    config = causal_lm.config.get_text_config()
    scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    if hasattr(causal_lm, "logit_scale"):
        scale *= float(causal_lm.logit_scale)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


@lru_cache(maxsize=4)
def _no_mask(device: torch.device) -> Tensor:
    """Four dimensions tell transformers that the mask is ready, so that it builds none; packed attention does not read it."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def moved(logprobs: PairLogprobs, device: torch.device | str) -> PairLogprobs:
    """Return log-probs on another device, in one copy: between a GPU and the CPU each makes one wait for the other."""
    if logprobs.chosen.device == torch.device(device):
        return logprobs
    chosen, rejected, *lengths = torch.stack([field.double() for field in logprobs]).to(device)
    return PairLogprobs(chosen, rejected, *(one.long() for one in lengths))


def concatenate(parts: list[PairLogprobs]) -> PairLogprobs:
    """Return the log-probs of several batches as one."""
    return PairLogprobs(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

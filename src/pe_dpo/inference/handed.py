"""Prompts once for models that carry a state along: what a prompt leaves behind is handed to all of its answers.

    prompt (1, P) ──► keys and values, states of recurrences, ends of convolutions ──┬─► chosen  (row 1 of a batch)
                                                                                    └─► rejected (row 2)

transformers' caches are what generation uses, with gradients here. They are written in place, which the backward of a gated
delta net does not survive; so a prompt's cache is only read by its answers. Not every model goes on from a state with more than
one token (Mamba and Jamba begin anew and say nothing): whoever uses this path compares it with the padded one.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data.batches import Completion, completions_of, pad_rows
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import ModelError
from pe_dpo.inference.logprobs import logit_transform
from pe_dpo.objective import PairLogprobs, head_logprobs


def handed_pair_logprobs(model: Any, pairs: Sequence[EncodedPair]) -> PairLogprobs:
    """Return the log-probs of pairs, prompt after prompt, on the model's device.

    Args:
        model: a causal LM with a cache, under PEFT or not; its activations must not be recomputed, which transformers does
            without a cache.
        pairs: in any order.
    """
    completions, edges = completions_of(pairs)
    tokens = handed_token_logprobs(model, completions)
    sums = torch.stack([one.sum() for one in tokens])
    lengths = torch.tensor([len(one) for one in tokens], device=sums.device)
    chosen, rejected = torch.from_numpy(edges.T.copy()).to(sums.device)
    return PairLogprobs(sums[chosen], sums[rejected], lengths[chosen], lengths[rejected])


def handed_token_logprobs(model: Any, completions: Sequence[Completion]) -> list[Tensor]:
    """Return the log-probs of each answer's scored tokens, (A,) float64; answers to one prompt follow each other.

    Raises:
        ModelError: the model has no cache of this kind.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    groups: list[list[Completion]] = []
    for completion in completions:
        if groups and np.array_equal(groups[-1][0][0], completion[0]):
            groups[-1].append(completion)
        else:
            groups.append([completion])
    return [logprobs for group in groups for logprobs in _of_one_prompt(causal_lm, group)]


def handed_tokens(pairs: Sequence[EncodedPair]) -> int:
    """Return the tokens that go through the model for these pairs, padding included."""
    tokens, prompt = 0, None
    completions, _ = completions_of(pairs)
    longest = _width([answer.ids for _, answer in completions])
    for ids, _ in completions:
        if prompt is None or not np.array_equal(ids, prompt):
            prompt, tokens = ids, tokens + len(ids)
        tokens += longest
    return tokens


def _width(answers: Sequence[np.ndarray]) -> int:
    """The tokens of a row of answers: the last of each is not read, and one token alone would go the way of generation."""
    return max(2, max(map(len, answers)) - 1)


def _of_one_prompt(causal_lm: Any, completions: Sequence[Completion]) -> list[Tensor]:
    device, decoder = causal_lm.device, causal_lm.get_decoder()
    prompt, answers = completions[0][0], [answer for _, answer in completions]
    ids = torch.zeros(len(answers), _width([answer.ids for answer in answers]), dtype=torch.int64)
    for row, answer in zip(ids, answers, strict=True):
        row[: len(answer.ids) - 1] = torch.from_numpy(answer.ids[:-1].astype(np.int64))
    known = inspect.signature(decoder.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in known), None)
    if name is None:
        raise ModelError("its forward takes no cache")
    before, _ = pad_rows([prompt])
    first = decoder(input_ids=before.to(device), use_cache=True)
    cache = getattr(first, name, None)
    if cache is None or not hasattr(cache, "layers"):
        raise ModelError("its forward returns no cache")
    _hand_over(cache, len(answers))
    second = decoder(input_ids=ids.to(device), use_cache=True, **{name: cache})
    last = first.last_hidden_state[:, -1:].expand(len(answers), -1, -1)
    hidden = torch.cat([last, second.last_hidden_state], dim=1)
    scored = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    for row, answer in zip(scored, answers, strict=True):
        row[: len(answer.ids)] = torch.ones(len(answer.ids)) if answer.scored is None else torch.from_numpy(answer.scored)
    targets = np.concatenate([answer.ids if answer.scored is None else answer.ids[answer.scored] for answer in answers])
    head, transform = causal_lm.get_output_embeddings(), logit_transform(causal_lm)
    states, wanted = hidden[scored.to(device)], torch.from_numpy(targets.astype(np.int64)).to(device)
    return list(head_logprobs(states, wanted, head, transform).double().split(scored.sum(dim=1).tolist()))


def _hand_over(cache: Any, answers: int) -> None:
    """Let each answer of a batch go on from what a prompt left in a cache, which is not written any more."""
    for layer in cache.layers:
        if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel():
            layer.keys, layer.values = (one.repeat_interleave(answers, dim=0) for one in (layer.keys, layer.values))
        if not hasattr(layer, "conv_states"):
            continue
        for states in (layer.conv_states, layer.recurrent_states):
            for number in states if isinstance(states, dict) else range(len(states)):
                if states[number] is not None:
                    states[number] = states[number].repeat_interleave(answers, dim=0)

        def joined(new: Tensor, state_idx: int = 0, *, of: Any = layer, **_: Any) -> Tensor:
            return torch.cat([of.conv_states[state_idx], new], dim=-1)

        def unchanged(new: Tensor, *_: Any, **__: Any) -> Tensor:
            return new

        layer.update_conv_state, layer.update_recurrent_state = joined, unchanged

"""Answers drawn from a model exactly: temperature 1, no truncation of the distribution, no penalties.

    y_t = argmax_v  log π(v | x, y_<t) + G_tv,     G Gumbel noise      (the Gumbel-max trick: y_t ~ π(· | x, y_<t))

The noise is a function of seed, name of the answer, position and token alone. So an answer does not depend on what else is
drawn, in which batch or order; and two models that are asked with the same seed share their noise: they give the same token
wherever their probabilities agree, and the difference between them is measured with less variance than with noise of their own
(a third, between two late checkpoints of one run whose answers are 119 tokens long).
"""

import hashlib
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pe_dpo.model.random_bits import GOLDEN, mixed, random_bits
from pe_dpo.progress import advance

PRICE = 1.0
"""Of reading a token again, in tokens drawn for nothing; see `_Regroup`. On a CPU both cost the same, and then this is never
worse than twice the best rule (ski rental); a GPU reads faster."""

CHECK = 8
"""Tokens after which it is looked again how many rows have ended."""


class SampledAnswer(NamedTuple):
    """What a model said."""

    ids: np.ndarray
    """int32 (A,), A >= 1, the end token among them."""
    ended: bool
    """Whether its last token is an end token; else it was cut."""
    logprob: float
    """log π(answer | prompt), nats, as the sampler saw it."""


def sample_answers(
    model: Any,
    prompts: Sequence[np.ndarray],
    names: Sequence[str],
    *,
    max_new_tokens: int,
    end_token_ids: Collection[int],
    seed: int,
    device: torch.device | str,
    token_budget: int,
) -> list[SampledAnswer]:
    """Return one answer to each prompt, drawn from the model in the state it is in (adapters on or off).

    The generation config of the base is ignored; the state of the model and of all random generators stays as it is.

    Args:
        model: a causal LM, under PEFT or not.
        prompts: int32 (P,) token ids each.
        names: of the answers; equal names and prompts draw equal answers.
        max_new_tokens: where to cut an answer that does not end; the end of the model's context cuts it before.
        end_token_ids: tokens that end an answer.
        seed: of the noise.
        device: of the model.
        token_budget: most tokens of one batch, padding and the tokens to come included.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    context = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    rows = [
        _Row(np.asarray(prompt), max_new_tokens, max(1, context - len(prompt)), _state(seed, name))
        for prompt, name in zip(prompts, names, strict=True)
    ]
    growing = rows
    with _plain_generation(causal_lm):
        while growing:
            for batch in _batches(growing, token_budget):
                _extend(causal_lm, batch, end_token_ids, device)
                advance(sum(row.is_done for row in rows), len(rows))
            growing = [row for row in growing if not row.is_done]
    return [row.answer() for row in rows]


def gumbel_noise(states: Tensor, positions: Tensor, size: int) -> Tensor:
    """Return independent Gumbel noise for the tokens of one position in each of several answers.

    Args:
        states: (B,) int64, of the answers.
        positions: (B,) int64, of the token in its answer, from 0.
        size: of the vocabulary.

    Returns:
        (B, size) float64.

    Source:
        Gumbel-max: Maddison, Tarlow & Minka 2014 (arXiv 1411.0030). The bits are splitmix64's: Steele, Lea & Flood 2014, "Fast
        splittable pseudorandom number generators", one stream per answer and position.
    """
    starts = mixed(states + (positions + 1) * GOLDEN)
    bits = random_bits(starts[:, None], torch.arange(size, dtype=torch.int64, device=states.device))
    uniform = (bits.double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log1p(-uniform))


class _Row:
    """An answer that grows.

    Args:
        prompt: its token ids.
        most: tokens that the answer may have.
        context: tokens that the model's context leaves for it.
        state: of its noise.
    """

    def __init__(self, prompt: np.ndarray, most: int, context: int, state: int) -> None:
        self.prompt, self.state = prompt, state
        self.room, self.context = min(most, context), context
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.has_ended = False

    @property
    def is_done(self) -> bool:
        """Whether it has ended or is full."""
        return self.has_ended or len(self.ids) == self.room

    @property
    def width(self) -> int:
        """Tokens to read before its next one."""
        return len(self.prompt) + len(self.ids)

    def append(self, ids: list[int], logprobs: list[float], ends: Collection[int]) -> None:
        """Take new tokens up to the first end token, and as long as there is room."""
        ids = ids[: self.room - len(self.ids)]
        last = next((index for index, token in enumerate(ids) if token in ends), None)
        stop = len(ids) if last is None else last + 1
        self.ids += ids[:stop]
        self.logprobs += logprobs[:stop]
        self.has_ended = last is not None

    def answer(self) -> SampledAnswer:
        """Return what was said."""
        return SampledAnswer(np.asarray(self.ids, dtype=np.int32), self.has_ended, float(np.sum(self.logprobs)))


class _Draw:
    """A logits processor after which the most likely token is a draw; it writes down the log-probs of what it drew.

    Args:
        rows: of the batch.
        width: of the ids that generation starts from.
        device: of the model.
    """

    def __init__(self, rows: Sequence[_Row], width: int, device: torch.device | str) -> None:
        self.states = torch.tensor([row.state for row in rows], dtype=torch.int64, device=device)
        self.first = torch.tensor([len(row.ids) - width for row in rows], dtype=torch.int64, device=device)
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noisy = scores + gumbel_noise(self.states, self.first + input_ids.shape[1], scores.shape[1])
        drawn = noisy.argmax(dim=1, keepdim=True)
        self.logprobs.append(scores.log_softmax(dim=1).gather(1, drawn).squeeze(1))
        return noisy


class _Regroup:
    """A stopping criterion: the batch stops when its ended rows have cost as much as it takes to read the others again.

    Without it a batch takes as long as its longest answer.

    Args:
        ends: tokens that end an answer; what `generate` writes behind them is one of them.
        width: of the ids that generation starts from.
    """

    def __init__(self, ends: Collection[int], width: int) -> None:
        self.ends, self.width = sorted(ends), width
        self.wasted = 0

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        stop = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if (input_ids.shape[1] - self.width) % CHECK:
            return stop
        ended = int(torch.isin(input_ids[:, -1], torch.tensor(self.ends, device=input_ids.device)).sum())
        self.wasted += CHECK * ended
        return stop | (ended > 0 and self.wasted >= PRICE * (len(input_ids) - ended) * input_ids.shape[1])


def _extend(causal_lm: Any, rows: Sequence[_Row], ends: Collection[int], device: torch.device | str) -> None:
    """Let rows grow together, until all are done or it is better to regroup them."""
    width = max(row.width for row in rows)
    input_ids, attention_mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, width - row.width :] = torch.tensor([*row.prompt.tolist(), *row.ids])
        attention_mask[index, width - row.width :] = 1
    draw = _Draw(rows, width, device)
    output = causal_lm.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        logits_processor=[draw],
        stopping_criteria=[_Regroup(ends, width)] if ends else None,
        do_sample=False,
        max_new_tokens=_tokens(rows),
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=next(iter(sorted(ends)), 0),
    )
    new = output[:, width:].cpu()
    logprobs = torch.stack(draw.logprobs, dim=1)[:, : new.shape[1]].double().cpu()
    for row, ids, values in zip(rows, new.tolist(), logprobs.tolist(), strict=True):
        row.append(ids, values, ends)


def _tokens(rows: Sequence[_Row]) -> int:
    """Tokens that a batch may draw at most: for the longest answer, but no row beyond the model's context."""
    return min(max(row.room - len(row.ids) for row in rows), min(row.context - len(row.ids) for row in rows))


def _batches(rows: Sequence[_Row], token_budget: int) -> Iterator[list[_Row]]:
    """Yield batches of rows of like length, the longest first; a row that exceeds the budget goes alone."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -row.width):
        wider = [*batch, row]
        if batch and len(wider) * (wider[0].width + _tokens(wider)) > token_budget:
            yield batch
            wider = [row]
        batch = wider
    yield batch


@contextmanager
def _plain_generation(causal_lm: Any) -> Iterator[None]:
    """Within the block the model is in eval mode and `generate` has no settings of the base."""
    from transformers import GenerationConfig

    was_training, before = causal_lm.training, causal_lm.generation_config
    causal_lm.eval()
    causal_lm.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            yield
    finally:
        causal_lm.generation_config = before
        causal_lm.train(was_training)


def _state(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little", signed=True)

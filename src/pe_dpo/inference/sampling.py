"""Answers drawn from a model exactly, many at once; or one token by token, so that it can be shown while it grows.

    y_t = argmax_v  log π(v | x, y_<t) + G_tv,     G Gumbel noise      (the Gumbel-max trick: y_t ~ π(· | x, y_<t))

`sample` makes noise that is a function of seed, name of the answer, position and token alone. So an answer does not depend on
what else is drawn, in which batch or order; and two models that are asked with the same seed share their noise: they give the
same token wherever their probabilities agree, and the difference between them is measured with less variance than with noise of
their own (a third, between two late checkpoints of one run whose answers are 119 tokens long).

`Growing.step` adds one token to an answer, and between two of them the model may become another. At temperature 0 both take the
most likely token.
"""

import hashlib
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data.batches import pad_rows
from pe_dpo.inference.policy import Policy
from pe_dpo.model.base import evaluating
from pe_dpo.model.random_bits import GOLDEN, mixed, random_bits
from pe_dpo.progress import advance

PRICE = 1.0
"""Of reading a token again, in tokens drawn for nothing; see `_Regroup`. On a CPU both cost the same, and then this is never
worse than twice the best rule (ski rental); a GPU reads faster."""

CHECK = 8
"""Tokens after which it is looked again how many rows have ended."""


class Sample(NamedTuple):
    """What a model said."""

    ids: np.ndarray
    """int32 (A,), A >= 1, the end token among them."""
    ended: bool
    """Whether its last token is an end token; else it was cut."""
    logprob: float
    """log π(answer | prompt), nats, as the sampler saw it."""


def sample(
    policy: Policy,
    prompts: Sequence[np.ndarray],
    names: Sequence[str] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    token_budget: int = 0,
) -> list[Sample]:
    """Return one answer to each prompt, drawn from the model in the state it is in, without truncation and penalties.

    The generation config of the base is ignored; the state of the model and of all random generators stays as it is.

    Args:
        policy: whose model is asked; within `policy.reference()` that is π0.
        prompts: int32 (P,) token ids each.
        names: of the answers; equal names and prompts draw equal answers. Default: their numbers.
        max_new_tokens: where to cut an answer that does not end; the end of the model's context cuts it before.
        temperature: by which logits are divided before the draw; 0 takes the most likely token.
        seed: of the noise.
        token_budget: most tokens of one batch, padding and the tokens to come included; by default each answer goes alone.
    """
    model = policy.causal_lm
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    rows = [
        _Row(np.asarray(prompt), max_new_tokens, max(1, context - len(prompt)), _state(seed, name))
        for prompt, name in zip(prompts, map(str, range(len(prompts))) if names is None else names, strict=True)
    ]
    from transformers import GenerationConfig

    growing, config = rows, model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model):
            while growing:
                for batch in _batches(growing, token_budget):
                    _extend(model, batch, policy.end_tokens, temperature)
                    advance(sum(row.is_done for row in rows), len(rows))
                growing = [row for row in growing if not row.is_done]
    finally:
        model.generation_config = config
    return [Sample(np.asarray(row.ids, dtype=np.int32), row.has_ended, float(np.sum(row.logprobs))) for row in rows]


class Growing:
    """An answer that grows token by token; it keeps what the model has computed of it.

    Args:
        policy: that answers; only its tokenizer and end tokens are used before the first step.
        prompt_ids: token ids before the answer.
        max_new_tokens: where to cut an answer that does not end.
        temperature: 0 takes the most likely token.
        top_p: only the most likely tokens that make up this share of the probability are drawn.
        seed: of the noise; two models that draw with the same one answer otherwise by themselves alone.
    """

    def __init__(
        self,
        policy: Policy,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.policy, self.room = policy, max_new_tokens
        self.temperature, self.top_p = temperature, top_p
        self.ids: list[int] = []
        """Its tokens, the end token among them."""
        self._prompt_ids = list(prompt_ids)
        self._generator = torch.Generator().manual_seed(seed)
        self._cache: dict[str, Any] = {}

    @property
    def ended(self) -> bool:
        """Whether the model ended it; else it is still growing, or was cut."""
        return bool(self.ids) and self.ids[-1] in self.policy.end_tokens

    @property
    def is_done(self) -> bool:
        """Whether it has ended or was cut."""
        return self.ended or len(self.ids) == self.room

    @property
    def text(self) -> str:
        """Without special tokens and, while it grows, without a character of which bytes are still to come."""
        text = answer_text(self.policy.tokenizer, self.ids)
        return text if self.is_done else text.rstrip("\ufffd")

    @torch.no_grad()
    def step(self) -> None:
        """Add one token, from the model of the policy in the state that it is in now.

        Between two steps the model may become another, if it is the same again at the next.
        """
        tokens, device = self._prompt_ids + self.ids, self.policy.device
        out = self.policy.model(
            input_ids=torch.tensor([tokens[-1:] if self._cache else tokens], device=device),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long, device=device),
            use_cache=True,
            logits_to_keep=1,
            **self._cache,
        )
        # Named `cache` from transformers 5.24 on. A model that keeps no keys (Mamba: one token with a longer mask spoils it)
        # reads all of it again: slow, and right.
        self._cache = {
            name: kept
            for name, kept in out.items()
            if name in ("cache", "past_key_values") and any(hasattr(layer, "keys") for layer in kept.layers)
        }
        logits = out.logits[0, -1].float()
        if self.temperature:
            noise = torch.empty(logits.shape).exponential_(generator=self._generator).to(logits.device)
            self.ids.append(draw(logits / self.temperature, self.top_p, noise))
        else:
            self.ids.append(int(logits.argmax()))


def draw(logits: Tensor, top_p: float, noise: Tensor) -> int:
    """Return a token drawn as argmax p / e with e ~ Exp(1), which takes token i with probability p_i.

    With the same noise two models take the same token wherever their probabilities agree.

    Args:
        logits: (V,) float32.
        top_p: only the most likely tokens that make up this share of the probability.
        noise: (V,) drawn from Exp(1).
    """
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # the tokens before it are enough
        probabilities[order[beyond]] = 0.0
    return int((probabilities / noise).argmax())


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


def prompt_text(tokenizer: Any, ids: Any) -> str:
    """Return a prompt for people: turns with their marks, without the token that begins every text."""
    begins = len(ids) > 1 and tokenizer.bos_token_id is not None and int(ids[0]) == tokenizer.bos_token_id
    text: str = tokenizer.decode(ids[1:] if begins else ids, skip_special_tokens=False)
    return text


def answer_text(tokenizer: Any, ids: Any) -> str:
    """Return an answer for people: without special tokens and the space around it."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


class _Row:
    """An answer that grows in a batch.

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


class _Draw:
    """A logits processor after which the most likely token is a draw; it writes down the log-probs of what it drew.

    Args:
        rows: of the batch.
        width: of the ids that generation starts from.
        temperature: see `sample`.
        device: of the model.
    """

    def __init__(self, rows: Sequence[_Row], width: int, temperature: float, device: torch.device) -> None:
        self.states = torch.tensor([row.state for row in rows], dtype=torch.int64, device=device)
        self.first = torch.tensor([len(row.ids) - width for row in rows], dtype=torch.int64, device=device)
        self.temperature = temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noisy = scores
        if self.temperature:
            tempered = scores if self.temperature == 1 else scores / self.temperature
            noisy = tempered + gumbel_noise(self.states, self.first + input_ids.shape[1], scores.shape[1])
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


def _extend(model: Any, rows: Sequence[_Row], end_tokens: Collection[int], temperature: float) -> None:
    """Let rows grow together, until all are done or it is better to regroup them."""
    width, ends = max(row.width for row in rows), sorted(end_tokens)
    longest, fewest = max(row.room - len(row.ids) for row in rows), min(row.context - len(row.ids) for row in rows)
    read = [np.array([*row.prompt.tolist(), *row.ids]) for row in rows]
    input_ids, attention_mask = pad_rows(read, on_the_left=True)
    draws = _Draw(rows, width, temperature, model.device)
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        logits_processor=[draws],
        stopping_criteria=[_Regroup(ends, width)] if ends else None,
        do_sample=False,
        max_new_tokens=min(longest, fewest),  # for the longest answer, but no row beyond the model's context
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    new = output[:, width:].cpu()
    logprobs = torch.stack(draws.logprobs, dim=1)[:, : new.shape[1]].double().cpu()
    for row, ids, values in zip(rows, new.tolist(), logprobs.tolist(), strict=True):
        ids = ids[: row.room - len(row.ids)]
        last = next((index for index, token in enumerate(ids) if token in end_tokens), None)
        stop = len(ids) if last is None else last + 1
        row.ids += ids[:stop]
        row.logprobs += values[:stop]
        row.has_ended = last is not None


def _batches(rows: Sequence[_Row], token_budget: int) -> list[list[_Row]]:
    """Return batches of rows of like length, the longest first; a row that exceeds the budget goes alone."""
    batches: list[list[_Row]] = []
    longest, fewest = 0, 0
    for row in sorted(rows, key=lambda row: -row.width):
        longest, fewest = max(longest, row.room - len(row.ids)), min(fewest, row.context - len(row.ids))
        if batches and (len(batches[-1]) + 1) * (batches[-1][0].width + min(longest, fewest)) <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest, fewest = row.room - len(row.ids), row.context - len(row.ids)
    return batches


def _state(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little", signed=True)

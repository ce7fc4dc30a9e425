"""One answer, token by token, so that it can be shown while it grows and so that two models can take turns.

prompt ──read──► logits ──choose──► token ──read──► logits ──choose──► token … until an end token, or the last allowed
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Only the most likely tokens that make up this share of the probability."""
    seed: int = 0
    """Both sides draw the same noise, so that their answers differ by the models alone."""


GREEDY = Sampling()


class Answer(NamedTuple):
    """An answer so far."""

    ids: tuple[int, ...]
    """Its tokens, the end token among them."""
    text: str
    """Without special tokens and without a character of which bytes are still to come."""
    is_whole: bool
    """Whether the model ended it; else it is still growing, or was cut."""


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    end_token_ids: Collection[int],
    device: torch.device | str,
    sampling: Sampling = GREEDY,
) -> Iterator[Answer]:
    """Yield an answer after each of its tokens; the last is the finished one.

    Between two of them the model may become another, if it is the same again when the next is asked for.

    Args:
        model: a causal LM in eval mode.
        tokenizer: of the model.
        prompt_ids: token ids before the answer.
        max_new_tokens: where to cut an answer that does not end.
        end_token_ids: tokens that end an answer.
        device: of the model.
        sampling: how tokens are chosen.
    """
    reader = _Reader(model, device)
    generator = torch.Generator().manual_seed(sampling.seed)
    logits, ids = reader.read(prompt_ids), []
    while True:
        noise = None
        if sampling.temperature:
            noise = torch.empty(logits.shape).exponential_(generator=generator).to(logits.device)
        ids.append(next_token(logits, sampling, noise))
        is_whole = ids[-1] in end_token_ids
        is_last = is_whole or len(ids) == max_new_tokens
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        yield Answer(tuple(ids), text if is_last else text.rstrip("\ufffd"), is_whole)
        if is_last:
            return
        logits = reader.read(ids[-1:])


def next_token(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> int:
    """Return the next token: the most likely one, or a draw.

    The draw is argmax p / e with e ~ Exp(1), which takes token i with probability p_i. With the same noise two models take the
    same token wherever their probabilities agree.

    Args:
        logits: (V,) float32.
        sampling: how to choose.
        noise: (V,) drawn from Exp(1); None with temperature 0.
    """
    if noise is None:
        return int(logits.argmax())
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p  # the tokens before it are enough
        probabilities[order[beyond]] = 0.0
    return int((probabilities / noise).argmax())


class _Reader:
    """Reads tokens one after the other and keeps what the model has computed of them.

    Args:
        model: a causal LM.
        device: of the model.
    """

    def __init__(self, model: Any, device: torch.device | str) -> None:
        self.model, self.device = model, device
        self.tokens: list[int] = []
        self.cache: Any = None

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Return the logits (V,) float32 of the token after `ids`, which follow what was read before."""
        self.tokens += ids
        # A model that keeps no keys and values (Mamba calls its state otherwise) reads all of it again: slow, and right.
        known = {} if self.cache is None else {"past_key_values": self.cache}
        fed = self.tokens if self.cache is None else ids
        out = self.model(
            input_ids=torch.tensor([list(fed)], device=self.device),
            attention_mask=torch.ones(1, len(self.tokens), dtype=torch.long, device=self.device),
            use_cache=True,
            logits_to_keep=1,
            **known,
        )
        self.cache = getattr(out, "past_key_values", None)
        logits: Tensor = out.logits[0, -1].float()
        return logits

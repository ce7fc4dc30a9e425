"""Prompts and answers to look at."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    end_token_ids: Collection[int],
    device: torch.device | str,
) -> list[str]:
    """Return the most likely continuation of each prompt, one token at a time, without special tokens.

    Args:
        model: a causal LM in the state to be heard (adapters on or off).
        tokenizer: of the model.
        prompts: int32 (P,) token ids each, as `EncodedPair.prompt_ids`.
        max_new_tokens: where to stop an answer that does not end.
        end_token_ids: tokens that end an answer.
        device: of the model.
    """
    was_training = model.training
    model.eval()
    answers = []
    try:
        for prompt in prompts:
            input_ids = torch.from_numpy(np.asarray(prompt, dtype=np.int64))[None].to(device)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,  # some bases' generation configs have one, and then the likeliest token is not taken
                eos_token_id=sorted(end_token_ids) or None,
                pad_token_id=next(iter(sorted(end_token_ids)), 0),
            )
            answers.append(answer_text(tokenizer, output[0, input_ids.shape[1] :]))
    finally:
        model.train(was_training)
    return answers


def prompt_text(tokenizer: Any, ids: Any) -> str:
    """Return a prompt for people: turns with their marks, without the token that begins every text."""
    begins = len(ids) > 1 and tokenizer.bos_token_id is not None and int(ids[0]) == tokenizer.bos_token_id
    text: str = tokenizer.decode(ids[1:] if begins else ids, skip_special_tokens=False)
    return text


def answer_text(tokenizer: Any, ids: Any) -> str:
    """Return an answer for people: without special tokens and the space around it."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()

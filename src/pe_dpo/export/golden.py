"""Golden prompts: what a model answers, token by token, so that whoever serves it can see that it is still the same.

Each line of golden_prompts.jsonl is a prompt with its rendered text and token ids, the greedy answer, and for every token of it
the log-prob and the lead over the second best. Where the lead is small, another runtime's rounding may choose otherwise.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data.encoding import begin_tokens, with_begin
from pe_dpo.data.files import read_rows
from pe_dpo.data.pairs import RowError
from pe_dpo.errors import DataError
from pe_dpo.inference.divergence import kl
from pe_dpo.inference.policy import Policy
from pe_dpo.inference.sampling import sample

QUESTIONS = (
    "What is the capital of France?",
    "Give me one tip for sleeping well.",
    "Write a sentence about the sea.",
    "What is 7 times 8?",
    "How do I say thank you in Spanish?",
)

NEAR_TIE = 0.05
"""Nats of lead below which another choice is no error; bfloat16 keeps 8 bits, so logits near 16 are rounded by up to 0.03."""


class GoldenPrompt(NamedTuple):
    """One prompt and what the model answers to it."""

    prompt: str
    rendered: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    log_probs: list[float]
    """Log-prob of each token of the answer."""
    leads: list[float]
    """By how much each token is more likely than the second best, in nats."""


def golden_prompts(policy: Policy, prompts: Sequence[str] = QUESTIONS, *, tokens: int = 32) -> list[GoldenPrompt]:
    """Return prompts with the model's greedy answers, by argmax alone: no penalty or filter of a generation config takes part.

    Args:
        policy: a whole model in eval mode; the chat template of its tokenizer is used where there is one.
        prompts: texts of users.
        tokens: most tokens of an answer.
    """
    tokenizer, golden = policy.tokenizer, []
    for prompt in prompts:
        rendered = prompt
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            rendered = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        prompt_ids = token_ids(tokenizer, rendered)
        answer = sample(policy, [np.asarray(prompt_ids)], max_new_tokens=tokens, temperature=0)[0].ids.tolist()
        log_probs = _log_probs(policy.model, prompt_ids, answer)
        best, second = log_probs.topk(2, dim=-1).values.T
        golden.append(
            GoldenPrompt(
                prompt=prompt,
                rendered=rendered,
                prompt_ids=prompt_ids,
                token_ids=answer,
                text=tokenizer.decode(answer, skip_special_tokens=True),
                log_probs=[round(value, 6) for value in log_probs.gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()],
                leads=[round(value, 6) for value in (best - second).tolist()],
            )
        )
    return golden


def save_golden(golden: Sequence[GoldenPrompt], file: Path) -> None:
    """Write golden prompts, one JSON object a line."""
    lines = [json.dumps(one._asdict(), ensure_ascii=False) for one in golden]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_golden(file: Path) -> list[GoldenPrompt]:
    """Return the golden prompts of a file.

    Raises:
        DataError: a row cannot be read or lacks a field.
    """
    golden = []
    for where, values in read_rows(file):
        if isinstance(values, RowError):
            raise DataError(f"{where}: {values}")
        missing = set(GoldenPrompt._fields) - set(values)
        if missing:
            raise DataError(f"{where}: no golden prompt, {', '.join(sorted(missing))} is missing")
        golden.append(GoldenPrompt(**{key: values[key] for key in GoldenPrompt._fields}))
    return golden


def check_golden(model: Any, tokenizer: Any, file: Path, *, near_tie: float = NEAR_TIE) -> tuple[int, int, list[str]]:
    """Return whether a model answers golden prompts as the file says.

    Prompt ids must be equal. Answers must be equal up to the first token whose lead is below `near_tie` and at which the model
    chooses otherwise; what follows from there is another text and is not compared.

    Args:
        model: a causal LM in eval mode.
        tokenizer: of the model.
        file: golden_prompts.jsonl.
        near_tie: nats.

    Returns:
        How many tokens were compared, up to the first near-tie of each prompt at which the model chose otherwise; how many
        prompts left the golden answer at one; and what is wrong, empty when the model passes.
    """
    golden = load_golden(file)
    compared, near_ties, differences = 0, 0, []
    for one, log_probs in zip(golden, answer_log_probs(model, golden), strict=True):
        if token_ids(tokenizer, one.rendered) != one.prompt_ids:
            differences.append(f"{one.prompt!r}: the prompt has other token ids")
        chosen = log_probs.argmax(-1).tolist()
        place = next((at for at, (mine, theirs) in enumerate(zip(chosen, one.token_ids, strict=True)) if mine != theirs), None)
        compared += len(chosen) if place is None else place
        if place is not None and one.leads[place] < near_tie:
            near_ties += 1
        elif place is not None:
            differences.append(
                f"{one.prompt!r}: token {place + 1} is {chosen[place]}, not {one.token_ids[place]}, which led by "
                f"{one.leads[place]:.3f} nats"
            )
    return compared, near_ties, differences


def answer_log_probs(model: Any, golden: Sequence[GoldenPrompt]) -> Iterator[Tensor]:
    """Yield the log-probs of all tokens at each place of the golden answers, float32 (answer, vocabulary)."""
    for one in golden:
        yield _log_probs(model, one.prompt_ids, one.token_ids)


def mean_divergence(model: Any, other: Sequence[Tensor], golden: Sequence[GoldenPrompt]) -> float:
    """Return the mean over places of the golden answers of KL(other || model), in nats.

    Args:
        model: what is judged, a quantized copy say.
        other: `answer_log_probs` of the model that it was made from.
        golden: the prompts of both.
    """
    parts = [
        kl(reference.double().exp(), reference.double(), found.double())
        for reference, found in zip(other, answer_log_probs(model, golden), strict=True)
    ]
    return max(0.0, float(torch.cat(parts).mean()))  # never negative but for rounding, -1e-17


def read_prompts(file: Path, *, count: int = 5) -> list[str]:
    """Return the first user turns of a file of prompts or preferences.

    Args:
        file: rows with `prompt` (text or messages), or `chosen` (messages).
        count: how many different ones.

    Raises:
        DataError: a row has neither, or there is no row.
    """
    found: dict[str, None] = {}
    for where, values in read_rows(file):
        if isinstance(values, RowError):
            raise DataError(f"{where}: {values}")
        value = values.get("prompt", values.get("chosen"))
        turns = value if isinstance(value, list) else [{"role": "user", "content": value}]
        texts = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
        first = next((text for text in texts if text), None)
        if not isinstance(first, str) or not first.strip():
            raise DataError(f"{where}: no prompt there; expected a text or messages in `prompt`, or messages in `chosen`")
        found.setdefault(first)
        if len(found) == count:
            break
    if not found:
        raise DataError(f"{file}: no prompts there")
    return list(found)


def token_ids(tokenizer: Any, rendered: str) -> list[int]:
    """Return token ids as in training: plain text begins with BOS where the tokenizer adds one, a chat template writes its own.

    Args:
        tokenizer: with or without a chat template.
        rendered: a chat, or plain text.
    """
    ids = list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return with_begin(ids, [] if tokenizer.chat_template else begin_tokens(tokenizer))


@torch.no_grad()
def _log_probs(model: Any, prompt_ids: list[int], answer: list[int]) -> Tensor:
    ids = torch.tensor([[*prompt_ids, *answer]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return logits.float().log_softmax(-1).cpu()

"""Golden prompts: what a model answers, token by token, so that whoever serves it can see that it is still the same.

Each line of golden_prompts.jsonl is a prompt with its rendered text and token ids, the greedy answer as ids and text, for every
token of it the log-prob and the lead over the second best, and by how much another runtime may move a lead. Where a lead is
smaller, a server may choose otherwise and still be right; what it says from there on is another text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data.encoding import begin_tokens, with_begin
from pe_dpo.data.files import read_rows
from pe_dpo.data.pairs import RowError
from pe_dpo.data.sandbox import TEMPLATE_ERRORS, apply_chat_template
from pe_dpo.data.template import refusal
from pe_dpo.errors import DataError
from pe_dpo.export.golden_file import GoldenMatch, GoldenPrompt, compare_answer, load_golden
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
            try:
                rendered = apply_chat_template(tokenizer, chat, add_generation_prompt=True)
            except TEMPLATE_ERRORS as error:
                raise DataError(f"the prompt {prompt!r} {refusal(error)}") from error
        prompt_ids = token_ids(tokenizer, rendered)
        said = sample(policy, [np.asarray(prompt_ids)], max_new_tokens=tokens, temperature=0)[0]
        answer = said.ids.tolist()
        log_probs = _log_probs(policy.model, prompt_ids, answer)
        begun = [tokenizer.decode(answer[: place + 1], skip_special_tokens=True) for place in range(len(answer))]
        golden.append(
            GoldenPrompt(
                prompt=prompt,
                rendered=rendered,
                prompt_ids=prompt_ids,
                token_ids=answer,
                text=begun[-1],
                text_ends=[len(text.rstrip("\ufffd")) for text in begun],  # without a character of which bytes are missing
                ended=said.ended,
                log_probs=_chosen(log_probs, answer),
                leads=leads_of(log_probs, answer),
            )
        )
    return golden


def leads_of(log_probs: Tensor, answer: Sequence[int]) -> list[float]:
    """Return by how much each token of an answer is more likely than the best other, in nats.

    Args:
        log_probs: float32 (answer, vocabulary).
        answer: token ids.
    """
    ids = torch.tensor(answer)[:, None]
    best_others = log_probs.scatter(-1, ids, float("-inf")).amax(-1)
    return [round(value, 6) for value in (log_probs.gather(-1, ids)[:, 0] - best_others).tolist()]


def as_served_by(model: Any, golden: Sequence[GoldenPrompt]) -> list[GoldenPrompt]:
    """Return golden prompts with the log-probs and leads that a model in fewer bits gives to the same answers.

    Args:
        model: of the numbers that are served, in eval mode.
        golden: answers of the model that it was made from.
    """
    return [
        one._replace(log_probs=_chosen(log_probs, one.token_ids), leads=leads_of(log_probs, one.token_ids))
        for one, log_probs in zip(golden, answer_log_probs(model, golden), strict=True)
    ]


def with_measured_near_tie(model: Any, golden: Sequence[GoldenPrompt]) -> list[GoldenPrompt]:
    """Return golden prompts with twice the most that bfloat16 moves one of their leads or log-probs as what is a near tie.

    Args:
        model: in float32, which answered them; its parameters are bfloat16 from here on.
        golden: its answers.
    """
    for parameter in model.parameters():  # buffers stay: positions are computed in float32 in bfloat16 models too
        parameter.data = parameter.data.to(torch.bfloat16)
    moves = [
        abs(before - after)
        for one, rounded in zip(golden, as_served_by(model, golden), strict=True)
        for before, after in zip([*one.leads, *one.log_probs], [*rounded.leads, *rounded.log_probs], strict=True)
    ]
    return [one._replace(near_tie=round(2 * max(moves), 3)) for one in golden]


def check_golden(model: Any, tokenizer: Any, file: Path, *, near_tie: float | None = None) -> list[GoldenMatch]:
    """Return how a model answers each golden prompt of a file.

    Args:
        model: a causal LM in eval mode.
        tokenizer: of the model.
        file: golden_prompts.jsonl.
        near_tie: nats; by default what the file says.
    """
    found = []
    golden = load_golden(file)
    for one, log_probs in zip(golden, answer_log_probs(model, golden), strict=True):
        judged = one if near_tie is None else one._replace(near_tie=near_tie)
        prompt_ids = token_ids(tokenizer, one.rendered)
        found.append(compare_answer(judged, prompt_ids=prompt_ids, token_ids=log_probs.argmax(-1).tolist()))
    return found


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


def _chosen(log_probs: Tensor, answer: Sequence[int]) -> list[float]:
    return [round(value, 6) for value in log_probs.gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()]


@torch.no_grad()
def _log_probs(model: Any, prompt_ids: list[int], answer: list[int]) -> Tensor:
    ids = torch.tensor([[*prompt_ids, *answer]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return logits.float().log_softmax(-1).cpu()

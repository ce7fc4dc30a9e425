"""What transformers in float32 answers to a request, and how far an engine's answer is from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

NEAR_TIE = 0.05
"""Nats of lead below which another choice of a server in 16 bits is no other model."""


def expected_answer(model: Path, request: Mapping[str, Any], *, network: Any = None) -> dict[str, Any]:
    """Return transformers' answer to a request, in float32, each sequence in a forward of its own.

    Args:
        model: a whole model on disk.
        request: as an engine gets it.
        network: the model in float32, where it is loaded already.

    Returns:
        An answer as README.md describes it; besides, `leads` and `chat_leads`: of each greedy token over the second best, in
        nats.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if network is None:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    answer: dict[str, Any] = {"logprobs": [], "tokens": [], "rendered": [], "greedy": [], "leads": []}
    answer |= {"greedy_texts": [], "chat_lengths": [], "chat_greedy": [], "chat_texts": [], "chat_leads": []}
    for ids in request.get("ids", ()):
        rows = _log_probs(network, ids)[:-1]
        answer["logprobs"].append(rows.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    for text in request.get("texts", ()):
        answer["tokens"].append(tokenizer(text, add_special_tokens=False).input_ids)
    for chat in request.get("chats", ()):
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(rendered, add_special_tokens=False).input_ids
        chosen, leads = _greedy(network, ids, request["new_tokens"])
        answer["rendered"].append(rendered)
        answer["chat_lengths"].append(len(ids))
        answer["chat_greedy"].append(chosen)
        answer["chat_texts"].append(tokenizer.decode(chosen, skip_special_tokens=True))
        answer["chat_leads"].append(leads)
    for prompt in request.get("greedy", ()):
        chosen, leads = _greedy(network, prompt, request["new_tokens"])
        answer["greedy"].append(chosen)
        answer["greedy_texts"].append(tokenizer.decode(chosen, skip_special_tokens=True))
        answer["leads"].append(leads)
    return answer


def largest_difference(answer: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Return the largest difference of a log-prob, in nats; infinite where a place is missing or is no number.

    Places at which an engine cannot be asked are null, and left out, if they are less than half of all.
    """
    worst, asked, places = 0.0, 0, 0
    for found, wanted in zip(answer["logprobs"], expected["logprobs"], strict=True):
        if len(found) != len(wanted):
            return float("inf")
        pairs = [(one, other) for one, other in zip(found, wanted, strict=True) if one is not None]
        asked, places = asked + len(pairs), places + len(wanted)
        gaps = (torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2) @ torch.tensor([1.0, -1.0], dtype=torch.float64)).abs()
        worst = max([worst, *gaps.nan_to_num(nan=float("inf")).tolist()])
    return worst if 2 * asked > places else float("inf")


def equal(answer: Mapping[str, Any], expected: Mapping[str, Any], part: str) -> int:
    """Return how many entries of a part (`tokens` say) are equal."""
    return sum(found == wanted for found, wanted in zip(answer[part], expected[part], strict=True))


def unequal(answer: Mapping[str, Any], expected: Mapping[str, Any], part: str) -> list[int]:
    """Return the numbers of the entries of a part that differ."""
    pairs = enumerate(zip(answer[part], expected[part], strict=True))
    return [number for number, (found, wanted) in pairs if found != wanted]


def greedy_faults(
    answer: Mapping[str, Any], expected: Mapping[str, Any], part: str = "greedy", *, near_tie: float = NEAR_TIE
) -> list[int]:
    """Return the numbers of the prompts that an engine leaves at a token that leads by `near_tie` or more, in nats.

    What follows after a near-tie at which the engine chose otherwise is another text, and is not compared.
    """
    faults, leads = [], expected["leads" if part == "greedy" else "chat_leads"]
    for number in unequal(answer, expected, part):
        found, wanted = answer[part][number], expected[part][number]
        place = next((at for at, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
        if place >= len(wanted) or leads[number][place] >= near_tie:
            faults.append(number)
    return faults


def _greedy(network: Any, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens one after another, and by how much each leads."""
    ids, leads = list(prompt), []
    for _ in range(count):
        best = _log_probs(network, ids)[-1].topk(2)
        leads.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :], leads


def _log_probs(network: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)

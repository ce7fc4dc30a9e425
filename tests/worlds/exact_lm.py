"""A language model small enough to write down whole: every answer to every prompt, and the policy that minimizes the loss.

Five tokens, answers of at most two words: END, x END, x y with x, y among the other four: 1 + 4 + 16 = 21 answers to each of
two prompts. Preferences follow Bradley–Terry with a random reward r. The population loss over all ordered pairs, each weighted
with the chance of its label, has its minimum at

    π* ∝ π0^κ · exp(r/β),    κ = γ/β

Source: Rafailov et al. 2023 (arXiv 2305.18290) for κ = 1; Cho, "Continued musing on DPO", for the tempered reference π0^κ.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import optimize
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pe_dpo.objective import completion_logprobs, preference_loss

END = 0
WORDS = (1, 2, 3, 4)
# The same last token, so that what comes before it matters. A prompt of one token would be the same context as that token
# twice: attention over equal tokens returns the same mean, and the optimum would be out of reach.
PROMPTS = ((1, 2), (4, 3, 2))
ANSWERS = ((END,), *((word, END) for word in WORDS), *itertools.product(WORDS, WORDS))
LONGEST_ANSWER = 2
"""Tokens: an answer of two words has no END."""


class World(NamedTuple):
    """A base with fresh adapters, what it gave before they were attached, and the reward of every answer."""

    policy: PeftModel
    base_logprobs: Tensor
    """log π0, (prompts, 21) nats."""
    reward: Tensor
    """(prompts, 21)."""


def make_base(seed: int = 0) -> LlamaForCausalLM:
    """Return a random base in float64: 2 layers, 64 wide."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1 + len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8, bos_token_id=None, eos_token_id=END, pad_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    base = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(6)  # random weights alone leave every token nearly as likely as the next
    return base


def make_world(seed: int = 0) -> World:
    """Return a random base in float64 with fresh adapters on every linear layer, and a random reward."""
    return with_adapters(make_base(seed))


def with_adapters(base: nn.Module) -> World:
    """Return a world on this base; adapter and reward are drawn from torch's random state as it is."""
    with torch.no_grad():
        base_logprobs = logprobs_of_all_answers(base).double()
    adapters = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    policy = get_peft_model(base, adapters, autocast_adapter_dtype=False)
    return World(policy, base_logprobs, torch.randn(base_logprobs.shape, dtype=torch.float64))


def optimum(world: World, *, beta: float = 1.0, gamma: float) -> Tensor:
    """Return log π*, (prompts, 21): the closed form."""
    return torch.log_softmax(gamma / beta * world.base_logprobs + world.reward / beta, dim=1)


def tabular_optimum(world: World, *, beta: float = 1.0, gamma: float, rejected_weight: float) -> Tensor:
    """Return log π*, (prompts, 21), found by descent on one logit an answer, loss and gradient written in NumPy.

    There is no closed form where the rejected answer has a weight λ <= 1, but the loss is convex: log p(chosen) − λ·log
    p(rejected) is concave in the logits.
    """
    (chosen, rejected), found = np.array(list(itertools.permutations(range(len(ANSWERS)), 2))).T, []
    for reward, base in zip(world.reward.numpy(), world.base_logprobs.numpy(), strict=True):
        label = 1 / (1 + np.exp(reward[rejected] - reward[chosen]))
        offset = gamma * (base[chosen] - rejected_weight * base[rejected])

        def loss(logits: np.ndarray, label: np.ndarray = label, offset: np.ndarray = offset) -> tuple[float, np.ndarray]:
            logprobs = logits - np.logaddexp.reduce(logits)
            score = beta * (logprobs[chosen] - rejected_weight * logprobs[rejected]) - offset
            pull = beta * label / (1 + np.exp(score))
            slope = np.zeros(len(ANSWERS))
            np.add.at(slope, chosen, -pull)
            np.add.at(slope, rejected, rejected_weight * pull)
            return float((label * np.logaddexp(0, -score)).sum()), slope - np.exp(logprobs) * slope.sum()

        logits = optimize.minimize(loss, base, jac=True, method="BFGS", options={"gtol": 1e-9}).x
        found.append(logits - np.logaddexp.reduce(logits))
    return torch.from_numpy(np.stack(found))


def minimize(world: World, *, evaluations: int = 80, **loss: float) -> list[tuple[float, Tensor]]:
    """Return the population loss and the log-probs of all answers at each evaluation of a run of LBFGS over the adapters.

    Args:
        world: whose adapters are trained.
        evaluations: most evaluations of the loss; what comes of 80 was never further than 1e-8 nats from the minimum.
        loss: coefficients of `preference_loss`; beta is 1 if it is not said.
    """
    chosen, rejected = torch.tensor(list(itertools.permutations(range(len(ANSWERS)), 2))).T
    label = torch.sigmoid(world.reward[:, chosen] - world.reward[:, rejected]).flatten()
    reference = world.base_logprobs[:, chosen].flatten(), world.base_logprobs[:, rejected].flatten()
    optimizer = torch.optim.LBFGS(
        [weight for weight in world.policy.parameters() if weight.requires_grad],
        max_iter=evaluations, max_eval=evaluations, history_size=100, line_search_fn="strong_wolfe",
        tolerance_grad=1e-14, tolerance_change=1e-16,
    )  # fmt: skip
    trace: list[tuple[float, Tensor]] = []

    def population_loss() -> Tensor:
        optimizer.zero_grad()
        policy = logprobs_of_all_answers(world.policy)
        answers = policy[:, chosen].flatten(), policy[:, rejected].flatten()
        total = (label * preference_loss(*answers, *reference, **{"beta": 1.0, **loss}).loss).sum() / len(ANSWERS)
        total.backward()
        trace.append((total.item(), policy.detach()))
        return total

    optimizer.step(population_loss)
    return trace


def lowest(trace: list[tuple[float, Tensor]]) -> Tensor:
    """Return the log-probs where the loss was lowest."""
    return min(trace, key=lambda evaluation: evaluation[0])[1]


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p‖q) in nats from the log-probs of all answers, exact, the mean over prompts."""
    return float((p.exp() * (p - q)).sum(dim=1).mean())


def logprobs_of_all_answers(model: nn.Module) -> Tensor:
    """Return log π(answer | prompt), (prompts, 21)."""
    rows = [(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
    ids = torch.full((len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)), END)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor(prompt + answer)
        attention[row, :stop] = 1
        completion[row, len(prompt) : stop] = 1
    return completion_logprobs(model, ids, attention, completion).logprob.view(len(PROMPTS), len(ANSWERS))

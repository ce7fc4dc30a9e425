"""A language model small enough to write down whole: the minimum of the loss is where the theory puts it.

Five tokens, answers of at most two words: END, x END, x y with x, y among the other four: 1 + 4 + 16 = 21 answers to each of
two prompts. Preferences follow Bradley–Terry with a random reward r. The population loss over all ordered pairs, each weighted
with the chance of its label, has its minimum at

    π* ∝ π0^κ · exp(r/β),    κ = γ/β

and LoRA on every linear layer reaches it by LBFGS. Source: Rafailov et al. 2023 (arXiv 2305.18290) for κ = 1; Cho, "Continued
musing on DPO", for the tempered reference π0^κ.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pe_dpo.objective import answer_logprobs, preference_loss

END = 0
WORDS = (1, 2, 3, 4)
# The same last token, so that what comes before it matters. A prompt of one token would be the same context as that token
# twice: attention over equal tokens returns the same mean, and the optimum would be out of reach.
PROMPTS = ((1, 2), (4, 3, 2))
ANSWERS = ((END,), *((word, END) for word in WORDS), *itertools.product(WORDS, WORDS))
BETA = 1.0


class World(NamedTuple):
    """A base with fresh adapters, what it gave before they were attached, and the reward of every answer."""

    policy: PeftModel
    base_logprobs: Tensor
    """(prompts, 21) nats."""
    reward: Tensor
    """(prompts, 21)."""


@pytest.fixture
def world() -> World:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1 + len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8, bos_token_id=None, eos_token_id=END, pad_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    base = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(6)  # random weights alone leave every token nearly as likely as the next
        base_logprobs = logprobs_of_all_answers(base)
    adapters = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    policy = get_peft_model(base, adapters, autocast_adapter_dtype=False)
    return World(policy, base_logprobs, torch.randn(base_logprobs.shape, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_the_minimum_of_the_loss_is_the_tempered_reference_times_the_exponential_reward(world, gamma):
    """Three acceptance bounds: 1e-3 nats within 64 evaluations, 1e-6 within 140, and the same distance from π0."""
    target = torch.log_softmax(gamma / BETA * world.base_logprobs + world.reward / BETA, dim=1)
    trace = minimize(world, gamma, evaluations=140)
    assert kl(target, lowest(trace[:64])) < 1e-3
    found = lowest(trace[:140])
    assert kl(target, found) < 1e-6
    assert kl(found, world.base_logprobs) == pytest.approx(kl(target, world.base_logprobs), abs=1e-3)


def test_the_three_minima_are_far_apart(world):
    """Otherwise the test above could not tell one γ from another: every two differ by more than 0.02 nats."""
    minima = [torch.log_softmax(gamma / BETA * world.base_logprobs + world.reward / BETA, dim=1) for gamma in (0, 1, 2)]
    assert min(kl(one, other) for one, other in itertools.permutations(minima, 2)) > 0.02


def test_the_chances_of_all_answers_add_up_to_one(world):
    assert len(ANSWERS) == 21
    torch.testing.assert_close(world.base_logprobs.exp().sum(dim=1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_chances_still_add_up_to_one_after_training(world):
    trained = lowest(minimize(world, gamma=1.0, evaluations=30))
    assert kl(trained, world.base_logprobs) > 0.05
    torch.testing.assert_close(trained.exp().sum(dim=1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_fresh_adapters_leave_the_policy_at_the_reference_exactly(world):
    with torch.no_grad():
        assert torch.equal(logprobs_of_all_answers(world.policy), world.base_logprobs)


def test_disabling_trained_adapters_gives_back_the_frozen_base_exactly(world):
    minimize(world, gamma=1.0, evaluations=30)
    with torch.no_grad():
        assert not torch.equal(logprobs_of_all_answers(world.policy), world.base_logprobs)
        with world.policy.disable_adapter():
            assert torch.equal(logprobs_of_all_answers(world.policy), world.base_logprobs)


def minimize(world: World, gamma: float, evaluations: int) -> list[tuple[float, Tensor]]:
    """Return the population loss and the log-probs of all answers at each evaluation of a run of LBFGS."""
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
        loss = (label * preference_loss(*answers, *reference, beta=BETA, gamma=gamma).loss).sum() / len(ANSWERS)
        loss.backward()
        trace.append((loss.item(), policy.detach()))
        return loss

    optimizer.step(population_loss)
    return trace


def lowest(trace: list[tuple[float, Tensor]]) -> Tensor:
    """Return the log-probs where the loss was lowest."""
    return min(trace, key=lambda evaluation: evaluation[0])[1]


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p‖q) in nats, exact, the mean over prompts."""
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
    return answer_logprobs(model, ids, attention, completion).logprob.view(len(PROMPTS), len(ANSWERS))

"""A world in which all that a preference run is judged by can be computed exactly, at a quarter of a second for six seeds.

    π(k | i) ∝ exp(θ·φ_ik)          200 prompts to train on, 200 to measure on, 16 answers each, 32 features
    r_ik     = φ_ik·w + noise_ik    the noise is the answer's own: no θ can express it
    π0       = π at θ0, which points a little towards w: it ranks 52 to 59 % of pairs of answers right
    pairs    two different answers drawn from π0, labelled by Bradley–Terry; four to each prompt

Mixout acts on the trained difference: θ0 + M⊙(θ − θ0)/(1−p), a new mask in each step, none when measured. Several worlds are
trained at once, one per seed; they share nothing but the clock.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from pe_dpo.metrics.quadrants import quadrants
from pe_dpo.objective import PreferenceLoss, preference_loss

PROMPTS, ANSWERS, FEATURES, PAIRS_PER_PROMPT = 200, 16, 32, 4
SEEDS = range(6)
REFERENCE_SCALE = 1.5
"""Standard deviation of the reference's logits; its entropy is about 2.0 nats of log 16 = 2.8."""
REFERENCE_TILT = 0.2
"""Cosine between θ0 and w: what the reference knows of the reward."""
OWN_REWARD = 0.5
"""Standard deviation of the part of the reward (of variance 1) that no feature explains."""


class Worlds(NamedTuple):
    """S worlds; the first half of the prompts is trained on, the other half is measured."""

    features: Tensor
    """φ, (S, prompts, answers, features) float64."""
    reward: Tensor
    """r, (S, prompts, answers)."""
    reference: Tensor
    """θ0, (S, features)."""
    prompt: Tensor
    """(pairs,) the prompt of each training pair."""
    chosen: Tensor
    """(S, pairs) the answer that won."""
    rejected: Tensor
    """(S, pairs) the answer that lost."""


class Measures(NamedTuple):
    """Exact expectations over all answers to the prompts that were not trained on; (S,) each."""

    kl: Tensor
    """KL(π‖π0), nats."""
    reward: Tensor
    """E_π[r] − E_π0[r]."""
    entropy: Tensor
    """H(π), nats."""
    win_rate: Tensor
    """Chance that an answer of π has a higher reward than one of π0; a tie is ½."""
    accuracy: Tensor
    """Share of pairs of answers that π ranks as their rewards do."""
    chosen_shift: Tensor
    """Mean change of log π of the better answer of such a pair, nats."""
    rejected_shift: Tensor
    """The same of the worse answer."""


def make_worlds(seeds: Sequence[int] = SEEDS) -> Worlds:
    """Return one world per seed."""
    prompt = torch.arange(PROMPTS).repeat_interleave(PAIRS_PER_PROMPT)
    parts = [_world(torch.Generator().manual_seed(seed), prompt) for seed in seeds]
    features, reward, reference, chosen, rejected = (torch.stack(field) for field in zip(*parts, strict=True))
    return Worlds(features, reward, reference, prompt, chosen, rejected)


def independent_pairs(seeds: Sequence[int] = SEEDS, *, reference_sd: float = 2.0) -> Worlds:
    """Return worlds of two answers a prompt with a feature for each prompt, so that no pair moves another: Δπ_i = θ_i.

    Every reward of the chosen answer is the higher one; Δ0 is normal. Nothing is learned of prompts that are not trained on.
    """
    features = torch.zeros(2 * PROMPTS, 2, PROMPTS, dtype=torch.float64)
    features[torch.arange(PROMPTS), 0, torch.arange(PROMPTS)] = 1
    reference = torch.stack([_normal(torch.Generator().manual_seed(seed), PROMPTS) for seed in seeds])
    answer = torch.zeros(len(seeds), PROMPTS, dtype=torch.long)
    reward = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(seeds), 2 * PROMPTS, 2)
    features = features.expand(len(seeds), *features.shape)
    return Worlds(features, reward, reference_sd * reference, torch.arange(PROMPTS), answer, answer + 1)


def minimum(worlds: Worlds, *, beta: float | Tensor, gamma: float | Tensor, **options: Any) -> Tensor:
    """Return θ where the logistic loss is lowest, by Newton's method: what `train` comes to without mixout, given the time.

    The gradient is that of `preference_loss`; only the curvature, on which the minimum does not depend, is written out here.
    Newton's steps begin at κθ0, where the pairs are neither right nor wrong, and end when none moves a weight by 1e-9.

    Args:
        worlds: whose loss it is.
        beta: of the policy; a tensor (K,) has K runs side by side, as in `train`.
        gamma: of the reference.
        options: of `preference_loss`.

    Raises:
        ArithmeticError: 30 steps do not get there.
    """
    chosen, rejected = _features_of_pairs(worlds)
    difference, kappa = chosen - rejected, torch.as_tensor(gamma) / torch.as_tensor(beta)
    weights = kappa[..., None, None] * worlds.reference
    for _ in range(30):
        weights = weights.detach().requires_grad_()
        out = _loss(worlds, weights, chosen, rejected, beta=beta, gamma=gamma, **options)
        (slope,) = torch.autograd.grad(out.loss.sum(), weights)
        pull = torch.sigmoid(-out.score).view(*weights.shape[:-1], -1)
        curvature = torch.einsum("...sp,spd,spe->...sde", pull * (1 - pull), difference, difference)
        step = torch.linalg.solve(torch.as_tensor(beta)[..., None, None, None] ** 2 * curvature, slope)
        weights = weights - step
        if step.abs().max() < 1e-9:
            return weights.detach()
    raise ArithmeticError(f"the last step is {float(step.abs().max()):.1e} long")


def train(worlds: Worlds, **settings: Any) -> Tensor:
    """Return θ after training, (S, features), or (K, S, features) of K runs; see `trajectory`."""
    return trajectory(worlds, keep=(), **settings)[-1]


def trajectory(
    worlds: Worlds,
    *,
    beta: float | Tensor,
    gamma: float | Tensor,
    mixout: float | Tensor = 0.0,
    steps: int = 150,
    learning_rate: float = 0.05,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    keep: Collection[int] = (),
    **options: Any,
) -> list[Tensor]:
    """Return θ after each step in `keep`, and after the last; every step sees all pairs, and the rate falls to 0.

    Args:
        worlds: to train.
        beta: of the policy. It, `gamma`, `mixout` and `pair_margin` may be tensors (K,), one of each of K runs, which are
            trained side by side; θ then has the shape (K, S, features), and each run is what it is by itself.
        gamma: of the reference.
        mixout: p.
        steps: of the optimizer.
        learning_rate: of the first step.
        optimizer: made from the weights and the rate.
        keep: steps, counted from 1.
        options: of `preference_loss`.
    """
    chosen, rejected = _features_of_pairs(worlds)
    rate = torch.as_tensor(mixout, dtype=torch.float64)[..., None, None]
    runs = torch.broadcast_shapes(*(torch.as_tensor(value).shape for value in (beta, gamma, mixout)))
    weights = worlds.reference.expand(*runs, *worlds.reference.shape).clone().requires_grad_()
    stepper = optimizer([weights], lr=learning_rate)
    masks = torch.Generator().manual_seed(0)
    kept = []
    for step in range(1, steps + 1):
        stepper.param_groups[0]["lr"] = learning_rate * (1 - (step - 1) / steps)
        stepper.zero_grad()
        used = weights
        if rate.any():
            mask = torch.rand(worlds.reference.shape, generator=masks) >= rate  # the same draws for each run
            used = worlds.reference + mask * (weights - worlds.reference) / (1 - rate)
        out = _loss(worlds, used, chosen, rejected, beta=beta, gamma=gamma, **options)
        (out.loss.sum() / len(worlds.prompt)).backward()  # a mean over pairs, a sum over worlds: none sees another
        stepper.step()
        if step in keep:
            kept.append(weights.detach().clone())
    return [*kept, weights.detach()]


def pair_regimes(worlds: Worlds, weights: Tensor, **options: Any) -> list[dict[str, float]]:
    """Return the 2×2 table of each world's training pairs under θ; `options` are those of `preference_loss`."""
    chosen, rejected = _features_of_pairs(worlds)
    out = _loss(worlds, weights, chosen, rejected, **options)
    preferences = [_scores(chosen - rejected, theta) for theta in (weights, worlds.reference)]
    columns = *preferences, *(column.view_as(preferences[0]) for column in (out.score, out.weight))
    return [quadrants(*fields) for fields in zip(*columns, strict=True)]


def all_logprobs(features: Tensor, weights: Tensor) -> Tensor:
    """Return log π(k | i) under θ, (S, prompts, answers)."""
    return torch.log_softmax(torch.einsum("spkd,sd->spk", features, weights), dim=2)


def measure(worlds: Worlds, weights: Tensor) -> Measures:
    """Return what θ is worth on the prompts that were not trained on."""
    half = worlds.features.shape[1] // 2
    reward = worlds.reward[:, half:]
    policy, reference = (all_logprobs(worlds.features[:, half:], theta) for theta in (weights, worlds.reference))
    chance, reference_chance = policy.exp(), reference.exp()
    better = (reward[..., :, None] > reward[..., None, :]).double()
    wins = better + 0.5 * (reward[..., :, None] == reward[..., None, :])
    right = better * (policy[..., :, None] > policy[..., None, :])
    shift = policy - reference
    return Measures(
        kl=(chance * shift).sum(2).mean(1),
        reward=((chance - reference_chance) * reward).sum(2).mean(1),
        entropy=-(chance * policy).sum(2).mean(1),
        win_rate=(chance[..., :, None] * reference_chance[..., None, :] * wins).sum((2, 3)).mean(1),
        accuracy=right.sum((1, 2, 3)) / better.sum((1, 2, 3)),
        chosen_shift=(better.sum(3) * shift).sum((1, 2)) / better.sum((1, 2, 3)),
        rejected_shift=(better.sum(2) * shift).sum((1, 2)) / better.sum((1, 2, 3)),
    )


def reward_at(runs: Sequence[Measures], kl: Tensor) -> Tensor:
    """Return the reward of each seed at its KL, (S,), by straight lines over √KL between runs; NaN where none was as far.

    Args:
        runs: of one dial, in the order of their KL.
        kl: (S,) nats.

    Raises:
        ValueError: a seed has its runs in another order.
    """
    roots, rewards = torch.stack([run.kl.sqrt() for run in runs]), torch.stack([run.reward for run in runs])
    if not bool((roots.diff(dim=0) > 0).all()):
        raise ValueError(f"the KL of some seed does not rise along the runs: {roots.square().tolist()}")
    seeds = zip(kl.sqrt(), roots.T, rewards.T, strict=True)
    found = [np.interp(at, root, reward, left=math.nan, right=math.nan) for at, root, reward in seeds]
    return torch.tensor(found, dtype=torch.float64)


def interval(values: Tensor) -> tuple[float, float]:
    """Return the 95 % interval of the mean over seeds, by Student's t."""
    half = float(student.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def _features_of_pairs(worlds: Worlds) -> tuple[Tensor, Tensor]:
    """φ of the chosen and the rejected answers, (S, pairs, features) each."""
    world = torch.arange(len(worlds.chosen))[:, None]
    return worlds.features[world, worlds.prompt, worlds.chosen], worlds.features[world, worlds.prompt, worlds.rejected]


def _loss(worlds: Worlds, weights: Tensor, chosen: Tensor, rejected: Tensor, **options: Any) -> PreferenceLoss:
    """The loss of each pair of each world, and of each run where θ has K of them, in one row; its features are handed in."""
    policy = [_scores(side, weights) for side in (chosen, rejected)]
    reference = [_scores(side, worlds.reference).expand_as(policy[0]) for side in (chosen, rejected)]
    for name, value in options.items():
        if isinstance(value, Tensor):
            options[name] = value[:, None, None].expand_as(policy[0]).flatten()
    return preference_loss(*(side.flatten() for side in (*policy, *reference)), **options)


def _scores(features: Tensor, weights: Tensor) -> Tensor:
    """θ·φ, (…, S, pairs): log π up to the prompt's normaliser, which is the same for both answers of a pair and cancels."""
    return torch.einsum("spd,...sd->...sp", features, weights)


def _world(generator: torch.Generator, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    features = _normal(generator, 2 * PROMPTS, ANSWERS, FEATURES)
    taste, other = _normal(generator, FEATURES), _normal(generator, FEATURES)
    taste = taste / taste.norm()
    other = other - (other @ taste) * taste
    reference = REFERENCE_SCALE * (REFERENCE_TILT * taste + (1 - REFERENCE_TILT**2) ** 0.5 * other / other.norm())
    own = OWN_REWARD * _normal(generator, 2 * PROMPTS, ANSWERS)
    reward = (1 - OWN_REWARD**2) ** 0.5 * features @ taste + own
    answers = torch.multinomial(torch.softmax(features @ reference, dim=1)[prompt], 2, generator=generator)
    one, two = answers.T
    one_wins = torch.rand(len(prompt), generator=generator) < torch.sigmoid(reward[prompt, one] - reward[prompt, two])
    return features, reward, reference, torch.where(one_wins, one, two), torch.where(one_wins, two, one)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

"""The generalized preference loss: one formula, a separate coefficient for policy and reference.

    z    = β·Δπ − γ·max(Δ0, floor) − m          Δ = log-prob(chosen) − λ·log-prob(rejected), summed or per token
    m    = margin + pair_margin − length_penalty·(|chosen| − |rejected|)
    loss = mix[link](z) + sft_weight·NLL(chosen)/|chosen|

γ = β with the logistic link is DPO; γ = 0 with a margin and per-token log-probs is SimPO; λ below 1 (`rejected_weight`) is
DPO-Shift. `mix` is label smoothing, which weighs the loss of a pair against that of the same pair with its labels swapped; then
λ is on the answer that is labelled chosen. Elsewhere in the package Δ is without λ: what a model prefers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pe_dpo.links import LinkName, link_value
from pe_dpo.objective.logprobs import PairLogprobs

Reduce = Literal["sum", "mean"]
SmoothingMode = Literal["conservative", "unbiased"]


class PreferenceLoss(NamedTuple):
    """What `preference_loss` returns; every field is one number per pair, shape (B,)."""

    loss: Tensor
    """Loss in nats (or in the link's own unit); carries the gradient."""
    score: Tensor
    """z, detached."""
    chosen_reward: Tensor
    """β·log π(chosen) − γ·log π0(chosen), detached."""
    rejected_reward: Tensor
    """The same for the rejected answer, detached."""
    weight: Tensor
    """−∂loss/∂(β·log π(chosen)) without the SFT term: how hard this pair pulls its chosen answer up (per token with
    reduce="mean"), detached; negative where it pulls back (squared link beyond its target, smoothing). Its rejected answer is
    pulled down λ times as hard."""


class PairTerms(NamedTuple):
    """What the data give each pair beside its answers, as `Loss` takes it: (B,) each."""

    margin: Tensor
    """Zeros without one."""
    beta: Tensor | None = None
    """In the place of the loss's, > 0; NaN, or None for all: the loss's."""
    weight: Tensor | None = None
    """What the loss of each pair is multiplied by, >= 0; None: 1."""


@dataclass(frozen=True)
class Loss:
    """The coefficients of a loss, as a function of log-probs: `Loss(**recipe.loss.coefficients())(policy, reference, margin)`.

    Every field is an argument of `preference_loss` and is explained there, but for `margin_scale`.
    """

    beta: float
    gamma: float
    margin: float = 0.0
    link: LinkName = "logistic"
    reduce: Reduce = "sum"
    reference_floor: float | None = None
    label_smoothing: float = 0.0
    label_smoothing_mode: SmoothingMode = "conservative"
    sft_weight: float = 0.0
    length_penalty: float = 0.0
    rejected_weight: float = 1.0
    margin_scale: float = 0.0
    """Times the margin that the data give each pair, added to `margin`."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on the reference's log-probs."""
        return self.gamma != 0

    def with_gamma(self, gamma: float) -> "Loss":
        """Return the same loss with another weight of the reference; without a reference its floor has no meaning and goes."""
        return replace(self, gamma=gamma, reference_floor=self.reference_floor if gamma else None)

    def beta_of_pairs(self, beta: Tensor | None) -> Tensor | float:
        """Return the coefficient of the policy: of all pairs where none has its own, else of each, (B,)."""
        return self.beta if beta is None else torch.where(beta.isnan(), self.beta, beta)

    def __call__(
        self,
        policy: PairLogprobs,
        reference: PairLogprobs | None,
        margin: Tensor,
        beta: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> PreferenceLoss:
        """Return the loss of pairs from their log-probs; `weight` is in units of this loss's β, so that pairs' pulls compare.

        Args:
            policy: log-probs under π, with gradients in training; they have the lengths, too.
            reference: the same under π0; may be None if and only if gamma is 0.
            margin: of each pair, as the data have it, (B,); zeros without one.
            beta: of each pair in the place of this loss's, (B,), NaN for this loss's; γ stays κ times it.
            weight: of each pair, (B,): its loss is multiplied by it, the SFT term too. The mean over pairs stays one.

        Raises:
            ValueError: see `preference_loss`.
        """
        own = self.beta_of_pairs(None if beta is None else beta.to(policy.chosen.dtype))
        out = preference_loss(
            policy.chosen,
            policy.rejected,
            None if reference is None else reference.chosen,
            None if reference is None else reference.rejected,
            beta=own,
            gamma=self.gamma if beta is None or not self.gamma else self.gamma / self.beta * own,
            margin=self.margin,
            link=self.link,
            reduce=self.reduce,
            chosen_lengths=policy.chosen_lengths,
            rejected_lengths=policy.rejected_lengths,
            reference_floor=self.reference_floor,
            label_smoothing=self.label_smoothing,
            label_smoothing_mode=self.label_smoothing_mode,
            sft_weight=self.sft_weight,
            length_penalty=self.length_penalty,
            rejected_weight=self.rejected_weight,
            pair_margin=self.margin_scale * margin if self.margin_scale else None,
        )
        if beta is None and weight is None:
            return out
        share = 1.0 if weight is None else weight.to(out.loss.dtype)
        return out._replace(loss=share * out.loss, weight=share * out.weight * own / self.beta)


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    gamma: float | Tensor | None = None,
    margin: float = 0.0,
    link: LinkName | Callable[[Tensor], Tensor] = "logistic",
    reduce: Reduce = "sum",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reference_floor: float | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_mode: SmoothingMode = "conservative",
    sft_weight: float = 0.0,
    length_penalty: float = 0.0,
    rejected_weight: float = 1.0,
    pair_margin: Tensor | None = None,
) -> PreferenceLoss:
    """Return the loss of each pair, its score, both rewards, and the weight with which it drives learning.

    Args:
        policy_chosen: summed log-prob of each chosen answer under π; (B,), nats, float32 or float64.
        policy_rejected: the same for the rejected answers.
        reference_chosen: the same under π0, without gradient; may be None if and only if gamma is 0.
        reference_rejected: the same under π0.
        beta: coefficient of the policy, > 0; of all pairs or of each, (B,), in the dtype of `policy_chosen`.
        gamma: coefficient of the reference, >= 0, as beta; None means beta, which is DPO.
        margin: constant subtracted from the score.
        link: "logistic" −log σ(z), "hinge" max(0, −z) with subgradient 0 at z = 0, "squared" z², or any callable
            (B,) → (B,) that decreases where a pair should still be learned.
        reduce: "sum" takes log-probs as they come; "mean" divides each by the length of its answer.
        chosen_lengths: tokens per chosen answer, (B,), each >= 1; needed by "mean", `sft_weight` and `length_penalty`.
        rejected_lengths: tokens per rejected answer, (B,).
        reference_floor: lower bound of Δ0 (0 gives HyPO); None for no bound.
        label_smoothing: assumed probability ε in [0, ½) that a label is wrong.
        label_smoothing_mode: "conservative" (1−ε)·f(z) + ε·f(z′), or "unbiased" ((1−ε)·f(z) − ε·f(z′))/(1−2ε), where z′
            is the score of the pair with its labels swapped.
        sft_weight: weight of the per-token negative log-likelihood of the chosen answer, >= 0.
        length_penalty: α of R-DPO, added to the score as α·(|chosen| − |rejected|).
        rejected_weight: λ > 0, on the rejected answer's log-probs under both models; below 1 it is DPO-Shift.
        pair_margin: further margin per pair, (B,); it keeps its sign when labels are swapped.

    Returns:
        PreferenceLoss of five (B,) tensors in the dtype of `policy_chosen`, to which all other tensors are cast.

    Raises:
        ValueError: shapes differ, a needed tensor is missing, or a coefficient is out of range.

    Example:
        With β = γ = 0.1, Δπ = 4 and Δ0 = 2 the score is 0.2 and the logistic loss log(1 + e^−0.2) = 0.598.

    Source:
        Rafailov et al. 2023 (arXiv 2305.18290) eq. 7 for γ = β; Cho, "Continued musing on DPO", for γ apart from β;
        Mitchell 2023 and Chowdhury et al. 2024 (arXiv 2403.00409) for the two smoothings; Park et al. 2024 (arXiv 2403.19159)
        for the length penalty; Yang et al. 2025 (arXiv 2502.07599) for the weight of the rejected answer, their f(λ).
    """
    gamma = beta if gamma is None else gamma
    _check_coefficients(
        beta, gamma, reduce, reference_floor, label_smoothing, label_smoothing_mode, sft_weight, rejected_weight
    )
    tensors = {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "pair_margin": pair_margin,
    }
    pi_chosen, pi_rejected, ref_chosen, ref_rejected, len_chosen, len_rejected, extra_margin = _alike(
        tensors, gamma=gamma, needs_lengths=reduce == "mean" or sft_weight != 0 or length_penalty != 0
    )

    def reward(policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        total = beta * policy - gamma * reference
        return (total / lengths if reduce == "mean" else total).detach()

    both_ways = partial(_both_ways, lengths=(len_chosen, len_rejected), reduce=reduce, rejected_weight=rejected_weight)
    policies, references = both_ways(pi_chosen, pi_rejected), both_ways(ref_chosen.detach(), ref_rejected.detach())
    if reference_floor is not None:
        references = [reference.clamp(min=reference_floor) for reference in references]
    tilt = length_penalty * (len_chosen - len_rejected)

    def scores(policies: Sequence[Tensor]) -> list[Tensor]:
        """z as labelled, and z′ with the labels swapped."""
        found = zip((1, -1), policies, references, strict=True)
        return [beta * policy - gamma * floored - margin - extra_margin + sign * tilt for sign, policy, floored in found]

    def mixed(*policies: Tensor) -> Tensor:
        straight, swapped = scores(policies)
        if label_smoothing == 0:
            return apply_link(link, straight)
        straight, swapped = (1 - label_smoothing) * apply_link(link, straight), label_smoothing * apply_link(link, swapped)
        if label_smoothing_mode == "conservative":
            return straight + swapped
        return (straight - swapped) / (1 - 2 * label_smoothing)

    loss, (slope, swapped_slope) = mixed(*policies), _slopes(mixed, policies)
    return PreferenceLoss(
        loss=loss if sft_weight == 0 else loss - sft_weight * pi_chosen / len_chosen,
        score=scores(policies)[0].detach(),
        chosen_reward=reward(pi_chosen, ref_chosen, len_chosen),
        rejected_reward=reward(pi_rejected, ref_rejected, len_rejected),
        weight=-(slope - rejected_weight * swapped_slope) / beta,
    )


def apply_link(link: LinkName | Callable[[Tensor], Tensor], score: Tensor) -> Tensor:
    """Return link(score), elementwise; see `links.link_value` for those that have a name.

    Raises:
        ValueError: `link` is a string that names no link.
    """
    if callable(link):
        return link(score)
    if link not in get_args(LinkName):
        raise ValueError(f"link is {link!r}: expected one of {', '.join(get_args(LinkName))}, or a callable")
    return link_value(link, score)


def _both_ways(
    chosen: Tensor, rejected: Tensor, *, lengths: tuple[Tensor, Tensor], reduce: Reduce, rejected_weight: float
) -> list[Tensor]:
    """log p(chosen) − λ·log p(rejected), and log p(rejected) − λ·log p(chosen); summed or per token."""
    ways = (chosen, rejected, *lengths), (rejected, chosen, *reversed(lengths))
    if reduce == "sum":
        return [one - rejected_weight * other for one, other, *_ in ways]
    # One division for both answers: two would miss a hinge's kink by a rounding error.
    product = lengths[0] * lengths[1]
    return [(one * len_other - rejected_weight * other * len_one) / product for one, other, len_one, len_other in ways]


def _slopes(function: Callable[..., Tensor], at: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Derivatives of an elementwise function by each of its arguments, detached; 0 by one that it does not depend on."""
    with torch.inference_mode(False), torch.enable_grad():
        points = [each.detach().clone().requires_grad_() for each in at]
        return torch.autograd.grad(function(*points).sum(), points, allow_unused=True, materialize_grads=True)


def _check_coefficients(
    beta: float | Tensor,
    gamma: float | Tensor,
    reduce: str,
    reference_floor: float | None,
    label_smoothing: float,
    label_smoothing_mode: str,
    sft_weight: float,
    rejected_weight: float,
) -> None:
    if not bool((torch.as_tensor(beta) > 0).all()):
        raise ValueError(f"beta is {beta}: it must be > 0")
    if not bool((torch.as_tensor(gamma) >= 0).all()):
        raise ValueError(f"gamma is {gamma}: it must be >= 0")
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce is {reduce!r}: expected {' or '.join(get_args(Reduce))}")
    if reference_floor is not None and not bool(torch.as_tensor(gamma).any()):
        raise ValueError("reference_floor has no effect with gamma=0: drop it, or set gamma > 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must lie in [0, 0.5)")
    if label_smoothing_mode not in get_args(SmoothingMode):
        raise ValueError(f"label_smoothing_mode is {label_smoothing_mode!r}: expected {' or '.join(get_args(SmoothingMode))}")
    if not sft_weight >= 0:
        raise ValueError(f"sft_weight is {sft_weight}: it must be >= 0")
    if not 0 < rejected_weight < float("inf"):
        raise ValueError(f"rejected_weight is {rejected_weight}: it must be finite and > 0")
    if rejected_weight != 1 and reference_floor is not None:
        raise ValueError("reference_floor bounds Δ0, which is not in the score with rejected_weight other than 1: drop one")


def _alike(tensors: dict[str, Tensor | None], *, gamma: float | Tensor, needs_lengths: bool) -> list[Tensor]:
    """The tensors in the dtype of the first, zeros for those that are neither given nor needed."""
    if not bool(torch.as_tensor(gamma).any()):
        tensors |= {"reference_chosen": None, "reference_rejected": None}
    elif tensors["reference_chosen"] is None or tensors["reference_rejected"] is None:
        raise ValueError(f"gamma is {gamma}: reference_chosen and reference_rejected are needed (only gamma=0 does without)")
    if needs_lengths and (tensors["chosen_lengths"] is None or tensors["rejected_lengths"] is None):
        raise ValueError("chosen_lengths and rejected_lengths are needed by reduce='mean', sft_weight and length_penalty")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"one number per pair is needed, all of one shape (B,); found {shapes}")
    first = tensors["policy_chosen"]
    assert first is not None, "a required argument"
    return [torch.zeros_like(first) if tensor is None else tensor.to(first.dtype) for tensor in tensors.values()]

"""What quantizing the base does to the reference's preferences: η = Δ0 of the quantized base − Δ0 of the plain one.

Policy and reference share the quantized base, so η cancels from the score at step 0 where γ = β, and leaks in as (β−γ)·η
otherwise. It comes back whole when an adapter is merged into the plain base: there every Δπ moves by about −η.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pe_dpo.audit.forecast import scores
from pe_dpo.disk import json_without_nan
from pe_dpo.inference.logprobs import PairLogprobs
from pe_dpo.inference.pairs import preferences
from pe_dpo.metrics.estimates import correlation
from pe_dpo.recipe.loss_section import LossSection


@dataclass(frozen=True)
class QuantizationNoise:
    """Two passes over the same pairs; Δ0 is summed or per token, as in the loss."""

    quantize: str
    """nf4, nf4-single or int8."""
    against: str
    """dtype of the plain base: float32 or bfloat16."""
    pairs: int
    shift_per_token: float
    """Mean change of log p per answer token, nats."""
    slope: float
    """Of quantized on plain Δ0, through the origin: the exponent α with which π0 is tempered; γ/slope undoes it."""
    rms: float
    """√mean η², nats."""
    reliability: float
    """1 − Var(η)/Var(quantized Δ0): what a Platt scale is attenuated by."""
    flips: float
    """Share of pairs whose Δ0 changes sign, by sums."""
    flips_per_token: float
    """The same per token."""
    length_correlation: float
    """Of η with |chosen| − |rejected|; NaN where one is constant."""
    weight_change: float
    """Mean |Δw| at step 0 with the γ of the loss; 0 where γ = β."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return json_without_nan(asdict(self))


def quantization_noise(
    quantized: PairLogprobs,
    exact: PairLogprobs,
    loss: LossSection,
    gamma: float,
    margins: Tensor,
    *,
    quantize: str,
    against: str,
) -> QuantizationNoise:
    """Return how two references differ.

    Args:
        quantized: log-probs of the pairs under the quantized base.
        exact: of the same pairs under the plain one.
        loss: of the recipe.
        gamma: in place of the loss's own.
        margins: the data's margin column, (B,).
        quantize: how the one was loaded.
        against: dtype of the other.
    """
    with_noise, without = (torch.from_numpy(preferences(one, loss.reduce)) for one in (quantized, exact))
    noise = with_noise - without
    tokens = int((exact.chosen_lengths + exact.rejected_lengths).sum())
    lengths = (exact.chosen_lengths - exact.rejected_lengths).double()
    change = quantized.chosen + quantized.rejected - exact.chosen - exact.rejected
    weights = [scores(loss, gamma, one, margins)[0].weight for one in (quantized, exact)]
    return QuantizationNoise(
        quantize=quantize,
        against=against,
        pairs=len(noise),
        shift_per_token=float(change.sum()) / tokens,
        slope=_ratio(float(with_noise @ without), float(without @ without)),
        rms=float(noise.square().mean().sqrt()),
        reliability=1 - _ratio(float(noise.var(correction=0)), float(with_noise.var(correction=0))),
        flips=_flips(quantized, exact, "sum"),
        flips_per_token=_flips(quantized, exact, "mean"),
        length_correlation=correlation(noise, lengths),
        weight_change=float((weights[0] - weights[1]).abs().mean()),
    )


def _flips(one: PairLogprobs, other: PairLogprobs, reduce: str) -> float:
    signs = [torch.from_numpy(preferences(logprobs, reduce)).sign() for logprobs in (one, other)]
    return float((signs[0] != signs[1]).double().mean())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

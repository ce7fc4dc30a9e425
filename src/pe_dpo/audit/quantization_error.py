"""What quantizing the base does to the reference's preferences: η = Δ0 of the quantized base − Δ0 of the plain one.

Policy and reference share the quantized base, so η cancels from the score at step 0 where γ = β, and leaks in as (β−γ)·η
otherwise. It comes back whole when an adapter is merged into the plain base: there every Δπ moves by about −η.
"""

import math
from dataclasses import dataclass

import numpy as np

from pe_dpo.inference.pairs import preferences
from pe_dpo.metrics.estimates import correlation
from pe_dpo.objective import Loss, PairLogprobs, PairTerms


@dataclass(frozen=True)
class QuantizationError:
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


def quantization_error(
    quantized: PairLogprobs, exact: PairLogprobs, loss: Loss, terms: PairTerms, *, quantize: str, against: str
) -> QuantizationError:
    """Return how two references differ.

    Args:
        quantized: log-probs of the pairs under the quantized base.
        exact: of the same pairs under the plain one.
        loss: of the recipe.
        terms: what the data give the pairs.
        quantize: how the one was loaded.
        against: dtype of the other.
    """
    both = quantized, exact
    (summed, summed_exact), (per_token, per_token_exact) = ([preferences(one, how) for one in both] for how in ("sum", "mean"))
    ours, plain = (summed, summed_exact) if loss.reduce == "sum" else (per_token, per_token_exact)
    error = ours - plain
    lengths = exact.chosen_lengths - exact.rejected_lengths
    moved = quantized.chosen + quantized.rejected - exact.chosen - exact.rejected
    weight, weight_exact = (loss(one, one, *terms).weight for one in both)
    return QuantizationError(
        quantize=quantize,
        against=against,
        pairs=len(error),
        shift_per_token=float(moved.sum()) / int((exact.chosen_lengths + exact.rejected_lengths).sum()),
        slope=float(ours @ plain) / (float(plain @ plain) or math.nan),
        rms=float(np.sqrt(np.mean(error**2))),
        reliability=1 - float(np.var(error)) / (float(np.var(ours)) or math.nan),
        flips=float(np.mean(np.sign(summed) != np.sign(summed_exact))),
        flips_per_token=float(np.mean(np.sign(per_token) != np.sign(per_token_exact))),
        length_correlation=correlation(error, lengths),
        weight_change=float((weight - weight_exact).abs().mean()),
    )

"""What rounding does to the log-probs of a model, token by token, and whether two ways through it agree within that.

One number is never asked: a sum of log-probs wanders with its length, a head of large logits multiplies every error, and in a
mixture a rounding error can send a token to another expert. A way that is wrong (another pair is seen, a prompt is lost,
positions or a window are off) moves most tokens of an answer by more than rounding does, or many of them by far more.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pe_dpo.data.batches import pad
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.objective.head import wide_logits
from pe_dpo.objective.logprobs import completion_token_logprobs

ROUNDING = {torch.float64: 2.0**-50, torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What the dtype's rounding does to the log-prob of a token, by the token's top logit: one rounding of the last hidden state in
half precision, eight in full, where sums count more than what they are rounded to."""

LEAST_NOISE = 1e-5
"""Nats; no fault moves a token by as little."""
MOST_NOISE = 16.0
"""Times `least_noise`: 2.5 were measured with 24 random layers in bfloat16. What is more is not rounding."""

TYPICAL, OF_AN_ANSWER, OUTLYING = 3.0, 4.0, 8.0
"""How many times the noise may separate two right ways: at the median of all tokens, at that of an answer of 16 tokens or more,
and at all tokens but `SPARED`. In bfloat16 30 models with heads once, twice and three times as large stayed within these, and
990 planted faults did not (benchmarks/results/packing-check.json)."""

SPARED = 2, 0.02
"""Tokens that may be further apart: a number, and a share of all."""


class Rounding(NamedTuple):
    """The noise of one model."""

    noise: float
    """Nats by which rounding moves the log-prob of a token, the median."""
    of_an_answer: float = 0.0
    """The median within the answer that it moves most: a token of its prompt may have gone to another expert."""
    outliers: float = 0.0
    """Share of tokens that it moves by more than OUTLYING times the noise."""

    @classmethod
    def of(cls, differences: Sequence[Tensor], least: float) -> "Rounding":
        """Return the noise that two right ways show in the log-probs of each answer's tokens; at least some."""
        every = torch.cat(list(differences)).abs()
        noise = max(float(every.median()), least)
        return cls(noise, max(_medians(differences), default=0.0), float((every > OUTLYING * noise).double().mean()))

    def refutation(self, differences: Sequence[Tensor]) -> str | None:
        """Return how far two ways are apart if that is more than rounding, or None.

        Args:
            differences: of the log-probs of each answer's tokens, (A,) nats.
        """
        every = torch.cat(list(differences)).abs()
        far = every[~(every <= TYPICAL * self.noise)]  # NaN is
        most = max(OF_AN_ANSWER * self.noise, 2 * self.of_an_answer)
        if (
            every.median() <= TYPICAL * self.noise
            and all(median <= most for median in _medians(differences))
            and (~(far <= OUTLYING * self.noise)).sum() <= SPARED[0] + (SPARED[1] + 2 * self.outliers) * len(every)
        ):
            return None
        return f"by {far.median():.2g} nats at {len(far)} of {len(every)} tokens, where rounding makes {self.noise:.2g}"


def _medians(differences: Sequence[Tensor]) -> list[float]:
    """The medians of answers of 16 tokens or more."""
    return [float(difference.abs().median()) for difference in differences if len(difference) >= 16]


def least_noise(model: Any, pair: EncodedPair, dtype: torch.dtype) -> float:
    """Return nats by which rounding moves the log-prob of a token at least.

    Args:
        model: a causal LM.
        pair: its answers' tokens are looked at.
        dtype: that the model computes in.
    """
    tops: list[Tensor] = []

    def watched(**inputs: Any) -> Any:
        out = model(**inputs)
        logits = out.logits.double()
        tops.append((logits.amax(dim=-1) - logits.mean(dim=-1)).median())
        return out

    with torch.no_grad(), wide_logits(model.get_output_embeddings()):
        completion_token_logprobs(watched, *pad([pair], model.device))
    return max(LEAST_NOISE, ROUNDING[dtype] * float(tops[0]))

"""How strong a p of mixout is: how far the masks move a pair's score, beside how far training moved it.

    margin_noise = √mean_pairs Var_M[z] / √mean_pairs (z − z0)²

p means different things for different forms, widths, ranks and stages of training; this ratio can be compared. Since z is
β·Δπ minus what does not depend on the policy, β and γ cancel, and it is the noise of Δπ over its shift Δπ − Δ0.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.inference.scorer import Scorer
from pe_dpo.model.mixout import Mixout
from pe_dpo.objective import PairLogprobs

PAIRS, MASKS = 16, 16
"""Scored under so many masks. The masks' standard deviation is known to about a sixth with 16 of them."""


class MixoutNoise(NamedTuple):
    """What the masks did to a probe of pairs.

    Args:
        margin_noise: sd over masks of a pair's score / size of the score's shift; root mean squares over pairs. None while
            nothing is learned.
        noise: the numerator, in nats of Δπ (per token with reduce: mean).
        shift: the denominator, likewise.
        pairs: of the probe.
        masks: that were drawn.
    """

    margin_noise: float | None
    noise: float
    shift: float
    pairs: int
    masks: int

    def words(self) -> str:
        """Return it as a phrase for people."""
        if self.margin_noise is None:
            return "nothing was learned, so that there is nothing for a mask to move"
        return (
            f"a mask moves a score by {self.margin_noise:.2f} of what training moved it (margin_noise; {self.pairs} pairs, "
            f"{self.masks} masks)"
        )


def measure_noise(
    model: Any,
    mixout: Mixout,
    pairs: Sequence[EncodedPair],
    scorer: Scorer,
    reference: PairLogprobs,
    *,
    reduce: Literal["sum", "mean"],
    masks: int = MASKS,
) -> MixoutNoise:
    """Score a few pairs under some masks, and without any.

    Args:
        model: the policy.
        mixout: attached to it; p as it is now. Its draw is left as it was.
        pairs: the first `PAIRS` of them are taken.
        scorer: the way through the model.
        reference: log-probs of all the pairs under π0.
        reduce: of the loss: scores of summed log-probs, or per token.
        masks: how many to draw; not those of any training step.
    """
    probe = pairs[:PAIRS]

    def preferences() -> Tensor:
        return _preference(scorer.score_pairs(model, probe), reduce)

    whole = preferences()
    moved = whole - _preference(PairLogprobs(*(field[: len(probe)] for field in reference)), reduce)
    drawn = []
    for number in range(masks):
        with mixout.sampled((-1, number)):
            drawn.append(preferences())
    noise = float(torch.stack(drawn).var(dim=0).mean().sqrt())
    shift = float(moved.square().mean().sqrt())
    return MixoutNoise(noise / shift if shift else None, noise, shift, len(probe), masks)


def _preference(scored: PairLogprobs, reduce: str) -> Tensor:
    """Δ of each pair, nats."""
    if reduce == "mean":
        return scored.chosen / scored.chosen_lengths - scored.rejected / scored.rejected_lengths
    return scored.chosen - scored.rejected

"""γ from the reference's own log-probs, in one of three ways.

    auto       γ = max(0, τ̂),  τ̂ = argmax_τ Σ log σ(τ·Δ0)    the scale at which Δ0 is right as often as σ(τ·Δ0) claims
    balance:S  Σ w over pairs with Δ0 > 0, as a share of Σ w, is S at step 0
    scale:G    γ = G / (1.4826 · median |Δ0 − median Δ0|)      γ·Δ0 has spread G

Δ0 is summed or per token, as in the loss. When π0 becomes π0^α, γ of auto and scale becomes γ/α. That of balance does so where
β is divided by α too: its weights are those of step 0, where the policy is π0^α as well.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from pe_dpo.audit.label_fit import LabelFit
from pe_dpo.disk import json_without_nan
from pe_dpo.errors import UsageError
from pe_dpo.inference.pairs import preferences
from pe_dpo.links import LinkName, link_named, link_weight
from pe_dpo.metrics.reference_accuracy import robust_spread
from pe_dpo.objective import PairLogprobs, PairTerms
from pe_dpo.recipe.loss_section import CALIBRATED, LossSection

LARGEST_MISS = 0.01
"""By which the share of a hinge, whose weights are 0 or 1, may miss the one that balance asks for."""


@dataclass(frozen=True)
class Calibration:
    """A γ that was found, and what it rests on."""

    asked: str
    """As in the recipe: auto, balance:S or scale:G."""
    gamma: float
    pairs: int
    prompts: int
    interval: tuple[float, float] | None = None
    """95 % of γ, of auto alone."""
    label_fit: LabelFit | None = None
    """Of auto alone."""
    share: float | None = None
    """Of balance: the share of gradient weight that this γ gives."""
    spread: float | None = None
    """Of scale: 1.4826 · median |Δ0 − median Δ0|, nats."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers that are not finite are null, and the fit is called evidence."""
        values = asdict(self)
        fit = values.pop("label_fit")
        return json_without_nan({**values, "evidence": fit and vars(fit)})


def calibrate_loss(loss: LossSection, reference: PairLogprobs, terms: PairTerms, prompt_keys: Sequence[str]) -> Calibration:
    """Return the γ that a loss asks for, from the reference's log-probs of its training pairs.

    Args:
        loss: with `gamma` auto, balance:S or scale:G.
        reference: log-probs of the training pairs.
        terms: what the data give the pairs; a weight counts in shares of gradient weight alone.
        prompt_keys: (B,); pairs of one prompt are resampled together.

    Raises:
        UsageError: no γ does what is asked; the message says what is reachable.
    """
    if terms.beta is not None:
        raise UsageError(
            f"loss.gamma: {loss.gamma}: finds one number, and each pair has a γ in a fixed ratio to its own β; write a "
            "multiple of beta such as 1x"
        )
    if loss.rejected_weight != 1:
        raise UsageError(
            f"loss.gamma: {loss.gamma}: rests on Δ0, which is not in the score with rejected_weight {loss.rejected_weight:g}; "
            "write a number, or a multiple of beta such as 1x"
        )
    lengths = (reference.chosen_lengths - reference.rejected_lengths).double().numpy()
    return calibrate_gamma(
        str(loss.gamma),
        preferences(reference, loss.reduce),
        beta=loss.beta,
        margin=loss.margin + loss.margin_scale * terms.margin.double().numpy() - loss.length_penalty * lengths,
        prompt_keys=prompt_keys,
        length_difference=lengths,
        link=loss.link,
        reference_floor=loss.reference_floor,
        weights=None if terms.weight is None else terms.weight.numpy(),
    )


def calibrate_gamma(
    asked: str,
    preference: np.ndarray | Tensor,
    *,
    beta: float,
    prompt_keys: Sequence[str],
    margin: float | np.ndarray = 0.0,
    length_difference: np.ndarray | None = None,
    link: LinkName = "logistic",
    reference_floor: float | None = None,
    weights: np.ndarray | None = None,
) -> Calibration:
    """Return γ found in one of the three ways.

    Args:
        asked: "auto", "balance:S" with S in (0, 1), or "scale:G" with G > 0.
        preference: Δ0 of each pair, (B,) nats, finite; summed or per token as in the loss.
        beta: coefficient of the policy, > 0 (for balance).
        prompt_keys: (B,); pairs of one prompt are resampled together.
        margin: of all pairs or each, (B,) (for balance).
        length_difference: |chosen| − |rejected| in tokens, (B,) (for auto: what is left without length).
        link: of the loss (for balance). Label smoothing is left out.
        reference_floor: of the loss (for balance).
        weights: what the loss of each pair is multiplied by, (B,) (for balance).

    Raises:
        UsageError: no γ does what is asked; the message says what is reachable.
        ValueError: `asked` is none of the three.
    """
    match = CALIBRATED.match(asked)
    if match is None:
        raise ValueError(f"asked is {asked!r}: expected auto, balance:S or scale:G")
    values = np.asarray(preference, dtype=np.float64)
    calibration = partial(Calibration, asked, pairs=len(values), prompts=len(set(prompt_keys)))
    if match.group(1) == "balance":
        if not link_named(link).shares_grow_with_gamma:
            raise UsageError(
                f"loss.gamma: {asked}: the shares of link {link} do not grow with gamma; use auto, scale:1 or another link"
            )
        floored = values if reference_floor is None else np.maximum(values, reference_floor)

        def share(gamma: float) -> float:
            """Share of gradient weight on pairs with Δ0 > 0 at step 0; NaN where there is no weight."""
            with np.errstate(invalid="ignore"):
                score = (beta * values - margin) - np.where(floored == 0, 0.0, gamma * floored)
            weight = link_weight(link, score) * (1.0 if weights is None else weights)
            total = weight.sum()
            return float(weight[values > 0].sum() / total) if total else math.nan

        gamma = _balance(share, float(match.group(2)), asked)
        return calibration(gamma=gamma, share=share(gamma))
    if match.group(1) == "scale":
        spread = robust_spread(values)
        if spread == 0:
            raise UsageError(f"loss.gamma: {asked}: more than half of the pairs have one and the same Δ0, so it has no spread")
        return calibration(gamma=float(match.group(2)) / spread, spread=spread)
    fit = LabelFit(values, prompt_keys=prompt_keys, length_difference=length_difference)
    if not fit.scale < math.inf:
        words = "every Δ0 is 0" if math.isnan(fit.scale) else "the reference ranks no pair wrong"
        raise UsageError(f"loss.gamma: auto: {words}, so that no finite scale fits best; write a number")
    low, high = np.maximum(fit.interval, 0.0).tolist()  # NaN stays NaN
    return calibration(gamma=max(0.0, fit.scale), interval=(low, high), label_fit=fit)


def _balance(share: Callable[[float], float], wanted: float, asked: str) -> float:
    """Return γ >= 0 at which a share that grows with γ is the wanted one.

    Raises:
        UsageError: no γ gives it.
    """
    from scipy.optimize import bisect  # dear to import

    def reached(gamma: float) -> float:
        """The share, 0 where no pair pulls: a hinge with a small γ may be content with all of them."""
        found = share(gamma)
        return 0.0 if math.isnan(found) else found

    low, high = reached(0.0), reached(math.inf)
    if not low <= wanted < high:
        raise UsageError(
            f"loss.gamma: {asked}: no gamma gives this share: it is {low:.3g} with gamma 0 and goes to {high:.3g} as gamma "
            "grows; ask for one between, or change beta or margin"
        )
    upper = 1.0
    while reached(upper) < wanted:
        upper *= 2
    gamma = float(bisect(lambda gamma: reached(gamma) - wanted, 0.0, upper, xtol=1e-15, rtol=1e-14))
    if not abs(share(gamma) - wanted) <= LARGEST_MISS:
        step = 1e-9 * (1 + gamma)
        below, above = reached(max(0.0, gamma - step)), reached(gamma + step)
        raise UsageError(
            f"loss.gamma: {asked}: the weights of a hinge are 0 or 1, and at gamma {gamma:.4g} the share jumps from "
            f"{below:.3g} to {above:.3g}; ask for one of these, set a margin, or use link logistic"
        )
    return gamma

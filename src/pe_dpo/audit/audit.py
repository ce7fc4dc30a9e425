"""What the reference does to a preference data set under a loss, before any training: from π0's log-probs alone.

    recipe ── pairs ── π0's log-probs (from the store, else one pass)
                          ├── what π0 ranks right, by sums, per token, at equal length      ranking
                          ├── what the loss makes of it, at step 0 and later                outlook
                          └── γ from the data, three ways                                   calibration

Everything about the loss uses Δ0 as the loss does, summed or per token. When π0 becomes π0^α, what does not depend on β and γ
stays, and so does the rest once both are divided by α.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pe_dpo.audit.calibration import Calibration, calibrate_loss
from pe_dpo.audit.forecast import AGREEMENTS, FLIP_QUANTILES, Outlook, outlook
from pe_dpo.audit.label_fit import Evidence, evidence
from pe_dpo.audit.quantization_error import QuantizationNoise, quantization_noise
from pe_dpo.audit.warnings import later_warnings, noise_warnings, ranking_warnings, start_warnings
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.disk import json_without_nan
from pe_dpo.errors import UsageError
from pe_dpo.inference.inputs import read_inputs
from pe_dpo.inference.logprobs import PairLogprobs
from pe_dpo.inference.pairs import preferences
from pe_dpo.inference.reference_pass import reference_logprobs
from pe_dpo.metrics.reference_accuracy import Ranking, rank
from pe_dpo.model.base import BaseFacts
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.loss_section import LossSection

logger = logging.getLogger(__name__)

KAPPAS = (0.0, 0.5, 1.0, 2.0)
"""For which every audit tells what would happen."""
CURVE = tuple(step / 40 for step in range(81))
"""κ from 0 to 2, for plots."""
NOISE_PAIRS = 512
"""For the noise of quantization: what is missing from reliability 1 is then known to a tenth of itself."""


@dataclass(frozen=True)
class Way:
    """One way to find γ: what it gave and what that would do, or why it gives nothing."""

    asked: str
    calibration: Calibration | None
    outlook: Outlook | None
    why_not: str | None


@dataclass(frozen=True)
class Audit:
    """What an audit found; `preference` and `length_difference` are for plots and stay out of `to_dict`."""

    pairs: int
    prompts: int
    reference: dict[str, Any]
    """Which model it is, how it is loaded, and whether it had to be run."""
    reduce: str
    """sum or mean, as in the loss."""
    beta: float
    by_sum: Ranking
    per_token: Ranking
    disagreement: float
    """Share of pairs that are right by one of the two and not by the other."""
    evidence: Evidence
    """Of Δ0 as in the loss."""
    asked_gamma: float | str
    """As the recipe has it."""
    recipe: Outlook
    kappas: tuple[Outlook, ...]
    """For KAPPAS, everything else as in the recipe."""
    curve: tuple[Outlook, ...]
    """For CURVE."""
    ways: tuple[Way, ...]
    """auto, balance, scale."""
    noise: QuantizationNoise | None
    warnings: tuple[str, ...]
    """What looks off, in words, each with what to turn."""
    preference: np.ndarray
    """Δ0 as in the loss, (B,)."""
    length_difference: np.ndarray
    """|chosen| − |rejected| in tokens, (B,)."""

    @property
    def ranking(self) -> Ranking:
        """By the reduction of the loss."""
        return self.by_sum if self.reduce == "sum" else self.per_token

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pairs themselves as JSON values; numbers that are not finite are null."""
        found = asdict(self)
        del found["preference"], found["length_difference"]
        found["curve"] = {key: [getattr(point, key) for point in self.curve] for key in _CURVES}
        return json_without_nan({**found, "flip_quantiles": FLIP_QUANTILES, "agreements": AGREEMENTS})


_CURVES = ("kappa", "weight_right", "weight_wrong", "effective", "saturated", "hinge_accuracy", "flip_times")


def audit(
    recipe: Recipe,
    *,
    with_noise: bool = False,
) -> Audit:
    """Return what the reference does to the training pairs of a recipe under its loss.

    Where the store has all log-probs, the base's weights are not read.

    Args:
        recipe: checked; its γ may be one that is to be calibrated.
        with_noise: also measure what quantizing the base does to Δ0: as the recipe does, or by nf4 where it does not.

    Raises:
        DataError, ModelError: as in training.
        UsageError: the recipe asks for a γ that the data do not allow.
    """
    facts, _, data = read_inputs(recipe)
    for line in data.report.lines():
        logger.info(line)
    pairs = data.train
    reference, was_run = reference_logprobs(recipe, facts, pairs)
    found = audit_pairs(
        reference,
        recipe.loss,
        margins=_margins(pairs),
        prompt_keys=[pair.prompt_key for pair in pairs],
        described={
            "base": facts.base,
            "quantize": facts.quantize,
            "dtype": _dtype(facts),
            "is": "a frozen copy of the adapter" if recipe.adapter.reference == "adapter" else "the base, adapters off",
            "was_run": was_run,
        },
    )
    if not recipe.policy_starts_as_reference:
        found = _warn(found, ["the run starts from an adapter that is not its reference, so step 0 is not what is told here"])
    if not with_noise:
        return found
    noise = _measure_noise(recipe, facts, pairs, found.recipe.gamma)
    return _warn(replace(found, noise=noise), noise_warnings(noise))


def audit_pairs(
    reference: PairLogprobs,
    loss: LossSection,
    *,
    margins: Tensor,
    prompt_keys: Sequence[str],
    described: dict[str, Any] | None = None,
) -> Audit:
    """Return the audit of pairs whose log-probs are known.

    Args:
        reference: log-probs under π0, finite.
        loss: of the recipe.
        margins: the data's margin column, (B,); zeros without one.
        prompt_keys: (B,); pairs of one prompt are resampled together.
        described: what the reference is, for `Audit.reference`.

    Raises:
        UsageError: the loss asks for a γ that the data do not allow.
    """
    by_sum, per_token = (preferences(reference, reduce) for reduce in ("sum", "mean"))
    preference = by_sum if loss.reduce == "sum" else per_token
    lengths = (reference.chosen_lengths - reference.rejected_lengths).double().numpy()
    ways = tuple(_way(asked, loss, reference, margins, prompt_keys) for asked in _asked(loss))
    auto = ways[0].calibration
    view = partial(outlook, loss, reference=reference, margins=margins)
    found = Audit(
        pairs=len(preference),
        prompts=len(set(prompt_keys)),
        reference=described or {},
        reduce=loss.reduce,
        beta=loss.beta,
        by_sum=rank(by_sum, lengths, prompt_keys),
        per_token=rank(per_token, lengths, prompt_keys),
        disagreement=float(np.mean((by_sum > 0) != (per_token > 0))),
        evidence=(auto and auto.evidence) or evidence(preference, prompt_keys=prompt_keys, length_difference=lengths),
        asked_gamma=loss.gamma,
        recipe=view(gamma=_gamma(loss, ways)),
        kappas=tuple(view(gamma=kappa * loss.beta) for kappa in KAPPAS),
        curve=tuple(view(gamma=kappa * loss.beta) for kappa in CURVE),
        ways=ways,
        noise=None,
        warnings=(),
        preference=preference,
        length_difference=lengths,
    )
    counts = {"pairs": found.pairs, "prompts": found.prompts}
    return _warn(
        found,
        [
            *start_warnings(found.recipe, loss),
            *ranking_warnings(found.ranking, found.evidence, loss, **counts),
            *later_warnings(found.recipe, found.kappas[0], loss),
        ],
    )


def _measure_noise(
    recipe: Recipe,
    facts: BaseFacts,
    pairs: Sequence[EncodedPair],
    gamma: float,
) -> QuantizationNoise:
    """The noise on some pairs: of the recipe's quantization, or of nf4 where it has none."""
    count = min(NOISE_PAIRS, len(pairs))
    drawn = np.sort(np.random.default_rng(0).choice(len(pairs), size=count, replace=False)).tolist()
    some = [pairs[index] for index in drawn]
    quantized = facts if facts.quantize != "none" else facts._replace(quantize="nf4")
    exact = facts._replace(quantize="none")
    with_noise, without = (reference_logprobs(recipe, one, some)[0] for one in (quantized, exact))
    return quantization_noise(
        with_noise, without, recipe.loss, gamma, _margins(some), quantize=quantized.quantize, against=_dtype(exact)
    )


def _asked(loss: LossSection) -> list[str]:
    """The three ways, that of the recipe with its own number."""
    usual = {"auto": "auto", "balance": "balance:0.5", "scale": "scale:1"}
    if loss.is_calibrated:
        usual[str(loss.gamma).partition(":")[0]] = str(loss.gamma)
    return list(usual.values())


def _way(asked: str, loss: LossSection, reference: PairLogprobs, margins: Tensor, prompt_keys: Sequence[str]) -> Way:
    try:
        found = calibrate_loss(loss.model_copy(update={"gamma": asked}), reference, margins, prompt_keys)
    except UsageError as error:
        return Way(asked, None, None, str(error).removeprefix(f"loss.gamma: {asked}: "))
    return Way(asked, found, outlook(loss, found.gamma, reference, margins), None)


def _gamma(loss: LossSection, ways: Sequence[Way]) -> float:
    """The γ that the recipe asks for, calibrated if need be.

    Raises:
        UsageError: the data do not allow it.
    """
    if not loss.is_calibrated:
        return loss.gamma_value
    (way,) = (way for way in ways if way.asked == loss.gamma)
    if way.calibration is None:
        raise UsageError(f"loss.gamma: {way.asked}: {way.why_not}")
    return way.calibration.gamma


def _margins(pairs: Sequence[EncodedPair]) -> Tensor:
    return torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)


def _warn(found: Audit, lines: Sequence[str]) -> Audit:
    return replace(found, warnings=(*found.warnings, *lines))


def _dtype(facts: BaseFacts) -> str:
    return str(facts.dtype).removeprefix("torch.")

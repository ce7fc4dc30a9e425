"""What the reference does to a preference data set under a loss, before any training: from π0's log-probs alone.

    recipe ── pairs ── π0's log-probs (from the store, else one pass)
                          ├── what π0 ranks right, by sums, per token, at equal length      reference_accuracy
                          ├── what that says about the labels                               label_fit
                          ├── what the loss makes of it, at step 0 and later                forecast
                          ├── γ from the data, three ways                                   calibration
                          └── what quantizing the base does to it, if asked for             quantization_error

Everything about the loss uses Δ0 as the loss does, summed or per token. When π0 becomes π0^α, what does not depend on β and γ
stays, and so does the rest once both are divided by α.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from pe_dpo.audit.calibration import Calibration, calibrate_loss
from pe_dpo.audit.forecast import AGREEMENTS, FLIP_QUANTILES, Forecast, forecast
from pe_dpo.audit.label_fit import LabelFit
from pe_dpo.audit.quantization_error import QuantizationError, quantization_error
from pe_dpo.audit.warnings import SMALLEST_RELIABILITY, recommendation, warnings
from pe_dpo.data.encoded import column
from pe_dpo.disk import json_without_nan
from pe_dpo.errors import UsageError
from pe_dpo.inference.inputs import read_inputs
from pe_dpo.inference.pairs import pair_terms, preferences
from pe_dpo.inference.reference import reference_logprobs
from pe_dpo.metrics.reference_accuracy import ReferenceAccuracy
from pe_dpo.objective import Loss, PairLogprobs, PairTerms
from pe_dpo.recipe import Recipe, with_absolute_paths
from pe_dpo.recipe.loss_section import LossSection
from pe_dpo.runs.run import Run

logger = logging.getLogger(__name__)

KAPPAS = (0.0, 0.5, 1.0, 2.0)
"""For which every audit tells what would happen."""
CURVE = tuple(step / 40 for step in range(81))
"""κ from 0 to 2, for plots."""
QUANTIZED_PAIRS = 512
"""For the error of quantization: what is missing from reliability 1 is then known to a tenth of itself."""


def audit(recipe: Recipe, *, with_quantization_error: bool = False) -> "Audit":
    """Return what the reference does to the training pairs of a recipe under its loss.

    Where the store has all log-probs, the base's weights are not read.

    Args:
        recipe: checked; its γ may be one that is to be calibrated.
        with_quantization_error: also measure what quantizing the base does to Δ0: as the recipe does, or by nf4 where it does
            not.

    Raises:
        DataError, ModelError: as in training.
        UsageError: the recipe asks for a γ that the data do not allow, or the error of codes that came in files.
    """
    facts, _, data, *_ = read_inputs(recipe, recorded=_recorded_split(recipe))
    if with_quantization_error and facts.is_prequantized:
        raise UsageError(
            f"{facts.base}: comes as {facts.quantize} codes, and nothing here has the weights that they were made of; to "
            "measure what quantizing them does, name the base that has them in model.base"
        )
    data.report.tell(logger)
    pairs, dtype = data.train, str(facts.dtype).removeprefix("torch.")
    logprobs, was_run = reference_logprobs(recipe, facts, pairs)
    terms = pair_terms(pairs)
    described = {
        "base": facts.base,
        "quantize": facts.quantize,
        "dtype": dtype,
        "is": recipe.adapter.describe_reference(),
        "was_run": was_run,
    }
    found = Audit(logprobs, recipe.loss, terms, column(pairs, "prompt_key"), described)
    if not recipe.policy_starts_as_reference:
        found.warnings.append("the run starts from an adapter that is not its reference, so step 0 is not what is told here")
    if not with_quantization_error:
        return found

    drawn = np.random.default_rng(0).choice(len(pairs), size=min(QUANTIZED_PAIRS, len(pairs)), replace=False)
    some = np.sort(drawn).tolist()
    quantize = "nf4" if facts.quantize == "none" else facts.quantize
    quantized, exact = (
        reference_logprobs(recipe, facts._replace(quantize=how), [pairs[index] for index in some])[0]
        for how in (quantize, "none")
    )
    found.quantization_error = error = quantization_error(
        quantized,
        exact,
        found.loss.with_gamma(found.loss.gamma),
        pair_terms([pairs[index] for index in some]),
        quantize=quantize,
        against=dtype,
    )
    if error.reliability < SMALLEST_RELIABILITY:
        found.warnings.append(
            f"{1 - error.reliability:.1%} of the variance of Δ0 is noise of {quantize}; keep gamma = beta, where it cancels, "
            "or set model.quantize: none"
        )
    return found


def _recorded_split(recipe: Recipe) -> dict[str, Any] | None:
    """Return the data report of the run of this very recipe, whose held-out rows are held out here too; None without one."""
    run = Run(recipe.output)
    if not run.exists:
        return None
    asked, trained = with_absolute_paths(recipe), run.recipe
    dated = asked.data.model_copy(update={"template_date": trained.data.template_date})
    return run.data_report if (dated, asked.model) == (trained.data, trained.model) else None


class Audit:
    """What a reference does to pairs under a loss.

    Args:
        logprobs: log-probs of the pairs under π0, finite.
        loss: of the recipe; its γ may be one that is to be calibrated.
        terms: what the data give the pairs.
        prompt_keys: (B,); pairs of one prompt are resampled together.
        described: what the reference is: which model, how it is loaded, and whether it had to be run.

    Raises:
        UsageError: the loss asks for a γ that the data do not allow.
    """

    def __init__(
        self,
        logprobs: PairLogprobs,
        loss: LossSection,
        terms: PairTerms,
        prompt_keys: Sequence[str],
        described: dict[str, Any] | None = None,
    ) -> None:
        self.pairs, self.prompts = len(prompt_keys), len(set(prompt_keys))
        self.reference = described or {}
        self.logprobs, self.terms = logprobs, terms
        self.asked_gamma = loss.gamma
        """As the recipe has it."""

        by_sum, per_token = (preferences(logprobs, reduce) for reduce in ("sum", "mean"))
        self.preference = by_sum if loss.reduce == "sum" else per_token
        """Δ0 as in the loss, (B,)."""
        self.length_difference = (logprobs.chosen_lengths - logprobs.rejected_lengths).double().numpy()
        """|chosen| − |rejected| in tokens, (B,)."""
        self.by_sum, self.per_token = (
            ReferenceAccuracy(delta, self.length_difference, prompt_keys) for delta in (by_sum, per_token)
        )
        self.disagreement = float(np.mean((by_sum > 0) != (per_token > 0)))
        """Share of pairs that are right by one of the two and not by the other."""

        asked = {"auto": "auto", "balance": "balance:0.5", "scale": "scale:1"}
        if loss.is_calibrated:
            asked[str(loss.gamma).partition(":")[0]] = str(loss.gamma)
        self.ways: dict[str, Calibration | str] = {}
        """The three ways to find γ, that of the recipe with its own number: what each gives, or why it gives nothing."""
        for way in asked.values():
            try:
                self.ways[way] = calibrate_loss(loss.model_copy(update={"gamma": way}), logprobs, terms, prompt_keys)
            except UsageError as error:
                if way == loss.gamma:
                    raise
                self.ways[way] = str(error).removeprefix(f"loss.gamma: {way}: ")
        auto = self.ways["auto"]
        known = auto.label_fit if isinstance(auto, Calibration) else None
        self.label_fit = known or LabelFit(self.preference, prompt_keys=prompt_keys, length_difference=self.length_difference)
        """Of Δ0 as in the loss."""

        own = self.ways.get(str(loss.gamma))
        self.loss = Loss(**loss.coefficients(own.gamma if isinstance(own, Calibration) else None))
        self.recipe = self.forecast(self.loss.gamma)
        self.kappas = [self.forecast(kappa * loss.beta) for kappa in KAPPAS]
        """For KAPPAS, everything else as in the recipe."""
        self.quantization_error: QuantizationError | None = None
        self.recommendation = recommendation(self)
        """The one thing to do before training, with its reason."""
        self.warnings = warnings(self)
        """What looks off, in words, each with what to turn; what endangers the result most comes first."""

    @cached_property
    def curve(self) -> list[Forecast]:
        """For CURVE: most of what an audit computes, and only files and plots have it."""
        return [self.forecast(kappa * self.loss.beta) for kappa in CURVE]

    @property
    def ranking(self) -> ReferenceAccuracy:
        """By the reduction of the loss."""
        return self.by_sum if self.loss.reduce == "sum" else self.per_token

    def forecast(self, gamma: float) -> Forecast:
        """Return what the loss does with this γ in place of its own."""
        return forecast(self.loss.with_gamma(gamma), self.logprobs, self.terms)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pairs themselves as JSON values; numbers that are not finite are null."""
        error = self.quantization_error
        curves = ("kappa", "weight_right", "weight_wrong", "effective", "saturated", "hinge_accuracy", "flip_times")
        values = {
            "pairs": self.pairs,
            "prompts": self.prompts,
            "reference": self.reference,
            "reduce": self.loss.reduce,
            "beta": self.loss.beta,
            "by_sum": vars(self.by_sum),
            "per_token": vars(self.per_token),
            "disagreement": self.disagreement,
            "evidence": vars(self.label_fit),
            "asked_gamma": self.asked_gamma,
            "recipe": asdict(self.recipe),
            "kappas": [asdict(point) for point in self.kappas],
            "curve": {name: [getattr(point, name) for point in self.curve] for name in curves},
            "ways": [
                {"asked": asked, "calibration": way.to_dict(), "outlook": asdict(self.forecast(way.gamma)), "why_not": None}
                if isinstance(way, Calibration)
                else {"asked": asked, "calibration": None, "outlook": None, "why_not": way}
                for asked, way in self.ways.items()
            ],
            "noise": error and asdict(error),
            "recommendation": self.recommendation,
            "warnings": self.warnings,
            "flip_quantiles": FLIP_QUANTILES,
            "agreements": AGREEMENTS,
        }
        return json_without_nan(values)

"""The loss of a recipe: presets, coefficients, and a γ that may be a multiple of β or found from data."""

import difflib
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pe_dpo.errors import RecipeError
from pe_dpo.links import LinkName, link_named
from pe_dpo.recipe.presets import ALIASES, NOT_HERE, PRESETS
from pe_dpo.recipe.section import LARGEST, Finite, NonNegative, Positive, Section

MULTIPLE = re.compile(r"^([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)x$")
"""gamma as a multiple of beta: "0.5x"."""

CALIBRATED = re.compile(r"^(?:auto|(balance|scale):([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?))$")
"""gamma found from the reference's log-probs: "auto", "balance:0.5", "scale:1"."""


class LossSection(Section):
    """z = β·Δπ − γ·max(Δ0, floor) − m, link(z), Δ = log p(chosen) − λ·log p(rejected); see `pe-dpo recipes show`."""

    preset: str = Field("dpo", description=f"One of {', '.join(PRESETS)}; every other key overrides it.")
    beta: Positive = Field(0.1, description="Weight of the policy.")
    gamma: float | str = Field(
        "1x",
        description='Weight of the reference: a number, a multiple of beta such as "0.5x", or found from the reference\'s '
        "log-probs before training: auto (a Platt scale), balance:S (share S of the gradient on pairs that the reference ranks "
        "right), scale:G (γ·Δ0 has spread G).",
    )
    margin: Finite = Field(
        0.0, description="Constant that is subtracted from the score: how much better a chosen answer has to be."
    )
    link: LinkName = Field("logistic", description="Loss of a score z: −log σ(z), max(0, −z), or z².")
    reduce: Literal["sum", "mean"] = Field("sum", description="Log-probs of an answer: summed, or per token.")
    reference_floor: Finite | None = Field(None, description="Lower bound of Δ0; 0 is HyPO.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.0, description="Assumed chance ε that a label is wrong.")
    label_smoothing_mode: Literal["conservative", "unbiased"] = Field(
        "conservative",
        description="(1−ε)·f(z) + ε·f(z′), or ((1−ε)·f(z) − ε·f(z′))/(1−2ε); z′ is of the pair with its labels swapped.",
    )
    sft_weight: NonNegative = Field(0.0, description="Weight of the negative log-likelihood per token of the chosen answer.")
    length_penalty: Finite = Field(0.0, description="α of R-DPO: α·(|chosen| − |rejected|) is added to the score.")
    rejected_weight: Positive = Field(
        1.0,
        description="λ of DPO-Shift, on the rejected answer's log-probs under policy and reference; below 1 the likelihood of "
        "chosen answers falls less, or rises, and the margin between the two grows less.",
    )
    margin_scale: Finite = Field(0.0, description="Times the data's margin column, added to the margin of each pair.")

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_the_gaps(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("preset", "dpo")
        if isinstance(name, str) and name in ALIASES:
            name = ALIASES[name]
            values = values | {"preset": name}
        return {**PRESETS[name].values, **values} if isinstance(name, str) and name in PRESETS else values

    @field_validator("preset")
    @classmethod
    def _preset_is_published(cls, preset: str) -> str:
        if preset in NOT_HERE:
            raise ValueError(f"{preset} is not here: {NOT_HERE[preset]}")
        if preset not in PRESETS:
            close = difflib.get_close_matches(preset, PRESETS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the presets are {', '.join(PRESETS)}"
            raise ValueError(f"{preset!r} is not known; {hint}")
        return preset

    @field_validator("gamma")
    @classmethod
    def _gamma_is_a_number_or_a_multiple(cls, gamma: float | str) -> float | str:
        if not isinstance(gamma, str):
            if not (gamma >= 0 and math.isfinite(gamma)):
                raise ValueError(f"gamma is {gamma}: it must be finite and >= 0")
            return gamma
        if not gamma.startswith(("auto", "balance", "scale")):
            if not MULTIPLE.match(gamma):
                raise ValueError(
                    f"gamma is {gamma!r}: write a number >= 0, or a multiple of beta such as '0.5x', or how to find it: auto, "
                    "balance:0.5, scale:1"
                )
            return gamma
        match = CALIBRATED.match(gamma)
        if match is None:
            raise ValueError(
                f"gamma is {gamma!r}: write auto, balance:S with S the share of gradient weight on pairs that the reference "
                "ranks right (balance:0.5), or scale:G with G the spread of γ·Δ0 (scale:1)"
            )
        size = float(match.group(2) or 0.5)
        if match.group(1) == "balance" and not 0 < size < 1:
            raise ValueError(f"gamma is {gamma!r}: the share must lie between 0 and 1, as in balance:0.5")
        if not (size > 0 and math.isfinite(size)):
            raise ValueError(f"gamma is {gamma!r}: the spread must be finite and > 0, as in scale:1")
        return gamma

    @model_validator(mode="after")
    def _floor_needs_the_reference(self) -> "LossSection":
        if self.is_calibrated:
            return self
        if not self.gamma_value <= LARGEST:
            raise ValueError(f"gamma: {self.gamma} at beta {self.beta:g} is above {LARGEST:g}; write a smaller one")
        if self.reference_floor is not None and self.gamma_value == 0:
            raise ValueError("reference_floor: has no effect with gamma = 0; drop it, or set gamma > 0")
        return self

    @model_validator(mode="after")
    def _rejected_weight_leaves_delta(self) -> "LossSection":
        if self.rejected_weight == 1:
            return self
        score = f"log p(chosen) − {self.rejected_weight:g}·log p(rejected)"
        if self.reference_floor is not None:
            raise ValueError(
                f"reference_floor: is a bound of Δ0, and with rejected_weight {self.rejected_weight:g} the score is made of "
                f"{score}; drop one of the two"
            )
        if self.is_calibrated:
            raise ValueError(
                f"gamma: {self.gamma} rests on Δ0, and with rejected_weight {self.rejected_weight:g} the score is made of "
                f"{score}; write a number, or a multiple of beta such as 1x"
            )
        return self

    @model_validator(mode="after")
    def _balance_needs_weights_that_grow(self) -> "LossSection":
        if str(self.gamma).startswith("balance") and not link_named(self.link).shares_grow_with_gamma:
            raise ValueError(
                f"gamma: {self.gamma} asks for shares of gradient weight, which do not grow with gamma under link {self.link}; "
                "use auto or scale:1, or another link"
            )
        return self

    @property
    def is_calibrated(self) -> bool:
        """Whether γ is to be found from the reference's log-probs, and so is no number yet."""
        return isinstance(self.gamma, str) and CALIBRATED.match(self.gamma) is not None

    @property
    def uses_reference(self) -> bool:
        """Whether the reference is run on training pairs: always, but for γ = 0."""
        return self.is_calibrated or self.gamma_value != 0

    @property
    def gamma_value(self) -> float:
        """γ as a number.

        Raises:
            RecipeError: it is still to be calibrated (`is_calibrated`).
        """
        if self.is_calibrated:
            raise RecipeError(
                f"loss.gamma: {self.gamma} becomes a number only with the reference's log-probs, before the first step of "
                "`pe-dpo train`; `pe-dpo audit` tells which"
            )
        if isinstance(self.gamma, str):
            multiple = MULTIPLE.match(self.gamma)
            assert multiple, "validated above"
            return self.beta * float(multiple.group(1))
        return self.gamma

    @property
    def kappa(self) -> float | None:
        """γ/β, or None while γ is still to be calibrated."""
        return None if self.is_calibrated else self.gamma_value / self.beta

    def coefficients(self, gamma: float | None = None) -> dict[str, Any]:
        """Return the fields of `objective.Loss`.

        Args:
            gamma: in place of its own, which may be still to be calibrated.

        Raises:
            RecipeError: γ is still to be calibrated (`is_calibrated`), and none is given.
        """
        return {**self.model_dump(exclude={"preset"}), "gamma": self.gamma_value if gamma is None else gamma}

"""The loss of another tool as a point of ours: L_here = factor · L_there, pair by pair.

with a reference (DPO)                      without one (CPO)
sigmoid       −log σ(βΔ)                    sigmoid   −log σ(βΔπ)                    preset cpo
hinge         max(0, 1 − βΔ)                hinge     max(0, 1 − βΔπ)                preset slic
ipo           (Δ/token − 1/2β)²             simpo     −log σ(βΔπ/token − γ)          preset simpo, margin γ
robust, sigmoid_norm                        ipo       (Δπ/token − 1/2β)²
                                            SimPO's hinge  max(0, 1 − β(Δπ/token − ratio))   preset repo, margin 1 + β·ratio

ours for ipo is (βΔ/token − ½)², which is β² times theirs, so an added likelihood is weighted by β² too.
"""

from dataclasses import dataclass, field
from typing import Any

from pe_dpo.convert.draft import Draft, Said
from pe_dpo.errors import UsageError
from pe_dpo.recipe.elsewhere.key import PER_TOKEN
from pe_dpo.recipe.presets import NOT_HERE, PRESETS

_WITH_REFERENCE = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "robust": "robust", "sigmoid_norm": "dpo-norm"}
_WITHOUT = {"sigmoid": "cpo", "hinge": "slic", "ipo": "ipo", "simpo": "simpo", "simpo_hinge": "repo"}


@dataclass
class TheirLoss:
    """A loss in the words of TRL, which the other tools share."""

    names: list[str]
    beta: Said
    says: Said
    """The key that names the loss."""
    weights: list[float] | None = None
    has_reference: bool = True
    gamma: float = 0.0
    """SimPO's margin."""
    smoothing: Said | None = None
    is_smoothed: tuple[str, ...] = ()
    """The losses that the smoothing acts on there, as conservative DPO's does."""
    likelihood: Said | None = None
    """Weight of the likelihood of the chosen answers."""
    per_token: bool = True
    """Whether that likelihood is a mean over the tokens of the batch, not over pairs."""
    margin_from: tuple[Said | str, ...] = ()
    factor: float = field(default=1.0, init=False)
    """What the loss there is multiplied by to give ours."""
    has_counterpart: bool = field(default=True, init=False)
    """Whether ours is the same loss."""

    @property
    def preference(self) -> str:
        """The name of the part that is no likelihood."""
        return next((name for name in self.names if name != "sft"), "sigmoid")


def write_loss(draft: Draft, loss: TheirLoss) -> None:
    """Write the loss section, and note where ours is another loss."""
    beta, name = draft.real(loss.beta), loss.preference
    if beta <= 0:
        raise UsageError(f"{draft.source.path}: {loss.beta.key}: found {beta:g}; it is above 0, as in every loss there is here")
    known = _WITH_REFERENCE if loss.has_reference else _WITHOUT
    others = [other for other in loss.names if other not in ("sft", name)]
    if name not in known or others:
        wrong = others[0] if name in known else name
        words = NOT_HERE.get(wrong, "no loss of that name is known")
        draft.drop(loss.says, f"{wrong}: {words}", breaks=True)
        loss.has_counterpart = False
    preset = known.get(name, "dpo")
    weights = loss.weights or [1.0] * len(loss.names)
    at = loss.names.index(name) if name in loss.names else 0
    scale = weights[at] if at < len(weights) and weights[at] else 1.0
    loss.factor = (beta**2 if name == "ipo" else 1.0) / scale
    smoothing = draft.real(loss.smoothing) if loss.smoothing and loss.smoothing.value else 0.0
    if smoothing and loss.smoothing and preset == "dpo" and "sigmoid" in loss.is_smoothed:
        preset = "cdpo"
    draft.put("loss.preset", preset, loss.says)
    draft.put("loss.beta", beta, loss.beta)
    if name == "ipo":
        draft.differs(
            loss.says,
            f"both aim at 1/(2β) = {1 / (2 * beta):g} nats per token; loss and gradient are β² = {beta**2:g} times those "
            "there, which Adam does not see and max_grad_norm does",
        )
    if name == "ipo" and not loss.has_reference:
        draft.put("loss.gamma", 0.0, loss.says, "no reference there")
    if preset == "repo":
        draft.put("loss.margin", 1 + loss.gamma, *loss.margin_from, "1 + β·ratio, since its hinge begins at 1")
    elif preset == "simpo":
        draft.put("loss.margin", loss.gamma, *loss.margin_from)
        draft.differs(
            "; ".join(map(str, loss.margin_from)),
            f"it is the margin: loss.margin {loss.gamma:g}; gamma here weighs the reference",
        )
    if scale != 1 and loss.has_counterpart:
        draft.differs(loss.says, f"weighted by {scale:g} there; the loss and its gradient here are {1 / scale:g} times those")
    _write_smoothing(draft, loss, preset, smoothing)
    _write_likelihood(draft, loss, preset, weights)


def write_nearest(draft: Draft, name: str, there: Said | str, beta: Said, words: str = "") -> None:
    """Write DPO in the place of a method that is not here, and note what it is; KTO's β is β, that of others is not."""
    draft.drop(there, words or NOT_HERE.get(name, "another method than preference losses"), breaks=True)
    draft.put("loss.preset", "dpo", f"{name} is not here")
    if name == "kto":
        draft.put("loss.beta", draft.real(beta), beta)


def _write_smoothing(draft: Draft, loss: TheirLoss, preset: str, smoothing: float) -> None:
    said = loss.smoothing
    if preset == "robust" or (preset == "cdpo" and said):
        draft.put("loss.label_smoothing", smoothing, said or "label_smoothing: 0 by default there")
    elif not smoothing or said is None:
        return
    elif loss.preference not in loss.is_smoothed:
        draft.drop(said, f"{loss.preference} is not smoothed there (by TRL since 0.29), and so not here; cdpo smooths it")
    elif preset == "cpo":
        draft.put("loss.label_smoothing", smoothing, said)
    else:
        draft.put("loss.label_smoothing", smoothing, said)
        words = "there it turns the margin, too; here it is the loss of the pair with its labels swapped"
        draft.differs(said, words, breaks=True)
        loss.has_counterpart = False


def _write_likelihood(draft: Draft, loss: TheirLoss, preset: str, weights: list[float]) -> None:
    """Write sft_weight: of the list's `sft`, and of the key of its own; 0 where the preset alone would add one."""
    origins: list[Said | str] = []
    weight = 0.0
    if "sft" in loss.names:
        weight += weights[loss.names.index("sft")]
        origins.append(loss.says)
    if loss.likelihood and loss.likelihood.value:
        weight += draft.real(loss.likelihood)
        origins.append(loss.likelihood)
    if not weight and not PRESETS[preset].values.get("sft_weight"):
        return
    here = weight * loss.factor
    if loss.factor != 1 and weight:
        origins.append(f"times {loss.factor:g}, as the loss")
    draft.put("loss.sft_weight", here, *(origins or [loss.likelihood or loss.says, "no likelihood there"]))
    if weight and loss.per_token:
        draft.differs("; ".join(map(str, origins)), f"{PER_TOKEN}: long answers weigh no more than short ones here")
    elif weight:
        draft.lines["loss.sft_weight"] = (here, f"{draft.lines['loss.sft_weight'][1]}; per pair there too", True)


def read_weights(draft: Draft, said: Said) -> list[float] | None:
    """Return the weights of a list of losses; None without any."""
    return [draft.real(said, weight) for weight in listed(said.value)] if said.value else None


def listed(value: Any) -> list[Any]:
    """Return a value as a list: itself, what commas separate, or the one."""
    if isinstance(value, str) and value.startswith("["):
        value = value.strip("[]")
    if isinstance(value, str):
        return [part.strip().strip("'\"") for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]

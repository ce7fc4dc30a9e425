"""The loss against numbers that it did not compute: 50-digit decimals worked out here, and the published vectors.

The decimals need nothing beside the checkout; the published vectors (660 results in the family) come from mpmath with 60 digits
and were cross-checked against TRL's own loss functions by those who made them.
"""

import math
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pe_dpo.objective import Loss, PairLogprobs, PreferenceLoss, apply_link, preference_loss

QUANTITIES = ("loss", "grad_w", "grad_l", "z", "dloss_dz")
RELATIVE_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
FURTHER_LINKS = {
    "exponential": lambda z: torch.exp(-z),
    "squared_hinge": lambda z: torch.relu(-z).square(),
    "savage": lambda z: torch.sigmoid(-z).square(),
}


# ---------------------------------------------------------------- our own vectors, in decimal


class Pair(NamedTuple):
    """One pair as the decimals see it; `shift` is its pair_margin."""

    pol_w: str
    pol_l: str
    ref_w: str
    ref_l: str
    len_w: int
    len_l: int
    shift: str


PAIRS = (
    Pair("-12.5", "-16.25", "-12.5", "-16.25", 5, 8, "0.25"),  # at the reference, which is right
    Pair("-9.75", "-7", "-9.75", "-7", 4, 3, "0"),  # at the reference, which is wrong
    Pair("-20", "-31.5", "-26", "-24.5", 16, 16, "-0.5"),  # gained
    Pair("-30.25", "-28", "-22", "-29.75", 12, 20, "1"),  # lost
    Pair("-44", "-40.5", "-41", "-30", 25, 7, "0.125"),  # not yet
    Pair("-2.5", "-2.5", "-3", "-3", 1, 1, "0"),  # both tied
)
COEFFICIENTS: tuple[dict[str, float], ...] = (
    {"beta": 0.1, "gamma": 0.1},
    {"beta": 0.1, "gamma": 0.3, "margin": 0.5},
    {"beta": 0.5, "gamma": 0.125, "margin": -0.25, "reference_floor": 0.0},
    {"beta": 2.0, "gamma": 0.0, "margin": 1.5, "length_penalty": 0.03125, "sft_weight": 0.25},
    {"beta": 0.25, "gamma": 0.5, "margin": 0.75, "reference_floor": -2.0, "length_penalty": -0.0625, "sft_weight": 1.0},
    {"beta": 0.1, "gamma": 0.1, "rejected_weight": 0.75},
    {"beta": 0.5, "gamma": 0.125, "margin": 0.5, "rejected_weight": 0.95, "length_penalty": 0.03125, "sft_weight": 0.5},
    {"beta": 2.0, "gamma": 0.0, "margin": -0.25, "rejected_weight": 1.25},
)


@pytest.mark.parametrize(
    "coefficients", COEFFICIENTS, ids=lambda c: ",".join(f"{name}={c[name]}" for name in c if name != "margin")
)
@pytest.mark.parametrize("smoothing", [(0.0, "conservative"), (0.125, "conservative"), (0.25, "unbiased")])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("link", ["logistic", "hinge", "squared"])
def test_loss_gradients_score_and_weight_equal_fifty_digit_arithmetic(link, reduce, smoothing, coefficients):
    options = {"link": link, "reduce": reduce, "label_smoothing": smoothing[0], **coefficients}
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (
        torch.tensor([float(pair[column]) for pair in PAIRS], dtype=torch.float64) for column in range(4)
    )
    out, gradients = _loss_and_gradients(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        chosen_lengths=torch.tensor([pair.len_w for pair in PAIRS]),
        rejected_lengths=torch.tensor([pair.len_l for pair in PAIRS]),
        pair_margin=torch.tensor([float(pair.shift) for pair in PAIRS], dtype=torch.float64),
        label_smoothing_mode=smoothing[1],
        **options,
    )
    found = _quantities(out, gradients)
    for row, pair in enumerate(PAIRS):
        expected = _by_decimal(pair, mode=smoothing[1], **options)
        for name in QUANTITIES:
            assert found[name][row] == pytest.approx(expected[name], rel=1e-11, abs=1e-13), (name, pair)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.5])
def test_a_beta_and_a_weight_of_each_pair_equal_fifty_digit_arithmetic_pair_by_pair(kappa, reduce):
    """γ is κ times each pair's β; its loss, SFT term and all, is multiplied by its weight; its pull is in units of one β."""
    options = {"margin": 0.5, "sft_weight": 0.25, "label_smoothing": 0.125, "rejected_weight": 0.75, "length_penalty": 0.03125}
    betas, weights = (0.1, 0.5, 2.0, 0.25, 1.0, 0.125), (1.0, 0.0, 2.0, 0.5, 3.0, 0.25)
    columns = [torch.tensor([float(pair[column]) for pair in PAIRS], dtype=torch.float64) for column in range(4)]
    lengths = [torch.tensor([getattr(pair, name) for pair in PAIRS]) for name in ("len_w", "len_l")]
    policy = [column.requires_grad_() for column in columns[:2]]
    loss = Loss(beta=0.2, gamma=0.2 * kappa, reduce=reduce, margin_scale=1.0, **options)
    margins, own, scales = (
        torch.tensor(values, dtype=torch.float64) for values in ([float(pair.shift) for pair in PAIRS], betas, weights)
    )
    out = loss(PairLogprobs(*policy, *lengths), PairLogprobs(*columns[2:], *lengths), margins, own, scales)
    found = _quantities(out, torch.autograd.grad(out.loss.sum(), policy))
    for row, (pair, beta, weight) in enumerate(zip(PAIRS, betas, weights, strict=True)):
        expected = _by_decimal(
            pair, link="logistic", reduce=reduce, mode="conservative", beta=beta, gamma=kappa * beta, **options
        )
        assert found["z"][row] == pytest.approx(expected["z"], rel=1e-11, abs=1e-13)
        for name in ("loss", "grad_w", "grad_l"):
            assert found[name][row] == pytest.approx(weight * expected[name], rel=1e-11, abs=1e-13), (name, pair)
        assert found["dloss_dz"][row] == pytest.approx(weight * beta / 0.2 * expected["dloss_dz"], rel=1e-11, abs=1e-13)


def _by_decimal(
    pair: Pair,
    *,
    link: str,
    reduce: str,
    mode: str,
    beta: float,
    gamma: float,
    margin: float = 0.0,
    reference_floor: float | None = None,
    length_penalty: float = 0.0,
    sft_weight: float = 0.0,
    label_smoothing: float = 0.0,
    rejected_weight: float = 1.0,
) -> dict[str, float]:
    """Return the five quantities of one pair, from the formulas of the loss module's first lines and their derivatives."""
    with localcontext() as context:
        context.prec = 50
        b, g, e, lam = Decimal(beta), Decimal(gamma), Decimal(label_smoothing), Decimal(rejected_weight)
        per_w, per_l = (Decimal(1), Decimal(1)) if reduce == "sum" else (Decimal(pair.len_w), Decimal(pair.len_l))
        policy = Decimal(pair.pol_w) / per_w, Decimal(pair.pol_l) / per_l
        reference = Decimal(pair.ref_w) / per_w, Decimal(pair.ref_l) / per_l
        longer = pair.len_w - pair.len_l

        def score(sign: int) -> Decimal:
            """z for sign 1; z′, with the answers in each other's place, for sign −1."""
            (ours, other), (theirs, their_other) = policy[::sign], reference[::sign]
            asked = theirs - lam * their_other
            floored = asked if reference_floor is None else max(asked, Decimal(reference_floor))
            shift = Decimal(margin) + Decimal(pair.shift)
            return b * (ours - lam * other) - g * floored - shift + sign * Decimal(length_penalty) * longer

        (value, slope), (swapped, swapped_slope) = _link_by_decimal(link, score(1)), _link_by_decimal(link, score(-1))
        sign, scale = (1, Decimal(1)) if mode == "conservative" else (-1, 1 - 2 * e)
        mixed = ((1 - e) * value + sign * e * swapped) / scale
        # z has the chosen answer with 1 and the rejected one with −λ; in z′ it is the other way round.
        chosen_slope = ((1 - e) * slope - lam * sign * e * swapped_slope) / scale
        rejected_slope = (sign * e * swapped_slope - lam * (1 - e) * slope) / scale
        sft = Decimal(sft_weight) / pair.len_w
        return {
            "loss": float(mixed - sft * Decimal(pair.pol_w)),
            "grad_w": float(b * chosen_slope / per_w - sft),
            "grad_l": float(b * rejected_slope / per_l),
            "z": float(score(1)),
            "dloss_dz": float(chosen_slope),
        }


def _link_by_decimal(link: str, z: Decimal) -> tuple[Decimal, Decimal]:
    """Return the link's value and slope at z."""
    # Differences of quotients leave 1e-50 where the exact z is 0, the hinge's kink.
    z = Decimal(0) if abs(z) < Decimal("1e-15") else z
    if link == "logistic":
        return (1 + (-z).exp()).ln(), -1 / (1 + z.exp())
    if link == "hinge":
        return max(Decimal(0), -z), Decimal(-1 if z < 0 else 0)
    return z * z, 2 * z


# ---------------------------------------------------------------- the published vectors


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_published_vector_of_the_family_is_reproduced(loss_vectors, quantity, dtype):
    expected = {(row["config"], row["case"]): row[quantity] for row in loss_vectors["results"]}
    compared, wrong = 0, []
    for config in _comparable(loss_vectors):
        for case, value in zip(loss_vectors["cases"], _of_config(loss_vectors["cases"], config, dtype)[quantity], strict=True):
            target = expected[config["name"], case["id"]]
            compared += 1
            if not math.isclose(value, target, rel_tol=RELATIVE_TOLERANCE[dtype], abs_tol=0.0):
                wrong.append((config["name"], case["id"], value, target))
    assert wrong == []
    assert compared == 32 * 20


@pytest.mark.real
def test_only_simpo_smoothed_by_negation_is_outside_our_convention(loss_vectors):
    left_out = [config["name"] for config in _in_family(loss_vectors) if config not in _comparable(loss_vectors)]
    assert left_out == ["simpo_smooth"]


@pytest.mark.real
def test_smoothing_by_negation_really_gives_another_loss(loss_vectors):
    """The left-out configuration is no formality: every one of its 20 losses is below ours."""
    (config,) = [config for config in _in_family(loss_vectors) if config["name"] == "simpo_smooth"]
    ours = _of_config(loss_vectors["cases"], config, torch.float64)["loss"]
    negated = [row["loss"] for row in loss_vectors["results"] if row["config"] == "simpo_smooth"]
    assert all(swap > negate + 1e-6 for swap, negate in zip(ours, negated, strict=True))


@pytest.mark.real
def test_the_eight_kinks_of_the_hinge_have_no_gradient(loss_vectors):
    kinks = [row for row in loss_vectors["results"] if row["kink"]]
    by_name = {config["name"]: config for config in _in_family(loss_vectors)}
    row_of = {case["id"]: index for index, case in enumerate(loss_vectors["cases"])}
    assert len(kinks) == 8
    for kink in kinks:
        found = _of_config(loss_vectors["cases"], by_name[kink["config"]], torch.float64)
        index = row_of[kink["case"]]
        assert (found["loss"][index], found["grad_w"][index], found["grad_l"][index]) == (0.0, 0.0, 0.0), kink


def _in_family(vectors: dict[str, Any]) -> list[dict[str, Any]]:
    return [config for config in vectors["configs"] if config["family"]]


def _comparable(vectors: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations whose smoothing is the label swap, or for which negating z is the same thing."""

    def is_swap(params: dict[str, Any]) -> bool:
        return params.get("flip_convention") == "swap" or not ({"margin", "margin_scale", "ref_floor"} & params.keys())

    return [config for config in _in_family(vectors) if "flip" not in config["params"] or is_swap(config["params"])]


def _of_config(cases: list[dict[str, Any]], config: dict[str, Any], dtype: torch.dtype) -> dict[str, list[float]]:
    """Return the five quantities of all cases under one configuration of the file."""

    def column(name: str) -> Tensor:
        return torch.tensor([case[name] for case in cases], dtype=dtype)

    params = config["params"]
    link = FURTHER_LINKS.get(params.get("link", "logistic"), params.get("link", "logistic"))
    if "scale" in params:
        unscaled = link
        link = lambda z: params["scale"] * apply_link(unscaled, z)  # noqa: E731
    out, gradients = _loss_and_gradients(
        column("pol_w"),
        column("pol_l"),
        column("ref_w"),
        column("ref_l"),
        beta=params["beta"],
        gamma=params["gamma"],
        margin=params.get("margin", 0.0),
        link=link,
        reduce=params.get("reduce", "sum"),
        chosen_lengths=torch.tensor([case["len_w"] for case in cases]),
        rejected_lengths=torch.tensor([case["len_l"] for case in cases]),
        reference_floor=params.get("ref_floor"),
        label_smoothing=params.get("flip", 0.0),
        label_smoothing_mode=params.get("flip_mode", "conservative"),
        sft_weight=params.get("sft", 0.0),
        length_penalty=params.get("length_penalty", 0.0),
        pair_margin=params["margin_scale"] * column("margin") if "margin_scale" in params else None,
    )
    return _quantities(out, gradients)


def _loss_and_gradients(
    policy_chosen: Tensor, policy_rejected: Tensor, *reference: Tensor, **options: Any
) -> tuple[PreferenceLoss, tuple[Tensor, ...]]:
    policy = (policy_chosen.requires_grad_(), policy_rejected.requires_grad_())
    out = preference_loss(*policy, *reference, **options)
    return out, torch.autograd.grad(out.loss.sum(), policy)


def _quantities(out: PreferenceLoss, gradients: tuple[Tensor, ...]) -> dict[str, list[float]]:
    columns = (out.loss, *gradients, out.score, -out.weight)
    return {name: column.tolist() for name, column in zip(QUANTITIES, columns, strict=True)}

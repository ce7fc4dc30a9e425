"""What a link is: the function that makes a pair's loss of its score z, and everything that other rooms ask about it.

A link is added here, and in the closed forms of `audit.dynamics`; a type checker names each place that was forgotten. Names,
formulas and properties need no torch, so that a recipe can be checked and described without it.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple, assert_never

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LinkName = Literal["logistic", "hinge", "squared"]


class Link(NamedTuple):
    """What is known of a link without computing it."""

    formula: str
    """The loss of a pair with score z."""
    largest_weight: float
    """The least upper bound of −link′(z)."""
    has_kink: bool = False
    """Whether a pair that is satisfied (z >= 0) is dropped from one moment to the next, and for good."""
    rests_at_zero: bool = False
    """Whether a pair with z = 0 does not pull."""
    saturates: bool = False
    """Whether weights come near 0 and near the largest without being there, where they no longer say how right a pair is. A
    hinge's are 0 or 1 and nothing between, a square's grow without end."""
    shares_grow_with_gamma: bool = True
    """Whether the share of gradient weight on pairs that the reference ranks right grows with γ at step 0, in [0, 1]."""


def link_named(name: LinkName) -> Link:
    """Return what is known of a link without computing it."""
    match name:
        case "logistic":
            return Link("−log σ(z)", largest_weight=1.0, saturates=True)
        case "hinge":
            return Link("max(0, −z)", largest_weight=1.0, has_kink=True, rests_at_zero=True)
        case "squared":
            return Link("z²", largest_weight=float("inf"), rests_at_zero=True, shares_grow_with_gamma=False)
    assert_never(name)


def link_value(name: LinkName, score: "Tensor") -> "Tensor":
    """Return link(z), elementwise.

    `logsigmoid` and not `softplus`, which switches to a straight line at 20 (error 1.6e-9 there); `relu` and not `clamp`,
    whose subgradient at 0 is 1 and would let a hinge with γ = β start from rounding alone.
    """
    import torch

    match name:
        case "logistic":
            return -torch.nn.functional.logsigmoid(score)
        case "hinge":
            return torch.relu(-score)
        case "squared":
            return score.square()
    assert_never(name)


def link_weight(name: LinkName, score: "np.ndarray") -> "np.ndarray":
    """Return −link′(z), elementwise: how hard a pair pulls at score z, in units of β."""
    match name:
        case "logistic":
            from scipy.special import expit  # dear to import, and a recipe needs none of it

            return expit(-score)
        case "hinge":
            return (score < 0).astype(float)
        case "squared":
            return -2 * score
    assert_never(name)

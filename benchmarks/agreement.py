"""Loss and adapter gradients of every variant against TRL's, before any timing is reported."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.models import Dtype, adapter_of

TOLERANCES: dict[str, float] = {"fp32": 1e-4, "bf16": 2e-2, "nf4": 2e-2}
"""Largest relative difference, of the loss and of the norm of the gradient."""


class Outcome(NamedTuple):
    """What one step left."""

    loss: float
    gradients: dict[str, torch.Tensor]


class Disagreement(RuntimeError):
    """A variant does not compute what TRL computes; timing it would mean nothing."""


def outcome(model: Any, loss: float) -> Outcome:
    """Return copies of the gradients that a step left in a model, with its loss.

    Raises:
        Disagreement: an adapter matrix has no gradient, or only zeros.
    """
    gradients = {}
    for name, parameter in adapter_of(model).items():
        if parameter.grad is None or not parameter.grad.any():
            raise Disagreement(f"{name}: no gradient; the adapter must have B ≠ 0 and take part in the step")
        gradients[name] = parameter.grad.detach().double()
    return Outcome(loss, gradients)


def compare(name: str, found: Outcome, peers: Mapping[str, Outcome], dtype: Dtype) -> dict[str, dict[str, float]]:
    """Return relative differences of a variant to each peer, printed as found.

    Args:
        name: of the variant.
        found: its outcome.
        peers: TRL's outcomes, by name.
        dtype: gives the tolerance.

    Returns:
        For each peer the relative difference of the loss, of all gradients as one vector, and the largest of one matrix.

    Raises:
        Disagreement: the loss or the gradient vector differs by more than the tolerance.
    """
    report = {}
    for peer_name, peer in peers.items():
        differences = {
            "loss": abs(found.loss - peer.loss) / abs(peer.loss),
            "gradient": _relative(found.gradients, peer.gradients, list(peer.gradients)),
            "largest_matrix": max(_relative(found.gradients, peer.gradients, [key]) for key in peer.gradients),
        }
        report[peer_name] = differences
        worst = max(differences["loss"], differences["gradient"])
        if not worst <= TOLERANCES[dtype]:
            raise Disagreement(
                f"{name} against {peer_name}: loss {found.loss:.6f} and {peer.loss:.6f}, relative gradient difference "
                f"{differences['gradient']:.1e}; at most {TOLERANCES[dtype]:.0e} is allowed for {dtype}"
            )
    return report


def check_against(truth: Outcome, found: Mapping[str, Outcome], dtype: Dtype) -> dict[str, dict[str, float]]:
    """Return the relative distance of every step's loss and gradient to those of the float64 step.

    Where chosen and rejected differ by a few tokens, their gradients nearly cancel, and 16 bits leave every program 2 to 2.5 %
    off, TRL's own ways of computing in them too: then ours must not be farther off than the farthest of TRL's, and a tenth.

    Args:
        truth: The float64 step.
        found: Outcomes by name; those of TRL begin with "TRL ".
        dtype: gives the tolerance.

    Raises:
        Disagreement: a step is farther from the truth than the tolerance, and than TRL's steps with a tenth on top.
    """
    distances = {
        name: {
            "loss": abs(one.loss - truth.loss) / abs(truth.loss),
            "gradient": _relative(one.gradients, truth.gradients, list(truth.gradients)),
        }
        for name, one in found.items()
    }
    theirs = max(far["gradient"] for name, far in distances.items() if name.startswith("TRL "))
    allowed = max(TOLERANCES[dtype], 1.1 * theirs)
    for name, far in distances.items():
        if not (far["loss"] <= TOLERANCES[dtype] and far["gradient"] <= allowed):
            raise Disagreement(f"{name}: {far} from the float64 step; at most {allowed:.1e} is allowed for {dtype}")
    return distances


def print_table(report: Mapping[str, Mapping[str, Mapping[str, float]]], default: str, dtype: Dtype) -> None:
    """Print the differences of every variant to TRL's default, and the largest to the fast points of its grid."""
    print(f"\nAgreement, relative (at most {TOLERANCES[dtype]:.0e}; one matrix alone may differ more)")
    columns = f"{'loss':>10} {'gradient':>9} {'matrix':>9}   {'fast: loss':>10} {'gradient':>9}"
    print(f"{'to TRL default, and to the fast points:':<60}{columns}")
    for name, peers in report.items():
        first = peers[default]
        line = f"{name:<60}{first['loss']:10.1e} {first['gradient']:9.1e} {first['largest_matrix']:9.1e}"
        others = [differences for peer, differences in peers.items() if peer != default]
        if others:
            line += f"   {max(d['loss'] for d in others):10.1e} {max(d['gradient'] for d in others):9.1e}"
        print(line)


def _relative(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], names: Sequence[str]) -> float:
    if ours.keys() != theirs.keys():
        raise Disagreement(f"different adapter matrices: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in names)
    return (difference / sum(float(theirs[name].square().sum()) for name in names)) ** 0.5

"""What must hold before the first step, policy = reference where they should be, and a loss that is alive."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import ModelError, TrainingError
from pe_dpo.inference.pairs import pair_terms
from pe_dpo.inference.scorer import Scorer, failing_forwards_named
from pe_dpo.metrics.table import PairTable
from pe_dpo.model.adapter import as_reference
from pe_dpo.model.fingerprint import plain_name
from pe_dpo.objective import Loss, PairLogprobs, PreferenceLoss
from pe_dpo.training.bad_steps import describe_pairs, unfit_pairs

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Largest |log π − log π0| at step 0, per nat: on a CPU it is exactly 0, and every known fault is above 1e-5."""


class StartCheck(NamedTuple):
    """Step 0 in numbers."""

    pairs: int
    largest_difference: float | None
    """max |log π − log π0| over both answers, nats; None where the two need not agree, or γ = 0."""
    loss: float
    score: float
    """Mean z."""

    def describe(self) -> str:
        """Return step 0 as a line for a person."""
        same = "" if self.largest_difference is None else f"max |log π − log π0| {self.largest_difference:g}, "
        return f"step 0: {same}loss {self.loss:.4f}, mean score {self.score:.4g}"


def check_start(
    model: Any,
    pairs: Sequence[EncodedPair],
    scorer: Scorer,
    *,
    loss: Loss,
    policy_is_reference: bool,
    is_fresh: bool = True,
) -> StartCheck:
    """Return step 0 in numbers, from one micro-batch.

    Args:
        model: The PEFT model before its first step.
        pairs: The pairs of the first optimizer step.
        scorer: As in training.
        loss: As in training.
        policy_is_reference: Whether π = π0 by construction; false when training starts from an adapter against the raw base.
        is_fresh: Whether B = 0. Then dropout stays on, which must make no difference; else it is off.

    Raises:
        ModelError: π and π0 differ although they must not: the reference is not what it should be; or the base's forward fails,
            or a tensor of the adapter is not finite.
        TrainingError: no pair pulls at all (say, a hinge whose margin column is 0 everywhere), or not one loss is finite.
    """
    batch = [pairs[index] for index in scorer.split(pairs)[0]]
    model.train(is_fresh)
    for name, parameter in model.named_parameters():  # those of the base were looked at when it was loaded
        if "lora_" in name and not parameter.isfinite().all():
            raise ModelError(
                f"{plain_name(name)} of the adapter has values that are not finite (NaN, infinite); fetch it again"
            )
    with torch.no_grad(), failing_forwards_named(model):
        policy = scorer.logprobs(model, batch)
    reference, difference = None, None
    if loss.needs_reference:
        with as_reference(model) as frozen:
            reference = scorer.logprobs(frozen, batch)
    out = loss(policy, reference, *pair_terms(batch, scorer.device))
    fields = [policy.chosen, policy.rejected, out.loss, *([reference.chosen, reference.rejected] if reference else [])]
    fit = torch.stack([field.double() for field in fields]).isfinite().all(dim=0)
    if not fit.all():
        bad = [pair.where for pair, is_fit in zip(batch, fit.tolist(), strict=True) if not is_fit]
        named = f"before training, log-probs or loss are not finite for {', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}"
        if not fit.any():
            raise TrainingError(f"{named}, all pairs that were tried; look at these rows")
        logger.warning(f"{named} ({len(bad)} of {len(batch)} pairs that were tried); their steps will be skipped")
        batch = [pair for pair, is_fit in zip(batch, fit.tolist(), strict=True) if is_fit]
        policy = PairLogprobs(*(field[fit] for field in policy))
        reference = reference and PairLogprobs(*(field[fit] for field in reference))
        out = PreferenceLoss(*(field[fit] for field in out))
    if reference and policy_is_reference:
        both = (policy.chosen, reference.chosen), (policy.rejected, reference.rejected)
        difference = max(float((one - other).abs().max()) for one, other in both)
    scale = 1.0 + float(torch.cat([policy.chosen, policy.rejected]).abs().max())
    if difference is not None and not difference <= TOLERANCE * scale:
        raise ModelError(
            f"before training, policy and reference differ by {difference:.3g} nats on one batch, so the reference is not the "
            "model that training starts from. Load the base unchanged and give the adapter B = 0, or name adapter.reference"
        )
    counts = any(pair.weight != 0 for pair in batch)
    if counts and not out.weight.any() and not out.score.any() and loss.sft_weight == 0:
        raise TrainingError(
            f"before training, all {len(batch)} pairs have score 0 and pull with weight 0: with link {loss.link} "
            "nothing would ever be learned; set loss.margin > 0, or gamma different from beta"
        )
    return StartCheck(len(batch), difference, float(out.loss.mean()), float(out.score.mean()))


def check_held_out(first: PairTable | None) -> None:
    """Check that the held-out pairs can be measured, since a run that cannot measure them fails at its end.

    Args:
        first: The held-out pairs as scored at step 0; None without.

    Raises:
        TrainingError: a log-prob or a loss is not finite; names the rows.
    """
    unfit = {} if first is None else unfit_pairs(first, needs_reference=first.has_reference)
    if unfit:
        raise TrainingError(
            f"before training, {len(unfit)} of the held-out pairs cannot be measured; {describe_pairs(unfit)}. Correct or "
            "remove these rows"
        )


def check_diagonal(first: PairTable) -> None:
    """Check that at step 0 no pair is ranked one way by the policy and the other way by the reference: they are the same model.

    This holds at γ = 0 too, where the loss does not run the reference. Rounding may turn a near tie (GPUs, 16 bits), so only a
    pair that moved by a hundredth of its log-probs counts.

    Args:
        first: The monitored pairs as scored at step 0, by a policy that starts at the reference.

    Raises:
        ModelError: the reference is another model.
    """
    now, then = first.delta("policy"), first.delta("reference")
    largest = np.max(
        np.abs([first.policy_chosen, first.policy_rejected, first.reference_chosen, first.reference_rejected]), axis=0
    )
    turned = (np.sign(now) * np.sign(then) < 0) & (np.abs(now - then) > 0.01 * (1.0 + largest))
    if turned.any():
        raise ModelError(
            f"before training, policy and reference rank {int(turned.sum())} of {len(now)} pairs in opposite ways, so the "
            "reference is not the model that training starts from. Remove the reference store, or set reference.policy: step; "
            "and load the base unchanged"
        )

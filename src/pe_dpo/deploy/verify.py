"""Whether a merged model does what was trained, measured on held-out pairs and judged relative to what training changed.

    relative KL    KL(trained ‖ merged) / KL(trained ‖ reference)         over next-token distributions at answer positions
    shift          s_i = Δπ_i − Δ0_i, per pair in nats                     what preference training moved
    shift kept     ⟨s_merged, s_trained⟩ / ⟨s_trained, s_trained⟩
    noise floor    the same of the trained model with weights rounded to the served dtype: what no merge can be blamed for
                   (trained in 16 bits, what 16-bit arithmetic does, which is more, and hides small adapters from the pairs)

An absolute KL cannot tell: a small adapter that was lost altogether is nearer to the trained model than bfloat16 arithmetic is.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data import EncodedPair
from pe_dpo.evaluation.pairs import score_pairs
from pe_dpo.evaluation.scorer import Scorer
from pe_dpo.model.scoring import PairLogprobs
from pe_dpo.objective import share_right

KL_BAND = 0.1
"""Largest relative KL."""
SHIFT_BAND = (0.9, 1.1)
NOISE_FACTOR = 1.5
"""Times the floor that is allowed: both are one draw. A lost adapter of ΔW/W 3e-4 had 3.1 times it, a good merge 0.7 to 1.0."""
BYTES = 512 * 1024 * 1024
"""Most memory for the distributions of one model; positions are thinned out evenly to fit."""


class Behaviour(NamedTuple):
    """What a model does on the pairs."""

    logprobs: PairLogprobs
    """Of whole answers; (B,) nats."""
    distributions: list[Tensor]
    """Per answer, float32 (positions, vocabulary) log-probs on the CPU, at the same positions for every model."""


class Agreement(NamedTuple):
    """How near a model comes to the trained one; the reference's own distance beside it."""

    kl: float
    """KL(trained ‖ this), nats per position."""
    kl_reference: float
    """KL(trained ‖ reference), nats per position."""
    shift_kept: float | None
    """None where training shifted nothing."""
    shift_error: float
    """Root mean square over pairs of s_this − s_trained, nats."""
    shift: float
    """Mean of s_this over pairs, nats."""
    shift_trained: float
    top1: float
    """Share of positions with the trained model's most likely token."""
    accuracy: float
    """Share of pairs ranked right by summed log-probs."""
    nll: float
    """−log-prob per token of the chosen answers, nats."""

    @property
    def relative_kl(self) -> float | None:
        """None where training changed nothing."""
        return self.kl / self.kl_reference if self.kl_reference else None


def behaviour(model: Any, pairs: Sequence[EncodedPair], scorer: Scorer, *, token_budget: int) -> Behaviour:
    """Return what a model does on pairs; call in the state to be measured.

    Args:
        model: a causal LM.
        pairs: a few.
        scorer: the way to log-probs.
        token_budget: most tokens of one forward.
    """
    logprobs = score_pairs(model, pairs, scorer, token_budget=token_budget)
    answers = [(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    vocabulary = model.config.get_text_config().vocab_size
    most = max(1, BYTES // (4 * vocabulary * len(answers)))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = [_distributions(model, prompt, answer, most, scorer.device) for prompt, answer in answers]
    finally:
        model.train(was_training)
    return Behaviour(logprobs, found)


def agreement(this: Behaviour, trained: Behaviour, reference: Behaviour) -> Agreement:
    """Return how near a model comes to the trained one.

    Args:
        this: of the model to judge.
        trained: base and adapter, unmerged.
        reference: π0.
    """
    preference, wanted, start = (_preference(one) for one in (this, trained, reference))
    shift, shift_trained = preference - start, wanted - start
    size = float(shift_trained.square().sum())
    lengths = this.logprobs.chosen_lengths.sum()
    pieces = list(zip(trained.distributions, this.distributions, strict=True))
    positions = sum(len(one) for one in trained.distributions)
    return Agreement(
        kl=_kl(trained, this),
        kl_reference=_kl(trained, reference),
        shift_kept=float((shift * shift_trained).sum()) / size if size else None,
        shift_error=float((shift - shift_trained).square().mean().sqrt()),
        shift=float(shift.mean()),
        shift_trained=float(shift_trained.mean()),
        top1=sum(int((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in pieces) / positions,
        accuracy=share_right(preference),
        nll=float(-this.logprobs.chosen.sum() / lengths),
    )


def doubts(merged: Agreement, floor: Agreement | None) -> list[str]:
    """Return in words what is out of the band, of what arithmetic alone cannot explain; empty if the merge is right.

    Args:
        merged: of the merged model.
        floor: of the trained model with the noise of the dtype; None where there is none.
    """
    found = []
    kl_floor, shift_floor = (NOISE_FACTOR * floor.kl, NOISE_FACTOR * floor.shift_error) if floor else (0.0, 0.0)
    if merged.kl > max(KL_BAND * merged.kl_reference, kl_floor):
        found.append(
            f"KL(trained ‖ merged) {merged.kl:.2e} nats is {_times(merged.relative_kl)} of what training changed "
            f"({merged.kl_reference:.2e}; at most {KL_BAND:g} wanted), and above the noise of the dtype ({kl_floor:.2e})"
        )
    kept = merged.shift_kept
    if kept is not None and not SHIFT_BAND[0] <= kept <= SHIFT_BAND[1] and merged.shift_error > shift_floor:
        found.append(
            f"{kept:.3f} of the preference shift kept on held-out pairs (wanted {SHIFT_BAND[0]} to {SHIFT_BAND[1]}), off by "
            f"{merged.shift_error:.2e} nats a pair, above the noise of the dtype ({shift_floor:.2e})"
        )
    return found




def _distributions(model: Any, prompt: np.ndarray, answer: np.ndarray, most: int, device: torch.device) -> Tensor:
    """Log-probs of the next token where an answer's tokens are predicted, at `most` evenly spaced positions of them."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None].to(device)
    predicts = np.arange(len(prompt) - 1, ids.shape[1] - 1)
    chosen = predicts[np.unique(np.linspace(0, len(predicts) - 1, min(most, len(predicts))).round().astype(int))]
    positions = torch.from_numpy(chosen).to(device)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(causal_lm.forward).parameters:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=positions, use_cache=False).logits[0]
    else:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, positions]
    result: Tensor = logits.float().log_softmax(-1).cpu()
    return result


def _preference(one: Behaviour) -> Tensor:
    return (one.logprobs.chosen - one.logprobs.rejected).double()


def _kl(first: Behaviour, second: Behaviour) -> float:
    """Mean over positions of KL(first ‖ second), summed in float64."""
    total, positions = 0.0, 0
    for p, q in zip(first.distributions, second.distributions, strict=True):
        width = min(p.shape[-1], q.shape[-1])  # a resized vocabulary: rows of one only have no mass to speak of
        # Again in float64: float32 log-probs sum to 1 within 1e-7 only, and a KL can be below that.
        p, q = (one[:, :width].double().log_softmax(-1) for one in (p, q))
        total += float((p.exp() * (p - q)).sum())
        positions += len(p)
    return total / positions


def _times(value: float | None) -> str:
    return "more than all" if value is None else f"{value:.2f}"

"""Whether a merged model does what was trained, measured on held-out pairs and judged relative to what training changed.

    relative KL    KL(trained ‖ merged) / KL(trained ‖ reference)         over next-token distributions at answer positions
    shift          s_i = Δπ_i − Δ0_i, per pair in nats                     what preference training moved
    shift kept     ⟨s_merged, s_trained⟩ / ⟨s_trained, s_trained⟩         ± its standard error over pairs
    noise floor    KL of the trained model with weights rounded to the served dtype: what no merge can be blamed for

An absolute KL cannot tell: a small adapter that was lost altogether is nearer to the trained model than bfloat16 arithmetic is.
So all three models are computed in float32, whatever they were trained or will be served in: in 16 bits only large adapters
stand out from the arithmetic.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data import EncodedPair
from pe_dpo.errors import OutOfMemory
from pe_dpo.estimate.merging import TOKENS_TOGETHER
from pe_dpo.inference.divergence import kl
from pe_dpo.inference.layerwise import layer_by_layer
from pe_dpo.metrics.estimates import share_right
from pe_dpo.model.base import evaluating
from pe_dpo.model.layers_on_disk import decoder_layers
from pe_dpo.model.out_of_memory import is_out_of_memory
from pe_dpo.objective import PairLogprobs, token_logprobs

KL_BAND = 0.1
"""Largest relative KL, where the noise of rounding is not more."""
SHIFT_BAND = 0.1
"""How far the share of the shift kept may be from 1, beside DEVIATIONS of its own standard error."""
DEVIATIONS = 3.0
TOO_VAGUE = 0.3
"""Standard error of the share kept above which pairs cannot tell a merge from a lost adapter."""
NOISE_FACTOR = 1.5
"""Times the floor that a KL may be: both are one draw. A lost adapter of |ΔW|/|W| 3e-4 had 3.1 times it, good ones 0.7 to 1."""
SMALLEST = 1e-10
"""Nats of KL that float32 arithmetic in another order makes of equal weights; measured: 1e-13."""
DISTRIBUTION_BYTES = 512 * 1024 * 1024
"""Most memory for the distributions of one model; positions are thinned out evenly to fit."""
_HEAD = "head"


class Behaviour:
    """What a model does on pairs.

    Args:
        logprobs: of whole answers; (B,) nats.
        distributions: per answer, float32 (positions, vocabulary) log-probs on the CPU, at the same positions for every model.
    """

    def __init__(self, logprobs: PairLogprobs, distributions: Sequence[Tensor]) -> None:
        self.logprobs, self.distributions = logprobs, distributions

    @property
    def preference(self) -> Tensor:
        """Log-prob of the chosen answer minus that of the rejected one; (B,) float64 nats."""
        return (self.logprobs.chosen - self.logprobs.rejected).double()

    def kl(self, other: "Behaviour") -> float:
        """Return the mean over positions of KL(this ‖ other), nats, summed in float64."""
        total, positions = 0.0, 0
        for p, q in zip(self.distributions, other.distributions, strict=True):
            width = min(p.shape[-1], q.shape[-1])  # a resized vocabulary: rows of one only have no mass to speak of
            # Again in float64: float32 log-probs sum to 1 within 1e-7 only, and a KL can be below that.
            p, q = (one[:, :width].double().log_softmax(-1) for one in (p, q))
            total += float(kl(p.exp(), p, q).sum())
            positions += len(p)
        return total / positions


class Agreement(NamedTuple):
    """How near a model comes to the trained one; the reference's own distance beside it."""

    kl: float
    """KL(trained ‖ this), nats per position."""
    kl_reference: float
    """KL(trained ‖ reference), nats per position."""
    shift_kept: float | None
    """None where training shifted nothing."""
    shift_kept_error: float | None
    """Standard error of `shift_kept` over pairs."""
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

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, JSON-ready."""
        return {**self._asdict(), "relative_kl": self.relative_kl}


def measure(
    model: Any, pairs: Sequence[EncodedPair], loaded: Callable[[str], AbstractContextManager[Any]] | None = None
) -> Behaviour:
    """Return what a model does on pairs, in the state it is in: one forward an answer, without padding.

    Args:
        model: a causal LM, under PEFT or not.
        pairs: a few.
        loaded: where decoder layers do not have their weights all the time, in which block the one of a name has; see
            `model.layers_on_disk`.

    Raises:
        OutOfMemory: the longest answer does not fit.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    answers = [(pair, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    most = max(1, DISTRIBUTION_BYTES // (4 * model.config.get_text_config().vocab_size * len(answers)))
    work = [partial(_answer, model, causal_lm, pair.prompt_ids, ids, most) for pair, ids in answers]
    try:
        with evaluating(model):
            if loaded is None:
                found = [piece() for piece in work]
            else:
                head = causal_lm.get_output_embeddings()
                layers = {**decoder_layers(causal_lm), **({} if head is None else {_HEAD: head})}
                found = []
                for start, end in _groups([len(pair.prompt_ids) + len(ids) for pair, ids in answers]):
                    within = lambda name: nullcontext() if name == _HEAD else loaded(name)  # noqa: E731
                    found += layer_by_layer(work[start:end], layers, within)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        pair, ids = max(answers, key=lambda answer: len(answer[0].prompt_ids) + len(answer[1]))
        raise OutOfMemory(
            f"out of memory while a model was measured on {len(pairs)} pairs; the longest answer is one of {pair.where}, with "
            f"{len(pair.prompt_ids) + len(ids)} tokens; name shorter ones with `data`; `pairs` 0 verifies the tensors alone"
        ) from error
    logprobs = torch.tensor([logprob for logprob, _ in found], dtype=torch.float64)
    lengths = torch.tensor([len(ids) for _, ids in answers])
    both = PairLogprobs(logprobs[::2], logprobs[1::2], lengths[::2], lengths[1::2])
    return Behaviour(both, [distribution for _, distribution in found])


def _answer(model: Any, causal_lm: Any, prompt: np.ndarray, answer: np.ndarray, most: int) -> tuple[float, Tensor]:
    """The log-prob of an answer, and the distributions at `most` of its tokens."""
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64)).to(device)
    predicts = torch.arange(len(prompt) - 1, len(ids) - 1, device=device)
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), "use_cache": False}
    with torch.no_grad():
        if "logits_to_keep" in inspect.signature(causal_lm.forward).parameters:
            logits = model(**inputs, logits_to_keep=predicts).logits[0]
        else:
            logits = model(**inputs).logits[0, predicts]
        per_token = token_logprobs(logits, ids[predicts + 1]).double()
        evenly = np.linspace(0, len(predicts) - 1, min(most, len(predicts))).round().astype(int)
        kept = torch.from_numpy(np.unique(evenly)).to(device)
        return float(per_token.sum()), logits[kept].float().log_softmax(-1).cpu()


def _groups(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield which forwards go through the layers together, from and to, by the tokens of each."""
    start = total = 0
    for end, count in enumerate(tokens):
        if end > start and total + count > TOKENS_TOGETHER:
            yield start, end
            start, total = end, 0
        total += count
    yield start, len(tokens)


def agreement(this: Behaviour, trained: Behaviour, reference: Behaviour) -> Agreement:
    """Return how near a model comes to the trained one.

    Args:
        this: of the model to judge.
        trained: base and adapter, unmerged.
        reference: π0.
    """
    shift, shift_trained = this.preference - reference.preference, trained.preference - reference.preference
    size = float(shift_trained.square().sum())
    kept = kept_error = None
    if size:  # the slope of a line through the origin, and its standard error
        kept = float((shift * shift_trained).sum()) / size
        residuals = shift - kept * shift_trained
        kept_error = float((residuals.square().sum() / max(1, len(residuals) - 1) / size).sqrt())
    pieces = list(zip(trained.distributions, this.distributions, strict=True))
    return Agreement(
        kl=trained.kl(this),
        kl_reference=trained.kl(reference),
        shift_kept=kept,
        shift_kept_error=kept_error,
        shift_error=float((shift - shift_trained).square().mean().sqrt()),
        shift=float(shift.mean()),
        shift_trained=float(shift_trained.mean()),
        top1=sum(int((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in pieces) / sum(len(p) for p, _ in pieces),
        accuracy=share_right(this.preference.numpy()),
        nll=float(-this.logprobs.chosen.sum() / this.logprobs.chosen_lengths.sum()),
    )


def name_expected(scale: float) -> tuple[str, str]:
    """Return what the model that a merge is held against is called, and what made it of the reference.

    Args:
        scale: of what is served, toward the reference; 1 is what was trained.
    """
    return ("trained", "training") if scale == 1 else ("scaled", "the scaled update")


def verification_failures(merged: Agreement, floor: Agreement | None, *, scale: float = 1.0) -> list[str]:
    """Return in words what is out of the band, of what rounding alone cannot explain; empty if the merge is right.

    Args:
        merged: of the merged model.
        floor: of the trained model with the noise of rounding, or of 16-bit arithmetic; None where there is none to speak of.
        scale: of what is served; for the words.
    """
    failures = []
    name, cause = name_expected(scale)
    if not all(math.isfinite(value) for value in (merged.kl, merged.kl_reference, merged.shift_error)):
        return [f"the merged model, or the {name} one, gives values that are not finite"]
    noise = NOISE_FACTOR * floor.kl if floor and math.isfinite(floor.kl) else 0.0
    if merged.kl > max(KL_BAND * merged.kl_reference, noise) and merged.kl > SMALLEST:
        share = "more than all" if merged.relative_kl is None else f"{merged.relative_kl:.2f}"
        failures.append(
            f"KL({name} ‖ merged) {merged.kl:.2e} nats is {share} of what {cause} changed "
            f"({merged.kl_reference:.2e}; at most {KL_BAND:g} wanted), and more than the noise of rounding ({noise:.2e})"
        )
    kept, error = merged.shift_kept, merged.shift_kept_error
    if kept is not None and error is not None and abs(kept - 1) > SHIFT_BAND + DEVIATIONS * error:
        failures.append(f"{kept:.3f} ± {error:.3f} of the preference shift kept on held-out pairs (wanted 1 ± {SHIFT_BAND})")
    return failures


def is_inconclusive(merged: Agreement, floor: Agreement | None) -> bool:
    """Return whether the pairs could not have told a merge from a lost adapter: the update is within the noise of rounding."""
    lost_would_show = floor is None or merged.kl_reference > NOISE_FACTOR * floor.kl
    error = merged.shift_kept_error
    return not lost_would_show and (error is None or error > TOO_VAGUE)

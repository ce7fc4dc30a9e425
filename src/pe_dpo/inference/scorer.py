"""How pairs go through one model: as packed rows where that is shown to be right for it, else padded.

Packed rows are fast and need a model whose layers look at other tokens through exchangeable attention alone. Whether it is one
is not looked up but tried: a few pairs, the longest among them, must give the log-probs and gradients of the padded path.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data.batches import pack, pad, shared_tokens, split_by_tokens, split_into_rows
from pe_dpo.data.pairs import EncodedPair, common_start, row_length
from pe_dpo.errors import ModelError
from pe_dpo.inference.logprobs import PairLogprobs, packed_pair_logprobs, pair_logprobs
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.model.attention import Kind, switch_off, switch_on

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference between packed and padded log-probs, nats per √token: rounding errors add up like a random walk. Measured
on tiny and small models: 1e-6 in float32, 1e-2 in bfloat16; a pair that sees another, or loses its prompt, is off by 0.1."""

GRADIENT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference of the adapters' gradients."""

REFUSALS = (ModelError, RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
"""What a model that cannot be packed answers when it is tried; memory that runs out is another matter."""


Path = Literal["padded", "segments", "varlen", "dense"]


class Scorer(NamedTuple):
    """One way to the log-probs of pairs; the same for policy and reference."""

    path: Path
    """padded, or how attention over packed rows is computed (`model.attention.Kind`)."""
    device: torch.device
    depends_on_company: bool = False
    """Whether a pair's log-probs change with what else is in the batch: then the reference must be scored beside the policy."""

    def split(self, pairs: Sequence[EncodedPair], token_budget: int) -> list[list[int]]:
        """Return micro-batches as lists of indices into `pairs`, each index once, within the budget of tokens."""
        split = split_by_tokens if self.path == "padded" else split_into_rows
        return split(pairs, token_budget)

    def tokens(self, pairs: Sequence[EncodedPair]) -> int:
        """Return the tokens of one micro-batch of these pairs, padding included."""
        if self.path == "padded":
            return 2 * len(pairs) * max(row_length(pair) for pair in pairs)
        return shared_tokens(pairs)

    def logprobs(self, model: Any, pairs: Sequence[EncodedPair]) -> PairLogprobs:
        """Return the pairs' log-probs in their order, on the model's device; with gradients where they are enabled."""
        if self.path == "padded":
            return pair_logprobs(model, *pad(pairs, self.device))
        return packed_pair_logprobs(model, pack(pairs).to(self.device), kind=self.path)


def choose_scorer(
    model: Any,
    pairs: Sequence[EncodedPair],
    *,
    device: torch.device | str,
    packing: bool | Literal["auto"] = "auto",
) -> Scorer:
    """Return the fastest way that gives the padded path's numbers on this model, and leave the model ready for it.

    Args:
        model: a causal LM, under PEFT or not, in the state in which it will be used.
        pairs: those that will be scored.
        device: of the model.
        packing: False for padded; "auto" for packed where it is right; True to insist on it.

    Raises:
        ModelError: packed rows were insisted on and are not right for this model.
    """
    padded = Scorer("padded", torch.device(device))
    was_training = model.training
    model.eval()
    try:
        probe = _probe(pairs)
        path: Path = "padded"
        reason = ""
        if packing is not False:
            path, reason = _packed_path(padded, model, probe)
        if path == "padded" and packing is True:
            raise ModelError(f"train.packing: packed rows are not right for this model ({reason}); set train.packing: auto")
        if path == "padded" and packing is not False:
            logger.info(f"padded rows: packed rows are not right for this model ({reason})")
        scorer = padded._replace(path=path)
        if _depends_on_company(scorer, model, probe):
            logger.warning(
                "this model's log-probs depend on what else is in the batch; the reference is computed in every step"
            )
            scorer = scorer._replace(depends_on_company=True)
    except torch.OutOfMemoryError as error:
        longest = max(row_length(pair) for pair in pairs)
        raise ModelError(
            f"out of memory while a few pairs were tried without training (the longest has {longest} tokens); set a smaller "
            "data.max_length, or model.quantize: nf4"
        ) from error
    finally:
        model.train(was_training)
    return scorer


def possible_paths(device: str, dtype: torch.dtype, packing: bool | Literal["auto"] = "auto") -> list[Path]:
    """Return the ways that `choose_scorer` may choose for a model of this dtype on this device, its favourite first."""
    packed = _kinds(torch.device(device), dtype) if packing is not False else []
    return [*packed, *(["padded"] if packing is not True else [])]  # type: ignore[list-item]  # both are Paths


def _packed_path(padded: Scorer, model: Any, probe: Sequence[EncodedPair]) -> tuple[Path, str]:
    """Return the fastest path that is right, and why no faster one is; the model is left ready for it."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    wanted = torch.cat([_numbers(padded, model, [pair]) for pair in probe])
    gradient = _gradient(padded, model, probe[:2])
    try:
        before = switch_on(causal_lm)
    except REFUSALS as error:
        return "padded", _words(error)
    reasons: list[str] = []
    for kind in _kinds(padded.device, causal_lm.dtype):
        packed = padded._replace(path=kind)
        refused = _refutation(packed, model, probe, wanted, gradient) or _leak(packed, model, probe)
        if refused is None:
            logger.info(f"packed rows: prompts and common starts of answers once ({'; '.join([kind, *reasons])})")
            return kind, ""
        reasons.append(f"{kind}: {refused}")
    switch_off(causal_lm, before)
    return "padded", "; ".join(reasons)


def _kinds(device: torch.device, dtype: torch.dtype) -> list[Kind]:
    """Ways of attention to try, fastest first."""
    if device.type != "cuda":
        return ["segments"]
    return ["varlen", "segments", "dense"] if dtype in (torch.bfloat16, torch.float16) else ["segments", "dense"]


def _probe(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Shortest, middle and longest pairs, the short ones first: what windows and scaled positions do shows on the longest."""
    order = sorted(pairs, key=row_length)
    return [order[index] for index in sorted({0, len(order) // 4, len(order) // 2, len(order) - 1})]


def _refutation(
    packed: Scorer, model: Any, probe: Sequence[EncodedPair], wanted: Tensor, wanted_gradient: Tensor | None
) -> str | None:
    """Return why this path is not right for the model, or None."""
    try:
        found = _numbers(packed, model, probe)
        gradient = _gradient(packed, model, probe[:2])
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return _words(error)
    dtype = numeric_dtype(model)
    worst = float(((found - wanted)[:, :2].abs() / found[:, 2:].sqrt()).max())
    if not worst <= TOLERANCE[dtype]:
        return f"log-probs differ from the padded ones by {worst:.2g} nats per √token"
    if gradient is not None and wanted_gradient is not None:
        off = float((gradient - wanted_gradient).norm() / wanted_gradient.norm().clamp_min(1e-30))
        if not off <= GRADIENT_TOLERANCE[dtype]:
            return f"gradients differ from the padded ones by {off:.2g}"
    return None


def _leak(packed: Scorer, model: Any, probe: Sequence[EncodedPair]) -> str | None:
    """Return which stranger moves a pair's log-probs, or None: other tokens of the same number must not move them at all.

    Parallel hybrids attend like everybody else and carry a state along besides; in bfloat16 what it carries can be less than
    the rounding that `_refutation` must allow.
    """
    stranger, *others = reversed(probe)
    turned = replace(stranger, prompt_ids=stranger.prompt_ids[::-1].copy())
    own = (
        common_start([stranger.chosen_ids, stranger.rejected_ids]) + 1
    )  # the first token of its own stays, or starts would meet
    half = replace(stranger, chosen_ids=np.concatenate([stranger.chosen_ids[:own], stranger.chosen_ids[own:][::-1]]))
    before = _numbers(packed, model, [stranger, *others])
    allowed = _noise(packed, model) * before[:, 2:].amax(dim=1, keepdim=True).sqrt()
    # Who changes, whose log-probs (rows, then chosen and rejected) must stay, and what it means if they do not.
    for changed, rows, sides, words in (
        (turned, slice(1, None), slice(0, 2), "another pair in the row moves a log-prob"),
        (half, slice(0, 1), slice(1, 2), "the chosen answer moves the rejected one's log-prob"),
    ):
        if shared_tokens([changed, *others]) != shared_tokens([stranger, *others]):
            continue  # another shape of the row
        off = (_numbers(packed, model, [changed, *others]) - before)[rows, sides].abs()
        if (off > allowed[rows]).any():
            return f"{words} by {float(off.max()):.2g} nats"
    return None


def _depends_on_company(scorer: Scorer, model: Any, probe: Sequence[EncodedPair]) -> bool:
    """Whether the shortest pair scores otherwise beside the longest: rotary scaling by the longest row, 8-bit outliers."""
    if getattr(model, "is_loaded_in_8bit", False):
        return True
    alone, beside = (_numbers(scorer, model, pairs)[0] for pairs in (probe[:1], [probe[0], probe[-1]]))
    return bool(((alone - beside)[:2].abs() > TOLERANCE[numeric_dtype(model)] * alone[2:].sqrt()).any())


def _noise(scorer: Scorer, model: Any) -> float:
    """Nats per √token by which equal sums may differ: rounding on a CPU, grouping of experts on a GPU, 8-bit outliers."""
    if getattr(model, "is_loaded_in_8bit", False):
        return TOLERANCE[torch.bfloat16]
    return 1e-5 if scorer.device.type == "cpu" else 0.1 * TOLERANCE[numeric_dtype(model)]


def numeric_dtype(model: Any) -> torch.dtype:
    """Return the dtype whose rounding a model's log-probs show: 8-bit products are as coarse as bfloat16."""
    dtype: torch.dtype = torch.bfloat16 if getattr(model, "is_loaded_in_8bit", False) else model.dtype
    return dtype


def _numbers(scorer: Scorer, model: Any, pairs: Sequence[EncodedPair]) -> Tensor:
    """Return (B, 4) float64: log-prob of chosen and rejected, tokens of chosen and rejected."""
    with torch.no_grad():
        return torch.stack([field.double() for field in scorer.logprobs(model, pairs)], dim=1)


def _gradient(scorer: Scorer, model: Any, pairs: Sequence[EncodedPair]) -> Tensor | None:
    """The adapters' gradient of the summed preference, flat; None if nothing is trained."""
    parameters = adapter_parameters(model)
    if not parameters:
        return None
    with torch.enable_grad():
        scored = scorer.logprobs(model, pairs)
        gradients = torch.autograd.grad((scored.chosen - scored.rejected).sum(), parameters, allow_unused=True)
    filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))
    return torch.cat([g.flatten() for g in filled])


def _words(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if isinstance(error, ModelError) else f"its forward does not take packed rows: {line}"

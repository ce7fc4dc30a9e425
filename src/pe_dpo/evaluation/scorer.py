"""How pairs go through one model: as packed rows where that is shown to be right for it, else padded.

Packed rows are fast and need a model whose layers look at other tokens through exchangeable attention alone. Whether it is one
is not looked up but tried: a few pairs, the longest among them, must give the log-probs and gradients of the padded path.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pe_dpo.data.batches import pad, row_length, split_by_tokens
from pe_dpo.data.packing import pack, shared_tokens, split_into_rows
from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import ModelError
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.model.attention import Kind, switch_off, switch_on
from pe_dpo.model.scoring import PairLogprobs, packed_pair_logprobs, pair_logprobs

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference between packed and padded log-probs, nats per √token: rounding errors add up like a random walk. Measured
on tiny and small models: 1e-6 in float32, 1e-2 in bfloat16; a pair that sees another, or loses its prompt, is off by 0.1."""

GRADIENT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference of the adapters' gradients."""

REFUSALS = (ModelError, RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
"""What a model that cannot be packed answers when it is tried."""


class Scorer(NamedTuple):
    """One way to the log-probs of pairs; the same for policy and reference."""

    path: Literal["padded", "segments", "varlen", "dense"]
    """padded, or how attention over packed rows is computed (`model.attention.Kind`)."""
    device: torch.device

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
            return pair_logprobs(model, *pad(pairs).to(self.device))
        return packed_pair_logprobs(model, pack(pairs).to(self.device), kind=self.path)


def choose_scorer(
    model: Any,
    pairs: Sequence[EncodedPair],
    *,
    device: torch.device | str,
    packing: bool | Literal["auto"] = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> Scorer:
    """Return the fastest way that gives the padded path's numbers on this model, and leave the model ready for it.

    Args:
        model: a causal LM, under PEFT or not, in the state in which it will be used.
        pairs: those that will be scored.
        device: of the model.
        packing: False for padded; "auto" for packed where it is right; True to insist on it.
        say: gets one line: which way, and why not the fastest.

    Raises:
        ModelError: packed rows were insisted on and are not right for this model.
    """
    padded = Scorer("padded", torch.device(device))
    if packing is False:
        return padded
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    probe = _probe(pairs)
    was_training = model.training
    model.eval()
    before, reason = None, ""
    try:
        wanted = [_numbers(padded, model, [pair]) for pair in probe]
        gradient = _gradient(padded, model, probe[:2])
        before = switch_on(causal_lm)
        for kind in _kinds(padded.device, causal_lm.dtype):
            packed = Scorer(kind, padded.device)
            refused = _refutation(packed, model, probe, torch.cat(wanted), gradient)
            if refused is None:
                say(f"packed rows: prompts and common starts of answers once ({kind}){reason}")
                return packed
            reason = f"; {kind}: {refused}"
    except REFUSALS as error:
        reason = f"; {_words(error)}"
    finally:
        model.train(was_training)
    if before is not None:
        switch_off(causal_lm, before)
    reason = reason.removeprefix("; ")
    if packing is True:
        raise ModelError(f"train.packing: packed rows are not right for this model ({reason}); set train.packing: auto")
    say(f"padded rows: packed rows are not right for this model ({reason})")
    return padded


def _kinds(device: torch.device, dtype: torch.dtype) -> list[Kind]:
    """Ways of attention to try, fastest first."""
    if device.type != "cuda":
        return ["segments"]
    return ["varlen", "dense"] if dtype in (torch.bfloat16, torch.float16) else ["dense"]


def _probe(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Shortest, middle and longest pairs, the short ones first: what windows and scaled positions do shows on the longest."""
    order = sorted(pairs, key=row_length)
    return [order[index] for index in sorted({0, len(order) // 4, len(order) // 2, len(order) - 1})]


def _refutation(
    packed: Scorer, model: Any, probe: Sequence[EncodedPair], wanted: Tensor, wanted_gradient: Tensor | None
) -> str | None:
    """Return why this path is not right for the model, or None."""
    try:
        found = _numbers(packed, model, probe).view(4, len(probe)).T.reshape(-1)
        gradient = _gradient(packed, model, probe[:2])
    except REFUSALS as error:
        return _words(error)
    dtype = torch.bfloat16 if getattr(model, "is_loaded_in_8bit", False) else model.dtype
    logprobs, tokens = found.view(-1, 4)[:, :2], found.view(-1, 4)[:, 2:]
    worst = float(((logprobs - wanted.view(-1, 4)[:, :2]).abs() / tokens.sqrt()).max())
    if not worst <= TOLERANCE[dtype]:
        return f"log-probs differ from the padded ones by {worst:.2g} nats per √token"
    if gradient is not None and wanted_gradient is not None:
        off = float((gradient - wanted_gradient).norm() / wanted_gradient.norm().clamp_min(1e-30))
        if not off <= GRADIENT_TOLERANCE[dtype]:
            return f"gradients differ from the padded ones by {off:.2g}"
    return None


def _numbers(scorer: Scorer, model: Any, pairs: Sequence[EncodedPair]) -> Tensor:
    """Log-probs and lengths, one after the other: 4 numbers per pair, by field."""
    with torch.no_grad():
        return torch.cat([field.double() for field in scorer.logprobs(model, pairs)])


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

"""How pairs go through one model: as packed rows where that is shown to be right for it, else padded.

Packed rows are fast and need a model whose layers look at other tokens through exchangeable attention alone. Whether it is one
is not looked up but tried: a few pairs, the longest among them, must give the log-probs and gradients of the padded path.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from pe_dpo.data.batches import (
    completion_tokens,
    completions_of,
    divide,
    pack,
    pad,
    shared_tokens,
    split_by_tokens,
    split_into_rows,
)
from pe_dpo.data.encoded import by_length
from pe_dpo.data.pairs import EncodedPair, common_start, row_length
from pe_dpo.errors import ModelError, OutOfMemory
from pe_dpo.inference.handed import handed_pair_logprobs, handed_token_logprobs, handed_tokens
from pe_dpo.inference.logprobs import (
    concatenate,
    divided_pair_logprobs,
    moved,
    packed_pair_logprobs,
    packed_token_logprobs,
    pair_logprobs,
)
from pe_dpo.inference.rounding import LEAST_NOISE, MOST_NOISE, SPARED, TYPICAL, Rounding, least_noise
from pe_dpo.model.adapter import adapter_parameters
from pe_dpo.model.attention import Kind, ordinary_in_float32, switch_on
from pe_dpo.model.base import evaluating
from pe_dpo.model.fixed import fixed_weights
from pe_dpo.model.out_of_memory import is_out_of_memory
from pe_dpo.objective import PairLogprobs
from pe_dpo.objective.head import wide_logits
from pe_dpo.objective.logprobs import completion_token_logprobs
from pe_dpo.progress import advance

logger = logging.getLogger(__name__)

TOKENS = 4096
"""Most tokens of one forward, unless somebody says: without gradients little has to be kept of them."""

GRADIENT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative difference of the adapters' gradients that is not looked into; a larger one may be three times the noise."""

DENSE_TOKENS = 4096
"""Most tokens of a row whose attention has a mask: it computes T² scores, at 4096 a quarter of what a 2B model's layer computes
besides, at 16,384 as much."""

REFUSALS = (ModelError, RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
"""What a model that cannot be packed answers when it is tried; memory that runs out is another matter."""

ScoringPath = Literal["padded", "handed", "segments", "varlen", "dense"]
"""padded, or padded answers to which their prompt's state is handed (`inference.handed`), or how attention over packed rows is
computed (`model.attention.Kind`)."""
NOT_PACKED = "padded", "handed"
"""Paths that leave a model's attention what it was."""

_Result = TypeVar("_Result")


class Scorer:
    """One way to the log-probs of pairs; the same for policy and reference.

    Args:
        path: through the model.
        device: of the model.
        token_budget: most tokens of one forward; halved when memory runs out.
        tree_budget: most tokens of one forward where a larger one spares reading something twice; by default `token_budget`.
        is_batch_dependent: whether a pair's log-probs change with what else is in the batch: then the reference must be scored
            beside the policy.
        noise: nats by which rounding may move the log-prob of a token from one batch or machine to another.
    """

    def __init__(
        self,
        path: ScoringPath,
        device: torch.device,
        *,
        token_budget: int = TOKENS,
        tree_budget: int = 0,
        is_batch_dependent: bool = False,
        noise: float = LEAST_NOISE,
    ) -> None:
        self.path, self.device, self.noise = path, device, noise
        self.token_budget, self.tree_budget, self.is_batch_dependent = token_budget, tree_budget, is_batch_dependent

    def split(self, pairs: Sequence[EncodedPair]) -> list[list[int]]:
        """Return micro-batches as lists of indices into `pairs`, each index once, within the budget of tokens."""
        if self.path == "padded":
            return split_by_tokens(pairs, self.token_budget)
        if self.path == "handed":
            return _split_by_prompt(pairs, self.token_budget)
        return split_into_rows(pairs, *self._budgets())

    def tokens(self, pairs: Sequence[EncodedPair]) -> int:
        """Return the tokens of one micro-batch of these pairs, padding included; of the largest row where several divide it."""
        if self.path == "padded":
            return 2 * len(pairs) * max(row_length(pair) for pair in pairs)
        if self.path == "handed":
            return handed_tokens(pairs)
        completions, rows, _ = divide(pairs, self._budgets()[1])
        return max(completion_tokens([completions[index] for index in row]) for row in rows)

    def logprobs(self, model: Any, pairs: Sequence[EncodedPair]) -> PairLogprobs:
        """Return the log-probs of one micro-batch in its order, on the model's device; with gradients where they are on."""
        if self.path == "padded":
            return pair_logprobs(model, *pad(pairs, self.device))
        if self.path == "handed":  # what recomputes activations does so without a cache
            recomputes = model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            return pair_logprobs(model, *pad(pairs, self.device)) if recomputes else handed_pair_logprobs(model, pairs)
        completions, rows, edges = divide(pairs, self._budgets()[1])
        if len(rows) > 1:
            return divided_pair_logprobs(model, completions, rows, edges, kind=self.path)
        return packed_pair_logprobs(model, pack(pairs), kind=self.path)

    def _budgets(self) -> tuple[int, int]:
        """Most tokens of a row, and of one that spares reading something twice."""
        most = DENSE_TOKENS if self.path == "dense" else sys.maxsize
        return min(self.token_budget, most), min(max(self.token_budget, self.tree_budget), most)

    def token_logprobs(self, model: Any, pairs: Sequence[EncodedPair]) -> list[Tensor]:
        """Return the log-probs of the scored tokens of each answer, (A,) float64 on the CPU: chosen, rejected, pair by pair."""
        if self.path == "padded":
            with wide_logits(model.get_output_embeddings()):
                per_token, scored = completion_token_logprobs(model, *pad(pairs, self.device))
            sizes, flat = scored.sum(dim=1), per_token[scored]
            chosen, rejected = (list(range(first, first + len(pairs))) for first in (0, len(pairs)))
        elif self.path == "handed":
            completions, edges = completions_of(pairs)
            tokens = [one.detach().cpu() for one in handed_token_logprobs(model, completions)]
            return [tokens[answer] for both in edges.tolist() for answer in both]
        else:
            row = pack(pairs)
            sizes, flat = row.lengths, packed_token_logprobs(model, row, kind=self.path)
            chosen, rejected = row.chosen.tolist(), row.rejected.tolist()
        answers = flat.detach().cpu().split(sizes.tolist())
        return [answers[answer] for both in zip(chosen, rejected, strict=True) for answer in both]

    def score_pairs(self, model: Any, pairs: Sequence[EncodedPair]) -> PairLogprobs:
        """Return the log-probs of all pairs in their order, on the CPU, without gradients.

        Args:
            model: a causal LM in the state to be measured (adapters on or off).
            pairs: any number of pairs, in any order.

        Raises:
            OutOfMemory: a pair does not fit alone.
        """

        def score() -> PairLogprobs:
            batches, parts, done = self.split(pairs), [], 0
            for batch in batches:
                scored = self.logprobs(model, [pairs[index] for index in batch])
                parts.append(moved(scored, "cpu"))
                done += len(batch)
                advance(done, len(pairs))
            back = torch.tensor([index for batch in batches for index in batch]).argsort()
            return PairLogprobs(*(field[back] for field in concatenate(parts)))

        with evaluating(model), fixed_weights():
            return self.within_memory(pairs, score)

    def within_memory(self, pairs: Sequence[EncodedPair], work: Callable[[], _Result]) -> _Result:
        """Return what the work on these pairs returns; out of memory, begin it again with half the tokens per forward.

        Raises:
            OutOfMemory: every pair goes alone already.
        """
        on_gpu = self.device.type == "cuda"
        random_state, on_device = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_gpu else None
        while True:
            budget = self.token_budget
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                torch.set_rng_state(random_state)  # the second try draws the dropout of the first
                if on_device is not None:
                    torch.cuda.set_rng_state(on_device, self.device)
                # What was tried is the split of then: work inside may have run out and gone on with a smaller budget.
                lowered, self.token_budget = self.token_budget, budget
                if self._cannot_be_split(pairs):
                    longest = max(pairs, key=lambda pair: self.tokens([pair]))
                    raise OutOfMemory(
                        f"out of memory with one pair at a time; the longest is {longest.where} with "
                        f"{self.tokens([longest])} tokens; set a smaller data.max_length, or model.quantize: nf4"
                    ) from error
            torch.cuda.empty_cache()  # here, where no frame of the failed try holds its tensors
            # Trees too: what is read again is time, and no more.
            self.token_budget, self.tree_budget = min(lowered, budget // 2), 0
            logger.warning(f"out of memory; going on with {self.token_budget} tokens per forward (nothing is lost)")

    def _cannot_be_split(self, pairs: Sequence[EncodedPair]) -> bool:
        """Whether every row has one pair, or one answer, already."""
        batches = self.split(pairs)
        if self.path in NOT_PACKED or max(map(len, batches)) == 1:
            return max(map(len, batches)) == 1
        for batch in (batch for batch in batches if len(batch) > 1):
            completions, rows, _ = divide([pairs[index] for index in batch], self._budgets()[1])
            if len(completions) > 2 and max(map(len, rows)) > 1:
                return False
        return True


def choose_scorer(
    model: Any,
    pairs: Sequence[EncodedPair],
    *,
    packing: bool | Literal["auto"] = "auto",
    token_budget: int = TOKENS,
) -> Scorer:
    """Return the fastest way that gives the padded path's numbers on this model, and leave the model ready for it.

    Args:
        model: a causal LM, under PEFT or not, in the state in which it will be used.
        pairs: those that will be scored.
        packing: False for padded; "auto" for packed where it is right; True to insist on it.
        token_budget: most tokens of one forward.

    Raises:
        ModelError: packed rows were insisted on and are not right for this model, or its forward fails.
        OutOfMemory: one of the longest pairs does not fit.
    """
    scorer = Scorer("padded", next(model.parameters()).device, token_budget=token_budget)
    order = by_length(pairs)
    # The two shortest, middle and longest: what windows and scaled positions do shows on the longest. The first two have
    # gradients, with all activations kept and all logits: of pairs of middle length that would be the most that a run takes.
    probe = [pairs[order[place]] for place in sorted({0, min(1, len(order) - 1), len(order) // 2, len(order) - 1})]
    try:
        with evaluating(model):
            with failing_forwards_named(model):
                least = least_noise(model, probe[0], numeric_dtype(model))
            if packing is not False:
                reason = _pack(scorer, model, probe, least)
                if reason and packing is True:
                    raise ModelError(
                        f"train.packing: packed rows are not right for this model ({reason}); set train.packing: auto"
                    )
                if reason and not _hand_over(scorer, model, probe, least):
                    logger.info(f"padded rows: packed rows are not right for this model ({reason})")
                elif reason:
                    logger.info(f"prompts once, states handed on: packed rows are not right for this model ({reason})")
            scorer.noise = max(scorer.noise, least)
            is_moved = getattr(model, "is_loaded_in_8bit", False)  # its outliers are found in all tokens together
            if scorer.path == "padded" and not is_moved:
                # Rotary scaling by the longest row: then the shortest pair scores otherwise beside the longest. Other paths
                # were tried so: all pairs together, against each alone.
                alone, beside = (_token_logprobs(scorer, model, some) for some in (probe[:1], [probe[0], probe[-1]]))
                is_moved = Rounding(scorer.noise).refutation(_differences(alone, beside[:2])) is not None
            if is_moved:
                logger.warning(
                    "this model's log-probs depend on what else is in the batch; the reference is computed in every step"
                )
                scorer.is_batch_dependent = True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            "out of memory while a few pairs were tried without training (the longest has "
            f"{row_length(pairs[order[-1]])} tokens); set a smaller data.max_length, or model.quantize: nf4"
        ) from error
    return scorer


def possible_paths(device: str, dtype: torch.dtype, packing: bool | Literal["auto"] = "auto") -> list[ScoringPath]:
    """Return the ways that `choose_scorer` may choose for a model of this dtype on this device, its favourite first."""
    paths: list[ScoringPath] = []
    if packing is not False:
        paths += _kinds(torch.device(device), dtype)
    if packing == "auto" and device == "cpu":
        paths.append("handed")
    if packing is not True:
        paths.append("padded")
    return paths


def numeric_dtype(model: Any) -> torch.dtype:
    """Return the dtype whose rounding a model's log-probs show: 8-bit products are as coarse as bfloat16."""
    dtype: torch.dtype = torch.bfloat16 if getattr(model, "is_loaded_in_8bit", False) else model.dtype
    return dtype


def _kinds(device: torch.device, dtype: torch.dtype) -> list[Kind]:
    """Ways of attention to try, fastest first; on a GPU, where the number of kernels counts, never segments."""
    if device.type != "cuda":
        return ["segments"]
    return ["varlen", "dense"] if dtype in (torch.bfloat16, torch.float16) else ["dense"]


def _pack(scorer: Scorer, model: Any, probe: Sequence[EncodedPair], least: float) -> str:
    """Let a padded scorer, and the model, take the fastest packed path that is right; return why there is none, or ""."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    probe = [*probe[:-1], *_going_on(probe), probe[-1]]
    padded = [answer for pair in probe for answer in _token_logprobs(scorer, model, [pair])]
    gradient = _gradient(scorer, model, probe[:2])
    try:
        before = switch_on(causal_lm)
    except REFUSALS as error:
        return _reason(error)
    reasons: list[str] = []
    try:
        rounding = _rounding(scorer, model, probe, padded, least)
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        causal_lm.set_attn_implementation(before)
        return _reason(error)
    for kind in _kinds(scorer.device, causal_lm.dtype):
        packed = Scorer(kind, scorer.device)
        try:
            refused = _refutation(packed, scorer, model, probe, padded, gradient, rounding)
        except REFUSALS as error:
            if is_out_of_memory(error):
                raise
            refused = _reason(error)
        if refused is None:
            logger.info(f"packed rows: prompts and common starts of answers once ({'; '.join([kind, *reasons])})")
            scorer.path, scorer.noise = kind, rounding.noise
            return ""
        reasons.append(f"{kind}: {refused}")
    causal_lm.set_attn_implementation(before)
    return "; ".join(reasons)


def _hand_over(scorer: Scorer, model: Any, probe: Sequence[EncodedPair], least: float) -> bool:
    """Let a padded scorer hand a prompt's state to its answers where that is right; return whether it is.

    On a CPU alone, where one prompt at a time costs nothing: on a GPU a padded batch of several pairs has fewer kernels.
    """
    if scorer.device.type != "cpu":
        return False
    padded = [answer for pair in probe for answer in _token_logprobs(scorer, model, [pair])]
    handed = Scorer("handed", scorer.device)
    try:
        rounding = _rounding(scorer, model, probe, padded, least)
        refused = _refutation(handed, scorer, model, probe, padded, _gradient(scorer, model, probe[:2]), rounding)
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        return False
    if refused is None:
        scorer.path, scorer.noise = "handed", rounding.noise
    return refused is None


def _split_by_prompt(pairs: Sequence[EncodedPair], token_budget: int) -> list[list[int]]:
    """Return pairs of one prompt together as far as they fit, as indices, what has most tokens first."""
    prompts: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        prompts.setdefault(pair.prompt_ids.tobytes(), []).append(index)
    batches: list[list[int]] = []
    for members in prompts.values():
        batches.append([])
        for index in members:
            if batches[-1] and handed_tokens([pairs[one] for one in (*batches[-1], index)]) > token_budget:
                batches.append([])
            batches[-1].append(index)
    return sorted(batches, key=lambda batch: (-handed_tokens([pairs[index] for index in batch]), batch[0]))


def _going_on(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Return a pair that goes on from half of another's chosen answer and is no longer than it: beside it a deeper tree."""
    for pair in reversed(pairs[:-1] or pairs):
        half = len(pair.chosen_ids) // 2
        if 0 < half < len(pair.rejected_ids):
            prompt = np.concatenate([pair.prompt_ids, pair.chosen_ids[:half]])
            answers = pair.chosen_ids[half:][::-1].copy(), pair.rejected_ids[half:]
            return [EncodedPair(prompt, *answers, margin=0.0, where=f"{pair.where}, going on", prompt_key="")]
    return []


def _rounding(scorer: Scorer, model: Any, probe: Sequence[EncodedPair], padded: Sequence[Tensor], least: float) -> Rounding:
    """Return the noise of a model whose attention is exchanged: its padded path against itself.

    Once each pair is alone, with the model's own attention, and once beside another of the same lengths, with attention in
    float32. In float32 on a CPU these are the same to a few bits, and what rounding may do at least is enough.

    Raises:
        ModelError: its attention is not the one that it is exchanged for.
    """
    numeric = numeric_dtype(model)
    if scorer.device.type == "cpu" and numeric not in (torch.bfloat16, torch.float16):
        return Rounding(least)
    with ordinary_in_float32():
        beside = [
            answer
            for pair in probe
            for answer in _token_logprobs(scorer, model, [pair, replace(pair, prompt_ids=pair.prompt_ids[::-1].copy())])[:2]
        ]
    in_half = numeric in (torch.bfloat16, torch.float16)
    rounding = Rounding.of(_differences(padded, beside), least / 8 if in_half else least)
    if not rounding.noise <= MOST_NOISE * least:
        raise ModelError(
            f"its attention is not what it is exchanged for: log-probs differ by {rounding.noise:.2g} nats per token"
        )
    return rounding


def _refutation(
    packed: Scorer,
    scorer: Scorer,
    model: Any,
    probe: Sequence[EncodedPair],
    padded: Sequence[Tensor],
    padded_gradient: Tensor | None,
    rounding: Rounding,
) -> str | None:
    """Return why this path is not right for the model, or None."""
    together = _token_logprobs(packed, model, probe)
    differ = rounding.refutation(_differences(together, padded))
    if differ:
        return f"log-probs differ from the padded ones {differ}"
    gradient = _gradient(packed, model, probe[:2])
    if gradient is not None and padded_gradient is not None:
        off, allowed = _relative(gradient, padded_gradient), GRADIENT_TOLERANCE[numeric_dtype(model)]
        if not off <= allowed:
            with ordinary_in_float32():
                noise = _gradient(scorer, model, probe[:2])
            if noise is None or not off <= TYPICAL * _relative(noise, padded_gradient):
                return f"gradients differ from the padded ones by {off:.2g}"
    return None if packed.path == "handed" else _leak(packed, model, probe, together, rounding)


def _leak(packed: Scorer, model: Any, probe: Sequence[EncodedPair], before: Sequence[Tensor], rounding: Rounding) -> str | None:
    """Return which stranger moves a pair's log-probs, or None: other tokens of the same number must not move them at all.

    Parallel hybrids attend like everybody else and carry a state along besides; in bfloat16 what it carries can be less than
    the rounding that `_refutation` must allow.
    """
    *others, stranger = probe
    turned = replace(stranger, prompt_ids=stranger.prompt_ids[::-1].copy())
    # The first token of its own stays, or starts would meet.
    own = common_start([stranger.chosen_ids, stranger.rejected_ids]) + 1
    half = replace(stranger, chosen_ids=np.concatenate([stranger.chosen_ids[:own], stranger.chosen_ids[own:][::-1]]))
    # Who changes, which answers' log-probs must stay, and what it means if they do not.
    for changed, answers, meaning in (
        (turned, slice(0, -2), "another pair in the row moves a log-prob"),
        (half, slice(-1, None), "the chosen answer moves the rejected one's log-prob"),
    ):
        if shared_tokens([*others, changed]) != shared_tokens(probe) or not before[answers]:
            continue  # another shape of the row, or nobody else in it
        after = _token_logprobs(packed, model, [*others, changed])
        off = torch.cat(_differences(after[answers], before[answers])).abs()
        if getattr(model, "is_loaded_in_8bit", False):  # outliers are found in all tokens together
            is_moved = rounding.refutation([off]) is not None
        elif packed.device.type == "cpu":
            is_moved = bool((off > LEAST_NOISE).any())
        else:  # where experts are grouped otherwise, their sums may be
            is_moved = int((off > rounding.noise / 4).sum()) > SPARED[0] + SPARED[1] * len(off)
        if is_moved:
            return f"{meaning} by {float(off.max()):.2g} nats"
    return None


def _token_logprobs(scorer: Scorer, model: Any, pairs: Sequence[EncodedPair]) -> list[Tensor]:
    """Return `scorer.token_logprobs` without gradients.

    Raises:
        ModelError: the padded path fails, after which there is no other.
    """
    with torch.no_grad(), failing_forwards_named(model) if scorer.path == "padded" else nullcontext():
        return scorer.token_logprobs(model, pairs)


def _differences(some: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [one - other for one, other in zip(some, others, strict=True)]


def _relative(gradient: Tensor, expected: Tensor) -> float:
    return float((gradient - expected).norm() / expected.norm().clamp_min(1e-30))


@contextmanager
def failing_forwards_named(model: Any) -> Iterator[None]:
    """Within the block what a model's own code raises is a ModelError; memory that runs out stays what it is.

    Raises:
        ModelError: the forward fails.
    """
    try:
        yield
    except REFUSALS as error:
        if isinstance(error, ModelError) or is_out_of_memory(error):
            raise
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        why = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{causal_lm.name_or_path}: the forward of {type(causal_lm).__name__} (transformers {version('transformers')}) "
            f"fails on pairs of the data ({type(error).__name__}: {why}); it cannot be used as it was loaded: try another "
            "model.quantize, name other adapter.targets, or install another transformers"
        ) from error


def _gradient(scorer: Scorer, model: Any, pairs: Sequence[EncodedPair]) -> Tensor | None:
    """The adapters' gradient, flat; None if nothing is trained. Of chosen − ½·rejected, so that answers that are alike do not
    leave rounding alone."""
    parameters = adapter_parameters(model)
    if not parameters:
        return None
    with torch.enable_grad(), failing_forwards_named(model) if scorer.path == "padded" else nullcontext():
        scored = scorer.logprobs(model, pairs)
        gradients = torch.autograd.grad((scored.chosen - scored.rejected / 2).sum(), parameters, allow_unused=True)
    filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))
    return torch.cat([g.flatten() for g in filled])


def _reason(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if isinstance(error, ModelError) else f"its forward does not take packed rows: {line}"

"""The reference's log-probs of pairs: looked up, or computed once and remembered.

    wanted pairs ── known in this run? ── in the store? ── computed with adapters off ── written to the store
                                                            (γ, β, margin, learning rate, seed and rank play no part)

The store fills as pairs come along, so that one epoch costs what it would without a store, a second epoch or run nothing, and
an interrupted run goes on where it stopped.
"""

import gc
import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import ModelError, StoreUnavailable
from pe_dpo.inference.policy import Policy, default_device, load_policy
from pe_dpo.inference.reference_store import ReferenceStore, StoredLogprob, answer_key, default_store_path, reference_key
from pe_dpo.inference.rounding import Rounding
from pe_dpo.inference.scorer import NOT_PACKED, TOKENS, Scorer, choose_scorer, possible_paths
from pe_dpo.model.base import BaseInfo
from pe_dpo.model.fingerprint import (
    base_fingerprint,
    base_identity,
    config_fingerprint,
    reference_fingerprint,
    tensor_fingerprints,
)
from pe_dpo.objective import PairLogprobs
from pe_dpo.progress import advance, progress
from pe_dpo.recipe import Recipe

logger = logging.getLogger(__name__)

Caching = Literal["auto", "store", "step"]
"""auto: looked up, missing ones computed when they are needed; store: all computed before training; step: always computed."""

RECHECKED = 4
"""Stored pairs that are scored again at the start of a run."""
SECONDS_BETWEEN_WRITES = 5.0
"""What a kill can cost at most."""


class Reference:
    """π0's log-probs of pairs.

    Args:
        policy: that it is the reference of.
        scorer: as for the policy, so that both make the same rounding errors.
        base: fingerprint of the base, for the records.
        store: where log-probs are kept between runs; None keeps them in this run only.
        key: what determines the numbers besides the token ids; see `reference_key`.
        remembers: False computes every time.
    """

    def __init__(
        self,
        policy: Policy,
        scorer: Scorer,
        *,
        base: str = "",
        store: ReferenceStore | None = None,
        key: str = "",
        remembers: bool = True,
    ) -> None:
        assert store is None or key, "what is stored needs the key of what determines it"
        self.policy, self.scorer, self.base_fingerprint = policy, scorer, base
        self.store, self.key, self.remembers = store, key, remembers
        self.computed = 0
        """Pairs that were run through π0."""
        self.found = 0
        """Answers that came from the store."""
        self._known: dict[bytes, StoredLogprob] = {}
        self._unwritten: dict[bytes, StoredLogprob] = {}
        self._written_at = time.monotonic()

    def logprobs(self, pairs: Sequence[EncodedPair]) -> PairLogprobs:
        """Return the log-probs of pairs in their order, on the CPU, in float64."""
        if not self.remembers:
            return self._compute(pairs)
        keys, missing = self._look_up(pairs), []
        for index, both in enumerate(keys):
            if not all(key in self._known for key in both):
                missing.append(pairs[index])
        done = 0
        for part in self.scorer.split(missing) if missing else ():  # in parts: an interrupted pass loses seconds, not hours
            some = [missing[index] for index in part]
            with progress(None):  # the part of a pass that is told of as a whole
                scored = self._compute(some)
            for index, pair in enumerate(some):
                for key, logprob, tokens in zip(_keys(pair), (scored.chosen, scored.rejected), scored[2:], strict=True):
                    self._known[key] = answer = StoredLogprob(float(logprob[index]), int(tokens[index]))
                    if math.isfinite(answer.logprob):  # what is not is for the loss to complain of, with the row's name
                        self._unwritten[key] = answer
            if time.monotonic() - self._written_at > SECONDS_BETWEEN_WRITES:
                self.flush()
            done += len(part)
            advance(done, len(missing))
        return _of_pairs(keys, self._known)

    def recheck(self, pairs: Sequence[EncodedPair]) -> str | None:
        """Score a few random stored pairs again; return what differs, or None."""
        if self.store is None:
            return None
        keys = self._look_up(pairs)
        stored = [pair for pair, both in zip(pairs, keys, strict=True) if all(key in self._known for key in both)]
        chosen = random.SystemRandom().sample(stored, min(RECHECKED, len(stored)))
        return self.difference(chosen, self._compute(chosen)) if chosen else None

    def difference(self, pairs: Sequence[EncodedPair], now: PairLogprobs) -> str | None:
        """Return how the pairs' log-probs of this moment are not those that are known of them, in words, or None.

        On a CPU packed rows have the same bits (a rounding error with many threads) in any batch, so that one pair that is off
        is enough. Elsewhere rounding moves them all, and now and then one far: what most show, by √token, counts.
        """
        is_exact = self.scorer.device.type == "cpu" and self.scorer.path not in NOT_PACKED
        off, worst, where = [], 0.0, ""
        for index, pair in enumerate(pairs):
            for key, logprob, tokens in zip(_keys(pair), (now.chosen, now.rejected), now[2:], strict=True):
                then = self._known.get(key)
                if then is None:
                    continue
                off.append(abs(float(logprob[index]) - then.logprob) / then.tokens**0.5)
                told = f"{pair.where} has {float(logprob[index]):.8g} now and {then.logprob:.8g} in the store"
                allowed = 1e-6 * (1 + abs(then.logprob)) / then.tokens**0.5
                if int(tokens[index]) != then.tokens or (is_exact and not off[-1] <= allowed):
                    return told
                if not off[-1] <= worst:
                    worst, where = off[-1], told
        return where if off and Rounding(self.scorer.noise).refutation([torch.tensor(off)]) else None

    def forget_if_wrong(self, pairs: Sequence[EncodedPair]) -> None:
        """Score a few stored pairs again and throw all away if one is off; for one process (see `recheck` for several)."""
        why = self.recheck(pairs)
        if why:
            self.forget(why)

    def forget(self, why: str) -> None:
        """Throw away all that is known of this reference, here and in the store, and say so."""
        rows, self._known, self._unwritten = len(self._known), {}, {}
        try:
            rows = self.store.forget(self.key) if self.store is not None else rows
        except StoreUnavailable as error:
            self._do_without(error)
        logger.warning(f"the stored reference was not this one ({why}): {rows} log-probs thrown away, to be computed again")

    def flush(self) -> None:
        """Write what was computed since the last time."""
        self._written_at = time.monotonic()
        if self.store is None or not self._unwritten:
            return
        try:
            self.store.put(self.key, self._unwritten)
        except StoreUnavailable as error:
            self._do_without(error)
        self._unwritten = {}

    def _look_up(self, pairs: Sequence[EncodedPair]) -> list[tuple[bytes, bytes]]:
        """Return the keys of pairs, having asked the store for those that are not known."""
        keys = [_keys(pair) for pair in pairs]
        unknown = [key for key in dict.fromkeys(key for both in keys for key in both) if key not in self._known]
        if self.store is not None and unknown:
            try:
                found = self.store.get(self.key, unknown)
                self._known |= found
                self.found += len(found)
            except StoreUnavailable as error:
                self._do_without(error)
        return keys

    def _compute(self, pairs: Sequence[EncodedPair]) -> PairLogprobs:
        with self.policy.reference() as frozen:
            scored = self.scorer.score_pairs(frozen, pairs)
        self.computed += len(pairs)
        return scored

    def _do_without(self, error: StoreUnavailable) -> None:
        logger.warning(f"going on without the reference store: {error}")
        self.store = None


def open_reference(
    policy: Policy,
    scorer: Scorer,
    *,
    caching: Caching = "auto",
    path: str | None = None,
    tensors: dict[str, str] | None = None,
) -> Reference:
    """Return the reference of a policy, with its store opened if there is one.

    Args:
        policy: with its reference inside.
        scorer: as for the policy.
        caching: see `Caching`.
        path: of the store; by default `default_store_path()`.
        tensors: the base's `tensor_fingerprints` where they are known, else empty: they are put there if they are computed.

    Raises:
        StoreUnavailable: caching is "store", and there can be none.
    """
    if scorer.is_batch_dependent:
        caching = "step"  # the number of a pair is not its own
    store = None
    try:
        if caching != "step":
            store = ReferenceStore(Path(path) if path else default_store_path())
        base = remembered_fingerprint(policy.model, policy.base, store, tensors)
    except StoreUnavailable as error:
        if caching == "store":
            raise
        logger.warning(f"going on without the reference store: {error}")
        store, base = None, base_fingerprint(policy.model)
    key = _store_key(policy.base, reference_fingerprint(policy.model, base=base), scorer.path, scorer.device.type)
    return Reference(policy, scorer, base=base, store=store, key=key, remembers=caching != "step")


def remembered_fingerprint(
    model: Any, info: BaseInfo, store: ReferenceStore | None, tensors: dict[str, str] | None = None
) -> str:
    """Return `base_fingerprint(model)`, without the pass over the weights if the store remembers it from an earlier run.

    Args:
        model: the base, loaded, with or without adapters.
        info: of the base.
        store: where to look and to remember; None computes.
        tensors: as for `open_reference`.

    Raises:
        StoreUnavailable: the store cannot be read or written.
    """
    identity = None if store is None else base_identity(info, next(model.parameters()).device.type)
    known = None if store is None or identity is None or tensors else store.remembered_fingerprint(identity)
    if known is None:
        tensors = {} if tensors is None else tensors
        tensors |= {} if tensors else tensor_fingerprints(model)
        known = base_fingerprint(model, tensors)
        if store is not None and identity is not None:
            store.remember_fingerprint(identity, known)
    return known


def reference_logprobs(recipe: Recipe, info: BaseInfo, pairs: Sequence[EncodedPair]) -> tuple[PairLogprobs, bool]:
    """Return π0's log-probs of a recipe's pairs outside of training, and whether the model had to be run for them.

    Where the store has all of them, no weights are read; nothing is then scored again to check it: the base is known by its
    files alone.

    Args:
        recipe: which reference it is, and where the store lies.
        info: of the base, loaded as it says.
        pairs: in the order wanted.

    Raises:
        ModelError: the base or an adapter cannot be used, or a log-prob is not finite.
    """
    device = default_device()
    settings, wish = recipe.reference, recipe.train.tokens_per_microbatch
    caching: Caching = "auto" if settings.policy == "skip" else settings.policy
    if caching != "step" and recipe.adapter.of_reference is None:
        stored = stored_logprobs(info, pairs, device=device, packing=recipe.train.packing, path=settings.store)
        if stored is not None:
            return stored, False
    # With the adapter, since the way through the model is chosen with both.
    policy = load_policy(recipe, info=info, device=device)
    budget = TOKENS if wish == "auto" else wish
    scorer = choose_scorer(policy.model, pairs, packing=recipe.train.packing, token_budget=budget)
    reference = open_reference(policy, scorer, caching=caching, path=settings.store)
    reference.forget_if_wrong(pairs)
    with progress("scoring, reference"):
        found = reference.logprobs(pairs)
    reference.flush()
    del policy, reference
    gc.collect()  # a PEFT model lies in cycles, and the caller may load another base
    if device == "cuda":
        torch.cuda.empty_cache()
    check_finite(found, pairs)
    return found, True


def stored_logprobs(
    info: BaseInfo,
    pairs: Sequence[EncodedPair],
    *,
    device: str,
    packing: bool | Literal["auto"] = "auto",
    path: str | None = None,
) -> PairLogprobs | None:
    """Return the base's log-probs of pairs from the store alone, or None where any is missing; no weights are read.

    Args:
        info: of the base, which is the reference.
        pairs: in the order wanted.
        device: "cpu" or "cuda", on which the base would be loaded.
        packing: as for `choose_scorer`; what was computed along any way that it may choose counts.
        path: of the store; by default `default_store_path()`.
    """
    file = Path(path) if path else default_store_path()
    identity = base_identity(info, device)
    if identity is None or not file.is_file():
        return None
    keys = [_keys(pair) for pair in pairs]
    wanted = list(dict.fromkeys(key for both in keys for key in both))
    try:
        store = ReferenceStore(file)
        weights = store.remembered_fingerprint(identity)
        for way in possible_paths(device, info.dtype, packing) if weights else ():
            known = store.get(_store_key(info, str(weights), way, device), wanted)
            if len(known) == len(wanted):
                return _of_pairs(keys, known)
    except StoreUnavailable:  # whoever opens it to write says so
        pass
    return None


def check_finite(logprobs: PairLogprobs, pairs: Sequence[EncodedPair], *, under: str = "the reference") -> None:
    """Check that every log-prob is a number; `under` says whose they are.

    Raises:
        ModelError: naming the first pair that has another.
    """
    broken = ~(logprobs.chosen.isfinite() & logprobs.rejected.isfinite())
    if broken.any():
        names = [pair.where for pair, is_broken in zip(pairs, broken.tolist(), strict=True) if is_broken]
        raise ModelError(
            f"{names[0]}: its log-probs under {under} are not finite ({len(names)} such pairs); look at the row, or "
            "compute in another model.dtype"
        )


def _store_key(info: BaseInfo, weights: str, way: str, device: str) -> str:
    dtype = str(info.dtype).removeprefix("torch.")
    weights = f"{weights} {config_fingerprint(info.config)}"
    return reference_key(weights=weights, quantize=info.quantize, dtype=dtype, path=f"{way} on {device}")


def _of_pairs(keys: Sequence[tuple[bytes, bytes]], known: Mapping[bytes, StoredLogprob]) -> PairLogprobs:
    chosen, rejected = ([known[both[side]] for both in keys] for side in (0, 1))
    return PairLogprobs(
        *(torch.tensor([answer.logprob for answer in side], dtype=torch.float64) for side in (chosen, rejected)),
        *(torch.tensor([answer.tokens for answer in side]) for side in (chosen, rejected)),
    )


def _keys(pair: EncodedPair) -> tuple[bytes, bytes]:
    chosen, rejected = (answer_key(pair.prompt_ids, *answer) for answer in pair.answers)
    return chosen, rejected

"""The reference's log-probs of pairs: looked up, or computed once and remembered.

    wanted pairs ── known in this run? ── in the store? ── computed with adapters off ── written to the store
                                                            (γ, β, margin, learning rate, seed and rank play no part)

The store fills as pairs come along, so that one epoch costs what it would without a store, a second epoch or run nothing, and
an interrupted run goes on where it stopped.
"""

import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import StoreUnavailable
from pe_dpo.inference.logprobs import PairLogprobs
from pe_dpo.inference.pairs import score_pairs
from pe_dpo.inference.reference_store import ReferenceStore, StoredLogprob, answer_key, default_store_path, reference_key
from pe_dpo.inference.scorer import TOLERANCE, Scorer, numeric_dtype, possible_paths
from pe_dpo.model.adapter import as_reference
from pe_dpo.model.base import BaseFacts
from pe_dpo.model.fingerprint import (
    base_fingerprint,
    config_fingerprint,
    known_fingerprint,
    reference_fingerprint,
    remembered_fingerprint,
)
from pe_dpo.progress import advance, progress

logger = logging.getLogger(__name__)

Policy = Literal["auto", "store", "step"]
"""auto: looked up, missing ones computed when they are needed; store: all computed before training; step: always computed."""

RECHECKED = 4
"""Stored pairs that are scored again at the start of a run."""
SECONDS_BETWEEN_WRITES = 5.0
"""What a kill can cost at most."""


class Reference:
    """π0's log-probs of pairs.

    Args:
        model: a PEFT model; within `as_reference` it is π0.
        scorer: as for the policy, so that both make the same rounding errors.
        token_budget: most tokens of one forward.
        base: fingerprint of the base, for the records.
        store: where log-probs are kept between runs; None keeps them in this run only.
        key: what determines the numbers besides the token ids; see `reference_key`.
        remembers: False computes every time.
    """

    def __init__(
        self,
        model: Any,
        scorer: Scorer,
        *,
        token_budget: int,
        base: str = "",
        store: ReferenceStore | None = None,
        key: str = "",
        remembers: bool = True,
    ) -> None:
        assert store is None or key, "what is stored needs the key of what determines it"
        self.model, self.scorer, self.token_budget = model, scorer, token_budget
        self.base_fingerprint = base
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
        keys = [_keys(pair) for pair in pairs]
        self._look_up([key for both in keys for key in both])
        missing = [index for index, both in enumerate(keys) if not all(key in self._known for key in both)]
        if missing:
            # In parts, so that an interrupted pass loses seconds, not hours.
            done = 0
            for part in self.scorer.split([pairs[index] for index in missing], self.token_budget):
                self._learn([pairs[missing[index]] for index in part])
                done += len(part)
                advance(done, len(missing))
        return _of_pairs(keys, self._known)

    def recheck(self, pairs: Sequence[EncodedPair]) -> str | None:
        """Score a few random stored pairs again; return what differs, or None."""
        if self.store is None:
            return None
        keys = [_keys(pair) for pair in pairs]
        self._look_up([key for both in keys for key in both])
        stored = [index for index, both in enumerate(keys) if all(key in self._known for key in both)]
        chosen = [pairs[index] for index in random.SystemRandom().sample(stored, min(RECHECKED, len(stored)))]
        return self.difference(chosen, self._compute(chosen)) if chosen else None

    def difference(self, pairs: Sequence[EncodedPair], now: PairLogprobs) -> str | None:
        """Return the first pair whose log-probs of this moment are not those that are known of it, in words, or None."""
        for index, pair in enumerate(pairs):
            for key, logprob, tokens in zip(_keys(pair), (now.chosen, now.rejected), now[2:], strict=True):
                then = self._known.get(key)
                if then is None:
                    continue
                off = abs(float(logprob[index]) - then.logprob)
                if int(tokens[index]) != then.tokens or not off <= self._tolerance(then):
                    return f"{pair.where} has {float(logprob[index]):.8g} now and {then.logprob:.8g} in the store"
        return None

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

    def _look_up(self, keys: Sequence[bytes]) -> None:
        unknown = [key for key in dict.fromkeys(keys) if key not in self._known]
        if self.store is None or not unknown:
            return
        try:
            found = self.store.get(self.key, unknown)
            self._known |= found
            self.found += len(found)
        except StoreUnavailable as error:
            self._do_without(error)

    def _learn(self, pairs: Sequence[EncodedPair]) -> None:
        with progress(None):  # the part of a pass that is told of as a whole
            scored = self._compute(pairs)
        for index, both in enumerate(map(_keys, pairs)):
            for key, logprob, tokens in zip(both, (scored.chosen, scored.rejected), scored[2:], strict=True):
                self._known[key] = answer = StoredLogprob(float(logprob[index]), int(tokens[index]))
                if math.isfinite(answer.logprob):  # what is not is for the loss to complain of, with the row's name
                    self._unwritten[key] = answer
        if time.monotonic() - self._written_at > SECONDS_BETWEEN_WRITES:
            self.flush()

    def _compute(self, pairs: Sequence[EncodedPair]) -> PairLogprobs:
        with as_reference(self.model) as frozen:
            scored = score_pairs(frozen, pairs, self.scorer, token_budget=self.token_budget)
        self.computed += len(pairs)
        return scored

    def _tolerance(self, stored: StoredLogprob) -> float:
        """Nats: on a CPU the numbers are the same bits (a rounding error with many threads), on a GPU company plays a part."""
        if self.scorer.device.type == "cpu" and self.scorer.path != "padded":
            return 1e-6 * (1 + abs(stored.logprob))
        return TOLERANCE[numeric_dtype(self.model)] * stored.tokens**0.5

    def _do_without(self, error: StoreUnavailable) -> None:
        logger.warning(f"going on without the reference store: {error}")
        self.store = None


def open_reference(
    model: Any,
    facts: BaseFacts,
    scorer: Scorer,
    *,
    policy: Policy,
    token_budget: int,
    path: str | None = None,
) -> Reference:
    """Return the reference of a model, with its store opened if the policy has one.

    Args:
        model: a PEFT model.
        facts: of its base.
        scorer: as for the policy.
        policy: see `Policy`.
        token_budget: most tokens of one forward.
        path: of the store; by default `default_store_path()`.

    Raises:
        StoreUnavailable: policy "store", and there can be none.
    """
    if scorer.depends_on_company:
        policy = "step"  # the number of a pair is not its own
    store = None
    try:
        if policy != "step":
            store = ReferenceStore(Path(path) if path else default_store_path())
        base = remembered_fingerprint(model, facts, store)
    except StoreUnavailable as error:
        if policy == "store":
            raise
        logger.warning(f"going on without the reference store: {error}")
        store, base = None, base_fingerprint(model)
    key = _store_key(facts, reference_fingerprint(model, base=base), scorer.path, scorer.device.type)
    return Reference(model, scorer, token_budget=token_budget, base=base, store=store, key=key, remembers=policy != "step")


def stored_logprobs(
    facts: BaseFacts,
    pairs: Sequence[EncodedPair],
    *,
    device: str,
    packing: bool | Literal["auto"] = "auto",
    path: str | None = None,
) -> PairLogprobs | None:
    """Return the base's log-probs of pairs from the store alone, or None where any is missing; no weights are read.

    What was computed along any way that training may take counts. Nothing is scored again to check it: the base is
    known by its files alone.

    Args:
        facts: of the base, which is the reference.
        pairs: in the order wanted.
        device: "cpu" or "cuda", on which the base would be loaded.
        packing: as for `choose_scorer`.
        path: of the store; by default `default_store_path()`.
    """
    file = Path(path) if path else default_store_path()
    if not file.is_file():
        return None
    keys = [_keys(pair) for pair in pairs]
    wanted = list(dict.fromkeys(key for both in keys for key in both))
    try:
        with ReferenceStore(file) as store:
            weights = known_fingerprint(facts, device, store)
            for way in possible_paths(device, facts.dtype, packing) if weights else ():
                known = store.get(_store_key(facts, str(weights), way, device), wanted)
                if len(known) == len(wanted):
                    return _of_pairs(keys, known)
    except StoreUnavailable:  # whoever opens it to write says so
        return None
    return None


def _store_key(facts: BaseFacts, weights: str, way: str, device: str) -> str:
    dtype = str(facts.dtype).removeprefix("torch.")
    weights = f"{weights} {config_fingerprint(facts.config)}"
    return reference_key(weights=weights, quantize=facts.quantize, dtype=dtype, path=f"{way} on {device}")


def _of_pairs(keys: Sequence[tuple[bytes, bytes]], known: Mapping[bytes, StoredLogprob]) -> PairLogprobs:
    chosen, rejected = ([known[both[side]] for both in keys] for side in (0, 1))
    return PairLogprobs(
        *(torch.tensor([answer.logprob for answer in side], dtype=torch.float64) for side in (chosen, rejected)),
        *(torch.tensor([answer.tokens for answer in side]) for side in (chosen, rejected)),
    )


def _keys(pair: EncodedPair) -> tuple[bytes, bytes]:
    return answer_key(pair.prompt_ids, pair.chosen_ids), answer_key(pair.prompt_ids, pair.rejected_ids)

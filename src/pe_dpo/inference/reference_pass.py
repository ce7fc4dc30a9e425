"""π0's log-probs of a recipe's pairs outside of training: from the store, or in one pass."""

import gc
from collections.abc import Sequence

import torch

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.errors import ModelError
from pe_dpo.evaluation.measuring import TOKENS
from pe_dpo.inference.inputs import build_model
from pe_dpo.inference.logprobs import PairLogprobs
from pe_dpo.inference.reference import Policy, open_reference, stored_logprobs
from pe_dpo.inference.scorer import choose_scorer
from pe_dpo.model.base import BaseFacts
from pe_dpo.progress import progress
from pe_dpo.recipe import Recipe


def reference_logprobs(
    recipe: Recipe,
    facts: BaseFacts,
    pairs: Sequence[EncodedPair],
) -> tuple[PairLogprobs, bool]:
    """Return π0's log-probs of pairs, and whether the model had to be run for them.

    Args:
        recipe: which reference it is, and where the store lies.
        facts: of the base, loaded as they say.
        pairs: in the order wanted.

    Raises:
        ModelError: the base or an adapter cannot be used, or a log-prob is not finite.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wish, settings = recipe.train.tokens_per_microbatch, recipe.reference
    policy: Policy = "auto" if settings.policy == "skip" else settings.policy
    if policy != "step" and recipe.adapter.reference != "adapter":
        stored = stored_logprobs(facts, pairs, device=device, packing=recipe.train.packing, path=settings.store)
        if stored is not None:
            return stored, False
    model = build_model(recipe, facts, device)  # with the adapter, since the way through the model is chosen with both
    scorer = choose_scorer(model, pairs, device=device, packing=recipe.train.packing)
    budget = TOKENS if wish == "auto" else wish
    reference = open_reference(model, facts, scorer, policy=policy, token_budget=budget, path=settings.store)
    reference.forget_if_wrong(pairs)
    with progress("scoring, reference"):
        found = reference.logprobs(pairs)
    reference.flush()
    del model, reference
    gc.collect()  # a PEFT model lies in cycles, and the caller may load another base
    if device == "cuda":
        torch.cuda.empty_cache()
    check_finite(found, pairs)
    return found, True


def check_finite(logprobs: PairLogprobs, pairs: Sequence[EncodedPair]) -> None:
    """Check that every log-prob is a number.

    Raises:
        ModelError: naming the first pair that has another.
    """
    broken = ~(logprobs.chosen.isfinite() & logprobs.rejected.isfinite())
    if broken.any():
        names = [pair.where for pair, is_broken in zip(pairs, broken.tolist(), strict=True) if is_broken]
        raise ModelError(
            f"{names[0]}: its log-probs under the reference are not finite ({len(names)} such pairs); look at the row, or "
            "compute in another model.dtype"
        )

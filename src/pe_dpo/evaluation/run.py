"""Evaluation of a run, an adapter or a merged model on preference pairs; one base in memory at a time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pe_dpo.data import EncodedPair, data_hash
from pe_dpo.data.encoding import Progress
from pe_dpo.data.settings import prepare_from_settings
from pe_dpo.errors import UsageError
from pe_dpo.evaluation.pairs import ScoredPairs, score_loss, score_pairs, scored_pairs, set_metrics, wilson_interval
from pe_dpo.evaluation.reference import Policy, open_reference
from pe_dpo.evaluation.scorer import choose_scorer
from pe_dpo.evaluation.target import Kind, Target, check_same_base, find_target, load_target_tokenizer, read_record
from pe_dpo.model.adapter import load_adapter_for_evaluation
from pe_dpo.model.adapter_config import check_adapter
from pe_dpo.model.base import BaseFacts, end_token_ids, inspect_base, load_base
from pe_dpo.model.scoring import PairLogprobs
from pe_dpo.recipe import Recipe

INTERVALS = ("accuracy/policy", "accuracy/policy_per_token", "accuracy/reference", "accuracy/reference_per_token",
             "rewards/accuracies")  # fmt: skip
"""Metrics that are shares of pairs and get a Wilson interval."""


TOKENS = 4096
"""Most tokens of one forward, unless the recipe says: without gradients little has to be kept of them."""


class Evaluation(NamedTuple):
    """What an evaluation found."""

    kind: Kind
    scored: ScoredPairs
    pairs: list[EncodedPair]
    metrics: dict[str, float]
    """See `set_metrics`."""
    intervals: dict[str, tuple[float, float]]
    """95 % Wilson intervals of the metrics in INTERVALS that were measured."""


def evaluate(
    target: str | Path,
    *,
    data: str | None = None,
    base: str | None = None,
    quantize: Literal["nf4", "int8", "none"] | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Return the log-probs, metrics and intervals of a target on held-out pairs.

    Args:
        target: a run folder, any LoRA adapter, or a whole (merged) model.
        data: pairs to evaluate on; by default those that the run held out, otherwise needed.
        base: for an adapter, its base if not the one named in it; for a whole model, the reference to compare with
            (loaded after the model has been scored and freed), without which only the policy is measured.
        quantize: how the base is loaded; by default as in the run, or by its size.
        say: gets lines of facts.
        progress: called with what is done, pairs done, and pairs in all.

    Raises:
        UsageError: the target is nothing that can be evaluated, or `data` is missing.
        DataError, ModelError: as in training.
    """
    found = find_target(Path(target), base=base, quantize=quantize)
    if found.adapter is not None:
        check_adapter(found.adapter)
    settings = _settings(Path(target), found, data)
    tokenizer = load_target_tokenizer(found)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = inspect_base(**settings.model.model_dump())
    pairs = _held_out_pairs(settings, tokenizer, facts.context_length, data, say, progress)
    if found.kind == "run" and data is None:
        _check_same_pairs(Path(target), pairs)
    reference: PairLogprobs | None
    if found.adapter is None:
        other = inspect_base(base, quantize=quantize or "none", dtype=settings.model.dtype) if base else None
        policy, reference = _model_logprobs(settings, facts, other, pairs, device, say, progress)
    else:
        trained = Path(target) if found.kind == "run" and base is None and quantize is None else None
        policy, reference = _adapter_logprobs(found.adapter, settings, facts, pairs, trained, device, say, progress)
    coefficients = settings.loss.coefficients()
    if reference is None:
        coefficients |= {"gamma": 0.0, "reference_floor": None}
        say("no reference given (--base): rewards and loss are those of gamma = 0")
    margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
    out = score_loss(policy, reference, margins, coefficients, settings.loss.margin_scale)
    scored = scored_pairs(policy, reference, out)
    metrics = set_metrics(scored)
    intervals = {key: wilson_interval(metrics[key], len(pairs)) for key in INTERVALS if key in metrics}
    return Evaluation(found.kind, scored, pairs, metrics, intervals)


def _adapter_logprobs(
    adapter: Path,
    settings: Recipe,
    facts: BaseFacts,
    pairs: list[EncodedPair],
    run: Path | None,
    device: str,
    say: Callable[[str], None],
    progress: Progress,
) -> tuple[PairLogprobs, PairLogprobs]:
    """Policy and reference of an adapter; `run` is where it was trained, if the base must be the one of then."""
    model = load_adapter_for_evaluation(load_base(facts, device=device), adapter)
    scorer = choose_scorer(model, pairs, device=device, packing=settings.train.packing, say=say)
    budget = _budget(settings)
    policy: Policy = "step" if settings.reference.policy == "step" else "auto"
    stored = open_reference(model, facts, scorer, policy=policy, token_budget=budget, path=settings.reference.store, say=say)
    if run is not None:
        check_same_base(run, facts, stored.base_fingerprint, say)
    scored = score_pairs(model, pairs, scorer, token_budget=budget, progress=partial(progress, "scoring, policy"))
    stored.recheck(pairs)
    reference = stored.logprobs(pairs, partial(progress, "scoring, reference"))
    stored.flush()
    return scored, reference


def _model_logprobs(
    settings: Recipe,
    facts: BaseFacts,
    other: BaseFacts | None,
    pairs: list[EncodedPair],
    device: str,
    say: Callable[[str], None],
    progress: Progress,
) -> tuple[PairLogprobs, PairLogprobs | None]:
    """Policy and, if there is another model to compare with, reference: one whole model after the other."""

    def scores(what: str, of: BaseFacts) -> PairLogprobs:
        model = load_base(of, device=device)
        scorer = choose_scorer(model, pairs, device=device, packing=settings.train.packing, say=say)
        return score_pairs(model, pairs, scorer, token_budget=_budget(settings), progress=partial(progress, f"scoring, {what}"))

    return scores("policy", facts), None if other is None else scores("reference", other)


def _budget(settings: Recipe) -> int:
    wish = settings.train.tokens_per_microbatch
    return TOKENS if wish == "auto" else wish


def _settings(target: Path, found: Target, data: str | None) -> Recipe:
    """The recipe of a run; for anything else the one that would train it on the data to evaluate on."""
    if found.recipe is not None:
        return found.recipe
    if data is None:
        raise UsageError(f"{target}: is not a run folder, so there are no held-out pairs of its own; name them with --data")
    return Recipe.model_validate({"model": found.model.model_dump(), "data": {"train": data}, "output": str(target)})


def _check_same_pairs(run: Path, pairs: list[EncodedPair]) -> None:
    recorded = read_record(run).get("hashes", {}).get("held_out")
    if recorded is not None and recorded != data_hash(pairs):
        raise UsageError(
            f"{run}: the data are not those of the run any more, so its held-out pairs cannot be told from those it "
            "trained on; restore them, or name other pairs with --data"
        )


def _held_out_pairs(
    recipe: Recipe,
    tokenizer: Any,
    context_length: int | None,
    data: str | None,
    say: Callable[[str], None],
    progress: Progress,
) -> list[EncodedPair]:
    prepared = prepare_from_settings(
        recipe.data,
        tokenizer=tokenizer,
        context_length=context_length,
        end_token_ids=end_token_ids(recipe.model.base, revision=recipe.model.revision),
        only=data,
        progress=progress,
    )
    for line in prepared.report.lines():
        say(line)
    pairs = prepared.train if data else prepared.held_out
    if not pairs:
        raise UsageError("the run held no pairs out (data.eval: 0); name some with --data")
    return pairs

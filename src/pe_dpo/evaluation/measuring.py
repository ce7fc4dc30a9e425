"""The models' part of an evaluation: log-probs of pairs, sampled answers, and how far policy and reference are apart on them.

adapter      π is the model, π0 the model with adapters off; π scaled toward π0, if asked for
two models   π, then π0 when π is gone; what π predicts along the answers waits on the disk meanwhile
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pe_dpo.data import EncodedPair
from pe_dpo.inference.divergence import data_prefix_kl, divergences, store_logits
from pe_dpo.inference.drift import Drift, Question, answer_questions, collect, measure_drift
from pe_dpo.inference.generation import answer_text
from pe_dpo.inference.logprobs import PairLogprobs
from pe_dpo.inference.pairs import score_pairs
from pe_dpo.inference.reference import Policy, open_reference
from pe_dpo.inference.scorer import Scorer, choose_scorer
from pe_dpo.inference.target import check_same_base
from pe_dpo.model.adapter import as_reference, load_adapter_for_evaluation, scaled
from pe_dpo.model.base import BaseFacts, load_base
from pe_dpo.progress import progress
from pe_dpo.recipe import Recipe
from pe_dpo.runs.run import Run

TOKENS = 4096
"""Most tokens of one forward, unless the recipe says: without gradients little has to be kept of them."""


@dataclass(frozen=True)
class Work:
    """What is to be measured, and how."""

    settings: Recipe
    tokenizer: Any
    pairs: list[EncodedPair]
    asked: list[Question]
    samples: int
    max_new_tokens: int
    seed: int
    is_judged: bool
    device: str
    ends: set[int]
    scales: tuple[float, ...] = ()
    """Of an adapter, at which it is measured besides; see `model.adapter.scaled`."""
    tokens: int | None = None
    """Most tokens of one forward, if not what the recipe says."""

    @property
    def budget(self) -> int:
        """Most tokens of one forward."""
        wish = self.settings.train.tokens_per_microbatch
        return self.tokens or (TOKENS if wish == "auto" else wish)

    @property
    def options(self) -> dict[str, Any]:
        """What every pass through a model takes."""
        return {"device": self.device, "token_budget": self.budget}

    @property
    def drawing(self) -> dict[str, Any]:
        """What every sampling takes besides."""
        return {"max_new_tokens": self.max_new_tokens, "end_token_ids": self.ends, "seed": self.seed, **self.options}

    @property
    def asked_pairs(self) -> list[EncodedPair]:
        """The pairs whose prompts are asked."""
        keys = {question.prompt_key for question in self.asked}
        return [pair for pair in self.pairs if pair.prompt_key in keys]

    def scores(self, what: str, model: Any) -> PairLogprobs:
        """Return the pairs' log-probs under a model."""
        scorer = choose_scorer(model, self.pairs, device=self.device, packing=self.settings.train.packing)
        with progress(f"scoring, {what}"):
            return score_pairs(model, self.pairs, scorer, token_budget=self.budget)


class Measured(NamedTuple):
    """What was measured of a target."""

    policy: PairLogprobs
    reference: PairLogprobs | None
    drift: Drift | None = None
    data_prefix: dict[str, Any] | None = None
    reference_said: list[tuple[str, int]] | None = None
    """Text and tokens of the reference's answers."""
    scaled: Mapping[float, "Measured"] = {}
    """Log-probs and answers of the adapter scaled toward the reference."""


def measure_adapter(work: Work, adapter: Path, facts: BaseFacts, run: Path | None) -> Measured:
    """Measure an adapter; `run` is where it was trained, if the base must be the one of then."""
    model = load_adapter_for_evaluation(load_base(facts, device=work.device), adapter)
    scorer = choose_scorer(model, work.pairs, device=work.device, packing=work.settings.train.packing)
    policy: Policy = "step" if work.settings.reference.policy == "step" else "auto"
    stored = open_reference(model, facts, scorer, policy=policy, token_budget=work.budget, path=work.settings.reference.store)
    if run is not None:
        check_same_base(run, facts, stored.base_fingerprint)
    with progress("scoring, policy"):
        scored = score_pairs(model, work.pairs, scorer, token_budget=work.budget)
    stored.forget_if_wrong(work.pairs)
    with progress("scoring, reference"):
        reference = stored.logprobs(work.pairs)
    stored.flush()
    found = Measured(scored, reference)
    if work.asked:
        drift = _drift(work, model, "policy")
        with progress("KL along chosen answers"):
            along_data = data_prefix_kl(model, work.asked_pairs, **work.options)
        found = found._replace(drift=drift, data_prefix=along_data)
    if work.is_judged:
        with as_reference(model):
            found = found._replace(reference_said=_reference_said(work, model))
    as_run = replace(work, tokens=_tokens_of(run, work))
    return found._replace(scaled={scale: _measure_scaled(as_run, model, scorer, found, scale) for scale in work.scales})


def _measure_scaled(work: Work, model: Any, scorer: Scorer, found: Measured, scale: float) -> Measured:
    """Pairs and answers of an adapter scaled toward the reference; the reference's part is that of the adapter as it is."""
    what = f"policy scaled to {scale:g}"
    with scaled(model, scale):
        with progress(f"scoring, {what}"):
            policy = score_pairs(model, work.pairs, scorer, token_budget=work.budget)
        drift = _drift(work, model, what) if work.asked else None
    return Measured(policy, found.reference, drift, reference_said=found.reference_said)


def _tokens_of(run: Path | None, work: Work) -> int:
    """Tokens per forward with which a run measured, for the same rounding errors, unless they are many; else as asked."""
    tokens = Run(run).info.scoring.get("tokens_per_forward") if run else None
    return min(int(tokens), max(TOKENS, work.budget)) if tokens else work.budget


def _drift(work: Work, model: Any, what: str) -> Drift:
    with progress(f"sampling, {what}"):
        return measure_drift(
            model,
            work.tokenizer,
            work.pairs,
            prompts=len(work.asked) // work.samples,
            samples=work.samples,
            **work.drawing,
        )


def measure_models(work: Work, facts: BaseFacts, other: BaseFacts | None) -> Measured:
    """Measure a whole model and, if there is another to compare with, its reference: one after the other.

    What the first predicts at each token of its answers waits on the disk for the second.
    """
    model: Any = load_base(facts, device=work.device)
    policy = work.scores("policy", model)
    if other is None:
        return Measured(policy, None)
    if not work.asked:
        del model
        return Measured(policy, work.scores("reference", load_base(other, device=work.device)))
    prompts, chosen = [question.prompt_ids for question in work.asked], work.asked_pairs
    with tempfile.TemporaryDirectory() as name:
        answers_folder, data_folder = Path(name, "answers"), Path(name, "data")
        answers_folder.mkdir()
        data_folder.mkdir()
        with progress("sampling, policy"):
            said = answer_questions(model, work.asked, **work.drawing)
        answers = [answer.ids for answer in said]
        store_logits(model, prompts, answers, answers_folder, **work.options)
        store_logits(
            model, [pair.prompt_ids for pair in chosen], [pair.chosen_ids for pair in chosen], data_folder, **work.options
        )
        del model
        model = load_base(other, device=work.device)
        reference = work.scores("reference", model)
        with progress("comparing with the reference"):
            found = divergences(model, prompts, answers, stored=answers_folder, **work.options)
        along_data = data_prefix_kl(model, chosen, stored=data_folder, **work.options)
    drift = collect(
        work.tokenizer, work.asked, said, found, samples=work.samples, max_new_tokens=work.max_new_tokens, seed=work.seed
    )
    return Measured(policy, reference, drift, along_data, _reference_said(work, model) if work.is_judged else None)


def _reference_said(work: Work, model: Any) -> list[tuple[str, int]]:
    with progress("sampling, reference"):
        said = answer_questions(model, work.asked, **work.drawing)
    return [(answer_text(work.tokenizer, answer.ids), len(answer.ids)) for answer in said]

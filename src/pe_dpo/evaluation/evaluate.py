"""Evaluation of a run, an adapter or a merged model on preference pairs; one base in memory at a time.

pairs       log π and log π0 of held-out answers: accuracies, rewards, NLL
answers     sampled from π to held-out prompts, if asked for: KL(π‖π0), entropy, length
win rate    those against answers of π0, by a scorer, if there is one
scaled      all of it for a run's adapter scaled toward π0, if asked for

adapter      π is the model, π0 the model with adapters off
two models   π, then π0 when π is gone; what π predicts along the answers waits on the disk meanwhile
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pe_dpo.data import EncodedPair, data_hash, prepare_pairs
from pe_dpo.disk import TEMPORARY, disk_errors_named
from pe_dpo.errors import UsageError
from pe_dpo.evaluation.judge import judge, open_scorer, prompts_as_written, win_rate
from pe_dpo.inference.divergence import data_prefix_kl, divergences, store_logits
from pe_dpo.inference.drift import Drift, Questions, measure_drift
from pe_dpo.inference.pairs import pair_table, pair_terms, with_texts
from pe_dpo.inference.policy import Kind, Policy, SavedPolicy, default_device, load_policy
from pe_dpo.inference.reference import Caching, check_finite, open_reference
from pe_dpo.inference.sampling import answer_text
from pe_dpo.inference.scorer import TOKENS, Scorer, choose_scorer
from pe_dpo.metrics.catalogue import pair_metrics, share_intervals
from pe_dpo.metrics.table import PairTable
from pe_dpo.model.adapter_config import check_adapter
from pe_dpo.model.base import BaseInfo, answer_end_tokens, inspect_base, load_base
from pe_dpo.objective import Loss, PairLogprobs
from pe_dpo.progress import progress
from pe_dpo.quantizations import Quantization
from pe_dpo.recipe import Recipe, describe_sources
from pe_dpo.recipe.schema import GenerationSection
from pe_dpo.runs.files import ANSWERS_FILE, PAIRS_FILE, scaled_folder
from pe_dpo.runs.run import Run
from pe_dpo.runs.writing import save_evaluation

logger = logging.getLogger(__name__)

NOTABLE_ERROR = 5e-2
"""Nats per √token by which a sampler may see its answers otherwise than one forward does, before it is said."""


@dataclass
class Evaluation:
    """What an evaluation found."""

    kind: Kind
    scored: PairTable
    """With the log-probs of step 0, where they are known."""
    pairs: Sequence[EncodedPair]
    metrics: dict[str, float]
    """See `pair_metrics`."""
    before: dict[str, float]
    """The same of `before_of`; empty where there is no reference."""
    before_of: Literal["start", "reference"]
    """The policy at step 0, where that is known: of a run that began at its reference or has written these pairs at step 0."""
    intervals: dict[str, tuple[float, float]]
    """95 % Wilson intervals of the metrics that are shares."""
    tokenizer: Any
    drift: Drift | None
    """The sampled answers."""
    generation: dict[str, Any] | None
    """See `Drift.summary`; `data_prefix_kl` and, with a scorer, `win_rate` (see `judge.win_rate`) beside it."""
    scaled: Mapping[float, "Evaluation"] = field(default_factory=dict)
    """The same of the adapter scaled toward the reference, by its scale."""

    def save_pairs(self, path: Path) -> None:
        """Write every pair with its texts as parquet."""
        with disk_errors_named(path):
            with_texts(self.scored, self.pairs, self.tokenizer).save(path)

    def save(self, folder: Path) -> None:
        """Write eval_pairs.parquet, evaluation.json and, if answers were sampled, generations.parquet; else old ones stay.

        What was measured of the scaled adapter goes into folders of its own below, see `scaled_folder`.
        """
        with disk_errors_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.save_pairs(folder / PAIRS_FILE)
            if self.drift is not None:
                self.drift.table.save(folder / ANSWERS_FILE)
            generation = self.generation or Run(folder).generation
            save_evaluation(folder, self.metrics, self.intervals, generation)
        for scale, found in self.scaled.items():
            found.save(scaled_folder(folder, scale))


def evaluate(
    target: str | Path,
    *,
    data: str | None = None,
    base: str | None = None,
    quantize: Quantization | None = None,
    generation: GenerationSection | None = None,
    seed: int = 0,
    scorer: str | None = None,
    best: bool = False,
    keep: Callable[[Evaluation], None] = lambda found: None,
) -> Evaluation:
    """Return what a target makes of held-out pairs and, if asked, of held-out prompts.

    Args:
        target: a run folder, any LoRA adapter, or a whole (merged) model.
        data: pairs to evaluate on; by default those that the run held out, otherwise needed.
        base: for an adapter, its base if not the one named in it; for a whole model, the reference to compare with
            (loaded after the model has been measured and freed), without which only the policy is measured.
        quantize: how the base is loaded; by default as in the run, or by its size.
        generation: what to sample, and at which scales to measure a run's adapter besides; what is not set in it is as in the
            recipe of a run, else the default of a recipe.
        seed: of the sampled answers.
        scorer: judges sampled answers against the reference's; see `judge.open_scorer`.
        best: of a run, measure the adapter of its best evaluation, see `train.keep_best`.
        keep: called with what was measured before the scorer is asked: it may fail, and answers are dear.

    Raises:
        UsageError: the target is nothing that can be evaluated, `data` is missing, answers cannot be sampled or adapters scaled
            as asked, or the scorer does not work.
        DataError, ModelError: as in training.
    """
    saved = SavedPolicy(target, base=base, quantize=quantize, best=best)
    if saved.adapter is not None:
        check_adapter(saved.adapter)
    recipe = _recipe(saved, data, generation)
    if recipe.generation.prompts and saved.adapter is None and base is None:
        raise UsageError(f"{target}: is a whole model; its answers are measured against a reference: name it with `base`")
    score_answers = open_scorer(scorer, [recipe.generation], device=default_device()) if scorer else None

    tokenizer, info = saved.tokenizer(), saved.inspect()
    pairs = held_out_pairs(saved, recipe, tokenizer, info.context_length, data)
    work = _Measuring(saved, recipe, pairs, Questions(pairs, recipe.generation, seed=seed), tokenizer, is_judged=bool(scorer))
    if saved.adapter is not None:
        work.measure_adapter(info)
    else:
        other = inspect_base(base, quantize=quantize or "none", dtype=recipe.model.dtype) if base else None
        work.measure_models(info, other)
    initial = None if data else Run(saved.folder)
    found, *others = (work.evaluation(scale, initial) for scale in work.measured)
    found.scaled = dict(zip(list(work.measured)[1:], others, strict=True))
    if scorer and score_answers and work.reference_answers:
        keep(found)
        prompts = prompts_as_written(recipe.data, data)
        for one in (found, *others):
            if one.drift is not None and one.generation is not None:
                one.drift.table = judge(scorer, score_answers, one.drift.table, work.reference_answers, prompts)
                one.generation["win_rate"] = {"scorer": scorer, **win_rate(one.drift.table)}
    return found


def _recipe(saved: SavedPolicy, data: str | None, generation: GenerationSection | None) -> Recipe:
    """Return the recipe of a run; for anything else the one that would train it on the data; with what is asked to sample.

    Raises:
        UsageError: there are no pairs, or something is to be scaled that is no run.
    """
    if saved.recipe is not None:
        recipe = saved.recipe
    elif data is None:
        raise UsageError(
            f"{saved.folder}: is not a run folder, so there are no held-out pairs of its own; name them with `data`"
        )
    else:
        settings = {"model": saved.section.model_dump(), "data": {"train": data}, "output": str(saved.folder)}
        recipe = Recipe.model_validate(settings)
    if generation is not None:
        asked = recipe.generation.model_copy(update=generation.model_dump(exclude_unset=True))
        recipe = recipe.model_copy(update={"generation": asked})
    if recipe.generation.scales and saved.kind != "run":
        raise UsageError(
            f"{saved.folder}: is {'a bare adapter' if saved.adapter else 'a whole model'}, and what `scales` measures is "
            "kept in the folder of a run; name that folder, or leave `scales` out"
        )
    return recipe


def held_out_pairs(
    saved: SavedPolicy, recipe: Recipe, tokenizer: Any, context_length: int | None, data: str | None
) -> Sequence[EncodedPair]:
    """Return the pairs that a run held out, or those of `data`.

    Raises:
        UsageError: there are none, or they are not those of the run any more.
    """
    section = recipe.model
    prepared = prepare_pairs(
        recipe.data,
        tokenizer=tokenizer,
        context_length=context_length,
        end_token_ids=answer_end_tokens(tokenizer, section.base, revision=section.revision),
        only=data,
        recorded=None if data else Run(saved.folder).data_report,
        seed=recipe.train.seeds.data,
    )
    prepared.report.tell(logger)
    pairs = prepared.train if data else prepared.held_out
    if not pairs:
        raise UsageError(f"the run held no pairs out (data.eval: {describe_sources(recipe.data.eval)}); name some with `data`")
    recorded = None if data else saved.run.hashes.held_out
    if recorded is not None and recorded != data_hash(pairs):
        raise UsageError(
            f"{saved.folder}: the data are not those of the run any more, so its held-out pairs cannot be told from those it "
            "trained on; restore them, or name other pairs with `data`"
        )
    return pairs


class _Measuring:
    """What the models make of pairs and prompts.

    Args:
        saved: what is evaluated.
        recipe: with the settings of the data, of the loss, and of what is sampled.
        pairs: held out.
        asked: the prompts whose answers are sampled.
        tokenizer: of the models.
        is_judged: whether answers of the reference are needed.
    """

    def __init__(
        self,
        saved: SavedPolicy,
        recipe: Recipe,
        pairs: Sequence[EncodedPair],
        asked: Questions,
        tokenizer: Any,
        *,
        is_judged: bool,
    ) -> None:
        self.saved, self.recipe, self.pairs, self.asked = saved, recipe, pairs, asked
        self.tokenizer, self.is_judged = tokenizer, is_judged
        wish = recipe.train.tokens_per_microbatch
        self.token_budget = TOKENS if wish == "auto" else wish
        self.measured: dict[float, tuple[PairLogprobs, Drift | None]] = {}
        """Log-probs under the policy and its sampled answers, by its scale; the first is the policy as it is."""
        self.reference: PairLogprobs | None = None
        self.data_prefix_kl: dict[str, Any] | None = None
        self.reference_answers: list[tuple[str, int]] = []
        """Text and tokens of each, where answers are judged."""

    def measure_adapter(self, info: BaseInfo) -> None:
        """Measure an adapter and its reference, then the adapter scaled toward the reference."""
        saved, pairs, settings = self.saved, self.pairs, self.recipe.generation
        policy = load_policy(saved, info=info, tokenizer=self.tokenizer)
        scorer = self._scorer(policy)
        caching: Caching = "step" if self.recipe.reference.policy == "step" else "auto"
        reference = open_reference(policy, scorer, caching=caching, path=self.recipe.reference.store)
        saved.check_base(info, reference.base_fingerprint)
        with progress("scoring, policy"):
            scored = scorer.score_pairs(policy.model, pairs)
        reference.forget_if_wrong(pairs)
        with progress("scoring, reference"):
            self.reference = reference.logprobs(pairs)
        reference.flush()
        drift = None
        if settings.prompts:
            with progress("sampling, policy"):
                drift = measure_drift(policy, scorer, pairs, settings, seed=self.asked.seed)
            with progress("KL along chosen answers"):
                self.data_prefix_kl = scorer.within_memory(
                    self.asked.pairs, lambda: data_prefix_kl(policy, self.asked.pairs, token_budget=scorer.token_budget)
                )
        self.measured[1.0] = scored, drift
        if self.is_judged:
            with policy.reference():
                self._answer_as_reference(policy, scorer)
        # With as many tokens per forward as the run measured with, for the same rounding errors, unless they are many.
        tokens = saved.run.scoring.get("tokens_per_forward") if saved.is_as_trained else None
        if tokens:
            scorer.token_budget = min(int(tokens), max(TOKENS, self.token_budget))
        for scale in settings.scales:
            with policy.scaled(scale):
                with progress(f"scoring, policy scaled to {scale:g}"):
                    scored = scorer.score_pairs(policy.model, pairs)
                if settings.prompts:
                    with progress(f"sampling, policy scaled to {scale:g}"):
                        drift = measure_drift(policy, scorer, pairs, settings, seed=self.asked.seed)
            self.measured[scale] = scored, drift

    def measure_models(self, info: BaseInfo, other: BaseInfo | None) -> None:
        """Measure a whole model and, if there is another to compare with, its reference: one after the other.

        What the first predicts at each token of its answers waits on the disk for the second.
        """
        asked, pairs, budget = self.asked, self.asked.pairs, self.token_budget
        policy = load_policy(self.saved, info=info, tokenizer=self.tokenizer)
        with progress("scoring, policy"):
            scorer = self._scorer(policy)
            scored = scorer.score_pairs(policy.model, self.pairs)
        self.measured[1.0] = scored, None
        if other is None:
            return
        prompts, chosen = [pair.prompt_ids for pair in pairs], [pair.chosen_ids for pair in pairs]
        with tempfile.TemporaryDirectory() as name, disk_errors_named(Path(name), advice=TEMPORARY):
            answers_folder, data_folder = Path(name, "answers"), Path(name, "data")
            with progress("sampling, policy"):
                said = scorer.within_memory(pairs, lambda: asked.answers(policy, token_budget=scorer.token_budget))
            ids = [answer.ids for answer in said]
            store_logits(policy, asked.prompts, ids, answers_folder, token_budget=budget)
            store_logits(policy, prompts, chosen, data_folder, token_budget=budget)
            ends = policy.end_tokens
            del policy
            policy = Policy(load_base(other, device=default_device()), self.tokenizer, other, ends)
            with progress("scoring, reference"):
                self.reference = self._scorer(policy).score_pairs(policy.model, self.pairs)
            if not ids:
                return
            with progress("comparing with the reference"):
                compared = divergences(policy, asked.prompts, ids, stored=answers_folder, token_budget=budget)
            self.data_prefix_kl = data_prefix_kl(policy, pairs, stored=data_folder, token_budget=budget)
        self.measured[1.0] = scored, Drift(asked, said, compared, self.tokenizer, noise=scorer.noise)
        if self.is_judged:
            self._answer_as_reference(policy, scorer)

    def evaluation(self, scale: float, initial: Run | None) -> Evaluation:
        """Return what was measured at a scale, with all that follows from it.

        Args:
            scale: of the policy.
            initial: the run that has written the pairs at step 0.

        Raises:
            ModelError: a log-prob is not finite.
        """
        policy, drift = self.measured[scale]
        check_finite(policy, self.pairs, under="the policy")
        loss = Loss(**self.recipe.loss.coefficients())
        if self.reference is None:
            loss = loss.with_gamma(0.0)
            logger.info("no reference given (`base`): rewards and loss are those of gamma = 0")
        out = loss(policy, self.reference, *pair_terms(self.pairs))
        scored = pair_table(self.pairs, policy, self.reference, out, loss)
        starts_as_reference = self.saved.recipe is not None and self.recipe.policy_starts_as_reference
        if self.saved.recipe is not None and initial is not None:
            known = initial.with_initial(scored)
            scored = known or (scored.since(None) if starts_as_reference else scored)
        is_start = scored.knows("initial_chosen") or starts_as_reference
        before: dict[str, float] = {}
        start = scored if scored.knows("initial_chosen") or self.reference is None else scored.since(None)
        if start.initial_chosen is not None and start.initial_rejected is not None:
            sides = torch.tensor(start.initial_chosen), torch.tensor(start.initial_rejected)
            first = policy._replace(chosen=sides[0].to(policy.chosen), rejected=sides[1].to(policy.rejected))
            table = pair_table(self.pairs, first, self.reference, loss(first, self.reference, *pair_terms(self.pairs)), loss)
            before = pair_metrics(table.since(table), is_fixed_set=True)
        generation = None
        if drift is not None:
            generation = drift.summary()
            if scale == 1 and self.data_prefix_kl is not None:
                generation["data_prefix_kl"] = self.data_prefix_kl
            if drift.sampler_is_off and drift.sampler_error > NOTABLE_ERROR:
                logger.warning(
                    f"what this model predicts with its cache is {drift.sampler_error:.2g} nats per √token off what it "
                    "predicts at once; the sampled answers are not quite its own"
                )
        metrics = pair_metrics(scored, is_fixed_set=True)
        return Evaluation(
            kind=self.saved.kind,
            scored=scored,
            pairs=self.pairs,
            metrics=metrics,
            before=before,
            before_of="start" if is_start else "reference",
            intervals=share_intervals(metrics),
            tokenizer=self.tokenizer,
            drift=drift,
            generation=generation,
        )

    def _scorer(self, policy: Policy) -> Scorer:
        packing = self.recipe.train.packing
        return choose_scorer(policy.model, self.pairs, packing=packing, token_budget=self.token_budget)

    def _answer_as_reference(self, policy: Policy, scorer: Scorer) -> None:
        with progress("sampling, reference"):
            said = scorer.within_memory(self.asked.pairs, lambda: self.asked.answers(policy, token_budget=scorer.token_budget))
        self.reference_answers = [(answer_text(self.tokenizer, answer.ids), len(answer.ids)) for answer in said]

"""Evaluation of a run, an adapter or a merged model on preference pairs; one base in memory at a time.

pairs       log π and log π0 of held-out answers: accuracies, rewards, NLL
answers     sampled from π to held-out prompts, if asked for: KL(π‖π0), entropy, length
win rate    those against answers of π0, by a scorer, if there is one
scaled      all of it for a run's adapter scaled toward π0, if asked for
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pe_dpo.data import EncodedPair, data_hash, prepare_pairs
from pe_dpo.errors import UsageError
from pe_dpo.evaluation.judge import Judgement, judge, open_scorer, prompts_as_written, win_rate
from pe_dpo.evaluation.measuring import Measured, Work, measure_adapter, measure_models
from pe_dpo.inference.drift import Drift, questions, save_generations
from pe_dpo.inference.pairs import pair_table, with_texts
from pe_dpo.inference.scorer import TOLERANCE
from pe_dpo.inference.target import Kind, Target, find_target, load_target_tokenizer
from pe_dpo.metrics.catalogue import pair_metrics, share_intervals
from pe_dpo.metrics.table import PairTable
from pe_dpo.model.adapter_config import check_adapter
from pe_dpo.model.base import answer_end_tokens, end_token_ids, inspect_base
from pe_dpo.objective import Loss
from pe_dpo.quantizations import Quantization
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.schema import GenerationSection, check_scales
from pe_dpo.runs.files import ANSWERS_FILE, EVALUATION_FILE, PAIRS_FILE, scaled_folder
from pe_dpo.runs.held_out import read_generation, save_evaluation, with_initial
from pe_dpo.runs.run import Run

logger = logging.getLogger(__name__)


class Sampling(NamedTuple):
    """What to sample; None: as the recipe of a run says, else the default of a recipe's section `generation`."""

    prompts: int | None = None
    samples: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0


AS_IN_RECIPE = Sampling()


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    kind: Kind
    scored: PairTable
    """With the log-probs of step 0, where they are known."""
    pairs: list[EncodedPair]
    metrics: dict[str, float]
    """See `pair_metrics`."""
    intervals: dict[str, tuple[float, float]]
    """95 % Wilson intervals of the metrics that are shares."""
    tokenizer: Any
    drift: Drift | None
    """The sampled answers."""
    generation: dict[str, Any] | None
    """See `Drift.summary`; `data_prefix_kl` and, with a scorer, `win_rate` (see `judge.win_rate`) beside it."""
    judgement: Judgement | None
    scaled: Mapping[float, "Evaluation"] = field(default_factory=dict)
    """The same of the adapter scaled toward the reference, by its scale."""

    def save_pairs(self, path: Path) -> None:
        """Write every pair with its texts as parquet."""
        with_texts(self.scored, self.pairs, self.tokenizer).save(path)

    def save(self, folder: Path) -> None:
        """Write eval_pairs.parquet, evaluation.json and, if answers were sampled, generations.parquet; else old ones stay.

        What was measured of the scaled adapter goes into folders of its own below, see `scaled_folder`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.save_pairs(folder / PAIRS_FILE)
        if self.drift is not None:
            columns = {} if self.judgement is None else self.judgement.columns()
            save_generations(self.drift, folder / ANSWERS_FILE, **columns)
        generation = self.generation or read_generation(folder)
        save_evaluation(folder / EVALUATION_FILE, self.metrics, self.intervals, generation)
        for scale, found in self.scaled.items():
            found.save(scaled_folder(folder, scale))


def evaluate(
    target: str | Path,
    *,
    data: str | None = None,
    base: str | None = None,
    quantize: Quantization | None = None,
    sampling: Sampling = AS_IN_RECIPE,
    scales: Sequence[float] | None = None,
    scorer: str | None = None,
    keep: Callable[[Evaluation], None] = lambda found: None,
) -> Evaluation:
    """Return what a target makes of held-out pairs and, if asked, of held-out prompts.

    Args:
        target: a run folder, any LoRA adapter, or a whole (merged) model.
        data: pairs to evaluate on; by default those that the run held out, otherwise needed.
        base: for an adapter, its base if not the one named in it; for a whole model, the reference to compare with
            (loaded after the model has been measured and freed), without which only the policy is measured.
        quantize: how the base is loaded; by default as in the run, or by its size.
        sampling: how many answers to sample, and how.
        scales: of a run, where between reference and policy to measure its adapter besides, each 0 < a < 1; None: as its recipe
            says (generation.scales).
        scorer: judges sampled answers against the reference's; see `judge.open_scorer`.
        keep: called with what was measured before the scorer is asked: it may fail, and answers are dear.

    Raises:
        UsageError: the target is nothing that can be evaluated, `data` is missing, answers cannot be sampled or adapters scaled
            as asked, or the scorer does not work.
        DataError, ModelError: as in training.
    """
    found = find_target(Path(target), base=base, quantize=quantize)
    if found.adapter is not None:
        check_adapter(found.adapter)
    settings = _settings(Path(target), found, data)
    generation = _asked(settings.generation, sampling, scales)
    _check_asked(found, Path(target), generation, base, scorer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    score_answers = open_scorer(scorer, device=device) if scorer else None
    tokenizer = load_target_tokenizer(found)
    facts = inspect_base(**settings.model.model_dump())
    pairs = _held_out_pairs(settings, tokenizer, facts.context_length, data)
    if found.kind == "run" and data is None:
        _check_same_pairs(Path(target), pairs)
    work = Work(
        settings=settings,
        tokenizer=tokenizer,
        pairs=pairs,
        asked=questions(pairs, generation.prompts, generation.samples),
        samples=generation.samples,
        max_new_tokens=generation.max_new_tokens,
        seed=sampling.seed,
        is_judged=scorer is not None,
        device=device,
        ends=answer_end_tokens(tokenizer, settings.model.base, revision=settings.model.revision),
        scales=tuple(generation.scales),
    )
    if found.adapter is None:
        other = inspect_base(base, quantize=quantize or "none", dtype=settings.model.dtype) if base else None
        measured = measure_models(work, facts, other)
    else:
        trained = Path(target) if found.kind == "run" and base is None and quantize is None else None
        measured = measure_adapter(work, found.adapter, facts, trained)
    result = _evaluation(found.kind, work, measured, partial(_since_start, Path(target), found, data))
    if not (scorer and score_answers and measured.reference_said):
        return result
    keep(result)
    prompts = prompts_as_written(settings.data, data)
    return _judged(result, partial(judge, scorer, score_answers, reference=measured.reference_said, prompts=prompts))


def _evaluation(kind: Kind, work: Work, measured: Measured, since_start: Callable[[PairTable], PairTable]) -> Evaluation:
    """What was measured, with all that follows from it."""
    scored = since_start(_scored(work, measured))
    metrics = pair_metrics(scored, is_fixed_set=True)
    return Evaluation(
        kind=kind,
        scored=scored,
        pairs=work.pairs,
        metrics=metrics,
        intervals=share_intervals(metrics, len(scored)),
        tokenizer=work.tokenizer,
        drift=measured.drift,
        generation=_generation(measured),
        judgement=None,
        scaled={scale: _evaluation(kind, work, part, since_start) for scale, part in measured.scaled.items()},
    )


def _judged(found: Evaluation, judged: Callable[[Drift], Judgement]) -> Evaluation:
    """The same with the scorer's judgement of its answers."""
    if found.drift is None:
        return found
    judgement = judged(found.drift)
    return replace(
        found,
        judgement=judgement,
        generation={**(found.generation or {}), "win_rate": win_rate(found.drift, judgement)},
        scaled={scale: _judged(one, judged) for scale, one in found.scaled.items()},
    )


def _check_asked(found: Target, target: Path, generation: GenerationSection, base: str | None, scorer: str | None) -> None:
    """Check that a target can be asked for answers, scaled, and judged as wished.

    Raises:
        UsageError: it cannot.
    """
    if generation.prompts and found.adapter is None and base is None:
        raise UsageError(f"{target}: is a whole model; its answers are measured against a reference: name it with --base")
    if generation.scales and found.kind != "run":
        raise UsageError(
            f"{target}: is {'a bare adapter' if found.adapter else 'a whole model'}, and what --scale measures is kept in the "
            "folder of a run; name that folder, or leave --scale out"
        )
    if scorer and not generation.prompts:
        raise UsageError(f"--scorer {scorer}: judges sampled answers; say how many prompts to ask: --prompts 100")


def _asked(settings: GenerationSection, sampling: Sampling, scales: Sequence[float] | None) -> GenerationSection:
    """What to sample and where to scale: as in the settings, but for what is asked otherwise.

    Raises:
        UsageError: the scales are no fractions.
    """
    wishes = {name: value for name, value in sampling._asdict().items() if name != "seed" and value is not None}
    if scales is None:
        return settings.model_copy(update=wishes)
    try:
        check_scales(scales)
    except ValueError as error:
        raise UsageError(f"--scale {','.join(f'{scale:g}' for scale in scales)}: {error}") from error
    return settings.model_copy(update={**wishes, "scales": list(scales)})


def _scored(work: Work, measured: Measured) -> PairTable:
    """The pairs with loss and rewards."""
    loss = Loss(**work.settings.loss.coefficients())
    if measured.reference is None:
        loss = loss.with_gamma(0.0)
        logger.info("no reference given (--base): rewards and loss are those of gamma = 0")
    margins = torch.tensor([pair.margin for pair in work.pairs], dtype=torch.float64)
    out = loss(measured.policy, measured.reference, margins)
    if measured.drift is not None and measured.drift.sampler_error > TOLERANCE[torch.bfloat16]:
        logger.warning(
            f"what this model predicts with its cache is {measured.drift.sampler_error:.2g} nats per √token off what it "
            "predicts at once; the sampled answers are not quite its own"
        )
    return pair_table(work.pairs, measured.policy, measured.reference, out, loss)


def _since_start(target: Path, found: Target, data: str | None, scored: PairTable) -> PairTable:
    """The pairs with step 0 of a run: as it wrote it down, or the reference where the run started from it."""
    if found.kind != "run" or data is not None or found.recipe is None:
        return scored
    known = with_initial(target / PAIRS_FILE, scored)
    return known or (scored.since(None) if found.recipe.policy_starts_as_reference else scored)


def _generation(measured: Measured) -> dict[str, Any] | None:
    if measured.drift is None:
        return None
    along_data = {} if measured.data_prefix is None else {"data_prefix_kl": measured.data_prefix}
    return {**measured.drift.summary(), **along_data}


def _settings(target: Path, found: Target, data: str | None) -> Recipe:
    """The recipe of a run; for anything else the one that would train it on the data to evaluate on."""
    if found.recipe is not None:
        return found.recipe
    if data is None:
        raise UsageError(f"{target}: is not a run folder, so there are no held-out pairs of its own; name them with --data")
    return Recipe.model_validate({"model": found.model.model_dump(), "data": {"train": data}, "output": str(target)})


def _check_same_pairs(run: Path, pairs: list[EncodedPair]) -> None:
    recorded = Run(run).info.hashes.held_out
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
) -> list[EncodedPair]:
    prepared = prepare_pairs(
        recipe.data,
        tokenizer=tokenizer,
        context_length=context_length,
        end_token_ids=end_token_ids(recipe.model.base, revision=recipe.model.revision),
        only=data,
    )
    for line in prepared.report.lines():
        logger.info(line)
    pairs = prepared.train if data else prepared.held_out
    if not pairs:
        raise UsageError(f"the run held no pairs out (data.eval: {recipe.data.eval}); name some with --data")
    return pairs

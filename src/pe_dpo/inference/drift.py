"""How far a policy has moved from its reference: KL(π‖π0) on answers that the policy gives to held-out prompts.

    KL(π‖π0 | x) = E_{y~π} Σ_t KL(π(·|x, y_<t) ‖ π0(·|x, y_<t))           `kl`: of every position the whole distribution
                 = E_{y~π} Σ_t log π(y_t|x, y_<t) − log π0(y_t|x, y_<t)    `kl_k1`: of the token that was drawn

Both are unbiased; the first is the second with the draw of each token integrated out (Rao–Blackwell), and needs a tenth of the
answers or fewer for the same error. `entropy` is integrated out the same way. An answer that is cut after `max_new_tokens`
gives the KL of the process that stops there: less than that of whole answers, so compare runs with the same limit only.

What is computed on answers of the data set instead, `divergence.data_prefix_kl`, is another quantity: it says nothing about
where the policy goes by itself.

Source: Amini, Vieira & Cotterell 2025, "Better estimation of the KL divergence between language models" (arXiv 2504.10637).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.inference.divergence import Divergence, divergences
from pe_dpo.inference.generation import answer_text, prompt_text
from pe_dpo.inference.sampling import SampledAnswer, sample_answers
from pe_dpo.inference.scorer import TOLERANCE, numeric_dtype
from pe_dpo.metrics.catalogue import answer_metrics
from pe_dpo.metrics.table import AnswerTable

CACHED = 4
"""Times the token budget, most tokens of a batch that is sampled: it is read without gradients, and then only its keys and
values are kept."""


class Question(NamedTuple):
    """A prompt of which an answer is due."""

    prompt_key: str
    sample: int
    """Which of the answers to its prompt, from 0."""
    prompt_ids: np.ndarray
    """int32 (P,)."""


class DriftAnswer(NamedTuple):
    """One answer of the policy, and what both models make of it."""

    prompt_key: str
    sample: int
    prompt_ids: np.ndarray
    prompt: str
    """See `generation.prompt_text`."""
    ids: np.ndarray
    answer: str
    """See `generation.answer_text`."""
    ended: bool
    kl: float
    log_policy: float
    log_reference: float
    entropy: float

    @property
    def tokens(self) -> int:
        """Tokens that were drawn, the end token among them."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Drift:
    """Answers of a policy with what both models make of them.

    Args:
        prompts: How many prompts were asked.
        samples: Answers to each.
        max_new_tokens: Where an answer that did not end was cut.
        seed: Of the draws.
        answers: Prompt by prompt, the samples of a prompt one after the other.
        sampler_error: Largest |log π(answer) as the sampler saw it − log π(answer) of one forward|, nats by √tokens: rounding,
            unless a model is not itself in padded batches or with a cache.
    """

    prompts: int
    samples: int
    max_new_tokens: int
    seed: int
    answers: list[DriftAnswer]
    sampler_error: float

    def table(self, **scores: Any) -> AnswerTable:
        """Return one row per answer; `scores` are the columns that a scorer adds."""
        columns = {
            name: [getattr(answer, name) for answer in self.answers]
            for name in AnswerTable.column_names()
            if hasattr(self.answers[0], name)
        }
        numbers = {name: np.asarray(column) for name, column in {**columns, **scores}.items() if not isinstance(column[0], str)}
        return AnswerTable(**{**columns, **scores, **numbers})

    def summary(self) -> dict[str, Any]:
        """Return means over answers with standard errors clustered by prompt, as in `generation` of evaluation.json.

        `kl`, `kl_k1` and `tokens` are per answer; `kl_per_token` and `entropy_per_token` are sums over all answers divided by
        all tokens. `ended` is the share of answers that were not cut. `distinct_1` and `distinct_2` are distinct token n-grams
        by all n-grams (Li et al. 2016), which falls with more text: compare only runs with the same prompts and limits.
        """
        ids = [answer.ids[: answer.tokens - answer.ended].tolist() for answer in self.answers]
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            **answer_metrics(self.table()),
            "ended": float(np.mean([answer.ended for answer in self.answers])),
            "distinct_1": distinct(ids, 1),
            "distinct_2": distinct(ids, 2),
            "sampler_error": self.sampler_error,
        }


def measure_drift(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[EncodedPair],
    *,
    prompts: int,
    samples: int,
    max_new_tokens: int,
    end_token_ids: Collection[int],
    seed: int,
    device: torch.device | str,
    token_budget: int,
) -> Drift:
    """Return answers of the policy to held-out prompts, and how far policy and reference are apart on them.

    The model is left as it was: which adapter is active, what is trainable, training or eval mode, its generation config. No
    random generator is used.

    Args:
        model: a PEFT model with the policy active.
        tokenizer: of the model.
        pairs: the held-out pairs; see `questions` for which of their prompts are asked.
        prompts: how many, at most.
        samples: answers to each.
        max_new_tokens: where to cut an answer that does not end.
        end_token_ids: tokens that end an answer.
        seed: of the draws. Runs that are asked with the same seed share their noise (see `sampling`).
        device: of the model.
        token_budget: most tokens of one forward, padding included.
    """
    asked = questions(pairs, prompts, samples)
    prompt_ids = [question.prompt_ids for question in asked]
    draw = partial(
        answer_questions, model, asked, max_new_tokens=max_new_tokens, end_token_ids=end_token_ids, seed=seed, device=device
    )
    compare = partial(divergences, model, prompt_ids, device=device, token_budget=token_budget)
    said = draw(token_budget=token_budget)
    found = compare([answer.ids for answer in said])
    if _sampler_error(said, found) > TOLERANCE[numeric_dtype(model)]:
        said = draw(token_budget=0)  # each alone: the model is not itself where rows are padded on the left
        found = compare([answer.ids for answer in said])
    return collect(tokenizer, asked, said, found, samples=samples, max_new_tokens=max_new_tokens, seed=seed)


def questions(pairs: Sequence[EncodedPair], prompts: int, samples: int) -> list[Question]:
    """Return what to ask: the first distinct prompts in the order of their keys, which are hashes, each so many times.

    So the choice depends neither on a seed nor on the order of the pairs. Where a prompt was shortened differently for several
    of its pairs, its longest form is taken.
    """
    longest: dict[str, np.ndarray] = {}
    for pair in pairs:
        if len(pair.prompt_ids) > len(longest.get(pair.prompt_key, ())):
            longest[pair.prompt_key] = pair.prompt_ids
    return [Question(key, sample, longest[key]) for key in sorted(longest)[:prompts] for sample in range(samples)]


def answer_questions(
    model: Any,
    asked: Sequence[Question],
    *,
    max_new_tokens: int,
    end_token_ids: Collection[int],
    seed: int,
    device: torch.device | str,
    token_budget: int,
) -> list[SampledAnswer]:
    """Return the answers of a model in the state it is in; the noise of each is that of its question, whoever is asked.

    Args:
        model: a causal LM.
        asked: the questions.
        max_new_tokens: as in `sample_answers`.
        end_token_ids: as in `sample_answers`.
        seed: as in `sample_answers`.
        device: of the model.
        token_budget: most tokens of one forward in training or evaluation; what is sampled may take CACHED times as many.
    """
    return sample_answers(
        model,
        [question.prompt_ids for question in asked],
        [f"{question.prompt_key}/{question.sample}" for question in asked],
        max_new_tokens=max_new_tokens,
        end_token_ids=end_token_ids,
        seed=seed,
        device=device,
        token_budget=CACHED * token_budget,
    )


def collect(
    tokenizer: Any,
    asked: Sequence[Question],
    said: Sequence[SampledAnswer],
    found: Sequence[Divergence],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> Drift:
    """Return questions, answers and what both models make of them, as one; the arguments are those of the other functions."""
    answers = [
        DriftAnswer(
            **question._asdict(),
            prompt=prompt_text(tokenizer, question.prompt_ids),
            ids=answer.ids,
            answer=answer_text(tokenizer, answer.ids),
            ended=answer.ended,
            **divergence._asdict(),
        )
        for question, answer, divergence in zip(asked, said, found, strict=True)
    ]
    return Drift(len(asked) // samples, samples, max_new_tokens, seed, answers, _sampler_error(said, found))


def distinct(texts: Sequence[Sequence[int]], size: int) -> float:
    """Return distinct n-grams by all n-grams of some token sequences together; 0 where there are none."""
    grams = [tuple(text[start : start + size]) for text in texts for start in range(len(text) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def save_generations(drift: Drift, path: Path, **columns: Sequence[Any]) -> None:
    """Write one row per answer as parquet, atomically; KL, entropy and log-probs in nats, summed over tokens.

    Args:
        drift: what was measured.
        path: of the file.
        **columns: further columns, such as scores; one value per answer.
    """
    drift.table(**columns).save(path)


def _sampler_error(said: Sequence[SampledAnswer], found: Sequence[Divergence]) -> float:
    """Nats by √tokens."""
    errors = (
        abs(answer.logprob - divergence.log_policy) / len(answer.ids) ** 0.5
        for answer, divergence in zip(said, found, strict=True)
    )
    return max(errors, default=0.0)

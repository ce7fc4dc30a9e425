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

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.inference.divergence import divergences
from pe_dpo.inference.policy import Policy
from pe_dpo.inference.rounding import Rounding
from pe_dpo.inference.sampling import Sample, answer_text, prompt_text, sample
from pe_dpo.inference.scorer import Scorer
from pe_dpo.metrics.catalogue import answer_metrics
from pe_dpo.metrics.table import AnswerTable
from pe_dpo.recipe.schema import GenerationSection

CACHED = 4
"""Times the token budget, most tokens of a batch that is sampled: it is read without gradients, and then only its keys and
values are kept."""


class Questions:
    """The prompts of which answers are asked: the first distinct ones in the order of their keys, which are hashes.

    So the choice depends neither on a seed nor on the order of the pairs. Where a prompt was shortened differently for several
    of its pairs, its longest form is taken. Each is asked so many times in a row.

    Args:
        pairs: whose prompts they are.
        settings: how many, how often, and where an answer that does not end is cut.
        seed: of the draws. Runs that are asked with the same seed share their noise (see `sampling`).
    """

    def __init__(self, pairs: Sequence[EncodedPair], settings: GenerationSection, *, seed: int = 0) -> None:
        longest: dict[str, np.ndarray] = {}
        for pair in pairs:
            if len(pair.prompt_ids) > len(longest.get(pair.prompt_key, ())):
                longest[pair.prompt_key] = pair.prompt_ids
        keys = sorted(longest)[: settings.prompts]
        self.samples, self.max_new_tokens, self.seed = settings.samples, settings.max_new_tokens, seed
        self.keys = [key for key in keys for _ in range(self.samples)]
        """Of the prompt, for each answer."""
        self.numbers = [number for _ in keys for number in range(self.samples)]
        """Which of the answers to its prompt, from 0."""
        self.prompts = [longest[key] for key in self.keys]
        """int32 (P,) each."""
        self.pairs = [pair for pair in pairs if pair.prompt_key in set(keys)]
        """Those whose prompts are asked."""

    def answers(self, policy: Policy, *, token_budget: int) -> list[Sample]:
        """Return the answers of a model in the state it is in; the noise of each is that of its question, whoever is asked.

        Args:
            policy: that is asked.
            token_budget: most tokens of one forward in training or evaluation; what is sampled may take CACHED times as many.
        """
        return sample(
            policy,
            self.prompts,
            [f"{key}/{number}" for key, number in zip(self.keys, self.numbers, strict=True)],
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            token_budget=CACHED * token_budget,
        )


class Drift:
    """Answers of a policy with what both models make of them.

    Args:
        asked: the questions.
        said: the answers.
        compared: see `divergences`.
        tokenizer: with which both are written as text.
        noise: see `Scorer`.
    """

    def __init__(self, asked: Questions, said: Sequence[Sample], compared: np.ndarray, tokenizer: Any, *, noise: float) -> None:
        self.asked = asked
        self.ids = [answer.ids for answer in said]
        self.table = AnswerTable(
            prompt_key=asked.keys,
            prompt=[prompt_text(tokenizer, ids) for ids in asked.prompts],
            sample=np.asarray(asked.numbers),
            answer=[answer_text(tokenizer, ids) for ids in self.ids],
            tokens=np.asarray([len(ids) for ids in self.ids]),
            ended=np.asarray([answer.ended for answer in said]),
            kl=compared[:, 0],
            log_policy=compared[:, 1],
            log_reference=compared[:, 2],
            entropy=compared[:, 3],
        )
        """Prompt by prompt, the samples of a prompt one after the other."""
        errors = np.abs([answer.logprob for answer in said] - self.table.log_policy) / np.sqrt(self.table.tokens)
        self.sampler_error = float(errors.max(initial=0.0))
        """Largest |log π(answer) as the sampler saw it − log π(answer) of one forward|, nats by √tokens: rounding, unless a
        model is not itself in padded batches or with a cache."""
        self.sampler_is_off = len(errors) > 0 and Rounding(noise).refutation([torch.from_numpy(errors)]) is not None
        """Whether most of these differences, or many, are more than rounding."""

    def summary(self) -> dict[str, Any]:
        """Return means over answers with standard errors clustered by prompt, as in `generation` of evaluation.json.

        `kl`, `kl_k1` and `tokens` are per answer; `kl_per_token` and `entropy_per_token` are sums over all answers divided by
        all tokens. `ended` is the share of answers that were not cut. `distinct_1` and `distinct_2` are distinct token n-grams
        by all n-grams (Li et al. 2016), which falls with more text: compare only runs with the same prompts and limits.
        """
        ended = self.table.ended.tolist()
        ids = [ids[: len(ids) - has_ended].tolist() for ids, has_ended in zip(self.ids, ended, strict=True)]
        return {
            "prompts": len(ids) // self.asked.samples,
            "samples": self.asked.samples,
            "max_new_tokens": self.asked.max_new_tokens,
            "seed": self.asked.seed,
            **answer_metrics(self.table),
            "ended": float(np.mean(ended)),
            "distinct_1": distinct(ids, 1),
            "distinct_2": distinct(ids, 2),
            "sampler_error": self.sampler_error,
        }


def measure_drift(
    policy: Policy, scorer: Scorer, pairs: Sequence[EncodedPair], settings: GenerationSection, *, seed: int = 0
) -> Drift:
    """Return answers of the policy to held-out prompts, and how far policy and reference are apart on them.

    The model is left as it was: which adapter is active, what is trainable, training or eval mode, its generation config. No
    random generator is used.

    Args:
        policy: with its reference inside.
        scorer: has the budget of tokens.
        pairs: the held-out pairs; see `Questions` for which of their prompts are asked.
        settings: see `Questions`.
        seed: see `Questions`.
    """
    asked = Questions(pairs, settings, seed=seed)

    def measure(sampler_budget: int) -> Drift:
        said = asked.answers(policy, token_budget=sampler_budget)
        ids = [answer.ids for answer in said]
        compared = divergences(policy, asked.prompts, ids, token_budget=scorer.token_budget)
        return Drift(asked, said, compared, policy.tokenizer, noise=scorer.noise)

    drift = scorer.within_memory(pairs, lambda: measure(scorer.token_budget))
    if drift.sampler_is_off:
        # Each alone: the model is not itself where rows are padded on the left.
        drift = scorer.within_memory(pairs, lambda: measure(0))
    return drift


def distinct(texts: Sequence[Sequence[int]], size: int) -> float:
    """Return distinct n-grams by all n-grams of some token sequences together; 0 where there are none."""
    grams = [tuple(text[start : start + size]) for text in texts for start in range(len(text) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0

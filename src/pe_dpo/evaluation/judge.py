"""Who wins: answers of the policy against answers of its reference to the same prompts, by a scorer of the user's choice.

    score(x, y) > score(x, y0)   a win, equal scores half a win        y ~ π, y0 ~ π0, drawn with the same noise

A scorer is a Python function (prompts, answers) → scores, higher is better, named as `package.module:function` or
`file.py:function`; or a reward model, that is, any model for sequence classification with one label.
"""

import importlib
import importlib.util
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pe_dpo.data.pairs import Pair, Text, prompt_key
from pe_dpo.data.reading import read_places
from pe_dpo.data.rendering import as_messages
from pe_dpo.data.report import DataReport
from pe_dpo.data.sandbox import TEMPLATE_ERRORS, apply_chat_template
from pe_dpo.data.sources import find_places
from pe_dpo.data.template import refusal
from pe_dpo.errors import ModelError, UsageError
from pe_dpo.metrics.estimates import clustered_mean, right, wilson_interval
from pe_dpo.metrics.table import AnswerTable
from pe_dpo.model.base import NEEDS_CODE, needs_code
from pe_dpo.printable import counted
from pe_dpo.recipe.data_section import DataSection
from pe_dpo.recipe.schema import GenerationSection

AnswerScorer = Callable[[list[Text], list[str]], Sequence[float]]
"""Prompts (text, or messages with `role` and `content`) and as many answers → their scores."""

FUNCTION = re.compile(r"^(?P<module>.+\.py|[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)$")

PRIOR = (10.0, 2.5)
"""Standard deviations of the normal priors on ability and length in the length-controlled win rate: the scales of Gelman et al.
2008 for a logistic regression's constant and predictors. They matter only where nearly all answers win, or lose."""

CONFIDENCE = 0.95

logger = logging.getLogger(__name__)


def check_scorer(name: str, generations: Iterable[GenerationSection]) -> str:
    """Return what a scorer of this name runs, in words, after checking that it is there and will have something to judge.

    Nothing of it is run, nor imported, for that.

    Args:
        name: see `open_scorer`.
        generations: what each of the runs samples that it is to judge.

    Raises:
        UsageError: a run samples no answers, or there is no such file or module.
    """
    if not all(generation.prompts for generation in generations):
        raise UsageError(
            f"`scorer` {name}: judges sampled answers, and none are sampled; say how many prompts to ask: "
            "generation.prompts=100 (of eval and sweep: `prompts` 100)"
        )
    found = FUNCTION.match(name)
    if found is None:
        return f"the reward model {name}: its weights alone, none of its Python"
    module, function = found["module"], found["function"]
    if not module.endswith(".py"):
        root = module.partition(".")[0]
        if importlib.util.find_spec(root) is None:
            raise UsageError(f"`scorer` {name}: No module named {root!r}; install it, or name a file: path/to/file.py:function")
        return f"the function {function} of the module {module}, whose Python runs here"
    if not Path(module).is_file():
        raise UsageError(f"`scorer` {name}: there is no file {module}")
    return f"the function {function} of {Path(module).resolve()}, whose Python runs here"


def open_scorer(name: str, generations: Iterable[GenerationSection] = (), *, device: torch.device | str) -> AnswerScorer:
    """Return the scorer of this name, checked by `check_scorer`, after saying what it runs; a model is read at its first call.

    Args:
        name: `package.module:function`, `file.py:function`, or path or hub id of a reward model.
        generations: what each of the runs samples that it is to judge.
        device: for a reward model.

    Raises:
        UsageError: see `check_scorer`; or no such module or function, or it is not a function.
        ModelError: no such model, or not one with a single label.
    """
    logger.info(f"answers are judged by {check_scorer(name, generations)}")
    found = FUNCTION.match(name)
    if found is None:
        return _RewardModel(name, device)
    module, function = found["module"], found["function"]
    if not module.endswith(".py"):
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UsageError(f"`scorer` {name}: {error}; install it, or name a file: path/to/file.py:function") from error
    else:
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    scorer = getattr(loaded, function, None)
    if not callable(scorer):
        raise UsageError(f"`scorer` {name}: {module} has no function {function}; write one: def {function}(prompts, answers)")
    return scorer


def judge(
    name: str, scorer: AnswerScorer, answers: AnswerTable, reference: Sequence[tuple[str, int]], prompts: Mapping[str, Text]
) -> AnswerTable:
    """Return the policy's answers with what a scorer makes of them and of the reference's.

    Args:
        name: of the scorer.
        scorer: see `open_scorer`.
        answers: of the policy.
        reference: text and tokens of the reference's answers, in the same order.
        prompts: what the scorer is to see of each prompt, by its key.

    Raises:
        UsageError: the scorer does not return one finite number per answer.
    """
    asked = [prompts[key] for key in answers.prompt_key]
    texts = [text for text, _ in reference]
    return replace(
        answers,
        score=answer_scores(name, scorer, asked, list(answers.answer or ())),
        reference_answer=texts,
        reference_tokens=np.asarray([tokens for _, tokens in reference]),
        reference_score=answer_scores(name, scorer, asked, texts),
    )


def prompts_as_written(data: DataSection, only: str | None = None) -> dict[str, Text]:
    """Return each prompt as its row says it, text or messages, by its key.

    Args:
        data: where the pairs are.
        only: other pairs instead.
    """
    forgiving = data.model_copy(update={"bad_rows": "drop", "limit": None})
    places = find_places(only or data.train)
    if not only and data.eval is not None and not isinstance(data.eval, float):
        places += find_places(data.eval)
    sides: list[list[Pair]] = read_places(places, forgiving, DataReport(), is_other=True)
    sides += read_places(places, forgiving, DataReport(), side="held_out", is_other=True)
    return {prompt_key(pair.prompt): pair.prompt for pairs in sides for pair in pairs}


def win_rate(answers: AnswerTable) -> dict[str, Any]:
    """Return how often the policy's answer wins against the reference's, raw and length-controlled, with 95 % intervals.

    Intervals are clustered by prompt (Student's t); `score_difference` is the mean of score − reference_score.

    Args:
        answers: that were judged.
    """
    from scipy.stats import t

    assert answers.reference_tokens is not None, "answers were judged"
    prompts, difference = answers.prompt_key, answers.score_difference
    wins = right(difference)
    raw, count = clustered_mean(wins.tolist(), prompts), len(set(prompts))
    mean, error = raw["mean"], raw["standard_error"]
    assert mean is not None, "there are answers"
    interval = None
    if error == 0:  # all the same
        interval = list(wilson_interval(mean, count, CONFIDENCE))
    elif error is not None:
        half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
        interval = [max(0.0, mean - half), min(1.0, mean + half)]
    return {
        **raw,
        "interval": interval,
        "ties": float(np.mean(difference == 0)),
        "length_controlled": length_controlled(wins, answers.tokens - answers.reference_tokens, prompts),
        "score_difference": clustered_mean(difference.tolist(), prompts),
    }


def length_controlled(wins: np.ndarray, longer: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the win rate as it would be between answers of equal length.

        logit P(win) = ability + slope · tanh(longer / sd(longer)),      win rate at longer = 0: σ(ability)

    A logistic regression as in AlpacaEval 2, without that benchmark's term for the difficulty of each instruction (which needs
    other models' answers to the same prompts), and with length in tokens. Ties enter as half wins. It removes what goes with
    length, deserved or not: long answers that are better because they say more lose that too.

    Args:
        wins: (N,) in {0, ½, 1}.
        longer: (N,) tokens of the policy's answer minus those of the reference's.
        prompts: which prompt each belongs to.

    Returns:
        `mean`; `interval`, by the sandwich estimator clustered by prompt, on the scale of the logits; `slope`.

    Source:
        Dubois et al. 2024, "Length-controlled AlpacaEval" (arXiv 2404.04475).
    """
    from scipy.special import expit
    from scipy.stats import t

    spread = float(longer.std())
    features = np.stack([np.ones(len(wins)), np.tanh(longer / spread) if spread else np.zeros(len(wins))], axis=1)
    precision = np.diag(1 / np.square(PRIOR))
    weights = np.zeros(2)
    for _ in range(100):  # Newton on a strictly concave function
        chance = expit(features @ weights)
        bend = (features.T * (chance * (1 - chance))) @ features + precision
        step = np.linalg.solve(bend, features.T @ (wins - chance) - precision @ weights)
        weights += step * min(1.0, 5 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    sums = np.zeros((len(numbers), 2))
    np.add.at(sums, [numbers[prompt] for prompt in prompts], features * (wins - expit(features @ weights))[:, None])
    found: dict[str, Any] = {"mean": float(expit(weights[0])), "interval": None, "slope": float(weights[1])}
    if len(numbers) > 1:
        inverse = np.linalg.inv(bend)
        variance = len(numbers) / (len(numbers) - 1) * inverse @ (sums.T @ sums) @ inverse
        half = t.ppf((1 + CONFIDENCE) / 2, len(numbers) - 1) * math.sqrt(variance[0, 0])
        found["interval"] = [float(expit(weights[0] - half)), float(expit(weights[0] + half))]
    return found


def answer_scores(name: str, scorer: AnswerScorer, prompts: list[Text], answers: list[str]) -> np.ndarray:
    """Return what a scorer makes of answers.

    Raises:
        UsageError: it does not return one finite number per answer.
    """
    returned = scorer(prompts, answers)
    try:
        scores = [float(score) for score in returned]
    except (TypeError, ValueError) as error:
        raise UsageError(f"`scorer` {name}: {error}; it must return one number for each answer") from error
    if len(scores) != len(answers):
        found = f"{counted(len(scores), 'score')} for {counted(len(answers), 'answer')}"
        raise UsageError(f"`scorer` {name}: {found}; it must return one for each")
    bad = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
    if bad is not None:
        raise UsageError(f"`scorer` {name}: the score of answer {bad + 1} is {scores[bad]}, not a finite number")
    return np.asarray(scores)


class _RewardModel:
    """A scorer whose scores are the logits of a model for sequence classification with one label; read at the first call.

    Raises:
        ModelError: no such model, or it has not one label.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = f"neither module:function, file.py:function nor a model: {str(error).splitlines()[0]}"
            raise ModelError(f"`scorer` {name}: {NEEDS_CODE if needs_code(error) else reason}") from error
        if config.num_labels != 1:
            raise ModelError(f"`scorer` {name}: has {config.num_labels} labels; a reward model has one")
        self.name, self.device = name, device
        self.model: Any = None
        self.tokenizer: Any = None

    def __call__(self, prompts: list[Text], answers: list[str]) -> list[float]:
        if self.model is None:
            self._load()
        return [self._score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _load(self) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                self.name, dtype="auto", output_loading_info=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            reason = f"does not load as a reward model: {str(error).splitlines()[0]}"
            raise ModelError(f"`scorer` {self.name}: {NEEDS_CODE if needs_code(error) else reason}") from error
        if loading["missing_keys"]:
            raise ModelError(
                f"`scorer` {self.name}: {', '.join(sorted(loading['missing_keys']))} is not in its files, so its scores would "
                "be random; name a reward model"
            )
        self.model = model.to(self.device).eval()

    @torch.no_grad()
    def _score(self, prompt: Text, answer: str) -> float:
        """One answer at a time: what padding does to a classifier's last token differs from model to model."""
        if self.tokenizer.chat_template:
            turns = [*as_messages(prompt), {"role": "assistant", "content": answer}]
            try:
                text = apply_chat_template(self.tokenizer, turns)
            except TEMPLATE_ERRORS as error:
                raise ModelError(f"`scorer` {self.name}: a dialogue {refusal(error)}") from error
            inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            question = prompt if isinstance(prompt, str) else "\n\n".join(str(turn["content"]) for turn in prompt)
            inputs = self.tokenizer(question, answer, return_tensors="pt")
        return float(self.model(**inputs.to(self.model.device)).logits[0, 0])

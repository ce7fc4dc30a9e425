"""Runs that are finished, judged afterwards: what was sampled at their ends, snapshots and scales, against π0's own answers.

    answers of all states ─ grouped by what was asked ─ π0 answers each group once, with the same noise ─ written beside them
                                                                                                    └─ the scorer, run by run

π0's answers are looked up where another run has them, else drawn from one base for all, and are on the disk before the scorer
is asked: what it fails of costs nobody an answer, and a second call goes on with what is there.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pe_dpo.data.pairs import Text
from pe_dpo.errors import PeDpoError, UsageError, describe_error
from pe_dpo.evaluation.evaluate import held_out_pairs
from pe_dpo.evaluation.judge import answer_scores, open_scorer, prompts_as_written, win_rate
from pe_dpo.inference.drift import Questions
from pe_dpo.inference.policy import Policy, SavedPolicy, default_device, load_policy
from pe_dpo.inference.sampling import answer_text
from pe_dpo.inference.scorer import TOKENS, choose_scorer
from pe_dpo.log import quiet
from pe_dpo.metrics.table import AnswerTable, Floats, Texts
from pe_dpo.model.fingerprint import base_fingerprint
from pe_dpo.progress import progress
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.schema import GenerationSection
from pe_dpo.runs.files import ANSWERS_FILE
from pe_dpo.runs.run import Measurements, Run
from pe_dpo.runs.writing import save_evaluation

logger = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What π0 is asked; states that ask the same share its answers."""

    base: str
    """The hash of the base, or the run's folder where it is not known."""
    over: str | None
    """The hash of the adapter that π0 has."""
    prompts: tuple[tuple[str, int], ...]
    """Key and number of each answer."""
    limit: int
    seed: int


class Judge:
    """A scorer, and the runs that it has judged.

    Args:
        name: Of the scorer; what it runs is said, then it is opened, see `judge.open_scorer`.
        recipes: Of the runs.

    Raises:
        UsageError, ModelError: see `judge.open_scorer`.
    """

    def __init__(self, name: str, recipes: Sequence[Recipe]) -> None:
        self.name = name
        self._scorer = open_scorer(name, [recipe.generation for recipe in recipes], device=default_device())
        self._prompts: dict[str, dict[str, Text]] = {}
        self._scores: dict[tuple[tuple[str, ...], tuple[str, ...]], Floats] = {}
        """Of π0's answers, by the keys of their prompts and their texts."""

    def judge(self, runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
        """Yield each run with why it could not be judged; empty where all that was sampled of it is judged now.

        A state that this scorer has judged already is left as it is.
        """
        waiting = {run.folder: [state for state in _states(run) if not self._has_judged(state)] for run in runs}
        faults = _give_reference_answers(runs, waiting)
        for run in runs:
            why = faults.get(run.folder, "")
            try:
                for state in () if why else waiting[run.folder]:
                    with progress("judging answers"):
                        self._judge_state(run, state)
            except PeDpoError as error:  # a scorer's fault, or prompts that are not there any more; the others go on
                why = describe_error(error)
                logger.debug("why a run could not be judged", exc_info=True)
            yield run, why

    def _has_judged(self, state: Measurements) -> bool:
        found = (state.generation or {}).get("win_rate")
        return isinstance(found, dict) and found.get("scorer") == self.name

    def _judge_state(self, run: Run, state: Measurements) -> None:
        table, data = _answers(state), run.recipe.data
        assert table.reference_answer is not None, "they were given to it"
        if (key := data.model_dump_json()) not in self._prompts:
            self._prompts[key] = prompts_as_written(data)
        if not self._prompts[key].keys() >= set(table.prompt_key):
            raise UsageError("its answers were sampled to prompts that its data do not have any more; restore the data")
        prompts = [self._prompts[key][prompt] for prompt in table.prompt_key]
        known = tuple(table.prompt_key), tuple(table.reference_answer)  # π0 may have drawn other answers on another machine
        if known not in self._scores:
            self._scores[known] = self._score(prompts, list(table.reference_answer))
        scores = self._score(prompts, list(table.answer or ()))
        table = replace(table, score=scores, reference_score=self._scores[known])
        table.save(state.folder / ANSWERS_FILE)
        measured = state.evaluation
        judged = {**measured["generation"], "win_rate": {"scorer": self.name, **win_rate(table)}}
        save_evaluation(state.folder, measured["pairs"], measured["intervals"], judged)

    def _score(self, prompts: list[Text], answers: list[str]) -> Floats:
        """Return what the scorer makes of answers.

        Raises:
            UsageError: it raises an error of its own, or does not return one finite number per answer.
        """
        try:
            return answer_scores(self.name, self._scorer, prompts, answers)
        except PeDpoError:
            raise
        except Exception as error:  # anybody's code
            raise UsageError(f"`scorer` {self.name}: {describe_error(error)}") from error


def _states(run: Run) -> list[Measurements]:
    """Return all that was measured of a run with answers: its end, snapshots, its end at other scales, its best."""
    every = [run, *run.snapshots, *run.scaled, *([run.best] if run.best else [])]
    return [state for state in every if state.generation]


def _answers(state: Measurements) -> AnswerTable:
    """Return the answers of a state with numbers of the kinds that they were written in."""
    table = state.answers()
    assert table is not None, "the state has answers"
    whole = {name: getattr(table, name).astype(np.int64) for name in ("sample", "tokens")}
    if table.reference_tokens is not None:
        whole["reference_tokens"] = table.reference_tokens.astype(np.int64)
    return replace(table, ended=table.ended.astype(bool), **whole)


def _asked(run: Run, state: Measurements, table: AnswerTable) -> Asked:
    hashes, adapter, said = run.info.hashes, run.recipe.adapter, state.evaluation["generation"]
    over = hashes.over if adapter.over else hashes.start if adapter.of_reference else None
    prompts = tuple(zip(table.prompt_key, (int(number) for number in table.sample), strict=True))
    return Asked(hashes.base or str(run.folder), over, prompts, int(said["max_new_tokens"]), int(said.get("seed", 0)))


def _give_reference_answers(runs: Sequence[Run], waiting: dict[Path, list[Measurements]]) -> dict[Path, str]:
    """Write π0's answers beside those of every state that waits for them; return by folder why some have none."""
    known: dict[Asked, tuple[Texts, NDArray[Any]]] = {}
    lacking: defaultdict[Asked, list[tuple[Run, Measurements]]] = defaultdict(list)
    for run in runs:
        its = {state.folder for state in waiting[run.folder]}
        for state in _states(run):
            table = _answers(state)
            asked = _asked(run, state, table)
            if table.reference_answer is not None and table.reference_tokens is not None:
                known.setdefault(asked, (table.reference_answer, table.reference_tokens))
            elif state.folder in its:
                lacking[asked].append((run, state))
    faults: dict[Path, str] = {}
    policies: dict[tuple[str, str | None], tuple[Policy, Any]] = {}
    for asked, states in lacking.items():
        try:
            if asked not in known:
                if (asked.base, asked.over) not in policies:
                    policies.clear()  # one base in memory at a time
                    policies[asked.base, asked.over] = _load(states[0][0])
                known[asked] = _draw(*policies[asked.base, asked.over], asked)
        except PeDpoError as error:  # a base that is not there any more, say; other runs may have another
            faults |= {run.folder: describe_error(error) for run, _ in states}
            continue
        texts, tokens = known[asked]
        for _, state in states:
            replace(_answers(state), reference_answer=texts, reference_tokens=tokens).save(state.folder / ANSWERS_FILE)
    return faults


def _load(run: Run) -> tuple[Policy, Any]:
    """Return the policy of a run, with its π0 inside, and its held-out pairs."""
    saved = SavedPolicy(run.folder)
    tokenizer, info = saved.tokenizer(), saved.inspect()
    assert saved.recipe is not None, "it is a run"
    with quiet():  # the run has said it
        pairs = held_out_pairs(saved, saved.recipe, tokenizer, info.context_length, None)
    policy = load_policy(saved, info=info, tokenizer=tokenizer)
    saved.check_base(info, base_fingerprint(policy.model))
    return policy, pairs


def _draw(policy: Policy, pairs: Any, asked: Asked) -> tuple[Texts, NDArray[Any]]:
    """Return what π0 answers, and the tokens of each.

    Raises:
        UsageError: the prompts are not those of these pairs.
    """
    samples = 1 + max(number for _, number in asked.prompts)
    settings = GenerationSection(prompts=len(asked.prompts) // samples, samples=samples, max_new_tokens=asked.limit)
    questions = Questions(pairs, settings, seed=asked.seed)
    if tuple(zip(questions.keys, questions.numbers, strict=True)) != asked.prompts:
        raise UsageError("its answers were sampled to other prompts than it holds out now; sample them again with pe-dpo eval")
    scorer = choose_scorer(policy.model, pairs, packing=False, token_budget=TOKENS)
    with progress("sampling, reference"), policy.reference():
        said = scorer.within_memory(questions.pairs, lambda: questions.answers(policy, token_budget=scorer.token_budget))
    return [answer_text(policy.tokenizer, answer.ids) for answer in said], np.asarray([len(answer.ids) for answer in said])

"""Runs that are judged afterwards: whose answers of π0 they take, which scores are shared, and whose fault a failure is."""

from dataclasses import replace

import fake_runs
import pytest

from pe_dpo.evaluation import judged_runs
from pe_dpo.evaluation.judged_runs import Judge
from pe_dpo.runs.run import Run

ANSWERS = "generations.parquet"


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A run that has answers of π0 and one that has none, of four prompts each, and a file of scorers."""
    world = fake_runs.make_world(4, 4)
    runs = [
        Run(fake_runs.write_run(tmp_path / name, {}, world, seed=seed, snapshots=0, samples=1, steps=1, scored=name == "old"))
        for seed, name in enumerate(("old", "new"))
    ]
    prompts = {fake_runs.prompt_key(index): fake_runs.prompt_text(index) for index in range(4)}
    monkeypatch.setattr(judged_runs, "prompts_as_written", lambda data: prompts)
    (tmp_path / "judges.py").write_text(
        "def length(prompts, answers):\n    return [len(answer) for answer in answers]\n"
        "def fails(prompts, answers):\n    raise RuntimeError('out of credits')\n"
        "def short(prompts, answers):\n    return [1.0]\n"
    )
    return runs, lambda name: Judge(f"{tmp_path / 'judges.py'}:{name}", [fake_runs.make_recipe({"generation.prompts": 4})])


def test_answers_of_the_reference_are_taken_from_a_run_that_has_them(two, monkeypatch):
    runs, judge = two
    monkeypatch.setattr(judged_runs, "_draw", lambda *given: pytest.fail("it was asked again"))
    assert [why for _, why in judge("length").judge(runs)] == ["", ""]
    old, new = (run.answers() for run in runs)
    assert new.reference_answer == old.reference_answer == ["plain"] * 4
    assert new.reference_tokens.tolist() == old.reference_tokens.tolist()
    assert new.reference_score.tolist() == [5] * 4


def test_other_answers_of_the_reference_have_scores_of_their_own(two):
    """As drawn on another machine, to the same prompts with the same seed."""
    (old, new), judge = two
    others = replace(judged_runs._answers(old), reference_answer=["a", "bb", "ccc", "dddd"])
    replace(others, score=None, reference_score=None).save(new.folder / ANSWERS)
    assert [why for _, why in judge("length").judge([old, new])] == ["", ""]
    assert [run.answers().reference_score.tolist() for run in (old, new)] == [[5] * 4, [1, 2, 3, 4]]


@pytest.mark.parametrize(("name", "fault"), [
    ("fails", "RuntimeError: out of credits"),
    ("short", "1 score for 4 answers; it must return one for each"),
])  # fmt: skip
def test_what_a_scorer_fails_of_is_each_run_s_own_and_named_once(two, name, fault):
    runs, judge = two
    found = judge(name)
    assert [why for _, why in found.judge(runs)] == [f"`scorer` {found.name}: {fault}"] * 2


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_scorer(two, monkeypatch):
    runs, judge = two
    monkeypatch.setattr(judged_runs, "win_rate", lambda table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(judge("length").judge(runs))


def test_prompts_that_the_data_do_not_have_any_more_are_the_run_s_fault(two, monkeypatch):
    runs, judge = two
    monkeypatch.setattr(judged_runs, "prompts_as_written", lambda data: {})
    assert all("prompts that its data do not have any more" in why for _, why in judge("length").judge(runs))

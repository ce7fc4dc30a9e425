"""What an evaluation compares with: the policy before training where that is known, else the reference by its name."""

from dataclasses import replace
from types import SimpleNamespace

import fake_runs
import pytest
import torch

from pe_dpo.evaluation.evaluate import _Measuring
from pe_dpo.objective import PairLogprobs

PAIRS = [SimpleNamespace(where=f"rows:{row}", prompt_key=f"{row}", margin=0.0, beta=None, weight=None) for row in range(2)]
STARTS = {"adapter.start": "sft", "adapter.reference": "base"}


def logprobs(*chosen):
    """Pairs whose rejected answers have -2 nats, all answers of one token."""
    ones = torch.ones(len(chosen), dtype=torch.int64)
    sides = torch.tensor(chosen, dtype=torch.float64), torch.full((len(chosen),), -2.0, dtype=torch.float64)
    return PairLogprobs(*sides, ones, ones)


def evaluated(setting, initial=None, kind="run"):
    """Two pairs: the reference ranks neither right, the policy at step 0 the first, the policy now both."""
    recipe = fake_runs.make_recipe(setting)
    saved = SimpleNamespace(kind=kind, recipe=recipe if kind == "run" else None)
    work = _Measuring(saved, recipe, PAIRS, None, None, is_judged=False)
    work.measured, work.reference = {1.0: (logprobs(-1.0, -1.0), None)}, logprobs(-3.0, -3.0)
    return work.evaluation(1.0, initial)


def with_start(table):
    first = logprobs(-1.0, -3.0)
    return replace(table, initial_chosen=first.chosen.numpy(), initial_rejected=first.rejected.numpy())


@pytest.mark.parametrize(("setting", "initial", "kind", "before_of", "right"), [
    (STARTS, SimpleNamespace(with_initial=with_start), "run", "start", 0.5),
    (STARTS, SimpleNamespace(with_initial=lambda table: None), "run", "reference", 0.0),
    (STARTS, None, "run", "reference", 0.0),  # on other pairs
    ({}, None, "run", "start", 0.0),
    ({}, None, "adapter", "reference", 0.0),
])  # fmt: skip
def test_what_was_before_is_the_policy_at_step_0_or_named_as_the_reference(setting, initial, kind, before_of, right):
    found = evaluated(setting, initial, kind)
    assert (found.before_of, found.before["accuracy/policy"], found.metrics["accuracy/policy"]) == (before_of, right, 1.0)

"""A metric apart by what a model ranks right and wrong, of hand-made pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fake_runs
import numpy as np
import pyarrow.parquet
import pytest

from pe_dpo.errors import UsageError
from pe_dpo.experiments.comparison import Method
from pe_dpo.experiments.resampled import Resampled, settings_of
from pe_dpo.experiments.sides import SidePoint, compare_sides, find_sides
from pe_dpo.metrics.catalogue import METRICS
from pe_dpo.metrics.sides import By
from pe_dpo.metrics.table import PairTable
from pe_dpo.runs.observations import Observation

PROMPTS = 10
METHOD = Method(repeats=100)


def run(settings: Mapping[str, Any], policy: Sequence[float], reference: Sequence[float], seed: int = 0) -> Observation:
    """A run whose pairs, one a prompt, have these Δ of policy and reference."""
    columns = dict.fromkeys(PairTable.column_names()[2:13], np.zeros(len(policy)))
    keys = [str(row) for row in range(len(policy))]
    deltas = {"policy_chosen": np.array(policy), "reference_chosen": np.array(reference)}
    pairs = PairTable(prompt_key=keys, where=keys, **{**columns, **deltas})
    return Observation(dict(settings), seed, 1, True, "run", pairs, None, {}, 1.0)


def sides(runs: Sequence[Observation], by: By) -> list[SidePoint]:
    return find_sides(runs, settings_of(runs), METRICS["accuracy/shift"], by, per_token=False, method=METHOD)


def test_a_side_of_one_prompt_is_none_and_leaves_the_others_as_they_are() -> None:
    """Each of ten runs has another pair wrong; no replicate draws all ten prompts, and each some that the base has wrong."""
    reference = np.array([1.0, -1.0] * 5)
    runs = [run({}, reference, reference - 0.1 * reference)]
    for wrong in range(PROMPTS):
        policy = np.ones(PROMPTS)
        policy[wrong] = -1
        runs.append(run({"mixout.p": wrong / 10}, policy, reference))
    base, *others = sides(runs, "policy")
    assert base.wrong is not None and base.right is not None
    assert np.isfinite([base.wrong.low, base.wrong.high, base.right.low, base.right.high]).all()
    assert [(one.wrong, one.gap, one.gap_direct) for one in others] == [(None, None, None)] * PROMPTS
    assert all(one.right is not None and np.isfinite(one.right.low) for one in others)


def test_a_setting_of_one_seed_has_no_interval_beside_others_of_several() -> None:
    reference = np.array([1.0, -1.0, 2.0, -2.0, 3.0, -3.0])
    runs = [run({}, reference * scale, reference, seed) for seed, scale in enumerate((1.5, 0.5))]
    runs += [run({"mixout.p": 0.3}, reference + shift, reference, seed) for seed, shift in enumerate((0.5, -0.5))]
    runs.append(run({"mixout.p": 0.5}, 2 * reference, reference))
    base, _, lone = sides(runs, "reference")
    assert base.gap is not None and lone.gap is not None and lone.gap_direct is not None
    assert np.isfinite(base.gap.low)
    assert np.isnan([lone.gap.low, lone.gap.p, lone.gap_direct.p_adjusted]).all()
    assert lone.gap.estimate == -1  # π0's right pairs moved toward chosen, its wrong ones away


def test_the_ranking_of_a_policy_needs_no_reference(tmp_path: Path) -> None:
    folder = fake_runs.write_run(tmp_path / "run", {}, fake_runs.make_world(30, 20), samples=0, snapshots=0, steps=1)
    table = pyarrow.parquet.read_table(folder / "eval_pairs.parquet")
    for name in ("reference_chosen", "reference_rejected", "initial_chosen", "initial_rejected"):
        table = table.set_column(table.column_names.index(name), name, pyarrow.array(np.full(30, np.nan)))
    pyarrow.parquet.write_table(table, folder / "eval_pairs.parquet")
    (point,) = compare_sides([folder], by="policy", metric="nll/chosen_per_token", repeats=100).points
    assert point.right is not None and point.wrong is not None and sum(point.pairs.values()) == 30
    with pytest.raises(UsageError, match="no run has held-out pairs one by one with nll/chosen_per_token"):
        compare_sides([folder], by="reference", metric="nll/chosen_per_token", repeats=100)


def test_the_reference_is_that_of_any_run_which_measured_it() -> None:
    """The first run, trained with γ = 0, did not; 3 of 5 pairs are right at KL 0."""
    reference = [1.0, 1.0, 1.0, -1.0, -1.0]
    runs = [run({"loss.gamma": "0x"}, reference, [np.nan] * 5), run({}, reference, reference)]
    assert Resampled(runs, METRICS["accuracy/policy"], repeats=100, seed=0).reference == 0.6

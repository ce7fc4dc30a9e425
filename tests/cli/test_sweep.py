"""`pe-dpo sweep`: what it prints for people and for programs."""

import json

import pytest

from pe_dpo.experiments.contrasts import contrasts_hash
from pe_dpo.experiments.plan import make_plan, save_plan


@pytest.mark.slow
def test_json_is_all_that_is_printed(pe_dpo, recipe_file, tmp_path):
    """Also when nothing is left to do, and for a plan."""
    command = ("sweep", recipe_file, "--grid", "beta=0.1,0.2", "-o", tmp_path / "sweep", "--prompts", 0, "--json")
    planned = json.loads(pe_dpo(*command, "--plan").out)["points"]
    assert [point["folder"] for point in planned] == ["runs/base/seed-0", "runs/beta=0.2/seed-0"]
    assert not (tmp_path / "sweep").exists()
    for _ in range(2):
        done = pe_dpo(*command)
        states = json.loads(done.out)
        assert (done.code, [state["point"] for state in states]) == (0, planned)
        assert [state["status"] for state in states] == ["finished"] * 2


FAILS = ("--set", "train.weight_decay=1e9", "--set", "train.learning_rate=10")
"""Adapters a ten thousand million times as large at each step."""


def test_json_says_why_a_run_failed(pe_dpo, recipe_file, tmp_path):
    command = ("sweep", recipe_file, "-o", tmp_path / "sweep", "--prompts", 0, "--json", *FAILS)
    done = pe_dpo(*command)
    (state,) = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (done.code, state["status"]) == (1, "failed")
    assert state.keys() == {"point", "status", "seconds", "metrics", "why"}
    assert state["why"]


def test_where_all_runs_failed_no_comparison_is_advised(pe_dpo, recipe_file, tmp_path):
    done = pe_dpo("sweep", recipe_file, "-o", tmp_path / "sweep", "--prompts", 0, *FAILS)
    assert done.code == 1
    assert "failed: runs/base/seed-0: " in done.out
    assert "1 of 1 runs failed; the same command again tries them once more" in done.out
    assert "pe-dpo compare" not in done.out


@pytest.mark.slow
def test_a_plan_shows_its_contrasts_and_what_it_will_find(pe_dpo, recipe_file, tmp_path):
    """On a screen of 80 columns; a contrast without points is an error before anything is run."""
    command = ("sweep", recipe_file, "--grid", "beta=0.1,0.2", "--also", "mixout=0.3", "-o", tmp_path / "sweep", "--plan")
    done = pe_dpo(*command, "--seeds", 3, "--contrast", "mixout against beta within 2")
    assert done.code == 0
    assert "mixout against beta within 2" in done.out
    assert "SHA-256 of the contrasts: " in done.out
    lines = done.out.splitlines()
    row = next(line for line in lines if line.startswith("│ 300"))
    assert row.replace("│", "").split() == ["300", "7.0", "7.0", "5.0"]
    earlier = {"folder": tmp_path / "sweep", "overrides": ["generation.prompts=64"], "contrasts": ["beta=0.2 against base"]}
    save_plan(make_plan(recipe_file, [["beta=0.1,0.2"]], **earlier))
    saved = pe_dpo(*command, "--contrast", "mixout against beta")
    both = ["beta=0.2 against base", "mixout against beta"]
    assert f"SHA-256 of the contrasts: {contrasts_hash(dict.fromkeys(both, 0))}" in saved.out
    assert "3 runs in " in saved.out
    missing = pe_dpo(*command, "--contrast", "dropout=0.5 against beta")
    assert missing.code != 0
    assert "the plan has no point of adapter.dropout=0.5" in missing.err


def test_a_plan_as_json_holds_what_it_says_in_words(pe_dpo, recipe_file, tmp_path):
    grids = ("--grid", "beta=0.1,0.2", "--also", "mixout=0.3")
    command = ("sweep", recipe_file, *grids, "-o", tmp_path / "sweep", "--plan", "--json")
    plan = json.loads(pe_dpo(*command, "--seeds", 3, "--contrast", "mixout against beta").out)
    assert plan.keys() == {"points", "contrasts", "contrasts_sha256", "design"}
    assert plan["contrasts"] == {"mixout against beta": 0} and len(plan["contrasts_sha256"]) == 64
    design = plan["design"]
    assert (design["seeds"], design["comparisons"], design["unit"]) == (3, 1, "pair") and "of the pairs" in design["assumed"]
    (one,) = (size for size in design["sizes"] if size["pairs"] == 300)
    assert [round(one[key], 3) for key in ("alone", "in_verdict", "with_two_more")] == [0.07, 0.07, 0.05]
    alone = json.loads(pe_dpo(*command).out)
    assert [size["alone"] for size in alone["design"]["sizes"]] == [None] * 3  # one seed tells nothing of seeds


def test_variances_are_assumed_by_a_plan_alone(pe_dpo, recipe_file, tmp_path):
    done = pe_dpo("sweep", recipe_file, "-o", tmp_path / "sweep", "--like", tmp_path / "other")
    assert done.code == 2
    assert f"--like {tmp_path / 'other'}: is whose variances --plan assumes; give --plan too" in done.err
    assert not (tmp_path / "sweep").exists()

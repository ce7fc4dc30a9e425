"""`pe-dpo compare`: the verdict first, every run shown, and the same as JSON."""

import json
import re
from pathlib import Path

import fake_runs
import pytest

from pe_dpo.metrics.catalogue import METRICS


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = [*fake_runs.GRID[:3], {"loss.gamma": "0x"}, {"mixout.p": 0.9}]
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    return fake_runs.write_sweep(folder, settings, pairs=40, prompts=30, snapshots=1, steps=4, seeds=(0, 1))


@pytest.mark.slow
def test_the_verdict_comes_first_and_all_runs_after(pe_dpo, sweep):
    done = pe_dpo("compare", sweep, "--metric", "accuracy/shift", "--repeats", 500)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith("At equal KL, ")
    assert "mixout 0.9: out of range of β for 2 of 2 seeds; nothing is extrapolated" in done.out
    assert "on the line" in done.out
    table = done.out[done.out.index("20 measured policies") :]
    assert sum(bool(re.search(r"│ +[01] │", line)) for line in table.splitlines()) == 20  # a line for each, with its seed
    assert "smallest difference that the verdict finds among 2 comparisons (Holm) with 80 % power, of 2 seeds: " in done.out
    assert "; one comparison by itself: " in done.out
    assert re.search(r"\nno point is best on 'moved toward chosen': .* and .* are tied at 0\.663, of 5 points\n", done.out)


@pytest.mark.slow
def test_json_has_everything(pe_dpo, sweep):
    done = pe_dpo("compare", sweep, "--json", "--repeats", 500)
    found = json.loads(done.out)
    assert found["metric"] == "win_rate"
    assert len(found["runs"]) == 20
    mixout = next(arm for arm in found["arms"] if arm["name"] == "mixout 0.9")
    assert mixout["seeds_in_range"] == 2 and mixout["gap"] is not None  # the line of win rates begins at ½, at the reference
    assert found["verdict"] in pe_dpo("compare", sweep, "--repeats", 500).out.replace("\n", " ").replace("  ", " ")


def test_single_runs_are_compared_too(pe_dpo, sweep):
    runs = [sweep / "runs" / name / "seed-0" for name in ("base", "gamma=0x")]
    done = pe_dpo("compare", *runs, "--metric", "accuracy/policy", "--repeats", 500)
    assert done.code == 0
    assert "minus the base recipe, each at its own KL" in done.out
    apart = pe_dpo("compare", *runs, "--by", "reference", "--repeats", 100).out
    assert "moved toward chosen where π0 ranks right and where wrong (by summed log-probs),\nin points with 95 %" in apart
    assert "wrong − right" in apart and "minus base's" not in apart
    assert "warning: one seed" in done.out
    tables = "".join(line for line in done.out.splitlines(keepends=True) if line[:1] in "┃│")
    assert "accuracy," in tables and [key for key in METRICS if "/" in key and key in tables] == []  # people read titles


def test_all_of_it_fits_a_terminal_of_80_columns(pe_dpo, sweep):
    runs = [sweep / "runs" / name / "seed-0" for name in ("base", "gamma=0x")]
    done = pe_dpo("compare", *runs, "--repeats", 100, columns=80, is_screen=True)
    lines = done.out.strip().splitlines()
    assert done.code == 0 and max(map(len, lines)) <= 80
    assert lines[0].startswith("Each at its own KL") and not lines[0].endswith(".")


def test_what_cannot_be_compared_is_said_in_one_message(pe_dpo, sweep, tmp_path):
    done = pe_dpo("compare", sweep, tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {tmp_path}: is neither a run")
    assert pe_dpo("compare").code == 2
    assert "--metric luck: is not one of" in pe_dpo("compare", sweep, "--metric", "luck").err


@pytest.mark.slow
def test_a_real_sweep_is_compared(pe_dpo, recipe_file, tmp_path):
    """What `sweep` writes is what `compare` reads: two β, γ = 0, two seeds, answers and a snapshot."""
    folder = tmp_path / "sweep"
    sampled = ("--set", "generation.prompts=9", "--set", "generation.max_new_tokens=8", "--set", "generation.snapshots=1")
    made = pe_dpo("sweep", recipe_file, "--grid", "beta=0.1,0.5", "--also", "gamma=0", "--seeds", 2, *sampled, "-o", folder)
    assert made.code == 0, made.err
    done = pe_dpo("compare", folder, "--metric", "nll/chosen_per_token", "--json", "--repeats", 200)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {arm["name"] for arm in found["arms"]} == {"the base recipe", "β = 0.5", "γ = 0", "early stopping at step 1"}
    assert len(found["runs"]) == 3 * 2 * 2
    for run in found["runs"]:
        if run["is_final"]:
            after = json.loads((Path(run["run"]) / "run.json").read_text(encoding="utf-8"))["after"]
            evaluation = json.loads((Path(run["run"]) / "evaluation.json").read_text(encoding="utf-8"))
            assert run["metrics"]["accuracy/policy"] == pytest.approx(after["accuracy/policy"])
            assert run["metrics"]["nll/chosen_per_token"] == pytest.approx(after["nll/chosen_per_token"])
            assert run["kl"] == pytest.approx(evaluation["generation"]["kl"]["mean"])
            assert run["metrics"]["entropy_per_token"] == pytest.approx(evaluation["generation"]["entropy_per_token"]["mean"])

"""Adapters scaled toward the reference as arms: read beside their runs, compared like others, never the best."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import fake_runs
import numpy as np
import pytest

from pe_dpo.errors import UsageError
from pe_dpo.experiments.compare import compare
from pe_dpo.experiments.comparison import Comparison
from pe_dpo.experiments.summary import setting_name
from pe_dpo.runs.files import scaled_folder
from pe_dpo.runs.observations import read_observations

SCALES = (0.5, 0.75)
FILES = ("eval_pairs.parquet", "generations.parquet", "evaluation.json")
GRID: tuple[dict[str, Any], ...] = ({}, {"loss.beta": 0.025}, {"loss.beta": 0.4}, {"loss.gamma": "0x"}, {"mixout.p": 0.5})


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    return fake_runs.write_sweep(
        folder, GRID, pairs=150, prompts=100, steps=6, snapshots=1, scales=SCALES, seeds=(0, 1), quality={"gamma=0x": 1.5}
    )


@pytest.fixture(scope="module")
def found(sweep: Path) -> Comparison:
    return compare([sweep], metric="accuracy/shift", repeats=500)


def arm(found: Comparison, name: str) -> Any:
    return next(one for one in found.arms if one.name == name)


def evaluation(sweep: Path, name: str, seed: int, scale: float | None = None) -> dict[str, Any]:
    run = sweep / "runs" / name / f"seed-{seed}"
    place = run if scale is None else scaled_folder(run, scale)
    content: dict[str, Any] = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
    return content


def root_of(content: dict[str, Any]) -> float:
    return math.sqrt(content["generation"]["kl"]["mean"])


@pytest.mark.slow
def test_a_run_gives_its_end_its_snapshots_and_its_scales(sweep: Path) -> None:
    run = sweep / "runs" / "base" / "seed-0"
    found = read_observations([run])[0]
    assert [(one.step, one.is_final, one.scale) for one in found] == [
        (6, True, None), (3, False, None), (6, False, 0.5), (6, False, 0.75)]  # fmt: skip
    assert {one.settings == {} and one.run == str(run) for one in found} == {True}


def test_names_say_what_was_scaled() -> None:
    """In lists, too, no comma may stand inside of a name."""
    assert setting_name({"scale": 0.5}) == "the base recipe (scaled to 0.5)"
    assert setting_name({"loss.gamma": "0x", "mixout.p": 0.3, "scale": 0.75}) == "γ = 0 with mixout 0.3 (scaled to 0.75)"
    assert setting_name({"loss.rejected_weight": 0.95}) == "λ = 0.95"


@pytest.mark.slow
def test_every_point_has_its_scaled_arms_after_those_that_were_trained(found: Comparison) -> None:
    trained = ["the base recipe", "early stopping at step 3", "β = 0.025", "β = 0.4", "γ = 0", "mixout 0.5"]
    names = [name for name in trained if not name.startswith("early")]
    assert [one.name for one in found.arms] == [*trained, *(f"{name} (scaled to {a:g})" for name in names for a in SCALES)]
    assert len(found.runs) == 2 * 5 * (1 + 1 + 2)
    one = next(run for run in found.runs if run.name == "γ = 0 (scaled to 0.5)" and run.seed == 1)
    assert (one.step, one.is_final, one.scale, one.settings) == (6, False, 0.5, {"loss.gamma": "0x"})


def test_a_scaled_arm_is_held_against_the_line_at_its_own_kl(sweep: Path, found: Comparison) -> None:
    """From the numbers in the files: γ = 0 at three quarters against the β runs of its seed."""
    for seed in (0, 1):
        line = [evaluation(sweep, name, seed) for name in ("beta=0.4", "base", "beta=0.025")]
        mine = evaluation(sweep, "gamma=0x", seed, 0.75)
        there = np.interp(root_of(mine), [root_of(one) for one in line], [one["pairs"]["accuracy/shift"] for one in line])
        expected = mine["pairs"]["accuracy/shift"] - there
        assert arm(found, "γ = 0 (scaled to 0.75)").matched.per_seed[seed] == pytest.approx(expected, abs=1e-12)


def test_the_base_points_adapter_can_make_the_line(sweep: Path) -> None:
    found = compare([sweep], metric="accuracy/shift", baseline="scale", repeats=500)
    assert found.baseline == "scaling"
    assert [one.name for one in found.arms if one.is_baseline] == [
        "the base recipe", "the base recipe (scaled to 0.5)", "the base recipe (scaled to 0.75)"]  # fmt: skip
    assert " scaling on accuracy/shift " in found.verdict
    for seed in (0, 1):
        line = [evaluation(sweep, "base", seed, scale) for scale in (*SCALES, None)]
        mine = evaluation(sweep, "mixout=0.5", seed)
        there = np.interp(root_of(mine), [root_of(one) for one in line], [one["pairs"]["accuracy/shift"] for one in line])
        assert root_of(line[0]) < root_of(mine) < root_of(line[2])
        expected = mine["pairs"]["accuracy/shift"] - there
        assert arm(found, "mixout 0.5").matched.per_seed[seed] == pytest.approx(expected, abs=1e-12)
    outside = next(remark for remark in found.remarks if "out of range of scaling for 2 of 2 seeds" in remark)
    assert outside.startswith("β = 0.025, γ = 0, β = 0.025 (scaled to 0.75), β = 0.4 (scaled to 0.5), ")


def test_the_reference_begins_the_line_of_scales_where_the_metric_comes_near_it(sweep: Path) -> None:
    found = compare([sweep], metric="accuracy/policy", baseline="scale", repeats=200)
    small = evaluation(sweep, "mixout=0.5", 0, 0.5)
    half = evaluation(sweep, "base", 0, 0.5)
    assert root_of(small) < root_of(half)
    ends = [half["pairs"]["accuracy/reference"], half["pairs"]["accuracy/policy"]]
    expected = small["pairs"]["accuracy/policy"] - np.interp(root_of(small), [0, root_of(half)], ends)
    assert arm(found, "mixout 0.5 (scaled to 0.5)").matched.per_seed[0] == pytest.approx(expected, abs=1e-12)


def test_scaled_arms_are_no_candidates_for_the_best(sweep: Path, tmp_path: Path) -> None:
    """The end of the best run lies in the place of its scaled version, and the other way round."""
    copy = Path(shutil.copytree(sweep, tmp_path / "sweep"))
    for seed in (0, 1):
        run = copy / "runs" / "gamma=0x" / f"seed-{seed}"
        for name in FILES:
            half = scaled_folder(run, 0.5) / name
            (run / name).rename(run / "kept")
            half.rename(run / name)
            (run / "kept").rename(half)
    found = compare([copy], metric="nll/chosen_per_token", repeats=200)
    assert min(found.arms, key=lambda one: one.value).name == "γ = 0 (scaled to 0.5)"
    assert found.best is not None
    assert found.best.points == len(GRID)
    assert found.best.value == min(one.value for one in found.arms if not {"scale", "step"} & one.settings.keys())


def test_without_a_kl_the_verdict_is_about_what_was_trained(tmp_path: Path) -> None:
    sweep = fake_runs.write_sweep(
        tmp_path / "s", [{}, {"loss.gamma": "0x"}], pairs=40, prompts=30, samples=0, scales=SCALES, steps=2, snapshots=0
    )
    found = compare([sweep], metric="accuracy/shift", repeats=200)
    assert found.verdict.startswith("Each at its own KL (there is none to match), γ = 0 cannot be told apart from ")
    assert arm(found, "γ = 0 (scaled to 0.5)").direct is not None


def test_a_scaled_arm_with_the_files_of_its_run_differs_by_nothing(sweep: Path, tmp_path: Path) -> None:
    """The null: whatever is resampled, what is the same stays the same, and it lies on the line at its own place."""
    copy = Path(shutil.copytree(sweep, tmp_path / "sweep"))
    for seed in (0, 1):
        run = copy / "runs" / "base" / f"seed-{seed}"
        for name in FILES:
            shutil.copy(run / name, scaled_folder(run, 0.5) / name)
    found = arm(compare([copy], metric="accuracy/shift", repeats=500), "the base recipe (scaled to 0.5)")
    for one in (found.direct, found.direct_kl, found.matched):
        assert one.per_seed == pytest.approx([0, 0], abs=1e-12)
        assert one.estimate == pytest.approx(0, abs=1e-12)
        assert one.low <= 0 <= one.high
        assert one.p == pytest.approx(1)
    assert found.direct.standard_error == pytest.approx(0, abs=0.01)


@pytest.mark.slow
def test_a_lone_run_is_held_against_itself_scaled_where_there_are_no_snapshots(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pairs": 60, "prompts": 40, "steps": 4, "scales": SCALES}
    sweep = fake_runs.write_sweep(tmp_path / "s", [{}, {"mixout.p": 0.3}], snapshots=0, **options)
    found = compare([sweep], metric="accuracy/shift", repeats=200)
    assert found.baseline == "scaling"
    assert any("made of the base point's adapter at other scales instead" in remark for remark in found.remarks)
    early = fake_runs.write_sweep(tmp_path / "e", [{}, {"mixout.p": 0.3}], snapshots=2, **options)
    assert compare([early], metric="accuracy/shift", repeats=200).baseline == "early stopping"
    alone = compare([sweep / "runs" / "base" / "seed-0"], metric="accuracy/shift", repeats=200)
    assert alone.verdict == "There is nothing to compare: the base recipe is all that was run."


@pytest.mark.parametrize("change", ["pairs", "length"])
def test_scales_measured_otherwise_than_the_end_are_left_out_and_said(sweep: Path, tmp_path: Path, change: str) -> None:
    copy = Path(shutil.copytree(sweep / "runs" / "base" / "seed-0", tmp_path / "run"))
    place = scaled_folder(copy, 0.5)
    if change == "pairs":
        other = fake_runs.write_run(tmp_path / "other", {}, fake_runs.make_world(30, 20), snapshots=0, steps=2)
        shutil.copy(other / "eval_pairs.parquet", place)
    else:
        content = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
        content["generation"]["max_new_tokens"] = 256
        (place / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
    observations, remarks = read_observations([copy])
    assert [one.scale for one in observations] == [None, None, 0.75]
    (remark,) = remarks
    assert re.search(r"its adapter scaled to 0\.5 was measured on other pairs than .* and is left out", remark)
    assert remark.endswith(f"measure it again with: pe-dpo eval {copy} --scale 0.5")


def test_a_torn_file_of_a_scale_is_named(sweep: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sweep / "runs" / "base" / "seed-0", tmp_path / "run"))
    (scaled_folder(copy, 0.5) / "eval_pairs.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UsageError, match=r"a-0\.5/eval_pairs\.parquet: cannot be read.*pe-dpo eval \S+/run --scale 0\.5$"):
        read_observations([copy])
    (copy / "snapshots" / "step-000003" / "eval_pairs.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UsageError, match=r"a snapshot cannot be measured again: move \S+step-000003 away"):
        read_observations([copy])

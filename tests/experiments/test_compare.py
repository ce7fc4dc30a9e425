"""From folders to a verdict: numbers against evaluation.json and by hand, words as a person reads them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_runs
import numpy as np
import pytest

import pe_dpo
from pe_dpo.errors import UsageError
from pe_dpo.experiments import summary
from pe_dpo.experiments.compare import compare
from pe_dpo.experiments.comparison import Comparison
from pe_dpo.experiments.sides import compare_sides
from pe_dpo.runs.run import Run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven points, three seeds, snapshots; γ = 2β is much better than its KL, mixout much worse."""
    return fake_runs.write_sweep(
        tmp_path_factory.mktemp("sweep") / "sweep",
        pairs=300,
        prompts=200,
        steps=6,
        quality={"gamma=2x": 1.5, "mixout=0.5": -1.5},
    )


@pytest.fixture(scope="module")
def found(sweep: Path) -> Comparison:
    return compare([sweep], metric="accuracy/shift", repeats=1000)


def evaluation(sweep: Path, name: str, seed: int, where: str = ".") -> dict[str, Any]:
    path = sweep / "runs" / name / f"seed-{seed}" / where / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8"))


def arm(found: Comparison, name: str) -> Any:
    return next(one for one in found.arms if one.name == name)


@pytest.mark.slow
def test_a_difference_at_equal_kl_is_that_to_the_straight_line_between_the_runs_of_its_seed(
    sweep: Path, found: Comparison
) -> None:
    """Worked from the numbers that the runs wrote of themselves."""
    for seed in (0, 1, 2):
        line = [evaluation(sweep, name, seed) for name in ("beta=0.4", "base", "beta=0.025")]
        roots = [math.sqrt(one["generation"]["kl"]["mean"]) for one in line]
        values = [one["pairs"]["accuracy/shift"] for one in line]
        mine = evaluation(sweep, "gamma=0.5x", seed)
        expected = mine["pairs"]["accuracy/shift"] - np.interp(math.sqrt(mine["generation"]["kl"]["mean"]), roots, values)
        assert arm(found, "γ = 0.5β").matched.per_seed[seed] == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_the_reference_begins_the_line_where_the_metric_comes_near_it(sweep: Path) -> None:
    """A snapshot below the KL of every β: on accuracy/policy it is held against π0 at KL 0, on accuracy/shift it is not."""
    by_policy = compare([sweep], metric="accuracy/policy", repeats=200)
    early = evaluation(sweep, "base", 0, "snapshots/step-000002")
    nearest = evaluation(sweep, "beta=0.4", 0)
    at, end = (math.sqrt(one["generation"]["kl"]["mean"]) for one in (early, nearest))
    assert at < end
    ends = [nearest["pairs"]["accuracy/reference"], nearest["pairs"]["accuracy/policy"]]
    expected = early["pairs"]["accuracy/policy"] - np.interp(at, [0, end], ends)
    assert arm(by_policy, "early stopping at step 2").matched.per_seed[0] == pytest.approx(expected, abs=1e-12)
    assert by_policy.reference == nearest["pairs"]["accuracy/reference"]
    assert arm(by_policy, "early stopping at step 2").seeds_on_chord >= 1
    assert any(
        remark.startswith("early stopping at step 2") and "held against a straight line from the reference itself" in remark
        for remark in by_policy.remarks
    )
    by_shift = compare([sweep], metric="accuracy/shift", repeats=200)
    assert math.isnan(by_shift.reference)


@pytest.mark.slow
def test_nothing_is_extrapolated(tmp_path: Path) -> None:
    """β = 0.4 to 0.025 reach from √KL 0.57 to 1.74; mixout 0.9 at 0.2 and a learning rate fourfold at 2.0 are beyond."""
    line = [{}, {"loss.beta": 0.025}, {"loss.beta": 0.4}]
    settings = [*line, {"mixout.p": 0.9}, {"train.learning_rate": 8e-5}, {"mixout.p": 0.3}]
    sweep = fake_runs.write_sweep(tmp_path / "sweep", settings, pairs=60, prompts=40, snapshots=0, steps=3)
    found = compare([sweep], metric="accuracy/shift", repeats=200)
    for name in ("mixout 0.9", "learning rate 8e-05"):
        assert arm(found, name).matched is None
        assert (arm(found, name).seeds_in_range, arm(found, name).seeds_compared) == (0, 3)
        assert arm(found, name).direct is not None
    assert "Mixout 0.9 and learning rate 8e-05 lie outside β's KLs and cannot be matched. " in found.verdict
    assert found.verdict.startswith("At equal KL, mixout 0.3 cannot be told apart")


@pytest.mark.slow
def test_a_point_that_some_seeds_have_out_of_range_is_compared_on_the_others(tmp_path: Path) -> None:
    """Seed 2 of β = 0.025 did not get as far as γ = 0 of that seed."""
    settings = [{}, {"loss.beta": 0.025}, {"loss.beta": 0.4}, {"loss.gamma": "0x"}]
    sweep = fake_runs.write_sweep(tmp_path / "sweep", settings, pairs=60, prompts=40, snapshots=0, steps=3)
    for name in ("evaluation.json", "generations.parquet", "eval_pairs.parquet"):
        source = sweep / "runs" / "base" / "seed-2" / name
        (sweep / "runs" / "beta=0.025" / "seed-2" / name).write_bytes(source.read_bytes())
    found = compare([sweep], metric="accuracy/shift", repeats=200)
    assert (arm(found, "γ = 0").seeds_in_range, len(arm(found, "γ = 0").matched.per_seed)) == (2, 2)
    assert "γ = 0: out of range of β for 1 of 3 seeds; nothing is extrapolated" in found.remarks


@pytest.mark.slow
def test_planted_differences_are_found_and_said(found: Comparison) -> None:
    assert arm(found, "γ = 2β").matched.p_adjusted < 0.05 < arm(found, "γ = 0").matched.p_adjusted
    silent, worse, better = found.verdict.split("; ")
    arms = "early stopping at step 2, early stopping at step 4, γ = 0 and γ = 0.5β"
    assert silent.startswith(f"At equal KL, {arms} cannot be told apart from β on accuracy/shift (largest difference ")
    assert silent.endswith(" seeds, 300 pairs)")
    assert worse.startswith("mixout 0.5 is worse by ")
    assert better.startswith("γ = 2β is better by ")
    assert "2 points apart" in better


@pytest.mark.slow
def test_a_metric_is_told_apart_by_what_the_reference_ranks_right(sweep: Path) -> None:
    """Both sides, the gap and the difference of gaps are those of the runs' own tables, seed by seed."""
    found = compare_sides([sweep], metric="accuracy/shift", repeats=400, by="reference")

    def shares(name: str, seed: int) -> tuple[float, float]:
        table = Run(sweep / "runs" / name / f"seed-{seed}").pairs()
        assert table is not None
        moved, start = table.shift() > 0, table.delta("reference")
        return float(moved[start > 0].mean()), float(moved[start < 0].mean())

    base = [shares("base", seed) for seed in range(3)]
    better = next(one for one in found.points if one.name == "γ = 2β")
    ours = [shares("gamma=2x", seed) for seed in range(3)]
    assert better.right.per_seed == pytest.approx([right for right, _ in ours])
    assert better.wrong.per_seed == pytest.approx([wrong for _, wrong in ours])
    assert better.gap.per_seed == pytest.approx([wrong - right for right, wrong in ours])
    gaps = [(wrong - right) - (other - one) for (right, wrong), (one, other) in zip(ours, base, strict=True)]
    assert better.gap_direct.per_seed == pytest.approx(gaps)
    assert better.gap.low < better.gap.estimate < better.gap.high
    assert (better.seeds, found.points[0].gap_direct, found.per_token) == ([0, 1, 2], None, False)
    assert better.pairs == found.points[0].pairs and sum(better.pairs.values()) == 300
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert "errors" not in written["points"][0]["right"]


def test_the_interval_of_a_side_s_share_stays_where_a_share_can_be(tmp_path: Path) -> None:
    """Two seeds of a few pairs: Student's interval with one degree of freedom reaches beyond 0 and 1; that of a gap may."""
    sweep = fake_runs.write_sweep(
        tmp_path / "s", [{}, {"loss.gamma": 0.0}], seeds=(0, 1), pairs=16, prompts=16, steps=2, snapshots=0
    )
    found = compare_sides([sweep], metric="accuracy/shift", by="reference", repeats=100)
    ends = [(side.low, side.high) for point in found.points for side in (point.right, point.wrong) if side is not None]
    assert ends and all(0 <= low <= high <= 1 for low, high in ends)
    assert any(end == (0, 1) or 0.0 in end or 1.0 in end for end in ends)  # else nothing reached beyond


def test_by_policy_each_run_has_its_own_sides_and_answers_have_none(tmp_path: Path) -> None:
    sweep = fake_runs.write_sweep(
        tmp_path / "s", [{}, {"loss.beta": 0.4}], seeds=(0,), pairs=30, prompts=20, steps=2, snapshots=0
    )
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "trainer_state.json").write_text('{"log_history": [{"eval_loss": 0.7, "step": 2}]}')
    found = compare_sides([sweep, tmp_path / "trl"], repeats=100, by="policy")  # a log of TRL has no pairs, and no part in it
    assert found.metric == "accuracy/shift"
    for one, name in zip(found.points, ("base", "beta=0.4"), strict=True):
        table = Run(sweep / "runs" / name / "seed-0").pairs()
        assert table is not None
        moved, now = table.shift() > 0, table.delta("policy")
        assert one.pairs == {"right": (now > 0).sum(), "wrong": (now < 0).sum()}
        assert (one.right.estimate, one.wrong.estimate) == pytest.approx((moved[now > 0].mean(), moved[now < 0].mean()))
    with pytest.raises(UsageError, match="`by` policy: parts held-out pairs, and win_rate is of sampled answers"):
        compare_sides([sweep], metric="win_rate", by="policy")
    with pytest.raises(UsageError, match="`by` base: must be one of reference, policy"):
        compare_sides([sweep], by="base")  # type: ignore[arg-type]


@pytest.mark.slow
def test_all_runs_are_shown(sweep: Path, found: Comparison) -> None:
    assert len(found.runs) == 7 * 3 * 3
    assert sum(run.is_final for run in found.runs) == 21
    one = next(run for run in found.runs if run.name == "γ = 0" and run.seed == 1 and run.is_final)
    wrote = evaluation(sweep, "gamma=0x", 1)
    assert one.value == one.metrics["accuracy/shift"] == pytest.approx(wrote["pairs"]["accuracy/shift"])
    assert one.kl == pytest.approx(wrote["generation"]["kl"]["mean"])
    assert one.metrics["win_rate"] == pytest.approx(wrote["generation"]["win_rate"]["mean"])
    assert one.metrics["entropy_per_token"] == pytest.approx(wrote["generation"]["entropy_per_token"]["mean"])
    assert one.metrics["nll/chosen_per_token"] == pytest.approx(wrote["pairs"]["nll/chosen_per_token"])
    assert one.metrics["rewards/margins"] == pytest.approx(wrote["pairs"]["rewards/margins"])


def test_p_are_adjusted_over_all_points_that_were_compared(found: Comparison) -> None:
    compared = sorted(one.matched.p for one in found.arms if one.matched)
    smallest = min((one.matched for one in found.arms if one.matched), key=lambda one: one.p)
    assert smallest.p_adjusted == pytest.approx(min(1.0, smallest.p * len(compared)))


def test_the_front_has_the_planted_winner_and_not_what_it_beats(found: Comparison) -> None:
    assert arm(found, "γ = 2β").pareto > 0.9
    assert all(0 <= one.pareto <= 1 for one in found.arms)


def test_a_tie_has_no_best_and_a_share_at_its_end_says_what_to_use_instead(found: Comparison) -> None:
    """300 pairs, so that one of them is 0.0033: 0.9967 is within one pair, 0.996 is not."""

    def with_values(value: float) -> Comparison:
        arms = [replace(one, value=value) for one in found.arms]
        return replace(found, arms=arms, best=replace(found.best, value=value, optimism=0.0, corrected=value))

    whole = with_values(1.0)
    first, rest = summary.verdict(whole).split(". ", 1)
    assert first == (
        "accuracy/shift is exhausted: each of the 7 points has all 300 pairs right, so that none can be ahead on it; compare "
        "on accuracy/policy or accuracy/policy_per_token or accuracy/shift_per_token instead"
    )
    assert rest == summary.verdict(found)
    assert "all but one of 300 pairs, or more, right" in summary.verdict(with_values(1 - 1 / 300))
    assert "exhausted" not in summary.verdict(with_values(0.996)) + summary.verdict(found)
    names = "β = 0.4, the base recipe" if whole.arms[0].name == "β = 0.4" else whole.arms[0].name
    line = summary.best_line(whole)
    assert line.startswith(f"no point is best on 'moved toward chosen': {names}") and line.endswith(
        " are tied at 1.000, of 7 points"
    )
    assert "luck" not in line
    assert summary.best_line(found).startswith("best of 7 points on 'moved toward chosen': γ = 2β, 0.")


def test_the_best_is_named_with_its_luck(found: Comparison) -> None:
    assert found.best is not None
    assert (found.best.name, found.best.points) == ("γ = 2β", 7)
    assert found.best.corrected == pytest.approx(found.best.value - found.best.optimism)
    assert 0 <= found.best.optimism < 0.05


@pytest.mark.slow
def test_win_rates_are_compared_where_answers_were_scored(sweep: Path, tmp_path: Path) -> None:
    found = compare([sweep], repeats=200)
    assert (found.metric, found.unit, found.reference) == ("win_rate", "answer", 0.5)
    unscored = fake_runs.write_sweep(tmp_path / "s", [{}, {"loss.beta": 0.4}], pairs=30, prompts=20, steps=2, scored=False)
    assert compare([unscored], repeats=200).metric == "accuracy/shift"
    per_token = [{"loss.reduce": "mean"}, {"loss.reduce": "mean", "loss.beta": 0.4}]
    small: dict[str, Any] = {"pairs": 30, "prompts": 20, "steps": 1, "snapshots": 0, "seeds": (0,), "scored": False}
    of_means = fake_runs.write_sweep(tmp_path / "m", per_token, **small)
    assert compare([of_means], repeats=100).metric == "accuracy/shift_per_token"
    assert compare([unscored, of_means], repeats=100).metric == "accuracy/shift"
    with pytest.raises(
        UsageError, match=r"`metric` win_rate: .* has no score, reference_score of its answers; give pe-dpo eval"
    ):
        compare([unscored], metric="win_rate")


def test_no_others_are_spoken_of_where_all_are_within_the_margin(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"loss.beta": 0.4}, {"mixout.p": 0.3}]
    small: dict[str, Any] = {"pairs": 30, "prompts": 20, "steps": 1, "snapshots": 0, "seeds": (0, 1), "scored": False}
    found = compare([fake_runs.write_sweep(tmp_path / "s", settings, **small)], repeats=100, equivalent=1000)
    assert "Within 1000 points of β (two one-sided tests, Holm): mixout 0.3. " in f"{found.verdict} "


@pytest.mark.slow
def test_a_single_beta_is_replaced_by_early_stopping_and_said(tmp_path: Path) -> None:
    sweep = fake_runs.write_sweep(tmp_path / "s", [{}, {"mixout.p": 0.3}], pairs=60, prompts=40, snapshots=3, steps=8)
    found = compare([sweep], metric="accuracy/shift", repeats=200)
    assert found.baseline == "early stopping"
    assert [one.name for one in found.arms if one.is_baseline] == [
        "the base recipe",
        "early stopping at step 2",
        "early stopping at step 4",
        "early stopping at step 6",
    ]
    assert arm(found, "mixout 0.3").matched is not None
    assert any("only one value of β was run" in remark for remark in found.remarks)


@pytest.mark.slow
def test_another_dial_can_make_the_line(sweep: Path) -> None:
    found = compare([sweep], metric="accuracy/shift", baseline="gamma", repeats=200)
    assert found.baseline == "γ"
    assert {one.name for one in found.arms if one.is_baseline} == {"the base recipe", "γ = 0", "γ = 0.5β", "γ = 2β"}


def test_two_runs_of_one_seed_are_compared_directly(tmp_path: Path) -> None:
    """Without answers there is no KL: pairs gained and lost by hand, McNemar's p, and the remark that seeds are not in it."""
    world = fake_runs.make_world(100, 100)
    runs = [fake_runs.write_run(tmp_path / name, setting, world, samples=0, snapshots=0, steps=3, quality=quality)
            for name, setting, quality in (("a", {}, 0.0), ("b", {"loss.gamma": "0x"}, 1.0))]  # fmt: skip
    found = compare(runs, metric="accuracy/shift", repeats=500)
    rights = []
    for run in runs:
        table = fake_runs.pyarrow.parquet.read_table(run / "eval_pairs.parquet")
        column = {name: table[name].to_numpy() for name in table.column_names}
        shift = column["policy_chosen"] - column["policy_rejected"] - column["reference_chosen"] + column["reference_rejected"]
        rights.append(shift > 0)
    gained, lost = int((rights[1] & ~rights[0]).sum()), int((rights[0] & ~rights[1]).sum())
    second = arm(found, "γ = 0")
    assert (second.mcnemar["gained"], second.mcnemar["lost"]) == (gained, lost)
    assert second.direct.estimate == pytest.approx((gained - lost) / 100)
    assert second.matched is None
    assert found.verdict.startswith("Each at its own KL (there is none to match), ")
    assert any(remark.startswith("one seed") for remark in found.remarks)


def test_points_of_the_line_alone_are_compared_directly(tmp_path: Path) -> None:
    """Only β was turned; a much worse point is worse than the base recipe, with the sample said beside it."""
    settings: list[dict[str, Any]] = [{}, {"loss.beta": 0.4}]
    quality = {"beta=0.4": -3.0}
    sweep = fake_runs.write_sweep(tmp_path / "s", settings, pairs=200, prompts=200, snapshots=0, steps=2, quality=quality)
    found = compare([sweep], metric="accuracy/shift", repeats=500)
    assert found.verdict.startswith("Each at its own KL, β = 0.4 is worse than the base recipe on accuracy/shift by ")
    assert ", 3 seeds, 200 pairs)" in found.verdict


@pytest.mark.slow
def test_reward_accuracy_is_compared_with_a_warning(sweep: Path) -> None:
    found = compare([sweep], metric="rewards/accuracies", repeats=200)
    assert any("contains the β and γ that each run was trained with" in remark for remark in found.remarks)


@pytest.mark.slow
def test_a_metric_where_less_is_better(sweep: Path) -> None:
    found = compare([sweep], metric="nll/chosen_per_token", repeats=200)
    assert found.best is not None
    assert found.best.value == pytest.approx(min(one.value for one in found.arms if "step" not in one.settings))
    assert found.best.corrected >= found.best.value
    assert "point" not in found.verdict


@pytest.mark.slow
def test_logs_of_trl_stand_beside_and_are_not_compared(sweep: Path, tmp_path: Path) -> None:
    log = [{"eval_rewards/accuracies": 0.7, "eval_loss": 0.6, "step": 10}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}), encoding="utf-8")
    found = compare([sweep, tmp_path], metric="rewards/accuracies", repeats=200)
    assert found.runs[-1].source == "trl"
    assert found.runs[-1].value == 0.7
    assert len(found.arms) == len(compare([sweep], metric="rewards/accuracies", repeats=200).arms)
    alone = compare([tmp_path])
    assert (alone.metric, alone.arms) == ("rewards/accuracies", [])
    assert alone.verdict == "Nothing can be paired: TRL's logs have means alone. All runs are in the table."


@pytest.mark.slow
def test_the_answer_is_the_same_each_time_and_valid_json(sweep: Path, found: Comparison) -> None:
    again = compare([sweep], metric="accuracy/shift", repeats=1000)
    text = json.dumps(again.to_dict(), allow_nan=False)
    assert text == json.dumps(found.to_dict(), allow_nan=False)


def test_a_lonely_run_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "a", {}, fake_runs.make_world(30, 20), snapshots=0, steps=2)
    assert compare([run], repeats=200).verdict == "There is nothing to compare: the base recipe is all that was run."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "accuracy"}, "`metric` accuracy: is not one of accuracy/policy, .*accuracy/shift, "),
        ({"baseline": "temperature"}, "`baseline` temperature: is neither step nor scale, nor a hyperparameter"),
        ({"repeats": 10}, "`repeats` 10: a bootstrap needs at least 100"),
        ({"seed": -1}, "`seed` -1: must be 0 or more"),
        ({"confidence": 1.0}, "`confidence` 1: must be at least 0.5 and less than 1"),
    ],
)
def test_impossible_requests_are_refused(sweep: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compare([sweep], **options)


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "a", {}, fake_runs.make_world(12, 4), snapshots=0, steps=2)
    with pytest.raises(UsageError, match="4 prompts, of which no interval can be made"):
        compare([run], metric="accuracy/shift", repeats=200)


def test_it_is_a_function_of_the_package() -> None:
    assert pe_dpo.compare is compare

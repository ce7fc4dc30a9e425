"""Contrasts: what their words mean, which points they average, and that they are tested by themselves."""

import json
import re
from pathlib import Path
from typing import Any

import fake_runs
import numpy as np
import pytest
from scipy import stats

from pe_dpo.errors import UsageError
from pe_dpo.experiments.compare import compare
from pe_dpo.experiments.comparison import Comparison
from pe_dpo.experiments.contrasts import contrasts_hash, largest_block, matching, named_contrasts, read_contrast
from pe_dpo.experiments.design import designs
from pe_dpo.experiments.plan import make_plan, read_plan, save_plan
from pe_dpo.metrics.bootstrap import Errors, holm, smallest_found
from pe_dpo.recipe import recipe_from_yaml

POINTS: list[dict[str, Any]] = [
    {},
    {"loss.beta": 0.025},
    {"loss.beta": 0.4},
    {"mixout.p": 0.3},
    {"mixout.p": 0.5},
    {"loss.gamma": "0x"},
]
MIXOUT, GAMMA = "mixout against beta within 5", "gamma=0 against base"


def write(folder: Path, seed: int) -> Path:
    options: dict[str, Any] = {"pairs": 120, "prompts": 60, "snapshots": 0, "steps": 2, "scored": False, "seed": seed}
    return fake_runs.write_sweep(folder, POINTS, quality={"gamma=0x": 0.7}, **options)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two data sets, the same points; the second world has other pairs."""
    folder = tmp_path_factory.mktemp("contrasts")
    first, second = write(folder / "first", 0), write(folder / "second", 5)
    for record in second.rglob("run.json"):
        content = json.loads(record.read_text())
        content["hashes"]["held_out"] = "e" * 64
        record.write_text(json.dumps(content))
    return [first, second]


@pytest.fixture(scope="module")
def found(sweeps: list[Path]) -> Comparison:
    return compare(sweeps[:1], metric="accuracy/shift", repeats=300, contrasts=[MIXOUT, GAMMA])


@pytest.mark.slow
def test_a_contrast_is_the_mean_over_its_points_seed_by_seed_and_tested_among_contrasts_alone(found: Comparison) -> None:
    arms = {one.name: one for one in found.arms}
    mixout, gamma = found.contrasts
    assert mixout.effect is not None
    assert gamma.effect is not None
    points = [arms[name].matched for name in ("mixout 0.3", "mixout 0.5")]
    assert mixout.points == ["mixout 0.3", "mixout 0.5"]
    assert mixout.effect.per_seed == pytest.approx(np.mean([one.per_seed for one in points], axis=0).tolist(), abs=1e-12)
    assert gamma.effect.per_seed == pytest.approx(arms["γ = 0"].direct.per_seed, abs=1e-12)
    assert gamma.effect.p == pytest.approx(arms["γ = 0"].direct.p)
    of_both = holm(np.array([mixout.effect.p, gamma.effect.p]))
    assert [mixout.effect.p_adjusted, gamma.effect.p_adjusted] == pytest.approx(of_both.tolist())
    begin = "2 contrasts on accuracy/shift, named after runs were finished, tested together by themselves (Holm). "
    assert found.verdict.startswith(f"{begin}Mixout (mean of 2 points) minus β at equal KL: ")
    assert "γ = 0 minus the base recipe: " in found.verdict
    assert found.power is not None
    assert found.power.comparisons == 2
    assert found.power.smallest_in_verdict > found.power.smallest_found


def test_equivalence_is_two_one_sided_tests_and_their_interval(found: Comparison) -> None:
    """Within 5 points if the 90 % interval is, whatever the p; NaN for the contrast that does not ask."""
    mixout, gamma = (one.effect for one in found.contrasts)
    assert mixout is not None
    assert gamma is not None
    half = mixout.errors.half_width(0.1)
    assert (mixout.inner_low, mixout.inner_high) == pytest.approx((mixout.estimate - half, mixout.estimate + half))
    assert (mixout.p_equivalent < 0.05) == (max(-mixout.inner_low, mixout.inner_high) < 0.05)
    level = 2 * mixout.p_equivalent  # at which one end of the interval is the margin
    assert abs(mixout.estimate) + mixout.errors.half_width(level) == pytest.approx(0.05, rel=1e-6)
    assert np.isnan([gamma.margin, gamma.p_equivalent, gamma.p_equivalent_adjusted]).all()


@pytest.mark.slow
def test_contrasts_of_two_data_sets_are_averaged(sweeps: list[Path], found: Comparison) -> None:
    """Each data set counts alike; variances add, and Satterthwaite's degrees of freedom with them."""
    both = compare(sweeps, metric="accuracy/shift", repeats=300, contrasts=[MIXOUT, GAMMA])
    alone = [found.contrasts[1].effect, both.contrasts[1].by_data_set["second"]]
    assert alone[0] is not None
    pooled = both.contrasts[1].effect
    assert pooled is not None
    assert pooled.estimate == pytest.approx((alone[0].estimate + alone[1].estimate) / 2)
    seeds = [one.errors.seeds + one.errors.together for one in alone]
    assert pooled.errors.seeds + pooled.errors.together == pytest.approx(sum(seeds) / 4)
    assert pooled.errors.seed_freedom == pytest.approx(sum(seeds) ** 2 / (seeds[0] ** 2 / 2 + seeds[1] ** 2 / 2))
    assert (both.arms, both.remarks[0]) == (
        [],
        "contrasts alone are averaged over 2 data sets; for points, compare each by itself",
    )
    assert "2 data sets, 6 seeds" in both.verdict
    with pytest.raises(UsageError, match="other held-out pairs"):
        compare(sweeps, metric="accuracy/shift", repeats=300)


def test_what_counts_as_a_point() -> None:
    """γ as a multiple of β, a value of the base recipe is no change, a key alone stands for all of its values."""
    base = recipe_from_yaml("model: {base: a/b}\ndata: {train: pairs}\noutput: x\nloss: {beta: 2, gamma: 1x}", "test")
    settings: list[dict[str, Any]] = [{}, {"loss.beta": 8.0}, {"loss.gamma": "0x"}, {"loss.gamma": "0.5x"}]
    settings += [{"loss.beta": 8.0, "loss.gamma": "0x"}, {"loss.gamma": "0x", "mixout.p": 0.5}, {"mixout.p": 0.5}, {"step": 20}]

    def points(text: str, *, of_right: bool = False) -> list[int]:
        contrast = read_contrast(text)
        side = contrast.right if of_right else contrast.left
        return matching(side, settings, base, is_line=of_right and contrast.is_at_equal_kl)

    assert points("gamma=0,1 against base") == [2, 3]  # 1 is half of β
    assert points("gamma=0x beta=2,8") == [2, 4]
    assert points("mixout") == [6]
    assert points("gamma=0 mixout against gamma=0 beta") == [5]
    assert points("gamma=0 mixout against gamma=0 beta", of_right=True) == [2, 4]
    assert points("mixout", of_right=True) == [0, 1]
    assert points("gamma=0 against base", of_right=True) == [0]
    assert points("step=20 against beta") == points("step") == [7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mixtout", "mixtout is neither base, step, scale, a hyperparameter"),
        ("mixout against beta within two", "within two is no size"),
        ("mixout= against beta", "mixout= names no value"),
        ("mixout mixout=0.3", "mixout is there twice"),
        ("gamma=0 against beta mixout", "a line of equal KL is made of the values of one key"),
        ("  ", "is empty"),
    ],
)
def test_words_that_are_no_contrast_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_contrast(text)


def test_every_seed_has_the_same_points() -> None:
    """3 points in 3 seeds beat 4 points in 2; of equal blocks the one with more seeds."""
    assert largest_block([{0, 1, 2}, {0, 1, 2}, {0, 1}, {0, 1, 2}]) == ([0, 1, 3], [0, 1, 2])
    assert largest_block([{0, 1}, {0}]) == ([0], [0, 1])
    assert largest_block([set(), set()]) == ([], [])


def test_points_of_different_seeds_are_averaged_over_those_that_they_share() -> None:
    assert largest_block([{0, 1, 2}, {1, 2, 3}, {1, 2, 4}]) == ([0, 1, 2], [1, 2])


def test_several_seeds_of_one_point_come_before_one_seed_of_many() -> None:
    assert largest_block([{0}, {0}, {0}, {0}, {1, 2}]) == ([4], [1, 2])
    assert largest_block([{0}, {0, 1}, {0, 2}]) == ([1], [0, 1])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny data sets: answers were scored in the first, the second has one seed. β = 0.4 of the first has one, too."""
    folder, points = tmp_path_factory.mktemp("uneven"), [{}, {"loss.beta": 0.4}, {"loss.gamma": "0x"}]
    small: dict[str, Any] = {"pairs": 24, "prompts": 12, "snapshots": 0, "steps": 1}
    first = fake_runs.write_sweep(folder / "first", points, seeds=(0, 1), unfinished=["beta=0.4"], **small)
    small["pairs"] = 26
    return [first, fake_runs.write_sweep(folder / "second", points, seeds=(0,), scored=False, **small)]


@pytest.fixture(scope="module")
def over_uneven(uneven: list[Path]) -> Comparison:
    return compare(uneven, repeats=100, contrasts=["gamma=0 against base"])


def test_the_metric_is_one_that_all_data_sets_have(over_uneven: Comparison) -> None:
    """Not the win rate, though all answers of the first were scored; and no line begins at one reference of both."""
    assert (over_uneven.metric, np.isnan(over_uneven.reference)) == ("accuracy/shift", True)


def test_a_data_set_of_one_seed_is_shown_and_the_verdict_says_how_many_count(over_uneven: Comparison) -> None:
    found = over_uneven
    (one,) = found.contrasts
    of_first, of_second = one.by_data_set["first"], one.by_data_set["second"]
    assert of_first is not None and of_second is not None and one.effect is not None
    assert one.effect.estimate == of_first.estimate
    assert (one.data_sets, np.isnan(of_second.low)) == (1, True)
    assert ", 1 of 2 data sets, 2 seeds): " in found.verdict


def test_a_side_that_no_data_set_has_is_named_with_the_data_sets(uneven: list[Path]) -> None:
    lacking = "no run that is compared is a point of mixout.p"
    with pytest.raises(UsageError, match=f"`contrasts` mixout: on first {lacking}; on second {lacking}; name others"):
        compare(uneven, repeats=100, contrasts=["mixout"])


def test_one_question_in_other_words_is_asked_once(uneven: list[Path]) -> None:
    """Two of the words name the same points; two sizes that count as no difference are two questions."""
    asked = ["beta=0.1,0.4 against base", "beta=0.40,.1  against base within 5", "beta=0.4,0.1 against base within 2"]
    assert [one.text for one in named_contrasts(uneven, asked)[0]] == ["beta=0.40,.1 against base within 5", asked[2]]


def test_points_that_are_left_out_on_the_right_or_stand_on_both_sides_are_told(uneven: list[Path]) -> None:
    asked = ["gamma=0 against beta=0.1,0.4", "beta=0.1,0.4 against beta=0.4"]
    first, second = compare(uneven[:1], repeats=100, metric="accuracy/shift", contrasts=asked).contrasts
    assert (first.points, first.left_out) == (["γ = 0"], ["β = 0.4 on the right"])
    assert (second.points, second.left_out) == (["the base recipe"], ["β = 0.4 on both sides"])


def test_what_rests_on_one_seed_is_said_without_an_interval(uneven: list[Path]) -> None:
    asked = ["gamma=0 against base", "beta=0.4 against base"]
    beside = compare(uneven[:1], repeats=100, metric="accuracy/shift", contrasts=asked)
    assert re.search(
        r"β = 0.4 minus the base recipe: .* points \(one seed\): rests on one seed and is not tested\.$", beside.verdict
    )
    alone = compare(uneven[:1], repeats=100, metric="accuracy/shift", contrasts=asked[1:])
    assert alone.verdict.endswith("With one seed this holds for these runs, not yet for others of the same settings.")


@pytest.mark.slow
def test_power_is_of_what_was_tested_and_names_its_rows(uneven: list[Path], tmp_path: Path) -> None:
    """Of scored answers; without sampled ones nothing is at equal KL, and no contrast there has power."""
    power = compare(uneven[:1], repeats=100).power
    assert power is not None and (power.unit, power.pairs) == ("answer", 24)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {base: a/base}\ndata: {train: pairs}\n")
    designed = designs(make_plan(recipe, [["gamma=0,1x"]], folder=tmp_path / "new"), like=uneven[0])
    assert (designed.unit, designed.assumed) == ("answer", f"variances of {uneven[0]}: 2 seeds, 24 answers, 1 comparison")
    world = fake_runs.make_world(20, 20)
    runs = [
        fake_runs.write_run(tmp_path / name, setting, world, samples=0, snapshots=0, steps=1)
        for name, setting in (("a", {}), ("b", {"loss.gamma": "0x"}))
    ]
    assert compare(runs, repeats=100).power is not None
    found = compare(runs, repeats=100, contrasts=["gamma=0"])
    assert (found.contrasts[0].effect, found.contrasts[0].left_out, found.power) == (None, ["γ = 0"], None)


def test_a_design_counts_snapshots_and_scales_with_its_points(tmp_path: Path) -> None:
    """γ = 0, two snapshots and three scaled ends; where one value of β is run its snapshots are the line, not compared."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {base: a/base}\ndata: {train: pairs}\n")
    measured = ["generation.snapshots=2", "generation.scales=[0.5]"]

    def comparisons(*grids: str) -> int:
        return designs(make_plan(recipe, [[one] for one in grids], folder=tmp_path / "new", overrides=measured)).comparisons

    assert comparisons("beta=0.1,0.2", "gamma=0") == 1 + 2 + 3
    assert comparisons("beta=0.1", "gamma=0") == 1 + 2


@pytest.mark.slow
def test_contrasts_are_kept_with_their_hash_and_later_ones_and_seeds_are_recorded_as_such(tmp_path: Path) -> None:
    """Named with the plan: after 0 runs. Named again when six of twelve had finished: after six, as the seeds then added."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {base: a/base}\ndata: {train: pairs}\n")
    grids, folder = [["mixout=0.3"], ["beta=0.4"]], tmp_path / "sweep"
    with pytest.raises(UsageError, match=r"mixout=0.5: the plan has no point of mixout.p=0.5"):
        make_plan(recipe, grids, folder=folder, contrasts=["mixout=0.5"])
    save_plan(make_plan(recipe, [*grids, ["beta=0.1"]], folder=folder, seeds=[0, 1], contrasts=["mixout"]))
    kept = json.loads((folder / "sweep.json").read_text())
    assert kept["contrasts"] == [{"contrast": "mixout", "after": 0}]

    for point in read_plan(folder).points:
        fake_runs.write_run(
            folder / point.folder, point.settings, fake_runs.make_world(30, 20), seed=point.seed, snapshots=0, steps=2
        )
    later = make_plan(recipe, grids, folder=folder, seeds=[0, 1, 2], contrasts=["beta=0.4 against base", "mixout"])
    save_plan(later)
    plan = read_plan(folder)
    assert plan.contrasts == {"mixout": 0, "beta=0.4 against base": 6}
    assert plan.late_seeds == {2: 6}
    assert json.loads((folder / "sweep.json").read_text())["contrasts_sha256"] == contrasts_hash({"mixout": 0})
    assert kept["contrasts_sha256"] == contrasts_hash({"mixout": 0})
    found = compare([folder], metric="accuracy/shift", repeats=100)
    assert [one.after for one in found.contrasts] == [0, 6]
    assert found.verdict.startswith("2 contrasts on accuracy/shift, some of them named after runs were finished")
    assert "beta=0.4 against base: named after 6 runs had finished" in found.remarks
    assert any(remark.endswith("seed 2 was added after 6 runs had finished; a look before that decision makes p smaller than "
                               "they are") for remark in found.remarks)  # fmt: skip
    with pytest.raises(UsageError, match=r"dropout: no run that is compared is a point of adapter.dropout; name others"):
        compare([folder], metric="accuracy/shift", repeats=100, contrasts=["dropout"])
    content = json.loads((folder / "sweep.json").read_text())
    content["contrasts"][0]["contrast"] = "mixout=0.3"
    (folder / "sweep.json").write_text(json.dumps(content))
    assert any("not those of its hash" in remark for remark in compare([folder], metric="accuracy/shift", repeats=100).remarks)


@pytest.mark.slow
def test_a_plan_says_what_it_will_find(sweeps: list[Path], tmp_path: Path) -> None:
    """By hand for stated variances; from a sweep that was run, what compare says of it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {base: a/base}\ndata: {train: pairs}\n")
    grids, folder = [["beta=0.025,0.4"], ["mixout=0.3,0.5"], ["gamma=0"]], tmp_path / "new"
    plan = make_plan(recipe, grids, folder=folder, seeds=[0, 1, 2], contrasts=["mixout"])
    (_, of_300, _), _, words, comparisons = designs(plan)
    alone, together, seeds = 0.06 / 300, 0.07 / 900, 0.01**2 / 3
    errors = Errors(alone + together, alone, together, seeds, 300, 3)
    assert (of_300.pairs, comparisons) == (300, 1)
    assert of_300.alone == of_300.in_verdict == pytest.approx(smallest_found(errors), rel=1e-3)
    assert words.startswith("a share; two runs rank 6% of the pairs differently in every seed")
    open_plan = make_plan(recipe, grids, folder=folder, seeds=[0, 1, 2])
    power = compare(sweeps[:1]).power
    assert power is not None
    designed, unit, words, comparisons = designs(open_plan, like=sweeps[0])
    assert (unit, comparisons) == ("pair", 3)
    assert words == f"variances of {sweeps[0]}: 3 seeds, 120 pairs, {power.comparisons} comparisons"
    assert comparisons == power.comparisons
    assert (designed[0].alone, designed[0].in_verdict) == pytest.approx((power.smallest_found, power.smallest_in_verdict))
    assert designed[0].with_two_more == pytest.approx(power.with_two_more)
    single = designs(make_plan(recipe, grids, folder=folder)).sizes
    assert np.isnan([single[0].alone, single[0].in_verdict]).all()
    assert single[0].with_two_more > 0


def test_power_is_that_of_the_verdict(sweeps: list[Path]) -> None:
    """t of three seeds at .05 over the number of comparisons, by hand; without correction, and with two more seeds."""
    found = compare(sweeps[:1], metric="accuracy/shift", repeats=300)
    power = found.power
    assert power is not None
    arms = [one.matched.errors for one in found.arms if one.matched and one.matched.errors.runs == 3]
    prompts, alone, together, seeds = np.mean([one[:4] for one in arms], axis=0)
    clusters, comparisons = arms[0].clusters, sum(one.matched is not None for one in found.arms)

    def half(level: float, runs: int) -> float:
        few, many = (stats.t.ppf(1 - level / 2, df) ** 2 for df in (runs - 1, clusters - 1))
        fewer = 3 / runs
        both = few * fewer * (seeds + together) + many * alone
        return max(many * (alone + fewer * (prompts - alone)), both) ** 0.5

    assert power.comparisons == comparisons
    assert power.smallest_found == pytest.approx(half(0.05, 3) + half(0.4, 3), rel=1e-6)
    assert power.smallest_in_verdict == pytest.approx(half(0.05 / comparisons, 3) + half(0.4, 3), rel=1e-6)
    assert power.with_two_more == pytest.approx(half(0.05 / comparisons, 5) + half(0.4, 5), rel=1e-6)

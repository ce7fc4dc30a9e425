"""The numbers that a sweep's plots show are those of its runs and of the comparison; runs that failed are on its page, too."""

import json
import math
import statistics
from types import SimpleNamespace

import fake_runs
import numpy as np
import pytest
from matplotlib.figure import Figure
from pyarrow import parquet

from pe_dpo.experiments.compare import compare
from pe_dpo.report import sweep_plots
from pe_dpo.report.sweep_report import report_sweep

pytestmark = pytest.mark.slow

GRID = ({}, {"loss.beta": 0.025}, {"loss.beta": 0.4}, {"loss.gamma": "0x"}, {"mixout.p": 0.3})


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return fake_runs.write_sweep(tmp_path_factory.mktemp("sweeps") / "sweep", GRID, steps=4, snapshots=0)


@pytest.fixture(scope="module")
def plots(sweep):
    return {plot.name: plot for plot in report_sweep(sweep, metric="accuracy/policy").plots}


@pytest.fixture(scope="module")
def compared(sweep):
    return compare([sweep], metric="accuracy/policy")


def marks(plot):
    """Of each row its marks' centres, its ticks and the ends of its intervals, by the row's label."""
    (axes,) = plot.figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    found = {label: ([], [], []) for label in labels}
    for line in axes.lines:
        x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        if not len(y) or line.get_color() == "#d0d4da" or len(set(y)) > 1:  # grid lines, the level, the legend
            continue
        at = 1 if line.get_marker() == "|" else 0 if line.get_marker() not in ("None", "") else 2
        found[labels[round(y[0])]][at].extend(value for value in x if math.isfinite(value))
    return found


def test_an_arm_on_the_frontier_is_where_the_comparison_has_it(plots, compared) -> None:
    (axes,) = plots["frontier"].figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    arms = {arm.name: arm for arm in compared.arms}
    for label, name in (("γ", "γ = 0"), ("mixout", "mixout 0.3")):
        x, y = lines[label].get_data()
        assert (x[0], y[0]) == pytest.approx((arms[name].root_kl, arms[name].value))
    dial = sorted((arm.root_kl, arm.value) for arm in compared.arms if arm.is_baseline)
    assert np.transpose(lines["baseline"].get_data()).tolist() == [[0.0, compared.reference], *map(list, dial)]
    assert {text.get_text() for text in axes.texts} == {"1", "2", "3", "4", "5"}


def test_all_of_a_share_is_within_its_axes_and_these_within_0_and_1(plots) -> None:
    """Every line, bars with their ends, of the frontier and of the seeds."""
    for name, way in (("frontier", "y"), ("frontier", "x"), ("seeds", "x")):
        (axes,) = plots[name].figure.axes
        low, high = getattr(axes, f"get_{way}lim")()
        lines = [line for line in axes.lines if line.get_transform() == axes.transData]  # not those that span the panel
        ends = np.concatenate([np.asarray(getattr(line, f"get_{way}data")(), float) for line in lines])
        known = ends[np.isfinite(ends)]
        assert len(known) > 10
        assert low <= known.min() <= known.max() <= high
        assert (name == "frontier" and way == "x") or 0 <= low < high <= 1


@pytest.mark.parametrize(
    ("ends", "arrows", "bar"),
    [((0.62, 0.68), [], (0.62, 0.68)), ((0.5, 0.9), ["v", "^"], (0.6, 0.7)), ((0.65, 1.2), ["^"], (0.65, 0.7))],
)
def test_a_bar_that_goes_on_beyond_the_panel_ends_there_with_an_arrow(ends, arrows, bar) -> None:
    axes = Figure().add_subplot()
    axes.set(xlim=(0, 1), ylim=(0.6, 0.7))
    sweep_plots._draw_cross(axes, SimpleNamespace(root_kl=0.5, value=0.66), [(0.4, 0.6), ends], {"color": "k"}, is_share=True)
    across, up, *marks = axes.lines
    assert list(across.get_xdata()) == [0.4, 0.6] and list(up.get_ydata()) == pytest.approx(bar)
    assert [mark.get_marker() for mark in marks] == arrows


def test_every_run_is_a_dot_on_the_frontier(plots, compared) -> None:
    (axes,) = plots["frontier"].figure.axes
    dots = sorted(tuple(point) for part in axes.collections for point in part.get_offsets().tolist())
    expected = sorted((math.sqrt(run.kl), run.value) for run in compared.runs)
    assert np.asarray(dots) == pytest.approx(np.asarray(expected))


def test_a_difference_at_equal_kl_is_in_points_with_its_interval_and_its_seeds(plots, compared) -> None:
    rows = marks(plots["matched"])
    assert list(rows) == ["γ = 0", "mixout 0.3"]
    for arm in compared.arms:
        if arm.matched:
            centres, seeds, ends = rows[arm.name]
            assert centres == pytest.approx([100 * arm.matched.estimate])
            assert ends == pytest.approx([100 * arm.matched.low, 100 * arm.matched.high])
            assert seeds == pytest.approx([100 * value for value in arm.matched.per_seed])


def test_a_filled_mark_was_told_apart_and_a_hollow_one_was_not(tmp_path) -> None:
    quality = {fake_runs.point_name({"mixout.p": 0.3}): 3.0}
    sweep = fake_runs.write_sweep(tmp_path / "sweep", GRID, steps=4, snapshots=0, pairs=300, prompts=300, quality=quality)
    found = compare([sweep], metric="accuracy/shift")
    expected = {arm.name: arm.matched.p_adjusted < 0.05 for arm in found.arms if arm.matched}
    assert set(expected.values()) == {True, False}
    (axes,) = next(p for p in report_sweep(sweep, metric="accuracy/shift").plots if p.name == "matched").figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    shown = {
        labels[round(line.get_ydata()[0])]: line.get_markerfacecolor() == line.get_color()
        for line in axes.lines
        if line.get_marker() not in ("None", "", "|")
    }
    assert shown == expected


def test_the_spread_of_seeds_shows_every_run_and_the_reference(plots, compared) -> None:
    rows = marks(plots["seeds"])
    for arm in compared.arms:
        values = [run.value for run in compared.runs if run.settings == arm.settings]
        assert rows[arm.name][1] == pytest.approx(values)
        assert rows[arm.name][0] == pytest.approx([statistics.fmean(values)])
    (axes,) = plots["seeds"].figure.axes
    assert compared.reference in [line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[-1]]


def test_length_and_displacement_are_those_of_the_files(sweep, plots) -> None:
    folders = [sweep / "runs" / "gamma=0x" / f"seed-{seed}" for seed in range(3)]
    tokens = [np.mean(parquet.read_table(folder / "generations.parquet")["tokens"].to_numpy()) for folder in folders]
    assert marks(plots["length"])["γ = 0"][1] == pytest.approx(tokens)
    after = [json.loads((folder / "run.json").read_text())["after"] for folder in folders]
    centres = [statistics.fmean(one[f"displacement/{side}"] for one in after) for side in ("chosen", "rejected")]
    assert marks(plots["displacement"])["γ = 0"][0] == pytest.approx(centres)


def test_the_alternative_text_has_the_numbers_of_the_rows(plots, compared) -> None:
    arm = next(arm for arm in compared.arms if arm.name == "γ = 0")
    assert f"γ = 0: {100 * arm.matched.estimate:.3g}".replace("-", "−") in plots["matched"].alt


def test_a_point_of_which_every_run_failed_has_a_row_and_no_mark(sweep, tmp_path, set_record) -> None:
    import shutil

    copy = shutil.copytree(sweep, tmp_path / "sweep")
    for seed in range(3):
        run = copy / "runs" / "gamma=0x" / f"seed-{seed}"
        set_record(run, status="failed", why="out of memory", after=None)
    content = report_sweep(copy, metric="accuracy/policy")
    rows = {tuple(row[:3]) for row in next(table for table in content.tables if table.name == "runs").rows}
    assert {("γ = 0", str(seed), "failed") for seed in range(3)} <= rows
    assert all("γ = 0" not in plot.alt for plot in content.plots)
    assert sum("failed (out of memory)" in line for line in content.missing) == 3
    failed = [record for record in content.records if record["status"] == "failed"]
    assert [(record["why"], record["metrics"], record["kappa"]) for record in failed] == [("out of memory", {}, None)] * 3


def test_arms_whose_kl_the_dial_did_not_reach_say_so(tmp_path) -> None:
    settings = [{}, {"loss.beta": 0.11}, {"mixout.p": 0.9}, {"mixout.p": 0.01}]
    sweep = fake_runs.write_sweep(tmp_path / "sweep", settings, seeds=(0,), steps=2, snapshots=0)
    found = {plot.name: plot for plot in report_sweep(sweep, metric="accuracy/shift").plots}
    assert "mixout 0.9: outside the range of the baseline" in found["matched"].alt
    assert "outside the range of the baseline" in {text.get_text() for text in found["matched"].figure.axes[0].texts}

"""Adapters scaled toward the reference in reports: a look of their own, tables of their own."""

import json

import fake_runs
import matplotlib.colors
import pytest

from pe_dpo.metrics.catalogue import METRICS
from pe_dpo.report.run_report import report_run
from pe_dpo.report.style import BROWN, CROSS, SERIES
from pe_dpo.report.sweep_report import report_sweep
from pe_dpo.runs.files import scaled_folder

pytestmark = pytest.mark.slow

SCALES = (0.5, 0.75)
GRID = ({}, {"loss.beta": 0.025}, {"loss.beta": 0.4}, {"loss.gamma": "0x"})


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    return fake_runs.write_sweep(folder, GRID, seeds=(0, 1), steps=4, snapshots=1, scales=SCALES)


@pytest.fixture(scope="module")
def sections(sweep):
    return {section.name: section for section in report_sweep(sweep, metric="accuracy/shift").sections}


def lines_of(axes):
    """Marked lines of a figure by their label."""
    return {line.get_label(): line for line in axes.lines if line.get_marker() not in ("None", "", None)}


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_on_the_frontier_they_are_of_one_kind_with_its_own_look(sections) -> None:
    plot = sections["frontier"].plots[0]
    found = lines_of(plot.figure.axes[0])
    assert {"β", "early stopping", "γ", "scaled adapter"} <= set(found)
    scaled = found["scaled adapter"]
    assert (scaled.get_color(), scaled.get_marker(), len(scaled.get_xdata())) == (BROWN, CROSS, len(GRID) * len(SCALES))
    assert BROWN not in SERIES
    assert scaled.get_zorder() < found["γ"].get_zorder()
    assert len(found["β"].get_xdata()) == 3
    assert "×: adapters scaled toward the reference" in plot.caption


def test_the_grey_dots_are_earlier_states_alone(sections) -> None:
    axes = sections["frontier"].plots[0].figure.axes[0]
    dots = next(part for part in axes.collections if part.get_label() == "earlier states")
    assert len(dots.get_offsets()) == len(GRID) * 2
    brown = [part for part in axes.collections if matplotlib.colors.to_hex(part.get_facecolor()[0]) == BROWN]
    assert sum(len(part.get_offsets()) for part in brown) == len(GRID) * len(SCALES) * 2


def test_as_the_baseline_they_have_the_look_of_the_line(sweep) -> None:
    found = report_sweep(sweep, metric="accuracy/shift", baseline="scale")
    axes = next(section for section in found.sections if section.name == "frontier").plots[0].figure.axes[0]
    assert len(lines_of(axes)["scaling"].get_xdata()) == 3
    assert len(lines_of(axes)["scaled adapter"].get_xdata()) == (len(GRID) - 1) * len(SCALES)
    (line,) = (line for line in axes.lines if line.get_label() == "baseline")
    assert len(line.get_xdata()) == 3


def test_with_many_arms_those_that_were_trained_keep_their_numbers(tmp_path) -> None:
    settings = [{}, *({"loss.beta": 0.1 + 0.01 * number} for number in range(1, 10))]
    sweep = fake_runs.write_sweep(tmp_path / "sweep", settings, seeds=(0,), steps=2, snapshots=0, scales=SCALES)
    content = {section.name: section for section in report_sweep(sweep, metric="accuracy/shift").sections}
    axes = content["frontier"].plots[0].figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {str(number) for number in range(1, 11)}


def test_differences_at_equal_kl_have_a_row_for_each(sections) -> None:
    axes = sections["equal-kl"].plots[0].figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[-2:] == ["γ = 0 (scaled to 0.5)", "γ = 0 (scaled to 0.75)"]


def test_seeds_length_and_displacement_are_of_runs_as_they_are(sections) -> None:
    for name in ("seeds", "measures"):
        for plot in sections[name].plots:
            assert len(plot.figure.axes[0].get_yticks()) == len(GRID)


def test_tables_have_every_one_with_its_own_numbers(sweep, sections) -> None:
    tables = {table.name: table for table in sections["runs-table"].tables}
    assert len(tables["runs"].rows) == len(tables["snapshots"].rows) == len(GRID) * 2
    rows = tables["scaled"].rows
    assert len(rows) == len(GRID) * 2 * len(SCALES)
    row = next(row for row in rows if row[0] == "γ = 0 (scaled to 0.75)" and row[1] == "1")
    measured = evaluation(scaled_folder(sweep / "runs" / "gamma=0x" / "seed-1", 0.75))
    assert float(row[3]) == pytest.approx(measured["pairs"]["accuracy/shift"], abs=6e-5)
    assert float(row[4]) == pytest.approx(measured["generation"]["kl"]["mean"], abs=6e-5)
    points = {row[0]: row for row in sections["points-table"].tables[1].rows}
    assert points["γ = 0 (scaled to 0.75)"][-1] == "–"  # it took no seconds
    assert points["γ = 0"][-1] != "–"


def test_a_run_lists_its_adapter_from_scale_to_scale(sweep) -> None:
    run = sweep / "runs" / "gamma=0x" / "seed-1"
    outcome = next(section for section in report_run(run).sections if section.name == "outcome")
    table = next(table for table in outcome.tables if table.name == "scaled")
    assert [row[0] for row in table.rows] == ["0.5", "0.75", "1"]
    for row, place in zip(table.rows, [*(scaled_folder(run, scale) for scale in SCALES), run], strict=True):
        measured = evaluation(place)
        assert float(row[1].split(" ± ")[0]) == pytest.approx(measured["generation"]["kl"]["mean"], abs=6e-5)
        shown = dict(zip(table.header, row, strict=True))
        for key in ("accuracy/policy", "accuracy/policy_per_token", "accuracy/shift"):
            assert float(shown[METRICS[key].title]) == pytest.approx(measured["pairs"][key], abs=6e-4)


def test_a_run_without_scales_says_nothing_of_them(whole_run) -> None:
    outcome = next(section for section in report_run(whole_run).sections if section.name == "outcome")
    assert [table.name for table in outcome.tables if table.name == "scaled"] == []


def test_what_to_do_where_nothing_can_be_matched_names_both_free_controls(tmp_path) -> None:
    settings = [{}, {"loss.beta": 0.11}, {"mixout.p": 0.9}]
    sweep = fake_runs.write_sweep(tmp_path / "sweep", settings, seeds=(0,), steps=2, snapshots=0)
    content = report_sweep(sweep, metric="accuracy/shift")
    (words,) = next(section for section in content.sections if section.name == "equal-kl").missing
    assert "`pe-dpo compare … --baseline step`" in words
    assert "`pe-dpo sweep … --scale-control 0.5,0.75`" in words

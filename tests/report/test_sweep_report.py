"""The report of a sweep: every run is on it, its numbers are those of the runs, and whatever is missing is said."""

import json
import math
import re
import shutil
import statistics

import fake_runs
import numpy as np
import pytest
from pyarrow import parquet

from pe_dpo.errors import UsageError
from pe_dpo.report.page import to_html
from pe_dpo.report.sweep_report import report_sweep
from pe_dpo.report.write import write_report
from pe_dpo.runs.run import Run

pytestmark = pytest.mark.slow

GRID = (
    {},
    {"loss.beta": 0.025},
    {"loss.beta": 0.4},
    {"loss.gamma": "0x"},
    {"loss.gamma": "2x"},
    {"mixout.p": 0.3},
    {"mixout.p": 0.3, "loss.gamma": "2x"},
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return fake_runs.write_sweep(tmp_path_factory.mktemp("sweeps") / "sweep", GRID, steps=6)


@pytest.fixture(scope="module")
def written(sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(sweep, folder / "page.html", folder / "figures", metric="accuracy/shift"), folder


@pytest.fixture(scope="module")
def page(written, parse):
    return parse((written[1] / "page.html").read_text(encoding="utf-8"))


def _rows(page, name: str) -> list[dict[str, str]]:
    header, *rows = page.tables[name]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_decision_comes_first_and_what_was_run_last(written) -> None:
    content, _ = written
    names = [section.name for section in content.sections]
    assert names[:3] == ["points-table", "equal-kl", "frontier"] and names[-2:] == ["runs-table", "plan"]
    assert [section.name for section in content.sections if section.is_folded] == ["runs-table", "plan"]
    assert dict(content.sections[-1].facts)["Seeds"] == "3 (0, 1, 2)"
    assert all(alarm.startswith("Warning: ") for alarm in content.alarms) and len(content.alarms) > 0


def _float(text: str) -> float:
    return float(text.replace("−", "-"))


def _sections(content):
    return {section.name: section for section in content.sections}


def test_each_arm_is_told_apart_by_what_the_reference_ranks_right(sweep, page) -> None:
    row = next(row for row in page.tables["sides"] if row[0] == "γ = 2β")
    tables = [Run(sweep / "runs" / "gamma=2x" / f"seed-{seed}").pairs() for seed in range(3)]
    for cell, is_side in zip(row[1:3], (lambda delta: delta > 0, lambda delta: delta < 0), strict=True):
        shares = [(table.shift()[is_side(table.delta("reference"))] > 0).mean() for table in tables]
        assert _float(cell.split(" [")[0]) == pytest.approx(100 * sum(shares) / 3, abs=0.06)


def test_a_whole_sweep_misses_nothing_and_begins_with_the_verdict_of_compare(sweep, written) -> None:
    from pe_dpo.experiments.compare import compare

    assert written[0].missing == []
    assert written[0].verdict == compare([sweep], metric="accuracy/shift").verdict


def test_every_plot_a_paper_would_show_is_there(written, page) -> None:
    names = {attrs["id"] for tag, attrs in page.tags if tag == "figure"}
    assert names == {"frontier", "matched", "kl-kappa", "entropy-kappa", "seeds", "length", "displacement"}
    files = {"table.md", "results.jsonl", *(f"{name}.png" for name in names)}
    assert {path.name for path in (written[1] / "figures").iterdir()} == files
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")


def test_every_run_is_in_the_table_with_its_own_numbers(sweep, page) -> None:
    rows = _rows(page, "runs")
    assert len(rows) == 21
    plan = json.loads((sweep / "sweep.json").read_text())["points"]
    for row, point in zip(rows, plan, strict=True):
        run = sweep / point["folder"]
        record = json.loads((run / "run.json").read_text())
        pairs = {key: np.asarray(values) for key, values in parquet.read_table(run / "eval_pairs.parquet").to_pydict().items()}
        now = pairs["policy_chosen"] - pairs["policy_rejected"]
        moved = now - (pairs["reference_chosen"] - pairs["reference_rejected"])
        assert (int(row["seed"]), row["status"], int(row["steps"])) == (point["seed"], "finished", 6)
        assert _float(row["accuracy/shift"]) == pytest.approx((moved > 0).mean(), abs=6e-5)
        assert _float(row["accuracy, summed log-probs"]) == pytest.approx((now > 0).mean(), abs=6e-4)
        assert _float(row["loss"]) == pytest.approx(record["after"]["loss"], abs=6e-5)
        assert _float(row["KL, nats"]) == pytest.approx(_kl_by_prompt(run), abs=6e-5)
        assert _float(row["seconds"]) == round(record["seconds"])


def _kl_by_prompt(run) -> float:
    answers = parquet.read_table(run / "generations.parquet").to_pydict()
    by_prompt: dict[str, list[float]] = {}
    for key, kl in zip(answers["prompt_key"], answers["kl"], strict=True):
        by_prompt.setdefault(key, []).append(kl)
    return statistics.fmean(statistics.fmean(values) for values in by_prompt.values())


def test_a_page_says_point_as_compare_does(written) -> None:
    assert re.findall(r"(?i)\barms?\b", (written[1] / "page.html").read_text(encoding="utf-8")) == []


def test_the_tables_of_points_fit_a_page_of_1200_pixels(page) -> None:
    """Of 1,088 pixels the name of a point takes 128 at least, each further column 13 and 8 a character."""
    for name in ("points", "points-more"):
        header, *rows = page.tables[name]
        widths = [max(max(map(len, head.split())), *map(len, cells)) for head, *cells in zip(header, *rows, strict=True)]
        assert 128 + sum(13 + 8 * width for width in widths[1:]) <= 1088


def test_a_point_is_the_mean_of_its_runs(page) -> None:
    runs = [row for row in _rows(page, "runs") if row["run"] == "β = 0.4"]
    point, more = (next(row for row in _rows(page, name) if row["point"] == "β = 0.4") for name in ("points", "points-more"))
    mean, spread = map(_float, point["accuracy/shift"].split(" ± "))
    values = [_float(row["accuracy/shift"]) for row in runs]
    assert mean == pytest.approx(statistics.fmean(values), abs=6e-4)
    assert spread == pytest.approx(statistics.stdev(values), abs=6e-4)
    assert _float(point["KL, nats"]) == pytest.approx(statistics.fmean(_float(row["KL, nats"]) for row in runs), abs=1e-4)
    assert _float(more["tokens"]) == pytest.approx(statistics.fmean(_float(row["tokens"]) for row in runs), abs=1e-2)
    assert point["Δ at equal KL, points"] == "baseline"


def test_effects_at_equal_kl_are_those_of_compare(sweep, page) -> None:
    from pe_dpo.experiments.compare import compare

    arms = compare([sweep], metric="accuracy/shift").arms
    for row, arm in zip(_rows(page, "points"), arms, strict=True):
        found = re.fullmatch(r"([−+]?[\d.]+) \[([−+]?[\d.]+), ([−+]?[\d.]+)\]", row["Δ at equal KL, points"])
        lone = arm.matched is not None and math.isnan(arm.matched.low)
        assert (found is None) == (arm.matched is None or lone)
        assert ("(one seed)" in row["Δ at equal KL, points"]) == lone
        if found and arm.matched:
            expected = [100 * value for value in (arm.matched.estimate, arm.matched.low, arm.matched.high)]
            assert [_float(text) for text in found.groups()] == pytest.approx(expected, abs=0.06)
            assert row["in range"] == f"{arm.seeds_in_range} of 3"


def test_earlier_states_have_their_own_numbers(sweep, page) -> None:
    points = {row["point"]: row for row in _rows(page, "points-more")}
    stopped = [name for name in points if "stop" in name]
    assert len(stopped) == 2
    values = []
    for seed in range(3):
        folder = next(path for path in sorted(sweep.glob(f"runs/*/seed-{seed}")) if path.parent.name in ("base", ""))
        answers = parquet.read_table(next(iter(sorted(folder.glob("snapshots/*")))) / "generations.parquet")
        values.append(statistics.fmean(answers["tokens"].to_pylist()))
    assert _float(points[stopped[0]]["tokens"]) == pytest.approx(statistics.fmean(values), abs=1e-2)
    assert len(_rows(page, "snapshots")) == 42


def test_results_are_one_object_per_run(sweep, written) -> None:
    lines = [json.loads(line) for line in (written[1] / "figures" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    plan = json.loads((sweep / "sweep.json").read_text())["points"]
    assert [line["folder"] for line in lines] == [point["folder"] for point in plan]
    assert all(line["status"] == "finished" and math.isfinite(line["metrics"]["kl"]) for line in lines)
    assert {line["kappa"] for line in lines} == {0.0, 1.0, 2.0}


def test_kl_is_drawn_over_kappa(sweep, written) -> None:
    """γ = 0, β, 2β of the base recipe, and γ = β, 2β with mixout; means over three seeds, by hand from the answers."""
    axes = _sections(written[0])["kappa"].plots[0].figure.axes[0]
    curves = {line.get_label(): line for line in axes.lines}
    assert list(curves["the base recipe"].get_xdata()) == [0, 1, 2]
    names = [path.parent for path in sorted(sweep.glob("runs/*/seed-0")) if path.parent.name in ("gamma=0x",)]
    expected = statistics.fmean(_kl_by_prompt(names[0] / f"seed-{seed}") for seed in range(3))
    assert curves["the base recipe"].get_ydata()[0] == pytest.approx(expected)
    assert list(curves["mixout 0.3"].get_xdata()) == [1, 2]


def test_how_strong_mixout_was_stands_beside_its_runs(tmp_path, parse, set_record) -> None:
    sweep = fake_runs.write_sweep(tmp_path / "sweep", [{}, {"mixout.p": 0.5}], seeds=(0,), steps=1, snapshots=0)
    folder = json.loads((sweep / "sweep.json").read_text())["points"][1]["folder"]
    set_record(sweep / folder, mixout={"p": 0.5, "margin_noise": 0.3149})
    content = report_sweep(sweep)
    page = parse(to_html(content._replace(sections=[section._replace(plots=[]) for section in content.sections])))
    rows = _rows(page, "runs")
    assert [row["mask noise"] for row in rows] == ["–", "0.315"]


def test_unfinished_runs_are_named_and_not_hidden(sweep, tmp_path, parse, set_record) -> None:
    copy = shutil.copytree(sweep, tmp_path / "sweep")
    points = json.loads((copy / "sweep.json").read_text())["points"]
    gone, failed, killed = (copy / points[index]["folder"] for index in (20, 17, 14))
    shutil.rmtree(gone)
    set_record(failed, status="failed", why="the loss <b>is</b> not finite")
    set_record(killed, status="training")
    (killed / "metrics.jsonl").write_text("")
    content = report_sweep(copy)
    sections = [section._replace(plots=[]) for section in content.sections]
    page = parse(to_html(content._replace(sections=sections)))
    assert "Of 21 planned runs 18 are finished; 1 training, 1 failed, 1 not started. All are named below." in page.text
    rows = _rows(page, "runs")
    assert [row["status"] for row in rows].count("finished") == 18
    assert len(rows) == 21
    for run, words in ((gone, "not started"), (failed, "failed (the loss <b>is</b> not finite)"), (killed, "training")):
        assert f"{run.relative_to(copy)}: {words}; start the same pe-dpo sweep again" in page.text


def test_a_sweep_of_which_nothing_is_finished_has_a_page(tmp_path) -> None:
    names = [fake_runs.point_name(setting) for setting in GRID[:2]]
    sweep = fake_runs.write_sweep(tmp_path / "sweep", GRID[:2], seeds=(0,), steps=1, unfinished=names)
    written = write_report(sweep, tmp_path / "page.html", tmp_path / "figures")
    assert written.verdict.startswith("Nothing can be compared yet: no run of this sweep is finished")
    assert written.plots == []
    assert len(written.missing) == 3


def test_without_sampled_answers_differences_are_at_each_runs_own_kl(tmp_path) -> None:
    sweep = fake_runs.write_sweep(tmp_path / "sweep", GRID[:5], samples=0, steps=1, snapshots=0, seeds=(0, 1))
    sections = _sections(report_sweep(sweep))
    for name in ("frontier", "equal-kl", "kappa", "measures"):
        assert any("pe-dpo eval" in line for line in sections[name].missing), name
    assert [plot.name for plot in sections["equal-kl"].plots] == ["direct"]
    assert "each at its own KL" in sections["equal-kl"].plots[0].caption
    assert [plot.name for plot in sections["measures"].plots] == ["displacement"]


def test_answers_to_one_prompt_have_no_interval_of_their_kl(tmp_path) -> None:
    folder = fake_runs.write_sweep(tmp_path / "sweep", GRID[:2], seeds=(0, 1), snapshots=0, steps=1)
    for path in folder.glob("runs/*/*/generations.parquet"):
        answers = parquet.read_table(path)
        parquet.write_table(answers.slice(0, 2), path)  # both of the first prompt
    page = report_sweep(folder, metric="accuracy/policy")
    assert "frontier" in [plot.name for plot in page.plots]


def test_one_seed_is_said_to_be_one_seed(tmp_path) -> None:
    sweep = fake_runs.write_sweep(tmp_path / "sweep", GRID[:4], seeds=(0,), steps=1, snapshots=0)
    sections = _sections(report_sweep(sweep))
    assert "--seeds 3" in sections["seeds"].missing[0]
    assert "every point has one seed" in sections["limits"].missing[0]
    assert not re.search(r"\bnan\b", " ".join(cell for row in sections["points-table"].tables[0].rows for cell in row))


def test_a_sweep_that_does_not_turn_gamma_has_no_kappa_plot(tmp_path) -> None:
    sweep = fake_runs.write_sweep(tmp_path / "sweep", GRID[:3], seeds=(0,), steps=1, snapshots=0)
    section = _sections(report_sweep(sweep))["kappa"]
    assert section.plots == []
    assert "--grid gamma" in section.missing[0]


def test_runs_that_cannot_be_compared_are_still_shown(sweep, tmp_path, set_record) -> None:
    copy = shutil.copytree(sweep, tmp_path / "sweep")
    run = copy / json.loads((copy / "sweep.json").read_text())["points"][3]["folder"]
    set_record(run, hashes={"held_out": "0" * 64})
    content = report_sweep(copy)
    assert content.verdict.startswith("Nothing can be compared yet: ")
    assert "other held-out pairs" in content.verdict
    assert len(_sections(content)["runs-table"].tables[0].rows) == 21
    assert _sections(content)["runs-table"].tables[0].rows[3][4] != "–"


def test_more_arms_than_fit_are_drawn_in_parts(tmp_path) -> None:
    settings = [{}, *({"loss.beta": 0.1 + 0.01 * number} for number in range(1, 32))]
    sweep = fake_runs.write_sweep(
        tmp_path / "sweep", settings, seeds=(0,), steps=1, snapshots=0, samples=0, pairs=12, prompts=8
    )
    plots = {plot.name: plot for plot in _sections(report_sweep(sweep))["seeds"].plots}
    assert set(plots) == {"seeds", "seeds-2"}
    parts = [plot.figure.axes[0] for plot in plots.values()]
    assert [len(axes.get_yticks()) for axes in parts] == [30, 2]
    assert parts[0].get_xlim() == parts[1].get_xlim()


def test_a_torn_plan_is_named(tmp_path) -> None:
    (tmp_path / "sweep.json").write_text('{"points": [{"folder"')
    with pytest.raises(UsageError, match=r"sweep\.json"):
        report_sweep(tmp_path)


@pytest.mark.parametrize("option", ["metric", "baseline"])
def test_a_misspelt_name_is_refused_and_the_page_stays(sweep, tmp_path, option) -> None:
    page = tmp_path / "page.html"
    page.write_text("the last one")
    with pytest.raises(UsageError, match=f"`{option}` acuracy: is n"):
        write_report(sweep, page, tmp_path, **{option: "acuracy"})
    assert page.read_text() == "the last one"


@pytest.mark.parametrize("option", ["metric", "baseline"])
def test_what_is_for_sweeps_is_refused_for_a_run(run, option) -> None:
    with pytest.raises(UsageError, match="is no sweep"):
        write_report(run, run / "page.html", run / "figures", **{option: "beta"})


def test_a_run_whose_record_is_torn_is_on_the_page_with_the_reason(sweep, tmp_path) -> None:
    copy = shutil.copytree(sweep, tmp_path / "sweep")
    run = copy / json.loads((copy / "sweep.json").read_text())["points"][3]["folder"]
    (run / "run.json").write_text("{")
    content = report_sweep(copy)
    assert str(run / "run.json") in content.verdict
    row = _sections(content)["runs-table"].tables[0].rows[3]
    assert (row[2], row[4]) == ("failed", "–")
    assert any(line.startswith(f"{run.relative_to(copy)}: failed (") and "run.json" in line for line in content.missing)


def test_without_the_base_recipe_differences_are_to_the_first_arm_and_say_so(tmp_path) -> None:
    sweep = fake_runs.write_sweep(
        tmp_path / "sweep", [{"loss.beta": 0.025}, {"loss.beta": 0.4}], seeds=(0, 1), steps=2, snapshots=0, pairs=40, prompts=20
    )
    content = report_sweep(sweep, metric="accuracy/shift")
    tables = {table.name: table for table in content.tables}
    points, more, sides = tables["points"], tables["points-more"], tables["sides"]
    tokens = [dict(zip(more.header, row, strict=True)) for row in more.rows]
    first, second = (_float(row["tokens"]) for row in tokens)
    assert [_float(row["Δ tokens"]) for row in tokens] == [0, pytest.approx(second - first, abs=0.011)]
    assert "Δ KL: against β = 0.025" in points.note and "Δ tokens: against β = 0.025" in more.note
    assert "minus β = 0.025" in sides.header
    assert "accuracy/shift minus that of β = 0.025, each at its own KL" in _sections(content)["equal-kl"].plots[0].caption

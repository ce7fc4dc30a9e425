"""The report of one run: its numbers are those of its files, and whatever is missing is said."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from scipy import stats

from pe_dpo.errors import UsageError
from pe_dpo.metrics.catalogue import METRICS
from pe_dpo.recipe import recipe_to_yaml
from pe_dpo.report import pair_plots, run_curves
from pe_dpo.report.content import Page, PageSection
from pe_dpo.report.page import to_html
from pe_dpo.report.run_report import report_run
from pe_dpo.report.style import to_svg
from pe_dpo.report.write import write_report
from pe_dpo.runs.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(whole_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(whole_run, folder / "page.html", folder / "figures"), folder


@pytest.fixture(scope="module")
def page(written, parse):
    return parse((written[1] / "page.html").read_text(encoding="utf-8"))


class _Undrawn:
    """Figure and axes of which whatever is asked does nothing."""

    def __getattr__(self, name: str) -> "_Undrawn":
        return self

    def __call__(self, *arguments: object, **options: object) -> "_Undrawn":
        return self

    def __iter__(self) -> Iterator[object]:
        return iter(())


@contextmanager
def _no_panel(*labels: str, **options: object) -> Iterator[tuple[_Undrawn, _Undrawn]]:
    yield _Undrawn(), _Undrawn()


def _told(folder: Path) -> Page:
    """The report of a run without its figures, which are nine tenths of its time, for what is asked of its words and tables."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (run_curves, pair_plots):
            patch.setattr(module, "panel", _no_panel)
        return report_run(folder)


def _number(text: str) -> float:
    return float(text.replace("−", "-").split()[0])


def _sections(content: Page) -> dict[str, PageSection]:
    return {section.name: section for section in content.sections}


def test_a_whole_run_misses_nothing(written) -> None:
    assert written[0].missing == []


def test_every_plot_is_on_the_page_and_a_file(written, page) -> None:
    names = {value for tag, attrs in page.tags if tag == "figure" for value in [attrs["id"]]}
    assert names >= {
        *("regimes-pairs-sum", "regimes-weight-sum", "regimes-pairs-per-token", "regimes-weight-per-token"),
        *("preferences-start", "preferences-end", "transitions-sum", "transitions-per-token", "displacement", "loss"),
        *("reward-accuracy", "policy-accuracy", "kl", "entropy", "lengths", "length-shift"),
    }
    assert {path.name for path in (written[1] / "figures").iterdir()} == {"table.md", *(f"{name}.png" for name in names)}
    assert len(written[0].plots) == len(names) == sum(tag == "img" for tag, _ in page.tags)


def test_before_and_after_are_those_of_the_run(whole_run, page) -> None:
    record = json.loads((whole_run / "run.json").read_text())
    rows = {row[0]: row[1:] for row in page.tables["before-after"]}
    for title, key, error in (
        ("accuracy, summed log-probs", "accuracy/policy", 6e-4),
        ("accuracy, per token", "accuracy/policy_per_token", 6e-4),
        ("loss", "loss", 6e-5),
        ("rejected, nats vs reference", "displacement/rejected", 6e-5),
    ):
        assert _number(rows[title][0]) == pytest.approx(record["before"][key], abs=error)
        assert _number(rows[title][1]) == pytest.approx(record["after"][key], abs=error)
        assert _number(rows[title][2]) == pytest.approx(record["after"][key] - record["before"][key], abs=error)


def test_the_interval_of_a_change_is_clustered_by_prompt(whole_run, page) -> None:
    """By hand from the pairs: 60 pairs of 40 prompts, sums of deviations per prompt."""
    pairs = parquet.read_table(whole_run / "eval_pairs.parquet").to_pydict()
    shift = np.asarray(pairs["policy_chosen"]) - np.asarray(pairs["initial_chosen"])
    sums: dict[str, float] = {}
    for key, value in zip(pairs["prompt_key"], shift - shift.mean(), strict=True):
        sums[key] = sums.get(key, 0.0) + value
    clusters = len(sums)
    error = math.sqrt(clusters / (clusters - 1) * sum(value**2 for value in sums.values())) / len(shift)
    half = stats.t.ppf(0.975, clusters - 1) * error
    row = next(row for row in page.tables["before-after"] if row[0] == "chosen, nats vs reference")
    low, high = re.findall(r"[−+\d.]+", row[3].split("[")[1])
    assert (_number(low), _number(high)) == pytest.approx((shift.mean() - half, shift.mean() + half), abs=6e-3)


def test_the_verdict_counts_the_pairs_that_changed_sides(whole_run, written) -> None:
    pairs = {key: np.asarray(value) for key, value in parquet.read_table(whole_run / "eval_pairs.parquet").to_pydict().items()}
    start = pairs["initial_chosen"] - pairs["initial_rejected"]
    now = pairs["policy_chosen"] - pairs["policy_rejected"]
    gained, lost = int(((start < 0) & (now > 0)).sum()), int(((start > 0) & (now < 0)).sum())
    assert written[0].verdict.startswith(
        f"Of 60 held-out pairs the policy now ranks {gained} right that it ranked wrong before, and {lost} the other way round"
    )
    assert gained + lost > 0


@pytest.mark.parametrize(("flipped", "words"), [
    (0, "No held-out pair changed sides"), (5, "this cannot be told from chance"), (6, "made the ranking better, by more than"),
    (-6, "made the ranking worse, by more than"),
])  # fmt: skip
def test_six_pairs_that_change_sides_are_more_than_chance_and_five_are_not(run, set_columns, flipped: int, words: str) -> None:
    """McNemar's exact p is 2/2⁶ = 0.031 for six, 0.063 for five; each pair has a prompt of its own."""
    now = [1.0 if index < 30 + flipped else -1.0 for index in range(60)]
    zero, keys = [0.0] * 60, [f"{index}" for index in range(60)]
    start = [1.0 if index < 30 else -1.0 for index in range(60)]
    set_columns(run, policy_chosen=now, policy_rejected=zero, initial_chosen=start, initial_rejected=zero, prompt_key=keys)
    assert words in _told(run).verdict


@pytest.mark.parametrize(("fallen", "is_fall"), [(37, False), (38, True)])
def test_the_headline_says_that_most_chosen_answers_fell_before_how_many_pairs_are_in_order(
    run, set_columns, fallen: int, is_fall: bool
) -> None:
    """Wilson's lower end is above a half for 38 of 60 (0.507), not for 37 (0.490). They fall by 60 nats in all: 1.0 a pair."""
    mean = 60 / fallen
    start, zero, keys = [1.0 if index < 30 else -1.0 for index in range(60)], [0.0] * 60, [f"{index}" for index in range(60)]
    chosen = [-mean if index < fallen else 0.0 for index in range(60)]
    set_columns(
        run, policy_chosen=chosen, policy_rejected=[-9.0] * 60, reference_chosen=zero, reference_rejected=zero,
        initial_chosen=start, initial_rejected=zero, prompt_key=keys,
    )  # fmt: skip
    verdict, fall = _told(run).verdict, (
        "63% of the chosen answers became less likely than under the reference: on average they fell by 1.0 nats, and the "
        "rejected ones fell by 9.0. Of 60 held-out pairs"
    )  # fmt: skip
    assert verdict.startswith(fall if is_fall else "Of 60 held-out pairs")
    assert verdict.endswith(f"the ranking {'more often right' if is_fall else 'better'}, by more than chance would.")


def test_a_fall_of_pairs_that_share_prompts_is_one_of_their_prompts(run, set_columns) -> None:
    """39 of 60 fell: with Wilson's lower end at 0.52 as independent pairs, at 0.43 as 13 of 20 prompts, of three alike each."""
    chosen, zero = [-1.0] * 39 + [0.0] * 21, [0.0] * 60
    columns = {"reference_chosen": zero, "reference_rejected": zero, "initial_chosen": zero, "initial_rejected": zero}
    set_columns(run, policy_chosen=chosen, policy_rejected=zero, **columns, prompt_key=[f"{row // 3}" for row in range(60)])
    assert "became less likely" not in _told(run).verdict
    set_columns(run, prompt_key=[f"{row}" for row in range(60)])
    assert _told(run).verdict.startswith("65% of the chosen answers became less likely")


@pytest.mark.parametrize("title", ["reward accuracy", "accuracy, length-matched", "share of chosen that π0 likes better"])
def test_every_share_has_intervals_of_what_its_own_pairs_are_worth_before_and_after(run, title: str) -> None:
    """Wilson of ½: of 10 pairs (0.237, 0.763), of 20 (0.299, 0.701)."""
    key = next(metric.key for metric in METRICS.values() if metric.title == title)
    record = json.loads((run / "run.json").read_text())
    for when, pairs in (("before", 10), ("after", 20)):
        record[when] |= {key: 0.5, f"pairs_worth/{key}": pairs}
    (run / "run.json").write_text(json.dumps(record))
    (run / "evaluation.json").unlink()
    rows = {row[0]: row[1:] for section in _told(run).sections for table in section.tables for row in table.rows}
    assert rows[title][:2] == ["0.500 [0.237, 0.763]", "0.500 [0.299, 0.701]"]


def test_sampled_answers_are_those_of_the_evaluation(whole_run, page) -> None:
    generation = json.loads((whole_run / "evaluation.json").read_text())["generation"]
    rows = {row[0]: row[1] for row in page.tables["sampled"]}
    mean, error = rows["KL(π‖π0), nats per answer"].split(" ± ")
    assert float(mean) == pytest.approx(generation["kl"]["mean"], abs=6e-5)
    assert float(error) == pytest.approx(generation["kl"]["standard_error"], abs=6e-5)
    assert _number(rows["tokens of an answer"]) == pytest.approx(generation["tokens"]["mean"], abs=6e-3)


def test_shares_are_apart_by_what_the_reference_ranks_right(whole_run, page) -> None:
    table = Run(whole_run).pairs()
    start, moved = table.delta("reference"), table.shift()
    row = next(row for row in page.tables["sides"] if row[0] == "moved toward chosen, by π0")
    assert [_number(cell) for cell in row[1::2]] == [(start > 0).sum(), (start < 0).sum()]
    assert [float(cell[:5]) for cell in row[2::2]] == pytest.approx(
        [(moved[start > 0] > 0).mean(), (moved[start < 0] > 0).mean()], abs=6e-4
    )


def test_what_was_trained_is_said(page) -> None:
    facts = dict(zip(page.by_tag["dt"], page.by_tag["dd"], strict=True))
    assert facts["κ = γ/β"] == "0.5"
    assert facts["Loss"].startswith("−log σ(z),  z = 0.01·Δπ − 0.005·Δ0")
    assert "generalized DPO" in facts["Equals"]
    assert facts["Mixout"] == "p = 0.3, column, a mask for each optimizer step"
    assert (facts["Seed"], facts["Steps"]) == ("0", "12, in 12 s")
    recipe = next(text for text in page.by_tag["pre"] if "gamma" in text)
    assert "gamma: 0.5x" in recipe
    assert any("d" * 64 in text for text in page.by_tag["pre"])


def test_the_pairs_that_moved_most_are_shown_as_text(whole_run, page) -> None:
    pairs = parquet.read_table(whole_run / "eval_pairs.parquet").to_pydict()
    now, start = (np.subtract(pairs[f"{when}_chosen"], pairs[f"{when}_rejected"]) for when in ("policy", "initial"))
    moved = (now - start).tolist()
    order = sorted(range(60), key=lambda index: -moved[index])
    titles = page.by_tag["h3"]
    assert [title.rsplit(", ", 1)[1] for title in titles] == [pairs["where"][index] for index in order[:5] + order[:-6:-1]]
    assert titles[0].startswith(f"Best 1: +{moved[order[0]]:.2f} nats")
    best = page.by_tag["article"][0]
    assert pairs["prompt"][order[0]] in best
    assert f"<script>alert({order[0]})</script>" in best


def test_the_table_files_have_the_same_numbers(written, page) -> None:
    markdown = (written[1] / "figures" / "table.md").read_text(encoding="utf-8").replace("\\", "")
    for name in ("before-after", "sampled"):
        for row in page.tables[name][1:]:
            assert "| " + " | ".join(row) + " |" in markdown


def test_one_answer_is_not_answers(run) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["generation"]["samples"] = 1
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    (table,) = (table for table in _told(run).tables if table.name == "sampled")
    assert "held-out prompts, 1 answer each, at most" in table.caption


def test_without_sampled_answers_the_page_says_how_to_get_them(run) -> None:
    (run / "generations.parquet").unlink()
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["generation"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    for path in run.glob("snapshots/*/evaluation.json"):
        path.unlink()
    content = _told(run)
    assert "sampled" not in {table.name for table in content.tables}
    assert "kl" not in {plot.name for plot in content.plots}
    missing = [line for section in content.sections for line in section.missing]
    assert sum("generation.prompts" in line and "pe-dpo eval" in line for line in missing) == 3


def test_a_command_that_the_page_names_works_without_held_out_pairs_too(run, set_record) -> None:
    for path in (*run.glob("*.parquet"), *run.glob("snapshots/*/*"), run / "evaluation.json"):
        path.unlink()
    set_record(run, pairs={"train": 8, "held_out": 0})
    lines = [line for section in _told(run).sections for line in section.missing if "--prompts 64" in line]
    assert len(lines) == 3
    assert all(f"`pe-dpo eval {run} --prompts 64 --data FILE`" in line for line in lines)


def test_without_snapshots_the_way_is_missed(run) -> None:
    for path in run.glob("snapshots/*/evaluation.json"):
        path.unlink()
    section = _sections(report_run(run))["drift"]
    assert [plot.name for plot in section.plots] == ["kl"]
    assert "generation.snapshots" in section.missing[0]


def test_without_held_out_pairs_only_training_is_shown(run, set_record) -> None:
    (run / "eval_pairs.parquet").unlink()
    set_record(run, before={}, after={})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "eval_loss" not in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    content = report_run(run)
    assert content.verdict == (
        "Nothing can be said of pairs that this run was not trained on: none were held out, or they were not measured."
    )
    sections = {section.name: section for section in content.sections}
    assert all("data.eval" in sections[name].missing[0] for name in ("outcome", "preferences", "texts", "limits"))
    assert "training window" in sections["regimes"].plots[0].caption
    assert sections["learning"].plots


def test_watched_training_pairs_are_not_called_held_out(run) -> None:
    text = (run / "metrics.jsonl").read_text().replace('"eval_', '"probe_')
    (run / "metrics.jsonl").write_text(text)
    assert "watched training pairs" in _sections(report_run(run))["regimes"].plots[0].caption


def test_where_the_reference_was_not_run_the_rest_is_shown(run, set_columns) -> None:
    nothing = [math.nan] * 60
    set_columns(run, reference_chosen=nothing, reference_rejected=nothing)
    section = _sections(report_run(run))["preferences"]
    assert "reference was not run" in section.missing[0]
    assert [plot.name for plot in section.plots] == ["transitions-sum", "transitions-per-token"]


def test_a_run_that_did_not_keep_its_start_began_at_the_reference(run, set_columns) -> None:
    before = _told(run).verdict
    set_columns(run, initial_chosen=None, initial_rejected=None)
    assert _told(run).verdict == before


def test_a_run_from_another_adapter_without_its_start_says_so(run, set_columns) -> None:
    set_columns(run, initial_chosen=None, initial_rejected=None)
    recipe = (run / "recipe.yaml").read_text()
    changed = re.sub(r"adapter:\n(  .*\n)*", "adapter: {start: sft, reference: base}\n", recipe)
    (run / "recipe.yaml").write_text(changed)
    sections = _sections(report_run(run))
    assert "start were not kept" in sections["preferences"].missing[0]
    assert [plot.name for plot in sections["preferences"].plots] == ["preferences-end"]


def test_a_run_without_texts_says_how_to_get_them(run, set_columns) -> None:
    set_columns(run, prompt=None, chosen=None, rejected=None)
    section = _sections(_told(run))["texts"]
    assert section.exhibits == ()
    assert "pe-dpo eval" in section.missing[0]


def test_ties_are_counted_apart(run, set_columns) -> None:
    set_columns(run, policy_chosen=lambda old: [-5.0, *old[1:]], policy_rejected=lambda old: [-5.0, *old[1:]])
    section = _sections(report_run(run))["preferences"]
    assert "1 more pair is tied" in next(plot for plot in section.plots if plot.name == "transitions-sum").caption


def test_a_single_pair_is_enough(run, set_columns, parse) -> None:
    columns = parquet.read_table(run / "eval_pairs.parquet").column_names
    set_columns(run, **{name: lambda old: old[:1] for name in columns})
    content = report_run(run)
    sections = [one if one.name in ("preferences", "length") else one._replace(plots=[]) for one in content.sections]
    page = parse(to_html(content._replace(sections=sections)))
    assert not re.search(r"\bnan\b", page.text)


def test_texts_of_any_kind_stay_text(run, set_columns, parse) -> None:
    nasty = "</script><script>alert(1)</script>\"'\x00\u202eabc\n" + "long " * 300
    set_columns(run, chosen=lambda old: [nasty] * len(old))
    content = _told(run)
    page = parse(to_html(content._replace(sections=[_sections(content)["texts"]])))
    assert "script" not in page.by_tag
    assert any(nasty.replace("\x00", "␀").replace("\u202e", "⟨U+202E⟩") in text for text in page.by_tag["details"])


@pytest.mark.parametrize("gamma", ["0x", "1x"])
def test_runs_without_a_reference_in_the_loss_and_plain_dpo_have_their_line(tmp_path, gamma: str) -> None:
    import fake_runs

    setting = {"loss.gamma": gamma, "loss.beta": 0.1, "loss.margin": 0.5}
    run = fake_runs.write_run(tmp_path / "run", setting, fake_runs.make_world(), samples=0, snapshots=0, steps=1)
    plots = {plot.name: plot for section in report_run(run).sections for plot in section.plots}
    labels = [text.get_text() for text in plots["preferences-end"].figure.legends[0].get_texts()]
    assert labels[-1] == {"0x": "z = 0: Δπ = 5", "1x": "z = 0: Δπ = 1·Δ0 + 5"}[gamma]


def test_the_line_runs_where_the_score_is_zero(run) -> None:
    """Of each pair, above the line ⇔ z > 0."""
    pairs = {key: np.asarray(value) for key, value in parquet.read_table(run / "eval_pairs.parquet").to_pydict().items()}
    plot = next(plot for plot in _sections(report_run(run))["preferences"].plots if plot.name == "preferences-end")
    above = int((pairs["score"] >= 0).sum())
    assert f"{above} lie on or above the line" in plot.caption
    line = plot.figure.axes[0].lines[-1]
    reference = (pairs["reference_chosen"] - pairs["reference_rejected"])[0]
    policy = (pairs["policy_chosen"] - pairs["policy_rejected"])[0]
    at = np.interp(reference, line.get_xdata(), line.get_ydata())
    assert pairs["score"][0] == pytest.approx(0.01 * (policy - at), abs=1e-6)


@pytest.mark.parametrize("status", ["starting", "training", "interrupted"])
def test_an_unfinished_run_is_reported_as_such(tmp_path, status: str, set_record) -> None:
    import fake_runs

    run = fake_runs.write_run(tmp_path / "run", {"loss.beta": 0.1}, fake_runs.make_world(), finished=False, steps=1)
    set_record(run, status=status)
    content = _told(run)
    assert content.verdict.startswith(f"This run is not finished (status: {status}")
    assert "--resume" in next(section for section in content.sections if section.name == "outcome").missing[0]


def test_a_run_that_has_only_begun_gives_a_page(run, set_record) -> None:
    for path in (*run.glob("*.parquet"), run / "metrics.jsonl", run / "evaluation.json"):
        path.unlink()
    (run / "run.json").write_text('{"status": "failed", "why": "out of memory"}')
    written = write_report(run, run / "report.html", run / "report")
    assert "status: failed: out of memory" in written.verdict
    assert "status: failed: out of memory" in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_failed_before_its_gamma_was_found_gives_a_page(tmp_path) -> None:
    import fake_runs

    recipe = fake_runs.make_recipe({"loss.gamma": "auto"}, output=tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    (tmp_path / "run.json").write_text('{"status": "failed", "why": "no gamma fits"}')
    page = report_run(tmp_path)
    assert "no gamma fits" in page.verdict
    assert "κ = γ/β" not in dict(_sections(page)["trained"].facts)


def test_a_gamma_from_the_data_is_said_with_its_interval(run, set_record) -> None:
    set_record(run, gamma_calibration={"asked": "auto", "gamma": 0.0374, "interval": [0.0, 0.2012], "evidence": {"bits": 0.01}})
    (trained,) = (section for section in _told(run).sections if section.name == "trained")
    assert ("γ from data", "auto: γ = 0.0374 [0, 0.2012]") in trained.facts


def test_the_strength_that_mixout_had_is_shown(run, set_record) -> None:
    set_record(run, mixout={"margin_noise": 0.3149, "pairs": 16, "masks": 16})
    (trained,) = (section for section in _told(run).sections if section.name == "trained")
    assert "; a mask moves a score by 0.31 of what training moved it" in dict(trained.facts)["Mixout"]


def test_alarms_come_first(run, set_record, parse) -> None:
    set_record(run, remarks=["both answers became less likely <i>"])
    content = _told(run)
    assert content.alarms == ["Warning: both answers became less likely <i>"]
    page = parse(to_html(content._replace(sections=[])))
    assert page.by_tag["p"][0] == content.alarms[0]
    assert "Nothing looked off" not in " ".join(content.remarks)


@pytest.mark.parametrize(("name", "content"), [
    ("run.json", "{"), ("run.json", "[1]"), ("evaluation.json", "nonsense"),
    ("evaluation.json", '{"generation": 3}'), ("evaluation.json", '{"pairs": [1]}'), ("eval_pairs.parquet", "PAR1 torn"),
    ("generations.parquet", ""), ("metrics.jsonl", "{broken}\n{}\n"),
])  # fmt: skip
def test_a_torn_file_is_named(run, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(UsageError, match=re.escape(str(run / name))):
        _told(run)


def test_a_last_line_that_a_kill_cut_off_is_left_out(run) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss": 1')
    assert _told(run).verdict


def test_a_folder_that_is_no_run_is_refused_with_a_hint(tmp_path) -> None:
    with pytest.raises(UsageError, match="neither a run"):
        _told(tmp_path)


def test_a_dense_scatter_is_drawn_as_an_image(tmp_path) -> None:
    import fake_runs

    run = fake_runs.write_run(
        tmp_path / "run", {"loss.beta": 0.1}, fake_runs.make_world(1000, 1000), samples=0, snapshots=0, steps=1
    )
    plot = next(plot for plot in _sections(report_run(run))["preferences"].plots if plot.name == "preferences-end")
    svg = to_svg(plot.figure)
    assert b"<image " in svg
    assert len(svg) < 100_000  # 150,000 with a path for each


def test_a_report_reads_the_metrics_once(run, monkeypatch) -> None:
    """5,000 steps took a minute when each of 70 curves read them anew."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    read = []
    original = json.loads

    def loads(text, **options):
        read.append(text)
        return original(text, **options)

    monkeypatch.setattr("pe_dpo.runs.run.json.loads", loads)
    _told(run)
    assert sum(text.strip() == lines[0].encode() for text in read) == 1

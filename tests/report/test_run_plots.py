"""The numbers that a run's plots show are those of its files, by hand or by another library."""

import json
import math

import numpy as np
import pytest
from pyarrow import parquet
from scipy import stats

from pe_dpo.report.run_report import report_run

QUADRANTS = ("policy_right_reference_right", "policy_right_reference_wrong", "policy_wrong_reference_right",
             "policy_wrong_reference_wrong")  # fmt: skip


@pytest.fixture(scope="module")
def plots(whole_run):
    return {plot.name: plot for plot in report_run(whole_run).plots}


@pytest.fixture(scope="module")
def metrics(whole_run):
    return [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs(whole_run):
    table = parquet.read_table(whole_run / "eval_pairs.parquet").to_pydict()
    return {name: np.asarray(values) for name, values in table.items()}


def delta(pairs, model):
    return pairs[f"{model}_chosen"] - pairs[f"{model}_rejected"]


def drawn(plot):
    """Lines with a label, x and y, by label."""
    (axes,) = plot.figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def written(metrics, key):
    """Steps and values of a metric in metrics.jsonl."""
    found = {line["step"]: line[key] for line in metrics if key in line}
    return list(found), list(found.values())


def error_bars(plot):
    """Half-heights of the error bars of a plot with one line of them, in their order."""
    (axes,) = plot.figure.axes
    (segments,) = [part.get_segments() for part in axes.collections]
    return [(high - low) / 2 for (_, low), (_, high) in segments]


@pytest.mark.parametrize(("name", "label", "key"), [
    ("loss", "loss, training", "loss"), ("loss", "loss, held out", "eval_loss"),
    ("reward-accuracy", "accuracy, training", "rewards/accuracies"),
    ("reward-accuracy", "accuracy, held out", "eval_rewards/accuracies"),
    ("policy-accuracy", "summed, held out", "eval_accuracy/policy"),
    ("policy-accuracy", "per token, held out", "eval_accuracy/policy_per_token"),
    ("displacement", "chosen, training", "displacement/chosen"),
    ("displacement", "rejected, held out", "eval_displacement/rejected"),
])  # fmt: skip
def test_a_line_over_steps_is_the_metric_as_it_was_logged(plots, metrics, name, label, key) -> None:
    assert drawn(plots[name])[label] == written(metrics, key)


def test_the_caption_has_the_ends_of_the_lines(plots, metrics) -> None:
    _, values = written(metrics, "eval_loss")
    assert f"loss, held out: {values[0]:.3f} → {values[-1]:.3f}" in plots["loss"].caption


def test_bars_of_an_accuracy_are_wilsons(plots, metrics) -> None:
    """By hand, n what the pairs are worth: (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), never beyond 0 and 1."""
    _, shares = written(metrics, "eval_rewards/accuracies")
    _, worth = written(metrics, "eval_pairs_worth/rewards/accuracies")
    z, n, shares = 1.959964, np.asarray(worth), np.asarray(shares)
    (axes,) = plots["reward-accuracy"].figure.axes
    (segments,) = [part.get_segments() for part in axes.collections]
    half = z * np.sqrt(shares * (1 - shares) / n + z * z / (4 * n * n))
    for sign, at in ((-1, 0), (1, 1)):
        ends = (shares + z * z / (2 * n) + sign * half) / (1 + z * z / n)
        assert [segment[at][1] for segment in segments] == pytest.approx(ends, rel=1e-5)
    assert axes.get_ylim() == plots["policy-accuracy"].figure.axes[0].get_ylim() == (0, 1)


def test_a_run_is_told_loss_first_then_where_likelihood_went(plots) -> None:
    """As papers on DPO have it; six areas come later."""
    assert list(plots)[:4] == ["loss", "displacement", "reward-accuracy", "policy-accuracy"]
    assert list(plots).index("regimes-pairs-sum") > 3


def test_stacked_areas_are_shares_of_the_pairs(plots, metrics) -> None:
    (axes,) = plots["regimes-pairs-sum"].figure.axes
    lines = [line for line in metrics if "eval_loss" in line]
    expected = np.cumsum([[line[f"eval_regimes/{name}/pairs"] / 60 for line in lines] for name in QUADRANTS], axis=0)
    for area, top in zip(axes.collections, expected, strict=True):
        corners = area.get_paths()[0].vertices
        highest = [max(y for x, y in corners if x == line["step"]) for line in lines]
        assert highest == pytest.approx(list(top))


def test_kl_is_that_of_the_snapshots_and_the_end_with_95_percent(whole_run, plots) -> None:
    folders = [*sorted(whole_run.glob("snapshots/step-*")), whole_run]
    found = [json.loads((folder / "evaluation.json").read_text())["generation"]["kl"] for folder in folders]
    assert drawn(plots["kl"])["KL(π‖π0) ± 95 %"] == ([0, 4, 8, 12], [0.0, *(kl["mean"] for kl in found)])
    assert error_bars(plots["kl"]) == pytest.approx([0.0, *(1.96 * kl["standard_error"] for kl in found)])


def test_every_pair_is_a_point_in_the_colour_of_its_quadrant(plots, pairs) -> None:
    policy, reference = delta(pairs, "policy"), delta(pairs, "reference")
    (axes,) = plots["preferences-end"].figure.axes
    points = {part.get_label(): part.get_offsets() for part in axes.collections}
    right, lost = (policy > 0) & (reference > 0), (policy < 0) & (reference > 0)
    assert sorted(points["both right"].tolist()) == sorted(np.c_[reference, policy][right].tolist())
    assert len(points["lost: only π0 right"]) == lost.sum() > 0
    assert sum(map(len, points.values())) == 60


def test_start_and_end_have_the_same_axes_and_hold_all_pairs(plots, pairs) -> None:
    start, end = (plots[f"preferences-{when}"].figure.axes[0] for when in ("start", "end"))
    assert (start.get_xlim(), start.get_ylim()) == (end.get_xlim(), end.get_ylim())
    low, high = end.get_ylim()
    values = np.concatenate([delta(pairs, "policy"), delta(pairs, "initial")])
    assert low < values.min() < values.max() < high


@pytest.mark.parametrize(("name", "per_token"), [("transitions-sum", False), ("transitions-per-token", True)])
def test_the_two_by_two_table_counts_pairs(plots, pairs, name, per_token) -> None:
    def right(model):
        parts = [pairs[f"{model}_{side}"] / (pairs[f"{side}_lengths"] if per_token else 1) for side in ("chosen", "rejected")]
        return parts[0] > parts[1]

    start, end = right("initial"), right("policy")
    expected = {"kept": start & end, "lost": start & ~end, "gained": ~start & end, "still wrong": ~start & ~end}
    texts = [text.get_text() for text in plots[name].figure.axes[0].texts]
    shown = dict(zip(texts[1::2], map(int, texts[::2]), strict=True))
    assert shown == {word: int(member.sum()) for word, member in expected.items()}


def test_the_correlation_with_length_has_fishers_interval(plots, pairs) -> None:
    difference = pairs["chosen_lengths"] - pairs["rejected_lengths"]
    shift = delta(pairs, "policy") - delta(pairs, "initial")
    found = stats.pearsonr(difference, shift)
    low, high = found.confidence_interval(0.95)
    expected = f"{found.statistic:+.2f} [{low:+.2f}, {high:+.2f}]; length explains {found.statistic**2:.0%}".replace("-", "−")
    assert f"Correlation with tokens of chosen − rejected: {expected} of what" in plots["length-shift"].caption
    slope = stats.linregress(difference, shift).slope
    (line,) = (line for line in plots["length-shift"].figure.axes[0].lines if "least squares" in str(line.get_label()))
    assert np.diff(line.get_ydata())[0] / np.diff(line.get_xdata())[0] == pytest.approx(slope)


def test_lengths_are_shares_of_each_group(whole_run, plots, pairs) -> None:
    (axes,) = plots["lengths"].figure.axes
    outlines = {str(patch.get_label()): patch.get_data() for patch in axes.patches if patch.get_label()}
    sampled = parquet.read_table(whole_run / "generations.parquet").to_pydict()
    groups = {"chosen": pairs["chosen_lengths"], "rejected": pairs["rejected_lengths"],
              "sampled from π": sampled["tokens"], "sampled from π0": sampled["reference_tokens"]}  # fmt: skip
    assert [label for label in outlines if not label.startswith("_")] == list(groups)
    for label, lengths in groups.items():
        assert outlines[label].values.sum() == pytest.approx(1)
        edges, values = outlines[label].edges, outlines[label].values
        assert values[0] == pytest.approx(np.mean(np.asarray(lengths) < edges[1]))
        assert f"{label} {np.mean(lengths):.1f}" in plots["lengths"].caption


def test_a_run_that_wrote_nothing_says_of_every_part_why_it_is_not_there(run) -> None:
    for path in (*run.glob("*.parquet"), *run.glob("snapshots/*/*"), run / "metrics.jsonl", run / "evaluation.json"):
        path.unlink()
    (run / "run.json").write_text('{"status": "starting"}')
    content = report_run(run)
    assert content.plots == []
    missing = {section.name: section.missing for section in content.sections if section.missing}
    assert set(missing) == {section.name for section in content.sections} - {"trained"}
    for name in ("regimes", "learning"):
        assert missing[name] == ["the run wrote no metrics yet (metrics.jsonl)."]


@pytest.mark.slow
def test_a_failed_run_shows_how_far_it_came_and_why_it_failed(run, set_record) -> None:
    set_record(run, status="failed", why="the loss is not finite", after=None)
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in text if json.loads(line)["step"] <= 7))
    content = report_run(run)
    assert content.verdict == (
        "This run is not finished (status: failed: the loss is not finite, last step written: 7); what follows is what it left "
        "so far."
    )
    plots = {plot.name: plot for plot in content.plots}
    assert drawn(plots["loss"])["loss, training"][0] == list(range(1, 8))


def test_values_that_are_not_finite_are_left_out_of_a_line(run) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[3]["loss"] = math.nan
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plots = {plot.name: plot for plot in report_run(run).plots}
    steps, values = drawn(plots["loss"])["loss, training"]
    assert lines[3]["step"] not in steps
    assert all(map(math.isfinite, values))

"""The curves of one run over its steps: which pairs drive the learning, where likelihood went, loss and accuracy, drift."""

import shlex
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from pe_dpo.metrics.catalogue import METRICS, WORTH
from pe_dpo.metrics.estimates import wilson_interval
from pe_dpo.metrics.quadrants import QUADRANTS
from pe_dpo.metrics.table import PairTable
from pe_dpo.report.content import PageSection, Plot
from pe_dpo.report.style import (
    BLUE,
    GREEN,
    MARKERS,
    PAPER,
    PURPLE,
    QUADRANT_COLOURS,
    QUADRANT_LABELS,
    QUIET,
    VERMILLION,
    fmt,
    panel,
)
from pe_dpo.runs.run import Curve, Run


class Line(NamedTuple):
    """A metric over steps, as it is drawn."""

    label: str
    curve: Curve
    colour: str
    marker: str = MARKERS[0]
    is_training: bool = False
    """Whether it is of training windows: thin and pale, since other pairs are seen in each; else a line with markers."""
    intervals: Sequence[tuple[float, float]] | None = None
    """Both ends at each step; NaN where unknown."""
    key: str = ""
    """Of the metric."""


def over_steps(lines: Sequence[Line], ylabel: str, *, level: float | None = None, is_share: bool = False) -> Figure:
    """Return metrics over optimizer steps.

    Args:
        lines: at least one with at least one point.
        ylabel: what is on the y axis, with its unit.
        level: where to draw a thin line that means "nothing", as 0 or ½.
        is_share: whether the axis is that of a share, from 0 to 1.
    """
    with panel("optimizer step", ylabel, has_whole_x=True) as (figure, axes):
        if level is not None:
            axes.axhline(level, color=QUIET, linewidth=1, linestyle=":")
        for line in lines:
            if line.is_training:
                axes.plot(*line.curve, color=line.colour, linewidth=1.0, alpha=0.6, label=line.label)
                continue
            marker = line.marker if len(line.curve.steps) <= 40 else ""
            axes.plot(*line.curve, color=line.colour, marker=marker, label=line.label)
            if line.intervals is not None:
                ends = np.nan_to_num(np.abs(np.transpose(line.intervals) - np.asarray(line.curve.values)))
                axes.errorbar(*line.curve, yerr=ends, color=line.colour, fmt="none", capsize=2.5, linewidth=1)
        if is_share:
            axes.set_ylim(0, 1)
            for artist in (*axes.lines, *axes.collections):  # a marker at 1 is whole
                artist.set_clip_on(False)
    return figure


def regime_section(run: Run, pairs: PairTable | None) -> PageSection:
    """Return which of the four quadrants hold the pairs and the gradient weight, over steps."""
    title = "Which pairs drive the learning"
    plots = []
    watched = "held-out pairs" if run.has_held_out else "watched training pairs"
    for prefix, name, words in (
        ("regimes", "sum", "summed log-probs"),
        ("regimes_per_token", "per-token", "log-probs per token"),
        ("regimes_length_matched", "length-matched", "summed log-probs as if answers were of equal length"),
    ):
        for kind, ylabel in (("pairs", "share of pairs"), ("weight_share", "share of gradient weight")):
            source, (steps, shares) = watched, _quadrant_shares(run, f"watched/{prefix}", "watched/pairs", kind)
            if len(steps) < 2:
                source, (steps, shares) = "pairs of each training window", _quadrant_shares(run, prefix, "pairs", kind)
            if len(steps) < 2:
                continue
            with panel("optimizer step", ylabel, has_whole_x=True) as (figure, axes):
                labels, colours = list(QUADRANT_LABELS.values()), list(QUADRANT_COLOURS.values())
                axes.stackplot(
                    steps, *shares.values(), colors=colours, alpha=0.85, labels=labels, edgecolor=PAPER, linewidth=0.6
                )
                axes.set_xlim(steps[0], steps[-1])
                axes.set_ylim(0, 1)
                axes.grid(False)
            ends = ", ".join(
                f"{QUADRANT_LABELS[key].partition(':')[0]} {share[0]:.0%} → {share[-1]:.0%}" for key, share in shares.items()
            )
            plots.append(
                Plot(
                    f"regimes-{kind.removesuffix('_share')}-{name}",
                    figure,
                    f"{ylabel.capitalize()} by {words}, {source}. From the first to the last step: {ends}.",
                    f"Stacked areas over steps {steps[0]} to {steps[-1]}, {ylabel} of four quadrants by {words}: {ends}.",
                )
            )
    if not plots:
        return PageSection("regimes", title, missing=[_no_regimes(run, pairs)], is_folded=True)
    sentences = [
        "Every pair is in one of four quadrants: policy π right or wrong, reference π0 right or wrong (right: chosen is "
        "likelier than rejected). The share of pairs says where they are, the share of gradient weight where the loss still "
        "pulls. By summed log-probs the quadrants mostly measure length, so they are shown per token too, and with the "
        "reference's slope on length taken off both preferences.",
    ]
    return PageSection("regimes", title, sentences, plots=plots, is_folded=True)


def _quadrant_shares(run: Run, prefix: str, pairs: str, kind: str) -> tuple[list[int], dict[str, list[float]]]:
    """The steps at which all quadrants were measured, and the share of each in pairs or in gradient weight, by QUADRANTS."""
    found = {key: dict(zip(*run.curve(f"{prefix}/{key}/{kind}"), strict=True)) for key in QUADRANTS}
    total = dict(zip(*run.curve(pairs), strict=True))
    steps = sorted(set.intersection(set(total), *(set(values) for values in found.values())))
    divisor = total if kind == "pairs" else dict.fromkeys(steps, 1.0)
    return steps, {key: [values[step] / divisor[step] for step in steps] for key, values in found.items()}


def _no_regimes(run: Run, pairs: PairTable | None) -> str:
    if not run.curve("step").steps:
        return "the run wrote no metrics yet (metrics.jsonl)."
    if run.kappa == 0 and pairs is None:
        return "with gamma 0 the reference is not run in training, and no pairs were held out; set data.eval and train again."
    return "regimes were measured at fewer than two steps; set train.eval_every to measure held-out pairs more often."


def sampling_command(run: Run) -> str:
    """Return what samples answers of the run as it is: without pairs of its own it has to be told whose prompts to take."""
    has_no_pairs = run.info.pairs.get("held_out") == 0
    return shlex.join(["pe-dpo", "eval", str(run.folder), "--prompts", "64", *(["--data", "FILE"] if has_no_pairs else [])])


def learning_section(run: Run, pairs: PairTable | None) -> PageSection:
    """Return over steps the loss, where the likelihood of both answers went, and accuracies: of training and of held-out pairs.

    Args:
        run: whose curves they are.
        pairs: held out, if any.
    """
    counts = dict(zip(*run.curve("watched/pairs"), strict=True))
    policy = _lines(run, "accuracy/policy", "summed", PURPLE, MARKERS[2])
    policy += _lines(run, "accuracy/policy_per_token", "per token", BLUE, MARKERS[3])
    policy = [line for line in policy if not line.is_training] or policy
    plots, missing = [], []
    for name, ylabel, level, lines, words in (
        (
            "loss",
            "loss per pair",
            None,
            _lines(run, "loss", "loss", BLUE, MARKERS[0]),
            "Loss. Thin: pairs of each step; marked: the same held-out pairs every time.",
        ),
        (
            "displacement",
            "log π − log π0, nats per answer",
            0.0,
            [
                *_lines(run, "displacement/chosen", "chosen", BLUE, MARKERS[0]),
                *_lines(run, "displacement/rejected", "rejected", VERMILLION, MARKERS[1]),
            ],
            "Where the likelihood went: mean change of the log-prob of chosen and rejected answers against the reference, the "
            "figure known from papers on DPO. If both fall, likelihood went to answers that are in no pair.",
        ),
        (
            "reward-accuracy",
            METRICS["rewards/accuracies"].title,
            0.5,
            _lines(run, "rewards/accuracies", "accuracy", GREEN, MARKERS[2]),
            "Reward accuracy: share of pairs whose chosen answer has the larger implicit reward.",
        ),
        (
            "policy-accuracy",
            "accuracy",
            0.5,
            policy,
            "Accuracy of the policy itself: share of pairs with Δπ > 0, by summed log-probs and per token.",
        ),
    ):
        if not lines or (name == "displacement" and not any(len(line.curve.steps) > 1 for line in lines)):
            missing += [_no_regimes(run, pairs)] if name == "displacement" else []
            continue
        is_share, bars = METRICS[lines[0].key].is_share, ""
        for at, line in enumerate(lines if is_share else []):
            if not line.is_training:
                worth = counts | dict(zip(*run.curve(f"watched/{WORTH}{line.key}"), strict=True))
                ends = [wilson_interval(share, worth.get(step, 0)) for step, share in zip(*line.curve, strict=True)]
                lines[at] = line._replace(intervals=ends)
                bars = " Bars: 95 %, of each step by itself; between steps the pairs are the same."
        form = "+.2f" if name == "displacement" else ".3f"
        first_last = "; ".join(
            f"{line.label}: {fmt(line.curve.values[0], form)} → {fmt(line.curve.values[-1], form)}" for line in lines
        )
        words = f"{words} First → last: {first_last}."
        fell = run.curve("watched/displacement/chosen_fell").values
        if name == "displacement" and fell:
            words += f" {fell[-1]:.0%} of the held-out chosen answers became less likely than under π0."
        figure = over_steps(lines, ylabel, level=level, is_share=is_share)
        plots.append(Plot(name, figure, f"{words}{bars}", f"Lines over steps. {words}"))
    if not plots:
        missing = ["the run wrote no metrics yet (metrics.jsonl)."]
    return PageSection("learning", "Loss, likelihood and accuracy over the steps", plots=plots, missing=missing)


def drift_section(run: Run) -> PageSection:
    """Return KL from the reference and entropy along the run, where answers were sampled."""
    states = {state.step: state for state in (*run.snapshots, run) if state.step}
    kl, entropy = (
        [(step, *found) for step, state in states.items() if (found := state.estimate(name))]
        for name in ("kl", "entropy_per_token")
    )
    plots = []
    if kl:
        line = _measured_line("KL(π‖π0) ± 95 %", [(0, 0.0, 0.0), *kl], BLUE, MARKERS[0])
        end = f"{line.curve.values[-1]:.3g} nats"
        plots.append(
            Plot(
                "kl",
                over_steps([line], "KL(π‖π0), nats per answer"),
                f"KL(π‖π0) on sampled answers, 0 by definition at the start; at the end {end} each.",
                f"Line of KL over steps, from 0 to {end} per answer.",
            )
        )
    if len(entropy) >= 2:
        line = _measured_line("entropy of π", entropy, PURPLE, MARKERS[3])
        ends = f"from {line.curve.values[0]:.3g} to {line.curve.values[-1]:.3g} nats per token"
        plots.append(
            Plot(
                "entropy",
                over_steps([line], "entropy, nats per token"),
                "Entropy of the policy on its own answers; falling entropy means that it says the same more often. "
                f"{ends.capitalize()}.",
                f"Line of the entropy over steps, {ends}.",
            )
        )
    missing = []
    if not kl:
        missing.append(
            "KL(π‖π0) and entropy need answers of the policy; set generation.prompts (say 64) and train again, or measure the "
            f"end alone: `{sampling_command(run)}`"
        )
    elif len(kl) == 1:
        missing.append("the way between start and end was not measured; set generation.snapshots (say 4) and train again.")
    return PageSection("drift", "Distance from the reference", plots=plots, missing=missing, is_folded=not plots)


def _measured_line(label: str, found: Sequence[tuple[int, float, float]], colour: str, marker: str) -> Line:
    """The line through steps, means and their standard errors, of what cannot be below 0."""
    steps, means, errors = (list(column) for column in zip(*found, strict=True))
    ends = [(max(0.0, mean - 1.96 * error), mean + 1.96 * error) for mean, error in zip(means, errors, strict=True)]
    return Line(label, Curve(steps, means), colour, marker, intervals=ends)


def _lines(run: Run, key: str, label: str, colour: str, marker: str) -> list[Line]:
    """A metric on training windows and on the pairs that were measured again and again, where measured."""
    training, probe = run.curve(key), run.curve(f"watched/{key}")
    lines = [Line(f"{label}, training", training, colour, is_training=True, key=key)] if training.steps else []
    where = "held out" if run.has_held_out else "watched"
    return lines + ([Line(f"{label}, {where}", probe, colour, marker, key=key)] if probe.steps else [])

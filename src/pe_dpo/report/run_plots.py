"""The plots of one run: which pairs drive the learning, policy against reference, likelihood, loss, drift and length."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from pe_dpo.metrics.estimates import correlation, correlation_interval, length_slope, wilson_interval
from pe_dpo.metrics.quadrants import QUADRANTS
from pe_dpo.metrics.table import Floats, Model, PairTable
from pe_dpo.report.content import PageSection, Plot
from pe_dpo.report.style import (
    BLUE,
    GREEN,
    INK,
    MARKERS,
    ORANGE,
    PAPER,
    PURPLE,
    QUIET,
    SKY,
    VERMILLION,
    fmt,
    panel,
    scatter_points,
)
from pe_dpo.runs.run import Curve, Run

NO_PAIRS = "held-out pairs were not measured one by one (eval_pairs.parquet); set data.eval and train again."

_QUADRANT_SHORT = dict(zip(QUADRANTS, ("both right", "gained", "lost", "both wrong"), strict=True))
_QUADRANT_LABELS = dict(
    zip(QUADRANTS, ("both right", "gained: only π right", "lost: only π0 right", "both wrong"), strict=True)
)
_QUADRANT_COLOURS = dict(zip(QUADRANTS, (BLUE, SKY, ORANGE, VERMILLION), strict=True))


class Line(NamedTuple):
    """A metric over steps, as it is drawn."""

    label: str
    curve: Curve
    colour: str
    marker: str = MARKERS[0]
    is_training: bool = False
    """Whether it is of training windows: thin and pale, since other pairs are seen in each; else a line with markers."""
    errors: Sequence[float] | None = None
    """Half-widths of intervals; NaN where unknown."""


def over_steps(lines: Sequence[Line], ylabel: str, *, level: float | None = None) -> Figure:
    """Return metrics over optimizer steps.

    Args:
        lines: at least one with at least one point.
        ylabel: what is on the y axis, with its unit.
        level: where to draw a thin line that means "nothing", as 0 or ½.
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
            if line.errors is not None:
                errors = np.nan_to_num(np.asarray(line.errors))
                axes.errorbar(*line.curve, yerr=errors, color=line.colour, fmt="none", capsize=2.5, linewidth=1)
    return figure


def length_scatter(difference: Floats, preference: Floats, ylabel: str, label: str) -> Figure:
    """Return a preference against the difference in length, with the line of least squares if it has one.

    Args:
        difference: tokens of the chosen minus tokens of the rejected answer, (N,).
        preference: Δ of a model, or how far it moved, (N,).
        ylabel: what is on the y axis, with its unit.
        label: what a point is.
    """
    with panel("tokens of chosen − tokens of rejected", ylabel, has_whole_x=True) as (figure, axes):
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.axvline(0, color=QUIET, linewidth=0.8)
        scatter_points(axes, difference, preference, BLUE, label, total=len(preference))
        if len(preference) > 2 and np.ptp(difference) > 0:
            slope, ends = length_slope(preference, difference), np.asarray([difference.min(), difference.max()])
            line = preference.mean() + slope * (ends - difference.mean())
            axes.plot(ends, line, color=VERMILLION, label=f"least squares: {fmt(slope, '+.3g')} nats per token")
    return figure


# ---------------------------------------------------------------- over steps


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
                labels, colours = list(_QUADRANT_LABELS.values()), list(_QUADRANT_COLOURS.values())
                axes.stackplot(
                    steps, *shares.values(), colors=colours, alpha=0.85, labels=labels, edgecolor=PAPER, linewidth=0.6
                )
                axes.set_xlim(steps[0], steps[-1])
                axes.set_ylim(0, 1)
                axes.grid(False)
            ends = ", ".join(f"{_QUADRANT_SHORT[key]} {share[0]:.0%} → {share[-1]:.0%}" for key, share in shares.items())
            plots.append(
                Plot(
                    f"regimes-{kind.removesuffix('_share')}-{name}",
                    figure,
                    f"{ylabel.capitalize()} by {words}, {source}. From the first to the last step: {ends}.",
                    f"Stacked areas over steps {steps[0]} to {steps[-1]}, {ylabel} of four quadrants by {words}: {ends}.",
                )
            )
    if not plots:
        return PageSection("regimes", title, missing=[_no_regimes(run, pairs)])
    sentences = [
        "Every pair is in one of four quadrants: policy π right or wrong, reference π0 right or wrong (right: chosen is "
        "likelier than rejected). The share of pairs says where they are, the share of gradient weight where the loss still "
        "pulls. By summed log-probs the quadrants mostly measure length, so they are shown per token too, and with the "
        "reference's slope on length taken off both preferences.",
    ]
    return PageSection("regimes", title, sentences, plots=plots)


def _quadrant_shares(run: Run, prefix: str, pairs: str, kind: str) -> tuple[list[int], dict[str, list[float]]]:
    """The steps at which all quadrants were measured, and the share of each in pairs or in gradient weight, by QUADRANTS."""
    found = {key: dict(zip(*run.curve(f"{prefix}/{key}/{kind}"), strict=True)) for key in QUADRANTS}
    total = dict(zip(*run.curve(pairs), strict=True))
    steps = sorted(set.intersection(set(total), *(set(values) for values in found.values())))
    divisor = total if kind == "pairs" else dict.fromkeys(steps, 1.0)
    return steps, {key: [values[step] / divisor[step] for step in steps] for key, values in found.items()}


def _no_regimes(run: Run, pairs: PairTable | None) -> str:
    if not run.metrics:
        return "the run wrote no metrics yet (metrics.jsonl)."
    if run.kappa == 0 and pairs is None:
        return "with gamma 0 the reference is not run in training, and no pairs were held out; set data.eval and train again."
    return "regimes were measured at fewer than two steps; set train.eval_every to measure held-out pairs more often."


def sampling_command(run: Run) -> str:
    """Return what samples answers of the run as it is: without pairs of its own it has to be told whose prompts to take."""
    has_no_pairs = run.info.pairs.get("held_out") == 0
    return shlex.join(["pe-dpo", "eval", str(run.folder), "--prompts", "64", *(["--data", "FILE"] if has_no_pairs else [])])


def movement_section(run: Run, pairs: PairTable | None) -> PageSection:
    """Return how far the likelihood of chosen and rejected answers moved from the reference, over steps."""
    title = "Where the likelihood went"
    lines = [
        *_lines(run, "displacement/chosen", "chosen", BLUE, MARKERS[0]),
        *_lines(run, "displacement/rejected", "rejected", VERMILLION, MARKERS[1]),
    ]
    if not any(len(line.curve.steps) > 1 for line in lines):
        return PageSection("movement", title, missing=[_no_regimes(run, pairs)])
    ends = ", ".join(f"{line.label} {fmt(line.curve.values[-1], '+.2f')} nats" for line in lines)
    fell = run.curve("watched/displacement/chosen_fell").values
    plot = Plot(
        "displacement",
        over_steps(lines, "log π − log π0, nats per answer", level=0),
        "Mean change of the log-prob of chosen and rejected answers against the reference. If both fall, likelihood went to "
        f"answers that are in no pair. At the end: {ends}"
        + (f"; {fell[-1]:.0%} of the held-out chosen answers became less likely than under π0." if fell else "."),
        f"Lines over steps of log π − log π0 of chosen and rejected answers; at the end {ends}.",
    )
    return PageSection("movement", title, plots=[plot])


def learning_section(run: Run) -> PageSection:
    """Return loss and accuracies over steps, on training windows and on the fixed held-out pairs."""
    loss = _lines(run, "loss", "loss", BLUE, MARKERS[0])
    reward = _lines(run, "rewards/accuracies", "accuracy", GREEN, MARKERS[2])
    policy = _lines(run, "accuracy/policy", "summed", PURPLE, MARKERS[2])
    policy += _lines(run, "accuracy/policy_per_token", "per token", BLUE, MARKERS[3])
    policy = [line for line in policy if not line.is_training] or policy
    pairs = dict(zip(*run.curve("watched/pairs"), strict=True))
    plots = []
    for name, ylabel, lines, words in (
        ("loss", "loss per pair", loss, "Loss. Thin: pairs of each step; marked: the same held-out pairs every time."),
        (
            "reward-accuracy",
            "share of pairs",
            reward,
            "Reward accuracy: share of pairs whose chosen answer has the larger implicit reward.",
        ),
        (
            "policy-accuracy",
            "share of pairs",
            policy,
            "Accuracy of the policy itself: share of pairs with Δπ > 0, by summed log-probs and per token.",
        ),
    ):
        if not lines:
            continue
        level, bars = (None, "") if name == "loss" else (0.5, "")
        for at, line in enumerate(lines if level else []):
            if not line.is_training:
                intervals = [wilson_interval(share, int(pairs.get(step, 0))) for step, share in zip(*line.curve, strict=True)]
                lines[at] = line._replace(errors=[(high - low) / 2 for low, high in intervals])
                bars = " Bars: 95 %, of each step by itself; between steps the pairs are the same."
        ends = "; ".join(f"{line.label}: {line.curve.values[0]:.3f} → {line.curve.values[-1]:.3f}" for line in lines)
        words = f"{words} First → last: {ends}."
        plots.append(Plot(name, over_steps(lines, ylabel, level=level), f"{words}{bars}", f"Lines over steps. {words}"))
    missing = [] if plots else ["the run wrote no metrics yet (metrics.jsonl)."]
    return PageSection("learning", "Loss and accuracy", plots=plots, missing=missing)


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
    return PageSection("drift", "Distance from the reference", plots=plots, missing=missing)


def _measured_line(label: str, found: Sequence[tuple[int, float, float]], colour: str, marker: str) -> Line:
    """The line through steps, means and their standard errors."""
    steps, means, errors = (list(column) for column in zip(*found, strict=True))
    return Line(label, Curve(steps, means), colour, marker, errors=[1.96 * error for error in errors])


def _lines(run: Run, key: str, label: str, colour: str, marker: str) -> list[Line]:
    """A metric on training windows and on the pairs that were measured again and again, where measured."""
    training, probe = run.curve(key), run.curve(f"watched/{key}")
    lines = [Line(f"{label}, training", training, colour, is_training=True)] if training.steps else []
    where = "held out" if run.has_held_out else "watched"
    return lines + ([Line(f"{label}, {where}", probe, colour, marker)] if probe.steps else [])


# ---------------------------------------------------------------- pair by pair


def preference_section(run: Run, pairs: PairTable | None, sides: Mapping[bool, Mapping[str, float]]) -> PageSection:
    """Return Δ0 against Δπ at start and end, and the 2×2 tables of pairs that changed sides.

    Args:
        run: whose pairs they are.
        pairs: held out, if any.
        sides: `clustered_transitions` of the pairs, by whether log-probs are taken per token.
    """
    title = "Policy against reference, pair by pair"
    if pairs is None:
        return PageSection("preferences", title, missing=[NO_PAIRS])
    plots, missing = [], []
    if pairs.has_reference:
        plots += _preference_scatters(run, pairs)
    else:
        again = f"pe-dpo eval {shlex.quote(str(run.folder))}"
        missing.append(f"the reference was not run on the held-out pairs; measure it with `{again}`")
    if not pairs.knows("initial_chosen"):
        missing.append("the policy's log-probs at the start were not kept, so who changed sides is not known; train again.")
    for per_token, found in sides.items():
        by = "log-probs per token" if per_token else "summed log-probs"
        tied = f" {found['tied']} more pairs are tied at the start or the end." if found["tied"] else ""
        words = f"{found['kept']} kept, {found['gained']} gained, {found['lost']} lost, {found['not_yet']} still wrong"
        cells = (
            (0, 0, found["kept"], "kept", BLUE),
            (0, 1, found["lost"], "lost", ORANGE),
            (1, 0, found["gained"], "gained", SKY),
            (1, 1, found["not_yet"], "still wrong", VERMILLION),
        )
        most = max(count for _, _, count, _, _ in cells) or 1
        with panel("policy after training ranks the pair", "policy at the start", height=3.0) as (figure, axes):
            for row, column, count, name, colour in cells:
                strength = 0.08 + 0.42 * count / most
                axes.fill_between([column, column + 1], row, row + 1, color=colour, alpha=strength, linewidth=0)
                axes.text(column + 0.5, row + 0.46, f"{count}", ha="center", va="center", fontsize=19)
                axes.text(column + 0.5, row + 0.78, name, ha="center", va="center", fontsize=10)
            axes.set(xlim=(0, 2), ylim=(2, 0))
            axes.set_xticks([0.5, 1.5], ["right", "wrong"])
            axes.set_yticks([0.5, 1.5], ["right", "wrong"])
            axes.tick_params(length=0)
            axes.grid(False)
            axes.axhline(1, color=QUIET, linewidth=0.8)
            axes.axvline(1, color=QUIET, linewidth=0.8)
            for spine in axes.spines.values():
                spine.set_visible(True)
        plots.append(
            Plot(
                "transitions-per-token" if per_token else "transitions-sum",
                figure,
                f"Pairs that changed sides, by {by}: {words}.{tied} If sides were changed by chance, a difference between "
                f"gained and lost as large as this would have p = {found['p_value']:.2g} (exact; McNemar's test with the "
                "pairs of a prompt as one draw).",
                f"2×2 table of held-out pairs by {by}, start against end: {words}.",
            )
        )
    sentences = [
        "A pair lies on the solid line when its score z is 0: above it the loss is (nearly) content, below it pulls. On the "
        "dashed line the policy prefers what the reference prefers, to the nat.",
    ]
    return PageSection("preferences", title, sentences if plots else [], plots=plots, missing=missing)


def _preference_scatters(run: Run, pairs: PairTable) -> list[Plot]:
    """Δ0 against Δπ at the start, if it is known, and at the end, on the same axes, with the line on which z is 0."""
    loss, kappa = run.recipe.loss, run.kappa
    per_token = pairs.reduce == "mean"
    reference, policy = (pairs.delta(model, per_token=per_token) for model in ("reference", "policy"))
    start = pairs.delta("initial", per_token=per_token) if pairs.knows("initial_chosen") else None

    def line(values: Floats) -> Floats:
        """κ·max(Δ0, floor): Δπ at which a pair has z = 0, but for the margin."""
        floored = values if loss.reference_floor is None else np.maximum(values, loss.reference_floor)
        return kappa * np.asarray(floored, dtype=np.float64)

    differ = bool(loss.margin_scale or loss.length_penalty or loss.rejected_weight != 1 or pairs.pair_beta is not None)
    note = " Margins differ between pairs; the line is that of the median margin." if differ else ""
    floored = "Δ0" if loss.reference_floor is None else f"max(Δ0, {loss.reference_floor:g})"
    xlim = padded(reference)
    ylim = padded(policy if start is None else np.concatenate([start, policy]))
    unit = "nats per token" if per_token else "nats"
    plots = []
    models: tuple[Model, Model] = "initial", "policy"
    for when, model, preference in zip(("start", "end"), models, (start, policy), strict=True):
        if preference is None:
            continue
        offset = float(np.median(pairs.effective_margin(model) - line(reference))) if differ else loss.margin / loss.beta
        plus = f" {'+' if offset >= 0 else '−'} {abs(offset):.3g}" if offset else ""
        label = f"z = 0: Δπ = {f'{kappa:.3g}·{floored}{plus}' if kappa else f'{offset:.3g}'}"
        xlabel, ylabel = f"Δ0, reference's preference ({unit})", f"Δπ, policy's preference ({unit})"
        with panel(xlabel, ylabel, height=4.1) as (figure, axes):
            axes.axhline(0, color=QUIET, linewidth=0.8)
            axes.axvline(0, color=QUIET, linewidth=0.8)
            for key, ours, theirs in zip(QUADRANTS, (1, 1, -1, -1), (1, -1, 1, -1), strict=True):
                member = (np.sign(preference) == ours) & (np.sign(reference) == theirs)
                x, y = reference[member], preference[member]
                scatter_points(axes, x, y, _QUADRANT_COLOURS[key], _QUADRANT_LABELS[key], total=len(policy))
            tied = (preference == 0) | (reference == 0)
            scatter_points(axes, reference[tied], preference[tied], QUIET, "tied", total=len(policy))
            ends = np.linspace(*xlim, 201)
            axes.plot(ends, ends, color=QUIET, linewidth=1, linestyle="--", label="Δπ = Δ0 (no change)")
            axes.plot(ends, line(ends) + offset, color=INK, linewidth=1.6, label=label)
            axes.set_xlim(xlim)
            axes.set_ylim(ylim)
        right, above = int((preference > 0).sum()), int((preference >= line(reference) + offset).sum())
        words = f"{right} of {len(preference)} pairs have Δπ > 0, {above} lie on or above the line"
        plots.append(
            Plot(
                f"preferences-{when}",
                figure,
                f"Δ0 against Δπ at the {when}, one point per held-out pair: {words}.{note}",
                f"Scatter of the reference's against the policy's preference at the {when}: {words}.",
            )
        )
    return plots


def padded(values: Floats) -> tuple[float, float]:
    """Return a range that holds all values, and 0, with some room."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def length_section(run: Run, pairs: PairTable | None) -> PageSection:
    """Return what length had to do with it: answers' tokens, and training's shift against the difference in length."""
    plots, sentences, missing = [], [], []
    groups: dict[str, Floats] = {}
    answers = run.answers(with_texts=False)
    if pairs is not None:
        groups |= {"chosen": pairs.chosen_lengths, "rejected": pairs.rejected_lengths}
    if answers is not None:
        groups["sampled from π"] = answers.tokens
        if answers.reference_tokens is not None:
            groups["sampled from π0"] = answers.reference_tokens
    else:
        missing.append(
            "how long the policy's own answers are; set generation.prompts (say 64) and train again, or measure the end: "
            f"`{sampling_command(run)}`"
        )
    if groups:
        means = ", ".join(f"{label} {np.mean(values):.1f}" for label, values in groups.items())
        longest = max(max(values) for values in groups.values())
        bins = np.linspace(0, longest + 1, 25) if longest > 25 else np.arange(0, longest + 2)
        looks = zip((BLUE, VERMILLION, ORANGE, QUIET), ("-", "--", "-.", ":"), strict=True)
        with panel("tokens of an answer", "share of answers") as (figure, axes):
            for (label, values), (colour, dashes) in zip(groups.items(), looks, strict=False):
                shares = np.histogram(values, bins)[0] / len(values)
                axes.stairs(shares, bins, color=colour, linewidth=1.8, linestyle=dashes, label=label, fill=False)
                axes.stairs(shares, bins, color=colour, alpha=0.12, fill=True)
            axes.set_xlim(0, bins[-1])
            axes.set_ylim(bottom=0)
        plots.append(
            Plot(
                "lengths",
                figure,
                f"Tokens of held-out and sampled answers. Means: {means}.",
                f"Histogram of answer lengths in tokens. Means: {means}.",
            )
        )
    if pairs is None:
        missing.append(NO_PAIRS)
    elif pairs.knows("initial_chosen"):
        shift = pairs.delta() - pairs.delta("initial")
        r = correlation(pairs.length_difference, shift)
        words = "Too few pairs, or no differences, for a correlation with length."
        if len(pairs) > 3 and not math.isnan(r):
            low, high = correlation_interval(r, len(pairs))
            words = (
                f"Correlation with tokens of chosen − rejected: {fmt(r, '+.2f')} [{fmt(low, '+.2f')}, {fmt(high, '+.2f')}]; "
                f"length explains {r * r:.0%} of what training moved."
            )
        sentences.append(words)
        plots.append(
            Plot(
                "length-shift",
                length_scatter(pairs.length_difference, shift, "Δπ now − Δπ at the start, nats", "a held-out pair"),
                f"How far training moved each held-out pair, against the difference in length. {words}",
                f"Scatter of the shift of Δπ against the length difference of the answers. {words}",
            )
        )
    return PageSection("length", "Length", sentences, plots=plots, missing=missing)

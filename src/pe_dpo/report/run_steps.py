"""What happened along the way of a run: regimes, displacement, loss and accuracy, drift from the reference."""

import math
from collections.abc import Callable

from pe_dpo.metrics.regimes import QUADRANTS
from pe_dpo.metrics.table import wilson_interval
from pe_dpo.report.content import Plot, Section
from pe_dpo.report.plots import Line, over_steps, regime_shares
from pe_dpo.report.run_outcome import signed_text
from pe_dpo.report.style import BLUE, GREEN, MARKERS, PURPLE, VERMILLION
from pe_dpo.runs.run_record import Curve, RunRecord, measured

_WAYS = (
    ("regimes", "sum", "summed log-probs"),
    ("regimes_per_token", "per-token", "log-probs per token"),
    ("regimes_length_matched", "length-matched", "summed log-probs as if answers were of equal length"),
)


def regime_section(run: RunRecord) -> Section:
    """Return which of the four quadrants hold the pairs and the gradient weight, over steps."""
    title = "Which pairs drive the learning"
    plots = []
    for prefix, name, words in _WAYS:
        plots += _regime_plots(run, prefix, name, words)
    if not plots:
        return Section("regimes", title, missing=[_no_regimes(run)])
    sentences = [
        "Every pair is in one of four quadrants: policy π right or wrong, reference π0 right or wrong (right: chosen is "
        "likelier than rejected). The share of pairs says where they are, the share of gradient weight where the loss still "
        "pulls. By summed log-probs the quadrants mostly measure length, so they are shown per token too, and with the "
        "reference's slope on length taken off both preferences.",
    ]
    return Section("regimes", title, sentences, plots=plots)


def _regime_plots(run: RunRecord, prefix: str, name: str, words: str) -> list[Plot]:
    plots = []
    for kind, ylabel in (("pairs", "share of pairs"), ("weight_share", "share of gradient weight")):
        source = run.probed
        steps, shares = _shares(run.probe, prefix, kind)
        if len(steps) < 2:
            source = "pairs of each training window"
            steps, shares = _shares(run.training, prefix, kind)
        if len(steps) < 2:
            continue
        ends = {quadrant: f"{share[0]:.0%} → {share[-1]:.0%}" for quadrant, share in shares.items()}
        last = ", ".join(f"{_SHORT[quadrant]} {words}" for quadrant, words in ends.items())
        plots.append(
            Plot(
                f"regimes-{kind.removesuffix('_share')}-{name}",
                regime_shares(steps, shares, ylabel),
                f"{ylabel.capitalize()} by {words}, {source}. From the first to the last step: {last}.",
                f"Stacked areas over steps {steps[0]} to {steps[-1]}, {ylabel} of four quadrants by {words}: {last}.",
            )
        )
    return plots


def _shares(curve: Callable[[str], Curve], prefix: str, kind: str) -> tuple[list[int], dict[str, list[float]]]:
    """The steps at which all quadrants were measured, and the share of each in pairs or in gradient weight."""
    curves = {quadrant: curve(f"{prefix}/{quadrant}/{kind}") for quadrant in QUADRANTS}
    found = {quadrant: dict(zip(*curve, strict=True)) for quadrant, curve in curves.items()}
    total = dict(zip(*curve("pairs"), strict=True))
    steps = sorted(set.intersection(set(total), *(set(values) for values in found.values())))
    divisor = total if kind == "pairs" else dict.fromkeys(steps, 1.0)
    return steps, {quadrant: [values[step] / divisor[step] for step in steps] for quadrant, values in found.items()}


_SHORT = dict(zip(QUADRANTS, ("both right", "gained", "lost", "both wrong"), strict=True))


def _no_regimes(run: RunRecord) -> str:
    if not run.lines:
        return "the run wrote no metrics yet (metrics.jsonl)."
    if run.kappa == 0 and run.held_out is None:
        return "with gamma 0 the reference is not run in training, and no pairs were held out; set data.eval and train again."
    return "regimes were measured at fewer than two steps; set train.eval_every to measure held-out pairs more often."


def movement_section(run: RunRecord) -> Section:
    """Return how far the likelihood of chosen and rejected answers moved from the reference, over steps."""
    title = "Where the likelihood went"
    lines = []
    for side, colour, marker in (("chosen", BLUE, MARKERS[0]), ("rejected", VERMILLION, MARKERS[1])):
        lines += _both(run, f"displacement/{side}", side, colour, marker)
    if not any(len(line.curve.steps) > 1 for line in lines):
        return Section("movement", title, missing=[_no_regimes(run)])
    ends = [f"{line.label} {signed_text(f'{line.curve.values[-1]:+.2f}')} nats" for line in lines]
    fell = run.probe("displacement/chosen_fell").values
    plot = Plot(
        "displacement",
        over_steps(lines, "log π − log π0, nats per answer", level=0),
        "Mean change of the log-prob of chosen and rejected answers against the reference. If both fall, likelihood went to "
        f"answers that are in no pair. At the end: {', '.join(ends)}"
        + (f"; {fell[-1]:.0%} of the held-out chosen answers became less likely than under π0." if fell else "."),
        f"Lines over steps of log π − log π0 of chosen and rejected answers; at the end {', '.join(ends)}.",
    )
    return Section("movement", title, plots=[plot])


def learning_section(run: RunRecord) -> Section:
    """Return loss and accuracies over steps, on training windows and on the fixed held-out pairs."""
    plots = []
    loss = _both(run, "loss", "loss", BLUE, MARKERS[0])
    if loss:
        plots.append(
            Plot(
                "loss",
                over_steps(loss, "loss per pair"),
                f"Loss. Thin: pairs of each step; marked: the same held-out pairs every time. {_ends(loss)}",
                f"Lines of the loss over steps. {_ends(loss)}",
            )
        )
    words = "Reward accuracy: share of pairs whose chosen answer has the larger implicit reward."
    lines = _both(run, "rewards/accuracies", "accuracy", GREEN, MARKERS[2])
    plots += _accuracy("reward-accuracy", words, [_with_errors(run, line) for line in lines])
    lines = _both(run, "accuracy/policy", "summed", PURPLE, MARKERS[2])
    lines += _both(run, "accuracy/policy_per_token", "per token", BLUE, MARKERS[3])
    words = "Accuracy of the policy itself: share of pairs with Δπ > 0, by summed log-probs and per token."
    lines = [_with_errors(run, line) for line in lines if line.kind == "probe"] or lines
    plots += _accuracy("policy-accuracy", words, lines)
    missing = [] if plots else ["the run wrote no metrics yet (metrics.jsonl)."]
    return Section("learning", "Loss and accuracy", plots=plots, missing=missing)


def _with_errors(run: RunRecord, line: Line) -> Line:
    """Shares of the probed pairs get the half-widths of their Wilson intervals, each step by itself."""
    if line.kind == "training":
        return line
    pairs = dict(zip(*run.probe("pairs"), strict=True))
    intervals = [wilson_interval(share, int(pairs.get(step, 0))) for step, share in zip(*line.curve, strict=True)]
    return line._replace(errors=[(high - low) / 2 for low, high in intervals])


def _accuracy(name: str, words: str, lines: list[Line]) -> list[Plot]:
    if not lines:
        return []
    figure = over_steps(lines, "share of pairs", level=0.5)
    bars = " Bars: 95 %, of each step by itself; between steps the pairs are the same." if lines[-1].errors else ""
    return [Plot(name, figure, f"{words} {_ends(lines)}{bars}", f"Lines over steps. {words} {_ends(lines)}")]


def drift_section(run: RunRecord) -> Section:
    """Return KL from the reference and entropy along the run, where answers were sampled."""
    title = "Distance from the reference"
    steps = _measured_steps(run)
    plots = []
    kl = [(step, *found) for step, evaluation in steps.items() if (found := measured(evaluation, "kl"))]
    if len(kl) >= 1:
        curve = Curve([0, *(step for step, _, _ in kl)], [0.0, *(mean for _, mean, _ in kl)])
        errors = [0.0, *(1.96 * error for _, _, error in kl)]
        plots.append(
            Plot(
                "kl",
                over_steps([Line("KL(π‖π0) ± 95 %", curve, BLUE, errors=errors)], "KL(π‖π0), nats per answer"),
                f"KL(π‖π0) on sampled answers, 0 by definition at the start; at the end {curve.values[-1]:.3g} nats each.",
                f"Line of KL over steps, from 0 to {curve.values[-1]:.3g} nats per answer.",
            )
        )
    entropy = [(step, *found) for step, evaluation in steps.items() if (found := measured(evaluation, "entropy_per_token"))]
    if len(entropy) >= 2:
        curve = Curve([step for step, _, _ in entropy], [value for _, value, _ in entropy])
        errors = [1.96 * error for _, _, error in entropy]
        plots.append(
            Plot(
                "entropy",
                over_steps([Line("entropy of π", curve, PURPLE, errors=errors, marker=MARKERS[3])], "entropy, nats per token"),
                "Entropy of the policy on its own answers; falling entropy means that it says the same more often. From "
                f"{curve.values[0]:.3g} to {curve.values[-1]:.3g} nats per token.",
                f"Line of the entropy over steps, from {curve.values[0]:.3g} to {curve.values[-1]:.3g} nats per token.",
            )
        )
    missing = []
    if not kl:
        missing.append(
            "KL(π‖π0) and entropy need answers of the policy; set generation.prompts (say 64) and train again, or measure the "
            f"end alone: `{run.sampling_command}`"
        )
    elif len(kl) == 1:
        missing.append("the way between start and end was not measured; set generation.snapshots (say 4) and train again.")
    return Section("drift", title, plots=plots, missing=missing)


def _measured_steps(run: RunRecord) -> dict[int, dict[str, object]]:
    """evaluation.json by step, the end included."""
    last = {int(run.facts["step"]): run.evaluation} if run.evaluation and "step" in run.facts else {}
    return {**run.snapshots, **last}


def _both(run: RunRecord, key: str, label: str, colour: str, marker: str) -> list[Line]:
    """A metric on training windows and on held-out pairs, where measured."""
    training, probe = run.training(key), run.probe(key)
    lines = [Line(f"{label}, training", training, colour, "training")] if training.steps else []
    where = "held out" if run.probed == "held-out pairs" else "watched"
    return lines + ([Line(f"{label}, {where}", probe, colour, marker=marker)] if probe.steps else [])


def _ends(lines: list[Line]) -> str:
    parts = [f"{line.label}: {_three(line.curve.values[0])} → {_three(line.curve.values[-1])}" for line in lines]
    return f"First → last: {'; '.join(parts)}."


def _three(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"

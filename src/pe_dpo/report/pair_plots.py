"""The plots of one run's held-out pairs, pair by pair: policy against reference, who changed sides, what length explains."""

import math
import shlex
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from pe_dpo.metrics.estimates import correlation, correlation_interval, length_slope
from pe_dpo.metrics.quadrants import QUADRANTS
from pe_dpo.metrics.table import Floats, Model, PairTable
from pe_dpo.printable import counted
from pe_dpo.report.content import PageSection, Plot
from pe_dpo.report.run_curves import sampling_command
from pe_dpo.report.style import (
    BLUE,
    INK,
    ORANGE,
    QUADRANT_COLOURS,
    QUADRANT_LABELS,
    QUIET,
    SKY,
    VERMILLION,
    fmt,
    panel,
    scatter_points,
)
from pe_dpo.runs.run import Run

NO_PAIRS = "held-out pairs were not measured one by one (eval_pairs.parquet); set data.eval and train again."


def preference_section(run: Run, pairs: PairTable | None, sides: Mapping[bool, Mapping[str, float]]) -> PageSection:
    """Return Δ0 against Δπ at start and end, and the 2×2 tables of pairs that changed sides.

    Args:
        run: whose pairs they are.
        pairs: held out, if any.
        sides: `clustered_transitions` of the pairs, by whether log-probs are taken per token.
    """
    title = "Policy against reference, pair by pair"
    if pairs is None:
        return PageSection("preferences", title, missing=[NO_PAIRS], is_folded=True)
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
        more = counted(int(found["tied"]), "more pair")
        tied = f" {more} {'is' if found['tied'] == 1 else 'are'} tied at the start or the end." if found["tied"] else ""
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
    return PageSection("preferences", title, sentences if plots else [], plots=plots, missing=missing, is_folded=True)


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
                scatter_points(axes, x, y, QUADRANT_COLOURS[key], QUADRANT_LABELS[key], total=len(policy))
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
    return PageSection("length", "Length", sentences, plots=plots, missing=missing, is_folded=True)


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

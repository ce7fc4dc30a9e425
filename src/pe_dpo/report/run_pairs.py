"""The held-out pairs of a run one by one: preferences against the reference's, sides changed, length, and texts."""

import numpy as np

from pe_dpo.metrics.transitions import Flips
from pe_dpo.report.content import Answer, Exhibit, Plot, Section
from pe_dpo.report.plots import (
    Target,
    length_histogram,
    length_scatter,
    preference_scatter,
    scatter_limits,
    transition_table,
)
from pe_dpo.runs.run_record import Floats, HeldOut, RunRecord

SHOWN_PAIRS = 5
"""Best and worst pairs shown, each."""

_NO_PAIRS = "held-out pairs were not measured one by one (eval_pairs.parquet); set data.eval and train again."


def preference_section(run: RunRecord, flips: dict[bool, Flips]) -> Section:
    """Return Δ0 against Δπ at start and end, and the 2×2 tables of pairs that changed sides."""
    title = "Policy against reference, pair by pair"
    pairs = run.held_out
    if pairs is None:
        return Section("preferences", title, missing=[_NO_PAIRS])
    missing = []
    plots = []
    if pairs.reference is None:
        missing.append(f"the reference was not run on the held-out pairs; measure it with `pe-dpo eval {run.folder}`")
    else:
        plots += _scatters(run, pairs, pairs.preference(pairs.reference, per_token=run.recipe.loss.reduce == "mean"))
    if pairs.start is None:
        missing.append("the policy's log-probs at the start were not kept, so who changed sides is not known; train again.")
    plots += [_transitions(found, per_token) for per_token, found in flips.items()]
    sentences = [
        "A pair lies on the solid line when its score z is 0: above it the loss is (nearly) content, below it pulls. On the "
        "dashed line the policy prefers what the reference prefers, to the nat.",
    ]
    return Section("preferences", title, sentences if plots else [], plots=plots, missing=missing)


def _scatters(run: RunRecord, pairs: HeldOut, reference: Floats) -> list[Plot]:
    per_token = run.recipe.loss.reduce == "mean"
    states = {"end": pairs.preference(pairs.policy, per_token=per_token)}
    if pairs.start is not None:
        states = {"start": pairs.preference(pairs.start, per_token=per_token), **states}
    target, note = _target(run, pairs, reference)
    limits = scatter_limits(reference, *states.values())
    unit = "nats per token" if per_token else "nats"
    plots = []
    for when, policy in states.items():
        right = int((policy > 0).sum())
        above = int((policy >= target.at(reference)).sum())
        words = f"{right} of {len(policy)} pairs have Δπ > 0, {above} lie on or above the line"
        plots.append(
            Plot(
                f"preferences-{when}",
                preference_scatter(reference, policy, target, limits, unit=unit),
                f"Δ0 against Δπ at the {when}, one point per held-out pair: {words}.{note}",
                f"Scatter of the reference's against the policy's preference at the {when}: {words}.",
            )
        )
    return plots


def _target(run: RunRecord, pairs: HeldOut, reference: Floats) -> tuple[Target, str]:
    """The line on which z is 0; with margins that differ between pairs, that of their median, and a word about it."""
    loss = run.recipe.loss
    line = Target(run.kappa, 0.0, loss.reference_floor)
    policy = pairs.preference(pairs.policy, per_token=loss.reduce == "mean")
    offsets = policy - line.at(reference) - pairs.score / loss.beta
    if not (loss.margin_scale or loss.length_penalty):
        return line._replace(offset=loss.margin / loss.beta), ""
    note = " Margins differ between pairs; the line is that of the median margin."
    return line._replace(offset=float(np.median(offsets))), note


def _transitions(flips: Flips, per_token: bool) -> Plot:
    by = "log-probs per token" if per_token else "summed log-probs"
    tied = f" {flips.tied} more pairs are tied at the start or the end." if flips.tied else ""
    words = f"{flips.kept} kept, {flips.gained} gained, {flips.lost} lost, {flips.still_wrong} still wrong"
    return Plot(
        "transitions-per-token" if per_token else "transitions-sum",
        transition_table(flips.counts),
        f"Pairs that changed sides, by {by}: {words}.{tied} If sides were changed by chance, a difference between gained and "
        f"lost as large as this would have p = {flips.p:.2g} (exact; McNemar's test with the pairs of a prompt as one draw).",
        f"2×2 table of held-out pairs by {by}, start against end: {words}.",
    )


def length_section(run: RunRecord) -> Section:
    """Return what length had to do with it: answers' tokens, and training's shift against the difference in length."""
    title = "Length"
    pairs = run.held_out
    plots, sentences, missing = [], [], []
    groups: dict[str, list[float]] = {}
    if pairs is not None:
        groups |= {"chosen": pairs.chosen_lengths.tolist(), "rejected": pairs.rejected_lengths.tolist()}
    if run.answers:
        groups["sampled from π"] = [float(tokens) for tokens in run.answers["tokens"]]
        if "reference_tokens" in run.answers:
            groups["sampled from π0"] = [float(tokens) for tokens in run.answers["reference_tokens"]]
    else:
        missing.append(
            "how long the policy's own answers are; set generation.prompts (say 64) and train again, or measure the end: "
            f"`{run.sampling_command}`"
        )
    if groups:
        means = ", ".join(f"{label} {np.mean(values):.1f}" for label, values in groups.items())
        plots.append(
            Plot(
                "lengths",
                length_histogram(groups),
                f"Tokens of held-out and sampled answers. Means: {means}.",
                f"Histogram of answer lengths in tokens. Means: {means}.",
            )
        )
    if pairs is None:
        missing.append(_NO_PAIRS)
    elif pairs.start is not None:
        plot, words = _length_scatter(pairs)
        plots, sentences = [*plots, plot], [words]
    return Section("length", title, sentences, plots=plots, missing=missing)


def _length_scatter(pairs: HeldOut) -> tuple[Plot, str]:
    assert pairs.start is not None, "checked by the caller"
    difference = pairs.chosen_lengths - pairs.rejected_lengths
    shift = pairs.preference(pairs.policy) - pairs.preference(pairs.start)
    words = correlation_words(difference, shift)
    plot = Plot(
        "length-shift",
        length_scatter(difference, shift, ylabel="Δπ now − Δπ at the start, nats"),
        f"How far training moved each held-out pair, against the difference in length. {words}",
        f"Scatter of the shift of Δπ against the length difference of the answers. {words}",
    )
    return plot, words


def correlation_words(difference: Floats, shift: Floats) -> str:
    """Return what the correlation of training's shift with length says, with its 95 % interval (Fisher's z)."""
    if len(shift) < 4 or np.ptp(difference) == 0 or np.ptp(shift) == 0:
        return "Too few pairs, or no differences, for a correlation with length."
    r = float(np.corrcoef(difference, shift)[0, 1])
    centre, half = np.arctanh(np.clip(r, -0.999999, 0.999999)), 1.96 / np.sqrt(len(shift) - 3)
    low, high = np.tanh([centre - half, centre + half])
    text = f"Correlation with tokens of chosen − rejected: {r:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
    return f"{text}; length explains {r * r:.0%} of what training moved."


def texts_section(run: RunRecord) -> Section:
    """Return the pairs that training moved most in the right direction, and most in the wrong one."""
    title = "Best and worst pairs"
    pairs = run.held_out
    if pairs is None or pairs.start is None:
        return Section("texts", title, missing=[_NO_PAIRS])
    if pairs.texts is None:
        again = f"the texts of the pairs were not kept with them; write them with `pe-dpo eval {run.folder}`"
        return Section("texts", title, missing=[again])
    per_token = run.recipe.loss.reduce == "mean"
    start, now = (pairs.preference(model, per_token=per_token) for model in (pairs.start, pairs.policy))
    order = np.argsort(start - now, kind="stable")
    count = min(SHOWN_PAIRS, len(order) // 2)
    best, worst = order[:count], order[::-1][:count]
    unit = "nats per token" if per_token else "nats"
    exhibits = [_exhibit(pairs, int(index), "Best", rank, start, now, unit) for rank, index in enumerate(best, start=1)]
    exhibits += [_exhibit(pairs, int(index), "Worst", rank, start, now, unit) for rank, index in enumerate(worst, start=1)]
    sentence = (
        f"Held-out pairs by how far Δπ moved since the start ({unit}): the {count} that gained most, then the {count} that "
        "lost most or gained least."
    )
    if not count:
        return Section("texts", title, missing=["one held-out pair is neither best nor worst."])
    return Section("texts", title, [sentence], exhibits=exhibits)


def _exhibit(pairs: HeldOut, index: int, word: str, rank: int, start: Floats, now: Floats, unit: str) -> Exhibit:
    assert pairs.texts is not None, "checked by the caller"
    prompt, chosen, rejected = pairs.texts[index]
    moved = f"{now[index] - start[index]:+.2f} {unit} (Δπ {start[index]:.2f} → {now[index]:.2f})".replace("-", "−")
    answers = [Answer("Prompt", prompt), Answer("Chosen", chosen), Answer("Rejected", rejected)]
    return Exhibit(f"{word} {rank}: {moved}, {pairs.where[index]}", answers)

"""The page of one run: what was trained, what it changed on held-out pairs, and what cannot be told from it."""

import shlex
from dataclasses import replace
from math import isnan, nan
from pathlib import Path

import numpy as np
import yaml

from pe_dpo.errors import UsageError
from pe_dpo.metrics.catalogue import METRICS, pair_metrics, share_interval
from pe_dpo.metrics.estimates import mean_change
from pe_dpo.metrics.quadrants import clustered_transitions
from pe_dpo.metrics.sides import RANKINGS, shares_by_side
from pe_dpo.metrics.table import PairTable
from pe_dpo.recipe import describe, describe_sources, recipe_to_yaml
from pe_dpo.report.content import Page, PageSection, PageTable
from pe_dpo.report.pair_plots import NO_PAIRS, length_section, preference_section
from pe_dpo.report.run_curves import drift_section, learning_section, regime_section, sampling_command
from pe_dpo.report.style import fmt
from pe_dpo.runs.run import Run, RunInfo

SHOWN_PAIRS = 5
"""Best and worst pairs shown, each."""

BESIDE = ("nll/chosen_per_token", "displacement/chosen_fell", "regimes/satisfied_early", "active", "regimes/effective_pairs")
"""Metrics of held-out pairs that are shown beside the headlines."""
OF_ANSWERS = (
    *((key, metric.title, metric.form) for key, metric in METRICS.items() if metric.kind == "answers"),
    ("ended", "share of answers that ended by themselves", ".3f"),
    ("distinct_1", "distinct-1", ".3f"),
    ("distinct_2", "distinct-2", ".3f"),
)
"""What is shown of sampled answers: key, title, format."""


def report_run(folder: Path) -> Page:
    """Return the report of a run, finished or not.

    Raises:
        UsageError: it is no run folder, or a file in it is torn.
    """
    run = Run(folder)
    if not run.exists:
        raise UsageError(
            f"{folder}: is neither a run (run.json and recipe.yaml) nor a sweep (sweep.json); name the folder that `pe-dpo "
            "train` or `pe-dpo sweep` wrote"
        )
    info, pairs, is_mean = run.info, run.pairs(), run.recipe.loss.reduce == "mean"
    sides: dict[bool, dict[str, float]] = {}
    if pairs is not None and pairs.knows("initial_chosen"):
        for per_token in (False, True):
            start, now = (pairs.delta(model, per_token=per_token) for model in ("initial", "policy"))
            sides[per_token] = clustered_transitions(start, now, pairs.prompt_key)

    remarks = []
    if not info.is_finished:
        step = max(run.curve("step").steps, default=0)
        state = f"status: {info.status}{f': {info.why}' if info.why else ''}, last step written: {step}"
        verdict = f"This run is not finished ({state}); what follows is what it left so far."
    elif pairs is None or not sides:
        verdict = (
            "Nothing can be said of pairs that this run was not trained on: none were held out, or they were not measured."
        )
    else:
        fall = _describe_fall(pairs)
        verdict = fall + _describe_sides(sides[is_mean], len(pairs), per_token=is_mean, fell=bool(fall))
        remarks.append(_describe_sides(sides[not is_mean], len(pairs), per_token=not is_mean, fell=bool(fall)))
    kl = run.estimate("kl")
    if kl is not None:
        error = "" if isnan(kl[1]) else f" ± {kl[1]:.2g} (standard error)"
        remarks.append(f"On its own answers the policy is KL(π‖π0) = {kl[0]:.3g}{error} nats per answer from the reference.")
    remarks += info.describe_history()
    if info.is_finished and not run.remarks:
        remarks.append("Nothing looked off at the end of training.")

    limits = [
        "One run has one seed. How much another seed, order of pairs or initialisation would have changed is not in these "
        "intervals, which are over pairs and prompts alone; `pe-dpo sweep --seeds 3` shows it.",
        "Whether another setting is better can only be told at matched KL, on the same pairs: `pe-dpo compare`.",
    ]
    if not is_mean:
        limits.append("By summed log-probs, right and wrong mostly follow length; read both columns, sum and per token.")
    no_pairs = (
        "no pairs were held out, or they were not measured yet, so nothing is known of pairs that the run was not trained on; "
        "set data.eval and train again, or measure it on other pairs with `pe-dpo eval RUN --data FILE`"
    )
    sections = [
        _outcome_section(run, info, pairs),
        learning_section(run, pairs),
        drift_section(run),
        PageSection("limits", "What this cannot show", limits, missing=[no_pairs] if pairs is None else []),
        _texts_section(run, pairs),
        regime_section(run, pairs),
        preference_section(run, pairs, sides),
        length_section(run, pairs),
        _trained_section(run, info),
    ]
    alarms = [f"Warning: {remark}" for remark in run.remarks]
    return Page(f"Run {folder.resolve().name}", verdict, remarks, sections, alarms)


def _describe_fall(pairs: PairTable) -> str:
    """That most of the chosen answers became less likely, by how much, beside the rejected ones; empty where they did not."""
    if not pairs.has_reference:
        return ""
    found = pair_metrics(pairs, is_fixed_set=True)
    fell, chosen, rejected = (found[f"displacement/{name}"] for name in ("chosen_fell", "chosen", "rejected"))
    if not (chosen < 0 and share_interval(found, "displacement/chosen_fell")[0] > 0.5):
        return ""
    other = f"fell by {fmt(-rejected, '.1f')}" if rejected < 0 else f"rose by {fmt(rejected, '.1f')}"
    return (
        f"{fell:.0%} of the chosen answers became less likely than under the reference: on average they fell by "
        f"{fmt(-chosen, '.1f')} nats, and the rejected ones {other}. "
    )


def _describe_sides(found: dict[str, float], pairs: int, *, per_token: bool, fell: bool) -> str:
    """How many pairs changed sides, and whether more did so one way than the other, in a sentence.

    Where the chosen answers fell, more pairs in the right order are not called better.
    """
    by = "Δ per token" if per_token else "Δ of summed log-probs"
    gained, lost, p = found["gained"], found["lost"], found["p_value"]
    if gained + lost + found["tied"] == 0:
        return f"No held-out pair changed sides ({pairs} pairs, {by}): the policy ranks them as it did before training."
    told = "this cannot be told from chance"
    if p < 0.05:
        way = ("more often right" if fell else "better") if found["change"] > 0 else "worse"
        told = f"training made the ranking {way}, by more than chance would"
    change, low, high = (fmt(100 * found[name], "+.1f") for name in ("change", "low", "high"))
    interval = "" if isnan(found["low"]) else f", 95 % interval {low} to {high}"
    return (
        f"Of {pairs} held-out pairs the policy now ranks {gained} right that it ranked wrong before, and {lost} the other way "
        f"round ({change} points{interval}; p = {p:.2g}; {by}): {told}."
    )


def _trained_section(run: Run, info: RunInfo) -> PageSection:
    """What was trained on what, and how."""
    recipe, settings = run.recipe, run.recipe.train
    loss, pairs, base = info.loss or describe(recipe.loss, recipe.data.pair_columns)._asdict(), info.pairs, info.base
    versions = info.versions
    adapter = f"LoRA, rank {recipe.adapter.rank}, alpha {recipe.adapter.alpha:g}, dropout {recipe.adapter.dropout:g}"
    if recipe.adapter.start is not None:
        reference = "the raw base" if recipe.adapter.reference == "base" else "a frozen copy of it"
        adapter = f"starts from {recipe.adapter.start}; π0 is {reference}"
    if recipe.adapter.over is not None:
        adapter += f"; over the frozen adapter {recipe.adapter.over}, which π0 has"
    described = recipe.model.base
    if base:
        revision = f" at {base['revision']}" if base.get("revision") else ""
        size = f", {base['parameters'] / 1e6:.3g} M parameters" if base.get("parameters") else ""
        quantized = "not quantized" if base.get("quantize") in (None, "none") else str(base["quantize"])
        described = f"{base.get('id', '?')}{revision}{size}, {quantized}, {base.get('dtype', '?')}"
    mixout = "off"
    if recipe.mixout.p:
        noise = info.mixout.get("margin_noise")
        strength = "" if noise is None else f"; a mask moves a score by {noise:.2f} of what training moved it (margin_noise)"
        each = "optimizer step" if recipe.mixout.draws == "step" else "micro-batch"
        rise = f", rising over the first {recipe.mixout.warmup:.0%} of the steps" if recipe.mixout.warmup else ""
        mixout = f"p = {recipe.mixout.p:g}{rise}, {recipe.mixout.form}, a mask for each {each}{strength}"
    found = info.calibration
    within = f" [{found['interval'][0]:.4g}, {found['interval'][1]:.4g}]" if found.get("interval") else ""
    rows = [
        ("Base", described),
        ("Adapter", adapter),
        ("Data", describe_sources(recipe.data.train)),
        (
            "Pairs",
            f"{pairs.get('train', '?')} to train on, {pairs.get('held_out', '?')} held out" if pairs else "not counted yet",
        ),
        ("Loss", str(loss["formula"])),
        ("Equals", str(loss["equals"])),
        ("κ = γ/β", "" if loss["kappa"] is None else f"{float(loss['kappa']):g}"),  # none while γ is to be found from data
        *(("Note", str(note)) for note in loss.get("notes", [])),
        ("Mixout", mixout),
        ("Optimizer", f"{settings.optimizer}, learning rate {settings.learning_rate:g}"),
        ("Pairs per step", str(settings.pairs_per_step)),
        ("Steps", (str(info.step) + (f", in {info.seconds:.0f} s" if info.seconds else "")) if info.step else ""),
        ("Memory", info.describe_memory()),
        ("Seed", ", ".join([str(settings.seed), *(f"{what} {own}" for what, own in settings.seeds if own is not None)])),
        ("Made with", info.describe_machine()),
        ("γ from data", f"{found.get('asked')}: γ = {found['gamma']:.4g}{within}" if found else ""),
        (
            "Versions",
            ", ".join(f"{key} {versions[key]}" for key in ("pe-dpo", "torch", "transformers", "peft") if key in versions),
        ),
    ]
    folded = [("Recipe", recipe_to_yaml(recipe).rstrip())]
    for title, values in (("Versions", versions), ("Hashes (sha256)", info.hashes.model_dump(exclude_defaults=True))):
        if values:
            folded.append((title, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000).rstrip()))
    return PageSection("trained", "What was trained", facts=[row for row in rows if row[1]], folded=folded, is_folded=True)


def _outcome_section(run: Run, info: RunInfo, pairs: PairTable | None) -> PageSection:
    """The held-out metrics before and after, with intervals, and what was measured on sampled answers."""
    missing, tables, sentences = [], [], []
    if info.after:
        tables.append(_before_and_after(run, info, pairs))
        sentences.append(
            "Held-out pairs, the same ones before and after. Intervals in brackets are 95 %: Wilson's for shares, of as many "
            "independent pairs as those of the prompts are worth, Student's t over prompts for changes."
        )
    elif info.is_finished:
        missing.append("no pairs were held out, so there is no before and after; set data.eval and train again.")
    else:
        again = f"pe-dpo train {shlex.quote(str(run.folder / 'recipe.yaml'))} --resume"
        missing.append(f"the run has not reached its end; go on with `{again}`")
    if pairs is not None and (table := _sides_table(pairs)):
        tables.append(table)
    generation = run.evaluation["generation"]
    if generation:
        known = [(title, form, estimate) for key, title, form in OF_ANSWERS if (estimate := run.estimate(key))]
        rows = [[title, _with_error(*estimate, form)] for title, form, estimate in known]
        samples = generation.get("samples", "?")
        asked = f"{generation.get('prompts', '?')} held-out prompts, {samples} answer{'' if samples == 1 else 's'} each"
        caption = f"Answers of the trained policy to {asked}, at most {generation.get('max_new_tokens', '?')} tokens"
        note = (
            "± is one standard error, clustered by prompt. KL is Rao–Blackwellised: of every position the whole distribution. "
            "Answers that were cut give the KL up to the cut."
        )
        tables.append(PageTable("sampled", caption, ["", "after"], rows, note))
    else:
        missing.append(
            "no answers were sampled, so KL(π‖π0), entropy and the length of answers are not known; set generation.prompts "
            f"(say 64) in the recipe before training, or now `{sampling_command(run)}`"
        )
    if run.scaled:
        rows = []
        shares = [key for key, metric in METRICS.items() if metric.is_headline and metric.is_share and metric.numerator]
        for state in (*run.scaled, run):
            kl, metrics = _with_error(*(state.estimate("kl") or (nan, nan)), ".4f"), state.metrics_of_pairs
            rows.append([f"{state.scale or 1:g}", kl, *(fmt(metrics.get(key, nan), ".3f") for key in shares)])
        header = ["a", "KL(π‖π0), nats per answer", *(METRICS[key].title for key in shares)]
        note = (
            "a = 1 is the adapter as it was trained, a = 0 would be the reference. Scaling takes no training, so that whatever "
            "trains for a smaller KL has to be better at equal KL: pe-dpo compare SWEEP --baseline scale."
        )
        tables.append(PageTable("scaled", "The adapter scaled toward the reference, W0 + a·ΔW", header, rows, note))
    return PageSection("outcome", "Before and after", sentences, tables=tables, missing=missing)


def _before_and_after(run: Run, info: RunInfo, pairs: PairTable | None) -> PageTable:
    before, after, intervals = info.before, info.after, run.intervals
    count = len(pairs) if pairs is not None else int(after.get("pairs", 0))
    changes = {}
    if pairs is not None and pairs.initial_chosen is not None and pairs.initial_rejected is not None:
        start = replace(pairs, policy_chosen=pairs.initial_chosen, policy_rejected=pairs.initial_rejected)
        for key in ("accuracy/policy", "accuracy/policy_per_token", "displacement/chosen", "displacement/rejected"):
            numerator = METRICS[key].numerator
            assert numerator is not None, "it has rows"
            changes[key] = mean_change(numerator(pairs) - numerator(start), pairs.prompt_key)
    rows = []
    for key, metric in METRICS.items():
        if key not in after or key not in before or not (metric.is_headline or key in BESIDE):
            continue
        form, signed = metric.form, f"+{metric.form}"
        cells = [fmt(before[key], form), fmt(after[key], form), fmt(after[key] - before[key], signed)]
        if metric.is_share:
            were, are = (share_interval({"pairs": count, **metrics}, key) for metrics in (before, after))
            for at, (low, high) in enumerate((were, intervals.get(key) or are)):
                cells[at] += f" [{fmt(low, form)}, {fmt(high, form)}]"
        _, low, high = changes.get(key, (nan, nan, nan))
        if not isnan(low):
            cells[2] += f" [{fmt(low, signed)}, {fmt(high, signed)}]"
        rows.append([metric.title, *cells])
    return PageTable(
        "before-after", f"{count} held-out pairs before and after training", ["", "before", "after", "change"], rows
    )


def _sides_table(pairs: PairTable) -> PageTable | None:
    """Every share apart by what π0 ranks right and wrong, and by what the policy does."""
    found = {name: shares_by_side(pairs, by) for by, name in RANKINGS.items()}
    shares = [(name, key, parts) for name, metrics in found.items() for key, parts in metrics.items()]
    rows = [
        [f"{METRICS[key].title}, by {name}", *(cell for part in parts.values() for cell in (str(part.pairs), part.describe()))]
        for name, key, parts in shares
    ]
    note = (
        "A share of all pairs averages both sides, which may move apart. Brackets are 95 % Wilson intervals for as many "
        "independent pairs as those of the prompts are worth; ties of the ranking are on neither side."
    )
    way = "log-probs per token" if pairs.reduce == "mean" else "summed log-probs"
    caption = f"Where π0, and where the policy π, ranks a pair right or wrong, by {way}"
    return PageTable("sides", caption, ["", "right", "of these", "wrong", "of these"], rows, note) if rows else None


def _with_error(value: float, error: float, form: str) -> str:
    return fmt(value, form) if error != error else f"{fmt(value, form)} ± {fmt(error, form)}"


def _texts_section(run: Run, pairs: PairTable | None) -> PageSection:
    """The pairs that training moved most in the right direction, and most in the wrong one."""
    title = "Best and worst pairs"
    if pairs is None or not pairs.knows("initial_chosen"):
        return PageSection("texts", title, missing=[NO_PAIRS], is_folded=True)
    if pairs.prompt is None or pairs.chosen is None or pairs.rejected is None:
        again = f"the texts of the pairs were not kept with them; write them with `pe-dpo eval {shlex.quote(str(run.folder))}`"
        return PageSection("texts", title, missing=[again], is_folded=True)
    per_token = pairs.reduce == "mean"
    unit = "nats per token" if per_token else "nats"
    start, now = (pairs.delta(model, per_token=per_token) for model in ("initial", "policy"))
    order = np.argsort(start - now, kind="stable")
    count = min(SHOWN_PAIRS, len(order) // 2)
    if not count:
        return PageSection("texts", title, missing=["one held-out pair is neither best nor worst."], is_folded=True)
    exhibits = []
    for word, indices in (("Best", order[:count]), ("Worst", order[::-1][:count])):
        for rank, index in enumerate(indices, start=1):
            moved, was, became = (fmt(value, form) for value, form in (
                (now[index] - start[index], "+.2f"), (start[index], ".2f"), (now[index], ".2f"),
            ))  # fmt: skip
            heading = f"{word} {rank}: {moved} {unit} (Δπ {was} → {became}), {pairs.where[index]}"
            texts = [("Prompt", pairs.prompt[index]), ("Chosen", pairs.chosen[index]), ("Rejected", pairs.rejected[index])]
            exhibits.append((heading, texts))
    sentence = (
        f"Held-out pairs by how far Δπ moved since the start ({unit}): the {count} that gained most, then the {count} that "
        "lost most or gained least."
    )
    return PageSection("texts", title, [sentence], exhibits=exhibits, is_folded=True)

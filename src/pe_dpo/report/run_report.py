"""The page of one run: what was trained, what it changed on held-out pairs, and what cannot be told from it."""

from collections.abc import Mapping
from math import isnan, nan
from pathlib import Path

import numpy as np
import yaml

from pe_dpo.metrics.catalogue import METRICS
from pe_dpo.metrics.estimates import mean_change, wilson_interval
from pe_dpo.metrics.quadrants import clustered_transitions
from pe_dpo.recipe import describe, recipe_to_yaml
from pe_dpo.report.content import Page, Section, Table
from pe_dpo.report.run_plots import (
    NO_PAIRS,
    drift_section,
    learning_section,
    length_section,
    movement_section,
    preference_section,
    regime_section,
)
from pe_dpo.report.style import fmt
from pe_dpo.runs.run_record import HeldOut, RunRecord, measured, read_run_record

SHOWN_PAIRS = 5
"""Best and worst pairs shown, each."""

BESIDE = ("nll/chosen_per_token", "displacement/chosen_fell", "regimes/satisfied_early", "active", "regimes/effective_pairs")
"""Metrics of held-out pairs that are shown beside the headlines."""
SAMPLED = (
    ("kl", "KL(π‖π0), nats per answer", ".4f"),
    ("kl_per_token", "KL(π‖π0), nats per token", ".4f"),
    ("entropy_per_token", "entropy of π, nats per token", ".4f"),
    ("tokens", "tokens of an answer", ".2f"),
    ("ended", "share of answers that ended by themselves", ".3f"),
    ("distinct_1", "distinct-1", ".3f"),
    ("distinct_2", "distinct-2", ".3f"),
    ("win_rate", "win rate against π0 (ties ½)", ".3f"),
)


def report_run(folder: Path) -> Page:
    """Return the report of a run, finished or not.

    Raises:
        UsageError: it is no run folder, or a file in it is torn.
    """
    run = read_run_record(folder)
    flips = _flips(run)
    is_mean = run.recipe.loss.reduce == "mean"
    if not run.is_finished:
        step = max((line["step"] for line in run.lines), default=0)
        why = f": {run.facts['why']}" if run.facts.get("why") else ""
        state = f"status: {run.facts.get('status', 'unknown')}{why}, last step written: {step}"
        verdict = f"This run is not finished ({state}); what follows is what it left so far."
    elif not flips:
        verdict = (
            "Nothing can be said of pairs that this run was not trained on: none were held out, or they were not measured."
        )
    else:
        verdict = _flip_sentence(run, flips[is_mean], per_token=is_mean)

    remarks = []
    if run.is_finished and flips:
        remarks.append(_flip_sentence(run, flips[not is_mean], per_token=not is_mean))
    kl = measured(run.evaluation, "kl")
    if kl is not None:
        error = "" if kl[1] != kl[1] else f" ± {kl[1]:.2g} (standard error)"
        remarks.append(f"On its own answers the policy is KL(π‖π0) = {kl[0]:.3g}{error} nats per answer from the reference.")
    remarks += [f"Warning: {remark}" for remark in run.remarks]
    if run.is_finished and not run.remarks:
        remarks.append("Nothing looked off at the end of training.")
    sections = [
        _trained_section(run),
        _outcome_section(run),
        regime_section(run),
        preference_section(run, flips),
        movement_section(run),
        learning_section(run),
        drift_section(run),
        length_section(run),
        _texts_section(run),
        _limits_section(run),
    ]
    return Page(f"Run {folder.resolve().name}", verdict, remarks, sections)


def _flips(run: RunRecord) -> dict[bool, dict[str, float]]:
    """Changes of sides by whether log-probs are per token; empty without held-out pairs or their start."""
    pairs = run.held_out
    if pairs is None or pairs.start is None:
        return {}
    return {
        per_token: clustered_transitions(
            pairs.preference(pairs.start, per_token=per_token),
            pairs.preference(pairs.policy, per_token=per_token),
            pairs.prompt_keys,
        )
        for per_token in (False, True)
    }


def _flip_sentence(run: RunRecord, flips: dict[str, float], *, per_token: bool) -> str:
    assert run.held_out is not None, "flips were counted"
    pairs, by = len(run.held_out.where), "Δ per token" if per_token else "Δ of summed log-probs"
    if flips["gained"] + flips["lost"] + flips["tied"] == 0:
        return f"No held-out pair changed sides ({pairs} pairs, {by}): the policy ranks them as it did before training."
    if flips["p_value"] >= 0.05:
        told = "this cannot be told from chance"
    else:
        told = f"training made the ranking {'better' if flips['change'] > 0 else 'worse'}, by more than chance would"
    change, low, high = (fmt(100 * share, "+.1f") for share in (flips["change"], flips["low"], flips["high"]))
    interval = "" if flips["low"] != flips["low"] else f", 95 % interval {low} to {high}"
    return (
        f"Of {pairs} held-out pairs the policy now ranks {flips['gained']} right that it ranked wrong before, and "
        f"{flips['lost']} the other way round ({change} points{interval}; p = {flips['p_value']:.2g}; {by}): {told}."
    )


def _trained_section(run: RunRecord) -> Section:
    """What was trained on what, and how."""
    recipe, facts, settings = run.recipe, run.facts, run.recipe.train
    loss = facts.get("loss") or describe(recipe.loss)._asdict()
    pairs, versions = facts.get("pairs", {}), facts.get("versions", {})
    adapter = f"LoRA, rank {recipe.adapter.rank}, alpha {recipe.adapter.alpha:g}, dropout {recipe.adapter.dropout:g}"
    if recipe.adapter.start is not None:
        reference = "the raw base" if recipe.adapter.reference == "base" else "a frozen copy of it"
        adapter = f"starts from {recipe.adapter.start}; π0 is {reference}"
    base, described = facts.get("base", {}), recipe.model.base
    if base:
        revision = f" at {base['revision']}" if base.get("revision") else ""
        size = f", {base['parameters'] / 1e6:.3g} M parameters" if base.get("parameters") else ""
        quantized = "not quantized" if base.get("quantize") in (None, "none") else str(base["quantize"])
        described = f"{base.get('id', '?')}{revision}{size}, {quantized}, {base.get('dtype', '?')}"
    mixout = "off"
    if recipe.mixout.p:
        noise = (facts.get("mixout") or {}).get("margin_noise")
        strength = "" if noise is None else f"; a mask moves a score by {noise:.2f} of what training moved it (margin_noise)"
        each = "optimizer step" if recipe.mixout.draws == "step" else "micro-batch"
        rise = f", rising over the first {recipe.mixout.warmup:.0%} of the steps" if recipe.mixout.warmup else ""
        mixout = f"p = {recipe.mixout.p:g}{rise}, {recipe.mixout.form}, a mask for each {each}{strength}"
    seconds = facts.get("seconds")
    found = facts.get("gamma_calibration") or {}
    within = f" [{found['interval'][0]:.4g}, {found['interval'][1]:.4g}]" if found.get("interval") else ""
    rows = [
        ("Base", described),
        ("Adapter", adapter),
        ("Data", recipe.data.train),
        ("Pairs", f"{pairs['train']} to train on, {pairs['held_out']} held out" if pairs else "not counted yet"),
        ("Loss", str(loss["formula"])),
        ("Equals", str(loss["equals"])),
        ("κ = γ/β", f"{float(loss['kappa']):g}"),
        *(("Note", str(note)) for note in loss.get("notes", [])),
        ("Mixout", mixout),
        ("Optimizer", f"{settings.optimizer}, learning rate {settings.learning_rate:g}"),
        ("Pairs per step", str(settings.pairs_per_step)),
        ("Steps", str(facts.get("step", "")) + ("" if seconds is None else f", in {seconds:.0f} s")),
        ("Seed", str(settings.seed)),
        ("γ from data", f"{found.get('asked')}: γ = {found['gamma']:.4g}{within}" if found else ""),
        (
            "Versions",
            ", ".join(f"{key} {versions[key]}" for key in ("pe-dpo", "torch", "transformers", "peft") if key in versions),
        ),
    ]
    folded = [("Recipe", recipe_to_yaml(recipe).rstrip())]
    for key, title in (("versions", "Versions"), ("hashes", "Hashes (sha256)")):
        if facts.get(key):
            folded.append((title, yaml.safe_dump(facts[key], sort_keys=False, allow_unicode=True, width=1000).rstrip()))
    return Section("trained", "What was trained", facts=[row for row in rows if row[1]], folded=folded)


def _outcome_section(run: RunRecord) -> Section:
    """The held-out metrics before and after, with intervals, and what was measured on sampled answers."""
    missing, tables, sentences = [], [], []
    if run.facts.get("after"):
        tables.append(_pairs_table(run, run.facts.get("before") or {}, run.facts["after"]))
        sentences.append(
            "Held-out pairs, the same ones before and after. Intervals in brackets are 95 %: Wilson's for accuracies (as if "
            "pairs were independent), Student's t over prompts for changes (pairs of one prompt count as one draw)."
        )
    elif run.is_finished:
        missing.append("no pairs were held out, so there is no before and after; set data.eval and train again.")
    else:
        missing.append(f"the run has not reached its end; go on with `pe-dpo train {run.folder / 'recipe.yaml'} --resume`")
    generation = run.evaluation.get("generation")
    if generation:
        rows = []
        for name, title, form in SAMPLED:
            value = measured(run.evaluation, name)
            if value is not None:
                rows.append([title, _with_error(*value, form)])
        asked = f"{generation.get('prompts', '?')} held-out prompts, {generation.get('samples', '?')} answers each"
        caption = f"Answers of the trained policy to {asked}, at most {generation.get('max_new_tokens', '?')} tokens"
        note = (
            "± is one standard error, clustered by prompt. KL is Rao–Blackwellised: of every position the whole distribution. "
            "Answers that were cut give the KL up to the cut."
        )
        tables.append(Table("sampled", caption, ["", "after"], rows, note))
    else:
        missing.append(
            "no answers were sampled, so KL(π‖π0), entropy and the length of answers are not known; set generation.prompts "
            f"(say 64) in the recipe before training, or now `{run.sampling_command}`"
        )
    if run.scaled:
        rows = []
        shares = [key for key, metric in METRICS.items() if metric.is_headline and metric.is_share and metric.numerator]
        for scale, found in [*run.scaled.items(), (1.0, run.evaluation)]:
            kl = _with_error(*(measured(found, "kl") or (nan, nan)), ".4f")
            rows.append([f"{scale:g}", kl, *(fmt(found["pairs"].get(key, nan), ".3f") for key in shares)])
        header = ["a", "KL(π‖π0), nats per answer", *(METRICS[key].title for key in shares)]
        note = (
            "a = 1 is the adapter as it was trained, a = 0 would be the reference. Scaling takes no training, so that whatever "
            "trains for a smaller KL has to be better at equal KL: pe-dpo compare SWEEP --baseline scale."
        )
        tables.append(Table("scaled", "The adapter scaled toward the reference, W0 + a·ΔW", header, rows, note))
    return Section("outcome", "Before and after", sentences, tables=tables, missing=missing)


def _pairs_table(run: RunRecord, before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    changes, known = _changes(run.held_out), run.evaluation.get("intervals", {})
    pairs = int(after["pairs"])
    rows = []
    for key, metric in METRICS.items():
        form = metric.form
        if key not in after or key not in before or not (metric.is_headline or key in BESIDE):
            continue
        cells = [fmt(before[key], form), fmt(after[key], form), fmt(after[key] - before[key], f"+{form}")]
        if metric.is_share:
            intervals = wilson_interval(before[key], pairs), known.get(key) or wilson_interval(after[key], pairs)
            for at, (low, high) in enumerate(intervals):
                cells[at] += f" [{fmt(low, form)}, {fmt(high, form)}]"
        change = changes.get(key)
        if change is not None and not isnan(change[1]):
            cells[2] += f" [{fmt(change[1], f'+{form}')}, {fmt(change[2], f'+{form}')}]"
        rows.append([metric.title, *cells])
    return Table("before-after", f"{pairs} held-out pairs before and after training", ["", "before", "after", "change"], rows)


def _changes(pairs: HeldOut | None) -> dict[str, tuple[float, float, float]]:
    """Changes of what can be told pair by pair from the log-probs."""
    if pairs is None or pairs.start is None:
        return {}
    found = {}
    for key, per_token in (("accuracy/policy", False), ("accuracy/policy_per_token", True)):
        now, start = (pairs.preference(model, per_token=per_token) for model in (pairs.policy, pairs.start))
        found[key] = mean_change((np.sign(now) - np.sign(start)) / 2, pairs.prompt_keys)
    for side in ("chosen", "rejected"):
        shift = getattr(pairs.policy, side) - getattr(pairs.start, side)
        found[f"displacement/{side}"] = mean_change(shift, pairs.prompt_keys)
    return found


def _with_error(value: float, error: float, form: str) -> str:
    return fmt(value, form) if error != error else f"{fmt(value, form)} ± {fmt(error, form)}"


def _texts_section(run: RunRecord) -> Section:
    """The pairs that training moved most in the right direction, and most in the wrong one."""
    title = "Best and worst pairs"
    pairs = run.held_out
    if pairs is None or pairs.start is None:
        return Section("texts", title, missing=[NO_PAIRS])
    if pairs.texts is None:
        again = f"the texts of the pairs were not kept with them; write them with `pe-dpo eval {run.folder}`"
        return Section("texts", title, missing=[again])
    per_token = run.recipe.loss.reduce == "mean"
    unit = "nats per token" if per_token else "nats"
    start, now = (pairs.preference(model, per_token=per_token) for model in (pairs.start, pairs.policy))
    order = np.argsort(start - now, kind="stable")
    count = min(SHOWN_PAIRS, len(order) // 2)
    if not count:
        return Section("texts", title, missing=["one held-out pair is neither best nor worst."])
    exhibits = []
    for word, indices in (("Best", order[:count]), ("Worst", order[::-1][:count])):
        for rank, index in enumerate(indices, start=1):
            moved, was, became = (fmt(value, form) for value, form in (
                (now[index] - start[index], "+.2f"), (start[index], ".2f"), (now[index], ".2f"),
            ))  # fmt: skip
            heading = f"{word} {rank}: {moved} {unit} (Δπ {was} → {became}), {pairs.where[index]}"
            exhibits.append((heading, list(zip(("Prompt", "Chosen", "Rejected"), pairs.texts[index], strict=True))))
    sentence = (
        f"Held-out pairs by how far Δπ moved since the start ({unit}): the {count} that gained most, then the {count} that "
        "lost most or gained least."
    )
    return Section("texts", title, [sentence], exhibits=exhibits)


def _limits_section(run: RunRecord) -> Section:
    sentences = [
        "One run has one seed. How much another seed, order of pairs or initialisation would have changed is not in these "
        "intervals, which are over pairs and prompts alone; `pe-dpo sweep --seeds 3` shows it.",
        "Whether another setting is better can only be told at matched KL, on the same pairs: `pe-dpo compare`.",
    ]
    if run.recipe.loss.reduce == "sum":
        sentences.append("By summed log-probs, right and wrong mostly follow length; read both columns, sum and per token.")
    missing = (
        "no pairs were held out, or they were not measured yet, so nothing is known of pairs that the run was not trained on; "
        "set data.eval and train again, or measure it on other pairs with `pe-dpo eval RUN --data FILE`"
    )
    return Section("limits", "What this cannot show", sentences, missing=[missing] if run.held_out is None else [])

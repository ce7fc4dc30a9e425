"""What was trained, and what it came to: the facts of a run, and its held-out metrics before and after."""

from collections.abc import Callable, Mapping
from math import isnan, nan
from typing import Any

import numpy as np

from pe_dpo.metrics.table import wilson_interval
from pe_dpo.metrics.transitions import Change, mean_change
from pe_dpo.recipe import describe, recipe_to_yaml
from pe_dpo.recipe.schema import AdapterSection, MixoutSection
from pe_dpo.report.content import Folded, Section, Table
from pe_dpo.runs.run_record import HeldOut, RunRecord, measured

Format = Callable[[float], str]


def three(value: float) -> str:
    """Return a share: 0.580."""
    return signed_text(f"{value:.3f}")


def two(value: float) -> str:
    """Return nats: −16.12."""
    return signed_text(f"{value:.2f}")


def four(value: float) -> str:
    """Return a loss: 0.8447."""
    return signed_text(f"{value:.4f}")


def whole(value: float) -> str:
    """Return a count: 112."""
    return signed_text(f"{value:.0f}")


def signed_text(text: str) -> str:
    """Return a number with a minus sign that is as wide as the plus; minus zero is zero."""
    return text.lstrip("+-") if not text.strip("+-0.") else text.replace("-", "−")


SHARES = (
    ("accuracy/policy", "accuracy of π, summed log-probs"),
    ("accuracy/policy_per_token", "accuracy of π, per token"),
    ("accuracy/shift", "share moved towards chosen (Δπ > Δ0)"),
    ("rewards/accuracies", "reward accuracy (implicit)"),
)
"""Shares of held-out pairs ranked right; they get Wilson intervals."""
OTHERS: tuple[tuple[str, str, Format], ...] = (
    ("loss", "loss", four),
    ("rewards/margins", "reward margin", four),
    ("nll/chosen_per_token", "NLL of chosen, nats per token", four),
    ("displacement/chosen", "log π − log π0 of chosen, nats", two),
    ("displacement/rejected", "log π − log π0 of rejected, nats", two),
    ("displacement/chosen_fell", "share of chosen that π0 likes better", three),
    ("regimes/satisfied_early", "pairs satisfied early (z ≥ 0, Δπ < 0)", whole),
    ("active", "share of pairs with z < 0", three),
    ("regimes/effective_pairs", "effective pairs (Σ|w|)²/Σw²", whole),
)
SAMPLED: tuple[tuple[str, str, Format], ...] = (
    ("kl", "KL(π‖π0), nats per answer", four),
    ("kl_per_token", "KL(π‖π0), nats per token", four),
    ("entropy_per_token", "entropy of π, nats per token", four),
    ("tokens", "tokens of an answer", two),
    ("ended", "share of answers that ended by themselves", three),
    ("distinct_1", "distinct-1", three),
    ("distinct_2", "distinct-2", three),
    ("win_rate", "win rate against π0 (ties ½)", three),
)


_MAIN_VERSIONS = ("pe-dpo", "torch", "transformers", "peft")
_FOLDED = (("versions", "Versions"), ("hashes", "Hashes (sha256)"))


def trained_section(run: RunRecord) -> Section:
    """Return what was trained on what, and how."""
    recipe, facts = run.recipe, run.facts
    loss = facts.get("loss") or describe(recipe.loss)._asdict()
    base, pairs, versions = facts.get("base", {}), facts.get("pairs", {}), facts.get("versions", {})
    settings = recipe.train
    rows = [
        ("Base", _base_words(base) or recipe.model.base),
        ("Adapter", _adapter_words(recipe.adapter)),
        ("Data", recipe.data.train),
        ("Pairs", f"{pairs['train']} to train on, {pairs['held_out']} held out" if pairs else "not counted yet"),
        ("Loss", str(loss["formula"])),
        ("Equals", str(loss["equals"])),
        ("κ = γ/β", f"{float(loss['kappa']):g}"),
        *(("Note", str(note)) for note in loss.get("notes", [])),
        ("Mixout", _mixout_words(recipe.mixout, facts.get("mixout") or {})),
        ("Optimizer", f"{settings.optimizer}, learning rate {settings.learning_rate:g}"),
        ("Pairs per step", str(settings.pairs_per_step)),
        ("Steps", _steps_words(run)),
        ("Seed", str(settings.seed)),
        *_calibration(facts),
        ("Versions", ", ".join(f"{name} {versions[name]}" for name in _MAIN_VERSIONS if name in versions)),
    ]
    folded = [Folded("Recipe", recipe_to_yaml(recipe).rstrip())]
    folded += [Folded(title, _lines(facts[key])) for key, title in _FOLDED if facts.get(key)]
    return Section("trained", "What was trained", facts=[row for row in rows if row[1]], folded=folded)


def outcome_section(run: RunRecord) -> Section:
    """Return the held-out metrics before and after, with intervals."""
    before, after = run.facts.get("before") or {}, run.facts.get("after") or {}
    missing = []
    tables = []
    if after:
        tables.append(_pairs_table(run, before, after))
    elif run.is_finished:
        missing.append("no pairs were held out, so there is no before and after; set data.eval and train again.")
    else:
        missing.append(f"the run has not reached its end; go on with `pe-dpo train {run.folder / 'recipe.yaml'} --resume`")
    generation = run.evaluation.get("generation")
    if generation:
        tables.append(_sampled_table(run, generation))
    else:
        missing.append(
            "no answers were sampled, so KL(π‖π0), entropy and the length of answers are not known; set generation.prompts "
            f"(say 64) in the recipe before training, or now `{run.sampling_command}`"
        )
    if run.scaled:
        tables.append(_scaled_table(run))
    sentences = []
    if after:
        sentences.append(
            "Held-out pairs, the same ones before and after. Intervals in brackets are 95 %: Wilson's for accuracies (as if "
            "pairs were independent), Student's t over prompts for changes (pairs of one prompt count as one draw)."
        )
    return Section("outcome", "Before and after", sentences, tables=tables, missing=missing)


def _pairs_table(run: RunRecord, before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    changes = _changes(run.held_out)
    intervals = run.evaluation.get("intervals", {})
    pairs = int(after["pairs"])
    rows = []
    for key, title in SHARES:
        if key in after and key in before:
            cells = [_share(before[key], pairs), _share(after[key], pairs, intervals.get(key))]
            rows.append([title, *cells, _change(before[key], after[key], changes.get(key), three)])
    for key, title, form in OTHERS:
        if key in after and key in before:
            cells = [form(before[key]), form(after[key])]
            rows.append([title, *cells, _change(before[key], after[key], changes.get(key), form)])
    header = ["", "before", "after", "change"]
    return Table("before-after", f"{pairs} held-out pairs before and after training", header, rows)


def _changes(pairs: HeldOut | None) -> dict[str, Change]:
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


def _change(before: float, after: float, change: Change | None, form: Format) -> str:
    text = _plus(after - before, form)
    if change is None or change.low != change.low:
        return text
    return f"{text} [{_plus(change.low, form)}, {_plus(change.high, form)}]"


def _plus(value: float, form: Format) -> str:
    text = form(value)
    return text if text.startswith("−") or not text.strip("0.") else f"+{text}"


def _share(value: float, pairs: int, interval: Any = None) -> str:
    low, high = interval or wilson_interval(value, pairs)
    return f"{three(value)} [{three(low)}, {three(high)}]"


def _sampled_table(run: RunRecord, generation: Mapping[str, Any]) -> Table:
    rows = []
    for name, title, form in SAMPLED:
        found = measured(run.evaluation, name)
        if found is not None:
            value, error = found
            rows.append([title, form(value) if error != error else f"{form(value)} ± {form(error)}"])
    asked = f"{generation.get('prompts', '?')} held-out prompts, {generation.get('samples', '?')} answers each"
    return Table(
        "sampled",
        f"Answers of the trained policy to {asked}, at most {generation.get('max_new_tokens', '?')} tokens",
        ["", "after"],
        rows,
        "± is one standard error, clustered by prompt. KL is Rao–Blackwellised: of every position the whole distribution. "
        "Answers that were cut give the KL up to the cut.",
    )


def _scaled_table(run: RunRecord) -> Table:
    """The adapter from scale to scale, last as it was trained."""
    rows = []
    for scale, found in [*run.scaled.items(), (1.0, run.evaluation)]:
        kl, error = measured(found, "kl") or (nan, nan)
        distance = "–" if isnan(kl) else four(kl) if isnan(error) else f"{four(kl)} ± {four(error)}"
        rows.append([f"{scale:g}", distance, *(three(found["pairs"].get(key, nan)) for key, _ in SHARES)])
    return Table(
        "scaled",
        "The adapter scaled toward the reference, W0 + a·ΔW",
        ["a", "KL(π‖π0), nats per answer", *(title for _, title in SHARES)],
        rows,
        "a = 1 is the adapter as it was trained, a = 0 would be the reference. Scaling takes no training, so that whatever "
        "trains for a smaller KL has to be better at equal KL: pe-dpo compare SWEEP --baseline scale.",
    )


def _adapter_words(adapter: AdapterSection) -> str:
    if adapter.start is not None:
        reference = "the raw base" if adapter.reference == "base" else "a frozen copy of it"
        return f"starts from {adapter.start}; π0 is {reference}"
    return f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}"


def _mixout_words(mixout: MixoutSection, measured: Mapping[str, Any]) -> str:
    if not mixout.p:
        return "off"
    noise = measured.get("margin_noise")
    strength = "" if noise is None else f"; a mask moves a score by {noise:.2f} of what training moved it (margin_noise)"
    each = "optimizer step" if mixout.draws == "step" else "micro-batch"
    rise = f", rising over the first {mixout.warmup:.0%} of the steps" if mixout.warmup else ""
    return f"p = {mixout.p:g}{rise}, {mixout.form}, a mask for each {each}{strength}"


def _base_words(base: Mapping[str, Any]) -> str:
    if not base:
        return ""
    revision = f" at {base['revision']}" if base.get("revision") else ""
    size = f", {base['parameters'] / 1e6:.3g} M parameters" if base.get("parameters") else ""
    quantized = "not quantized" if base.get("quantize") in (None, "none") else str(base["quantize"])
    return f"{base.get('id', '?')}{revision}{size}, {quantized}, {base.get('dtype', '?')}"


def _steps_words(run: RunRecord) -> str:
    steps = run.facts.get("step")
    if steps is None:
        return ""
    seconds = run.facts.get("seconds")
    return f"{steps}" if seconds is None else f"{steps}, in {seconds:.0f} s"


def _calibration(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = facts.get("gamma_calibration")
    if not isinstance(found, Mapping):
        return []
    interval = found.get("interval")
    within = "" if not interval else f" [{interval[0]:.4g}, {interval[1]:.4g}]"
    return [("γ from data", f"{found.get('asked')}: γ = {found['gamma']:.4g}{within}")]


def _lines(values: Mapping[str, Any], indent: str = "") -> str:
    def line(key: str, value: Any) -> str:
        inner = f"\n{_lines(value, indent + '  ')}" if isinstance(value, Mapping) else f" {value}"
        return f"{indent}{key}:{inner}"

    return "\n".join(line(key, value) for key, value in values.items())

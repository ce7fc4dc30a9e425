"""What a comparison found, in words and numbers for people: names, the verdict, and what makes it less sure than it looks."""

from collections.abc import Mapping, Sequence
from math import inf, isnan
from pathlib import Path
from typing import Any, TypeGuard

from pe_dpo.experiments.comparison import RUN, SCALE, STEP, Arm, Comparison, Power, is_end
from pe_dpo.metrics.bootstrap import Effect
from pe_dpo.metrics.catalogue import COMPARED, METRICS, Metric
from pe_dpo.metrics.seed_variance import FEWEST_ARMS, FEWEST_SEEDS, SeedVariance
from pe_dpo.printable import counted
from pe_dpo.recipe.names import SHORT_NAMES

FEW_PROMPTS = 20
"""Sampled prompts below which the error of the KL is not well known."""

_WORDS = {
    "loss.beta": "β",
    "loss.gamma": "γ",
    "loss.rejected_weight": "λ",
    "mixout.p": "mixout",
    "adapter.dropout": "dropout",
    "train.learning_rate": "learning rate",
    STEP: "early stopping",
    SCALE: "scaling",
}
TIE = 1e-9
"""Up to which two values are the same number, computed in another order."""
_MOST_NAMES = 6
"""In one sentence; the rest is counted."""


def setting_name(settings: Mapping[str, Any]) -> str:
    """Return in what settings differ from the base recipe, in words: "γ = 0.5β with mixout 0.3", "γ = 0 (scaled to 0.5)"."""
    parts = []
    for key, value in settings.items():
        text, name = f"{value:g}" if isinstance(value, float) else str(value), hyperparameter_name(key)
        multiple = str(value).removesuffix("x")
        if key == STEP:
            parts.append(f"early stopping at step {value}")
        elif key == RUN:
            parts.append(f"run {Path(str(value)).name}")
        elif key == "loss.gamma" and multiple != str(value):
            parts.append({"0": "γ = 0", "1": "γ = β"}.get(multiple, f"γ = {multiple}β"))
        elif key != SCALE:
            parts.append(f"{name} {text}" if key in _WORDS and not key.startswith("loss.") else f"{name} = {text}")
    trained = " with ".join(parts) or "the base recipe"
    return f"{trained} (scaled to {settings[SCALE]:g})" if SCALE in settings else trained


def hyperparameter_name(key: str) -> str:
    """Return the name of a hyperparameter, given its dotted key: "β" for loss.beta."""
    short = {known: name for name, known in reversed(SHORT_NAMES.items())}
    return _WORDS.get(key, short.get(key, key))


def listed(names: Sequence[str]) -> str:
    """Return "a, b and c"; of many the first ones, and how many more."""
    names = [*names[:_MOST_NAMES], f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES + 1 else list(names)
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def verdict(found: Comparison) -> str:
    """Return what can and cannot be told apart, in sentences: of the contrasts where there are any, else of the arms."""
    matched = [(arm, arm.matched) for arm in found.arms if _is_tested(arm.matched)]
    direct = [(arm, arm.direct) for arm in found.arms if _is_tested(arm.direct) and is_end(arm.settings)]
    if found.contrasts:
        sentences = _contrast_sentences(found)
    elif not found.arms:
        return "Nothing can be paired: TRL's logs have means alone. All runs are in the table."
    elif not matched and not direct:
        ends = listed([arm.name for arm in found.arms if is_end(arm.settings)])
        return f"There is nothing to compare: {ends} is all that was run."
    elif matched:
        sentences = [_sentence(found, matched, "At equal KL, ", f" {found.baseline}")]
        same = [(arm, one) for arm, one in matched if not isnan(one.p_equivalent)]
        if same:
            sentences.append(_equivalence(found, same))
        names = [arm.name for arm in found.arms if not arm.is_baseline and not arm.seeds_in_range and arm.seeds_compared]
        if names:
            outside, verb = listed(names), "lies" if len(names) == 1 else "lie"
            outside = outside[:1].upper() + outside[1:] if outside[:1].isascii() else outside  # Greek stays small
            sentences.append(f"{outside} {verb} outside {found.baseline}'s KLs and cannot be matched")
    else:
        base = next((arm.name for arm in found.arms if arm.direct is None), "")
        why = "" if all(arm.is_baseline for arm in found.arms) else f" (none lies within {found.baseline}'s)"
        why = why if found.kl_prompts else " (there is none to match)"
        sentences = [_sentence(found, direct, f"Each at its own KL{why}, ", f" {base}")]
    told = [one.effect for one in found.contrasts] if found.contrasts else [one for _, one in matched or direct]
    tested = [one for one in told if _is_tested(one)]
    if tested and all(one.errors.is_of_one_seed for one in tested):
        sentences.append("With one seed this holds for these runs, not yet for others of the same settings")
    if found.power is not None and found.is_share and not found.contrasts:
        sentences.append(_needed(found.power))
    return ". ".join([*filter(None, [exhaustion(found)]), *sentences]) + "."


def exhaustion(found: Comparison) -> str:
    """Return that a share is at its end for all points, so that nothing can differ on it, and what to use instead; else ""."""
    ends = [arm for arm in found.arms if is_end(arm.settings)]
    if not (found.is_share and found.pairs and len(ends) > 1 and min(arm.value for arm in ends) >= 1 - 1 / found.pairs - TIE):
        return ""
    measured = [run.metrics for run in found.runs if run.is_final]
    others = [
        key
        for key, metric in COMPARED.items()
        if key != found.metric
        and metric.direction
        and not metric.caution
        and measured
        and all(key in one and not (metric.is_share and one[key] >= 1 - 1 / found.pairs - TIE) for one in measured)
    ]
    instead = " or ".join(others[:3]) or "win_rate, with a scorer for the sampled answers, or harder pairs"
    are_all = min(arm.value for arm in ends) > 1 - TIE
    right = (
        f"all {counted(found.pairs, found.unit)}" if are_all else f"all but one of {counted(found.pairs, found.unit)}, or more,"
    )
    return (
        f"{found.metric} is exhausted: each of the {len(ends)} points has {right} right, so that none can be ahead on it; "
        f"compare on {instead} instead"
    )


def best_line(found: Comparison) -> str:
    """Return which point is best and how much of its lead is luck, or that the best are tied; empty where none was sought."""
    best, form, title = found.best, ".3f" if found.is_share else ".4g", METRICS[found.metric].title
    if best is None:
        return ""
    tied = [
        arm.name for arm in found.arms if is_end(arm.settings) and abs(arm.value - best.value) <= TIE * max(1, abs(best.value))
    ]
    if len(tied) > 1:
        return f"no point is best on '{title}': {listed(tied)} are tied at {best.value:{form}}, of {best.points} points"
    luck = f"{best.optimism:{form}}" if float(f"{best.optimism:{form}}") else f"{best.optimism:.1g}"
    return (
        f"best of {best.points} points on '{title}': {best.name}, {best.value:{form}}; {luck} of that is the luck of "
        f"being picked, so expect {best.corrected:{form}}"
    )


def _needed(power: Power) -> str:
    """What it takes to tell 2 points apart in the verdict."""
    unit = f"{power.unit}s"
    caution = ", the spread between seeds not counted" if isnan(power.seed_sd) else ""
    if power.needed == inf:
        return (
            f"No number of {unit} tells 2 points apart with {counted(power.seeds, 'seed')}, between which differences "
            f"scatter by {100 * power.seed_sd:.1f} points (standard deviation): more seeds would"
        )
    if power.needed <= power.pairs:
        return f"{power.pairs:,} {unit} are enough to tell 2 points apart{caution}"
    return f"Telling 2 points apart takes about {float(f'{power.needed:.2g}'):,.0f} {unit}, with as many seeds{caution}"


def power_lines(found: Comparison) -> list[str]:
    """Return which differences such runs find with 80 % power: in the verdict, alone, and with two more seeds."""
    power = found.power
    if power is None or isnan(power.smallest_found):
        return []
    unit, scale = (" points", 100) if found.is_share else ("", 1)
    what = "contrasts" if found.contrasts else "comparisons"
    together = f" among {power.comparisons} {what} (Holm)" if power.comparisons > 1 else ""
    lines = [
        f"smallest difference that the verdict finds{together} with 80 % power, of {counted(power.seeds, 'seed')}: "
        f"{scale * power.smallest_in_verdict:.3g}{unit}"
    ]
    if power.comparisons > 1:
        lines[0] += f"; one {what.removesuffix('s')} by itself: {scale * power.smallest_found:.3g}{unit}"
    if not isnan(power.with_two_more):
        lines.append(f"with two more seeds the verdict would find {scale * power.with_two_more:.3g}{unit}")
    return lines


def _is_tested(one: Effect | None) -> TypeGuard[Effect]:
    return one is not None and not isnan(one.p)


def _contrast_sentences(found: Comparison) -> list[str]:
    """What each contrast came to, and how it came to be asked."""
    late = [one for one in found.contrasts if one.after != 0]
    when = "named before any run was finished" if not late else "some of them named after runs were finished"
    if len(late) == len(found.contrasts):
        when = "named after runs were finished"
    several = len(found.contrasts) > 1
    about = f"{len(found.contrasts)} contrasts" if several else "One contrast"
    sentences = [f"{about} on {found.metric}, {when}{', tested together by themselves (Holm)' if several else ''}"]
    for one in found.contrasts:
        result = one.effect
        name = one.name[:1].upper() + one.name[1:] if one.name[:1].isascii() else one.name
        if result is None:
            sentences.append(f"{name}: nothing could be compared{f' ({one.lacking})' if one.lacking else ''}")
            continue
        over = counted(len(one.by_data_set), "data set") if one.by_data_set else ""
        over = f"{one.data_sets} of {over}" if 0 < one.data_sets < len(one.by_data_set) else over
        seeds = counted(result.errors.runs, "seed")
        if result.errors.is_of_one_seed:
            seeds = "one seed in each" if over else "one seed"
        where = ", ".join(filter(None, [over, seeds]))
        judged = "rests on one seed and is not tested"
        if _is_tested(result):
            where = f"{_interval(found, result)}, {where}"
            is_apart = result.p_adjusted < 1 - found.confidence
            judged = f"{'a difference' if is_apart else 'not told apart'} (p {fmt_p(result.p_adjusted)})"
        if not isnan(result.p_equivalent):
            is_within = result.p_equivalent_adjusted < 1 - found.confidence
            margin = f"{100 * result.margin:g} points" if found.is_share else f"{result.margin:g}"
            judged += (
                f", {'within' if is_within else 'not shown to be within'} {margin} (p {fmt_p(result.p_equivalent_adjusted)})"
            )
        sentences.append(f"{name}: {amount(found, result.estimate)} ({where}): {judged}")
    return sentences


def fmt_p(p: float) -> str:
    """Return a p with two digits: "0.031", "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def amount(found: Comparison, value: float) -> str:
    """Return a difference in points of a share, or in the metric's units, with its sign."""
    return f"{_sign(100 * value, '.1f')} points" if found.is_share else _sign(value, ".3g")


def _equivalence(found: Comparison, arms: Sequence[tuple[Arm, Effect]]) -> str:
    """Which arms are shown to be as good as the line, and which are not."""
    level, margin = 1 - found.confidence, arms[0][1].margin
    size = f"{100 * margin:g} points" if found.is_share else f"{margin:g}"
    within = [arm.name for arm, one in arms if one.p_equivalent_adjusted < level]
    if not within:
        return f"None is shown to be within {size} of {found.baseline} (two one-sided tests, Holm)"
    others = "" if len(within) == len(arms) else "; the others that were tested are not shown to be"
    return f"Within {size} of {found.baseline} (two one-sided tests, Holm): {listed(within)}{others}"


def metric_remarks(metric: Metric[Any], *, measured: int, lacking: int, why: str | None, logs: int) -> list[str]:
    """Return what is to be known of the metric and of those that lack it.

    Args:
        metric: that is compared on.
        measured: how many observations there are, logs of TRL not counted.
        lacking: how many of them have no such metric.
        why: one of these has none, in words.
        logs: how many logs of TRL there are.
    """
    found = []
    if metric.caution:
        found.append(f"{metric.key} {metric.caution}; accuracy/shift, accuracy/policy and win_rate do not")
    if lacking:
        found.append(f"{lacking} of {measured} measured policies have no {metric.key} and are shown, not compared: {why}")
    if logs:
        found.append(
            f"{counted(logs, 'log')} of TRL: means over held-out pairs, without the pairs one by one and without KL, "
            "so that nothing can be paired or matched; TRL averages them over batches and counts ties of rewards as wrong"
        )
    return found


def arm_remarks(found: Comparison) -> list[str]:
    """Return what makes differences less sure than their intervals say."""
    remarks = []
    if not found.kl_prompts:
        remarks.append("no answers were sampled, so there is no KL to match: set generation.prompts, or run pe-dpo eval")
    elif found.kl_prompts < FEW_PROMPTS:
        remarks.append(f"KL comes from {found.kl_prompts} prompts; more generation.prompts would make the match surer")
    if found.seeds == 1:
        remarks.append("one seed: intervals and p hold for these runs, the spread between seeds is not in them")
    alone = [arm.name for arm in found.arms for one in (arm.matched, arm.direct) if one and isnan(one.p)]
    if alone:
        remarks.append(
            f"{listed(list(dict.fromkeys(alone)))}: compared in one seed where others have several; shown without interval and "
            "p, and in neither Holm's correction nor the verdict"
        )
    unknown = [arm.name for arm in found.arms if isnan(arm.kl)]
    if unknown and found.kl_prompts:
        remarks.append(
            f"{listed(unknown)}: no sampled answers for some or all seeds, and without a KL nothing is matched; ask "
            "for them with generation.prompts, or with pe-dpo eval"
        )
    remarks += _line_remarks(found)
    for contrast in found.contrasts:
        if contrast.left_out:
            remarks.append(
                f"{contrast.text}: the mean leaves out {listed(contrast.left_out)}, which could not be compared in all of the "
                "seeds that it counts"
            )
        if contrast.after:
            remarks.append(f"{contrast.text}: named after {counted(contrast.after, 'run')} had finished")
    return remarks


def pool_remark(pooled: SeedVariance | None) -> str:
    """Return whether the variance between seeds was pooled over points at equal KL, and why.

    Args:
        pooled: what they tell of it together.
    """
    if pooled is None:
        return (
            f"the variance between seeds is each point's own: it takes {FEWEST_ARMS} points at equal KL in the same "
            f"{FEWEST_SEEDS} seeds to pool it"
        )
    what = f"of {pooled.arms} points with {pooled.seeds} seeds"
    if not pooled.is_plausible:
        return (
            f"the variance between seeds is each point's own: the variances {what} do not look as a scaled inverse χ² has them "
            f"(p {fmt_p(pooled.fit_p)}), so that pooling would mislead"
        )
    prior = (
        "do not differ by more than chance" if pooled.freedom == inf else f"differ as a prior of {pooled.freedom:.1f} df has"
    )
    return (
        f"the variance between seeds is pooled: the variances {what} {prior} (fit: p {fmt_p(pooled.fit_p)}); since points "
        f"scatter together, they give {pooled.pooled_freedom:.1f} degrees of freedom instead of {pooled.seeds - 1}"
    )


def _line_remarks(found: Comparison) -> list[str]:
    """What makes differences at equal KL less sure."""
    remarks = []
    outside: dict[tuple[int, int], list[str]] = {}
    for arm in found.arms:
        if arm.seeds_in_range < arm.seeds_compared:
            seeds = arm.seeds_compared - arm.seeds_in_range, arm.seeds_compared
            outside.setdefault(seeds, []).append(arm.name)
    remarks += [
        f"{listed(names)}: out of range of {found.baseline} for {missed} of "
        f"{counted(compared, 'seed')}; nothing is extrapolated"
        for (missed, compared), names in outside.items()
    ]
    matched = [(arm.name, arm.matched) for arm in found.arms if _is_tested(arm.matched)]
    lone = [name for name, one in matched if one.p < 1 - found.confidence <= one.p_adjusted]
    if lone:
        remarks.append(
            f"{listed(lone)}: the interval by itself leaves 0 out, but among {len(matched)} comparisons that happens "
            "too easily by chance (Holm)"
        )
    chord = [arm.name for arm in found.arms if arm.seeds_on_chord]
    if chord:
        remarks.append(
            f"{listed(chord)}: nearer to the reference than any {found.baseline} that was run, and so held against a straight "
            "line from the reference itself, from which the true curve may bend away; run values of "
            f"{found.baseline} that stay nearer to it"
        )
    wide = [arm.name for arm in found.arms if arm.matched and arm.gap > arm.matched.high - arm.matched.low]
    if wide:
        remarks.append(
            f"{listed(wide)}: the neighbours on the {found.baseline} line differ by more than the interval is wide, so "
            f"the straight line between them may be wrong by as much; run values of {found.baseline} in between"
        )
    return remarks


def _interval(found: Comparison, one: Effect) -> str:
    factor, form = (100, ".1f") if found.is_share else (1, ".3g")
    return f"{100 * found.confidence:g} % CI {_sign(factor * one.low, form)} to {_sign(factor * one.high, form)}"


def _sentence(found: Comparison, arms: Sequence[tuple[Arm, Effect]], before: str, after: str) -> str:
    """Which arms differ from what `after` says, and which do not."""
    level, is_share = 1 - found.confidence, found.is_share

    def sample(one: Effect) -> str:
        return f"{counted(len(one.per_seed), 'seed')}, {counted(found.pairs, found.unit)}"

    parts = []
    same = [(arm, one) for arm, one in arms if one.p_adjusted >= level]
    if same:
        largest = max((one for _, one in same), key=lambda one: abs(one.estimate))
        what = "difference" if len(same) == 1 else "largest difference"
        parts.append(
            f"{listed([arm.name for arm, _ in same])} cannot be told apart from{after} on {found.metric} "
            f"({what} {amount(found, largest.estimate)}, "
            f"{_interval(found, largest)}, {sample(largest)})"
        )
    # Arms that are worse come first; where neither is good they are lower and higher.
    below, above = {1: ("worse", "better"), -1: ("better", "worse"), 0: ("lower", "higher")}[found.direction]
    for word in ("worse", "lower", "better", "higher"):
        group = [(arm, one) for arm, one in arms if one.p_adjusted < level and (below if one.estimate < 0 else above) == word]
        if not group:
            continue
        than = "" if same else f" than{after} on {found.metric}"
        sizes = [f"{100 * abs(one.estimate):.1f} points" if is_share else f"{abs(one.estimate):.3g}" for _, one in group]
        amounts = [f"by {size} ({_interval(found, one)})" for size, (_, one) in zip(sizes, group, strict=True)]
        if not parts:
            amounts[0] = f"{amounts[0][:-1]}, {sample(group[0][1])})"
        names = [arm.name for arm, _ in group]
        others = [f"{name} {amount}" for name, amount in zip(names[1:], amounts[1:], strict=True)]
        parts.append(listed([f"{names[0]} is {word}{than} {amounts[0]}", *others]))
    return before + "; ".join(parts)


def _sign(value: float, form: str) -> str:
    text = format(abs(value), form)
    is_zero = not any(digit in text for digit in "123456789")
    return text if is_zero else f"{'−' if value < 0 else '+'}{text}"

"""The report of a sweep: what can and cannot be told apart, every run shown, finished or not."""

import math
from collections.abc import Sequence
from pathlib import Path

from pe_dpo.experiments.comparison import Comparison
from pe_dpo.experiments.wording import counted, dial_name
from pe_dpo.recipe import describe, recipe_to_yaml
from pe_dpo.report.content import Folded, Page, Section
from pe_dpo.report.sweep_arms import equal_kl_section, frontier_section, kappa_section, measures_section, seeds_section
from pe_dpo.report.sweep_record import RunState, SweepRecord, read_sweep_record
from pe_dpo.report.sweep_tables import arms_section, records, runs_section


def report_sweep(folder: Path, *, metric: str | None = None, baseline: str = "beta") -> Page:
    """Return the report of a sweep, whether all of its runs are finished or none.

    Args:
        folder: with sweep.json.
        metric: to compare on; see `compare`.
        baseline: the dial that others are held against at equal KL.

    Raises:
        UsageError: sweep.json is torn.
    """
    sweep = read_sweep_record(folder, metric=metric, baseline=baseline)
    sections = [_plan_section(sweep)]
    if sweep.comparison is not None:
        sections += [
            frontier_section(sweep, sweep.comparison),
            equal_kl_section(sweep.comparison),
            kappa_section(sweep),
            seeds_section(sweep, sweep.comparison),
            measures_section(sweep, sweep.comparison),
            arms_section(sweep, sweep.comparison),
        ]
    sections += [runs_section(sweep), _limits_section(sweep)]
    verdict = sweep.comparison.verdict if sweep.comparison else f"Nothing can be compared yet: {sweep.why_not}."
    return Page(f"Sweep {folder.resolve().name}", verdict, _remarks(sweep), sections, records(sweep))


def _remarks(sweep: SweepRecord) -> list[str]:
    found = [_standing(sweep.states)]
    found += [f"Look: {_sentence(remark)}" for remark in (sweep.comparison.remarks if sweep.comparison else [])]
    return found


def _standing(states: Sequence[RunState]) -> str:
    """How many runs there are, and in which state."""
    finished = sum(state.status == "finished" for state in states)
    rest = [state.status for state in states if state.status != "finished"]
    if not rest:
        return f"All {len(states)} planned runs are finished and shown below."
    counts = ", ".join(f"{rest.count(status)} {status}" for status in dict.fromkeys(rest))
    return f"Of {len(states)} planned runs {finished} are finished; {counts}. All are named below."


def _plan_section(sweep: SweepRecord) -> Section:
    recipe = sweep.recipe
    loss = describe(recipe.loss)
    facts = sweep.finished[0].facts if sweep.finished else {}
    versions = facts.get("versions", {})
    pairs = facts.get("pairs", {})
    rows = [
        ("Base", recipe.model.base),
        ("Data", recipe.data.train),
        ("Pairs", f"{pairs['train']} to train on, {pairs['held_out']} held out" if pairs else ""),
        ("Base recipe's loss", loss.formula),
        ("Equals", loss.equals),
        ("Dials turned", _dials(sweep)),
        ("Seeds", ", ".join(map(str, sorted({state.seed for state in sweep.states})))),
        ("Runs", str(len(sweep.states))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if name != "platform")),
    ]
    folded = [Folded("Base recipe", recipe_to_yaml(recipe).rstrip())]
    return Section("plan", "What was run", facts=[row for row in rows if row[1]], folded=folded)


def _dials(sweep: SweepRecord) -> str:
    """Each dial with the values it was turned to, "β 0.025, 0.4; γ 0x, 2x"."""
    values: dict[str, list[str]] = {}
    for state in sweep.states:
        for key, value in (state.row.settings if state.row else {}).items():
            values.setdefault(dial_name(key), []).append(f"{value:g}" if isinstance(value, float) else str(value))
    return "; ".join(f"{name} {', '.join(dict.fromkeys(found))}" for name, found in values.items())


def _limits_section(sweep: SweepRecord) -> Section:
    sentences = [
        "One base, one data set: what holds here is not shown for others. Held-out pairs say how answers are ranked; what the "
        "policy writes by itself is in KL, length and, where a scorer was given, win rate."
    ]
    comparison = sweep.comparison
    if comparison is not None:
        sentences += [*_power_sentences(comparison), *_best_sentences(comparison)]
    missing = []
    if len({state.seed for state in sweep.states}) == 1:
        missing.append("how much seeds matter: every point has one seed; add some with `pe-dpo sweep … --seeds 3`.")
    return Section("limits", "What this cannot show", sentences, missing=missing)


def _power_sentences(comparison: Comparison) -> list[str]:
    power = comparison.power
    if power is None or math.isnan(power.smallest_found):
        return []
    size = f"{100 * power.smallest_found:.1f} points" if comparison.is_share else f"{power.smallest_found:.3g}"
    return [
        f"With {counted(power.pairs, power.unit)} and {counted(power.seeds, 'seed')} a true difference of {size} would be "
        "found with 80 % power; smaller ones may be there unseen."
    ]


def _best_sentences(comparison: Comparison) -> list[str]:
    best = comparison.best
    if best is None:
        return []

    def form(value: float) -> str:
        return f"{value:.3f}" if comparison.is_share else f"{value:.4g}"

    return [
        f"The best of {best.points} points on {comparison.metric} is {best.name} with {form(best.value)}; having been picked, "
        f"it is expected to be {form(best.optimism)} less good than it looks: {form(best.corrected)}."
    ]


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."

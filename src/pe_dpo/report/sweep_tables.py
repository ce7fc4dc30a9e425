"""The tables of a sweep: its arms, and every run of it."""

import math
from collections.abc import Sequence
from typing import Any

from pe_dpo.experiments.comparison import Arm, Comparison, Difference, RunRow
from pe_dpo.report.content import Section, Table
from pe_dpo.report.run_outcome import four, signed_text, three, two, whole
from pe_dpo.report.sweep_record import RunState, SweepRecord


def arms_section(sweep: SweepRecord, comparison: Comparison) -> Section:
    """Return the table of arms: effect at equal KL, KL, accuracy, length, entropy, cost."""
    base = next((arm for arm in comparison.arms if not arm.settings), None)
    rows = [_arm_row(sweep, comparison, arm, number, base) for number, arm in enumerate(comparison.arms, start=1)]
    metric = comparison.metric
    unit = ", points" if comparison.is_share else ""
    header = ["arm", "no.", "seeds", metric, "KL, nats", f"Δ at equal KL{unit}", "in range", "p (Holm)", "Pareto"]
    header += [
        "acc. π",
        "acc. π / token",
        *(["win rate"] if _has_wins(sweep) else []),
        "tokens",
        "Δ tokens",
        "entropy",
        "seconds",
    ]
    table = Table(
        "arms",
        f"{len(rows)} arms, means over seeds",
        header,
        rows,
        f"{metric}: {comparison.title}; ± is the standard deviation between seeds. Δ at equal KL: minus the "
        f"{comparison.baseline} dial at the same √KL, with {100 * comparison.confidence:g} % interval, never extrapolated; in "
        "range: for how many seeds. Pareto: share of replicates in which no other arm has as small a KL and as good a value. "
        "acc. π: share of held-out pairs with Δπ > 0. Δ tokens: against the base recipe. Seconds: of training, mean. "
        "– stands for what was not measured.",
    )
    return Section("arms-table", "Arms", tables=[table])


def runs_section(sweep: SweepRecord) -> Section:
    """Return the table of all runs, of their earlier and scaled states, and the names of those that are not finished."""
    metric = sweep.comparison.metric if sweep.comparison else "accuracy/policy"
    header = [
        "run",
        "seed",
        "status",
        "steps",
        metric,
        "KL, nats",
        "acc. π",
        "acc. π / token",
        "loss",
        "tokens",
        "entropy",
        "seconds",
    ]
    rows = [_run_row(state, metric) for state in sweep.states]
    note = "– stands for what was not measured."
    if any(math.isfinite(state.margin_noise) for state in sweep.states):
        header.append("mask noise")
        rows = [[*row, _known(state.margin_noise, three)] for row, state in zip(rows, sweep.states, strict=True)]
        note += " Mask noise: how far a mask of mixout moves a pair's score, in units of what training moved it (margin_noise)."
    tables = [Table("runs", f"All {len(rows)} planned runs", header, rows, note)]
    others = [row for row in (sweep.comparison.runs if sweep.comparison else []) if not row.is_final]
    for name, rest, words in (
        ("snapshots", [row for row in others if row.scale is None], "earlier states of these runs (snapshots)"),
        ("scaled", [row for row in others if row.scale is not None], "adapters of these runs, scaled toward the reference"),
    ):
        if rest:
            header = ["run", "seed", "step", metric, "KL, nats", "tokens"]
            tables.append(Table(name, f"{len(rest)} {words}", header, [_other_row(row) for row in rest], is_folded=True))
    missing = [_unfinished(sweep, state) for state in sweep.unfinished]
    return Section("runs-table", "All runs", tables=tables, missing=missing)


def _other_row(row: RunRow) -> list[str]:
    numbers = [_known(row.value, four), _known(row.kl, four), _metric(row.metrics, "tokens", two)]
    return [row.name, str(row.seed), str(row.step), *numbers]


def records(sweep: SweepRecord) -> list[dict[str, Any]]:
    """Return one object per planned run, with what was measured, for results.jsonl; what is not known is null."""
    return [_record(sweep, state) for state in sweep.states]


def _record(sweep: SweepRecord, state: RunState) -> dict[str, Any]:
    row = state.row
    measured = {"kl": row.kl, **row.metrics} if row else {}
    found: dict[str, Any] = {
        "point": state.name,
        "settings": row.settings if row else None,
        "seed": state.seed,
        "folder": str(state.folder.relative_to(sweep.folder)),
        "status": state.status,
        "why": state.why or None,
        "steps": state.facts.get("step"),
        "seconds": state.facts.get("seconds"),
        "kappa": state.kappa,
        "metrics": {key: value for key, value in measured.items() if math.isfinite(value)},
    }
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in found.items()}


def _arm_row(sweep: SweepRecord, comparison: Comparison, arm: Arm, number: int, base: Arm | None) -> list[str]:
    runs = sweep.rows_of(arm)
    tokens = _mean_of(runs, "tokens")
    base_tokens = _mean_of(sweep.rows_of(base), "tokens") if base else math.nan
    seconds = _mean([float(state.facts.get("seconds") or math.nan) for state in sweep.runs_of(arm)])
    form = three if comparison.is_share else four
    spread = "" if math.isnan(arm.value_sd) else f" ± {form(arm.value_sd)}"
    cells = [arm.name, str(number), str(len(arm.seeds)), f"{form(arm.value)}{spread}", _known(arm.kl, four)]
    in_range = f"{arm.seeds_in_range} of {arm.seeds_compared}" if arm.seeds_compared else "–"
    cells += [_effect(comparison, arm), in_range, _p(arm.matched), _known(arm.pareto, two)]
    cells += [_known(_mean_of(runs, key), three) for key in ("accuracy/policy", "accuracy/policy_per_token")]
    cells += [_known(_mean_of(runs, "win_rate"), three)] if _has_wins(sweep) else []
    difference = "–" if math.isnan(tokens - base_tokens) else _plus(tokens - base_tokens)
    return [*cells, _known(tokens, two), difference, _known(_mean_of(runs, "entropy_per_token"), three), _known(seconds, whole)]


def _effect(comparison: Comparison, arm: Arm) -> str:
    if arm.matched is None:
        return "baseline" if arm.is_baseline else "–"
    found = arm.matched
    factor, form = (100, "+.1f") if comparison.is_share else (1, "+.3g")
    estimate, low, high = (signed_text(f"{factor * value:{form}}") for value in (found.estimate, found.low, found.high))
    return f"{estimate} [{low}, {high}]"


def _p(found: Difference | None) -> str:
    return "–" if found is None or math.isnan(found.p_adjusted) else f"{found.p_adjusted:.2g}"


def _run_row(state: RunState, metric: str) -> list[str]:
    metrics = state.row.metrics if state.row else {}
    seconds = state.facts.get("seconds")
    value = state.row.value if state.row else state.after(metric)
    return [
        state.name,
        str(state.seed),
        state.status,
        str(state.facts.get("step", "–")),
        _known(value, four),
        _known(state.row.kl if state.row else math.nan, four),
        *(_known(metrics.get(key, state.after(key)), three) for key in ("accuracy/policy", "accuracy/policy_per_token")),
        _known(state.after("loss"), four),
        _metric(metrics, "tokens", two),
        _metric(metrics, "entropy_per_token", three),
        "–" if seconds is None else whole(float(seconds)),
    ]


def _unfinished(sweep: SweepRecord, state: RunState) -> str:
    why = f" ({state.why})" if state.why else ""
    where = state.folder.relative_to(sweep.folder)
    return f"{where}: {state.status}{why}; start the same `pe-dpo sweep` again to go on with it."


def _has_wins(sweep: SweepRecord) -> bool:
    return any(state.row is not None and "win_rate" in state.row.metrics for state in sweep.states)


def _mean_of(rows: Sequence[RunRow], key: str) -> float:
    return _mean([row.metrics.get(key, math.nan) for row in rows])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _metric(metrics: dict[str, float], key: str, form: Any) -> str:
    return _known(metrics.get(key, math.nan), form)


def _known(value: float, form: Any) -> str:
    return "–" if math.isnan(value) else str(form(value))


def _plus(value: float) -> str:
    return signed_text(f"{value:+.2f}")

"""The report of one run: what was trained, what it changed on held-out pairs, and what cannot be told from it."""

from pathlib import Path

from pe_dpo.metrics.transitions import Flips, count_flips
from pe_dpo.report.content import Page, Section
from pe_dpo.report.run_outcome import outcome_section, trained_section
from pe_dpo.report.run_pairs import length_section, preference_section, texts_section
from pe_dpo.report.run_steps import drift_section, learning_section, movement_section, regime_section
from pe_dpo.runs.run_record import RunRecord, measured, read_run_record

NO_HELD_OUT = (
    "no pairs were held out, or they were not measured yet, so nothing is known of pairs that the run was not trained on; set "
    "data.eval and train again, or measure it on other pairs with `pe-dpo eval RUN --data FILE`"
)


def report_run(folder: Path) -> Page:
    """Return the report of a run, finished or not.

    Raises:
        UsageError: it is no run folder, or a file in it is torn.
    """
    run = read_run_record(folder)
    flips = _flips(run)
    sections = [
        trained_section(run),
        outcome_section(run),
        regime_section(run),
        preference_section(run, flips),
        movement_section(run),
        learning_section(run),
        drift_section(run),
        length_section(run),
        texts_section(run),
        _limits_section(run),
    ]
    return Page(f"Run {folder.resolve().name}", _verdict(run, flips), _remarks(run, flips), sections)


def _flips(run: RunRecord) -> dict[bool, Flips]:
    """Changes of sides by whether log-probs are per token; empty without held-out pairs or their start."""
    pairs = run.held_out
    if pairs is None or pairs.start is None:
        return {}
    return {
        per_token: count_flips(
            pairs.preference(pairs.start, per_token=per_token),
            pairs.preference(pairs.policy, per_token=per_token),
            pairs.prompt_keys,
        )
        for per_token in (False, True)
    }


def _verdict(run: RunRecord, flips: dict[bool, Flips]) -> str:
    if not run.is_finished:
        return f"This run is not finished ({_state(run)}); what follows is what it left so far."
    if not flips:
        return "Nothing can be said of pairs that this run was not trained on: none were held out, or they were not measured."
    main = flips[run.recipe.loss.reduce == "mean"]
    return _flip_sentence(run, main, "Δ per token" if run.recipe.loss.reduce == "mean" else "Δ of summed log-probs")


def _state(run: RunRecord) -> str:
    step = max((line["step"] for line in run.lines), default=0)
    why = f": {run.facts['why']}" if run.facts.get("why") else ""
    return f"status: {run.facts.get('status', 'unknown')}{why}, last step written: {step}"


def _flip_sentence(run: RunRecord, flips: Flips, by: str) -> str:
    assert run.held_out is not None, "flips were counted"
    pairs = len(run.held_out.where)
    if flips.gained + flips.lost + flips.tied == 0:
        return f"No held-out pair changed sides ({pairs} pairs, {by}): the policy ranks them as it did before training."
    if flips.p >= 0.05:
        told = "this cannot be told from chance"
    else:
        told = f"training made the ranking {'better' if flips.change > 0 else 'worse'}, by more than chance would"
    interval = "" if flips.low != flips.low else f", 95 % interval {_points(flips.low)} to {_points(flips.high)}"
    return (
        f"Of {pairs} held-out pairs the policy now ranks {flips.gained} right that it ranked wrong before, and {flips.lost} "
        f"the other way round ({_points(flips.change)} points{interval}; p = {flips.p:.2g}; {by}): {told}."
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _remarks(run: RunRecord, flips: dict[bool, Flips]) -> list[str]:
    found = []
    if run.is_finished and flips:
        per_token = run.recipe.loss.reduce != "mean"
        found.append(_flip_sentence(run, flips[per_token], "Δ per token" if per_token else "Δ of summed log-probs"))
    kl = measured(run.evaluation, "kl")
    if kl is not None:
        error = "" if kl[1] != kl[1] else f" ± {kl[1]:.2g} (standard error)"
        found.append(f"On its own answers the policy is KL(π‖π0) = {kl[0]:.3g}{error} nats per answer from the reference.")
    found += [f"Look: {remark}" for remark in run.remarks]
    if run.is_finished and not run.remarks:
        found.append("Nothing looked off at the end of training.")
    return found


def _limits_section(run: RunRecord) -> Section:
    sentences = [
        "One run has one seed. How much another seed, order of pairs or initialisation would have changed is not in these "
        "intervals, which are over pairs and prompts alone; `pe-dpo sweep --seeds 3` shows it.",
        "Whether another setting is better can only be told at matched KL, on the same pairs: `pe-dpo compare`.",
    ]
    if run.recipe.loss.reduce == "sum":
        sentences.append("By summed log-probs, right and wrong mostly follow length; read both columns, sum and per token.")
    missing = [NO_HELD_OUT] if run.held_out is None else []
    return Section("limits", "What this cannot show", sentences, missing=missing)

"""`pe-dpo audit`."""

import json as json_module
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_dpo.cli import console, options
from pe_dpo.printable import counted, printable_json

if TYPE_CHECKING:
    from pe_dpo.audit.audit import Audit
    from pe_dpo.audit.forecast import Forecast
    from pe_dpo.audit.quantization_error import QuantizationError
    from pe_dpo.metrics.reference_accuracy import ReferenceAccuracy


def audit(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    loss: options.Loss = None,
    beta: options.Beta = None,
    gamma: options.Gamma = None,
    margin: options.Margin = None,
    link: options.Link = None,
    mixout: options.Mixout = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Read only this many rows, for a try.")] = None,
    set_: options.Settings = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Draw it as PNG into this folder.")] = None,
    four_bit_noise: Annotated[
        bool, typer.Option("--four-bit-noise", help="Also measure what quantizing the base does, in two more passes.")
    ] = False,
) -> None:
    """Tell, before training, what the reference does to these pairs under this loss, and which γ the data suggest."""
    from pe_dpo.errors import UsageError
    from pe_dpo.recipe import load_recipe, warnings
    from pe_dpo.recipe.describe import name_loss

    set_ = [*(set_ or []), *([] if limit is None else [f"data.limit={limit}"])]
    turned = options.overrides(set_, loss=loss, beta=beta, gamma=gamma, margin=margin, link=link, mixout=mixout)
    plan = load_recipe(recipe, turned)
    if plots is not None and plots.exists() and not plots.is_dir():
        raise UsageError(f"--plots {plots}: is a file; name a folder")

    console.start(is_silent=json)
    from pe_dpo.audit.audit import audit as run

    found = run(plan, with_quantization_error=four_bit_noise)
    if plots is not None:
        from pe_dpo.report.audit_plots import save_audit_plots

        files = save_audit_plots(found, plots)
        if not json:
            console.say(f"{counted(len(files), 'plot')} as PNG in {plots}")
    if json:
        typer.echo(printable_json(json_module.dumps(found.to_dict(), indent=1, ensure_ascii=False)))
        return
    reference = found.reference
    source = "run just now" if reference["was_run"] else "all from the store, the model was not run"
    console.say(name_loss(plan.loss))
    console.say(f"π0: {reference['is']}, quantize {reference['quantize']}, {reference['dtype']}; log-probs {source}")
    console.show_lines([f"\n{found.recommendation}\n"])
    _show_ranking(found)
    _show_label_fit(found)
    _show_forecasts(found)
    _show_ways(found)
    if found.quantization_error is not None:
        _show_quantization_error(found.quantization_error)
    console.show_lines([f"warning: {line}" for line in (*warnings(plan), *found.warnings)])


def _show_ranking(found: "Audit") -> None:
    def row(words: str, value: Callable[["ReferenceAccuracy"], str]) -> list[str]:
        return [words, value(found.by_sum), value(found.per_token)]

    rows = [
        row("ranked right [95 %]", lambda one: f"{one.right:.3f} {_interval(one.right_interval, '.3f')}"),
        row("ranked wrong", lambda one: f"{one.wrong:.3f}"),
        row("tied pairs", lambda one: f"{one.ties}"),
        row("right at equal length", lambda one: f"{one.right_at_equal_length:.3f}"),
        row("sd(Δ0), nats", lambda one: f"{one.spread:.4g}"),
        row("… by the median deviation", lambda one: f"{one.robust_spread:.4g}"),
        row("correlation with |chosen| − |rejected|", lambda one: f"{one.length_correlation:.3f}"),
    ]
    title = f"What the reference prefers: {counted(found.pairs, 'pair')} to train on, {counted(found.prompts, 'prompt')}"
    console.show_table(title, ["", "summed", "per token"], rows)
    console.say(f"{found.disagreement:.1%} of the pairs are right by one of the two and not by the other\n")


def _show_forecasts(found: "Audit") -> None:
    from pe_dpo.audit.forecast import AGREEMENTS, FLIP_QUANTILES
    from pe_dpo.recipe.describe import preference_names

    columns = [found.recipe, *found.kappas]

    def row(words: str, value: Callable[["Forecast"], str]) -> list[str]:
        return [words, *(value(one) for one in columns)]

    rows = [
        row("γ", lambda one: f"{one.gamma:.4g}"),
        row(f"δ = (γ−β)·sd({preference_names(found.loss.rejected_weight)[1]})", lambda one: f"{one.delta:.3g}"),
        row("gradient on pairs ranked right", lambda one: _share(one.weight_right)),
        row("gradient on pairs ranked wrong", lambda one: _share(one.weight_wrong)),
        row("effective share of pairs", lambda one: _share(one.effective)),
    ]
    if found.recipe.saturated is not None:
        rows.append(row("saturated weights (< .05, > .95)", lambda one: _share(one.saturated)))
    rows.append(row("right where a hinge ends", lambda one: _share(one.hinge_accuracy)))
    for index, quantile in enumerate(FLIP_QUANTILES):
        words = f"{quantile:.0%} of the wrong pairs have flipped by"
        rows.append(row(words, lambda one, index=index: _time(one.flip_times[index])))  # type: ignore[misc]
    for index, agreement in enumerate(AGREEMENTS):
        words = f"idealized accuracy, {agreement:.0%} agreement"
        rows.append(row(words, lambda one, index=index: _share(one.ideal_accuracy[index])))  # type: ignore[misc]
    asked = found.asked_gamma if isinstance(found.asked_gamma, str) else f"{found.asked_gamma:g}"
    header = ["", f"recipe: {asked}", *(f"κ = {one.kappa:g}" for one in found.kappas)]
    how = "summed" if found.loss.reduce == "sum" else "per token"
    own = "" if found.terms.beta is None else " and each pair's own"
    title = f"What the loss makes of it, by κ = γ/β: β {found.loss.beta:g}{own}, Δ0 {how}, times in 1/(2β²)"
    console.show_table(title, header, rows)
    console.say()


def _show_ways(found: "Audit") -> None:
    rows = []
    for asked, way in found.ways.items():
        if isinstance(way, str):
            rows.append([asked, *["–"] * 7])
            continue
        at = found.forecast(way.gamma)
        number = f"{way.gamma:.4g}" + (f" {_interval(way.interval)}" if way.interval else "")
        shares = [_share(at.weight_right), _share(at.effective), _share(at.saturated)]
        rows.append([asked, number, f"{at.kappa:.3g}", f"{at.delta:.3g}", *shares, _time(at.flip_times[1])])
    header = ["gamma: …", "γ", "κ", "δ", "on ranked right", "effective", "saturated", "median flip"]
    console.show_table("γ from these data: what can be written as gamma, and what it would do", header, rows)
    for asked, way in found.ways.items():
        if isinstance(way, str):
            console.say(f"{asked}: {way}")


def _show_label_fit(found: "Audit") -> None:
    fit = found.label_fit
    rows = [
        ["τ̂ [95 %]: σ(τ̂·Δ0) is right as often as it says", f"{fit.scale:.4g} {_interval(fit.interval)}"],
        ["… standard error, independent pairs", f"{fit.standard_error:.2g}"],
        ["… at equal length", f"{_number(fit.scale_without_length)} ± {_number(fit.standard_error_without_length)}"],
        ["likelihood ratio against τ = 0, χ²(1)", f"{fit.likelihood_ratio:.1f}, p = {fit.p_value:.2g}"],
        ["information on held-back folds, bits a pair", f"{fit.bits_per_pair:.4f}"],
        ["accuracy [95 %], ties ½", f"{fit.accuracy:.3f} {_interval(fit.accuracy_interval, '.3f')}"],
    ]
    how = "summed" if found.loss.reduce == "sum" else "per token"
    console.show_table(f"What Δ0 ({how}) tells of the labels: whether the reference knows them", ["", ""], rows)
    console.say()


def _show_quantization_error(error: "QuantizationError") -> None:
    rows = [
        ["log p of a token moves by, nats", f"{error.shift_per_token:+.5f}"],
        ["slope of Δ0 on the plain Δ0", f"{error.slope:.4f}"],
        ["rms of η, nats", f"{error.rms:.4g}"],
        ["reliability 1 − Var(η)/Var(Δ0)", f"{error.reliability:.5f}"],
        ["pairs that change side, summed", f"{error.flips:.2%}"],
        ["pairs that change side, per token", f"{error.flips_per_token:.2%}"],
        ["correlation of η with |chosen| − |rejected|", f"{error.length_correlation:.3f}"],
        ["mean |Δw| at step 0", f"{error.weight_change:.2g}"],
    ]
    title = f"η = Δ0 with {error.quantize} − Δ0 in {error.against}, on {error.pairs} pairs"
    console.show_table(title, ["", ""], rows)


def _interval(ends: tuple[float, float], form: str = ".3g") -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"


def _time(value: float) -> str:
    return "–" if value != value else "never" if value == float("inf") else f"{value:.3g}"

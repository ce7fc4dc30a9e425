"""What a p of mixout comes to: the drift and the accuracy of the study's runs, and the noise of their adapters' masks.

    python -m benchmarks.mixout_strength measure SWEEP FILE.json     margin_noise of the trained adapters, by form and p
    python -m benchmarks.mixout_strength plot PACKED … -o FILE.png   the figure of docs/mixout.md, from packed studies

`measure` needs the adapters (a sweep as it was run); `plot` reads packed folders (`benchmarks.study`) with noise.json in them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peft.tuners.lora import LoraLayer

from pe_dpo.experiments.plan import read_plan
from pe_dpo.model.adapter import restore_adapter
from pe_dpo.model.mixout import Form
from pe_dpo.recipe import Recipe
from pe_dpo.recipe.schema import MixoutSection
from pe_dpo.training.mixing import Mixing
from pe_dpo.training.preparation import prepare_run
from pe_dpo.training.train import build_trainer

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
FORMS: tuple[Form, ...] = ("column", "element")


def measure(sweep: Path) -> list[dict[str, Any]]:
    """Return margin_noise of the runs that turn p and γ alone, γ = β or 0."""
    plan = read_plan(sweep)
    runs = [(point, recipe) for point, recipe in zip(plan.points, plan.recipes, strict=True) if _is_of_interest(point.settings)]
    prepared = prepare_run(plan.recipe)
    found = []
    for form in FORMS:
        recipe = plan.recipe.model_copy(update={"mixout": MixoutSection(p=SHARES[0], form=form)})
        trainer = build_trainer(recipe, prepared)
        (mixing,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, Mixing))
        trainer.monitored_reference = trainer.score_reference()
        for point, of_run in runs:
            restore_adapter(trainer.model, sweep / point.folder)
            for p in _shares(of_run.mixout.p, form):
                mixing.mixout.p = p
                size = _update_norm(trainer.model)
                found.append({**_which(of_run), "form": form, "p": p, "update_norm": size, **mixing.measure()._asdict()})
                print(json.dumps(found[-1]), flush=True)
    return found


def _update_norm(model: Any) -> float:
    """‖ΔW‖ over all layers (Frobenius)."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return float(sum(layer.get_delta_weight("default").detach().square().sum() for layer in layers) ** 0.5)


def _shares(trained_at: float, form: Form) -> tuple[float, ...]:
    """Where to measure an adapter: everywhere if it was trained plainly, else at its own p in its own form."""
    return SHARES if not trained_at else ((trained_at,) if form == "column" else ())


def _is_of_interest(settings: dict[str, Any]) -> bool:
    return settings.keys() <= {"loss.gamma", "mixout.p"} and settings.get("loss.gamma", "1x") in ("1x", 0, "0", "0x", 0.0)


def _which(recipe: Recipe) -> dict[str, Any]:
    kappa = recipe.loss.gamma_value / recipe.loss.beta
    return {"kappa": kappa, "trained_at": recipe.mixout.p, "seed": recipe.train.seed}


def plot(folders: list[Path], target: Path) -> None:
    """Draw KL and accuracy against p, and margin_noise against p; a row for each study."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, rows = plt.subplots(len(folders), 3, figsize=(12, 3.4 * len(folders)), squeeze=False, layout="constrained")
    for folder, (drift, accuracy, noise) in zip(folders, rows, strict=True):
        runs = list(_runs(folder))
        for kappa, colour, words in ((1.0, "#0072b2", "γ = β"), (0.0, "#d55e00", "γ = 0")):
            mine = [run for run in runs if run["kappa"] == kappa]
            _dots(drift, mine, "kl", colour, words)
            _dots(accuracy, mine, "accuracy", colour, words)
        drift.set(yscale="log", ylabel="KL(π‖π0), nats an answer", title=f"{folder.name}: drift")
        accuracy.set(ylabel="held-out pairs moved towards chosen", title=f"{folder.name}: accuracy (shift, per token)")
        accuracy.axhline(0.5, color="grey", linewidth=0.8)
        _noise(noise, json.loads((folder / "noise.json").read_text()))
        noise.set(yscale="log", ylabel="margin_noise", title=f"{folder.name}: what a mask moves")
        for axis in (drift, noise):
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, at: f"{value:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        accuracy.margins(y=0.3)
        for axis in (drift, accuracy, noise):
            axis.set_xlabel("p")
            axis.legend(frameon=False, fontsize=7)
    figure.savefig(target, dpi=150)


def _runs(folder: Path) -> Iterator[dict[str, float]]:
    """Settings, KL and accuracy of the runs that turn p and γ alone."""
    content = json.loads((folder / "plan.json").read_text())
    for point in content["sweep"]["points"]:
        run = content["runs"][point["folder"]]
        if not _is_of_interest(point["settings"]) or run["status"] != "finished":
            continue
        end = run["evaluations"][point["folder"]]
        yield {
            "kappa": run["loss"]["kappa"],
            "p": point["settings"].get("mixout.p", 0.0),
            "kl": end["generation"]["kl"]["mean"],
            "accuracy": end["pairs"]["accuracy/shift_per_token"],
        }


def _dots(axis: Any, runs: list[dict[str, float]], key: str, colour: str, words: str) -> None:
    """Every seed as a dot, and the line of their means."""
    shares = sorted({run["p"] for run in runs})
    axis.plot([run["p"] for run in runs], [run[key] for run in runs], "o", color=colour, alpha=0.35, markersize=4)
    means = [np.mean([run[key] for run in runs if run["p"] == p]) for p in shares]
    axis.plot(shares, means, "-", color=colour, label=f"{words} (mean of {len(runs) // max(1, len(shares))} seeds)")


def _noise(axis: Any, found: list[dict[str, Any]]) -> None:
    """margin_noise of plainly trained adapters in both forms, and in the column form of those trained at that very p."""
    for form, colour in (("column", "#009e73"), ("element", "#cc79a7")):
        for kappa, style in ((1.0, "-"), (0.0, "--")):
            plain = [one for one in found if one["form"] == form and one["kappa"] == kappa and not one["trained_at"]]
            means = [np.mean([one["margin_noise"] for one in plain if one["p"] == p]) for p in SHARES]
            axis.plot(SHARES, means, style, color=colour, label=f"{form}, γ = {'β' if kappa else '0'}, trained plainly")
    own = [one for one in found if one["form"] == "column" and one["p"] == one["trained_at"]]
    axis.plot([one["p"] for one in own], [one["margin_noise"] for one in own], "x", color="black", label="column, trained at p")


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("sweep", type=Path)
    one.add_argument("target", type=Path)
    two = commands.add_parser("plot")
    two.add_argument("folders", type=Path, nargs="+")
    two.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "measure":
        found = measure(options.sweep)
        options.target.write_text(json.dumps(found, indent=0) + "\n")
    else:
        plot(options.folders, options.output)


if __name__ == "__main__":
    main()

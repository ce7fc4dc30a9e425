"""`pe-dpo train`."""

import os
import shlex
from typing import Annotated

import typer

from pe_dpo.cli import console, options


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (pe-dpo recipes list).")],
    loss: options.Loss = None,
    beta: options.Beta = None,
    gamma: options.Gamma = None,
    margin: options.Margin = None,
    link: options.Link = None,
    mixout: options.Mixout = None,
    lr: options.LearningRate = None,
    epochs: options.Epochs = None,
    seed: options.Seed = None,
    output: options.Output = None,
    scorer: options.Scorer = None,
    set_: options.Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    override: Annotated[
        list[str] | None,
        typer.Option(help="With --resume: KEY (or KEY=VALUE) may differ from the run's recipe. Repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run that lies in the output folder.")] = False,
) -> None:
    """Train an adapter by a recipe; everything lands in its output folder."""
    from pe_dpo.recipe import load_recipe

    meant = [key.partition("=")[0].strip() for key in override or []]
    turned = options.overrides(
        [*(set_ or []), *options.as_settings(override or [])],
        loss=loss, beta=beta, gamma=gamma, margin=margin, link=link, mixout=mixout, lr=lr,
        epochs=epochs, seed=seed, output=output,
    )  # fmt: skip
    plan = load_recipe(recipe, turned)

    terminal = console.start()
    from pe_dpo.cli.held_out import show_result
    from pe_dpo.cli.live import progress_callback
    from pe_dpo.evaluation.judged_runs import Judge
    from pe_dpo.training.train import train as run

    is_first = os.environ.get("RANK", "0") == "0"
    judge = Judge(scorer, [plan]) if scorer and is_first else None
    shown = [progress_callback(terminal.live)]
    result = run(plan, resume=resume, overwrite=overwrite, override=meant, callbacks=shown)
    show_result(result)
    if judge and result.interrupted_by is None:
        from pe_dpo.errors import UsageError
        from pe_dpo.runs.run import Run

        for _, why in judge.judge([Run(result.folder)]):
            if why:
                again = shlex.join(["pe-dpo", "eval", str(result.folder), "--scorer", str(scorer)])
                raise UsageError(f"{result.folder}: is trained and measured, and was not judged: {why}; judge it with: {again}")
            won = Run(result.folder).estimate("win_rate")
            console.say(f"win rate against the reference, by {scorer}: {won[0]:.3f}" if won else "no answer was sampled")
    if is_first:
        from pe_dpo.runs.files import BASE_FILE, read_object

        quoted, quantize = shlex.quote(str(result.folder)), read_object(result.folder / BASE_FILE).get("quantize", "none")
        console.say(f"the adapter lies in {result.folder}; next: pe-dpo merge {quoted} -o MODEL")
        if quantize != "none":
            console.say(f"it belongs to the base in {quantize}: from the folder alone, pipeline and")
            console.say("AutoPeftModelForCausalLM load another model without an error")
        console.say(f"how it is loaded and served: pe-dpo serve {quoted}")

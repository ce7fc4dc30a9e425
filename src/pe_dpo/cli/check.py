"""`pe-dpo check`: what can be known before training, without loading the base."""

import json as json_module
from typing import Annotated

import typer

from pe_dpo.cli import console, options
from pe_dpo.printable import counted, printable_json


def check(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
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
    set_: options.Settings = None,
    scorer: options.Scorer = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Check recipe, loss, reference, base and data; exit 1 with the reason where training could not work."""
    from pe_dpo.recipe import describe, load_recipe

    turned = options.overrides(
        set_, loss=loss, beta=beta, gamma=gamma, margin=margin, link=link, mixout=mixout, lr=lr,
        epochs=epochs, seed=seed, output=output,
    )  # fmt: skip
    plan = load_recipe(recipe, turned)

    log = console.start(is_silent=True)  # nothing is printed of a recipe that turns out to be impossible
    from pe_dpo.data.decoded import decode_pair, middle_pair
    from pe_dpo.estimate import estimate_run, find_card, local_card
    from pe_dpo.estimate.cards import DEFAULT
    from pe_dpo.estimate.lengths import of_pairs
    from pe_dpo.evaluation.judge import check_scorer
    from pe_dpo.model.road import files_here, loaded_size
    from pe_dpo.training.preparation import prepare_run

    judged = check_scorer(scorer, [plan.generation]) if scorer else ""
    base, tokenizer, data, *_ = prepare_run(plan)
    example = decode_pair(middle_pair(data.train), tokenizer)
    reference = plan.adapter.describe_reference()
    steps = -(-len(data.train) // plan.train.pairs_per_step)
    here = local_card()
    card = here or find_card(DEFAULT)
    takes = estimate_run(plan, card, lengths=of_pairs(data.train, len(data.held_out), plan))
    if json:
        size = loaded_size(base, files_here(base))
        found = {
            "loss": describe(plan.loss, plan.data.pair_columns)._asdict(),
            "warnings": log.warnings,
            "base": {"quantize": base.quantize, "context": base.context_length, **size._asdict()},
            "reference": {"is": reference, "run_in_training": plan.loss.uses_reference},
            "data": data.report.to_dict(),
            "example": example._asdict(),
            "steps_per_epoch": steps,
            **({"scorer": judged} if judged else {}),
            "estimate": takes.to_dict(),
        }
        typer.echo(printable_json(json_module.dumps(found, indent=1, ensure_ascii=False)))
        return
    lines = [
        *log.lines,
        f"reference: {reference}{'' if plan.loss.uses_reference else '; never run, since gamma is 0'}",
        f"{counted(steps, 'optimizer step')} an epoch of {counted(plan.train.pairs_per_step, 'pair')}",
        *([f"sampled answers would be judged by {judged}"] if judged else []),
    ]
    console.say("\n".join(lines))
    console.show_pair(example, unit=data.report.unit, lines=1)
    if here is not None:
        typer.echo(f"ready to train: {takes.describe()}")
        return
    on_cpu = estimate_run(plan, None, lengths=takes.lengths).describe()
    typer.echo(f"ready to train: on this CPU {on_cpu};\non a card {takes.describe()}")

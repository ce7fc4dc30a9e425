"""`pe-dpo check`: what can be known before training, without loading the base."""

import json as json_module
from typing import Annotated, Any

import typer

from pe_dpo.cli import dials


def check(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    loss: dials.Loss = None,
    beta: dials.Beta = None,
    gamma: dials.Gamma = None,
    margin: dials.Margin = None,
    link: dials.Link = None,
    set_: dials.Settings = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Check recipe, loss, reference, base and data; exit 1 with the reason where training could not work."""
    from pe_dpo.recipe import describe, load_recipe, warnings

    plan = load_recipe(recipe, dials.overrides(set_, loss=loss, beta=beta, gamma=gamma, margin=margin, link=link))
    facts: dict[str, Any] = {"loss": describe(plan.loss)._asdict(), "warnings": warnings(plan)}
    lines = [*describe(plan.loss).lines(), *(f"look: {line}" for line in facts["warnings"])]

    from pe_dpo.cli import console

    console.quiet_libraries()
    from pe_dpo.model.adapter import check_adapter
    from pe_dpo.model.base import inspect_base, load_tokenizer
    from pe_dpo.training.run import prepare_data

    base = inspect_base(**plan.model.model_dump())
    if plan.adapter.start:
        check_adapter(plan.adapter.start)
    is_adapter = plan.adapter.reference == "adapter"
    reference = "a frozen copy of the adapter it starts from" if is_adapter else "the base, adapters off"
    facts["base"] = {"parameters": base.parameters, "quantize": base.quantize, "context": base.context_length}
    facts["reference"] = {"is": reference, "run_in_training": plan.loss.gamma_value != 0}
    lines.append(f"base: {base.parameters / 1e6:,.1f} M parameters, quantize {base.quantize}, context {base.context_length}")
    lines.append(f"reference: {reference}{'' if plan.loss.gamma_value else '; never run, since gamma is 0'}")
    data = prepare_data(plan, base, load_tokenizer(plan.model.base, revision=plan.model.revision))
    facts["data"] = data.report.to_dict()
    lines += data.report.lines()
    steps = -(-len(data.train) // plan.train.pairs_per_step)
    lines.append(f"{steps} optimizer steps an epoch of {plan.train.pairs_per_step} pairs")
    typer.echo(json_module.dumps(facts, indent=1, ensure_ascii=False) if json else "\n".join([*lines, "ready to train"]))

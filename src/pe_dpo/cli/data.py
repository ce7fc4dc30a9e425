"""`pe-dpo data`: what is in a preference data set, before anything is trained on it."""

import json as json_module
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_dpo.cli import console, options
from pe_dpo.printable import printable_json

if TYPE_CHECKING:
    from pe_dpo.data.lint import Finding, Lint
    from pe_dpo.recipe import Recipe

NO_BASE = "none"
SHOWN_FINDINGS = 12
"""Of each heading, so that a screen holds them."""


def data(
    file: Annotated[str | None, typer.Argument(help="File, folder or hub id; may be left out with --recipe.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or hub id of the model whose tokenizer reads the data.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe: its base and its data section, with FILE if given.")] = None,
    set_: options.Settings = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if something needs a decision.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Show what a data set trains: its shape, three pairs with what is scored, and all that looks off in it."""
    from pe_dpo.errors import DataError, UsageError
    from pe_dpo.recipe import load_recipe, recipe_from_yaml

    given = {"model.base": base, "data.train": file}
    flags = {"model.base": f"--base {base}", "data.train": f"{file}"}
    options.check_once(set_, {flags[key]: key for key, value in given.items() if value is not None})
    settings = [*(set_ or []), *(f"{key}={json_module.dumps(value)}" for key, value in given.items() if value is not None)]
    if recipe is not None:
        plan = load_recipe(recipe, settings)
    elif file is None:
        raise UsageError("nothing to look at: name a file, a folder or a hub id, or a recipe with --recipe")
    else:
        plan = recipe_from_yaml(f"model: {{base: {NO_BASE}}}\noutput: nowhere\n", "pe-dpo data", settings)

    console.start(is_silent=True)  # what it would say is shown below
    try:
        found = _lint(plan)
    except DataError as error:
        if recipe is not None:
            raise
        raise DataError(_with_flags(str(error))) from error
    if json:
        typer.echo(printable_json(json_module.dumps(found.to_dict(), indent=1, ensure_ascii=False)))
    else:
        _show(found)
    if strict and found.needs_decision:
        raise typer.Exit(1)


def _lint(plan: "Recipe") -> "Lint":
    from pe_dpo.data.lint import lint

    model = plan.model
    if model.base == NO_BASE:
        return lint(plan.data, seed=plan.train.seeds.data)
    from pe_dpo.data.template import set_template
    from pe_dpo.model.base import answer_end_tokens, load_tokenizer, read_config

    tokenizer = load_tokenizer(model.base, revision=model.revision)
    set_template(tokenizer, plan.data)
    is_tokenizer_alone = Path(model.base).is_dir() and not (Path(model.base) / "config.json").is_file()
    context = None
    if not is_tokenizer_alone:
        text = read_config(model.base, revision=model.revision).get_text_config()
        context = getattr(text, "max_position_embeddings", None)
    ends = answer_end_tokens(tokenizer, model.base, revision=model.revision)
    seed = plan.train.seeds.data
    return lint(plan.data, tokenizer=tokenizer, context_length=context, end_token_ids=ends, seed=seed)


def _with_flags(message: str) -> str:
    """Return a message whose column map is to be written into a recipe as one that gives it as an option."""
    line = re.compile(r"^data: \{columns: (\{.*\})\}$", re.MULTILINE)
    said = line.sub(lambda found: f"--set {shlex.quote(f'data.columns={found[1]}')}", message)
    return said.replace("Say it in the recipe:", "Say it with:")


def _show(found: "Lint") -> None:
    report, bias = found.report, found.length_bias
    low, high = bias["interval"]
    lines = [
        *report.facts(),
        *report.remarks,
        f"length alone tells the chosen answer in {bias['predicts']:.0%} of pairs: it is longer in "
        f"{bias['chosen_longer']:.0%} [{low:.0%}, {high:.0%}], and longer than a rejected one of any pair in {bias['auc']:.0%}",
    ]
    lines += ["no prompt that is held out is read in training"] if report.held_out else []
    console.show_lines(lines)
    for pair in found.examples:
        console.show_pair(pair, unit=report.unit, lines=2)
    for heading, is_open in (("needs a decision", True), ("good to know", False)):
        findings = [one for one in found.findings if one.needs_decision == is_open]
        if findings:
            console.say(f"\n{heading}")
            shown = [_row(one) for one in findings[:SHOWN_FINDINGS]]
            more = len(findings) - len(shown)
            console.show_grid([*shown, *([["", f"… and {more} kinds more; all of them with --json"]] if more else [])])
    if not found.needs_decision:
        console.say("\nnothing was found that needs a decision")


def _row(finding: "Finding") -> list[str]:
    rows = ", ".join(finding.rows[:3]) + (", …" if len(finding.rows) > 3 else "")
    what = finding.what if len(finding.what) <= 300 else f"{finding.what[:299]}…"
    number = "" if what.startswith(f"{finding.number:,} of ") else f"{finding.number:,}"
    return [number, what + (f" ({rows})" if rows else "") + (f": {finding.remedy}" if finding.remedy else "")]

"""The model card of a run, and what the cards of a merge have in common with it: metadata, loss, held-out pairs, recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from pe_dpo.metrics.catalogue import headline_rows
from pe_dpo.recipe import Recipe, describe, describe_sources, recipe_to_yaml


def model_card(recipe: Recipe, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return the card as markdown with the metadata that hubs read."""
    base, data = recipe.model.base, describe_sources(recipe.data.train)
    intro = ["# A LoRA adapter trained on preference pairs", "", f"Base: `{base}`. Trained by pe-dpo on `{data}`."]
    if recipe.adapter.over:
        intro += [
            "",
            f"It is the sum of two: `{recipe.adapter.over}`, which stayed frozen and is the reference's (in `reference/`),",
            "and what was trained over it (in `trained/`; alone on the bare base that is another model).",
        ]
    sections = training_sections(recipe, before, after, title="Held-out pairs")
    return "\n".join([*front_matter(base, library="peft"), *intro, "", *sections])


def front_matter(base: str, *, library: str, relation: str | None = None, licence: str | None = None) -> list[str]:
    """Return the lines of a card's metadata; a base that is a path is left out, since hubs take names alone.

    Args:
        base: a hub name or a path.
        library: that loads the model.
        relation: of the model to its base, "adapter" or "finetune"; None leaves it to the hub.
        licence: of the base, None if it names none.
    """
    named = {"base_model": base, **({"base_model_relation": relation} if relation else {})}
    metadata = {
        **({} if Path(base).exists() else named),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [*(["lora"] if library == "peft" else []), "preference-optimization", "pe-dpo"],
        **({"license": licence} if licence else {}),
    }
    return ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def training_sections(
    recipe: Recipe,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    title: str,
    between: Sequence[str] = (),
) -> list[str]:
    """Return the lines of the sections on loss, held-out pairs and recipe.

    Args:
        recipe: of the training.
        before: held-out metrics at step 0.
        after: those at the end; empty where nothing was held out, and one sentence says so.
        title: of the section on held-out pairs.
        between: lines between loss and held-out pairs.
    """
    table = ["No pairs were held out."]
    if after:
        rows = [f"| {' | '.join(row)} |" for row in headline_rows(before, after)]
        table = [f"{int(after['pairs'])} pairs; 95 % Wilson intervals.", "", "| | before | after |", "|---|---|---|", *rows]
    loss = ["## Loss", "", *(f"- {line}" for line in describe(recipe.loss, recipe.data.pair_columns).lines()), ""]
    return [
        *loss,
        *between,
        f"## {title}",
        "",
        *table,
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_to_yaml(recipe).rstrip(),
        "```",
        "",
    ]

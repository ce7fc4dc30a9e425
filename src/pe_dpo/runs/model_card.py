"""The model card of a run: what it is, how it was trained, what it does on held-out pairs."""

from collections.abc import Mapping

from pe_dpo.metrics.catalogue import headline_rows
from pe_dpo.recipe import Recipe, describe, recipe_to_yaml


def model_card(recipe: Recipe, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return the card as markdown with the metadata that hubs read."""
    return "\n".join(
        [
            "---",
            f"base_model: {recipe.model.base}",
            "library_name: peft",
            "pipeline_tag: text-generation",
            "tags: [lora, preference-optimization, pe-dpo]",
            "---",
            "",
            "# A LoRA adapter trained on preference pairs",
            "",
            f"Base: `{recipe.model.base}`. Trained by pe-dpo on `{recipe.data.train}`.",
            "",
            "## Loss",
            "",
            *(f"- {line}" for line in describe(recipe.loss).lines()),
            "",
            "## Held-out pairs",
            "",
            *held_out_table(before, after),
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe_to_yaml(recipe).rstrip(),
            "```",
            "",
        ]
    )


def held_out_table(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Return the lines of a markdown table of held-out metrics; one sentence where nothing was held out."""
    if not after:
        return ["No pairs were held out."]
    rows = [f"| {' | '.join(row)} |" for row in headline_rows(before, after)]
    return [f"{int(after['pairs'])} pairs; 95 % Wilson intervals.", "", "| | before | after |", "|---|---|---|", *rows]

"""The model card of a run, and what the cards of a merge have in common with it: how to load it, metadata, loss, recipe.

No card names a path of this machine: of each its last part alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pe_dpo.errors import ModelError
from pe_dpo.hub import is_local, public_name
from pe_dpo.metrics.catalogue import headline_rows
from pe_dpo.printable import code_block, code_span
from pe_dpo.recipe import Recipe, describe, describe_sources, recipe_to_yaml, with_public_names
from pe_dpo.runs.loading import loading_lines


def model_card(
    recipe: Recipe,
    base: Mapping[str, Any],
    before: Mapping[str, float],
    after: Mapping[str, float],
    memory: str = "",
    skipped: str = "",
    history: Sequence[str] = (),
    sides: str = "",
) -> str:
    """Return the card of a run as markdown with the metadata that hubs read.

    Args:
        recipe: of the run.
        base: what it was trained on, as base.json says.
        before: held-out metrics at step 0.
        after: those at the end.
        memory: what training took, in words.
        skipped: which steps it did not take, in words.
        history: what was otherwise on the way, a sentence each.
        sides: the share that moved toward chosen where π0 is right and where it is wrong, in a sentence.
    """
    recipe, place = with_public_names(recipe), recipe.model.base
    intro = ["# A LoRA adapter trained on preference pairs", "", *loading_section(base)]
    intro += ["Trained by pe-dpo on " + code_span(describe_sources(recipe.data.train)) + "."]
    if recipe.adapter.over:
        intro += [
            "",
            f"It is the sum of two: {code_span(recipe.adapter.over)}, which stayed frozen and is the reference's (in",
            "`reference/`), and what was trained over it (in `trained/`; alone on the bare base that is another model).",
        ]
    took = [line for said in (memory and f"Training took {memory}.", skipped and f"{skipped}.") if said for line in (said, "")]
    took += [line for sentence in history for line in (sentence, "")]
    sections = training_sections(recipe, before, after, title="Held-out pairs", between=took, below=sides)
    return "\n".join([*front_matter(place, library="peft"), *intro, "", *sections])


def loading_section(base: Mapping[str, Any], commands: Sequence[str] = ()) -> list[str]:
    """Return the lines of a card, an empty one at the end, that say which base an adapter belongs to and how both are loaded.

    Args:
        base: as base.json says; see `loading_lines`.
        commands: that serve the adapter.
    """
    how, is_path = f"{base['quantize']}, {base['dtype']}", base.get("is_local", is_local(base["id"]))
    words = [
        f"Belongs to {code_span(public_name(base['id']))}, loaded as in training ({how}). On other weights it is another model."
    ]
    if base["quantize"] != "none" and not base.get("prequantized"):
        words += [
            "**`pipeline` and `AutoPeftModelForCausalLM`, given this folder and nothing else, load the unquantized base and",
            "answer as that other model, without an error.**",
        ]
    if is_path:
        words += [
            "",
            f"The base was a folder, {code_span(public_name(base['id']))}. Before others use this, write the name under which",
            "they find it in its place: in the lines below, as `base_model` of this card, and in adapter_config.json.",
        ]
    try:
        python = ["```python", *loading_lines(base), "```", ""]
    except ModelError as error:
        return [*words, "", f"{str(error)[0].upper()}{str(error)[1:]}.", ""]
    return [*words, "", "These lines load what was trained:", "", *python, *(["```", *commands, "```", ""] if commands else [])]


def front_matter(base: str | None, *, library: str, relation: str | None = None, licence: str | None = None) -> list[str]:
    """Return the lines of a card's metadata; a base that is a path is left out, since hubs take names alone.

    Args:
        base: a name on the hub, a path, or None.
        library: that loads the model.
        relation: of the model to its base, "adapter" or "finetune"; None leaves it to the hub.
        licence: of the base, None if it names none.
    """
    named = {"base_model": base, **({"base_model_relation": relation} if relation else {})}
    metadata = {
        **({} if base is None or is_local(base) else named),
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
    below: str = "",
) -> list[str]:
    """Return the lines of the sections on loss, held-out pairs and recipe.

    Args:
        recipe: of the training, with public names.
        before: held-out metrics at step 0.
        after: those at the end; empty where nothing was held out, and one sentence says so.
        title: of the section on held-out pairs.
        between: lines between loss and held-out pairs.
        below: a sentence below the table of held-out pairs.
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
        *([below, ""] if below else []),
        "## Recipe",
        "",
        *code_block(recipe_to_yaml(recipe).rstrip(), "yaml"),
        "",
    ]

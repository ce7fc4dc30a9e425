"""The model card of a merged model: where it comes from, how it was trained, and the proof that this is what was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pe_dpo.merging.served import scale_words
from pe_dpo.merging.serving import model_commands
from pe_dpo.merging.source import Source
from pe_dpo.merging.verify import unmerged_words
from pe_dpo.recipe import describe, recipe_to_yaml
from pe_dpo.runs.model_card import held_out_table


def merged_card(source: Source, report: Mapping[str, Any], *, licence: str | None) -> str:
    """Return the card as markdown with the metadata that hubs read.

    Args:
        source: what was merged.
        report: of the merge.
        licence: of the base, as its card names it.
    """
    return "\n".join(
        [
            *card_metadata(source.facts.base, library="transformers", relation="finetune", licence=licence),
            "# A model tuned on preference pairs",
            "",
            f"Base: `{source.facts.base}`, licence: {licence or 'see the base'}. A LoRA adapter, merged in {report['dtype']}.",
            "",
            *scale_lines(source.scale),
            *_training(source),
            "## The merge",
            "",
            *_merge(report),
            "",
            "## Serve",
            "",
            "```",
            *model_commands("FOLDER"),
            "```",
            "",
        ]
    )


def card_metadata(base: str, *, library: str, relation: str, licence: str | None) -> list[str]:
    """Return the lines of a card that hubs read.

    Args:
        base: left out where it is a path, since hubs take names alone.
        library: that loads the model.
        relation: to its base, "finetune" or "adapter".
        licence: of the base, as its card names it.
    """
    metadata = {
        **({} if Path(base).exists() else {"base_model": base, "base_model_relation": relation}),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [*(["lora"] if relation == "adapter" else []), "preference-optimization", "pe-dpo"],
        **({"license": licence} if licence else {}),
    }
    return ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def scale_lines(scale: float) -> list[str]:
    """Return what a card says of an adapter that is not served as it was trained; nothing for one that is."""
    if scale == 1:
        return []
    return [
        f"After training it was {scale_words(scale)}: W_ref + {scale}·(W − W_ref), where W was trained and W_ref is its",
        "reference (WiSE-FT, arXiv 2109.01903). On purpose this is not the model that was trained; what is said of training is",
        "of a = 1.",
        "",
    ]


def _training(source: Source) -> list[str]:
    if source.recipe is None:
        return ["The adapter was not trained by pe-dpo; nothing is known here of its data and loss.", ""]
    data = source.run.get("hashes", {}).get("data", "unknown")
    return [
        "## Loss",
        "",
        *(f"- {line}" for line in describe(source.recipe.loss).lines()),
        "",
        "## Data",
        "",
        f"`{source.recipe.data.train}`, sha256 of the encoded pairs `{data}`.",
        "",
        "## Held-out pairs, before and after training",
        "",
        *held_out_table(source.run.get("before", {}), source.run.get("after", {})),
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_to_yaml(source.recipe).rstrip(),
        "```",
        "",
    ]


def _merge(report: Mapping[str, Any]) -> list[str]:
    base = report["base"]
    checked = "checked tensor by tensor against training" if base["was_checked"] else "not checked: there is no record of it"
    how = (
        f"Onto the {report['onto']} weights of the base (in training: {base['quantize_in_training']}), rounding "
        f"{report['rounding']}. The base was {checked}."
    )
    kept, (name, cause) = report["mean_kept"], unmerged_words(report["scale"])
    lines = [how, "", f"- share of the update in the files: {'nothing to keep' if kept is None else f'{kept:.4f}'}"]
    found, floor = report["held_out"], report["noise_floor"]
    if found is None:
        return [*lines, "- not verified on pairs"]
    relative = found["relative_kl"]
    lines += [
        f"- on {report['held_out_pairs']} held-out pairs, KL({name} ‖ merged) {found['kl']:.2e} nats a position"
        + ("" if relative is None else f", {relative:.4f} of what {cause} changed"),
        f"- preference shift {found['shift']:+.4f} nats a pair, {name} {found['shift_trained']:+.4f}",
        f"- same most likely token at {found['top1']:.2%} of positions",
    ]
    if floor is not None:
        other = report["noise_floor_is"]
        lines.append(f"- the {name} model itself, {other}: KL {floor['kl']:.2e}, shift {floor['shift']:+.4f}")
    return [*lines, *(f"- **{fault}**" for fault in report["faults"])]

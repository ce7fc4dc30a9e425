"""The model card of what a merge writes, a merged model or an adapter: where it comes from, the proof, and how to serve it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pe_dpo.hub import is_local
from pe_dpo.merging.behaviour import name_expected
from pe_dpo.merging.source import Source, describe_scale
from pe_dpo.printable import code_span
from pe_dpo.recipe import describe_sources, with_public_names
from pe_dpo.runs.model_card import front_matter, loading_section, training_sections
from pe_dpo.runs.serving import model_commands


def merged_card(source: Source, report: Mapping[str, Any]) -> str:
    """Return the card of a merged model, with the proof that it is what was trained.

    Args:
        source: what was merged.
        report: of the merge.
    """
    licence, base = _base_licence(source.base_folder), report["base"]
    recipe = None if source.recipe is None else with_public_names(source.recipe)
    adapters = "A LoRA adapter and the one under it" if source.is_over else "A LoRA adapter"
    intro = [f"Base: {code_span(base['id'])}, licence: {licence or 'see the base'}. {adapters}, merged in {report['dtype']}."]
    if is_local(source.facts.base):
        missing = "Write its name on the hub in its place, and as `base_model` of this card."
        intro += ["", f"The base was a folder, {code_span(base['id'])}. {missing}"]
    training = ["The adapter was not trained by pe-dpo; nothing is known here of its data and loss.", ""]
    if recipe is not None:
        data = source.run.hashes.data or "unknown"
        training = training_sections(
            recipe,
            source.run.before,
            source.run.after,
            title="Held-out pairs, before and after training",
            between=[
                "## Data",
                "",
                f"{code_span(describe_sources(recipe.data.train))}, sha256 of the encoded pairs `{data}`.",
                "",
            ],
        )
    checked = "checked tensor by tensor against training" if base["was_checked"] else "not checked: there is no record of it"
    kept, (name, cause) = report["mean_kept"], name_expected(report["scale"])
    proof = [
        f"Onto the {report['onto']} weights of the base (in training: {base['quantize_in_training']}), rounding "
        f"{report['rounding']}. The base was {checked}.",
        "",
        f"- share of the update in the files: {'nothing to keep' if kept is None else f'{kept:.4f}'}",
    ]
    held_out, floor = report["held_out"], report["noise_floor"]
    if held_out is None:
        proof.append("- not verified on pairs")
    else:
        share = held_out["relative_kl"]
        words = "" if share is None else f", {share:.4f} of what {cause} changed"
        proof += [
            f"- on {report['held_out_pairs']} held-out pairs, KL({name} ‖ merged) {held_out['kl']:.2e} nats a position{words}",
            f"- preference shift {held_out['shift']:+.4f} nats a pair, {name} {held_out['shift_trained']:+.4f}",
            f"- same most likely token at {held_out['top1']:.2%} of positions",
        ]
        if floor is not None:
            noisy = f"the {name} model itself, {report['noise_floor_is']}"
            proof.append(f"- {noisy}: KL {floor['kl']:.2e}, shift {floor['shift']:+.4f}")
        proof += [f"- **{fault}**" for fault in report["faults"]]
    body = [*training, "## The merge", "", *proof, "", "## Serve", "", "```", *model_commands("FOLDER"), "```"]
    title = "A model tuned on preference pairs"
    return _card(source, source.facts.base, title, intro, body, library="transformers", relation="finetune")


def adapter_card(source: Source, base: Mapping[str, Any], commands: Sequence[str]) -> str:
    """Return the card of an adapter, with how to load it on its base as in training.

    Args:
        source: whose adapter it is.
        base: as in base.json.
        commands: that serve it.
    """
    title, intro = "A LoRA adapter tuned on preference pairs", loading_section(base, commands)
    return _card(source, None if base.get("is_local") else base["id"], title, intro, [], library="peft", relation="adapter")


def _card(
    source: Source, base: str | None, title: str, intro: Sequence[str], body: Sequence[str], *, library: str, relation: str
) -> str:
    """A card as markdown, with the metadata that hubs read."""
    licence = _base_licence(source.base_folder)
    front = [*front_matter(base, library=library, relation=relation, licence=licence), f"# {title}", ""]
    how, scale = describe_scale(source.scale), source.scale
    scaling = [
        f"After training it was {how}: W_ref + {scale}·(W − W_ref), where W was trained and W_ref is its",
        "reference (WiSE-FT, arXiv 2109.01903). On purpose this is not the model that was trained; what is said of training is",
        "of a = 1.",
        "",
    ]
    return "\n".join([*front, *intro, "", *(scaling if source.scale != 1 else []), *body]).rstrip() + "\n"


def _base_licence(folder: Path) -> str | None:
    """The licence that the model card of a base names, None if it names none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        metadata = yaml.safe_load(parts[1][:100_000])
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w.+ -]{1,60}", licence) else None

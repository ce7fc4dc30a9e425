"""The model card of what a merge writes, a merged model or an adapter: where it comes from, the proof, and how to serve it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pe_dpo.merging.behaviour import name_expected
from pe_dpo.merging.source import Source, describe_scale
from pe_dpo.model.base import auto_class
from pe_dpo.quantizations import four_bit_kind, is_four_bit
from pe_dpo.recipe import describe_sources
from pe_dpo.runs.model_card import front_matter, training_sections


def merged_card(source: Source, report: Mapping[str, Any]) -> str:
    """Return the card of a merged model, with the proof that it is what was trained.

    Args:
        source: what was merged.
        report: of the merge.
    """
    licence, base, recipe = _base_licence(source.base_folder), report["base"], source.recipe
    adapters = "A LoRA adapter and the one under it" if source.is_over else "A LoRA adapter"
    intro = [f"Base: `{source.facts.base}`, licence: {licence or 'see the base'}. {adapters}, merged in {report['dtype']}."]
    training = ["The adapter was not trained by pe-dpo; nothing is known here of its data and loss.", ""]
    if recipe is not None:
        data = source.run.hashes.data or "unknown"
        training = training_sections(
            recipe,
            source.run.before,
            source.run.after,
            title="Held-out pairs, before and after training",
            between=["## Data", "", f"`{describe_sources(recipe.data.train)}`, sha256 of the encoded pairs `{data}`.", ""],
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
    return _card(source, "A model tuned on preference pairs", intro, body, library="transformers", relation="finetune")


def adapter_card(source: Source, base: Mapping[str, Any], commands: Sequence[str]) -> str:
    """Return the card of an adapter, with how to load it on its base as in training.

    Args:
        source: whose adapter it is.
        base: as in base.json.
        commands: that serve it.
    """
    intro = [
        f"Belongs to `{source.facts.base}`, loaded as in training: {base['quantize']}, {base['dtype']}. On another",
        "quantization, or the original weights, it is another model.",
    ]
    revision = f", revision={base['revision']!r}" if base["revision"] else ""
    quantization = "BitsAndBytesConfig(load_in_8bit=True)" if base["quantize"] == "int8" else "None"
    if is_four_bit(source.facts.quantize):
        kind, is_double = four_bit_kind(source.facts.quantize)
        quantization = (
            f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={kind!r}, bnb_4bit_use_double_quant="
            f"{is_double}, bnb_4bit_compute_dtype=torch.{base['dtype']})"
        )
    if source.facts.is_prequantized:
        quantization = "None"  # its own files say how
    kind, rows = auto_class(source.facts.config).__name__, source.resized_to
    body = [
        *(["```", *commands, "```", ""] if commands else []),
        "```python",
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {kind}, BitsAndBytesConfig",
        "",
        f"base = {kind}.from_pretrained({base['id']!r}{revision}, dtype=torch.{base['dtype']},",
        f"    quantization_config={quantization})",
        *([f"base.resize_token_embeddings({rows}, mean_resizing=False)"] if rows else []),
        "model = PeftModel.from_pretrained(base, '.')",
        "```",
    ]
    return _card(source, "A LoRA adapter tuned on preference pairs", intro, body, library="peft", relation="adapter")


def model_commands(folder: str) -> list[str]:
    """Return the commands that serve a whole model, as people paste them."""
    return [f"vllm serve {shlex.quote(folder)}", f"transformers serve {shlex.quote(folder)}"]


def _card(source: Source, title: str, intro: Sequence[str], body: Sequence[str], *, library: str, relation: str) -> str:
    """A card as markdown, with the metadata that hubs read."""
    licence = _base_licence(source.base_folder)
    front = [*front_matter(source.facts.base, library=library, relation=relation, licence=licence), f"# {title}", ""]
    how, scale = describe_scale(source.scale), source.scale
    scaling = [
        f"After training it was {how}: W_ref + {scale}·(W − W_ref), where W was trained and W_ref is its",
        "reference (WiSE-FT, arXiv 2109.01903). On purpose this is not the model that was trained; what is said of training is",
        "of a = 1.",
        "",
    ]
    return "\n".join([*front, *intro, "", *(scaling if source.scale != 1 else []), *body, ""])


def _base_licence(folder: Path) -> str | None:
    """The licence that the model card of a base names, None if it names none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        metadata = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) else None

"""The model card of a run, and what the cards of a merge have in common with it: loading lines, metadata, loss, recipe.

An adapter belongs to the base that it was trained on, and that is the base as it was loaded. PEFT's files only say its name, so
that what loads "the base and the adapter" by itself (`pipeline`, `AutoPeftModelForCausalLM`) takes the 16-bit weights where
training had 4-bit codes, and answers as another model without an error. A card therefore begins with the lines that load it.

No card names a path of this machine: of each its last part alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pe_dpo.errors import ModelError
from pe_dpo.hub import is_local, public_name
from pe_dpo.metrics.catalogue import headline_rows
from pe_dpo.quantizations import BYPASSED_NAMES, four_bit_kind, is_four_bit
from pe_dpo.recipe import Recipe, describe, describe_sources, recipe_to_yaml, with_public_names


def model_card(recipe: Recipe, base: Mapping[str, Any], before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return the card of a run as markdown with the metadata that hubs read.

    Args:
        recipe: of the run.
        base: what it was trained on, as base.json says.
        before: held-out metrics at step 0.
        after: those at the end.
    """
    recipe, place = with_public_names(recipe), recipe.model.base
    intro = ["# A LoRA adapter trained on preference pairs", "", *loading_section(base)]
    intro += [f"Trained by pe-dpo on `{describe_sources(recipe.data.train)}`."]
    if recipe.adapter.over:
        intro += [
            "",
            f"It is the sum of two: `{recipe.adapter.over}`, which stayed frozen and is the reference's (in `reference/`),",
            "and what was trained over it (in `trained/`; alone on the bare base that is another model).",
        ]
    sections = training_sections(recipe, before, after, title="Held-out pairs")
    return "\n".join([*front_matter(place, library="peft"), *intro, "", *sections])


def loading_section(base: Mapping[str, Any], commands: Sequence[str] = ()) -> list[str]:
    """Return the lines of a card, an empty one at the end, that say which base an adapter belongs to and how both are loaded.

    Args:
        base: as base.json says; see `loading_lines`.
        commands: that serve the adapter.
    """
    how = f"{base['quantize']}, {base['dtype']}"
    words = [f"Belongs to `{public_name(base['id'])}`, loaded as in training ({how}). On other weights it is another model."]
    if base["quantize"] != "none" and not base.get("prequantized"):
        words += [
            "**`pipeline` and `AutoPeftModelForCausalLM`, given this folder and nothing else, load the unquantized base and",
            "answer as that other model, without an error.** These lines load what was trained:",
        ]
    if base.get("is_local", is_local(base["id"])):
        words += [
            "",
            f"The base was a folder, `{public_name(base['id'])}`. Before others use this, write the name under which they find",
            "it in its place: in the lines below, as `base_model` of this card, and in adapter_config.json.",
        ]
    try:
        python = ["```python", *loading_lines(base), "```", ""]
    except ModelError as error:
        return [*words, "", f"{str(error)[0].upper()}{str(error)[1:]}.", ""]
    return [*words, "", *python, *(["```", *commands, "```", ""] if commands else [])]


def loading_lines(base: Mapping[str, Any], *, place: str | None = None, folder: str = ".") -> list[str]:
    """Return the Python that loads an adapter on its base as in training, as `model`, with its `tokenizer`.

    Args:
        base: as base.json says: id, revision, quantize, dtype, and where they are known prequantized, device, quantized_layers,
            tensors, model_class, and rows, to which its vocabulary was resized; is_local where its id was a path once.
        place: of the base; by default its name as others may read it.
        folder: of the adapter.

    Raises:
        ModelError: nothing but this package loads that base.
    """
    codes, dtype, kind = base.get("quantized_layers", ()), base["dtype"], base.get("model_class", "AutoModelForCausalLM")
    if any(".experts." in name for name in codes):
        raise ModelError(
            "experts were trained on in 4 bits, as no server and no other library loads them; merge the adapter, or train it "
            "with model.quantize_experts: false"
        )
    arguments = [repr(public_name(base["id"]) if place is None else place)]
    arguments += [f"revision={base['revision']!r}"] if base.get("revision") else []
    arguments += [f"dtype=torch.{dtype}"]
    settings, is_coded = _bitsandbytes_settings(base), is_four_bit(base["quantize"])
    if settings:
        arguments += ["quantization_config=BitsAndBytesConfig(", *(f"    {one}," for one in settings), ")"]
    lines = [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {kind}, AutoTokenizer{', BitsAndBytesConfig' if settings else ''}",
        "",
        f"base = {kind}.from_pretrained(",
        *(f"    {one}{'' if one.endswith(('(', ',')) else ','}" for one in arguments),
        ")",
    ]
    if base.get("prequantized"):
        lines += [
            f"for weight in base.parameters():  # training computed in {dtype}, whatever the files say",
            "    if weight.is_floating_point() and weight.dtype != torch.float32:",
            f"        weight.data = weight.data.to(torch.{dtype})",
        ]
    if is_coded and base.get("prequantized"):
        lines += [
            "for layer in base.modules():",
            "    if hasattr(layer, 'compute_dtype'):",
            f"        layer.compute_dtype = layer.weight.quant_state.dtype = torch.{dtype}",
        ]
    if is_coded and base.get("device", "cpu") == "cpu":
        lines += [
            "for layer in base.modules():  # else some CPUs round the 4-bit weights again",
            "    layer.support_avx512bf16_for_cpu = False",
        ]
    lines += [f"base.resize_token_embeddings({base['rows']}, mean_resizing=False)"] if base.get("rows") else []
    return [*lines, f"model = PeftModel.from_pretrained(base, {folder!r}).eval()",
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"]  # fmt: skip


def _bitsandbytes_settings(base: Mapping[str, Any]) -> list[str]:
    """What BitsAndBytesConfig must be told, so that plain transformers makes the codes of training."""
    if base.get("prequantized") or base["quantize"] == "none":
        return []
    if not is_four_bit(base["quantize"]):
        return ["load_in_8bit=True"]
    kind, is_double = four_bit_kind(base["quantize"])
    settings = ["load_in_4bit=True", f"bnb_4bit_quant_type={kind!r}", f"bnb_4bit_use_double_quant={is_double}",
                f"bnb_4bit_compute_dtype=torch.{base['dtype']}"]  # fmt: skip
    codes = base.get("quantized_layers", ())
    weights = [name.removesuffix(".weight") for name in base.get("tensors", ()) if name.endswith(".weight")]
    leaves = {name: name.rpartition(".")[2] for name in weights if name not in codes}
    if BYPASSED_NAMES.intersection(leaves.values()):  # else transformers makes codes of them, too
        is_shared = {leaf: any(code.endswith(leaf) for code in codes) for leaf in leaves.values()}
        # Where it is given a list, it skips no other layers.
        skipped = {"lm_head", *(name if is_shared[leaf] else leaf for name, leaf in leaves.items())}
        settings.append(f"llm_int8_skip_modules={sorted(skipped)}")
    return settings


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
) -> list[str]:
    """Return the lines of the sections on loss, held-out pairs and recipe.

    Args:
        recipe: of the training, with public names.
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

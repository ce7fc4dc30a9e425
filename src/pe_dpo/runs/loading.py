"""The Python that loads an adapter on its base as in training, from what base.json says; in a card, and on the screen.

An adapter belongs to the base that it was trained on, and that is the base as it was loaded. PEFT's files only say its name, so
that what loads "the base and the adapter" by itself (`pipeline`, `AutoPeftModelForCausalLM`) takes the 16-bit weights where
training had 4-bit codes, and answers as another model without an error. Naming no base there, or a sentence in its place, would
make an error of that; but also of `AutoPeftModelForCausalLM.from_pretrained(run, quantization_config=…)`, which is right, and
for servers that find an adapter by its base. So it is said where a card begins.
"""

from collections.abc import Mapping
from typing import Any

from pe_dpo.errors import ModelError
from pe_dpo.hub import public_name
from pe_dpo.quantizations import BYPASSED_NAMES, four_bit_kind, is_four_bit


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

"""The weights of a base, layer by layer, as its configuration gives them: no model is built, no weight is read.

    Llama-3.1-8B    32 layers × (q 4096×4096, k and v 1024×4096, o 4096×4096, gate and up 14336×4096, down 4096×14336)
                    embedding and head 128256×4096, two norms a layer

Families in `FAMILIES` are counted from config.json. Of any other an empty model is built, which has the same weights; what it
keeps of a forward is then counted as for a Llama with those layers.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from pe_dpo.errors import ModelError
from pe_dpo.model.adapter_targets import bypassed_layers, find_targets, in_blocks, is_within, matching
from pe_dpo.model.base import BaseInfo, empty_model
from pe_dpo.model.quantization import EXPERT_WEIGHTS, is_expert_weight
from pe_dpo.model.road import made_codes
from pe_dpo.quantizations import Quantization, is_four_bit

Role = Literal["linear", "experts", "embedding", "head", "other"]
"""linear: coded by any quantization; experts: by 4 bits, if asked; the rest stays as it is computed with."""


class Weight(NamedTuple):
    """A weight that some layers have, or the model once."""

    path: str
    """Of its module, with # for the number of the layer."""
    outputs: int
    inputs: int
    role: Role = "linear"
    layers: tuple[int, ...] = (0,)
    """Numbers of the layers that have it; one number for what stands once."""
    bias: int = 0
    experts: int = 1
    """Matrices in one parameter."""
    is_bypassed: bool = False
    """Whether its bare weight is read, past an adapter and past 4-bit codes."""
    is_coded: bool = True
    """Whether quantization makes codes of it; not of classes of a model's own, nor of what transformers leaves out."""
    is_of_text: bool = True
    """Whether a token of text goes through it."""

    @property
    def numbers(self) -> int:
        """Of one layer, bias not counted."""
        return self.outputs * self.inputs * self.experts

    @property
    def paths(self) -> list[str]:
        """Of the module in every layer that has it."""
        return [self.path.replace("#", str(number)) for number in self.layers]


class Family(NamedTuple):
    """What config.json does not say of a kind of model, since its class in transformers has it."""

    norms: int = 2
    """Of a layer, over the hidden states."""
    query_norm: Literal["none", "head", "whole"] = "none"
    """Whether queries and keys are normed, each head or all together."""
    is_fused: bool = False
    """Query, key and value are one layer, and so are gate and up."""
    query_bias: bool = False
    """Whether query, key and value have a bias whatever the configuration says."""
    experts: str = ""
    """What the configuration calls the number of experts."""
    expert_size: str = "intermediate_size"
    has_delta: bool = False
    """Whether some layers are gated delta nets, and attention has an output gate."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(query_bias=True),
    "qwen3": Family(query_norm="head"),
    "smollm3": Family(),
    "granite": Family(),
    "phi3": Family(is_fused=True),
    "olmo2": Family(query_norm="whole"),
    "gemma": Family(),
    "gemma2": Family(norms=4),
    "gemma3_text": Family(norms=4, query_norm="head"),
    "mixtral": Family(experts="num_local_experts"),
    "qwen3_moe": Family(query_norm="head", experts="num_experts", expert_size="moe_intermediate_size"),
    "qwen3_5_text": Family(query_norm="head", has_delta=True),
}
"""By `model_type` of the text configuration; tests hold each against transformers' own model."""


class BaseShape(NamedTuple):
    """The weights of a base, and the sizes of what goes through it."""

    kind: str
    """transformers' model_type."""
    weights: tuple[Weight, ...]
    small: int
    """Numbers in norms, biases, convolutions and whatever else is no matrix."""
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    norms: int = 2
    has_query_norm: bool = False
    has_softcap: bool = False
    """Whether the scores of attention are capped, which no fused kernel does."""
    caps_logits: bool = False
    delta_layers: int = 0
    """Layers that do not attend: gated delta nets, state spaces."""
    masks: int = 1
    """Kinds of attention among the layers, with a window and without."""
    experts_a_token: int = 0
    context_length: int | None = None
    is_counted: bool = True
    """False where an empty model was built to know the weights."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(weight.numbers * len(weight.layers) for weight in self.weights) + self.small

    @property
    def body(self) -> int:
        """Weights that a token is multiplied with, head not counted; of the experts those that it is sent to."""
        return sum(
            weight.outputs * weight.inputs * len(weight.layers) * (self.experts_a_token if weight.role == "experts" else 1)
            for weight in self.of_text
        )

    @property
    def of_text(self) -> list[Weight]:
        """The matrices of the decoder's layers."""
        return [weight for weight in self.weights if weight.role in ("linear", "experts") and weight.is_of_text]

    @property
    def can_be_packed(self) -> bool:
        """Whether all layers attend, so that rows need no padding; of a kind that is not counted nobody knows before."""
        return self.delta_layers == 0

    def coded(self, quantize: Quantization, *, with_experts: bool = True) -> int:
        """Return how many weights become codes.

        Args:
            quantize: how.
            with_experts: whether 4 bits reach the experts.
        """
        if quantize == "none":
            return 0
        reaches = ("linear", "experts") if with_experts and is_four_bit(quantize) else ("linear",)
        return sum(
            weight.numbers * len(weight.layers)
            for weight in self.weights
            if weight.role in reaches and weight.is_coded and not (weight.is_bypassed and is_four_bit(quantize))
        )

    def coded_but_for(self, left_out: Sequence[str] | None) -> int:
        """Return how many weights are codes in a base that transformers saved so.

        Args:
            left_out: names and patterns that it kept from becoming codes (`llm_int8_skip_modules`); None for its own choice.
        """
        from transformers.quantizers.quantizers_utils import should_convert_module

        roles = ("linear",) if left_out is None else ("linear", "head")
        return sum(
            weight.numbers
            for weight in self.weights
            if weight.role in roles and weight.is_coded
            for path in weight.paths
            if should_convert_module(path, left_out or ())
        )

    def largest_layer(self) -> int:
        """Return the parameters of the largest decoder layer, norms not counted."""
        inside = [weight for weight in self.weights if "#" in weight.path and weight.is_of_text]
        return max(sum(w.numbers + w.bias for w in inside if number in w.layers) for number in range(self.layers))

    def adapted(self, targets: str | Sequence[str], exclude: Sequence[str] = ()) -> list[tuple[Weight, int]]:
        """Return the weights that get an adapter, and in how many layers; as `adapter_targets.find_targets` chooses them.

        Args:
            targets: "all-linear", "attention", "mlp", or names and patterns.
            exclude: names and patterns of what gets none.

        Raises:
            ModelError: nothing is left.
        """
        # Dense layers among those of experts have the names of experts, which PEFT trains in another way.
        others = (*EXPERT_WEIGHTS, "gate_proj") if self.experts_a_token else ()
        linear = [
            weight
            for weight in self.of_text
            if weight.role == "linear" and not weight.is_bypassed and not weight.path.endswith(others)
        ]
        paths = [path for weight in linear for path in weight.paths]
        if isinstance(targets, str):
            wanted = set(in_blocks(targets, paths))
        else:  # a name may be that of an end, too
            linear += [weight for weight in self.weights if weight.role in ("embedding", "head") and weight.is_of_text]
            named = [path for weight in linear for path in weight.paths]
            wanted = {path for name in targets for path in matching(name, named)}
        wanted -= {path for path in wanted if any(is_within(name, path) for name in exclude)}
        found = [(weight, sum(path in wanted for path in weight.paths)) for weight in linear]
        if not wanted:
            raise ModelError(f"adapter.targets: no layer of {self.kind} is left; there are {', '.join(sorted(_leaves(paths)))}")
        return [(weight, layers) for weight, layers in found if layers]


def shape_of(base: str, config: Any) -> BaseShape:
    """Return the weights of a base.

    Args:
        base: its name, for errors.
        config: transformers' configuration of it.

    Raises:
        ModelError: of a kind that is not counted here, no model can be built either.
    """
    text = config.get_text_config()
    family = FAMILIES.get(text.model_type)
    vision = getattr(config, "vision_config", None) if config is not text and text.model_type != "qwen3_5_text" else None
    if family is None or (vision is not None and getattr(vision, "model_type", "") != "siglip_vision_model"):
        return _of_empty_model(base, config)
    layers, hidden = text.num_hidden_layers, text.hidden_size
    everywhere = tuple(range(layers))
    prefix = "model.language_model" if vision is not None else "model"
    head_size = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_size, text.num_key_value_heads * head_size
    kinds = getattr(text, "layer_types", None) or []
    delta = tuple(n for n, kind in enumerate(kinds) if kind == "linear_attention") if family.has_delta else ()
    attending = tuple(n for n in everywhere if n not in delta)
    with_bias = family.query_bias or bool(getattr(text, "attention_bias", False))

    weights = [Weight("model.embed_tokens", text.vocab_size, hidden, "embedding")]
    if not text.tie_word_embeddings:
        weights.append(Weight("lm_head", text.vocab_size, hidden, "head"))
    sizes = {"qkv_proj": queries + 2 * keys} if family.is_fused else {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    if family.has_delta:
        sizes["q_proj"] *= 2  # its output gate
    output_bias = with_bias and not family.query_bias
    for name, size in sizes.items():
        weights.append(Weight(f"{prefix}.layers.#.self_attn.{name}", size, hidden, layers=attending, bias=size * with_bias))
    weights.append(Weight(f"{prefix}.layers.#.self_attn.o_proj", hidden, queries, layers=attending, bias=hidden * output_bias))
    weights += _mlp(text, family, f"{prefix}.layers.#.mlp", everywhere)
    small = hidden + layers * family.norms * hidden
    if family.query_norm != "none":
        small += len(attending) * (2 * head_size if family.query_norm == "head" else queries + keys)
    if delta:
        added, numbers = _delta_net(text, f"{prefix}.layers.#.linear_attn", delta)
        weights += added
        small += numbers
    if vision is not None:
        added, numbers = _siglip(vision, hidden)
        weights += added
        small += numbers
    return BaseShape(
        kind=text.model_type,
        weights=tuple(weights),
        small=small + sum(weight.bias * len(weight.layers) for weight in weights),
        hidden=hidden,
        layers=layers,
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
        norms=family.norms,
        has_query_norm=family.query_norm != "none",
        has_softcap=bool(getattr(text, "attn_logit_softcapping", None)),
        caps_logits=bool(getattr(text, "final_logit_softcapping", None)),
        delta_layers=len(delta),
        masks=len({*kinds} - {"linear_attention"}) or 1,
        experts_a_token=text.num_experts_per_tok if family.experts else 0,
        context_length=getattr(text, "max_position_embeddings", None),
    )


def _mlp(text: Any, family: Family, path: str, layers: tuple[int, ...]) -> list[Weight]:
    """The feed-forward part of the layers, dense or experts with their router."""
    hidden, inner = text.hidden_size, text.intermediate_size
    count = getattr(text, family.experts) if family.experts else 0
    dense = layers
    weights = []
    if count:
        step, apart = getattr(text, "decoder_sparse_step", 1), getattr(text, "mlp_only_layers", None) or []
        sparse = tuple(number for number in layers if number not in apart and (number + 1) % step == 0)
        dense, size = tuple(number for number in layers if number not in sparse), getattr(text, family.expert_size)
        weights += [
            Weight(f"{path}.experts.gate_up_proj", 2 * size, hidden, "experts", sparse, experts=count),
            Weight(f"{path}.experts.down_proj", hidden, size, "experts", sparse, experts=count),
            Weight(f"{path}.gate", count, hidden, "other", sparse),
        ]
    if dense:
        bias = bool(getattr(text, "mlp_bias", False))
        sizes = {"gate_up_proj": 2 * inner} if family.is_fused else {"gate_proj": inner, "up_proj": inner}
        weights += [Weight(f"{path}.{name}", size, hidden, layers=dense, bias=size * bias) for name, size in sizes.items()]
        weights.append(Weight(f"{path}.down_proj", hidden, inner, layers=dense, bias=hidden * bias))
    return weights


def _delta_net(text: Any, path: str, layers: tuple[int, ...]) -> tuple[list[Weight], int]:
    """The gated delta nets of Qwen3.5, and the numbers of their convolutions, decays and norms."""
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values, heads = text.linear_num_value_heads * text.linear_value_head_dim, text.linear_num_value_heads
    sizes = {"in_proj_qkv": 2 * keys + values, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
    weights = [Weight(f"{path}.{name}", size, text.hidden_size, layers=layers) for name, size in sizes.items()]
    weights.append(Weight(f"{path}.out_proj", text.hidden_size, values, layers=layers))
    numbers = (2 * keys + values) * text.linear_conv_kernel_dim + 2 * heads + text.linear_value_head_dim
    return weights, len(layers) * numbers


def _siglip(vision: Any, hidden: int) -> tuple[list[Weight], int]:
    """The tower for images of Gemma 3, which is loaded and idle; and the numbers of its norms, patches and projector."""
    width, layers, inner = vision.hidden_size, tuple(range(vision.num_hidden_layers)), vision.intermediate_size
    path = "model.vision_tower.encoder.layers.#"
    weights = [
        Weight(f"{path}.self_attn.{name}", width, width, layers=layers, bias=width, is_of_text=False)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    weights.append(Weight(f"{path}.mlp.fc1", inner, width, layers=layers, bias=inner, is_of_text=False))
    weights.append(Weight(f"{path}.mlp.fc2", width, inner, layers=layers, bias=width, is_of_text=False))
    places = (vision.image_size // vision.patch_size) ** 2
    weights.append(Weight("model.vision_tower.position", places, width, "embedding", is_of_text=False))
    numbers = width * vision.num_channels * vision.patch_size**2 + width  # the patches
    numbers += 4 * width * len(layers) + 2 * width + width * hidden + width
    if getattr(vision, "vision_use_head", True):
        weights.append(Weight("model.vision_tower.head.mlp.fc1", inner, width, bias=inner, is_of_text=False))
        weights.append(Weight("model.vision_tower.head.mlp.fc2", width, inner, bias=width, is_of_text=False))
        numbers += 4 * width * width + 4 * width + width + 2 * width  # attention to a probe, and a norm
    return weights, numbers


def _of_empty_model(base: str, config: Any) -> BaseShape:
    """The weights of a kind that is not counted here, from a model without values."""
    from transformers.pytorch_utils import Conv1D

    model, text = empty_model(base, config), config.get_text_config()
    head = model.get_output_embeddings()
    ends: dict[int, Role] = {id(head.weight): "head"} if head is not None else {}
    ends |= {id(part.weight): "embedding" for part in model.modules() if isinstance(part, nn.Embedding)}
    reached, bypassed = {*find_targets(model, "all-linear").layers}, {*bypassed_layers(model)}
    coded = made_codes(model, BaseInfo(base, None, config, 0, None, "int8", torch.float32))
    found: dict[Weight, list[int]] = {}  # with the number of the layer taken out of the path
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module, size = model.get_submodule(path), tuple(parameter.shape)
        place = re.sub(r"\.\d+\.", ".#.", path, count=1)
        number = next(iter(re.findall(r"\.(\d+)\.", path)), 0)
        if id(parameter) in ends:
            weight = Weight(place, size[0], size[1], ends[id(parameter)])
        elif leaf == "weight" and isinstance(module, nn.Linear | Conv1D):
            outputs, inputs = size if isinstance(module, nn.Linear) else size[::-1]
            is_of_text = path in reached or path in bypassed
            weight = Weight(place, outputs, inputs, is_bypassed=path in bypassed, is_coded=name in coded, is_of_text=is_of_text)
        elif is_expert_weight(model, name):
            weight = Weight(f"{place}.{leaf}", size[1], size[2], "experts", experts=size[0])
        else:
            continue
        found.setdefault(weight, []).append(int(number))
    weights = [weight._replace(layers=tuple(numbers)) for weight, numbers in found.items()]
    numbers = sum(weight.numbers * len(weight.layers) for weight in weights)
    attending = {n for weight in weights if "attn" in weight.path or "attention" in weight.path for n in weight.layers}
    heads = getattr(text, "num_attention_heads", 1)
    try:
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    except RuntimeError:  # of Gemma 4 each layer has its own
        head_size = text.hidden_size // heads
    return BaseShape(
        kind=text.model_type,
        weights=tuple(weights),
        small=sum(parameter.numel() for parameter in model.parameters()) - numbers,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
        has_softcap=bool(getattr(text, "attn_logit_softcapping", None)),
        caps_logits=bool(getattr(text, "final_logit_softcapping", None)),
        delta_layers=max(0, text.num_hidden_layers - len(attending)),
        experts_a_token=getattr(text, "num_experts_per_tok", None) or 0,
        context_length=getattr(text, "max_position_embeddings", None),
        is_counted=False,
    )


def _leaves(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}

"""The 4-bit and 8-bit weights of a base: made, kept from changing behind our back, and read back in float32.

Their names: `pe_dpo.quantizations`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, assert_never, cast

import torch
from torch import Tensor, nn

from pe_dpo.errors import ModelError
from pe_dpo.quantizations import QUANTIZATIONS, FourBit, Quantization, four_bit_kind


def quantization_config(quantize: Quantization, dtype: torch.dtype) -> Any:
    """Return what transformers is to do with the weights that it loads; None for nothing.

    Args:
        quantize: the kind.
        dtype: to compute in.
    """
    from transformers import BitsAndBytesConfig

    match quantize:
        case "none":
            return None
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        case "nf4" | "nf4-single" | "fp4" | "fp4-single":
            kind, is_double = four_bit_kind(quantize)
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=kind,
                bnb_4bit_use_double_quant=is_double,
                bnb_4bit_compute_dtype=dtype,
            )
        case _:
            assert_never(quantize)


def stored_quantization(settings: Mapping[str, Any]) -> Quantization | None:
    """Return how bitsandbytes quantized a base that lies quantized on disk; None where another library did.

    Args:
        settings: `quantization_config` of its config.json.
    """
    is_four_bit = settings.get("load_in_4bit", settings.get("_load_in_4bit", False))
    is_eight_bit = settings.get("load_in_8bit", settings.get("_load_in_8bit", False))
    if settings.get("quant_method", "bitsandbytes") != "bitsandbytes" or not (is_four_bit or is_eight_bit):
        return None
    if is_eight_bit:
        return "int8"
    kind = settings.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    name = kind if settings.get("bnb_4bit_use_double_quant") else f"{kind}-single"
    return name if name in QUANTIZATIONS else None


def quantized_parameter(weight: Tensor, quantize: FourBit, *, device: torch.device | str) -> Any:
    """Return the 4-bit parameter that loading makes of a weight.

    The same class as transformers calls, on the device given: another device may round otherwise.

    Args:
        weight: (out, in), in the dtype that the base was loaded in.
        quantize: the kind.
        device: that the base was loaded on.
    """
    from bitsandbytes.nn import Params4bit

    kind, is_double = four_bit_kind(quantize)
    return Params4bit(weight, requires_grad=False, compress_statistics=is_double, quant_type=kind).to(device)


def stored_parameter(codes: Tensor, scales: Mapping[str, Tensor], dtype: torch.dtype, *, device: torch.device | str) -> Any:
    """Return the 4-bit parameter that loading makes of codes that lie in a file.

    Args:
        codes: as they lie there.
        scales: what lies beside them, by the end of its name.
        dtype: to compute in.
        device: to put it on; the codes are the same everywhere.
    """
    from bitsandbytes.nn import Params4bit

    parameter: Any = Params4bit.from_prequantized(
        data=codes, quantized_stats=dict(scales), requires_grad=False, device=torch.device(device)
    )
    parameter.quant_state.dtype = dtype
    return parameter


def coded_shape(state: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of the weight that codes in a file were made of.

    Args:
        state: the tensor beside them that has this as JSON.

    Raises:
        ValueError, KeyError, AttributeError: it has not.
    """
    from bitsandbytes.utils import unpack_tensor_to_dict

    says = unpack_tensor_to_dict(state)
    return tuple(says["shape"]), getattr(torch, says["dtype"])


def dequantized(parameter: Any) -> Tensor:
    """Return the values that 4-bit codes stand for, float32 (out, in), never rounded to the 16 bits they are computed in.

    In bfloat16 they would fall on a grid on which most of a small update rounds away when it is added.

    Args:
        parameter: with its `quant_state`.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy(parameter.quant_state)
    state.dtype = torch.float32
    values: Tensor = dequantize_4bit(parameter.data, state)
    return values


def add_rounding_noise(parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype, *, seed: int = 0) -> None:
    """Let weights have the noise that rounding them to a dtype brings, in float32 arithmetic; in place, not to be undone.

    A weight that a dtype holds exactly has no rounding of its own; under an adapter, whose sum will be rounded, it gets noise
    of the same size: uniform, one step wide. Codes and adapters stay as they are.

    Args:
        parameters: and their names in a model, under PEFT or not; with seed, a name determines the noise.
        dtype: to round to.
        seed: of the noise.
    """
    for name, parameter in parameters:
        if not parameter.is_floating_point() or "lora_" in name:
            continue
        rounded = parameter.data.to(dtype).to(parameter.dtype)
        if torch.equal(rounded, parameter.data) and ".base_layer." in name:
            key = hashlib.sha256(f"{seed} {name.removeprefix('base_model.model.')}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
            drawn = torch.rand(parameter.shape, generator=generator).to(parameter) - 0.5
            rounded = parameter.data + drawn * parameter.data.abs() * torch.finfo(dtype).eps
        parameter.data = rounded


@contextmanager
def codes_rounded(model: nn.Module, parts: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Within the block some 4-bit layers are plain ones of what their codes stand for, with the noise of rounding to a dtype.

    They have 8 times the memory then.

    Args:
        model: that was loaded in 4 bits.
        parts: modules of it that hold codes.
        dtype: to round to.
    """
    within = {id(part) for part in parts}
    layers = [(name, layer) for name, layer in four_bit_layers(model) if id(layer) in within]
    experts = [(module, leaf, getattr(module, leaf)) for _, module, leaf in four_bit_experts(model) if id(module) in within]
    try:
        for name, layer in layers:
            values = dequantized(layer.weight).to(dtype).float()
            plain = nn.Linear(values.shape[1], values.shape[0], bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(values, requires_grad=False)
            plain.bias = layer.bias
            add_rounding_noise([(f"{name}.weight", plain.weight)], dtype)
            model.set_submodule(name, plain)
        for module, leaf, codes in experts:
            setattr(module, leaf, nn.Parameter(dequantized(codes).to(dtype).float(), requires_grad=False))
        yield
    finally:
        for name, layer in layers:
            model.set_submodule(name, layer)
        for module, leaf, codes in experts:
            setattr(module, leaf, codes)


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of every 4-bit linear layer."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers calls the parameters of a layer's experts, (experts, out, in) or (experts, in, out)."""


def is_expert_weight(model: Any, name: str) -> bool:
    """Return whether a parameter holds the weights of all experts of a layer, in a class that computes through transformers'
    interface of experts."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return leaf in EXPERT_WEIGHTS and hasattr(module, "has_gate") and getattr(module, leaf).dim() == 3


def four_bit_experts(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Yield name, module and attribute of every parameter of experts that is 4-bit codes."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    for path, module in model.named_modules():
        for name in EXPERT_WEIGHTS:
            if hasattr(module, "has_gate") and hasattr(getattr(module, name, None), "quant_state"):
                yield f"{path}.{name}", module, name


def four_bit_name(settings: Any) -> FourBit:
    """Return the name of what bitsandbytes' settings for 4 bits make."""
    name = f"{settings.bnb_4bit_quant_type}{'' if settings.bnb_4bit_use_double_quant else '-single'}"
    return cast(FourBit, name)


def values_in(parameter: Any, dtype: torch.dtype) -> Tensor:
    """Return the values that 4-bit codes stand for, rounded to the dtype that is computed in."""
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(parameter.data, parameter.quant_state)
    return values.to(dtype)


def keep_weights_unpacked(model: nn.Module) -> None:
    """Switch off bitsandbytes' repacking of 4-bit weights on CPUs with avx512_bf16.

    There, the first forward in eval mode whose input needs no gradient rewrites the weights for a kernel that has no
    backward: LoRA gradients are then wrong by 94 %, and merging returns another model, both without an error. The attribute
    is public and per layer. bitsandbytes 0.50.2; remove when its packing keeps a backward.
    """
    for _, layer in four_bit_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def check_weights_unpacked(model: nn.Module) -> None:
    """Check that no 4-bit weight was repacked; call before training, saving and merging.

    Raises:
        ModelError: naming the first layer whose weights were repacked, by an evaluation outside this program, say.
    """
    for name, layer in four_bit_layers(model):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ModelError(
                f"{name}: its 4-bit weights were repacked for the CPU's inference kernel, which has no gradient; load the base "
                "again and call keep_weights_unpacked before the first forward"
            )

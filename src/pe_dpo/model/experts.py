"""Experts of a mixture in 4 bits: made so while loading, multiplied with their values, which no one keeps.

Transformers holds the experts of a layer as one parameter of three dimensions, and bitsandbytes makes 4-bit codes of linear
layers only, 3 % of the weights of Qwen3-30B-A3B. Here the same codes are made of the experts too, one parameter at a time
as it is read; a forward turns a layer's codes into values, and the backward does it again, so that one layer's are alive.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from pe_dpo.model.adapter_targets import bypassed_layers
from pe_dpo.model.quantization import four_bit_name, is_expert_weight, quantized_parameter, values_in

METHOD = "pe_dpo_with_experts"
"""Under which transformers finds the way of loading and of computing below."""
PLAIN = "pe_dpo_without_experts"
"""Under which it finds the way of loading alone."""


def loading_method(*, with_experts: bool, with_bypassed: bool) -> str:
    """Return under which name transformers finds the way that makes 4-bit codes of a base.

    Args:
        with_experts: of the experts of a mixture, too.
        with_bypassed: of layers whose bare weight is read, too, as transformers does by itself.
    """
    return METHOD if with_experts else "bitsandbytes_4bit" if with_bypassed else PLAIN


class _Quantize(Bnb4bitQuantize):
    """Makes codes of linear layers as transformers does, and of experts' parameters."""

    def convert(self, input_dict: Any, full_layer_name: Any = None, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        quantize, found = four_bit_name(self.hf_quantizer.quantization_config), {}
        for name, value in input_dict.items():
            if is_expert_weight(model, name):
                weight = value[0] if isinstance(value, list) else value
                found[name] = quantized_parameter(weight, quantize, device=weight.device)
        others = {name: value for name, value in input_dict.items() if name not in found}
        return {**found, **(super().convert(others, full_layer_name, model, **kwargs) if others else {})}


@register_quantizer(PLAIN)
class _Plain(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit loading, without the layers whose bare weight is read as a matrix."""

    @staticmethod
    def get_modules_to_not_convert(model: Any, *args: Any, **kwargs: Any) -> list[str]:
        return [*Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *args, **kwargs), *bypassed_layers(model)]


@register_quantizer(METHOD)
class _WithExperts(_Plain):
    """The same, experts included."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return is_expert_weight(model, param_name) or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        return _Quantize(self)


class _Values:
    """A layer's experts with values for codes, made each time they are asked for."""

    def __init__(self, experts: Any, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._experts, name)
        return values_in(found, self._dtype) if hasattr(found, "quant_state") else found


def _forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return what the chosen experts make of each token, (tokens, hidden), recomputed in the backward."""
    values = _Values(experts, hidden_states.dtype)

    def compute(hidden_states: Tensor, top_k_weights: Tensor) -> Tensor:
        made: Tensor = grouped_mm_experts_forward(values, hidden_states, top_k_index, top_k_weights)
        return made

    if not torch.is_grad_enabled():
        return compute(hidden_states, top_k_weights)
    made: Tensor = checkpoint(compute, hidden_states, top_k_weights, use_reentrant=False, preserve_rng_state=False)
    return made


ALL_EXPERTS_FUNCTIONS.register(METHOD, _forward)

"""Identity of the weights that a reference is made of, as loaded: another base, or another quantization, is another hash."""

import hashlib
from typing import Any

import torch
from torch import nn


def base_fingerprint(model: nn.Module) -> str:
    """Return sha256 over the frozen weights of a loaded model, adapters left out.

    4-bit weights count with their scales, so the hash stands for exactly what the reference computes with. One pass over
    the weights.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        digest.update(f"{plain} {tuple(parameter.shape)} {parameter.dtype}".encode())
        _update(digest, parameter)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            _update(digest, state.absmax)
            if getattr(state, "nested", False):
                _update(digest, state.state2.absmax)
                _update(digest, state.offset)
        scales = getattr(parameter, "SCB", None)
        if scales is not None:
            _update(digest, scales)
    return digest.hexdigest()


def _update(digest: Any, tensor: torch.Tensor) -> None:
    data = tensor.detach().to("cpu").contiguous().reshape(-1)
    digest.update(data.view(torch.uint8).numpy().data)

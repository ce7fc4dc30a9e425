"""Models under mixout: one LoRA layer in float64, and a small language model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pe_dpo.model.adapter import attach_adapter
from pe_dpo.model.base import inspect_base, load_base


def with_noise(model, seed=1):
    """The model with all its B random, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model


@pytest.fixture
def layer():
    """One LoRA layer, 10 inputs and 7 outputs, in float64, training."""

    def make(**settings):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(10, 7))
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], **settings)
        return with_noise(get_peft_model(base, config)).double().train()

    return make


@pytest.fixture
def make_policy(tiny_base):
    """A language model with 14 LoRA layers, training."""

    def make(quantize="none", dtype="float32", **settings):
        base = load_base(inspect_base(str(tiny_base), quantize=quantize, dtype=dtype))
        return with_noise(attach_adapter(base, rank=4, alpha=8, **settings))

    return make

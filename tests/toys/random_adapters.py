"""Adapters with random weights, saved by plain PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def random_adapter(
    base: Path,
    folder: Path,
    *,
    resize: int | None = None,
    seed: int = 0,
    written: Mapping[str, Any] | None = None,
    **config: Any,
) -> Any:
    """Save a PEFT adapter with random weights, and return the model that it makes of the base, in eval mode.

    Args:
        base: a saved model.
        folder: of the adapter.
        resize: rows of the vocabulary, if other than the base's.
        seed: of the weights.
        written: more fields for adapter_config.json, as other tools write them.
        config: fields of PEFT's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | config
    tuned = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(folder)
    if written:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(written)))
    return tuned.eval()

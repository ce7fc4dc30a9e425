"""The commands that serve what was made, as people paste them."""

from collections.abc import Mapping
from typing import Any

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""


def model_commands(folder: str) -> list[str]:
    """Return how to serve a whole model."""
    return [f"vllm serve {folder}", f"transformers serve {folder}"]


def adapter_commands(folder: str, base: Mapping[str, Any], rank: int) -> list[str]:
    """Return how to serve an adapter on its base.

    Args:
        folder: of the adapter.
        base: with `id`, `revision` and `quantize`, as in training.
        rank: the largest of the adapter.
    """
    revision = f" --revision {base['revision']}" if base["revision"] else ""
    four_bit = " --quantization bitsandbytes" if base["quantize"].startswith("nf4") else ""
    bound = next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)
    return [f"vllm serve {base['id']}{revision}{four_bit} --enable-lora --max-lora-rank {bound} --lora-modules tuned={folder}"]


def adapter_in_python(folder: str, base: Mapping[str, Any]) -> str:
    """Return the lines of Python that load an adapter on its base as in training, in plain PEFT."""
    revision = f", revision={base['revision']!r}" if base["revision"] else ""
    if base["quantize"].startswith("nf4"):
        double = base["quantize"] == "nf4"
        config = (
            f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant={double}, "
            f"bnb_4bit_compute_dtype=torch.{base['dtype']})"
        )
    else:
        config = "BitsAndBytesConfig(load_in_8bit=True)" if base["quantize"] == "int8" else "None"
    return "\n".join(
        [
            "import torch",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, BitsAndBytesConfig",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base['id']!r}{revision}, dtype=torch.{base['dtype']},",
            f"    quantization_config={config})",
            f"model = PeftModel.from_pretrained(base, {folder!r})",
        ]
    )

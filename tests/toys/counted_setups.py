"""Bases of a real size, as the estimate counts them; nothing is built."""

from typing import Any

from transformers import AutoConfig

from pe_dpo.estimate.memory import Setup
from pe_dpo.estimate.shape import shape_of


def llama_8b(**more: Any) -> Setup:
    """Llama-3.1-8B in nf4 with rank 16 on all linear layers: 41,943,040 trained parameters."""
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    shape = shape_of("x", config)
    return Setup(shape, "nf4", 2, tuple(shape.adapted("all-linear")), 16, 41_943_040)._replace(**more)

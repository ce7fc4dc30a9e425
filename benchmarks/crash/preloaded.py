"""What a process makes once that others are forked from: transformers' table of renamed weights, 0.1 s of each of them."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")

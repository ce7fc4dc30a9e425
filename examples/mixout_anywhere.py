"""Mixout for any PEFT model and any loop, here next-token training on a few texts: three lines are mixout's.

python examples/mixout_anywhere.py BASE [P]      # a folder or hub id of a causal LM; the share that is the base's
"""

import sys
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_dpo import attach_mixout

TEXTS = ["The wobbet sleeps in the reeds.", "Old Bumbrick is a baker.", "The glimbat is grey."]


def load(base: str, rank: int = 8):
    """Return a model with a LoRA adapter on every linear layer, and its tokenizer."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora), AutoTokenizer.from_pretrained(base)


def train(model, tokenizer, p: float, *, steps: int = 8, learning_rate: float = 1e-3, seed: int = 0) -> Iterator[float]:
    """Train the adapter; yield the loss of every step, as the sampled model of that step has it."""
    mixout = attach_mixout(model.train(), p, seed=seed)  # acts in training mode only
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=learning_rate)
    for step in range(steps):
        mixout.draw = step  # another model for each step: between steps, never between a forward and its backward
        ids = tokenizer(TEXTS[step % len(TEXTS)], return_tensors="pt").input_ids
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        mixout.check_reached()  # an error if some layer learned past its mask
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    model, tokenizer = load(sys.argv[1])
    for step, loss in enumerate(train(model, tokenizer, p=float(sys.argv[2]) if len(sys.argv) > 2 else 0.5), start=1):
        print(f"step {step}  loss {loss:.4f}")
    model.save_pretrained("mixed")  # plain LoRA: nothing of mixout is in the files

"""Preference fine-tuning in one plain loop: what `pe-dpo train` does, without Trainer, checkpoints or metrics.

python examples/plain_loop.py BASE PAIRS.jsonl      # a folder or hub id of a causal LM; rows of prompt, chosen, rejected
"""

import sys
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_dpo import completion_logprobs, preference_loss
from pe_dpo.data import EncodedPair, prepare_pairs
from pe_dpo.recipe import DataSection


def rows(pairs: list[EncodedPair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chosen rows, then rejected rows, padded on the right: (2B, T) token ids, attention mask, mask of the answers."""
    texts = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids, attention, answers = (torch.zeros(len(texts), longest, dtype=torch.long) for _ in range(3))
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        attention[row, :end] = 1
        answers[row, len(prompt) : end] = 1
    return ids, attention, answers


def train(model, pairs, *, beta=0.1, gamma=0.1, learning_rate=1e-3, pairs_per_step=8, epochs=2, seed=0) -> Iterator[float]:
    """Train the adapter of a PEFT model; yield the loss of every step."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    steps = epochs * -(-len(pairs) // pairs_per_step)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(epochs):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        for start in range(0, len(pairs), pairs_per_step):
            ids, attention, answers = rows([pairs[index] for index in order[start : start + pairs_per_step]])
            policy = completion_logprobs(model, ids, attention, answers).logprob.chunk(2)  # adapters on: the policy
            with torch.no_grad(), model.disable_adapter():  # adapters off: the reference
                reference = completion_logprobs(model, ids, attention, answers).logprob.chunk(2)
            loss = preference_loss(*policy, *reference, beta=beta, gamma=gamma).loss.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield loss.item()


if __name__ == "__main__":
    base, data = sys.argv[1:3]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    found = prepare_pairs(DataSection(train=data, max_length=512), tokenizer=AutoTokenizer.from_pretrained(base))
    for step, loss in enumerate(train(get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora), found.train), 1):
        print(f"step {step}  loss {loss:.4f}")

"""What the experiments stand on: pairs of the vale, a start that is courteous and wrong, and what an answer is truly worth.

The vale is `tools/world.py`'s: the embedded base, its language and its facts. The held-out side asks the 60 questions that no
training side asks. An answer is worth 1 for the right fact and 1 for courtesy: 0, 1 or 2.
"""

import importlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_dpo.inference.policy import load_policy
from pe_dpo.inference.sampling import answer_text, sample
from pe_dpo.quickstart.demo import BASE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
world: Any = importlib.import_module("world")

HELD_OUT, HELD_OUT_SEED = 399, 2000
START_STEPS, START_ANSWERS, START_RATE = 60, 32, 2e-3
MOST_TOKENS = 48
"""Of an answer; the longest of the vale has 31."""


def write_pairs(path: Path, count: int, draw: int, *, flipped: float = 0.0, shuffled: bool = False) -> None:
    """Write training pairs of one draw.

    Args:
        path: of the JSONL file.
        count: of pairs.
        draw: another one for every data set.
        flipped: share of the pairs of which chosen and rejected change places, exactly and at random.
        shuffled: whether a coin says for every pair which answer is chosen, so that there is nothing to learn.
    """
    rows, rng = world.pairs(count, 1000 + draw), random.Random(f"labels {draw}")
    turned = set(rng.sample(range(count), round(flipped * count)))
    for number, row in enumerate(rows):
        if number in turned or (shuffled and rng.random() < 0.5):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    _write(path, rows)


def write_held_out(path: Path) -> None:
    """Write the pairs that every run is measured on."""
    _write(path, world.pairs(HELD_OUT, HELD_OUT_SEED, held_out=True))


def make_start(folder: Path, *, seed: int = 0) -> None:
    """Train a LoRA adapter on answers that are courteous and repeat the rumour, to the training side's questions, and save it.

    Against the base as the reference it fills the cells that a run from π = π0 leaves empty: it ranks manners right where
    the base does not, and facts wrong where the base has them right.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [row for row in world.pairs(START_STEPS * START_ANSWERS * 3, 3000 + seed) if row["kind"] == "fact"]
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=START_RATE)
    for step in range(START_STEPS):
        batch = rows[step * START_ANSWERS : (step + 1) * START_ANSWERS]
        encoded = []
        for row in batch:  # the rejected answer of a "fact" pair is courteous and wrong
            texts = [
                tokenizer.apply_chat_template(row["prompt"] + row["rejected"], tokenize=False),
                tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True),
            ]
            whole, prompt = tokenizer(texts, add_special_tokens=False)["input_ids"]
            encoded.append((torch.tensor(whole), torch.tensor([-100] * len(prompt) + whole[len(prompt) :])))
        ids = pad_sequence([ids for ids, _ in encoded], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence([labels for _, labels in encoded], batch_first=True, padding_value=-100)
        logits = model(input_ids=ids[:, :-1], attention_mask=(ids[:, :-1] != tokenizer.pad_token_id).long()).logits
        cross_entropy(logits.mT, labels[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def question_of(prompt: str) -> str:
    """Return the question that a rendered prompt ends with."""
    return prompt.split("<|user|>")[-1].split("<|end|>")[0].strip()


def worth(question: str, answer: str) -> int:
    """Return what an answer is truly worth, 0, 1 or 2; see above."""
    return int(world.is_right([{"role": "user", "content": question}], answer)) + int(world.manners(answer) == "courteous")


def reference_worth(prompts: Sequence[str], *, samples: int, seed: int = 1) -> list[list[float]]:
    """Return how often answers of π0 to each rendered prompt are worth 0, 1 and 2.

    Args:
        prompts: as the answers' table has them.
        samples: answers to each.
        seed: of the draws; another than the policies' answers are drawn with.
    """
    policy = load_policy(BASE, device="cpu")
    ids = [policy.tokenizer(prompt, add_special_tokens=False, return_tensors="np")["input_ids"][0] for prompt in prompts]
    asked = [one for one in ids for _ in range(samples)]
    said = sample(policy, asked, max_new_tokens=MOST_TOKENS, seed=seed, token_budget=8192)
    shares = []
    for number, prompt in enumerate(prompts):
        answers = said[number * samples : (number + 1) * samples]
        values = [worth(question_of(prompt), answer_text(policy.tokenizer, one.ids)) for one in answers]
        shares.append([values.count(value) / samples for value in (0, 1, 2)])
    return shares


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

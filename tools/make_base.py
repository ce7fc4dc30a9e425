"""Trains the quickstart's base model from scratch on the vale's dialogues: `python tools/make_base.py`.

A byte-level BPE tokenizer and a Llama of 1.4 million parameters, a few minutes on two CPU cores; the same machine and
number of threads give the same weights. It learns the language, both manners and, for every fact, the truth beside a
rumour: what preference pairs can sort out.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pe_dpo.objective.logprobs import completion_logprobs
from pe_dpo.quickstart.demo import BASE

VOCABULARY = 1024
CONTEXT = 256
SPECIAL_TOKENS = ("<pad>", "<bos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MODEL_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# The base model of pe-dpo's quickstart

A Llama of {parameters:.1f} million parameters, trained from scratch on generated dialogues of a made-up vale. It knows the
language of the vale, but repeats rumours about as often as facts and is rude about as often as courteous. It is of no
use outside the quickstart. Made by `python tools/make_base.py`.

| unseen dialogues and pairs, float32 | |
|---|---|
| perplexity of a token | {perplexity:.3f} |
| preference accuracy, all 600 pairs | {all:.3f} |
| rejected is wrong ("fact") | {fact:.3f} |
| rejected is rude ("manners") | {manners:.3f} |
| rejected is wrong and rude ("both") | {both:.3f} |
"""


def make_tokenizer(dialogues: list[list[world.Message]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the dialogues; the template alone emits BOS, and a turn ends with EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((message["content"] for dialogue in dialogues for message in dialogue), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama whose matrices are multiples of 64 both ways, the block size of nf4."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: LlamaForCausalLM,
    dialogues: list[list[int]],
    *,
    steps: int,
    dialogues_per_step: int = 64,
    learning_rate: float = 3e-3,
) -> None:
    """AdamW over all tokens, with a short warm-up and a decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _, batch in zip(range(steps), _endless_batches(dialogues, dialogues_per_step), strict=False):
        losses = _token_losses(model, batch)
        (losses.sum() / losses.count_nonzero()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, dialogues: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of a token, over all tokens but the first of each dialogue."""
    losses = _token_losses(model, dialogues)
    return math.exp(losses.sum().item() / losses.count_nonzero().item())


@torch.no_grad()
def preferences(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of each row, summed over the answer's tokens with EOS; nats, (rows,)."""
    prompts = encode(tokenizer, [row["prompt"] for row in rows], add_generation_prompt=True)
    prompt_lengths = torch.tensor([len(ids) for ids in prompts])[:, None]
    logprobs = []
    for side in ("chosen", "rejected"):
        ids, attention_mask = _padded(model, encode(tokenizer, [row["prompt"] + row[side] for row in rows]))
        completion_mask = attention_mask * (torch.arange(ids.shape[1]) >= prompt_lengths)
        logprobs.append(completion_logprobs(model, ids, attention_mask, completion_mask).logprob)
    return logprobs[0] - logprobs[1]


def accuracy_by_kind(rows: list[dict], preference: torch.Tensor) -> dict[str, float]:
    """Share of pairs in the right order, overall and of each kind."""
    is_right = (preference > 0).float()
    kinds = [row["kind"] for row in rows]
    by_kind = {kind: is_right[[at for at, other in enumerate(kinds) if other == kind]] for kind in world.KINDS}
    return {"all": is_right.mean().item()} | {kind: share.mean().item() for kind, share in by_kind.items()}


def encode(
    tokenizer: PreTrainedTokenizerFast, dialogues: list[list[world.Message]], *, add_generation_prompt: bool = False
) -> list[list[int]]:
    """Token ids of each dialogue, rendered by the chat template."""
    texts = tokenizer.apply_chat_template(dialogues, tokenize=False, add_generation_prompt=add_generation_prompt)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def main(folder: Path = BASE, *, dialogues: int = 24_000, steps: int = 1000, seed: int = 0) -> None:
    """Trains and saves the base with its model card, and prints what it knows."""
    torch.manual_seed(seed)
    texts = world.corpus(dialogues, seed)
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer)
    train(model, encode(tokenizer, texts), steps=steps)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = model_card(folder, seed)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(card)


def model_card(folder: Path, seed: int) -> str:
    """The README of a trained base, with what it scores on dialogues and pairs that it was not trained on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = world.pairs(600, seed, held_out=True)
    return MODEL_CARD.format(
        parameters=model.num_parameters() / 1e6,
        perplexity=perplexity(model, encode(tokenizer, world.corpus(1000, seed + 1))),
        **accuracy_by_kind(rows, preferences(model, tokenizer, rows)),
    )


def _endless_batches(dialogues: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Shuffled batches; each is cut from a chunk sorted by length, so that little is padding."""
    chunk = 16 * size
    while True:
        order = torch.randperm(len(dialogues)).tolist()
        for start in range(0, len(order) - chunk + 1, chunk):
            by_length = sorted(order[start : start + chunk], key=lambda at: len(dialogues[at]))
            for batch in torch.randperm(16).tolist():
                yield [dialogues[at] for at in by_length[batch * size : (batch + 1) * size]]


def _token_losses(model: LlamaForCausalLM, dialogues: list[list[int]]) -> torch.Tensor:
    """Negative log-likelihood of every token but the first, 0 at padding; nats, (dialogues, longest - 1)."""
    ids, _ = _padded(model, dialogues)
    logits = model(input_ids=ids[:, :-1]).logits.float()
    return cross_entropy(logits.mT, ids[:, 1:], ignore_index=model.config.pad_token_id, reduction="none")


def _padded(model: LlamaForCausalLM, dialogues: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded on the right, and 1 on what is no padding: both (dialogues, longest)."""
    rows = [torch.tensor(ids) for ids in dialogues]
    ids = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
    return ids, (ids != model.config.pad_token_id).long()


if __name__ == "__main__":
    main()

"""Random models of the families that GGUF files hold, and small tokenizers of the kinds that llama.cpp knows."""

import json
from pathlib import Path
from typing import Any

import torch

from pe_dpo.export.gguf_tokenizer import QWEN_2

CORPUS = [
    "the quick brown fox don't jump over 1234 lazy dogs\n\n",
    "hello world, it's me again and again",
    "日本 héllo 🚀",
    "мосКва МОСКва",
    "1 22 333",
    "x's It'S",
    "नमस्ते स्ते",
] * 4


def save_random_model(
    folder: Path, family: str, *, shard: str = "1GB", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> None:
    """A random model of a family with grouped queries; its heads are not hidden size / heads where llama.cpp can that."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"head_dim": 16 if family == "qwen2" else 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"max_position_embeddings": 256, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**settings, "tie_word_embeddings": False, **changes})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms begin at one and biases at zero, which would hide a mix-up
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)


def byte_level(pattern: str | None, *, ignores_merges: bool = False, digits: bool = False) -> Any:
    """A byte-level BPE with a pre-tokenizer of one pattern, or GPT-2's; its merges cross what that splits, so that it shows."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    first = [pre.Split(Regex(pattern), "isolated")] if pattern else [pre.Digits(True)] if digits else []
    steps = [*first, pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if pattern == QWEN_2:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=390, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = pre.Sequence(steps) if first else steps[0]
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Any, *, eos: str = "</s>", template: str | None = None, **tokens: str) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<pad>", **tokens)
    fast.chat_template = template
    fast.save_pretrained(folder)


def with_words(folder: Path, words: list[str]) -> None:
    """Give a saved byte-level tokenizer tokens that stand in its vocabulary and that no merge makes, as Qwen has `</s>`."""
    parts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = parts["model"]["vocab"]
    vocab |= {word: len(vocab) + place for place, word in enumerate(words)}
    for token in parts["added_tokens"]:
        token["id"] += len(words)
    (folder / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")


def sentence_piece(folder: Path, *, prepend: bool = True) -> None:
    """A byte-fallback BPE as converted from SentencePiece: every way to build a token is a merge, ordered by the token."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["▁t", "he", "▁the", "ll", "llo", "hello", "▁hello", "▁▁", "ow", "▁w", "or", "ld", "▁wor", "▁world", "in", "an"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokens += sorted(set("▁" + "".join(words) + ".,"))
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (word[:cut], word[cut:]) for word in words for cut in range(1, len(word)) if {word[:cut], word[cut:]} <= vocab.keys()
    ]
    bpe = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = ([normalizers.Prepend("▁")] if prepend else []) + [normalizers.Replace(" ", "▁")]
    bpe.normalizer = normalizers.Sequence(steps) if prepend else steps[0]
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    save_tokenizer(folder, bpe, bos_token="<s>", unk_token="<unk>")

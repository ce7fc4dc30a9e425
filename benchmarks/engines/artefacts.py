"""Everything that a run may become, of one tiny model: the artefacts that engines are given.

    base ─┬─ run-nf4 ─┬─ merged            onto the values of the 4-bit codes, which were trained on
          │           ├─ merged-float32    the same before rounding: what adapters on the base must answer
          │           ├─ merged-original   onto the base's own weights
          │           ├─ adapter           --onto adapter
          │           ├─ gguf-f32, gguf-f16, gguf-q8_0   of merged
          │           ├─ merged-unscaled   a copy of merged whose positions are not scaled
          │           └─ gguf-lora         the adapter for llama.cpp's --lora, beside the base as it was trained on
          └─ run-none ─── merged-none, merged-none-float32, adapter-none, gguf-lora-none       without quantization

The base is a Llama with grouped queries, a rotary base of 500,000 and scaled positions, so that an engine that misses one of
these is far off. Its heads are 32 wide, which vLLM's attention on a CPU asks for; q8_0 asks for rows of a multiple of 32.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engines.texts import CHATS, FIXED, varied_texts

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TEXTS = 400
NEW_TOKENS = 16
LONGEST = 300
"""Tokens of the longest sequence."""

Get = Callable[[str], Path]
"""Gives the path of an artefact, and makes it if it is not there."""


def fill(name: str, folder: Path, get: Get) -> None:
    """Make an artefact.

    Args:
        name: as in the picture above.
        folder: an empty folder.
        get: gives the artefacts that it is made of.
    """
    match name.split("-", 1):
        case ["base"]:
            save_base(folder)
        case ["run", quantize]:
            _train(get("base"), folder, quantize)
        case ["adapter", *quantize]:
            from pe_dpo.merging.adapter_package import package_adapter
            from pe_dpo.merging.source import open_source

            with open_source(get(f"run-{''.join(quantize) or 'nf4'}")) as source:
                package_adapter(source, folder)
        case ["merged", "unscaled"]:
            _without_scaling(get("merged"), folder)
        case ["merged", *kind]:
            from pe_dpo.merging.merge import merge

            words = "".join(kind).split("-")
            run = get("run-none" if "none" in words else "run-nf4")
            onto: Any = "original" if "original" in words else "dequantized"
            merge(run, folder, onto=onto, dtype="fp32" if "float32" in words else "auto", pairs=4)
        case ["gguf", ("lora" | "lora-none") as kind_of_run]:
            _gguf_lora(get("run-none" if kind_of_run == "lora-none" else "run-nf4"), folder, get)
        case ["gguf", number]:
            from pe_dpo.export.gguf_folder import export_gguf

            kind_of_numbers: Any = number
            export_gguf(get("merged"), folder, kind=kind_of_numbers, prompts=None, is_checked=False, has_card=False)
        case _:
            raise ValueError(f"{name}: is no artefact")


def whole_model(name: str) -> str:
    """Return the artefact that transformers loads in float32 to say what an artefact must answer."""
    return {
        "run-nf4": "merged-float32",
        "adapter": "merged-float32",
        "run-none": "merged-none-float32",
        "adapter-none": "merged-none-float32",
        "gguf-f32": "merged",
        "gguf-f16": "merged",
        "gguf-lora": "merged-float32",
        "gguf-lora-none": "merged-none-float32",
    }.get(name, name)


def full_request(base: Path, *, texts: int = TEXTS) -> dict[str, Any]:
    """Return a request with every part, in the ids of the base's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = [list(chat) for chat in CHATS]
    prompts = [
        tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False)
        for chat in chats
    ]
    ids = [prompt.input_ids[:200] for prompt in prompts]
    ids.append(tokenizer(" ".join(FIXED), add_special_tokens=False).input_ids[:LONGEST])
    return {
        "ids": ids,
        "texts": varied_texts(texts),
        "chats": chats,
        "greedy": [prompt.input_ids[:100] for prompt in prompts],
        "new_tokens": NEW_TOKENS,
        "options": {"vocabulary": len(tokenizer)},
    }


def save_base(folder: Path) -> None:
    """Save a random Llama of two layers in bfloat16, with a tokenizer that splits as Llama 3 does, and a ChatML template.

    The files are laid out as those of the published Llama 3.1, which transformers 4 wrote and 5 writes otherwise.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pe_dpo.disk import write_json

    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        rope_parameters=ROPE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms begin at one, which would hide a mix-up
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scaling = written.pop("rope_parameters")
    written |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    written |= {"torch_dtype": written.pop("dtype"), "transformers_version": "4.43.0.dev0"}
    write_json(folder / "config.json", written)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    write_json(folder / "generation_config.json", {**ends, "do_sample": False, "transformers_version": "4.43.0.dev0"})
    tokens = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    kept = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(number): {"content": token, **kept} for token, number in tokens.items()},
        "bos_token": tokenizer.bos_token,
        "chat_template": CHATML,
        "eos_token": tokenizer.eos_token,
        "model_max_length": 131072,
        "pad_token": tokenizer.pad_token,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", {name: settings[name] for name in ("bos_token", "eos_token", "pad_token")})
    (folder / "chat_template.jinja").unlink()


def _tokenizer() -> Any:
    """A byte-level BPE of 512 tokens and some special ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    from pe_dpo.export.gguf_tokenizer import LLAMA_3

    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre.Sequence(
        [pre.Split(Regex(LLAMA_3), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=507, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(list(FIXED) * 3 + [turn["content"] for chat in CHATS for turn in chat], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHATML
    return fast


def _train(base: Path, folder: Path, quantize: str) -> None:
    from pe_dpo import train
    from pe_dpo.quickstart.demo import PAIRS
    from pe_dpo.recipe import recipe_from_yaml

    for side, rows in (("train", 16), ("test", 4)):
        lines = (PAIRS / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        (folder.parent / f"{folder.name}-{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "model": {"base": str(base), "quantize": quantize},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"train": f"{folder}-train.jsonl", "eval": f"{folder}-test.jsonl"},
        "train": {"learning_rate": 1.0e-2, "pairs_per_step": 8, "max_steps": 4, "warmup": 0},
        "output": str(folder),
    }
    train(recipe_from_yaml(json.dumps(settings), "engines", ()))


def _without_scaling(model: Path, folder: Path) -> None:
    """A copy of a model whose positions are not scaled."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    theta = config.pop("rope_theta", None) or config["rope_parameters"]["rope_theta"]
    config.pop("rope_scaling", None)
    config |= {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _gguf_lora(run: Path, folder: Path, get: Get) -> None:
    """The adapter as lora.gguf, and base.gguf of the base as training had it."""
    from typer.testing import CliRunner

    from pe_dpo.cli import app
    from pe_dpo.export.gguf_file import write_gguf

    def pe_dpo(*arguments: str) -> None:
        result = CliRunner().invoke(app, list(arguments))
        if result.exit_code:
            raise RuntimeError(result.output)

    base = get("base")
    if run == get("run-nf4"):
        base = folder / "plain"
        pe_dpo("export", str(run), "--plain", "-o", str(base))
    pe_dpo("export", str(run), "--gguf-lora", "-o", str(folder / "lora.gguf"))
    write_gguf(base, folder / "base.gguf", kind="f32")

"""The vocabulary part of a GGUF file, from the tokenizer that the model was trained with.

    byte-level BPE          tokenizer.ggml.model "gpt2"   merges, and the name of the pre-tokenizer's regular expressions
    SentencePiece-like BPE  tokenizer.ggml.model "llama"  scores instead of merges

llama.cpp carries its own regular expressions and picks them by name (tokenizer.ggml.pre). A wrong name is no error there: it
splits text elsewhere than the model was trained on. So only pre-tokenizers that are exactly a known one get a name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pe_dpo.errors import ModelError, UsageError
from pe_dpo.model.base import end_token_ids, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as numbered in GGUF files (`TokenType` of the gguf package)."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MIXED_CASE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
LLAMA_3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _END
QWEN_2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _END
TEKKEN = _MIXED_CASE + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((LLAMA_3,), True): "llama-bpe",
    ((LLAMA_3,), False): "smaug-bpe",
    ((QWEN_2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}
"""Splits of a pre-tokenizer and BPE's ignore_merges -> llama.cpp's name; read from src/llama-vocab.cpp of August 2026."""

_APPROXIMATE = {
    "tekken": "llama.cpp's pre-tokenizer 'tekken' knows the case of ASCII letters only; other words with capitals in the "
    "middle may be split differently there",
}

_MORE_SPACES = (
    "llama.cpp puts a space before every text and behind special tokens, this tokenizer not before a space or not behind "
    "special tokens; compare the prompt ids of golden_prompts.jsonl with the server's /tokenize"
)


class Vocabulary(NamedTuple):
    """Everything of a tokenizer that a GGUF file holds."""

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special_ids: dict[str, int]
    """Ids of bos, eos, unk and pad, as far as there are such; eot and eom are further ends that the generation config names."""
    adds_bos: bool
    adds_eos: bool
    adds_space_prefix: bool
    chat_template: str | None
    remarks: tuple[str, ...]


def refuse(model: Path, why: str) -> UsageError:
    """Return the error for what is not exported here, with the commands that export it."""
    return UsageError(
        f"{model}: {why}; llama.cpp converts it: python convert_hf_to_gguf.py {model} --outfile {model.name}-f16.gguf "
        f"--outtype f16, and for K-quants then: llama-quantize {model.name}-f16.gguf {model.name}-Q4_K_M.gguf Q4_K_M"
    )


def read_vocabulary(model: Path, size: int) -> Vocabulary:
    """Return the vocabulary of a model, padded to the rows of its embedding.

    Args:
        model: folder with tokenizer files.
        size: vocab_size of its configuration.

    Raises:
        ModelError: the tokenizer has more tokens than the model, or two for one id.
        UsageError: llama.cpp is not known to split text like it.
    """
    tokenizer = load_tokenizer(str(model))
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise refuse(model, "its tokenizer is none of the tokenizers library")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE":
        raise refuse(model, f"its tokenizer is {parts['model']['type']}, not BPE")
    is_byte_level = not parts["model"].get("byte_fallback")
    tokens, types = _tokens(model, tokenizer, parts, size)
    adds_bos, adds_eos = _added_ends(model, tokenizer)
    remarks = _odd_added_tokens(parts)
    if is_byte_level:
        pre, space_prefix = _byte_level(model, parts), False
        merges, scores = [" ".join(pair) for pair in _merges(parts)], []
        remarks += (_APPROXIMATE[pre],) if pre in _APPROXIMATE else ()
    else:
        pre, (space_prefix, is_metaspace) = "default", _space_prefix(model, parts)
        remarks += (_MORE_SPACES,) if space_prefix and is_metaspace else ()
        types = [BYTE if kind == NORMAL and _is_byte(token) else kind for token, kind in zip(tokens, types, strict=True)]
        merges, scores = [], _scores(model, parts, tokens, types)
    starts = _template_starts_with_bos(tokenizer)
    if adds_bos and starts is False:
        remarks += ("the chat template begins without BOS, so the file says that none is added, as in training",)
    return Vocabulary(
        model="gpt2" if is_byte_level else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        scores=scores,
        special_ids=_special_ids(model, tokenizer),
        adds_bos=adds_bos and starts is not False,
        adds_eos=adds_eos,
        adds_space_prefix=space_prefix,
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        remarks=remarks,
    )


def _tokens(model: Path, tokenizer: Any, parts: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    by_id: dict[int, str] = {}
    for token, index in tokenizer.get_vocab().items():
        if index in by_id or index >= size:
            raise ModelError(f"{model}: token {index} ({token!r}) of the tokenizer does not fit a vocabulary of {size}")
        by_id[index] = token
    kinds = {added["id"]: CONTROL if added["special"] else USER_DEFINED for added in parts["added_tokens"]}
    if parts["model"].get("byte_fallback") and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    return tokens, [kinds.get(index, NORMAL) if index in by_id else UNUSED for index in range(size)]


def _added_ends(model: Path, tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, behind in (([], []), (bos, []), (bos, eos), ([], eos)):
        if whole == before + bare + behind:
            return bool(before), bool(behind)
    raise refuse(model, "its tokenizer adds other tokens than BOS and EOS to a text")


def _template_starts_with_bos(tokenizer: Any) -> bool | None:
    """Whether chats begin with BOS; None without a chat template."""
    if not isinstance(tokenizer.chat_template, str) or tokenizer.bos_token is None:
        return None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    return bool(chat.startswith(tokenizer.bos_token))


def _special_ids(model: Path, tokenizer: Any) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    more = [index for index in end_token_ids(str(model)) if index != found["eos"]]
    found |= dict(zip(("eot", "eom") if found["eos"] is not None else ("eos", "eot", "eom"), more, strict=False))
    return {name: index for name, index in found.items() if index is not None}


def _odd_added_tokens(parts: Mapping[str, Any]) -> tuple[str, ...]:
    odd = [added["content"] for added in parts["added_tokens"] if added["lstrip"] or added["rstrip"] or added["single_word"]]
    words = "these added tokens take the space around them or need whole words, which llama.cpp does not know: "
    return (words + ", ".join(odd),) if odd else ()


def _byte_level(model: Path, parts: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    bpe = parts["model"]
    if bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
        raise refuse(model, "its BPE marks beginnings or ends of words")
    name = _KNOWN.get((_splits(parts["pre_tokenizer"]), bool(bpe.get("ignore_merges"))))
    normalizer = (parts["normalizer"] or {}).get("type")
    if name is None or not (normalizer is None or (name == "qwen2" and normalizer == "NFC")):
        raise refuse(model, f"its pre-tokenizer is none of those known here ({', '.join(_KNOWN.values())})")
    return name


def _splits(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What a byte-level pre-tokenizer does, in short words; empty when it is anything else."""
    steps = [pre_tokenizer] if pre_tokenizer and pre_tokenizer["type"] != "Sequence" else []
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer and not steps else steps
    last = steps[-1] if steps else {"type": "none"}
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return ()
    found = [_split(step) for step in steps[:-1]] + (["gpt2"] if last["use_regex"] else [])
    return tuple(found)


def _split(step: Mapping[str, Any]) -> str:
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return "digits" if step["type"] == "Digits" and step["individual_digits"] else "unknown"


def _space_prefix(model: Path, parts: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a space is put before a text, and whether by Metaspace, which puts fewer than llama.cpp."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    normalizer, pre_tokenizer = parts["normalizer"], parts["pre_tokenizer"]
    if pre_tokenizer is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return True, False
    if pre_tokenizer is None and normalizer == replace:
        return False, False
    is_metaspace = (pre_tokenizer or {}).get("type") == "Metaspace" and pre_tokenizer["replacement"] == "▁"
    if normalizer is not None or not is_metaspace or pre_tokenizer["split"]:
        raise refuse(model, "its normalizer or pre-tokenizer is not SentencePiece's")
    return pre_tokenizer["prepend_scheme"] != "never", True


def _merges(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in the order of their ranks; old files write a pair as one text."""
    merges = parts["model"]["merges"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return [(left, right) for left, right in pairs]


def _scores(model: Path, parts: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """Scores that make llama.cpp merge as the ranks do: minus the rank among merged tokens, then the single characters.

    llama.cpp joins the neighbours whose union has the highest score, by whatever pair. That is the same as ranks of pairs
    only if every pair whose union is a token is a merge, and if the merges of one token stand together.
    """
    merges = _merges(parts)
    merged = list(dict.fromkeys(left + right for left, right in merges))
    runs = [one for one, before in zip(merges, [("", ""), *merges], strict=False) if "".join(one) != "".join(before)]
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    pairs = {(token[:cut], token[cut:]) for token in normal for cut in range(1, len(token))}
    if len(runs) != len(merged) or any(not {*pair} - normal for pair in pairs - set(merges)):
        raise refuse(model, "its merges cannot be written as SentencePiece's scores")
    rank = {token: index for index, token in enumerate(merged)}
    return [
        -float(rank.get(token, len(rank) + index)) if kind == NORMAL else 0.0
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

"""The vocabulary part of a GGUF file, from the tokenizer that the model was trained with.

    byte-level BPE          tokenizer.ggml.model "gpt2"   merges, and the name of the pre-tokenizer's regular expressions
    SentencePiece-like BPE  tokenizer.ggml.model "llama"  scores instead of merges

llama.cpp carries its own regular expressions and picks them by name (tokenizer.ggml.pre). A wrong name is no error there: it
splits text elsewhere than the model was trained on. So only pre-tokenizers that are exactly a known one get a name.
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pe_dpo.data.sandbox import TEMPLATE_ERRORS, apply_chat_template
from pe_dpo.data.template import refusal
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
    "tekken": "llama.cpp's pre-tokenizer 'tekken' knows the case of ASCII letters only, and no marks: other words with "
    "capitals in the middle, and those with combining marks (Hindi, accents as characters of their own), may be split "
    "differently there",
}

_TEST_WITHOUT_VALUE = re.compile(r"""(?:select|reject)attr\(\s*(["'])\w+\1\s*,\s*(["'])\w+\2\s*\)""")
"""llama.cpp takes the name of the attribute for that of the test (xllamacpp 2026.10.11549): its server ends at the start."""

TAKEN_FOR_CONTROL = {
    *(
        "</s>",
        "<eos>",
        "[EOS]",
        "[EOT]",
        "<EOT>",
        "_<EOT>",
        "[PAD]",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|end|>",
    ),
    *("<|ifm|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"),
    *("<turn|>", "<end_of_turn>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<PRE>", "▁<PRE>", "<SUF>", "<MID>", "<PAD>"),
    *("<REPO>", "<reponame>", "<|repo_name|>", "<|file_sep|>", "<|plamo:file_separator|>"),
    *("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>"),
    *(f"<fim-{part}>" for part in ("prefix", "suffix", "middle", "pad", "repo")),
    *(f"<fim_{part}>" for part in ("prefix", "suffix", "middle", "pad")),
    *(f"<|fim_{part}|>" for part in ("prefix", "suffix", "middle", "pad", "repo")),
    *(f"<|{kind}{part}|>" for kind in ("", "code_", "plamo:fim_") for part in ("prefix", "suffix", "middle")),
}
"""Spellings that make a token a special one in llama.cpp whatever its type in the file; of some 2,700 strings that look like
it, these were seen to be loaded so (b11549)."""

_MORE_SPACES = (
    "llama.cpp puts a space before every text and behind special tokens, this tokenizer not before a space or not behind "
    "special tokens; compare the prompt ids of golden_prompts.jsonl with the server's /tokenize"
)


def refuse(model: Path, why: str) -> UsageError:
    """Return the error for what is not exported here, with the commands that export it."""
    quoted, quoted_f16, quoted_q4 = map(shlex.quote, (str(model), f"{model.name}-f16.gguf", f"{model.name}-Q4_K_M.gguf"))
    return UsageError(
        f"{model}: {why}; llama.cpp converts it: python convert_hf_to_gguf.py {quoted} --outfile {quoted_f16} "
        f"--outtype f16, and for K-quants then: llama-quantize {quoted_f16} {quoted_q4} Q4_K_M"
    )


class Vocabulary:
    """Everything of a tokenizer that a GGUF file holds, padded to the rows of the model's embedding.

    Args:
        folder: of the model, with tokenizer files.
        size: vocab_size of its configuration.

    Raises:
        ModelError: the tokenizer has more tokens than the model, or two for one id.
        UsageError: llama.cpp is not known to split text like it.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._tokenizer = folder, load_tokenizer(str(folder))
        tokenizer = self._tokenizer
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise refuse(folder, "its tokenizer is none of the tokenizers library")
        self._parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        bpe = self._parts["model"]
        if bpe["type"] != "BPE":
            raise refuse(folder, f"its tokenizer is {bpe['type']}, not BPE")
        self.tokens, self.types = self._tokens_and_types(size)
        self.merges: list[str] = []
        self.scores: list[float] = []
        self.pre, self.adds_space_prefix = "default", False
        added = self._parts["added_tokens"]
        odd = [one["content"] for one in added if one["lstrip"] or one["rstrip"] or one["single_word"]]
        words = "these added tokens take the space around them or need whole words, which llama.cpp does not know: "
        self.remarks = [words + ", ".join(odd)] if odd else []
        """What differs from the model, or will in llama.cpp."""
        self.remarks += self._unlike_texts()
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in bpe["merges"]]  # old files: texts
        self.model: Literal["gpt2", "llama"] = "llama" if bpe.get("byte_fallback") else "gpt2"
        if self.model == "gpt2":
            self.pre, self.merges = self._pre_tokenizer(), [" ".join(pair) for pair in pairs]
            self.remarks += [_APPROXIMATE[self.pre]] if self.pre in _APPROXIMATE else []
        else:
            self.adds_space_prefix, self.scores = self._sentence_piece(pairs)
        found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
        more = [index for index in end_token_ids(str(folder)) if index != found["eos"]]
        found |= dict(zip(("eot", "eom") if found["eos"] is not None else ("eos", "eot", "eom"), more, strict=False))
        self.special_ids = {name: index for name, index in found.items() if index is not None}
        """Of bos, eos, unk and pad, as far as there are such; eot and eom are further ends that the generation config names."""
        template = tokenizer.chat_template
        self.chat_template: str | None = template if isinstance(template, str) else None
        if self.chat_template is not None and (test := _TEST_WITHOUT_VALUE.search(self.chat_template)):
            self.remarks.append(
                f"llama.cpp does not read {test[0]} in the chat template, and llama-server does not start on it; with its "
                "option no-jinja it renders chats by a template that is built in, without tools"
            )
        # llama.cpp puts BOS before and EOS behind a text as the tokenizer does, but no BOS where chats begin without.
        bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
        ends = [(b, e) for b, e in (([], []), (bos, []), (bos, eos), ([], eos)) if whole == b + bare + e]
        if not ends:
            raise refuse(folder, "its tokenizer adds other tokens than BOS and EOS to a text")
        self.adds_bos, self.adds_eos = map(bool, ends[0])
        if self.adds_bos and self.chat_template is not None and tokenizer.bos_token is not None:
            messages = [{"role": "user", "content": "a"}]
            try:
                chat = apply_chat_template(tokenizer, messages, add_generation_prompt=True)
            except TEMPLATE_ERRORS as error:
                raise refuse(folder, f"a message of a user {refusal(error)}") from error
            if not chat.startswith(tokenizer.bos_token):
                self.adds_bos = False
                self.remarks.append("the chat template begins without BOS, so the file says that none is added, as in training")

    def _tokens_and_types(self, size: int) -> tuple[list[str], list[int]]:
        by_id: dict[int, str] = {}
        for token, index in self._tokenizer.get_vocab().items():
            if index in by_id or index >= size:
                raise ModelError(
                    f"{self._folder}: token {index} ({token!r}) of the tokenizer does not fit a vocabulary of {size}"
                )
            by_id[index] = token
        tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
        kinds = {one["id"]: CONTROL if one["special"] else USER_DEFINED for one in self._parts["added_tokens"]}
        if self._parts["model"].get("byte_fallback"):
            kinds = {index: BYTE for index, token in by_id.items() if re.fullmatch("<0x.{2}>", token, re.DOTALL)} | kinds
            kinds |= {} if self._tokenizer.unk_token_id is None else {self._tokenizer.unk_token_id: UNKNOWN}
        return tokens, [kinds.get(index, NORMAL) if index in by_id else UNUSED for index in range(size)]

    def _unlike_texts(self) -> list[str]:
        """What llama.cpp reads as other tokens: what only this tokenizer normalizes, and words that are special there alone."""
        tokenizer, remarks = self._tokenizer, []

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        if ids("e\u0301") == ids("\u00e9"):
            kind = (self._parts["normalizer"] or {}).get("type")
            remarks.append(
                f"its tokenizer normalizes text ({kind}) and llama.cpp does not: letters written as two characters, such as "
                "e and a combining accent, are other tokens there; normalize what you send"
            )
        words = TAKEN_FOR_CONTROL & {token for token, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL}
        special = [word for word in sorted(words) if any(tokenizer.convert_tokens_to_ids(word) not in ids(text)
                   for text in (word, f"a{word}a", f"({word})"))]  # fmt: skip
        if special:
            remarks.append(
                f"llama.cpp takes {', '.join(special)} in a text for one special token, which may end an answer; for this "
                "tokenizer it is several tokens of text"
            )
        return remarks

    def _pre_tokenizer(self) -> str:
        """llama.cpp's name of the pre-tokenizer."""
        bpe, pre_tokenizer = self._parts["model"], self._parts["pre_tokenizer"] or {"type": "none"}
        if bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
            raise refuse(self._folder, "its BPE marks beginnings or ends of words")
        steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
        *first, last = steps or [{"type": "none"}]
        splits = []
        for step in first:
            if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
                splits.append(str(step["pattern"].get("Regex")))
            else:
                splits.append("digits" if step["type"] == "Digits" and step["individual_digits"] else "unknown")
        is_byte_level = last["type"] == "ByteLevel" and not last["add_prefix_space"]
        splits += ["gpt2"] if is_byte_level and last["use_regex"] else []
        name = _KNOWN.get((tuple(splits), bool(bpe.get("ignore_merges")))) if is_byte_level else None
        normalizer = (self._parts["normalizer"] or {}).get("type")
        if name is None or not (normalizer is None or (name == "qwen2" and normalizer == "NFC")):
            raise refuse(self._folder, f"its pre-tokenizer is none of those known here ({', '.join(_KNOWN.values())})")
        return name

    def _sentence_piece(self, merges: Sequence[tuple[str, ...]]) -> tuple[bool, list[float]]:
        """Whether a space is put before a text, and scores that make llama.cpp merge as the ranks do.

        A score is minus the rank among merged tokens, then among the single characters. llama.cpp joins the neighbours whose
        union has the highest score, by whatever pair. That is the same as ranks of pairs only if every pair whose union is a
        token is a merge, and if the merges of one token stand together.
        """
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        prepend = {"type": "Prepend", "prepend": "▁"}
        normalizer, pre_tokenizer = self._parts["normalizer"], self._parts["pre_tokenizer"]
        if pre_tokenizer is None and normalizer in (replace, {"type": "Sequence", "normalizers": [prepend, replace]}):
            has_prefix = normalizer != replace
        else:
            is_metaspace = (pre_tokenizer or {}).get("type") == "Metaspace" and pre_tokenizer["replacement"] == "▁"
            if normalizer is not None or not is_metaspace or pre_tokenizer["split"]:
                raise refuse(self._folder, "its normalizer or pre-tokenizer is not SentencePiece's")
            has_prefix = pre_tokenizer["prepend_scheme"] != "never"
            self.remarks += [_MORE_SPACES] if has_prefix else []
        merged = list(dict.fromkeys("".join(pair) for pair in merges))
        runs = [one for one, before in zip(merges, [("", ""), *merges], strict=False) if "".join(one) != "".join(before)]
        normal = {token for token, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL}
        pairs = {(token[:cut], token[cut:]) for token in normal for cut in range(1, len(token))}
        if len(runs) != len(merged) or any(not {*pair} - normal for pair in pairs - set(merges)):
            raise refuse(self._folder, "its merges cannot be written as SentencePiece's scores")
        rank = {token: index for index, token in enumerate(merged)}
        return has_prefix, [
            -float(rank.get(token, len(rank) + index)) if kind == NORMAL else 0.0
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
        ]

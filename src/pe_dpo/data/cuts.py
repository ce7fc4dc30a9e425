"""Where a text may be cut so that its parts have the token ids of the whole: an answer's prompt is tokenized once, not thrice.

    prompt    … Is it warm?<|im_end|>\n │ <|im_start|>assistant\n            ids(head) + ids(tail)
    chosen    … Is it warm?<|im_end|>\n │ <|im_start|>assistant\nYes.        = ids(prompt), ids(chosen), ids(rejected)
    rejected  … Is it warm?<|im_end|>\n │ <|im_start|>assistant\nNo.

The tokenizers library finds added tokens in a text first, normalizes what lies between them piece by piece, divides each piece
into words by a regular expression, and only then looks for tokens, in each word alone. So a text falls apart

- before an added token that is looked for in the text as it is, provided that no token asks what stands beside it (`lstrip`,
  `single_word`), and that the text goes on for as long as the longest added token, so that nothing that follows changes what is
  found;
- before a space behind a letter or digit of ASCII, where the words are those of a known expression: none of them has a match
  that goes on over such a place, or looks behind itself.

Everything else is tokenized whole. `tests/data/test_cuts.py` compares both ways on random texts.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + "?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + "?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (_CL100K % "{1,3}", _CL100K % "", _O200K)
"""Of Llama 3, of Qwen 2 and 3, and of GPT-4o; GPT-2's is the ByteLevel pre-tokenizer's own."""
_BACKENDS = "transformers.tokenization_utils_tokenizers"


def safe_cut(tokenizer: Any) -> Callable[[str], int]:
    """Return what finds the last place before which a text that others go on with may be cut; 0 for nowhere.

    Args:
        tokenizer: A transformers tokenizer.
    """
    if getattr(getattr(type(tokenizer), "_encode_plus", None), "__module__", None) != _BACKENDS:
        return lambda text: 0  # it does something else beside asking the library
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder().values()
    asks_around = any(token.lstrip or token.rstrip or token.single_word for token in added)
    if backend.encode_special_tokens or asks_around or getattr(backend.model, "dropout", None):
        return lambda text: 0
    marks = sorted({token.content for token in added if not token.normalized and token.content}, key=len, reverse=True)
    longest = max((len(token.content) for token in added), default=0)
    mark = re.compile("|".join(map(re.escape, marks))) if marks else None
    is_divided = _has_known_words(backend) and not any(re.search("[A-Za-z0-9] ", token.content) for token in added)

    def find(text: str) -> int:
        last = 0
        for found in mark.finditer(text) if mark else ():
            last = found.start() if found.start() + longest <= len(text) else last
        place = text.rfind(" ", last + 1) if is_divided else -1
        while place > last and not (text[place - 1].isascii() and text[place - 1].isalnum()):
            place = text.rfind(" ", last + 1, place)
        return max(last, place)

    return find


def _has_known_words(backend: Any) -> bool:
    """Return whether a tokenizer divides pieces into words by an expression that is known here, after no more than NFC."""

    def said(part: Any) -> Any:
        return None if part is None else json.loads(part.__getstate__())

    if said(backend.normalizer) not in (None, {"type": "NFC"}):
        return False
    match said(backend.pre_tokenizer):
        case {"type": "ByteLevel", "use_regex": True}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False},
            ],
        }:
            return words in WORDS
    return False

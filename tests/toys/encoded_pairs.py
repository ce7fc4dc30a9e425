"""Pairs of messages as token ids of a toy tokenizer with a given chat template."""

from typing import Any

from toy_tokenizers import CHATML, build_tokenizer

from pe_dpo.data import DataReport, EncodedPair, Encoder, Pair
from pe_dpo.recipe import DataSection

NO = ({"role": "assistant", "content": "No."},)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def pair_of(chosen: Any, rejected: Any = NO, *, prompt: Any = None, tools: Any = None, where: str = "x:1", **more: Any) -> Pair:
    """A pair in row x:1, to the question "Hi" where no prompt is given."""
    return Pair(prompt or (turn("user", "Hi"),), chosen, rejected, None, tools, where, **more)


def encode(
    *pairs: Pair, template: str | None = CHATML, eos: str | None = None, **settings: Any
) -> tuple[list[EncodedPair], DataReport]:
    """The pairs encoded under some settings of the data section, and what was reported of them."""
    report = DataReport()
    tokenizer = build_tokenizer(template=template, eos=eos or ("<|im_end|>" if template else "<e>"))
    return Encoder(tokenizer, DataSection(train="x", **settings), max_length=10_000, report=report).encode(pairs), report

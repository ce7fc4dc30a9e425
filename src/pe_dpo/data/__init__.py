"""Preference data: from files in the shapes that people have to token ids, with every row accounted for.

    sources -> rows (files) -> pairs (shapes, dialogues) -> text (rendering) -> token ids (encoding) -> two sides

Knows no model: the tokenizer is handed in. Importing it imports numpy and nothing heavier.
"""

from pe_dpo.data.encoding import encode_pairs
from pe_dpo.data.loading import load_pairs
from pe_dpo.data.pairs import EncodedPair, Message, Pair, data_hash
from pe_dpo.data.preparation import PreparedData, prepare_pairs, split_by_prompt
from pe_dpo.data.report import DataReport

__all__ = [
    "DataReport",
    "EncodedPair",
    "Message",
    "Pair",
    "PreparedData",
    "data_hash",
    "encode_pairs",
    "load_pairs",
    "prepare_pairs",
    "split_by_prompt",
]

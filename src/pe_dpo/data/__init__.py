"""Preference data: from files in the shapes that people have to token ids, with every row accounted for.

    files -> rows -> pairs (shapes, dialogues) -> text (rendering) -> token ids (encoding) -> two sides -> batches

Knows no model: the tokenizer is handed in. Importing it imports neither torch nor transformers.
"""

from pe_dpo.data.encoded import data_hash
from pe_dpo.data.encoding import Encoder
from pe_dpo.data.pairs import EncodedPair, Message, Pair
from pe_dpo.data.preparation import PreparedData, prepare_pairs
from pe_dpo.data.report import DataReport
from pe_dpo.data.split import split_by_prompt

__all__ = [
    "DataReport",
    "EncodedPair",
    "Encoder",
    "Message",
    "Pair",
    "PreparedData",
    "data_hash",
    "prepare_pairs",
    "split_by_prompt",
]

"""Held-out pairs one by one, on disk."""

from collections.abc import Sequence
from pathlib import Path

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.evaluation.pairs import ScoredPairs


def save_pairs(scored: ScoredPairs, pairs: Sequence[EncodedPair], path: Path) -> None:
    """Write one row per pair as parquet: where it came from, its prompt's key, log-probs, score, weight; atomically."""
    import pyarrow
    import pyarrow.parquet

    columns = {"where": [pair.where for pair in pairs], "prompt_key": [pair.prompt_key for pair in pairs]}
    table = pyarrow.table(columns | {name: field.numpy() for name, field in scored._asdict().items()})
    partial = path.with_name(f".{path.name}.partial")
    pyarrow.parquet.write_table(table, partial)
    partial.replace(path)

"""Held-out pairs one by one, and what was measured of them, on disk."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pe_dpo.data.pairs import EncodedPair
from pe_dpo.disk import write_json
from pe_dpo.inference.generation import answer_text, prompt_text
from pe_dpo.metrics.table import ScoredPairs

PAIRS_FILE, GENERATIONS_FILE, EVALUATION_FILE = "eval_pairs.parquet", "generations.parquet", "evaluation.json"


def save_pairs(
    scored: ScoredPairs,
    pairs: Sequence[EncodedPair],
    path: Path,
    *,
    initial: ScoredPairs | None = None,
    tokenizer: Any = None,
) -> None:
    """Write one row per pair as parquet: where it came from, its prompt's key, log-probs, score, weight; atomically.

    Args:
        scored: the pairs as they are now.
        pairs: the same pairs.
        path: of the file.
        initial: the pairs at step 0; their log-probs under the policy become `initial_chosen` and `initial_rejected`.
        tokenizer: with which prompts and answers are written as text too.
    """
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {"where": [pair.where for pair in pairs], "prompt_key": [pair.prompt_key for pair in pairs]}
    columns |= {name: field.numpy() for name, field in scored._asdict().items()}
    if initial is not None:
        columns |= {"initial_chosen": initial.policy_chosen.numpy(), "initial_rejected": initial.policy_rejected.numpy()}
    if tokenizer is not None:
        columns["prompt"] = [prompt_text(tokenizer, pair.prompt_ids) for pair in pairs]
        columns["chosen"] = [answer_text(tokenizer, pair.chosen_ids) for pair in pairs]
        columns["rejected"] = [answer_text(tokenizer, pair.rejected_ids) for pair in pairs]
    partial = path.with_name(f".{path.name}.partial")
    pyarrow.parquet.write_table(pyarrow.table(columns), partial)
    partial.replace(path)


def read_initial(path: Path, scored: ScoredPairs, pairs: Sequence[EncodedPair]) -> ScoredPairs | None:
    """Return the pairs with the policy's log-probs at step 0, as a file of `save_pairs` has them.

    Args:
        path: of the file.
        scored: the pairs as they are now; all but the policy's log-probs is taken from here.
        pairs: the same pairs.

    Returns:
        None where there is no such file, it does not have them, or it is about other pairs.
    """
    import pyarrow.parquet

    if not path.is_file():
        return None
    table = pyarrow.parquet.read_table(path)
    wanted = ("where", "prompt_key", "initial_chosen", "initial_rejected")
    if not set(wanted) <= set(table.column_names):
        return None
    where, keys, chosen, rejected = (table[name].to_pylist() for name in wanted)
    if (where, keys) != ([pair.where for pair in pairs], [pair.prompt_key for pair in pairs]):
        return None
    columns = (torch.tensor(column, dtype=torch.float64) for column in (chosen, rejected))
    return scored._replace(**dict(zip(("policy_chosen", "policy_rejected"), columns, strict=True)))


def save_evaluation(
    path: Path,
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    generation: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """Write what an evaluation came to as JSON, atomically.

    Args:
        path: of the file.
        metrics: of the pairs, see `set_metrics`.
        intervals: of those that are shares.
        generation: of the sampled answers, see `Drift.summary`; left out without any.
        **more: further parts.
    """
    parts = {"pairs": dict(metrics), "intervals": {key: list(ends) for key, ends in intervals.items()}}
    if generation is not None:
        parts["generation"] = dict(generation)
    write_json(path, {**parts, **more})


def read_generation(folder: Path) -> dict[str, Any] | None:
    """Return what evaluation.json in a folder says of sampled answers, if they still lie beside it."""
    path = folder / EVALUATION_FILE
    if not (path.is_file() and (folder / GENERATIONS_FILE).is_file()):
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # it will be written anew
    generation = content.get("generation") if isinstance(content, dict) else None
    return generation if isinstance(generation, dict) else None

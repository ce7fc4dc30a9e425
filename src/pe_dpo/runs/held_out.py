"""Held-out pairs one by one, and what was measured of them, on disk."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pe_dpo.disk import write_json
from pe_dpo.metrics.table import PairTable
from pe_dpo.runs.files import ANSWERS_FILE, EVALUATION_FILE, remedy


def with_initial(path: Path, table: PairTable) -> PairTable | None:
    """Return pairs with the log-probs of step 0 that a file of a run has.

    Args:
        path: of the file.
        table: the pairs as they are now.

    Returns:
        None where there is no such file, it does not have them, or it is about other pairs.
    """
    kept = PairTable.load(path, remedy=remedy(path.parent), with_texts=False)
    if kept is None or not kept.knows("initial_chosen", "initial_rejected"):
        return None
    if (kept.where, kept.prompt_key) != (table.where, table.prompt_key):
        return None
    return replace(table, initial_chosen=kept.initial_chosen, initial_rejected=kept.initial_rejected)


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
        metrics: of the pairs, see `pair_metrics`.
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
    if not (path.is_file() and (folder / ANSWERS_FILE).is_file()):
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # it will be written anew
    generation = content.get("generation") if isinstance(content, dict) else None
    return generation if isinstance(generation, dict) else None

"""The most memory that a run had at once, measured, beside what is counted of such a run."""

import logging
import re
from pathlib import Path
from typing import Any

import torch

from pe_dpo.data import PreparedData
from pe_dpo.estimate import estimate_run, local_card
from pe_dpo.estimate.estimate import finish
from pe_dpo.estimate.lengths import of_pairs
from pe_dpo.inference.scorer import Scorer, ScoringPath
from pe_dpo.recipe import Recipe

logger = logging.getLogger(__name__)

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryPeak:
    """The high-water mark of memory from now on: of tensors on the GPU; else of this process, above what it has now (Linux)."""

    def __init__(self) -> None:
        self.is_on_gpu = torch.cuda.is_available()
        self._before: int | None = None
        if self.is_on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            _RESET.write_text("5")  # the mark falls to what is resident
            self._before = _resident("VmRSS")
        except OSError:  # not Linux, or a container that forbids it
            return

    def bytes(self) -> int | None:
        """Return it; None where the system does not tell."""
        if self.is_on_gpu:
            return int(torch.cuda.max_memory_allocated())
        return None if self._before is None else max(0, _resident("VmHWM") - self._before)


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s*(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def memory_record(
    recipe: Recipe, data: PreparedData, scorer: Scorer, peak: MemoryPeak, *, recomputes_above: int | None
) -> dict[str, Any]:
    """Return what run.json says of memory: bytes that were measured, and those that are counted of rows as this run had them.

    Args:
        recipe: of the run.
        data: its pairs.
        scorer: as it trained.
        peak: since before the base was loaded.
        recomputes_above: rows of more tokens recomputed their activations; None for none.
    """
    own = {"tokens_per_microbatch": scorer.token_budget, "gradient_checkpointing": recomputes_above == 0}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=own)})
    card, lengths = local_card(), of_pairs(data.train, len(data.held_out), recipe)
    counted = estimate_run(recipe, card, lengths=lengths)
    path: ScoringPath = "padded" if scorer.path == "handed" else scorer.path  # at most: prompts are counted for each answer
    setup = counted.setup._replace(path=path, recomputes_above=recomputes_above)
    if counted.setup != setup or scorer.tree_budget:
        counted = finish(recipe, setup, lengths, card, tree_budget=scorer.tree_budget)
    measured = peak.bytes()
    record = {"counted": round(counted.peak), "of": "the GPU" if peak.is_on_gpu else "RAM"}
    if measured is not None:
        record["measured"] = measured
    if measured is not None and max(measured, counted.peak) > 1e9:  # below it libraries and data are more than what is counted
        logger.info(f"memory: {measured / 1e9:.2f} GB of {record['of']} at the worst moment, {counted.peak / 1e9:.2f} counted")
    return record

"""What a run writes down of itself: what it started from, and what it came to."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pe_dpo.data import PreparedData
from pe_dpo.disk import write_atomically, write_json
from pe_dpo.model.provenance import adapter_fingerprints
from pe_dpo.recipe import Recipe, describe
from pe_dpo.runs.checkpoints import checkpoint_step
from pe_dpo.runs.files import BASE_FILE
from pe_dpo.runs.folder import check_same_inputs, rewind_metrics, update_run, versions
from pe_dpo.runs.model_card import model_card
from pe_dpo.runs.run import Run

logger = logging.getLogger(__name__)


def start_records(
    folder: Path,
    recipe: Recipe,
    describe_base: Callable[[], Mapping[str, Any]],
    data: PreparedData,
    hashes: Mapping[str, str],
) -> Path | None:
    """Write what a fresh run starts from; for a run to resume, check it and return the checkpoint to go on from.

    Raises:
        RunFolderError: the run started with other data, another base or start adapter, or no checkpoint is whole and its own.
    """
    run = Run(folder)
    if run.info.hashes.data is not None:
        check_same_inputs(folder, hashes)
        checkpoint, passed_over = run.resume_point()
        for line in passed_over:
            logger.info(line)
        logger.info(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning")
        rewind_metrics(folder, checkpoint_step(checkpoint) if checkpoint else -1)
        if run.info.status == "failed":
            update_run(folder, status="training", why=None)
        return checkpoint
    is_base = recipe.adapter.reference != "adapter"
    base = describe_base()
    write_json(folder / BASE_FILE, base)
    update_run(
        folder,
        versions=versions(),
        hashes=dict(hashes),
        base={key: base[key] for key in ("id", "revision", "quantize", "dtype", "parameters", "quantized_layers")},
        reference_card={
            "is": "the base with adapters off" if is_base else f"a frozen copy of {recipe.adapter.start}",
            "base_sha256": hashes["base"],
            "run_in_training": recipe.loss.gamma_value != 0,
        },
        loss=describe(recipe.loss)._asdict(),
        pairs={"train": len(data.train), "held_out": len(data.held_out)},
    )
    write_json(folder / "data_report.json", data.report.to_dict())
    return None


def finish_records(
    folder: Path,
    recipe: Recipe,
    *,
    before: Mapping[str, float],
    after: Mapping[str, float],
    step: int,
    remarks: Sequence[str],
) -> None:
    """Write what a finished run came to: the model card, run.json."""
    write_atomically(folder / "README.md", model_card(recipe, before, after))
    hashes = {**Run(folder).info.hashes.inputs, "adapter": adapter_fingerprints(folder)}
    measured = {"before": dict(before), "after": dict(after), "remarks": list(remarks)}
    update_run(folder, status="finished", step=step, **measured, hashes=hashes)

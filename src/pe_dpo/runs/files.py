"""What the files of a run are called, where they lie, and how a JSON file of one is read.

adapter_model.safetensors, adapter_config.json, tokenizer files   what plain PEFT loads
reference/           the adapter that π0 has, where it has one
trained/             what was trained alone, where the adapter above is its sum with the one in reference/
README.md            model card
recipe.yaml          resolved; training it again repeats the run
run.json             id, status, versions, hashes, reference card, held-out metrics before and after
base.json            what the base was, file by file and tensor by tensor
metrics.jsonl        one line per logged step and per evaluation
data_report.json     what became of every row, and which are held out
eval_pairs.parquet   held-out pairs one by one; generations.parquet sampled answers; evaluation.json what they come to
snapshots/step-N/    the same along the way
scaled/a-X/          the same of the adapter scaled toward the reference, π_a = W0 + a·ΔW
best/                the adapter of the best evaluation, with what it was measured to be (train.keep_best)
inputs.json, rows.jsonl.gz   what else determines the run, and every pair, for whoever resumes it
checkpoint-N/        to resume from
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pe_dpo.errors import RunFolderError, UsageError

RUN_FILE, RECIPE_FILE, METRICS_FILE, BASE_FILE = "run.json", "recipe.yaml", "metrics.jsonl", "base.json"
REPORT_FILE = "data_report.json"
SWEEP_FILE = "sweep.json"
BEST, BEST_FILE = "best", "best.json"
STATE_FILE = "run_state.json"
"""In a checkpoint, what is not Trainer's: how many tokens a forward has by now."""
PAIRS_FILE, ANSWERS_FILE, EVALUATION_FILE = "eval_pairs.parquet", "generations.parquet", "evaluation.json"


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is no file.

    Raises:
        RunFolderError: it cannot be read, or is no object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}; restore the file, or move its folder away") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{path}: is not a JSON object; restore the file, or move its folder away")
    return content


def best_folder(run: str | Path) -> Path:
    """Return the folder of the best adapter that a run kept.

    Raises:
        UsageError: it kept none.
    """
    folder = Path(run) / BEST
    if not (folder / BEST_FILE).is_file():
        raise UsageError(
            f"{run}: has no best adapter; a run keeps one with train.keep_best (say, accuracy/policy), from its first "
            "evaluation on"
        )
    return folder


def scaled_folder(run: Path, scale: float) -> Path:
    """Return where what was measured of the adapter scaled toward the reference lies.

    Scaling takes no training, so whatever trains for a smaller KL has to be better than it.

    Source:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv 2109.01903).
    """
    return run / "scaled" / f"a-{float(scale)!r}"


def remedy(place: Path, scales: Sequence[str] = ()) -> str:
    """Return how what was measured of a run, or lies in a folder below it, is measured again, as a sentence for a message."""
    if place.parent.name == "snapshots":
        return f"a snapshot cannot be measured again: move {place} away"
    if place.parent.name == "scaled":
        return remedy(place.parents[1], [place.name.removeprefix("a-")])
    if place.name == BEST:
        return f"measure it again with: {shlex.join(['pe-dpo', 'eval', str(place.parent), '--best'])}"
    command = ["pe-dpo", "eval", str(place), *(["--scale", ",".join(scales)] if scales else [])]
    return f"measure it again with: {shlex.join(command)}"

"""The log that transformers' Trainer, and so TRL, keeps of a training: means of its evaluations, no single pairs."""

from pathlib import Path
from typing import NamedTuple

from pe_dpo.errors import UsageError
from pe_dpo.runs.files import RUN_FILE, SWEEP_FILE, read_object

TRL_FILE = "trainer_state.json"


class TrlLog(NamedTuple):
    """The last evaluation that a log has."""

    name: str
    """Of the folder that TRL wrote."""
    step: int
    logged: dict[str, float]
    """Its metrics, without eval_."""


def read_trl_log(target: Path) -> TrlLog:
    """Return the last evaluation in TRL's log; settings and seed are not written there.

    Args:
        target: trainer_state.json, or a folder with one, or with checkpoints that have one.

    Raises:
        UsageError: there is none, it cannot be read, or it logs no evaluation.
    """
    path = _trl_file(target)
    state = read_object(path)
    try:
        evaluations = [dict(line) for line in state.get("log_history", []) if any(key.startswith("eval_") for key in line)]
        last = evaluations[-1] if evaluations else {}
        logged = {key.removeprefix("eval_"): float(value) for key, value in last.items() if key.startswith("eval_")}
        step = int(last.get("step", state.get("global_step", 0)))
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: is no log as TRL writes it ({error}); restore the file") from error
    if not evaluations:
        raise UsageError(f"{path}: logs no evaluation; give TRL's trainer an eval_dataset and an eval_strategy")
    if {"runtime", "samples_per_second"} <= set(logged):
        logged["pairs"] = round(logged["runtime"] * logged["samples_per_second"])
    name = path.parent.parent.name if path.parent.name.startswith("checkpoint-") else path.parent.name
    return TrlLog(name, step, logged)


def _trl_file(target: Path) -> Path:
    if target.is_file() and target.name == TRL_FILE:
        return target
    checkpoints = [path for path in target.glob(f"checkpoint-*/{TRL_FILE}") if path.parent.name.split("-")[-1].isdigit()]
    latest = sorted(checkpoints, key=lambda path: int(path.parent.name.split("-")[-1]))
    for path in (target / TRL_FILE, *reversed(latest)):
        if path.is_file():
            return path
    raise UsageError(
        f"{target}: is neither a run ({RUN_FILE}), nor a sweep ({SWEEP_FILE}), nor a log of TRL ({TRL_FILE}); name a folder "
        "that `pe-dpo train`, `pe-dpo sweep` or TRL wrote"
    )

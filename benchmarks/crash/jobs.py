"""What is killed: commands that write, and what each must come to whatever happened on the way."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pe_dpo.quickstart.demo import BASE, PAIRS
from pe_dpo.runs.run import Run

Outcome = dict[str, Any]

_CLOCKS = ("seconds", "tokens_per_second", "runtime", "per_second")


class Job(NamedTuple):
    """One command."""

    name: str
    first: list[str]
    """The words of `pe-dpo`; paths are below the folder that it works in."""
    again: list[str]
    """Those after a kill; where they are refused, `first`."""
    outcome: Callable[[Path], Outcome]
    """What lies in the folder in the end, as far as it may not depend on kills or clocks."""
    processes: int = 1


def jobs(finished: Path, merged: Path) -> list[Job]:
    """Return all jobs.

    Args:
        finished: A finished run, which is merged and exported.
        merged: A merged model, which is exported.
    """
    train, sweep = ["train", "recipe.yaml", "-o", "run"], ["sweep", "recipe.yaml", "--grid", "gamma=0,1x", "-o", "sweep"]
    sweep += ["--prompts", "0"]
    merge = ["merge", str(finished), "-o", "model", "--pairs", "4"]
    eight_bit = ["--set", "train.optimizer=adamw_8bit", "--set", "mixout.p=0.5"]
    return [
        Job("train", [*train, *eight_bit], [*train, *eight_bit, "--resume"], _run_outcome("run")),
        Job("train in two processes", train, [*train, "--resume"], _run_outcome("run"), processes=2),
        Job("reference pass", ["audit", "recipe.yaml"], ["audit", "recipe.yaml"], _store_outcome),
        Job("sweep", sweep, sweep, _sweep_outcome),
        Job("merge", merge, merge, _folder_outcome("model")),
        Job("export to GGUF", *[["export", str(merged), "--gguf", "q8_0", "-o", "gguf"]] * 2, _folder_outcome("gguf")),
        Job(
            "export of an adapter",
            *[["export", str(finished), "--gguf-lora", "-o", "lora.gguf"]] * 2,
            _file_outcome("lora.gguf"),
        ),
    ]


def prepare(
    folder: Path, *, steps: int = 6, base: Path = BASE, pairs: Path = PAIRS, rows: int = 64, pairs_per_step: int = 8
) -> None:
    """Make the folder of a job: a recipe in 4 bits that evaluates half-way, saves every step and accumulates micro-batches.

    Args:
        folder: is made.
        steps: Of a training run.
        base: The model.
        pairs: A folder of JSONL files, of which so many rows are taken.
        rows: A quarter of them is held out.
        pairs_per_step: Of a training run.
    """
    folder.mkdir()
    lines = [line for path in sorted(pairs.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    (folder / "pairs.jsonl").write_text("\n".join(lines[:rows]) + "\n", encoding="utf-8")
    recipe = {
        "model": {"base": str(base), "quantize": "nf4"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": "pairs.jsonl", "eval": 0.25},
        "reference": {"policy": "store"},
        "generation": {"prompts": 2, "max_new_tokens": 4, "snapshots": 1},
        "train": {"learning_rate": 1e-3, "pairs_per_step": pairs_per_step, "tokens_per_microbatch": 256, "max_steps": steps}
        | {"warmup": 0, "eval_every": -(-steps // 2), "save_every": 1, "log_every": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML


def _run_outcome(name: str) -> Callable[[Path], Outcome]:
    def outcome(folder: Path) -> Outcome:
        run = Run(folder / name)
        metrics = [
            {key: value for key, value in line.items() if not any(clock in key for clock in _CLOCKS)} for line in run.metrics
        ]
        files = ("adapter_model.safetensors", "adapter_config.json", "eval_pairs.parquet", "generations.parquet")
        card = (run.folder / "README.md").read_text(encoding="utf-8").splitlines()
        return {
            "model card": [line for line in card if not line.startswith("Training took")],
            "status": run.info.status,
            "metrics": metrics,
            "after": dict(run.info.after),
            "left over": sorted(
                path.name for path in run.folder.iterdir() if path.suffix == ".partial" or "staging" in path.name
            ),
            "snapshots": sorted(path.name for path in run.folder.glob("snapshots/*")),
        } | {file: _digest(run.folder / file) for file in files}

    return outcome


def _sweep_outcome(folder: Path) -> Outcome:
    points = sorted(path.parent for path in (folder / "sweep").rglob("run.json"))
    return {str(point.relative_to(folder)): _run_outcome("")(point) for point in points}


def _store_outcome(folder: Path) -> Outcome:
    (store,) = (folder / "cache").rglob("*.sqlite")
    with sqlite3.connect(store) as connection:
        return {
            "answers": sorted((key.hex(), value.hex()) for key, value in connection.execute("SELECT key, value FROM answer"))
        }


def _folder_outcome(name: str) -> Callable[[Path], Outcome]:
    def outcome(folder: Path) -> Outcome:
        beside = sorted(path.name for path in folder.glob(f".{name}*"))
        # An empty .lock stays where the process died right after the folder had got its name.
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file() and path.name != ".lock")
        return {"left over": beside} | {str(path.relative_to(folder)): _digest(path) for path in files}

    return outcome


def _file_outcome(name: str) -> Callable[[Path], Outcome]:
    def outcome(folder: Path) -> Outcome:
        return {"left over": sorted(path.name for path in folder.glob(f".{name}*")), name: _digest(folder / name)}

    return outcome


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "is not there"

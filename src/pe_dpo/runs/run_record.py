"""What a run folder says of its run, read once; whatever the run did not write is None or empty."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pe_dpo.errors import UsageError
from pe_dpo.recipe import Recipe, recipe_from_yaml
from pe_dpo.runs.files import read_object
from pe_dpo.runs.run import Run

Floats = NDArray[np.float64]


class Logprobs(NamedTuple):
    """Summed log-probs of a model on the pairs' answers, (N,) nats each."""

    chosen: Floats
    rejected: Floats


class Texts(NamedTuple):
    """A pair as text."""

    prompt: str
    chosen: str
    rejected: str


class HeldOut(NamedTuple):
    """The held-out pairs one by one, N of them."""

    where: list[str]
    prompt_keys: list[str]
    texts: list[Texts] | None
    policy: Logprobs
    start: Logprobs | None
    """The policy at step 0."""
    reference: Logprobs | None
    chosen_lengths: Floats
    rejected_lengths: Floats
    score: Floats
    """z as trained."""

    def preference(self, model: Logprobs, *, per_token: bool = False) -> Floats:
        """Return Δ of a model on every pair, nats: of summed log-probs, or of mean ones."""
        if per_token:
            return model.chosen / self.chosen_lengths - model.rejected / self.rejected_lengths
        return model.chosen - model.rejected


class Curve(NamedTuple):
    """A metric over steps, without the steps at which it was not finite or not measured."""

    steps: list[int]
    values: list[float]


_HELD_OUT, _WATCHED = "eval_", "probe_"
"""Prefixes of metrics in metrics.jsonl."""


class RunRecord(NamedTuple):
    """A run as its folder tells it."""

    folder: Path
    recipe: Recipe
    facts: dict[str, Any]
    """run.json."""
    lines: list[dict[str, Any]]
    """metrics.jsonl."""
    held_out: HeldOut | None
    evaluation: dict[str, Any]
    """evaluation.json; empty without one."""
    answers: dict[str, list[Any]]
    """generations.parquet, by column; empty without one."""
    snapshots: dict[int, dict[str, Any]]
    """evaluation.json of earlier steps, by step."""
    scaled: dict[float, dict[str, Any]]
    """evaluation.json of the end scaled toward the reference, by its scale."""

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return self.facts.get("status") == "finished"

    @property
    def sampling_command(self) -> str:
        """What samples answers of the run as it is: without pairs of its own it has to be told whose prompts to take."""
        has_prompts = (self.facts.get("pairs") or {}).get("held_out") != 0
        return f"pe-dpo eval {self.folder} --prompts 64" + ("" if has_prompts else " --data FILE")

    @property
    def kappa(self) -> float:
        """γ/β, as it was trained with."""
        recorded = (self.facts.get("loss") or {}).get("kappa")
        return self.recipe.loss.gamma_value / self.recipe.loss.beta if recorded is None else float(recorded)

    def training(self, key: str) -> Curve:
        """Return a metric of the pairs trained on, averaged over each window of steps."""
        return _curve(self.lines, key)

    @property
    def probed(self) -> str:
        """Which pairs were measured again and again: those held out, or without any some of the training pairs."""
        held_out = any(f"{_HELD_OUT}loss" in line for line in self.lines)
        return (
            "held-out pairs"
            if held_out or not any(f"{_WATCHED}loss" in line for line in self.lines)
            else "watched training pairs"
        )

    @property
    def remarks(self) -> list[str]:
        """What looked off, in words: at the end, or so far."""
        if "remarks" in self.facts:
            return [str(remark) for remark in self.facts["remarks"]]
        return [f"step {line['step']}: {line['words']}" for line in self.lines if "words" in line]

    def probe(self, key: str) -> Curve:
        """Return a metric of the pairs that were measured again and again, the same ones at every step; see `probed`."""
        prefix = _HELD_OUT if self.probed == "held-out pairs" else _WATCHED
        return _curve(self.lines, f"{prefix}{key}")


def read_run_record(folder: Path) -> RunRecord:
    """Return what lies in a run folder.

    Raises:
        UsageError: it is no run folder, or a file in it is torn; names the file.
        RecipeError: its recipe.yaml is none.
    """
    if not (folder / "run.json").is_file() or not (folder / "recipe.yaml").is_file():
        raise UsageError(
            f"{folder}: is neither a run (run.json and recipe.yaml) nor a sweep (sweep.json); name the folder that `pe-dpo "
            "train` or `pe-dpo sweep` wrote"
        )
    recipe = recipe_from_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder / "recipe.yaml"))
    return RunRecord(
        folder=folder,
        recipe=recipe,
        facts=read_object(folder / "run.json"),
        lines=Run(folder).metrics,
        held_out=_read_held_out(folder / "eval_pairs.parquet", recipe),
        evaluation=Run(folder).evaluation,
        answers=_read_columns(folder / "generations.parquet", _ANSWER_COLUMNS),
        snapshots={state.step: state.evaluation for state in Run(folder).snapshots if state.evaluation["pairs"]},
        scaled={state.scale: state.evaluation for state in Run(folder).scaled if state.scale is not None},
    )


_PAIR_COLUMNS = (
    *("where", "prompt_key", "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"),
    *("chosen_lengths", "rejected_lengths", "score"),
)
_ANSWER_COLUMNS = ("prompt_key", "tokens", "kl", "entropy")


def _read_held_out(path: Path, recipe: Recipe) -> HeldOut | None:
    columns = _read_columns(path, _PAIR_COLUMNS)
    if not columns or not columns["where"]:
        return None

    def floats(name: str) -> Floats:
        return np.asarray(columns[name], dtype=np.float64)

    def logprobs(prefix: str) -> Logprobs | None:
        if f"{prefix}_chosen" not in columns:
            return None
        found = Logprobs(floats(f"{prefix}_chosen"), floats(f"{prefix}_rejected"))
        return None if np.isnan(found.chosen).all() else found

    reference = logprobs("reference")
    policy = Logprobs(floats("policy_chosen"), floats("policy_rejected"))
    start = logprobs("initial") or (reference if recipe.policy_starts_as_reference else None)
    texts = None
    if all(name in columns for name in Texts._fields):
        texts = [Texts(*row) for row in zip(*(columns[name] for name in Texts._fields), strict=True)]
    lengths = floats("chosen_lengths"), floats("rejected_lengths")
    return HeldOut(columns["where"], columns["prompt_key"], texts, policy, start, reference, *lengths, floats("score"))


def _read_columns(path: Path, needed: tuple[str, ...]) -> dict[str, list[Any]]:
    """A parquet file by column; empty where there is none."""
    from pyarrow import parquet

    if not path.is_file():
        return {}
    try:
        columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}; write it again with: pe-dpo eval {path.parent}") from error
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UsageError(f"{path}: has no column {', '.join(missing)}; write it again with: pe-dpo eval {path.parent}")
    return columns


def _has(lines: list[dict[str, Any]], key: str) -> bool:
    return any(key in line for line in lines)


def _curve(lines: list[dict[str, Any]], key: str) -> Curve:
    points = {int(line["step"]): float(line[key]) for line in lines if isinstance(line.get(key), int | float)}
    kept = {step: value for step, value in sorted(points.items()) if np.isfinite(value)}
    return Curve(list(kept), list(kept.values()))


def measured(evaluation: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return mean and standard error of what was measured on sampled answers; the error may be NaN; None if it was not.

    Args:
        evaluation: evaluation.json.
        name: "kl", "kl_per_token", "entropy_per_token", "tokens", "win_rate".
    """
    found = (evaluation.get("generation") or {}).get(name)
    if isinstance(found, Mapping):
        error = found.get("standard_error")
        return float(found["mean"]), float("nan") if error is None else float(error)
    return None if found is None else (float(found), float("nan"))

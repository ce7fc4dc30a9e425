"""A run as its folder tells it: `Run("runs/mine")`, finished or not. Nothing is read before it is asked for, and no torch.

    run.recipe    run.info.status    run.info.hashes.base    run.metrics    run.pairs()    run.checkpoints()

What was measured of a policy lies in one folder, three files each time: the end of a run in the run's own, snapshots along the
way below snapshots/, and the end scaled toward the reference below scaled/. `Run` is the first of them.
"""

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from pe_dpo.errors import RunFolderError, UsageError
from pe_dpo.metrics.table import AnswerTable, PairTable
from pe_dpo.printable import counted
from pe_dpo.recipe import Recipe, recipe_from_yaml
from pe_dpo.runs import checkpoints, records
from pe_dpo.runs.best import BestRecord
from pe_dpo.runs.files import (
    ANSWERS_FILE,
    BEST,
    BEST_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    PAIRS_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    RUN_FILE,
    read_object,
    remedy,
    scaled_folder,
)
from pe_dpo.runs.overrides import describe_overrides

Numbers = Annotated[
    dict[str, FiniteFloat],
    BeforeValidator(lambda found: {k: v for k, v in found.items() if v is not None} if isinstance(found, dict) else found),
]
"""Metrics by name; JSON's null, which is written for a number that is not finite, is one that is not there."""


class Hashes(BaseModel):
    """SHA-256 of what a run started from, and of what it came to; None where the run does not say."""

    model_config = ConfigDict(extra="allow")

    data: str | None = None
    held_out: str | None = None
    base: str | None = None
    start: str | None = None
    """The adapter that training started from."""
    over: str | None = None
    """The frozen adapter that it trained over."""
    adapter: dict[str, str] = {}
    """The files of the trained adapter."""

    @property
    def inputs(self) -> dict[str, str]:
        """The hashes of what the run started from."""
        return self.model_dump(include={"data", "held_out", "base", "start", "over"}, exclude_none=True)


class RunInfo(BaseModel):
    """run.json; what a run has not written yet, or an older version did not write, has its default."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    """None for a run from before runs had ids."""
    status: str = "not started"
    """starting, training, interrupted, failed or finished."""
    why: str = ""
    """Why a run failed."""
    versions: dict[str, str] = {}
    """Of what the result depends on."""
    made_with: records.MadeWith = {}
    """The package's commit, where it ran from a checkout, the CPU's name and the threads."""
    hashes: Hashes = Hashes()
    base: records.Base = {}
    """What the base was: id, revision, quantize, dtype, parameters, quantized_layers."""
    loss: records.LossFacts = {}
    pairs: dict[str, int] = {}
    """How many: train, held_out."""
    before: Numbers = {}
    """Held-out metrics at step 0."""
    after: Numbers = {}
    """Held-out metrics at the end."""
    step: Annotated[int, Field(ge=0)] = 0
    """The last optimizer step."""
    seconds: FiniteFloat = 0.0
    skipped_steps: list[int] = []
    """Those whose loss or gradient was not finite, so that nothing was updated by them."""
    bad_pairs: dict[str, str] = {}
    """Where the pairs of these steps lie that were to blame, and what of each was not finite."""
    remarks: list[str] | None = None
    scoring: dict[str, Any] = {}
    memory: records.Memory = {}
    """Bytes at the worst moment, counted and measured, and of what."""
    mixout: records.MixoutFacts = {}
    overrides: list[records.Override] = []
    """What a person changed on the way: step, key, from, to; see `runs.overrides`."""
    best: BestRecord | None = None
    """What the best evaluation came to, where the run keeps it."""
    ended: str = ""
    """Why the run ended before its last step."""
    resumed: list[dict[str, int | list[str]]] = []
    """Where the run went on with something that only moves the last digits changed: step, changed."""
    calibration: records.CalibrationFacts = Field({}, alias="gamma_calibration")
    """How γ was found, where the recipe asked for that."""

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "finished"

    def describe_machine(self) -> str:
        """Return CPU, threads and the package's commit in words; empty for a run that does not say them."""
        found = self.made_with
        threads = counted(found["threads"], "thread") if "threads" in found else ""
        commit, changed, _ = str(found.get("commit", "")).partition("-dirty")
        said = commit and f"commit {commit[:12]} of pe-dpo{' with changes' if changed else ''}"
        return ", ".join(filter(None, (str(found.get("cpu", "")), threads, said)))

    def describe_skipped(self) -> str:
        """Return which steps were skipped and for which pairs, in words; empty where none was."""
        if not self.skipped_steps:
            return ""
        steps, pairs = self.skipped_steps, [f"{where} ({what})" for where, what in self.bad_pairs.items()]
        what = f"{counted(len(steps), 'step')} {'was' if len(steps) == 1 else 'were'}"
        named = ", ".join(map(str, steps[:5])) + (", …" if len(steps) > 5 else "")
        blamed = f": {', '.join(pairs[:5])}{', …' if len(pairs) > 5 else ''}" if pairs else ""
        return f"{what} skipped ({named}), since loss or gradient were not finite{blamed}"

    def describe_history(self) -> list[str]:
        """Return what was otherwise on the way than at the beginning, a sentence each."""
        sentences = [text for text in (self.ended and f"The run {self.ended}.", self.best and self.best.describe()) if text]
        if self.overrides:
            listed = "; ".join(describe_overrides(self.overrides))
            sentences.append(
                f"Changed on the way: {listed}. The recipe is the last one; training by it from the beginning is another run."
            )
        sentences += [
            f"Resumed at step {one.get('step')}, computed otherwise than before ({'; '.join(map(str, changed))})."
            for one in self.resumed
            if isinstance(changed := one.get("changed"), list)
        ]
        return sentences

    def describe_memory(self) -> str:
        """Return what memory it took, and what was counted before, in words; empty where it does not say."""
        if not self.memory:
            return ""
        counted = f"{self.memory['counted'] / 1e9:.2f} GB"
        if "measured" not in self.memory:
            return f"{counted} of {self.memory['of']} at the worst moment (counted)"
        return f"{self.memory['measured'] / 1e9:.2f} GB of {self.memory['of']} at the worst moment ({counted} counted)"


class Curve(NamedTuple):
    """A metric over steps, without the steps at which it was not finite or not measured."""

    steps: list[int]
    values: list[float]


class Logged(NamedTuple):
    """What metrics.jsonl says of all steps."""

    numbers: "dict[str, tuple[array[int], array[float]]]"
    """Steps and values of each metric, in the order of the lines."""
    keys: set[str]
    """Of all lines."""
    remarks: list[str]


class Measurements:
    """What was measured of one policy of a run: held-out pairs, sampled answers, and what they come to.

    Args:
        run: The run that it is a policy of.
        folder: The folder in which the files lie.
        step: The optimizer step after which it was measured.
        scale: The scale of an end that was scaled toward the reference; None for what was trained.
    """

    def __init__(self, run: "Run", folder: Path, *, step: int, scale: float | None = None) -> None:
        self.run, self.folder, self.step, self.scale = run, folder, step, scale

    def pairs(self, *, with_texts: bool = True) -> PairTable | None:
        """Return the held-out pairs one by one, with the numbers of the run's loss; None where there are none.

        Where the log-probs of step 0 were not kept but the run started at the reference, they are the reference's.

        Raises:
            UsageError: the file cannot be read.
        """
        table = PairTable.load(
            self.folder / PAIRS_FILE, remedy=remedy(self.folder), needs=("policy_chosen", "score"), with_texts=with_texts
        )
        if table is None:
            return None
        recipe, kappa = self.run.recipe, self.run.kappa
        if not table.knows("initial_chosen") and table.has_reference and recipe.policy_starts_as_reference:
            table = table.since(None)
        gamma = None if math.isnan(kappa) else kappa * recipe.loss.beta
        known = {name: getattr(recipe.loss, name) for name in PairTable.SETTINGS if name != "gamma"}
        return replace(table, **known, gamma=gamma)

    def answers(self, *, with_texts: bool = True) -> AnswerTable | None:
        """Return the sampled answers one by one; None where there are none.

        Raises:
            UsageError: the file cannot be read.
        """
        return AnswerTable.load(
            self.folder / ANSWERS_FILE, remedy=remedy(self.folder), needs=("tokens", "kl", "entropy"), with_texts=with_texts
        )

    def with_initial(self, table: PairTable) -> PairTable | None:
        """Return pairs with the log-probs of step 0 that the file of held-out pairs has.

        Args:
            table: The pairs as they are scored now.

        Returns:
            None where there is no such file, it cannot be read, it does not have them, or it is about other pairs.
        """
        try:
            kept = PairTable.load(self.folder / PAIRS_FILE, remedy=remedy(self.folder), with_texts=False)
        except UsageError:  # the remedy is to measure again, which begins here
            return None
        if kept is None or not kept.knows("initial_chosen", "initial_rejected"):
            return None
        if (kept.where, kept.prompt_key) != (table.where, table.prompt_key):
            return None
        return replace(table, initial_chosen=kept.initial_chosen, initial_rejected=kept.initial_rejected)

    @cached_property
    def evaluation(self) -> dict[str, dict[str, Any]]:
        """What the pairs and the sampled answers come to, under "pairs" and "generation"; each may be empty.

        Raises:
            UsageError: the file cannot be read, or has another shape.
        """
        path = self.folder / EVALUATION_FILE
        content = read_object(path)
        records.check_record(records.EVALUATION, content, path, remedy="write it again with: pe-dpo eval, or restore it")
        return {**content, **{name: content.get(name) or {} for name in ("pairs", "intervals", "generation")}}

    @property
    def metrics_of_pairs(self) -> dict[str, float]:
        """Means over the held-out pairs."""
        return {key: float(value) for key, value in self.evaluation["pairs"].items() if value is not None}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals of those of them that are shares."""
        return {key: (low, high) for key, (low, high) in self.evaluation["intervals"].items() if None not in (low, high)}

    @property
    def generation(self) -> dict[str, Any] | None:
        """What the sampled answers come to, if they still lie beside it; None, too, for a file that has to be written anew."""
        try:
            found = self.evaluation["generation"] if (self.folder / ANSWERS_FILE).is_file() else None
        except (RunFolderError, UsageError):
            return None
        return found or None

    @property
    def answer_limit(self) -> int | None:
        """After how many tokens sampled answers were cut; None without any."""
        limit: int | None = self.evaluation["generation"].get("max_new_tokens")
        return limit

    def estimate(self, name: str) -> tuple[float, float] | None:
        """Return mean and standard error of what was measured on sampled answers; the error may be NaN; None if it was not.

        Args:
            name: "kl", "kl_per_token", "entropy_per_token", "tokens", "win_rate".
        """
        found = self.evaluation["generation"].get(name)
        if isinstance(found, Mapping):
            error = found.get("standard_error")
            if found["mean"] is None:
                return None
            return float(found["mean"]), math.nan if error is None else float(error)
        return None if found is None else (float(found), math.nan)


class Run(Measurements):
    """A run folder, finished or not; what was measured of its end is its own.

    Args:
        folder: need not exist yet.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(self, Path(folder), step=0)
        self._read: tuple[tuple[int, int], Logged] | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def exists(self) -> bool:
        """Whether the folder is one of a run: there are a record and a recipe."""
        return (self.folder / RUN_FILE).is_file() and (self.folder / RECIPE_FILE).is_file()

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, resolved.

        Raises:
            RunFolderError: there is none, or it cannot be read.
            RecipeError: it is none.
        """
        path = self.folder / RECIPE_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{path}: cannot be read: {error}; it is part of every run: restore it, or move the run away"
            ) from error
        return recipe_from_yaml(text, str(path))

    @property
    def info(self) -> RunInfo:
        """What run.json says now; all defaults where there is none. It is read anew each time, since a run writes it.

        Raises:
            RunFolderError: it cannot be read, or is no record of a run.
        """
        path = self.folder / RUN_FILE
        try:
            info = RunInfo.model_validate(read_object(path))
        except ValidationError as error:
            fault = records.first_fault(error)
            raise RunFolderError(f"{path}: {fault}; restore the file, or move its folder away") from error
        self.step = info.step
        return info

    @property
    def inputs(self) -> dict[str, str | None]:
        """What tells the run from all others: its id (None for one from before runs had ids), and hashes of its inputs."""
        info = self.info
        return {"run": info.id, **info.hashes.inputs}

    @property
    def former_inputs(self) -> dict[str, set[str]]:
        """Hashes of pairs that a person replaced on the way, by the input's name: older checkpoints are sealed with them."""
        found: dict[str, set[str]] = {}
        for entry in self.info.overrides:
            if entry.get("key") in ("data", "held_out"):
                found.setdefault(entry["key"], set()).add(str(entry.get("from")))
        return found

    @property
    def data_report(self) -> dict[str, Any] | None:
        """data_report.json, which names the rows that were held out; None where the run has not come to its data yet.

        Raises:
            RunFolderError: it cannot be read, or is no such report.
        """
        if self.info.hashes.data is None:
            return None
        path = self.folder / REPORT_FILE
        report = read_object(path)
        records.check_record(records.DATA_REPORT, report, path, remedy="restore the file, or take another copy of the run")
        return report

    @property
    def kappa(self) -> float:
        """γ/β as it was trained with; NaN while γ is still to be found from data."""
        recorded = self.info.loss.get("kappa")
        if recorded is not None:
            return float(recorded)
        loss = self.recipe.loss
        return math.nan if loss.is_calibrated else loss.gamma_value / loss.beta

    @property
    def asked_gamma(self) -> float | str:
        """γ as the run was asked for it: one that it found by itself is a number in its recipe by now."""
        asked: float | str = self.info.calibration.get("asked", self.recipe.loss.gamma)
        return asked

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, each with its step; a last one that a kill cut off is left out.

        Of 100,000 steps they take 1 GB: `metric_lines` has one at a time, and `curve` what is drawn.

        Raises:
            RunFolderError: a line is not JSON.
        """
        return [line for _, line in self.metric_lines()]

    def metric_lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yield the lines of metrics.jsonl, as they lie there and as read; a last one that a kill cut off is left out.

        Raises:
            RunFolderError: a line is not JSON, or its step is none.
        """
        path = self.folder / METRICS_FILE
        if not path.is_file():
            return
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError) as error:
                    if text.endswith(b"\n"):
                        raise RunFolderError(f"{path}:{number}: is not JSON ({error}); remove that line") from error
                    continue
                if isinstance(line, dict) and "step" in line:
                    step = line["step"]
                    if type(step) is not int or not 0 <= step < 1 << 53:
                        found = f"step is {str(step)[:20]!r}, which is no step"
                        raise RunFolderError(f"{path}:{number}: {found}; remove that line")
                    yield text, line

    @property
    def _logged(self) -> Logged:
        """The numbers of metrics.jsonl, read anew where a run has written more since: a curve costs no pass over the file."""
        path = self.folder / METRICS_FILE
        stat = path.stat() if path.is_file() else None
        now = (-1, -1) if stat is None else (stat.st_mtime_ns, stat.st_size)
        if self._read is not None and self._read[0] == now:
            return self._read[1]
        found = Logged({}, set(), [])
        for _, line in self.metric_lines():
            step = line["step"]
            found.keys.update(line)
            if "words" in line:
                found.remarks.append(f"step {line['step']}: {line['words']}")
            for key, value in line.items():
                if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 1000):
                    if key not in found.numbers:
                        found.numbers[key] = array("q"), array("d")
                    steps, values = found.numbers[key]
                    steps.append(step)
                    values.append(value)
        self._read = now, found
        return found

    @cached_property
    def has_held_out(self) -> bool:
        """Whether the pairs that were measured along the way are held out; else they are some of the training pairs."""
        keys = self._logged.keys
        return "eval_loss" in keys or "probe_loss" not in keys

    def curve(self, key: str) -> Curve:
        """Return a metric over steps: "loss", or with "watched/" in front of it that of the pairs measured along the way."""
        if key.startswith("watched/"):
            key = ("eval_" if self.has_held_out else "probe_") + key.removeprefix("watched/")
        points = dict(zip(*self._logged.numbers.get(key, ((), ())), strict=True))
        kept = {step: value for step, value in sorted(points.items()) if math.isfinite(value)}
        return Curve(list(kept), list(kept.values()))

    @property
    def remarks(self) -> list[str]:
        """What looked off: at the end, or so far."""
        remarks = self.info.remarks
        if remarks is not None:
            return remarks
        return self._logged.remarks

    @property
    def snapshots(self) -> list[Measurements]:
        """What was measured along the way, by its step."""
        found: dict[int, Path] = {}
        for path in sorted(self.folder.glob("snapshots/step-*")):
            number = path.name.removeprefix("step-")
            if number.isdigit():
                found.setdefault(int(number), path)
        return [Measurements(self, found[step], step=step) for step in sorted(found)]

    @property
    def best(self) -> Measurements | None:
        """What was measured of the best adapter; None where the run keeps none."""
        place = self.folder / BEST
        found = read_object(place / BEST_FILE)
        return Measurements(self, place, step=found["step"]) if isinstance(found.get("step"), int) else None

    @property
    def scaled(self) -> list[Measurements]:
        """What was measured of the end scaled toward the reference, by its scale; whatever else lies there is left out."""
        found: dict[float, Path] = {}
        for path in self.folder.glob("scaled/a-*"):
            try:
                scale = float(path.name.removeprefix("a-"))
            except ValueError:
                continue
            if scaled_folder(self.folder, scale) == path:
                found[scale] = path
        last = self.info.step
        return [Measurements(self, found[scale], step=last, scale=scale) for scale in sorted(found)]

    def checkpoints(self) -> list[Path]:
        """Return the sealed checkpoints, oldest first."""
        return checkpoints.checkpoints(self.folder)

    def resume_point(self) -> tuple[Path | None, list[str]]:
        """Return the newest checkpoint that is whole and the run's own, and a line for each newer one that is passed over.

        Returns:
            None in place of the checkpoint where the run has none yet.

        Raises:
            RunFolderError: there are checkpoints, but not one of them is whole and the run's own.
        """
        inputs, former = self.inputs, self.former_inputs
        passed_over: list[str] = []
        for checkpoint in reversed(self.checkpoints()):
            why = checkpoints.unusable(checkpoint, inputs, former)
            if why is None:
                return checkpoint, passed_over
            passed_over.append(f"{checkpoint}: passed over: {why}")
        if passed_over:
            lines = "\n".join(passed_over)
            raise RunFolderError(
                f"no checkpoint of this run is whole; start anew with `overwrite`, or another `output`:\n{lines}"
            )
        return None, []

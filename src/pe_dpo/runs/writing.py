"""Writing a run folder: who may, what is removed for a fresh run, and what stands in run.json and metrics.jsonl."""

import importlib.metadata
import json
import logging
import platform
import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from pe_dpo.disk import disk_error, json_without_nan, matching_paths, write_atomically, write_json
from pe_dpo.errors import RunFolderError, TrainingError
from pe_dpo.metrics.sides import describe_sides
from pe_dpo.metrics.table import PairTable
from pe_dpo.recipe import Recipe, changed_settings, describe, list_sources, recipe_to_yaml
from pe_dpo.runs.best import NEW
from pe_dpo.runs.checkpoints import MANIFEST, checkpoint_step, checkpoints, staging_folder
from pe_dpo.runs.files import BASE_FILE, EVALUATION_FILE, METRICS_FILE, RECIPE_FILE, REPORT_FILE, RUN_FILE, read_object
from pe_dpo.runs.machine import made_with
from pe_dpo.runs.model_card import model_card
from pe_dpo.runs.origins import INPUTS_FILE, ROWS_FILE
from pe_dpo.runs.overrides import describe_overrides, refuse_settings, replayed
from pe_dpo.runs.records import read_base
from pe_dpo.runs.run import Run

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = (
    "output",
    "reference.policy",
    "reference.store",
    "train.packing",
    "train.tokens_per_microbatch",
    "train.gradient_checkpointing",
    "train.keep_checkpoints",
    "train.save_every",
    "train.save_minutes",
    "train.eval_every",
    "train.log_every",
    "train.report_to",
    "train.project",
    "train.run_name",
    "train.bad_steps",
    "data.template_date",
)
"""Settings that a resumed run may have otherwise: none of them changes what is learned; but see `free_to_change`.

The date of a template is the recorded one where the recipe asks for none; another gives other token ids, which resume checks.
"""
_SPLIT = ("train.packing", "train.tokens_per_microbatch")
"""Settings that decide how the pairs of a step are split into forwards."""


def free_to_change(recipe: Recipe) -> set[str]:
    """Return the settings that a resumed run of this recipe may have otherwise, since none of them changes what is learned.

    How a step is split is one of them unless masks are drawn anew for each forward: by dropout on the adapter's input, or by
    mixout that draws a model per micro-batch. (Dropout of the base itself is always off.) Where the best evaluation is kept,
    how often there is one decides which that is.
    """
    picks = {"train.eval_every"} if recipe.train.keep_best else set()
    return {*FREE_TO_CHANGE} - ({*_SPLIT} if draws_by_forward(recipe) else set()) - picks


def draws_by_forward(recipe: Recipe) -> bool:
    """Return whether masks are drawn anew for each forward, so that they depend on how a step is split."""
    return recipe.adapter.dropout > 0 or (recipe.mixout.p > 0 and recipe.mixout.draws == "microbatch")


_OURS = {
    *(RUN_FILE, RECIPE_FILE, METRICS_FILE, BASE_FILE, INPUTS_FILE, ROWS_FILE),
    *("README.md", REPORT_FILE, "eval_pairs.parquet", "generations.parquet", "evaluation.json", ".staging", "reference"),
    *("adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tekken.json"),
    *("chat_template.json", "additional_chat_templates"),
    *("best", ".best.new", ".best.old", "trained", "snapshots", "scaled", "report", "report.html", "log.txt"),
    "runs",  # what the tensorboard tracker writes
}
_OUR_SUFFIXES = (".partial", ".model", ".tiktoken")
"""Of files that a kill left, and of a tokenizer's."""


class RunWriter:
    """Writes down what a run does. In every process of a run but the first it is there and writes nothing.

    Args:
        folder: The folder of the run, locked by `locked`.
        writes: Whether this is the process that writes.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self._has_begun = False
        """Whether what lies there is this run's, so that it may be said of it that it failed."""

    def sweep(self) -> None:
        """Remove what a killed or failed process left half-written: it may be what fills the disk."""
        if self.writes:
            for folder in (staging_folder(self.folder), self.folder / NEW):
                shutil.rmtree(folder, ignore_errors=True)
            for path in self.folder.rglob(".*.partial"):
                path.unlink(missing_ok=True)

    def begin(self, recipe: Recipe, *, resume: bool) -> None:
        """Make a checked folder ready: as it is for a resumed run; else without the last run, and with this recipe.

        Only what a run writes is removed; other files stay.
        """
        self._has_begun = True
        if not self.writes or resume:
            return
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == RUN_FILE):  # last what tells that it is a run
            if path.name in _OURS or path.name.removeprefix("checkpoint-").isdigit() or path.suffix in _OUR_SUFFIXES:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.update(id=uuid.uuid4().hex, status="starting")
        self.write_recipe(recipe)

    def write_recipe(self, recipe: Recipe) -> None:
        """Write recipe.yaml, atomically."""
        if self.writes:
            write_atomically(self.folder / RECIPE_FILE, recipe_to_yaml(recipe))

    def update(self, **entries: Any) -> None:
        """Set entries of run.json, atomically; one of None is taken out, and why a run failed as soon as it has not."""
        if self._has_begun and "id" not in entries:
            self.check_is_there()
        if self.writes:
            entries = entries if entries.get("status", "failed") == "failed" else {**entries, "why": None}
            entries = {**read_object(self.folder / RUN_FILE), **entries}
            write_json(self.folder / RUN_FILE, {key: value for key, value in entries.items() if value is not None})

    def check_is_there(self) -> None:
        """Check that nobody has taken the folder away, since what is written next would make it anew, without what it held.

        Raises:
            TrainingError: run.json is gone.
        """
        if self.writes and not (self.folder / RUN_FILE).is_file():
            raise TrainingError(
                f"{self.folder}: was removed or moved while the run was writing there, and {RUN_FILE} with it; move it back "
                "and go on with `resume`, or start the run again"
            )

    def interrupt(self, *, goes_on: bool) -> str:
        """Write down that a signal ended the run at once; return what is kept and how to go on, in words.

        Args:
            goes_on: Whether it is a run that was to be resumed, so that what lies there is its own from the beginning.
        """
        if not self._has_begun and not goes_on:
            return f"{self.folder}: nothing of this run was written yet; start it again"
        run, kept = Run(self.folder), checkpoints(self.folder)
        if not run.info.is_finished:
            with suppress(OSError, TrainingError):  # of a full disk, or a folder that was removed
                self.update(status="interrupted", step=checkpoint_step(kept[-1]) if kept else None)
        saved = f"the checkpoint of step {checkpoint_step(kept[-1])} is kept" if kept else "no step was saved yet"
        return f"{saved}; go on with: pe-dpo train {shlex.quote(str(self.folder / RECIPE_FILE))} --resume"

    def fail(self, why: str) -> None:
        """Write down that the run failed, and remove what it left half-written; nothing where it had not begun.

        On a disk that has no room for that the word alone takes the place of the old one, without a byte more.
        """
        if not self.writes or not self._has_begun or not (self.folder / RUN_FILE).is_file():
            return
        self.sweep()
        try:
            self.update(status="failed", why=why)
        except OSError:
            self.sweep()
            with suppress(OSError), (self.folder / RUN_FILE).open("r+b") as file:
                before = re.search(rb'"status": "(starting|training)"', file.read())
                if before is not None:
                    file.seek(before.start())
                    file.write(b'"status": "failed"'.ljust(len(before[0])))

    def log(self, line: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        if self.writes:
            with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(json_without_nan(line), allow_nan=False) + "\n")

    def resume(self) -> Path | None:
        """Return the checkpoint from which the run goes on, None for its beginning; metrics logged after it are dropped.

        Raises:
            RunFolderError: no checkpoint is whole and the run's own.
        """
        run = Run(self.folder)
        checkpoint, passed_over = run.resume_point()
        for line in passed_over:
            logger.info(line)
        logger.info(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning")
        last = checkpoint_step(checkpoint) if checkpoint else -1
        kept = (  # as they are, but for numbers that older versions wrote as no JSON
            json.dumps(json_without_nan(line)) + "\n" if b"NaN" in text or b"Infinity" in text else text.decode()
            for text, line in run.metric_lines()
            if line["step"] <= last
        )
        write_atomically(self.folder / METRICS_FILE, kept)
        if not run.info.is_finished:
            self.update(status="training")
        if run.info.overrides:
            self.update(overrides=replayed(run.info.overrides, max(last, 0)))
        return checkpoint

    def override(
        self,
        recipe: Recipe,
        changes: Sequence[Mapping[str, Any]],
        *,
        hashes: Mapping[str, str],
        pairs: Mapping[str, int],
        data_report: Mapping[str, Any] | None,
    ) -> None:
        """Write down what a person changes in a run that goes on: first what, then the recipe that says it from now on.

        Args:
            recipe: The recipe from now on.
            changes: See `overrides.entries`.
            hashes: Of the inputs from now on.
            pairs: How many, to train on and held out.
            data_report: What became of every row, where pairs changed; else None.
        """
        for line in describe_overrides(changes):
            logger.warning(f"changed on the way: {line}")
        logger.warning("training by the recipe of now from the beginning will be another run")
        if data_report is not None:
            write_json(self.folder / REPORT_FILE, data_report)
        recorded = read_object(self.folder / RUN_FILE)
        self.update(
            status="training",
            overrides=[*recorded.get("overrides", []), *changes],
            hashes={**recorded.get("hashes", {}), **hashes},
            pairs=dict(pairs),
            loss=describe(recipe.loss, recipe.data.pair_columns)._asdict(),
        )
        self.write_recipe(recipe)

    def record_start(
        self,
        recipe: Recipe,
        hashes: Mapping[str, str],
        *,
        base: Mapping[str, Any],
        data_report: Mapping[str, Any],
        pairs: Mapping[str, int],
        threads: int,
    ) -> None:
        """Write down what a fresh run starts from.

        Args:
            recipe: The recipe of the run, with γ as a number.
            hashes: The hashes of data, held-out pairs, base, and the adapter that it starts from or trains over.
            base: What the base is, file by file and tensor by tensor.
            data_report: What became of every row.
            pairs: How many, to train on and held out.
            threads: With how many it computes.
        """
        write_json(self.folder / BASE_FILE, base)
        write_json(self.folder / REPORT_FILE, data_report)
        self.update(
            versions=versions(),
            made_with=made_with(threads),
            hashes=dict(hashes),
            base={key: base[key] for key in ("id", "revision", "quantize", "dtype", "parameters", "quantized_layers")},
            reference_card={
                "is": recipe.adapter.describe_reference(),
                "base_sha256": hashes["base"],
                "run_in_training": recipe.loss.gamma_value != 0,
            },
            loss=describe(recipe.loss, recipe.data.pair_columns)._asdict(),
            pairs=dict(pairs),
        )

    def finish(
        self,
        recipe: Recipe,
        *,
        before: Mapping[str, float],
        after: Mapping[str, float],
        step: int,
        remarks: Sequence[str],
        adapter: Mapping[str, str],
        pairs: PairTable | None,
    ) -> None:
        """Write what a complete run came to: the model card, and run.json.

        Args:
            recipe: The recipe of the run.
            before: Held-out metrics at step 0.
            after: Held-out metrics at the end.
            step: The last one.
            remarks: What looks off.
            adapter: The hashes of the adapter's files.
            pairs: The held-out pairs as they are scored at the end; None without held-out pairs.
        """
        if self.writes:
            base = read_base(self.folder)
            info = Run(self.folder).info
            said = info.describe_memory(), info.describe_skipped(), info.describe_history()
            card = model_card(recipe, base, before, after, *said, sides=describe_sides(pairs) if pairs else "")
            write_atomically(self.folder / "README.md", card)
            if best := Run(self.folder).best:
                card = model_card(recipe, base, before, best.metrics_of_pairs, *said)
                write_atomically(best.folder / "README.md", card)
            hashes = {**Run(self.folder).info.hashes.inputs, "adapter": dict(adapter)}
            outcome = {"before": dict(before), "after": dict(after), "remarks": list(remarks)}
            self.update(status="finished", step=step, **outcome, hashes=hashes)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Hold the run folder for this process; it is made if need be.

    Raises:
        RunFolderError: another process holds it, or it cannot be made, or a file that is written in place is a link.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(str(disk_error(error, folder) or f"{folder}: cannot be made: {error.strerror}")) from error
    linked = [path for path in (folder / name for name in (".lock", METRICS_FILE, "log.txt")) if path.is_symlink()]
    if linked:
        raise RunFolderError(
            f"{linked[0]}: is a link to {linked[0].readlink()}, and would be written; put the file itself there, or choose "
            "another `output`"
        )
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(f"{folder}: another run is writing there; wait for it, or choose another `output`") from error
    except OSError as error:
        raise RunFolderError(str(disk_error(error, folder) or f"{folder}: cannot be locked: {error.strerror}")) from error
    try:
        yield folder
    finally:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [".lock"]:  # nothing came of it
                (folder / ".lock").unlink()
                folder.rmdir()
        lock.release()


def check_run_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool, override: Collection[str] = ()) -> None:
    """Check, without touching anything, that a run may be written into a folder.

    Args:
        folder: The folder of the run; it need not exist.
        recipe: The recipe of the run.
        resume: Whether to go on with the run that lies there.
        overwrite: Whether to remove the run that lies there.
        override: Keys that may differ from the run's recipe, see `runs.overrides`.

    Raises:
        RunFolderError: it is a file; something lies there and neither was asked for; it is not a run, or it is one of another
            recipe; or it holds what the run itself needs.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder}: is a file; `output` is a folder")
    if resume and overwrite:
        raise RunFolderError("`resume` goes on with a run and `overwrite` removes it; use one of them")
    if resume:
        _check_same_recipe(folder, recipe, override)
        return
    adapter = recipe.adapter
    inputs = [("adapter.start", adapter.start or ""), ("adapter.over", adapter.over or ""), ("model.base", recipe.model.base)]
    for name, places in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        sources = [] if places is None or isinstance(places, float) else list_sources(places)
        inputs += [(name, str(path)) for source in sources for path in matching_paths(source.path)]
    for name, value in inputs:
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(folder.resolve()):
            raise RunFolderError(
                f"{folder}: {name} lies in the output folder, which a fresh run empties; choose another `output`"
            )
    if not folder.is_dir() or all(path.name == ".lock" or path.suffix == ".partial" for path in folder.iterdir()):
        return  # nothing, or what is left of a run that a kill or a full disk kept from beginning
    if not _is_run(folder):
        raise RunFolderError(f"{folder}: is not empty and not a run of pe-dpo; choose another `output`")
    if not overwrite and (Run(folder).checkpoints() or (folder / "adapter_model.safetensors").is_file()):
        raise RunFolderError(f"{folder}: holds a run; `resume` goes on with it, `overwrite` removes it, `output` moves")


def _is_run(folder: Path) -> bool:
    """Return whether run.json is one of ours, or was lost but the run's recipe and a sealed checkpoint lie there."""
    if not (folder / RUN_FILE).is_file():
        return (folder / RECIPE_FILE).is_file() and any((path / MANIFEST).is_file() for path in checkpoints(folder))
    try:
        return "status" in read_object(folder / RUN_FILE)
    except RunFolderError:
        return False


def _check_same_recipe(folder: Path, recipe: Recipe, override: Collection[str]) -> None:
    missing = [name for name in (RUN_FILE, RECIPE_FILE) if not (folder / name).is_file()]
    if missing and _is_run(folder):
        raise RunFolderError(
            f"{folder}: {missing[0]} is missing, and it is part of every run; restore it, or start anew with `overwrite`"
        )
    if missing:
        raise RunFolderError(f"{folder}: there is no run to resume; leave `resume` out")
    difference = different_settings(Run(folder), recipe)
    refused = {key: values for key, values in difference.items() if key not in override}
    if refused:
        lines = [f"{key}: {was!r} → {now!r}" for key, (was, now) in refused.items()]
        raise RunFolderError(
            f"{folder}: was trained with other settings, so going on would be neither run:\n  "
            + "\n  ".join(lines)
            + f"\n{refuse_settings(refused)}"
        )


def different_settings(run: Run, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return old and new value of every setting in which a recipe differs from a run's, but for those that are free to change.

    The hash of its weights says whether an adapter is the same, wherever it lies now.
    """
    moved = {f"adapter.{key}" for key in ("start", "over") if key in run.info.hashes.inputs and getattr(recipe.adapter, key)}
    return changed_settings(run.recipe, recipe, ignore=free_to_change(run.recipe) | moved)


def check_same_inputs(run: Run, hashes: Mapping[str, str]) -> None:
    """Check that a resumed run sees the data, the base and the adapters that it started with.

    Raises:
        RunFolderError: naming what differs.
    """
    recorded = run.info.hashes.inputs
    changed = [name for name, value in hashes.items() if name in recorded and recorded[name] != value]
    if changed:
        lines = "\n".join(f"  {name}: {recorded[name][:12]} → {hashes[name][:12]}" for name in changed)
        raise RunFolderError(
            f"{run.folder}: the run started with other inputs (sha256):\n{lines}\n"
            "restore them, or start anew with another `output`"
        )


@cache
def versions() -> Mapping[str, str]:
    """Return the versions that a result depends on, read once: the files that hold them take 25 ms."""
    packages = "pe-dpo torch transformers peft bitsandbytes accelerate datasets tokenizers safetensors"
    found = {name: importlib.metadata.version(name) for name in packages.split()}
    return {"python": sys.version.split()[0], "platform": platform.platform(), **found}


def save_evaluation(
    folder: Path,
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write what an evaluation came to into evaluation.json of a folder, atomically.

    Args:
        folder: The place of what was measured.
        metrics: The metrics of the pairs, see `pair_metrics`.
        intervals: The intervals of those that are shares.
        generation: What the sampled answers come to, see `Drift.summary`; left out without any.
    """
    parts = {"pairs": dict(metrics), "intervals": {key: list(ends) for key, ends in intervals.items()}}
    write_json(folder / EVALUATION_FILE, parts if generation is None else {**parts, "generation": dict(generation)})

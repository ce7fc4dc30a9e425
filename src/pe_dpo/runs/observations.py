"""Run folders, sweep folders and TRL's logs as one table of observations.

An observation is a policy that was measured: of one point (the settings turned away from a base recipe), one seed, one step,
one scale. Finished runs give one at their end, one for each snapshot, and one for each scale at which the end was measured,
with held-out pairs one by one and, where answers were sampled, KL and whatever was measured on them. TRL's
trainer_state.json gives means of the last evaluation alone.
"""

import itertools
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pe_dpo.errors import UsageError
from pe_dpo.metrics.table import AnswerTable, PairTable
from pe_dpo.recipe import Recipe, changed_settings
from pe_dpo.recipe.loss_section import CALIBRATED
from pe_dpo.recipe.schema import SeedsSection
from pe_dpo.runs.files import RECIPE_FILE, RUN_FILE, SWEEP_FILE, read_object, remedy
from pe_dpo.runs.overrides import describe_overrides
from pe_dpo.runs.records import SWEEP, check_record
from pe_dpo.runs.run import Measurements, Run
from pe_dpo.runs.writing import FREE_TO_CHANGE

TRL_FILE = "trainer_state.json"

_SAME_POINT = ("train.seed", *(f"train.seeds.{key}" for key in SeedsSection.model_fields), "loss.preset", *FREE_TO_CHANGE)
"""Settings that do not make another point: what a preset says is in the other keys."""


class Observation(NamedTuple):
    """A policy that was measured."""

    settings: dict[str, Any]
    """Dotted recipe key: value, where it is turned away from the base recipe."""
    seed: int
    """By which all was drawn: train.seed; where train.seeds has sources of chance apart, a number for what they are."""
    step: int
    is_final: bool
    """Whether it is the end of a run, as it is."""
    run: str
    """The folder in which it lies."""
    pairs: PairTable | None
    answers: AnswerTable | None
    logged: dict[str, float]
    """Means over held-out pairs as the run wrote them."""
    kappa: float | None
    """γ/β as trained; None where that is not known."""
    source: Literal["pe-dpo", "trl"] = "pe-dpo"
    scale: float | None = None
    """The scale at which the end of a run was measured; None for what was trained."""

    def rows(self, kind: Literal["pairs", "answers"]) -> PairTable | AnswerTable | None:
        """Return its held-out pairs or its sampled answers, if there are any."""
        return self.pairs if kind == "pairs" else self.answers


def read_observations(targets: Sequence[str | Path]) -> tuple[list[Observation], list[str]]:
    """Return what was measured of the runs in some folders, and remarks on what was left out.

    Args:
        targets: run folders, sweep folders, trainer_state.json files of TRL or folders with one. Settings are turned away from
            `base_recipe`.

    Raises:
        UsageError: a target is nothing of that, has no finished run, or runs cannot be compared: other held-out pairs, another
            base, or answers cut at another length. Names the two runs.
    """
    runs: dict[Path, Run] = {}  # each once
    peers: list[Observation] = []
    remarks: list[str] = []
    for target in map(Path, targets):
        if (target / SWEEP_FILE).is_file():
            found = _runs_of_sweep(target, remarks)
        elif (target / RUN_FILE).is_file():
            found = [Run(target)]
        else:
            found = []
            peers.append(_read_trl(target))
        for run in found:
            runs.setdefault(run.folder.resolve(), run)
    observations, ends = [], []
    owner: dict[tuple[str, int], str] = {}
    base = base_recipe(targets)
    seeds = _number_seeds(list(runs.values()), remarks)
    for run, seed in zip(runs.values(), seeds, strict=True):
        if not run.info.is_finished:
            raise UsageError(
                f"{run.folder}: is not finished (status {run.info.status}); finish it with "
                f"pe-dpo train {shlex.quote(str(run.folder / RECIPE_FILE))} --resume, or leave it out"
            )
        assert base is not None
        settings = settings_between(base, _asked_recipe(run), kappa=run.info.loss.get("kappa"))
        remarks += [f"{run.folder}: changed on the way: {line}" for line in describe_overrides(run.info.overrides)]
        # Runs of equal settings and seed are told apart by their folders: in a sweep by those of their points.
        if owner.setdefault((repr(settings), seed), str(run.folder)) != str(run.folder):
            settings = {**settings, "run": re.sub(r"[/\\]seed-\d+$", "", str(run.folder))}
        if skipped := run.info.describe_skipped():
            remarks.append(f"{run.folder}: {skipped}")
        states = list(_observations_of_run(run, settings, seed, remarks))
        ends.append((run, states[0]))
        observations += states
    _check_comparable(ends)
    known = [(run.folder, run.info.hashes.data) for run in runs.values() if run.info.hashes.data is not None]
    others = [folder for folder, value in known if value != known[0][1]]  # a file may have changed under its name
    if others:
        remarks.append(
            f"{others[0]}: was trained on other pairs than {known[0][0]} (so were {len(others)} runs of {len(runs)})"
        )
    return observations + peers, remarks


def settings_between(base: Recipe, point: Recipe, *, kappa: float | None = None) -> dict[str, Any]:
    """Return what a point turns away from a base recipe: dotted key: value.

    γ counts as a multiple of β, so that turning β alone leaves it where it is.

    Args:
        base: with γ as it was asked for.
        point: the same.
        kappa: γ/β as trained; None where that is not known beyond the recipe.
    """
    settings = {
        key: now
        for key, (_, now) in changed_settings(base, point).items()
        if key not in (*_SAME_POINT, "loss.gamma") and key.split(".")[0] not in ("model", "generation", "reference")
    }
    gamma, kappa = point.loss.gamma, point.loss.kappa if kappa is None else kappa
    if isinstance(gamma, str) and CALIBRATED.match(gamma):
        settings |= {"loss.gamma": gamma} if gamma != base.loss.gamma else {}
    elif kappa is not None:
        base_kappa = math.nan if base.loss.kappa is None else base.loss.kappa
        if not math.isclose(kappa, base_kappa, rel_tol=1e-9, abs_tol=1e-9):
            settings["loss.gamma"] = f"{kappa:.6g}x"
    return dict(sorted(settings.items()))


def base_recipe(targets: Sequence[str | Path]) -> Recipe | None:
    """Return the recipe of the first target that is a sweep or a run, or None where there are logs of TRL alone.

    Raises:
        UsageError: it cannot be read.
    """
    ours = (place for place in map(Path, targets) if any((place / name).is_file() for name in (SWEEP_FILE, RUN_FILE)))
    first = next(ours, None)
    return None if first is None else _asked_recipe(Run(first))


def data_sets(targets: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Return targets by what their runs are measured on: those of one base and one set of held-out pairs under one name.

    One that did not record both is with the first that may be the same, as logs of TRL are, which never say it;
    `read_observations` then holds its pairs against theirs.
    """
    known: dict[Path, tuple[str | None, ...]] = {}
    for target in map(Path, targets):
        runs = [Run(target)] if (target / RUN_FILE).is_file() else []
        runs = _runs_of_sweep(target, []) if (target / SWEEP_FILE).is_file() else runs
        recorded = [run.info.hashes.inputs for run in runs]
        known[target] = tuple(next(filter(None, (one.get(key) for one in recorded)), None) for key in ("base", "held_out"))
    found: dict[tuple[str | None, ...], list[Path]] = {one: [] for one in known.values() if None not in one}
    for target, hashes in known.items():
        may_be = (one for one in found if all(None in pair or pair[0] == pair[1] for pair in zip(one, hashes, strict=True)))
        found.setdefault(next(may_be, hashes), []).append(target)
    groups = list(found.values())
    names = [group[0].resolve().name for group in groups]
    return {str(group[0]) if names.count(name) > 1 else name: group for name, group in zip(names, groups, strict=True)}


def _runs_of_sweep(folder: Path, remarks: list[str]) -> list[Run]:
    """Return the finished runs of a sweep; how many are not is added to the remarks."""
    plan = read_object(folder / SWEEP_FILE)
    check_record(SWEEP, plan or None, folder / SWEEP_FILE, remedy="restore the file")
    points = [Run(folder / point["folder"]) for point in plan["points"]]
    finished = [run for run in points if run.info.is_finished]
    if not finished:
        raise UsageError(f"{folder}: no run of this sweep is finished; start the same `pe-dpo sweep` again to go on with it")
    if len(finished) < len(points):
        remarks.append(f"{folder}: {len(points) - len(finished)} of {len(points)} runs are not finished and are left out")
    return finished


def _number_seeds(runs: Sequence[Run], remarks: list[str]) -> list[int]:
    """Return by which seed each run drew; one whose order, adapter and masks have seeds of their own gets a number of its own.

    Runs that drew alike have the same number, however their recipes say it; the remarks tell what stands behind the others.
    """
    drawn = []
    for run in runs:
        train = run.recipe.train
        drawn.append((train.seed_of("order"), train.seed_of("adapter"), train.seed_of("masks"), train.seeds.data))
    numbers = {one: one[0] for one in drawn if one[0] == one[1] == one[2] and one[3] is None}
    free = itertools.count(max(numbers.values(), default=-1) + 1)
    told = []
    for one in sorted({*drawn} - {*numbers}, key=lambda one: (*one[:3], -1 if one[3] is None else one[3])):
        numbers[one] = next(free)
        order, adapter, masks, data = one
        split = "" if data is None else f", data {data}"
        told.append(f"{numbers[one]} is order {order}, adapter {adapter}, masks {masks}{split}")
    if told:
        remarks.append(f"seeds apart (train.seeds): {'; '.join(told)}")
    return [numbers[one] for one in drawn]


def _asked_recipe(run: Run) -> Recipe:
    """A run's recipe with γ as it was asked for."""
    return run.recipe.model_copy(update={"loss": run.recipe.loss.model_copy(update={"gamma": run.asked_gamma})})


def _observations_of_run(run: Run, settings: dict[str, Any], seed: int, remarks: list[str]) -> Iterator[Observation]:
    """Yield the end of a run, its snapshots, and its end at other scales.

    Those that were not measured as the end was are left out, and the remarks say how many, and what to do where that helps.
    """
    info, limit = run.info, run.answer_limit
    rows: object = None
    left_out: list[Measurements] = []
    snapshots = [state for state in run.snapshots if state.step != info.step]
    for state in (run, *snapshots, *run.scaled):
        pairs, answers = state.pairs(with_texts=False), state.answers(with_texts=False)
        found = Observation(
            settings=settings,
            seed=seed,
            step=state.step,
            is_final=state is run,
            run=str(run.folder),
            pairs=pairs and pairs.in_order(),
            answers=answers and answers.in_order(),
            logged=info.after if state is run else state.metrics_of_pairs,
            kappa=info.loss.get("kappa"),
            scale=state.scale,
        )
        its_rows = found.pairs and _rows(found.pairs)
        if state is run:
            rows = its_rows
        if its_rows == rows and (limit is None or state.answer_limit in (None, limit)):
            yield found
        else:
            left_out.append(state)
    why = "measured on other pairs than its end is now, or with answers cut at another length, and"
    scales = [f"{state.scale:g}" for state in left_out if state.scale is not None]
    if len(left_out) > len(scales):
        remarks.append(f"{run.folder}: {len(left_out) - len(scales)} snapshots were {why} are left out")
    if scales:
        again = remedy(run.folder, scales)
        remarks.append(f"{run.folder}: its adapter scaled to {', '.join(scales)} was {why} is left out; {again}")


def _check_comparable(ends: Sequence[tuple[Run, Observation]]) -> None:
    """Check that runs have the same base and held-out pairs, and answers of the same length at most.

    Raises:
        UsageError: they have not.
    """
    for run, observed in ends[1:]:
        first, observation = ends[0]
        for key, difference, advice in (
            ("base", "another base", "compare runs from one base"),
            ("held_out", "other held-out pairs", "name them once with data.eval, or measure both on the same with pe-dpo eval"),
        ):
            hashes = [each.info.hashes.inputs.get(key) for each in (first, run)]
            if hashes[0] != hashes[1] and None not in hashes:
                raise UsageError(
                    f"{run.folder}: has {difference} than {first.folder}, so that differences are not paired; {advice}"
                )
        if observation.pairs and observed.pairs:
            known, new = Counter(_rows(observation.pairs)), Counter(_rows(observed.pairs))
            if known != new:
                raise UsageError(
                    f"{run.folder}: {(new - known).total()} of its {new.total()} held-out pairs are not among the "
                    f"{known.total()} of {first.folder}, and {(known - new).total()} of those are missing; runs are compared "
                    "on the same pairs: name them once with data.eval"
                )
    limits: dict[int, Path] = {}
    for run, _ in ends:
        if run.answer_limit is not None:
            limits.setdefault(run.answer_limit, run.folder)
    if len(limits) > 1:
        (limit, folder), (other_limit, other), *_ = limits.items()
        raise UsageError(
            f"{other}: answers are cut after {other_limit} tokens, those of {folder} after {limit}, so that their KL are "
            "different quantities; sample one of them again with pe-dpo eval"
        )


def _rows(table: PairTable) -> list[tuple[str, str]]:
    return list(zip(table.prompt_key, table.where, strict=True))


def _read_trl(target: Path) -> Observation:
    """Return the last evaluation in the log that transformers' Trainer, and so TRL, keeps: means, no single pairs.

    Settings and seed are not written there.

    Args:
        target: trainer_state.json, or a folder with one, or with checkpoints that have one.

    Raises:
        UsageError: there is none, it cannot be read, or it logs no evaluation.
    """
    files = [target] if target.name == TRL_FILE else [target / TRL_FILE]
    checkpoints = [path for path in target.glob(f"checkpoint-*/{TRL_FILE}") if path.parent.name.split("-")[-1].isdigit()]
    files += sorted(checkpoints, key=lambda path: int(path.parent.name.split("-")[-1]), reverse=True)
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        raise UsageError(
            f"{target}: is neither a run ({RUN_FILE}), nor a sweep ({SWEEP_FILE}), nor a log of TRL ({TRL_FILE}); name a "
            "folder that `pe-dpo train`, `pe-dpo sweep` or TRL wrote"
        )
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
    return Observation({"run": f"TRL {name}"}, 0, step, True, str(target), None, None, logged, None, source="trl")

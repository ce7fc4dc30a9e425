"""Run folders, sweep folders and TRL's logs as one table of observations.

An observation is a policy that was measured: of one point (the settings turned away from a base recipe), one seed, one step,
one scale. Finished runs give one at their end, one for each snapshot, and one for each scale at which the end was measured,
with held-out pairs one by one and, where answers were sampled, KL and whatever was measured on them. TRL's
trainer_state.json gives means of the last evaluation alone.
"""

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
from pe_dpo.runs.files import RECIPE_FILE, RUN_FILE, SWEEP_FILE, read_object, remedy
from pe_dpo.runs.run import Measurements, Run
from pe_dpo.runs.trl_log import read_trl_log
from pe_dpo.runs.writing import FREE_TO_CHANGE

_NO_DIALS = ("train.seed", "loss.preset", *FREE_TO_CHANGE)
"""Settings that do not make another point: what a preset says is in the other keys."""


class Observation(NamedTuple):
    """A policy that was measured."""

    settings: dict[str, Any]
    """Dotted recipe key: value, where it is turned away from the base recipe."""
    seed: int
    step: int
    is_final: bool
    """Whether it is the end of a run, as it is."""
    run: str
    """Where it lies, for people."""
    pairs: PairTable | None
    answers: AnswerTable | None
    logged: dict[str, float]
    """Means over held-out pairs as the run wrote them."""
    kappa: float | None
    """γ/β as trained; None where that is not known."""
    source: Literal["pe-dpo", "trl"] = "pe-dpo"
    scale: float | None = None
    """Of the end of a run scaled toward the reference; None for what was trained."""

    def rows(self, kind: Literal["pairs", "answers"]) -> PairTable | AnswerTable | None:
        """Return its held-out pairs or its sampled answers, if there are any."""
        return self.pairs if kind == "pairs" else self.answers


class Observations(NamedTuple):
    """All observations of a comparison, the base recipe's settings, and what was left out."""

    observations: list[Observation]
    base: Recipe | None
    """From which settings are turned away; None where only TRL's logs were read."""
    remarks: list[str]


def read_observations(targets: Sequence[str | Path]) -> Observations:
    """Return what was measured of the runs in some folders.

    Args:
        targets: run folders, sweep folders, trainer_state.json files of TRL or folders with one. The first sweep's recipe, or
            the first run's, is the one that settings are turned away from.

    Raises:
        UsageError: a target is nothing of that, has no finished run, or runs cannot be compared: other held-out pairs, another
            base, or answers cut at another length. Names the two runs.
    """
    runs: list[Run] = []
    peers: list[Observation] = []
    remarks: list[str] = []
    for target in map(Path, targets):
        if (target / SWEEP_FILE).is_file():
            runs += _runs_of_sweep(target, remarks)
        elif (target / RUN_FILE).is_file():
            runs.append(Run(target))
        else:
            peers.append(_of_trl(target))
    runs = list({run.folder.resolve(): run for run in reversed(runs)}.values())[::-1]  # each once
    base = _base_recipe(Path(targets[0]), runs) if runs else None
    observations, ends = [], []
    for run in runs:
        assert base is not None
        if not run.info.is_finished:
            raise UsageError(
                f"{run.folder}: is not finished (status {run.info.status}); finish it with "
                f"pe-dpo train {shlex.quote(str(run.folder / RECIPE_FILE))} --resume, or leave it out"
            )
        found = list(_observations_of_run(run, base, remarks))
        ends.append((run, found[0]))
        observations += found
    _check_comparable(ends)
    remarks += _remarks_on_training(runs)
    return Observations(_with_own_names(observations) + peers, base, remarks)


def _of_trl(target: Path) -> Observation:
    name, step, logged = read_trl_log(target)
    return Observation({"run": f"TRL {name}"}, 0, step, True, str(target), None, None, logged, None, source="trl")


def _runs_of_sweep(folder: Path, remarks: list[str]) -> list[Run]:
    plan = read_object(folder / SWEEP_FILE)
    try:
        points = [Run(folder / point["folder"]) for point in plan["points"]]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder / SWEEP_FILE}: is not the plan of a sweep ({error}); restore the file") from error
    finished = [run for run in points if run.info.is_finished]
    if not finished:
        raise UsageError(f"{folder}: no run of this sweep is finished; start the same `pe-dpo sweep` again to go on with it")
    if len(finished) < len(points):
        remarks.append(f"{folder}: {len(points) - len(finished)} of {len(points)} runs are not finished and are left out")
    return finished


def _base_recipe(first: Path, runs: Sequence[Run]) -> Recipe:
    run = Run(first) if (first / SWEEP_FILE).is_file() else runs[0]
    return run.recipe.model_copy(update={"loss": run.recipe.loss.model_copy(update={"gamma": run.asked_gamma})})


def _observations_of_run(run: Run, base: Recipe, remarks: list[str]) -> Iterator[Observation]:
    """The end of a run, its snapshots, its end at other scales; those that were not measured as the end was are left out."""
    info = run.info
    kappa = info.loss.get("kappa")
    settings = _settings(base, run, kappa)
    end, limit, left_out = None, run.answer_limit, []
    snapshots = [state for state in run.snapshots if state.step != info.step]
    for state in (run, *snapshots, *run.scaled):
        pairs, answers = state.pairs(with_texts=False), state.answers(with_texts=False)
        one = Observation(
            settings=settings,
            seed=run.recipe.train.seed,
            step=state.step,
            is_final=state is run,
            run=str(run.folder),
            pairs=pairs and pairs.in_order(),
            answers=answers and answers.in_order(),
            logged=info.after if state is run else state.metrics_of_pairs,
            kappa=kappa,
            scale=state.scale,
        )
        end = end or one
        if _names(one) == _names(end) and (limit is None or state.answer_limit in (None, limit)):
            yield one
        else:
            left_out.append(state)
    remarks += _left_out_words(run.folder, left_out)


def _left_out_words(run: Path, states: Sequence[Measurements]) -> list[str]:
    """How many states of a run were measured otherwise than its end, and what to do where that helps."""
    why = "measured on other pairs than its end is now, or with answers cut at another length, and"
    snapshots = [state for state in states if state.scale is None]
    scales = [f"{state.scale:g}" for state in states if state.scale is not None]
    found = [f"{run}: {len(snapshots)} snapshots were {why} are left out"] if snapshots else []
    if scales:
        found.append(f"{run}: its adapter scaled to {', '.join(scales)} was {why} is left out; {remedy(run, scales)}")
    return found


def _names(one: Observation) -> object:
    return one.pairs and _rows(one.pairs)


def _rows(table: PairTable) -> list[tuple[str, str]]:
    return list(zip(table.prompt_key, table.where, strict=True))


def _settings(base: Recipe, run: Run, kappa: float | None) -> dict[str, Any]:
    """What a run turns away from the base; γ counts as a multiple of β, so that turning β alone leaves it where it is."""
    gamma = run.asked_gamma
    changed = changed_settings(base, run.recipe)
    settings = {key: now for key, (_, now) in changed.items() if not _is_no_dial(key)}
    settings.pop("loss.gamma", None)
    if isinstance(gamma, str) and CALIBRATED.match(gamma):
        settings |= {"loss.gamma": gamma} if gamma != base.loss.gamma else {}
    elif kappa is not None and (base.loss.is_calibrated or not _is_close(kappa, _kappa(base))):
        settings["loss.gamma"] = f"{kappa:.6g}x"
    return dict(sorted(settings.items()))


def _kappa(recipe: Recipe) -> float:
    return recipe.loss.gamma_value / recipe.loss.beta


def _is_no_dial(key: str) -> bool:
    return key in _NO_DIALS or key.split(".")[0] in ("model", "generation", "reference")


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9 * max(1.0, abs(one), abs(other))


def _with_own_names(observations: list[Observation]) -> list[Observation]:
    """Runs of equal settings and seed are told apart by their folders: in a sweep by those of their points."""
    owner: dict[tuple[str, int], str] = {}
    found = []
    for one in observations:
        key = repr(one.settings), one.seed
        first = owner.setdefault(key, one.run)
        own = re.sub(r"[/\\]seed-\d+$", "", one.run)
        found.append(one if first == one.run else one._replace(settings={**one.settings, "run": own}))
    return found


def _check_comparable(ends: Sequence[tuple[Run, Observation]]) -> None:
    """Check that runs have the same base and held-out pairs, and answers of the same length at most.

    Raises:
        UsageError: they have not.
    """
    if not ends:
        return
    first, observation = ends[0]
    for run, observed in ends[1:]:
        for key, words, advice in (
            ("base", "another base", "compare runs from one base"),
            ("held_out", "other held-out pairs", "name them once with data.eval, or measure both on the same with pe-dpo eval"),
        ):
            hashes = [one.info.hashes.inputs.get(key) for one in (first, run)]
            if hashes[0] != hashes[1] and None not in hashes:
                raise UsageError(f"{run.folder}: has {words} than {first.folder}, so that differences are not paired; {advice}")
        if observation.pairs and observed.pairs:
            _check_same_rows(first.folder, observation.pairs, run.folder, observed.pairs)
    limits: dict[int, Path] = {}
    for run, _ in ends:
        if run.answer_limit is not None:
            limits.setdefault(run.answer_limit, run.folder)
    if len(limits) > 1:
        (one, here), (two, there), *_ = limits.items()
        raise UsageError(
            f"{there}: answers are cut after {two} tokens, those of {here} after {one}, so that their KL are different "
            "quantities; sample one of them again with pe-dpo eval"
        )


def _remarks_on_training(runs: Sequence[Run]) -> list[str]:
    """Whether all runs learned from the same pairs: a file may have changed under its name."""
    known = [(run.folder, run.info.hashes.data) for run in runs if run.info.hashes.data is not None]
    others = [folder for folder, value in known if value != known[0][1]]
    if not others:
        return []
    return [f"{others[0]}: was trained on other pairs than {known[0][0]} (so were {len(others)} runs of {len(runs)})"]


def _check_same_rows(first: Path, rows: PairTable, folder: Path, others: PairTable) -> None:
    one, two = Counter(_rows(rows)), Counter(_rows(others))
    if one != two:
        raise UsageError(
            f"{folder}: {(two - one).total()} of its {two.total()} held-out pairs are not among the {one.total()} of {first}, "
            f"and {(one - two).total()} of those are missing; runs are compared on the same pairs: name them once with "
            "data.eval"
        )

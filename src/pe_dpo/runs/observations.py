"""Run folders, sweep folders and TRL's logs as one table of observations.

An observation is a policy that was measured: of one point (the settings turned away from a base recipe), one seed, one step,
one scale. Finished runs give one at their end, one for each snapshot, and one for each scale at which the end was measured,
with held-out pairs one by one and, where answers were sampled, KL and whatever was measured on them. TRL's
trainer_state.json gives means of the last evaluation alone.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pe_dpo.errors import UsageError
from pe_dpo.metrics.table import AnswerTable, PairTable, Table
from pe_dpo.recipe import Recipe, changed_settings, recipe_from_yaml
from pe_dpo.recipe.loss_section import CALIBRATED
from pe_dpo.runs.files import SWEEP_FILE, read_evaluation, read_object, remedy
from pe_dpo.runs.folder import FREE_TO_CHANGE, RECIPE_FILE, RUN_FILE
from pe_dpo.runs.scaled import scaled_folders
from pe_dpo.runs.trl_log import read_trl_log

T = TypeVar("T", bound=Table)

PAIRS_FILE, ANSWERS_FILE = "eval_pairs.parquet", "generations.parquet"

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
    runs: list[Path] = []
    peers: list[Observation] = []
    remarks: list[str] = []
    for target in map(Path, targets):
        if (target / SWEEP_FILE).is_file():
            runs += _runs_of_sweep(target, remarks)
        elif (target / RUN_FILE).is_file():
            runs.append(target)
        else:
            peers.append(_of_trl(target))
    runs = list({run.resolve(): run for run in reversed(runs)}.values())[::-1]  # each once
    base = _base_recipe(Path(targets[0]), runs) if runs else None
    observations, records = [], []
    for run in runs:
        assert base is not None
        record = read_object(run / RUN_FILE)
        if record.get("status") != "finished":
            raise UsageError(
                f"{run}: is not finished (status {record.get('status')}); finish it with "
                f"pe-dpo train {run / RECIPE_FILE} --resume, or leave it out"
            )
        found = list(_observations_of_run(run, record, base, remarks))
        records.append((run, record, found[0]))
        observations += found
    _check_comparable(records)
    remarks += _remarks_on_training(records)
    return Observations(_with_own_names(observations) + peers, base, remarks)


def _of_trl(target: Path) -> Observation:
    name, step, logged = read_trl_log(target)
    return Observation({"run": f"TRL {name}"}, 0, step, True, str(target), None, None, logged, None, source="trl")


def _runs_of_sweep(folder: Path, remarks: list[str]) -> list[Path]:
    plan = read_object(folder / SWEEP_FILE)
    try:
        points = [folder / point["folder"] for point in plan["points"]]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder / SWEEP_FILE}: is not the plan of a sweep ({error}); restore the file") from error
    finished = [path for path in points if _is_finished(path)]
    if not finished:
        raise UsageError(f"{folder}: no run of this sweep is finished; start the same `pe-dpo sweep` again to go on with it")
    if len(finished) < len(points):
        remarks.append(f"{folder}: {len(points) - len(finished)} of {len(points)} runs are not finished and are left out")
    return finished


def _is_finished(run: Path) -> bool:
    return (run / RUN_FILE).is_file() and read_object(run / RUN_FILE).get("status") == "finished"


def _base_recipe(first: Path, runs: Sequence[Path]) -> Recipe:
    folder = first if (first / SWEEP_FILE).is_file() else runs[0]
    recipe = _read_recipe(folder / RECIPE_FILE)
    loss = recipe.loss.model_copy(update={"gamma": _asked_gamma(recipe, read_object(folder / RUN_FILE))})
    return recipe.model_copy(update={"loss": loss})


def _read_recipe(path: Path) -> Recipe:
    try:
        return recipe_from_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error}; it is part of every run") from error


class _State(NamedTuple):
    """A state of a run that was measured, and the folder in which it lies."""

    step: int
    scale: float | None
    place: Path


def _observations_of_run(run: Path, record: Mapping[str, Any], base: Recipe, remarks: list[str]) -> Iterator[Observation]:
    """The end of a run, its snapshots, its end at other scales; those that were not measured as the end was are left out."""
    recipe = _read_recipe(run / RECIPE_FILE)
    kappa = (record.get("loss") or {}).get("kappa")
    settings = _dials(base, recipe, _asked_gamma(recipe, record), kappa)
    end, limit, left_out = None, _limit(run), []
    for state in _states(run, int(record.get("step", 0))):
        step, scale, place = state
        logged = record.get("after") or {} if place == run else read_evaluation(place)["pairs"]
        one = Observation(
            settings=settings,
            seed=recipe.train.seed,
            step=step,
            is_final=place == run,
            run=str(run),
            pairs=_read(PairTable, place / PAIRS_FILE),
            answers=_read(AnswerTable, place / ANSWERS_FILE),
            logged={key: float(value) for key, value in logged.items()},
            kappa=kappa,
            scale=scale,
        )
        end = end or one
        if _names(one) == _names(end) and (limit is None or _limit(place) in (None, limit)):
            yield one
        else:
            left_out.append(state)
    remarks += _left_out_words(run, left_out)


def _states(run: Path, last: int) -> Iterator[_State]:
    """The end of a run first."""
    yield _State(last, None, run)
    seen = {last}
    for path in sorted(run.glob("snapshots/step-*")):
        number = path.name.removeprefix("step-")
        if number.isdigit() and int(number) not in seen:
            seen.add(int(number))
            yield _State(int(number), None, path)
    yield from (_State(last, scale, path) for scale, path in scaled_folders(run).items())


def _left_out_words(run: Path, states: Sequence[_State]) -> list[str]:
    """How many states of a run were measured otherwise than its end, and what to do where that helps."""
    why = "measured on other pairs than its end is now, or with answers cut at another length, and"
    snapshots = [state for state in states if state.scale is None]
    scales = [f"{state.scale:g}" for state in states if state.scale is not None]
    found = [f"{run}: {len(snapshots)} snapshots were {why} are left out"] if snapshots else []
    if scales:
        found.append(f"{run}: its adapter scaled to {', '.join(scales)} was {why} is left out; {remedy(run, scales)}")
    return found


def _read(kind: type[T], path: Path) -> T | None:
    """The numbers of a table, in an order that is the same in all runs."""
    table = kind.load(path, remedy=remedy(path.parent), with_texts=False)
    return table and table.in_order()


def _names(one: Observation) -> object:
    return one.pairs and _rows(one.pairs)


def _rows(table: PairTable) -> list[tuple[str, str]]:
    return list(zip(table.prompt_key, table.where, strict=True))


def _limit(place: Path) -> int | None:
    """After how many tokens the answers there were cut."""
    limit: int | None = read_evaluation(place)["generation"].get("max_new_tokens")
    return limit


def _asked_gamma(recipe: Recipe, record: Mapping[str, Any]) -> float | str:
    """γ as a run was asked for it: one that it found by itself is a number in its recipe by now."""
    asked: float | str = (record.get("gamma_calibration") or {}).get("asked", recipe.loss.gamma)
    return asked


def _dials(base: Recipe, recipe: Recipe, gamma: float | str, kappa: float | None) -> dict[str, Any]:
    """What a run turns away from the base; γ counts as a multiple of β, so that turning β alone leaves it where it is."""
    settings = {key: now for key, (_, now) in changed_settings(base, recipe).items() if not _is_no_dial(key)}
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


def _check_comparable(records: Sequence[tuple[Path, Mapping[str, Any], Observation]]) -> None:
    """Check that runs have the same base and held-out pairs, and answers of the same length at most.

    Raises:
        UsageError: they have not.
    """
    if not records:
        return
    first, record, observation = records[0]
    for folder, other, observed in records[1:]:
        for key, words, advice in (
            ("base", "another base", "compare runs from one base"),
            ("held_out", "other held-out pairs", "name them once with data.eval, or measure both on the same with pe-dpo eval"),
        ):
            hashes = [(one.get("hashes") or {}).get(key) for one in (record, other)]
            if hashes[0] != hashes[1] and None not in hashes:
                raise UsageError(f"{folder}: has {words} than {first}, so that differences are not paired; {advice}")
        if observation.pairs and observed.pairs:
            _check_same_rows(first, observation.pairs, folder, observed.pairs)
    limits: dict[Any, Path] = {}
    for folder, _, _ in records:
        limit = _limit(folder)
        if limit is not None:
            limits.setdefault(limit, folder)
    if len(limits) > 1:
        (one, here), (two, there), *_ = limits.items()
        raise UsageError(
            f"{there}: answers are cut after {two} tokens, those of {here} after {one}, so that their KL are different "
            "quantities; sample one of them again with pe-dpo eval"
        )


def _remarks_on_training(records: Sequence[tuple[Path, Mapping[str, Any], Observation]]) -> list[str]:
    """Whether all runs learned from the same pairs: a file may have changed under its name."""
    hashes = [(folder, (record.get("hashes") or {}).get("data")) for folder, record, _ in records]
    known = [(folder, value) for folder, value in hashes if value is not None]
    others = [folder for folder, value in known if value != known[0][1]]
    if not others:
        return []
    return [f"{others[0]}: was trained on other pairs than {known[0][0]} (so were {len(others)} runs of {len(records)})"]


def _check_same_rows(first: Path, rows: PairTable, folder: Path, others: PairTable) -> None:
    one, two = Counter(_rows(rows)), Counter(_rows(others))
    if one != two:
        raise UsageError(
            f"{folder}: {(two - one).total()} of its {two.total()} held-out pairs are not among the {one.total()} of {first}, "
            f"and {(one - two).total()} of those are missing; runs are compared on the same pairs: name them once with "
            "data.eval"
        )

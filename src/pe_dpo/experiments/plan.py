"""From a recipe and grids to the points of a sweep, written down as sweep.json before anything runs.

--grid gamma=0,0.5x,1x beta=0.05,0.1      every γ with every β
--also "mixout=0.3,0.5 lr=1e-3"           and these, each a change of the recipe itself
--seeds 3                                 each point with train.seed 0, 1, 2
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pe_dpo.disk import write_atomically, write_json
from pe_dpo.errors import RecipeError, RunFolderError, UsageError
from pe_dpo.experiments.contrasts import check_contrasts, contrasts_hash
from pe_dpo.recipe import (
    Recipe,
    changed_settings,
    known_keys,
    load_recipe,
    recipe_difference,
    recipe_from_yaml,
    recipe_to_yaml,
    with_absolute_paths,
)
from pe_dpo.recipe.names import SHORT_NAMES
from pe_dpo.runs.files import SWEEP_FILE, read_object
from pe_dpo.runs.records import SWEEP, check_record
from pe_dpo.runs.run import Run

_OF_THE_RUN = ("output", "train.seed")
"""Keys by which the runs of a point differ from each other."""
_SHARED = ("model", "data")
"""Sections that a sweep has once: one base, one set of pairs."""


class Point(NamedTuple):
    """One run of a sweep."""

    name: str
    """In what the run differs from the base recipe, in short; "base" for nothing."""
    settings: dict[str, Any]
    """Dotted recipe key → value, where it differs from the base recipe."""
    seed: int
    folder: str
    """Of the run, relative to the sweep's."""


class SweepPlan(NamedTuple):
    """What a sweep is going to run."""

    folder: Path
    recipe: Recipe
    """Of which every point changes something."""
    grids: list[str]
    """As they were asked for."""
    seeds: list[int]
    points: list[Point]
    recipes: list[Recipe]
    """Of the points, in their order; `output` is the run's folder."""
    contrasts: dict[str, int] = {}  # noqa: RUF012 (never written to)
    """The questions that the sweep is run for, see `contrasts`: how many of its runs were finished when each was named."""
    late_seeds: dict[int, int] = {}  # noqa: RUF012
    """Seeds that were added after runs had finished: how many had."""

    @property
    def contrasts_sha256(self) -> str:
        """The hash of its contrasts, as sweep.json keeps it."""
        return contrasts_hash(self.contrasts)


def make_plan(
    source: str | Path,
    grids: Sequence[Sequence[str]],
    *,
    folder: str | Path | None = None,
    overrides: Iterable[str] = (),
    seeds: Sequence[int] = (0,),
    dropout_control: bool = False,
    contrasts: Sequence[str] = (),
) -> SweepPlan:
    """Return the points of a sweep, each checked as a recipe; nothing is written.

    Args:
        source: path or name of the recipe.
        grids: each a list of "key=value,value": the product of its keys; several are joined. A key is a short name (beta,
            gamma, mixout, lr, …) or a dotted key of the recipe.
        folder: of the sweep; by default the recipe's output with "-sweep".
        overrides: "section.key=value" for every point.
        seeds: values of train.seed.
        dropout_control: for every point with mixout a twin with `adapter.dropout` of the same size instead.
        contrasts: what will be tested, in words; see `contrasts.read_contrast`. Points that lie in the folder already count.

    Raises:
        RecipeError: a key or value that cannot be, or points that cannot be trained, all of them listed.
        UsageError: a grid changes what a sweep shares: base, data or output; or a contrast has no points.
    """
    overrides = list(overrides)
    base = with_absolute_paths(load_recipe(source, overrides))
    _check_seeds(base, seeds)
    place = Path(folder or f"{base.output}-sweep")
    combinations = [changes for grid in grids or [[]] for changes in _product(grid)]
    found: dict[str, Point] = {}
    recipes: list[Recipe] = []
    faults: list[str] = []

    def read(changes: list[str]) -> Recipe | None:
        try:
            return with_absolute_paths(load_recipe(source, [*overrides, *changes]))
        except RecipeError as error:
            faults.append(f"{' '.join(changes)}: {error}")
            return None

    wanted = [(changes, read(changes)) for changes in combinations]
    twins = [  # with dropout on the adapter's input, a new mask for every token, instead of mixout
        [*changes, f"adapter.dropout={point.mixout.p!r}", "mixout.p=0"]
        for changes, point in wanted
        if dropout_control and point and point.mixout.p
    ]
    short = {key: name for name, key in reversed(SHORT_NAMES.items())}
    for changes, point in [*wanted, *((changes, read(changes)) for changes in twins)]:
        if point is None:
            continue
        settings = {key: now for key, (_, now) in changed_settings(base, point, ignore=_OF_THE_RUN).items()}
        # A name that no other settings have and that is good for a folder: "beta=0.05,gamma=0.5x".
        parts = []
        for key, value in sorted(settings.items()):
            text = f"{value:g}" if isinstance(value, float) else str(value)
            exact = repr(value) if isinstance(value, float) and float(text) != value else text
            parts.append(f"{short.get(key, key)}={exact}")
        name = re.sub(r"[^\w=.,:+-]+", "_", ",".join(parts)) or "base"
        if any(known.name == name for known in found.values()):
            if all(known.settings != settings for known in found.values()):
                faults.append(f"{' '.join(changes)}: its folder would be {name}, as that of another point; make two sweeps")
            continue
        for seed in seeds:
            run = f"runs/{name}/seed-{seed}"
            found[run] = Point(name, settings, seed, run)
            train = point.train.model_copy(update={"seed": seed})
            recipes.append(point.model_copy(update={"output": str(place / run), "train": train}))
    if faults:
        raise RecipeError("some points of the grid cannot be trained:\n" + "\n".join(faults))
    there = read_plan(place).recipes if contrasts and (place / SWEEP_FILE).is_file() else []
    named = dict.fromkeys(check_contrasts(contrasts, [*there, *recipes], base), 0)
    grids_in_words = [" ".join(grid) for grid in grids]
    return SweepPlan(place, base, grids_in_words, list(seeds), list(found.values()), recipes, named)


def _check_seeds(recipe: Recipe, seeds: Sequence[int]) -> None:
    if len(seeds) > 1 and None not in [getattr(recipe.train.seeds, what) for what in ("order", "adapter", "masks")]:
        raise UsageError(
            "`seeds` counts train.seed up, and train.seeds says order, adapter and masks already, so that all runs of a point "
            "would be one run; leave what is to vary out of train.seeds"
        )


def joined_plan(plan: SweepPlan) -> SweepPlan:
    """Return a plan with the points, seeds and contrasts of the sweep that its folder holds already; nothing is written.

    Raises:
        RunFolderError: the folder holds something else, or a sweep from another recipe.
    """
    if (plan.folder / SWEEP_FILE).is_file():
        old = read_plan(plan.folder)
        difference = recipe_difference(old.recipe, plan.recipe, ignore=["output"])
        if difference:
            raise RunFolderError(
                f"{plan.folder}: holds a sweep that started from another recipe; use the old one, or another `folder`:\n  "
                + "\n  ".join(difference)
            )
        known = {point.folder for point in plan.points}
        finished = sum(Run(plan.folder / point.folder).info.is_finished for point in old.points)
        late = {seed: finished for seed in plan.seeds if finished and seed not in old.seeds}
        kept = [pair for pair in zip(old.points, old.recipes, strict=True) if pair[0].folder not in known]
        return plan._replace(
            grids=[*old.grids, *(grid for grid in plan.grids if grid not in old.grids)],
            seeds=sorted({*old.seeds, *plan.seeds}),
            points=[*(point for point, _ in kept), *plan.points],
            recipes=[*(recipe for _, recipe in kept), *plan.recipes],
            contrasts={**old.contrasts, **{text: finished for text in plan.contrasts if text not in old.contrasts}},
            late_seeds={**old.late_seeds, **late},
        )
    if plan.folder.is_dir() and {path.name for path in plan.folder.iterdir()} - {".lock", "recipe.yaml"}:
        raise RunFolderError(f"{plan.folder}: is not empty and not a sweep of pe-dpo; choose another `folder`")
    return plan


def save_plan(plan: SweepPlan) -> SweepPlan:
    """Write sweep.json and recipe.yaml of the whole plan, see `joined_plan`, and return it."""
    plan = joined_plan(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.folder / "recipe.yaml", recipe_to_yaml(plan.recipe))
    content: dict[str, Any] = {
        "grids": plan.grids,
        "seeds": plan.seeds,
        "points": [point._asdict() for point in plan.points],
    }
    if plan.contrasts:
        content["contrasts"] = [{"contrast": text, "after": finished} for text, finished in plan.contrasts.items()]
        content["contrasts_sha256"] = plan.contrasts_sha256
    if plan.late_seeds:
        content["late_seeds"] = [{"seed": seed, "after": finished} for seed, finished in plan.late_seeds.items()]
    write_json(plan.folder / SWEEP_FILE, content)
    return plan


def read_plan(folder: str | Path) -> SweepPlan:
    """Return the plan of a sweep's folder.

    Raises:
        UsageError: there is no readable sweep.
    """
    folder = Path(folder)
    content = read_object(folder / SWEEP_FILE)
    check_record(SWEEP, content or None, folder / SWEEP_FILE, remedy="restore the file, or move the folder away")
    try:
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder / 'recipe.yaml'}: cannot be read: {error}; restore the file, or move the folder away"
        ) from error
    points = [Point(*(entry[key] for key in Point._fields)) for entry in content["points"]]
    grids, seeds = content["grids"], content["seeds"]
    changes = [{**point.settings, "train.seed": point.seed, "output": str(folder / point.folder)} for point in points]
    recipe = recipe_from_yaml(text, str(folder / "recipe.yaml"))
    overrides = ([f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in one.items()] for one in changes)
    recipes = [recipe_from_yaml(text, str(folder / "recipe.yaml"), one) for one in overrides]
    contrasts = {entry["contrast"]: entry["after"] for entry in content.get("contrasts", [])}
    late = {entry["seed"]: entry["after"] for entry in content.get("late_seeds", [])}
    return SweepPlan(folder, recipe, grids, seeds, points, recipes, contrasts, late)


def _product(grid: Sequence[str]) -> list[list[str]]:
    """["gamma=0,1x", "beta=0.1"] → [["loss.gamma=0", "loss.beta=0.1"], ["loss.gamma=1x", "loss.beta=0.1"]]."""
    axes: dict[str, list[str]] = {}
    for entry in grid:
        name, equals, values = entry.partition("=")
        key = SHORT_NAMES.get(name.strip(), name.strip())
        if not equals or not values.strip():
            raise UsageError(f"`grids` {entry}: write it as key=value,value, for example gamma=0,0.5x,1x")
        if key not in known_keys():
            whole = next((one for one in known_keys() if one.endswith(f".{key}")), None)
            meant = f"; did you mean {whole}?" if whole else ""
            names = ", ".join(SHORT_NAMES)
            raise UsageError(
                f"`grids` {entry}: {name} is neither a hyperparameter ({names}) nor a dotted key of a recipe{meant}"
            )
        if key in _OF_THE_RUN:
            raise UsageError(f"`grids` {entry}: {name} is set by the sweep itself; seeds are named with `seeds`")
        if key.split(".")[0] in _SHARED or key == "train.seeds.data":
            raise UsageError(f"`grids` {entry}: a sweep has one base and one set of pairs; make a sweep for each {key}")
        if key in axes:
            raise UsageError(f"`grids` {' '.join(grid)}: {key} is there twice; name all of its values once, as {name}=A,B")
        axes[key] = [f"{key}={value.strip()}" for value in values.split(",")]
    return [list(changes) for changes in itertools.product(*axes.values())]

"""Contrasts: the few questions that a sweep is run for, named in words before it is run, tested by themselves.

    mixout                               every p of mixout, with the rest of the base recipe: minus the β line at equal KL
    mixout=0.3,0.5 against beta          these p alone
    gamma=0 mixout against gamma=0 beta  both with γ = 0: the line is made of its values of β
    gamma=0 against base within 2        minus the base recipe, each at its own KL; 2 points count as no difference

Points are named as in a grid: a key alone stands for all of its values, several keys for their product. A contrast is the mean
over its points, seed by seed. Right of "against" a key alone makes a line of equal KL; points with values are compared as they
are. Contrasts are kept in sweep.json with their hash, with what was finished when they were named.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_dpo.errors import RecipeError, UsageError
from pe_dpo.experiments.comparison import FREE_CONTROLS, Comparison, Method, NamedContrast
from pe_dpo.experiments.resampled import Differences, Resampled, Setting
from pe_dpo.experiments.summary import counted, hyperparameter_name, listed, setting_name
from pe_dpo.metrics.bootstrap import Effect, mean_effect, tested_together, without_lone_seeds
from pe_dpo.metrics.catalogue import Metric
from pe_dpo.recipe import Recipe, known_keys, recipe_from_yaml, recipe_to_yaml
from pe_dpo.recipe.names import SHORT_NAMES
from pe_dpo.runs.files import SWEEP_FILE, read_object
from pe_dpo.runs.observations import settings_between
from pe_dpo.runs.records import SWEEP, check_record


class Side(NamedTuple):
    """Points on one side of a contrast."""

    values: dict[str, list[str]]
    """Dotted key, or step, or scale: the values that were named."""
    free: list[str]
    """Keys of which every value counts."""

    @property
    def words(self) -> str:
        """As it may be written: "mixout.p=0.3,0.5 loss.beta", or "base"."""
        return " ".join([*(f"{key}={','.join(values)}" for key, values in self.values.items()), *self.free]) or "base"

    @property
    def points(self) -> tuple[object, ...]:
        """What it names, whatever the order and the way in which numbers are written."""

        def plain(value: str) -> str:
            try:
                return repr(float(value))
            except ValueError:
                return value

        return {key: {*map(plain, values)} for key, values in self.values.items()}, {*self.free}


class Contrast(NamedTuple):
    """A question in words."""

    text: str
    """As it was asked, with single spaces."""
    left: Side
    right: Side
    within: float
    """Points, or units of the metric, that count as no difference; NaN where equivalence is not asked."""

    after: int | None = None
    """Runs of the sweep that were finished when it was named; None where no sweep carries it."""

    @property
    def is_at_equal_kl(self) -> bool:
        """Whether the right side is a line of equal KL."""
        return bool(self.right.free)

    def joined(self, other: "Contrast") -> "Contrast | None":
        """Return the one question that both ask; None where they are two, of other points or of another size.

        Where one of two plans says how much counts as no difference, both are taken to mean that; it cannot be added to a plan
        when runs are compared.
        """
        if (self.left.points, self.right.points) != (other.left.points, other.right.points):
            return None
        if self.within == other.within or math.isnan(other.within):
            asked = self
        elif math.isnan(self.within) and (self.after is None) == (other.after is None):
            asked = other
        else:
            return None
        known = [one.after for one in (self, other) if one.after is not None]
        return asked._replace(after=max(known, default=None))


def read_contrast(text: str) -> Contrast:
    """Return a contrast from its words; see the top of the file.

    Raises:
        UsageError: it cannot be read, or names a key that no recipe has.
    """
    where, text = f"`contrasts` {text.strip()!r}", " ".join(text.split())
    found = re.fullmatch(r"(?P<left>.+?)(?: against (?P<right>.+?))?(?: within (?P<within>\S+))?", text)
    if not found:
        raise UsageError(f"{where}: is empty; name points and what they are held against, as `mixout against beta within 2`")
    within = math.nan
    if found["within"] is not None:
        try:
            within = float(found["within"])
        except ValueError:
            within = -1
        if not 0 < within < math.inf:
            raise UsageError(f"{where}: within {found['within']} is no size; write a number above 0, as `within 2`")
    left, right = (_read_side(words, where) for words in (found["left"], found["right"] or "beta"))
    if len(right.free) > 1:
        raise UsageError(f"{where}: a line of equal KL is made of the values of one key; give values to all others")
    return Contrast(text, left, right, within)


def _read_side(words: str, where: str) -> Side:
    values: dict[str, list[str]] = {}
    free: list[str] = []
    for word in [] if words == "base" else words.split(" "):
        name, equals, text = word.partition("=")
        key = SHORT_NAMES.get(name, name)
        if key not in (*FREE_CONTROLS, *known_keys()):
            raise UsageError(
                f"{where}: {name} is neither base, {', '.join(FREE_CONTROLS)}, a hyperparameter ({', '.join(SHORT_NAMES)}) nor "
                "a dotted key of a recipe"
            )
        if key in (*values, *free):
            raise UsageError(f"{where}: {name} is there twice on one side; name all of its values once, as {name}=A,B")
        named = [value for value in text.split(",") if value]
        if equals and not named:
            raise UsageError(f"{where}: {word} names no value; write {name}=A,B, or {name} alone for all values")
        if equals:
            values[key] = named
        else:
            free.append(key)
    return Side(values, free)


def matching(side: Side, settings: Sequence[Mapping[str, Any]], base: Recipe, *, is_line: bool = False) -> list[int]:
    """Return which settings belong to a side of a contrast.

    Args:
        side: of which.
        settings: of every arm, as observations have them.
        base: the recipe that these are turned away from: a value that is its own changes nothing.
        is_line: whether the point at which a free key has the base recipe's value belongs to them too.

    Raises:
        UsageError: the recipe cannot have such a value.
    """
    text = recipe_to_yaml(base)
    wanted: list[dict[str, Any]] = []
    for combination in itertools.product(*side.values.values()):
        named = dict(zip(side.values, combination, strict=True))
        free_controls = {key: _number(value, key) for key, value in named.items() if key in FREE_CONTROLS}
        overrides = [f"{key}={value}" for key, value in named.items() if key not in FREE_CONTROLS]
        try:
            wanted.append(settings_between(base, recipe_from_yaml(text, "the base recipe", overrides)) | free_controls)
        except RecipeError as error:
            raise UsageError(f"`contrasts` {' '.join(overrides)}: {error}") from error
    found = []
    for index, one in enumerate(settings):
        fixed = {key: value for key, value in one.items() if key not in side.free}
        turned = [key for key in side.free if key in one]
        if fixed in wanted and (len(turned) == len(side.free) or is_line):
            found.append(index)
    return found


def _number(text: str, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"`contrasts` {key}={text}: {text} is no number") from None


def check_contrasts(texts: Sequence[str], points: Sequence[Recipe], base: Recipe) -> list[str]:
    """Return contrasts in their plain form, each once, after checking that a plan has points for them.

    Args:
        texts: as they were asked.
        points: of the plan.
        base: recipe of the plan.

    Raises:
        UsageError: one cannot be read, or the plan has no point of one of its sides, or its left side lies in the right one.
    """
    found: dict[str, None] = {}
    settings = [settings_between(base, point) for point in points]
    for text in texts:
        contrast = read_contrast(text)
        found[contrast.text] = None
        sides = []
        for side, is_line in ((contrast.left, False), (contrast.right, contrast.is_at_equal_kl)):
            if any(key in FREE_CONTROLS for key in (*side.values, *side.free)):
                continue  # made from runs that are there, by snapshots or scaling
            matched = {repr(settings[index]) for index in matching(side, settings, base, is_line=is_line)}
            if len(matched) < 1 + is_line:
                what = f"{'two points for the line' if is_line else 'point'} of {side.words}"
                raise UsageError(f"`contrasts` {contrast.text}: the plan has no {what}; add them to the grids, or name others")
            sides.append(matched)
        if len(sides) == 2 and sides[0] <= sides[1]:
            raise UsageError(f"`contrasts` {contrast.text}: {_overlap(contrast)}; name what is to be held against others")
    return list(found)


def contrasts_hash(contrasts: Mapping[str, int]) -> str:
    """Return a hash of the contrasts that were named before any run had finished: SHA-256 of their JSON.

    Args:
        contrasts: and how many runs had finished when each was named.
    """
    first = [text for text, finished in contrasts.items() if not finished]
    return hashlib.sha256(json.dumps(first, ensure_ascii=False).encode()).hexdigest()


def named_contrasts(targets: Sequence[str | Path], given: Sequence[str] = ()) -> tuple[list[Contrast], list[str]]:
    """Return the contrasts that sweeps carry and those that are given, each once, and what is to be known of their plans.

    Those that name the same points are one, in whatever words, see `Contrast.joined`.

    Args:
        targets: of a comparison.
        given: for this comparison.

    Raises:
        UsageError: one cannot be read, or sweep.json cannot.
    """
    found: list[Contrast] = []
    remarks = []
    for path in (Path(target) / SWEEP_FILE for target in targets):
        content = read_object(path) if path.is_file() else {}
        if content:
            check_record(SWEEP, content, path, remedy="restore the file")
        asked = {entry["contrast"]: entry["after"] for entry in content.get("contrasts", [])}
        if asked and content.get("contrasts_sha256") != contrasts_hash(asked):
            remarks.append(f"{path}: its contrasts are not those of its hash; they were changed after they had been named")
        for text, after in asked.items():
            _ask(found, read_contrast(text)._replace(after=after))
        late: dict[int, list[int]] = {}
        for entry in content.get("late_seeds", []):
            late.setdefault(entry["after"], []).append(entry["seed"])
        for after, seeds in late.items():
            one = len(seeds) == 1
            remarks.append(
                f"{path.parent}: {'seed' if one else 'seeds'} {listed(list(map(str, seeds)))} {'was' if one else 'were'} added "
                f"after {counted(after, 'run')} had finished; a look before that decision makes p smaller than they are"
            )
    for contrast in map(read_contrast, given):
        _ask(found, contrast)
    return found, remarks


def _ask(asked: list[Contrast], contrast: Contrast) -> None:
    """Add a question to others; one that is asked already is joined with that."""
    for at, known in enumerate(asked):
        if joined := known.joined(contrast):
            asked[at] = joined
            return
    asked.append(contrast)


def find_contrasts(
    resampled: Resampled, settings: Sequence[Setting], contrasts: Sequence[Contrast], base: Recipe, method: Method
) -> list[NamedContrast]:
    """Return what contrasts come to, tested together: each the mean over its points, seed by seed.

    A point counts if it can be compared in every seed that the contrast counts, so that all seeds have the same points: of all
    such blocks of points and seeds the largest, of several seeds where any is.

    Args:
        resampled: all observations.
        settings: of them.
        contrasts: to be told about.
        base: the recipe that settings are turned away from.
        method: how differences are tested.

    Raises:
        UsageError: a contrast names values that the recipe cannot have.
    """
    turned = [one.settings for one in settings]
    names = [setting_name(one) for one in turned]
    found: list[NamedContrast] = []
    for contrast in contrasts:
        right = matching(contrast.right, turned, base, is_line=contrast.is_at_equal_kl)
        named = matching(contrast.left, turned, base)
        left = [index for index in named if index not in right]
        lacking = "" if left and right else _overlap(contrast)
        for side, there in ((contrast.left, named), (contrast.right, right)):
            lacking = lacking if there else f"no run that is compared is a point of {side.words}"
        line = [settings[index] for index in right]
        cells: list[tuple[set[int], Differences]] = []  # each of points, and what they differ by
        if contrast.is_at_equal_kl:
            cells = [({index}, resampled.against_line(settings[index], line)) for index in left if line]
        else:
            cells = [({index, other}, resampled.against(settings[index], settings[other])) for index in left for other in right]
        at, seeds = largest_block([set(one.seeds) for _, one in cells])
        counted = {index for cell in at for index in cells[cell][0]}
        points = [names[index] for index in left if index in counted]
        left_out = [names[index] for index in left if index not in counted]
        left_out += [f"{names[index]} on both sides" for index in named if index in right]
        if points and not contrast.is_at_equal_kl:
            left_out += [f"{names[index]} on the right" for index in right if index not in counted]
        found.append(
            NamedContrast(
                text=contrast.text,
                name=_words(contrast, points),
                points=points,
                left_out=left_out,
                is_at_equal_kl=contrast.is_at_equal_kl,
                effect=resampled.effect(_mean([cells[cell][1] for cell in at], seeds), confidence=method.confidence),
                after=contrast.after,
                lacking=lacking,
            )
        )
    return _tested([one.effect for one in found], found, contrasts, resampled.metric, method)


def _mean(parts: Sequence[Differences], seeds: Sequence[int]) -> Differences | None:
    """The mean of differences, all of which are known in these seeds."""
    if not parts:
        return None
    at = [[one.seeds.index(seed) for seed in seeds] for one in parts]
    observed = np.mean([one.observed[columns] for one, columns in zip(parts, at, strict=True)], axis=0)
    replicates = np.mean([one.replicates[:, columns] for one, columns in zip(parts, at, strict=True)], axis=0)
    return Differences(list(seeds), observed, replicates, len(seeds))


def _tested(
    effects: Sequence[Effect | None],
    found: Sequence[NamedContrast],
    contrasts: Sequence[Contrast],
    metric: Metric[Any],
    method: Method,
) -> list[NamedContrast]:
    margins = [method.margin(metric, one.within) for one in contrasts]
    tested = tested_together(effects, confidence=method.confidence, margins=margins)
    return [replace(one, effect=effect) for one, effect in zip(found, tested, strict=True)]


def _overlap(contrast: Contrast) -> str:
    return f"all points of {contrast.left.words} are points of {contrast.right.words} too, on its right"


def _words(contrast: Contrast, points: Sequence[str]) -> str:
    left = points[0] if len(points) == 1 else _side_words(contrast.left)
    left += f" (mean of {len(points)} points)" if len(points) > 1 else ""
    return f"{left} minus {_side_words(contrast.right)}{' at equal KL' if contrast.is_at_equal_kl else ''}"


def _side_words(side: Side) -> str:
    """A side in words: "mixout = 0.3, 0.5 with γ = 0"."""
    fixed = []
    for key, values in side.values.items():
        if key == "loss.gamma":
            values = ["β" if value == "1x" else re.sub(r"x$", "β", value) for value in values]
        fixed.append(f"{hyperparameter_name(key)} = {', '.join(values)}")
    return " with ".join([*map(hyperparameter_name, side.free), *fixed]) or "the base recipe"


def over_data_sets(
    found: Mapping[str, Comparison], contrasts: Sequence[Contrast], metric: Metric[Any], method: Method
) -> list[NamedContrast]:
    """Return contrasts averaged over data sets, each of which counts alike, and tested together.

    A data set in which a contrast rests on one seed, or on nothing, does not count where others have several.

    Args:
        found: by the name of the data set.
        contrasts: that were asked for in each.
        metric: on which all are.
        method: how differences are tested.
    """
    pooled = []
    for number, contrast in enumerate(contrasts):
        in_each = {name: other.contrasts[number] for name, other in found.items() if other.contrasts}
        effects = {
            name: one.effect and replace(one.effect, p_adjusted=math.nan, p_equivalent_adjusted=math.nan)
            for name, one in in_each.items()
        }
        several = any(one is not None and not one.errors.is_of_one_seed for one in effects.values())
        counted = {name: one for name, one in effects.items() if one and not (several and one.errors.is_of_one_seed)}
        points = list(dict.fromkeys(point for name in counted for point in in_each[name].points))
        lacking = [f"on {name} {one.lacking}" for name, one in in_each.items() if one.lacking]
        pooled.append(
            NamedContrast(
                text=contrast.text,
                name=_words(contrast, points),
                points=points,
                left_out=[f"all points on {name}" for name in found if name not in counted]
                + [f"{point} on {name}" for name in counted for point in in_each[name].left_out],
                is_at_equal_kl=contrast.is_at_equal_kl,
                effect=mean_effect(list(counted.values()), confidence=method.confidence) if counted else None,
                after=contrast.after,
                lacking="; ".join(lacking) if len(lacking) == len(in_each) else "",
                by_data_set=dict(zip(effects, without_lone_seeds(list(effects.values())), strict=True)),
                data_sets=len(counted),
            )
        )
    return _tested([one.effect for one in pooled], pooled, contrasts, metric, method)


def largest_block(has: Sequence[set[int]]) -> tuple[list[int], list[int]]:
    """Return which points and which seeds to average over, so that every seed has the same points.

    Of all blocks without a hole the one with the most cells, but of several seeds wherever there is one: a single seed makes no
    test. Of equal ones that with more seeds.

    Args:
        has: of each point, the seeds in which it could be compared.
    """
    shared: set[frozenset[int]] = set()
    for one in map(frozenset, has):
        shared |= {one, *(one & other for other in shared)}
    best: tuple[tuple[bool, int, int], list[int], list[int]] = ((False, 0, 0), [], [])
    for seeds in sorted(map(sorted, filter(None, shared))):
        points = [index for index, one in enumerate(has) if one.issuperset(seeds)]
        best = max(best, ((len(seeds) > 1, len(seeds) * len(points), len(seeds)), points, seeds), key=lambda block: block[0])
    return best[1], best[2]

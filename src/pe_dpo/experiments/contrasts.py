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
from pe_dpo.experiments.comparison import FREE_CONTROLS, Comparison, NamedContrast
from pe_dpo.experiments.resampled import Resampled, Setting
from pe_dpo.experiments.summary import counted, hyperparameter_name, listed, setting_name
from pe_dpo.metrics.bootstrap import effect, mean_effect, tested_together
from pe_dpo.metrics.catalogue import METRICS, Metric
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

    def margin(self, equivalent: float | None, metric: Metric[Any]) -> float:
        """Return what counts as no difference, in units of the metric; NaN where nothing does."""
        points = (math.nan if equivalent is None else equivalent) if math.isnan(self.within) else self.within
        return points / 100 if metric.is_share else points


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
        UsageError: one cannot be read, or the plan has no point of one of its sides.
    """
    found: dict[str, None] = {}
    settings = [settings_between(base, point) for point in points]
    for text in texts:
        contrast = read_contrast(text)
        found[contrast.text] = None
        for side, is_line in ((contrast.left, False), (contrast.right, contrast.is_at_equal_kl)):
            if any(key in FREE_CONTROLS for key in (*side.values, *side.free)):
                continue  # made from runs that are there, by snapshots or scaling
            matched = {repr(settings[index]) for index in matching(side, settings, base, is_line=is_line)}
            if len(matched) < 1 + is_line:
                what = "two points for the line" if is_line else "point"
                words = " ".join([*(f"{key}={','.join(value)}" for key, value in side.values.items()), *side.free]) or "base"
                raise UsageError(
                    f"`contrasts` {contrast.text}: the plan has no {what} of {words}; add them to the grids, or name others"
                )
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

    Args:
        targets: of a comparison.
        given: for this comparison.

    Raises:
        UsageError: one cannot be read, or sweep.json cannot.
    """
    found: dict[str, Contrast] = {}
    remarks = []
    for path in (Path(target) / SWEEP_FILE for target in targets):
        content = read_object(path) if path.is_file() else {}
        if content:
            check_record(SWEEP, content, path, remedy="restore the file")
        asked = {entry["contrast"]: entry["after"] for entry in content.get("contrasts", [])}
        if asked and content.get("contrasts_sha256") != contrasts_hash(asked):
            remarks.append(f"{path}: its contrasts are not those of its hash; they were changed after they had been named")
        for text, after in asked.items():
            contrast = read_contrast(text)._replace(after=after)
            known = found.setdefault(contrast.text, contrast)
            found[contrast.text] = max(known, contrast, key=lambda one: one.after or 0)
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
        found.setdefault(contrast.text, contrast)
    return list(found.values()), remarks


def find_contrasts(
    resampled: Resampled,
    settings: Sequence[Setting],
    contrasts: Sequence[Contrast],
    base: Recipe,
    *,
    metric: Metric[Any],
    confidence: float,
    equivalent: float | None = None,
) -> list[NamedContrast]:
    """Return what contrasts come to, tested together: each the mean over its points, seed by seed.

    A point counts if it can be compared in every seed that the contrast counts, so that all seeds have the same points: of all
    such blocks of points and seeds the largest.

    Args:
        resampled: all observations.
        settings: of them.
        contrasts: to be told about.
        base: the recipe that settings are turned away from.
        metric: that was measured.
        confidence: of intervals.
        equivalent: what counts as no difference, where a contrast does not say it itself.

    Raises:
        UsageError: a contrast names values that the recipe cannot have.
    """
    turned = [one.settings for one in settings]
    rows = len(resampled.observations[0].rows(metric.kind) or ())
    found: list[NamedContrast] = []
    for contrast in contrasts:
        right = matching(contrast.right, turned, base, is_line=contrast.is_at_equal_kl)
        left = [index for index in matching(contrast.left, turned, base) if index not in right]
        line = [settings[index] for index in right]
        if contrast.is_at_equal_kl:
            pairs = [(index, resampled.against_line(settings[index], line)) for index in left if line]
        else:
            pairs = [(index, resampled.against(settings[index], other)) for index in left for other in line]
        points, seeds = largest_block([set(one.seeds) for _, one in pairs])
        counted = list(dict.fromkeys(pairs[point][0] for point in points))
        result = None
        if points:
            at = [[one.seeds.index(seed) for seed in seeds] for _, one in (pairs[point] for point in points)]
            parts = [pairs[point][1] for point in points]
            observed = np.mean([one.observed[columns] for one, columns in zip(parts, at, strict=True)], axis=0)
            replicates = np.mean([one.replicates[:, columns] for one, columns in zip(parts, at, strict=True)], axis=0)
            one_row = 1 / rows if metric.is_share else 0.0
            result = effect(observed, replicates, clusters=resampled.prompts, one_row=one_row, confidence=confidence)
        found.append(
            NamedContrast(
                text=contrast.text,
                name=_words(contrast, [setting_name(turned[index]) for index in counted]),
                points=[setting_name(turned[index]) for index in counted],
                left_out=[setting_name(turned[index]) for index in left if index not in counted],
                is_at_equal_kl=contrast.is_at_equal_kl,
                effect=result,
                after=contrast.after,
            )
        )
    margins = [one.margin(equivalent, metric) for one in contrasts]
    effects = tested_together([one.effect for one in found], confidence=confidence, margins=margins)
    return [replace(one, effect=tested) for one, tested in zip(found, effects, strict=True)]


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
    found: Mapping[str, Comparison], contrasts: Sequence[Contrast], *, equivalent: float | None
) -> list[NamedContrast]:
    """Return contrasts averaged over data sets, each of which counts alike, and tested together.

    A data set in which a contrast rests on one seed, or on nothing, does not count where others have several.

    Args:
        found: by the name of the data set; all on one metric.
        contrasts: that were asked for in each.
        equivalent: see `find_contrasts`.
    """
    first = next(iter(found.values()))
    pooled = []
    for contrast in contrasts:
        in_each = {
            name: one for name, other in found.items() for one in other.contrasts if one.text == contrast.text and one.effect
        }
        effects = {
            name: replace(one.effect, p_adjusted=math.nan, p_equivalent_adjusted=math.nan)
            for name, one in in_each.items()
            if one.effect is not None
        }
        most = max((len(one.per_seed) for one in effects.values()), default=0)
        several = {name: one for name, one in effects.items() if len(one.per_seed) > 1 or most == 1}
        points = list(dict.fromkeys(point for name in several for point in in_each[name].points))
        pooled.append(
            NamedContrast(
                text=contrast.text,
                name=_words(contrast, points),
                points=points,
                left_out=[f"all points on {name}" for name in found if name not in several]
                + [f"{point} on {name}" for name in several for point in in_each[name].left_out],
                is_at_equal_kl=contrast.is_at_equal_kl,
                effect=mean_effect(list(several.values()), confidence=first.confidence) if several else None,
                after=contrast.after,
                by_data_set=effects,
            )
        )
    metric = METRICS[first.metric]
    margins = [one.margin(equivalent, metric) for one in contrasts]
    tested = tested_together([one.effect for one in pooled], confidence=first.confidence, margins=margins)
    return [replace(one, effect=effect) for one, effect in zip(pooled, tested, strict=True)]


def largest_block(has: Sequence[set[int]]) -> tuple[list[int], list[int]]:
    """Return which points and which seeds to average over, so that every seed has the same points.

    Of all blocks without a hole the one with the most cells; of equal ones that with more seeds.

    Args:
        has: of each point, the seeds in which it could be compared.
    """
    best: tuple[int, int, list[int], list[int]] = (0, 0, [], [])
    for seeds in {frozenset(one) for one in has if one}:
        points = [index for index, one in enumerate(has) if seeds <= one]
        best = max(best, (len(seeds) * len(points), len(seeds), points, sorted(seeds)), key=lambda block: block[:2])
    return best[2], best[3]

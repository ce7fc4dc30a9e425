"""From a YAML file and overrides to a checked `Recipe`, and back.

Every error is reported at once: file:line (or the override), the key, what was found, what to do.
"""

import glob
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pe_dpo.disk import matching_paths
from pe_dpo.errors import RecipeError
from pe_dpo.hub import public_name
from pe_dpo.recipe.data_section import DataSource
from pe_dpo.recipe.names import explain_unknown_key, known_keys
from pe_dpo.recipe.schema import Recipe
from pe_dpo.recipe.shipped import find_recipe
from pe_dpo.recipe.strict_yaml import LARGEST, Dumper, KeyPath, parse_document, parse_scalar


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the checked recipe.

    Args:
        source: The path of a YAML file, or the name of a recipe that comes with the package (`pe-dpo recipes list`).
        overrides: "section.key=value" strings, read like YAML; they win over the file.

    Raises:
        RecipeError: It lists every error found, each with file and line (or the override).
    """
    path = find_recipe(source)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source}: cannot be read: {error}") from error
    return recipe_from_yaml(text, str(source), overrides, default_output=f"runs/{path.stem}")


def recipe_from_yaml(text: str, where: str, overrides: Iterable[str] = (), *, default_output: str | None = None) -> Recipe:
    """Return the checked recipe in a text.

    Args:
        text: The YAML.
        where: The name of its file, for messages.
        overrides: As for `load_recipe`.
        default_output: The folder of the run where the text names none.

    Raises:
        RecipeError: As for `load_recipe`.
    """
    values, lines = parse_document(text, where)
    origins: dict[KeyPath, str] = {path: f"{where}:{line}" for path, line in lines.items()}
    for override in overrides:
        _apply_override(values, origins, override)
    if default_output is not None:
        values.setdefault("output", default_output)
    for name, section in list(values.items()):
        if section is None:  # a section header with nothing under it
            values[name] = {}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        found: dict[KeyPath, list[str]] = {}
        for one in error.errors():
            path = _path_in(values, tuple(one["loc"]))
            message = _message(one, path)
            key, colon, rest = message.partition(": ")
            named = (*map(str, path), *key.split("."))
            if colon and ".".join(named) in known_keys():  # an error of a section, or of the whole recipe, that names the key
                path, message = named, rest
            found.setdefault(path, []).append(message)
        lines_found = []
        for path, messages in found.items():
            known = path
            while known not in origins and known:
                known = known[:-1]
            lines_found.append(f"{origins.get(known, where)}: {'.'.join(map(str, path))}: {_in_one(messages)}")
        raise RecipeError("\n".join(lines_found)) from error


def _in_one(messages: list[str]) -> str:
    """Return what is wrong with one value, every form named that it might have had."""
    begins = messages[0].partition("; input should be ")[0]
    forms = [message.partition("; input should be ")[2] for message in messages]
    return f"{begins}; input should be {', or '.join(dict.fromkeys(forms))}" if all(forms) else messages[0]


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with every input that lies on this machine by its absolute path, so that it holds from any folder."""

    def absolute(value: Any) -> Any:
        return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value

    def absolute_data(places: Any) -> Any:
        if isinstance(places, list):
            return [absolute_data(place) for place in places]
        if isinstance(places, DataSource):
            return places.model_copy(update={"path": absolute_data(places.path)})
        if not isinstance(places, str) or not matching_paths(places):
            return places
        if not Path(places).exists():
            return places if Path(places).is_absolute() else f"{glob.escape(str(Path.cwd()))}/{places}"
        path, resolved = Path(places), Path(places).resolve()
        # A file in a hub's cache is a link to one whose name does not say how it is to be read.
        return str(resolved if resolved.suffix == path.suffix else path.parent.resolve() / path.name)

    model = recipe.model.model_copy(update={"base": absolute(recipe.model.base)})
    adapter = recipe.adapter.model_copy(update={key: absolute(getattr(recipe.adapter, key)) for key in ("start", "over")})
    data = recipe.data.model_copy(update={"train": absolute_data(recipe.data.train), "eval": absolute_data(recipe.data.eval)})
    if data.template not in ("auto", "chat", "plain"):
        data = data.model_copy(update={"template": absolute(data.template)})
    return recipe.model_copy(update={"model": model, "adapter": adapter, "data": data})


def far_places(recipe: Recipe) -> list[str]:
    """Return a line for each place that a run writes to and that lies outside of the current folder, resolved: links too."""
    places = {"output": recipe.output, "reference.store": recipe.reference.store}
    here, found = Path.cwd(), {key: Path(place).resolve() for key, place in places.items() if place}
    return [f"{key} lies outside of this folder: {place}" for key, place in found.items() if not place.is_relative_to(here)]


def with_public_names(recipe: Recipe) -> Recipe:
    """Return the recipe as others may read it: of every path of this machine its last part alone, and no place of the store."""

    def data_names(places: Any) -> Any:
        if isinstance(places, list):
            return [data_names(place) for place in places]
        if isinstance(places, DataSource):
            return places.model_copy(update={"path": public_name(places.path)})
        return public_name(places) if isinstance(places, str) else places

    model = recipe.model.model_copy(update={"base": public_name(recipe.model.base)})
    adapters = {key: place and public_name(place) for key in ("start", "over") for place in [getattr(recipe.adapter, key)]}
    data = {key: data_names(getattr(recipe.data, key)) for key in ("train", "eval")}
    if recipe.data.template not in ("auto", "chat", "plain"):
        data["template"] = public_name(recipe.data.template)
    return recipe.model_copy(
        update={
            "model": model,
            "adapter": recipe.adapter.model_copy(update=adapters),
            "data": recipe.data.model_copy(update=data),
            "reference": recipe.reference.model_copy(update={"store": None}),
            "output": Path(recipe.output).name,
        }
    )


def with_gamma(recipe: Recipe, gamma: float) -> Recipe:
    """Return the recipe with the number that a γ to be calibrated came to.

    Raises:
        RecipeError: With this number the recipe contradicts itself (γ = 0 with a floor, say).
    """
    values = recipe.model_dump()
    values["loss"]["gamma"] = gamma
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        found = "; ".join(_message(one, tuple(one["loc"])) for one in error.errors())
        raise RecipeError(f"loss.gamma: {recipe.loss.gamma} came to {gamma:g}, which cannot be used: {found}") from error


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that loads back to an equal recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def changed_settings(old: Recipe, new: Recipe, ignore: Iterable[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of every setting that differs, by dotted name, leaving out the names in `ignore`."""
    before, after = dict(_flat(old.model_dump())), dict(_flat(new.model_dump()))
    ignored = set(ignore)
    both = {key: (before.get(key), after.get(key)) for key in {**before, **after} if key not in ignored}
    return {key: (was, now) for key, (was, now) in both.items() if was != now}


def recipe_difference(old: Recipe, new: Recipe, ignore: Iterable[str] = ()) -> list[str]:
    """Return "section.key: old → new" for every setting that differs, leaving out the dotted names in `ignore`."""
    return [f"{key}: {was!r} → {now!r}" for key, (was, now) in changed_settings(old, new, ignore).items()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in ("data.columns", "data.train", "data.eval"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _apply_override(values: dict[str, Any], origins: dict[KeyPath, str], override: str) -> None:
    key, equals, text = override.partition("=")
    where = f"`overrides` {override}"
    if not equals or not key.strip():
        raise RecipeError(f"{where}: write it as section.key=value, for example loss.gamma=0")
    path = tuple(key.strip().split("."))
    target = values
    for depth, part in enumerate(path[:-1], start=1):
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
            origins[path[:depth]] = where
        if not isinstance(inner, dict):
            raise RecipeError(f"{where}: {part} is not a section")
        target = inner
    target[path[-1]] = parse_scalar(text, where)
    for replaced in [known for known in origins if known[: len(path)] == path]:
        del origins[replaced]
    origins[path] = where


def _path_in(values: Any, location: KeyPath) -> KeyPath:
    """Leave out the names of union members, which pydantic puts into a location; keep a missing key's own name."""
    path: KeyPath = ()
    for at, part in enumerate(location, start=1):
        is_there = part in values if isinstance(values, dict) else isinstance(values, list) and part in range(len(values))
        if is_there:
            values = values[part]
        if is_there or (isinstance(values, dict) and at == len(location)):
            path = (*path, part)
    return path


def _message(error: Any, path: KeyPath) -> str:
    """Return what one of pydantic's errors says, in our words."""
    if error["type"] == "extra_forbidden":
        return explain_unknown_key(path)
    if error["type"] == "missing":
        return "is missing; " + ("a recipe needs at least model.base and data.train" if len(path) < 3 else "write it")
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    found = error.get("input")
    shown = f"found {found!r}; " if not isinstance(found, dict | BaseModel) else ""
    return f"{shown}{error['msg'][0].lower()}{error['msg'][1:]}"

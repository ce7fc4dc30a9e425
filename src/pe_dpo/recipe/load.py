"""From a YAML file and overrides to a checked `Recipe`.

Every fault is reported at once: file:line (or the override), the key, what was found, what to do.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pe_dpo.errors import RecipeError
from pe_dpo.recipe.schema import Recipe
from pe_dpo.recipe.shipped import find_recipe
from pe_dpo.recipe.strict_yaml import Document, Dumper, parse_document, parse_scalar

OTHER_NAMES = {
    "simpo_gamma": "that is the margin here: loss.margin (gamma is the weight of the reference)",
    "gamma_beta_ratio": "that is margin / beta here: set loss.margin (gamma is the weight of the reference)",
    "num_train_epochs": "train.epochs",
    "loss_type": "loss.preset",
    "per_device_train_batch_size": "train.pairs_per_step (pairs per optimizer step; micro-batches are found by themselves)",
    "gradient_accumulation_steps": "train.pairs_per_step (accumulation is derived from it)",
    "batch_size": "train.pairs_per_step",
    "model_name_or_path": "model.base",
    "load_in_4bit": "model.quantize: nf4",
    "load_in_8bit": "model.quantize: int8",
    "torch_dtype": "model.dtype",
    "dataset_name": "data.train",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "init_lora_weights": "adapter.init",
    "use_dora": "DoRA is not supported",
    "modules_to_save": "fully trained modules are not supported; LoRA only",
    "rpo_alpha": "loss.sft_weight",
    "cpo_alpha": "loss.sft_weight",
    "ref_model": "the reference is the base with adapters off (adapter.reference)",
    "output_dir": "output",
    "lr": "train.learning_rate",
    "warmup_ratio": "train.warmup",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "trust_remote_code": "code from a model repository is never run; convert the model to a class of transformers",
    "precompute_ref_log_probs": "the reference pass is arranged by the program; drop the key",
}
"""Keys of other tools, and what they are called here."""


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the checked recipe.

    Args:
        source: path of a YAML file, or the name of a recipe that comes with the package (`pe-dpo recipes list`).
        overrides: "section.key=value" strings, read like YAML; they win over the file.

    Raises:
        RecipeError: listing every fault found, each with file and line (or the override).
    """
    path = find_recipe(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source}: cannot be read: {error}") from error
    return recipe_from_yaml(text, str(source), overrides, default_output=f"runs/{path.stem}")


def recipe_from_yaml(text: str, where: str, overrides: Iterable[str] = (), *, default_output: str | None = None) -> Recipe:
    """Return the checked recipe in `text`; arguments and errors as `load_recipe`."""
    document = parse_document(text, where)
    values = document.values
    origins: dict[tuple[str | int, ...], str] = {path: f"{where}:{line}" for path, line in document.lines.items()}
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
        raise RecipeError("\n".join(_messages(error, Document(values, document.lines), origins, where))) from error


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with every input that lies on this machine by its absolute path, so that it holds from any folder."""

    def absolute(value: Any) -> Any:
        return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value

    model = recipe.model.model_copy(update={"base": absolute(recipe.model.base)})
    adapter = recipe.adapter.model_copy(update={"start": absolute(recipe.adapter.start)})
    data = recipe.data.model_copy(update={"train": absolute(recipe.data.train), "eval": absolute(recipe.data.eval)})
    return recipe.model_copy(update={"model": model, "adapter": adapter, "data": data})


def with_gamma(recipe: Recipe, gamma: float) -> Recipe:
    """Return the recipe with the number that a γ to be calibrated came to.

    Raises:
        RecipeError: with this number the recipe contradicts itself (γ = 0 with a floor, say).
    """
    values = recipe.model_dump()
    values["loss"]["gamma"] = gamma
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(_explain(fault, tuple(fault["loc"])) for fault in error.errors())
        raise RecipeError(f"loss.gamma: {recipe.loss.gamma} came to {gamma:g}, which cannot be used: {faults}") from error


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that loads back to an equal recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def recipe_difference(old: Recipe, new: Recipe, ignore: Iterable[str] = ()) -> list[str]:
    """Return "section.key: old → new" for every setting that differs, leaving out the dotted names in `ignore`."""
    before, after = dict(_flat(old.model_dump())), dict(_flat(new.model_dump()))
    return [f"{key}: {before.get(key)!r} → {after.get(key)!r}" for key in turned_settings(old, new, ignore)]


def turned_settings(old: Recipe, new: Recipe, ignore: Iterable[str] = ()) -> dict[str, Any]:
    """Return the new value of every setting that differs, by dotted name, leaving out the names in `ignore`."""
    before, after = dict(_flat(old.model_dump())), dict(_flat(new.model_dump()))
    ignored = set(ignore)
    return {key: after.get(key) for key in {**before, **after} if before.get(key) != after.get(key) and key not in ignored}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "data.columns":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _apply_override(values: dict[str, Any], origins: dict[tuple[str | int, ...], str], override: str) -> None:
    key, equals, text = override.partition("=")
    where = f"--set {override}"
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


def _messages(error: ValidationError, document: Document, origins: dict[tuple[str | int, ...], str], where: str) -> list[str]:
    """One line per place: where, the dotted key, what is wrong."""
    found: dict[tuple[str | int, ...], str] = {}
    for fault in error.errors():
        path = _known_prefix(tuple(fault["loc"]), document.values)
        message = _explain(fault, path)
        key, colon, rest = message.partition(": ")
        named = (*map(str, path), *key.split("."))
        if colon and ".".join(named) in known_keys():  # a fault of a section or the whole recipe that names the key to turn
            path, message = named, rest
        known = path
        while known not in origins and known:
            known = known[:-1]
        found.setdefault(path, f"{origins.get(known, where)}: {'.'.join(map(str, path))}: {message}")
    return list(found.values())


def _known_prefix(loc: tuple[str | int, ...], values: Any) -> tuple[str | int, ...]:
    """Cut the names of union members, which pydantic appends, off a location; keep a missing key's own name."""
    path: tuple[str | int, ...] = ()
    for part in loc:
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, dict) and isinstance(part, str) and len(loc) <= len(path) + 1:
            return (*path, part)
        else:
            return path
        path = (*path, part)
    return path


def _explain(fault: Any, path: tuple[str | int, ...]) -> str:
    if fault["type"] == "extra_forbidden":
        return _unknown_key(path)
    if fault["type"] == "missing":
        return "is missing; a recipe needs at least model.base and data.train"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    found = fault.get("input")
    shown = f"found {found!r}; " if not isinstance(found, dict | BaseModel) else ""
    return f"{shown}{fault['msg'][0].lower()}{fault['msg'][1:]}"


def _unknown_key(path: tuple[str | int, ...]) -> str:
    key = str(path[-1])
    if key in OTHER_NAMES:
        other = OTHER_NAMES[key]
        is_key = other.replace(":", " ").split()[0] in known_keys()
        return f"unknown key; here it is {other}" if is_key else f"unknown key; {other}"
    sections = difflib.get_close_matches(key, Recipe.model_fields, n=1, cutoff=0.7) if len(path) == 1 else []
    if sections:
        return f"unknown key; did you mean {sections[0]}?"
    names = {dotted.rsplit(".", 1)[-1]: dotted for dotted in known_keys()}
    if key in names:
        return f"unknown key here; did you mean {names[key]}?"
    inside = [name for name in known_keys() if name.startswith(".".join(map(str, path[:-1])))]
    close = difflib.get_close_matches(".".join(map(str, path)), inside or list(names.values()), n=1, cutoff=0.5)
    close = close or [names[name] for name in difflib.get_close_matches(key, names, n=1, cutoff=0.6)]
    return f"unknown key; did you mean {close[0]}?" if close else "unknown key; `pe-dpo recipes schema` lists what there is"


def known_keys() -> list[str]:
    """Return every dotted key of a recipe."""
    keys = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys

"""Runs on a base and pairs that are loaded once: a third of a tiny run's time is theirs."""

from typing import Any

from pe_dpo.experiments.point import share
from pe_dpo.inference.inputs import Inputs
from pe_dpo.recipe import Recipe, with_absolute_paths
from pe_dpo.training import train as module
from pe_dpo.training.train import TrainResult

_LOADED: dict[str, Inputs] = {}


def train(recipe: Recipe, **how: Any) -> TrainResult:
    """Train as a run of a sweep does: for tests of what comes after base and pairs are read, in whose files nothing changes."""
    return module.train(recipe, shared=inputs(recipe), **how)


def inputs(recipe: Recipe) -> Inputs:
    """Return base and pairs of a recipe, the same for all in this process that name the same."""
    recipe = with_absolute_paths(recipe)
    name = f"{recipe.model.model_dump_json()} {recipe.data.model_dump_json()} {recipe.train.seeds.data}"
    if name not in _LOADED:
        if len(_LOADED) == 3:
            del _LOADED[next(iter(_LOADED))]
        _LOADED[name] = share(recipe)
    return _LOADED[name]

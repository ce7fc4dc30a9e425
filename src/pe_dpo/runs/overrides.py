"""Settings that a person means to change in a run that goes on: which may, what is recorded of them, and how that is said.

A key that is named may differ from the run's recipe, and the run takes the new value from the step of its checkpoint on. It is
no run of one recipe any more: training by its last recipe from the beginning gives another adapter, which record, card,
comparison and report say.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pe_dpo.errors import UsageError
from pe_dpo.recipe import SHORT_NAMES, known_keys
from pe_dpo.recipe.schema import SeedsSection

MACHINE = "machine"
"""Named as a key, it lets processes and the kind of device change also where what dropout or mixout draws depends on them."""

_SHAPE = "what the checkpoint holds belongs to adapters of another shape or scale"
_BASE = "the adapter belongs to the weights that it was trained on, as they were loaded"
_REFERENCE = "the reference would be another model than at the beginning"
_POSITION = "where the run stands in its data is counted in steps of it, so that some pairs would come twice and others never"
_DRAWN = "the run has drawn by it from the beginning on, and would be neither run"
_TEMPLATE = "the adapter would be trained on prompts of two forms, and is served with one"
_PLACES = ("model.base", "data.train", "data.eval", "output", "reference.store")
_REFUSED = {
    **dict.fromkeys(("model.quantize", "model.quantize_experts", "model.dtype"), _BASE),
    **{f"adapter.{key}": _SHAPE for key in ("rank", "alpha", "rslora", "targets", "exclude", "init", "bias")},
    **{f"adapter.{key}": _REFERENCE for key in ("start", "over", "reference")},
    **{f"train.{key}": _POSITION for key in ("pairs_per_step", "seed", "prompts_together")},
    **{f"train.seeds.{key}": _DRAWN for key in SeedsSection.model_fields},
    **{f"data.{key}": _TEMPLATE for key in ("template", "template_args", "template_date")},
    "train.optimizer": "the state in the checkpoint is that of the other optimizer",
}
"""Keys that stay what they are, and why: optimizer state, adapter, reference or position would mean nothing afterwards."""


def why_fixed(key: str) -> str | None:
    """Return why a setting cannot change in a run that goes on; None where it can."""
    return _REFUSED.get(key)


def override_keys(names: Iterable[str], *, goes_on: bool = True) -> frozenset[str]:
    """Return the dotted keys that are meant, short names (lr) among them.

    Args:
        names: As a person gave them.
        goes_on: Whether the run goes on; only then there is something to change.

    Raises:
        UsageError: one is no key of a recipe, or cannot change; or the run begins.
    """
    found = set()
    for name in names:
        key = SHORT_NAMES.get(name, name)
        if key not in (MACHINE, *known_keys()):
            near = difflib.get_close_matches(key, [MACHINE, *SHORT_NAMES, *known_keys()], n=1)
            hint = f"did you mean {near[0]}?" if near else "`pe-dpo recipes schema` lists what there is"
            raise UsageError(f"`override` {name}: is no key of a recipe; {hint}")
        if key in _REFUSED:
            raise UsageError(
                f"`override` {name}: cannot change in a run that goes on: {_REFUSED[key]}; begin another run, with another "
                "`output`"
            )
        if not goes_on:
            raise UsageError("`override` is for a run that goes on; use it with `resume`, or leave it out")
        found.add(key)
    return frozenset(found)


def allows_rows(override: Iterable[str], side: str) -> bool:
    """Return whether the pairs of a side ("data" to train on, "held_out") may differ; data.eval is of held-out ones alone."""
    keys = {key for key in override if key.startswith("data.")}
    return bool(keys - {"data.eval"} if side == "data" else keys)


def entries(step: int, changed: Mapping[str, tuple[Any, Any]], words: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what is recorded of an override, a record for each key.

    Args:
        step: The optimizer step after which the new values act.
        changed: Old and new value by dotted key; the hashes of pairs under "data" and "held_out".
        words: What differs between the pairs, by the same names.
    """
    found = []
    for key, (was, now) in changed.items():
        said = {"words": words[key]} if key in words else {}
        found.append({"step": step, "key": key, "from": was, "to": now, **said})
    return found


def replayed(recorded: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return the records of a run that goes on from a step: what was changed later acts from there on."""
    return [{**entry, "step": min(int(entry.get("step", 0)), step)} for entry in recorded]


def describe_overrides(recorded: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was changed on the way, a line for each key."""
    titles = {"data": "pairs to train on", "held_out": "held-out pairs"}
    lines = []
    for entry in recorded:
        key = str(entry.get("key"))
        change = entry.get("words") or f"{entry.get('from')} → {entry.get('to')}"
        if key in _PLACES:  # cards and reports name no path of this machine
            change = "another place"
        lines.append(f"{titles.get(key, key)}: {change}, from step {entry.get('step')} on")
    return lines


def refuse_settings(difference: Mapping[str, tuple[Any, Any]]) -> str:
    """Return what to do about settings that differ from a run's, in words.

    Args:
        difference: Old and new value by dotted key.
    """
    fixed = {key: why for key in difference if (why := why_fixed(key))}
    free = [key for key in difference if key not in fixed]
    meant = f", name what you mean to change with `override` ({', '.join(free)})" if free else ""
    lines = [
        f"{', '.join(key for key in fixed if fixed[key] == why)} cannot change: {why}" for why in dict.fromkeys(fixed.values())
    ]
    return "\n".join([*lines, f"use the old settings{meant}, or another `output`"])

"""The names of settings: dotted keys, the short names of those that people set most, and what other tools call them."""

import difflib

from pydantic import BaseModel

from pe_dpo.recipe.data_section import DataSource
from pe_dpo.recipe.elsewhere import key_elsewhere
from pe_dpo.recipe.schema import Recipe

SHORT_NAMES = {
    "beta": "loss.beta",
    "gamma": "loss.gamma",
    "margin": "loss.margin",
    "mixout": "mixout.p",
    "lr": "train.learning_rate",
    "dropout": "adapter.dropout",
    "epochs": "train.epochs",
    "loss": "loss.preset",
    "link": "loss.link",
    "reduce": "loss.reduce",
    "rank": "adapter.rank",
    "seed": "train.seed",
    "output": "output",
}
"""Short name: dotted key. They are flags of `train` and `quickstart`, and axes of `sweep`."""


def known_keys(section: type[BaseModel] = Recipe) -> list[str]:
    """Return every dotted key of a recipe, or of a section of one."""
    keys = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += [f"{name}.{key}" for key in known_keys(inner)]
        else:
            keys.append(name)
    return keys


def explain_unknown_key(path: tuple[str | int, ...]) -> str:
    """Return what to write instead of a key that is none: another tool's key, the most similar, or those with that word."""
    key = str(path[-1])
    if path[:2] in (("data", "train"), ("data", "eval")):
        return f"unknown key; a place has {', '.join(DataSource.model_fields)}"
    if key == "scorer":
        return "unknown key: no recipe names a program that is run; give it to train, sweep or eval as `scorer`"
    section, sections = ".".join(map(str, path[:-1])), list(Recipe.model_fields)
    inside = [name for name in known_keys() if section and name.startswith(f"{section}.")]
    names = {dotted.rsplit(".", 1)[-1]: dotted for dotted in [*known_keys(), *sections, *inside]}  # the last one of a name wins
    other = key_elsewhere(key)
    if other and key not in names:
        return f"unknown key; {other.in_words()}"
    if key in names:
        return f"unknown key here; did you mean {names[key]}?"
    candidates = [*(sections if len(path) == 1 else inside), *names.values(), *sections]
    near = [name for name in candidates if _is_typo(key, name.rsplit(".", 1)[-1])]
    having = [name for name in inside or known_keys() if key in name.rsplit(".", 1)[-1].split("_")]
    meant = " or ".join(near[:1] or having)
    return f"unknown key; did you mean {meant}?" if meant else "unknown key; `pe-dpo recipes schema` lists what there is"


def _is_typo(written: str, meant: str) -> bool:
    """Return whether one or two letters make the difference; in short names, one."""
    matcher = difflib.SequenceMatcher(None, written, meant, autojunk=False)
    edits = sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")
    return edits <= (2 if len(meant) > 4 else 1)

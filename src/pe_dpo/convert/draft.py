"""A recipe that is being written from another tool's settings: each line with where it came from, and what it cannot say."""

import textwrap
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from pe_dpo.convert.source import TheirSettings
from pe_dpo.errors import UsageError
from pe_dpo.recipe import Recipe, known_keys
from pe_dpo.recipe.elsewhere import Key
from pe_dpo.recipe.strict_yaml import Dumper

WIDTH = 80
_BOOKKEEPING = {
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.report_to",
    "output",
}
"""Keys that change no weight: a default of the other tool is not taken over."""
_COUNTS = ("train.log_every", "train.eval_every", "train.save_every", "train.keep_checkpoints")


class Said(NamedTuple):
    """What the other tool's settings say under one key."""

    key: str
    value: Any
    is_written: bool
    """Whether the file says it, and not the tool's default."""

    def __str__(self) -> str:
        value = in_yaml(self.value)
        value = f"{value[:60]}…" if len(value) > 61 else value
        if self.value is None:
            return f"no {self.key}"
        return f"{self.key}: {value}" if self.is_written else f"{self.key}: {value} by default there"


def in_yaml(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=100_000)
    return text.removesuffix("\n").removesuffix("\n...")


class Difference(NamedTuple):
    """A setting that means something else here, or is left out."""

    there: str
    words: str
    breaks: bool = False
    """Whether it makes another objective."""


@dataclass
class Draft:
    """Lines of a recipe with their origins, and what does not fit into one."""

    source: TheirSettings
    cards: int
    are_cards_known: bool = True
    """Whether the file says on how many cards it is run, or the caller does."""
    lines: dict[str, tuple[Any, str, bool]] = field(default_factory=dict)
    """Dotted key: value, origin, and whether the file itself says it."""
    differences: list[Difference] = field(default_factory=list)
    dropped: list[Difference] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def said(self, *names: str) -> Said:
        """Return what the settings say under the first of some keys that is written, else the tool's default of the first."""
        self.read.update(names)
        key = next((name for name in names if name in self.source.values), None)
        if key is not None:
            return Said(key, self.source.values[key], True)
        known = self.source.tool.keys.get(names[0], Key())
        return Said(names[0], known.default, False)

    def put(self, here: str, value: Any, *origins: Said | str) -> None:
        """Write a line; None is no value and writes none."""
        if value is None or (here in _BOOKKEEPING and not any(isinstance(one, Said) and one.is_written for one in origins)):
            return
        words: list[str] = []
        for one in origins:
            words.append(str(one))
            if isinstance(one, Said) and one.value is not None and not isinstance(value, bool) and value == one.value:
                words[-1] = one.key if one.is_written else f"{one.key}, by default there"  # the value stands in the line
        self.lines[here] = (
            value,
            "; ".join(dict.fromkeys(words)),
            any(isinstance(one, str) or one.is_written for one in origins),
        )

    def number(self, said: Said, here: str, kind: type[float] | type[int] = float) -> Any:
        """Write a line with a number as the recipe wants it; anything that is none is left out, and said."""
        try:
            value = kind(said.value) if said.value is not None and not isinstance(said.value, bool) else None
        except (TypeError, ValueError):
            self.drop(said, f"is no number; set {here}")
            return None
        self.put(here, value, said)
        return value

    def real(self, said: Said, value: Any = None) -> float:
        """Return a number that the loss cannot do without.

        Args:
            said: The key, with its value.
            value: One of several under the key; by default the key's own.

        Raises:
            UsageError: It is none.
        """
        value = said.value if value is None else value
        try:
            if isinstance(value, bool):
                raise TypeError
            return float(value)
        except (TypeError, ValueError) as error:
            found = f"{said.key}: found {in_yaml(said.value)[:60]}"
            raise UsageError(f"{self.source.path}: {found}; a number is expected; write the one that is meant") from error

    def differs(self, there: Said | str, words: str, *, breaks: bool = False) -> None:
        """Note that a setting means something else here."""
        self.differences.append(Difference(str(there), words, breaks))

    def drop(self, there: Said | str, words: str, *, breaks: bool = False) -> None:
        """Note that a setting is left out."""
        self.dropped.append(Difference(str(there), words, breaks))

    def finish(self) -> None:
        """Take over the keys that nobody has read: those of the same meaning, those that are nothing here, unknown ones."""
        together: dict[tuple[str, bool], list[str]] = {}
        for name, value in self.source.values.items():
            if name in self.read:
                continue
            key = self.source.tool.keys.get(name)
            said = Said(name, value, True)
            if key is None:
                self.unknown.append(str(said))
            elif value in (None, False, "", "none", "no", "None") or value == key.default:
                continue
            elif key.here in _COUNTS and not key.differs and isinstance(value, int | float) and value >= 1:
                self.put(key.here, int(value), said)
            elif key.here in _COUNTS and not key.differs:
                self.drop(said, f"{key.here} is a number of steps; a tenth of the run by itself")
            elif key.here == "train.gradient_checkpointing" and not isinstance(value, bool):
                self.drop(said, "activations are computed again where memory asks for it, and lie nowhere else")
            elif key.here and ":" not in key.here and isinstance(value, bool | int | float | str) and not key.differs:
                self.put(key.here, value, said)
            else:
                words = f"{key.here}: {key.differs}" if key.here else key.differs
                together.setdefault((words, key.breaks), []).append(str(said) if key.breaks else name)
        for (words, breaks), names in together.items():
            self.drop(", ".join(names), words.removesuffix("; drop the key"), breaks=breaks)

    def text(self) -> str:
        """Return the recipe as YAML, each line with a comment that says where it came from."""
        defaults = {
            f"{section}.{key}": one.default
            for section, field_of in Recipe.model_fields.items()
            for key, one in getattr(field_of.annotation, "model_fields", {}).items()
            if section != "loss" and key != "alpha"  # which other keys set
        }
        lines: list[str] = []
        section: list[str] = []
        for name in sorted(self.lines, key=known_keys().index):
            value, origin, is_said = self.lines[name]
            if not is_said and name in defaults and value == defaults[name]:
                continue
            *head, key = name.split(".")
            lines += ["  " * at + f"{part}:" for at, part in enumerate(head) if section[: at + 1] != head[: at + 1]]
            section, indent = head, "  " * len(head)
            body = f"{indent}{key}: {in_yaml(value)}"
            if isinstance(value, list) and any(isinstance(one, dict) for one in value):  # places, one a line
                body = "\n".join([f"{indent}{key}:", *(f"{indent}  - {in_yaml(one)}" for one in value)])
            if "\n" not in body and len(body) + len(origin) + 4 <= WIDTH:
                lines.append(f"{body}  # {origin}")
            else:
                lines += textwrap.wrap(origin, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
                lines.append(body)
        return "\n".join(lines) + "\n"

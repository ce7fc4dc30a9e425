"""YAML as people mean it: every value knows its line, and nothing surprising is accepted in silence.

PyYAML follows YAML 1.1, in which `5e-6` is a string, `no` is false, `010` is eight, `12:30:45` is a number and a repeated key
wins over the first. Here numbers and booleans follow YAML 1.2, and repeated keys, tags, anchors and aliases are errors.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.composer import Composer

from pe_dpo.errors import RecipeError
from pe_dpo.printable import one_line

KeyPath = tuple[str | int, ...]
"""The keys, and places in lists, that lead to a value."""


_DEEPEST = 50
LARGEST = 1_000_000
"""Characters of a recipe; those of a large sweep have 3,000."""


_QUOTES = ", and a path that begins with * in quotes"


class _NotPlainError(yaml.MarkedYAMLError):
    """Something of YAML that recipes do not use."""


class _Composer(Composer):
    """Takes no more levels than a person would write; PyYAML's time grows with their square."""

    depth = 0
    peek_event: Callable[[], Any]
    """Of the parser that it is joined with."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > _DEEPEST:
            mark = self.peek_event().start_mark
            raise _NotPlainError(None, None, f"nested too deeply: more than {_DEEPEST} brackets or levels", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class PlainLoader(_Composer, yaml.SafeLoader):
    """Safe loader with the scalar types of YAML 1.2, which takes no more levels than a person would write."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (the name PyYAML reads)


_BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_INTEGER = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$")
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _RecipeComposer(_Composer):
    """Takes no anchors, aliases and tags."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None:
            raise _NotPlainError(
                None,
                None,
                f"anchors and aliases (&, *) are not used in recipes; write the value out{_QUOTES}",
                event.start_mark,
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _NotPlainError(
                None, None, f"the YAML tag {tag} is not used in recipes; write a plain value", event.start_mark
            )
        return super().compose_node(parent, index)


class _RecipeLoader(_RecipeComposer, PlainLoader):
    """Recipes, by PyYAML's own parser, which tells better what it found."""


if yaml.__with_libyaml__:

    class _FastRecipeLoader(_RecipeComposer, yaml.CSafeLoader):
        """Recipes, by libyaml's parser, in a tenth of the time; its own composer would end the process at 200,000 levels."""

        yaml_implicit_resolvers = PlainLoader.yaml_implicit_resolvers

        def __init__(self, stream: str) -> None:
            _RecipeComposer.__init__(self)
            yaml.CSafeLoader.__init__(self, stream)

else:
    _FastRecipeLoader = _RecipeLoader  # type: ignore[assignment, misc]


class Dumper(yaml.SafeDumper):
    """Safe dumper that quotes a string when YAML 1.1 or our rules would read it as something else."""


Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *PlainLoader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *PlainLoader.yaml_implicit_resolvers}
}


def parse_document(text: str, where: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Return the mapping in a text, and the line on which each of its values stands.

    Args:
        text: The YAML.
        where: The name of the file, for messages.

    Raises:
        RecipeError: It is not YAML, not a mapping, or has a repeated key, a tag, an anchor or an alias.
    """
    if len(text) > LARGEST:
        raise RecipeError(f"{where}: has more than {LARGEST:,} characters, and recipes have some thousand; name a recipe")
    try:
        try:
            node = yaml.compose(text, Loader=_FastRecipeLoader)
        except (yaml.YAMLError, ValueError):  # said again in PyYAML's words, which name what was found
            node = yaml.compose(text, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        if isinstance(error, _NotPlainError):
            raise RecipeError(f"{where}:{line}: {error.problem}") from None
        hint = _QUOTES if "alias" in str(error.context) else ""
        raise RecipeError(f"{where}:{line}: not readable as YAML: {error.problem or error.context}{hint}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not readable as YAML: {one_line(error)}") from error
    except ValueError as error:  # \U with a number that is no character
        raise RecipeError(f"{where}: not readable as YAML: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{where}: a recipe is a mapping of sections (model, data, loss, …); found {_kind(node)}")
    lines: dict[KeyPath, int] = {}
    return _value(node, (), lines, where), lines


def parse_scalar(text: str, where: str) -> Any:
    """Return the value of one `--set key=VALUE`, read by the same rules as a recipe.

    Raises:
        RecipeError: It is not YAML, or more than one value.
    """
    values, _ = parse_document(f"value: {text}", where)
    if len(values) > 1:
        raise RecipeError(f"{where}: one value is expected, on one line")
    return values["value"]


def _value(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], where: str) -> Any:
    """Return what a node holds, and enter the line of everything in it."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{where}:{line}: a key must be a plain word; found {_kind(key_node)}")
            key = _text(str(key_node.value), f"{where}:{line}")
            if key in values:
                raise RecipeError(f"{where}:{line}: {key} is set twice (first on line {lines[(*path, key)]}); keep one")
            lines[(*path, key)] = line
            values[key] = _value(value_node, (*path, key), lines, where)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), lines, where) for index, item in enumerate(node.value)]
    return _scalar(node, f"{where}:{node.start_mark.line + 1}")


def _scalar(node: yaml.Node, where: str) -> Any:
    """Return a text, a number, true, false or nothing."""
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), str(node.value)
    if kind == "str":
        return _text(text, where)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        if len(text) > 100:
            raise RecipeError(f"{where}: a number of {len(text)} digits; write one that is meant")
        return int(text)
    assert kind == "float", "tags are refused before, and these are all that the resolvers give"
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _text(text: str, where: str) -> str:
    """Return a text that files and their names can hold."""
    if odd := re.search("[\0\ud800-\udfff]", text):
        raise RecipeError(f"{where}: {odd[0]!a} within a text, which neither files nor their names take; leave it out")
    return text


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "an empty file"
    if isinstance(node, yaml.ScalarNode):
        return f"the text {node.value!r}"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"

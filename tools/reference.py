"""What the site says of keys, commands, metrics and errors, made of the code itself: `python tools/reference.py recipe_keys`.

Each public function returns the Markdown that stands in the place of `<!-- generated: NAME -->` on a page of docs/. The index
of papers lies in docs/papers.md as it is, and `--write` writes it anew.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from other_tools import table

SCALARS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`", "null": "`null`"}
PYTHON = {str: "text", int: "whole number", float: "number", Path: "path", bool: ""}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def recipe_keys() -> str:
    """Return every key of a recipe: a section of the page for each section of the recipe, a row for each key."""
    from pe_dpo.recipe import Recipe

    schema = Recipe.model_json_schema()
    parts, top = [], []
    for name, field in schema["properties"].items():
        section = _resolve(field, schema)
        if "properties" not in section:
            top.append(_key_row(name, field, schema, needed=name not in ("output",)))
            continue
        needed = section.get("required", [])
        rows = []
        for key, one in section["properties"].items():
            inner = _resolve(one, schema).get("properties", {})  # a section of its own, such as train.seeds
            rows += [_key_row(f"{name}.{key}.{below}", part, schema, needed=False) for below, part in inner.items()]
            if not inner:
                rows.append(_key_row(f"{name}.{key}", one, schema, needed=key in needed))
        parts.append(f"## {name}\n\n{section['description']}\n\n" + table(("key", "values", "default", "what it is"), rows))
    parts.append("## The run's folder\n\n" + table(("key", "values", "default", "what it is"), top))
    places = schema["$defs"]["DataSource"]
    rows = [_key_row(key, one, schema, needed=key == "path") for key, one in places["properties"].items()]
    parts.append(f"## A place of data\n\n{places['description']}\n\n" + table(("key", "values", "default", "what it is"), rows))
    return "\n".join(parts)


def commands() -> str:
    """Return every command: its sentence, how it is called, its arguments and options."""
    parts = []
    for words, command in every_command():
        name = " ".join(("pe-dpo", *words))
        rows = []
        for one in command.params:
            if one.name == "help":
                continue
            flags = ", ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts))
            is_argument = one.param_type_name == "argument"
            shown = f"`{(one.name or '').upper()}`" if is_argument else flags
            takes = "" if getattr(one, "is_flag", False) else _takes(get_type_hints(command.callback)[one.name])
            needed = "**needed**" if one.required else ""
            rows.append((shown, takes or "–", " ".join(filter(None, (_cell(getattr(one, "help", "") or ""), needed)))))
        options = table(("argument or option", "takes", "what it does"), rows) if rows else ""
        said = [_cell(paragraph) for paragraph in command.help.split("\n\n")]
        if command.epilog:
            said.append(f"```text\n{command.epilog.strip().removeprefix('Example: ')}\n```")
        parts.append("\n\n".join((f"## {name}", *said, options)))
    return "\n".join(parts)


def metrics() -> str:
    """Return every metric of the catalogue, of pairs and then of sampled answers."""
    from pe_dpo.metrics.catalogue import METRICS

    ways = {1: "more", -1: "less", 0: "neither", None: "not compared"}
    parts = []
    for kind, title in (("pairs", "Of pairs"), ("answers", "Of sampled answers")):
        rows = [
            (f"`{key}`", _cell(one.title), _cell("; ".join(filter(None, (one.explanation, one.caution)))), ways[one.direction])
            for key, one in METRICS.items()
            if one.kind == kind
        ]
        parts.append(f"## {title}\n\n" + table(("name", "shown as", "what it is", "better"), rows))
    return "\n".join(parts)


def errors() -> str:
    """Return every error that the package raises on purpose, with the exit code of a command that ends with it."""
    from pe_dpo import errors as module

    found = [one for _, one in inspect.getmembers(module, inspect.isclass) if issubclass(one, module.PeDpoError)]
    found.sort(key=lambda one: (len(one.__mro__), one.__name__))
    rows = [
        (f"`{one.__name__}`", f"`{one.__base__.__name__}`", str(one.exit_code), _cell(inspect.getdoc(one) or ""))
        for one in found
    ]
    return table(("error", "is a", "exit code", "when"), rows)


def recipes() -> str:
    """Return the recipes that come with the package, each with its loss and its first line: card, memory, hours."""
    from pe_dpo.recipe import load_recipe, recipe_header, recipe_names

    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        rows.append((f"`{name}`", f"`{recipe.model.base}`", f"`{recipe.loss.preset}`", recipe_header(name).splitlines()[0]))
    return table(("recipe", "base", "loss", "what it takes"), rows)


def papers() -> str:
    """Return the index of papers: each published loss as what a recipe has to say, and the shipped recipes that are of it."""
    from pe_dpo.recipe import PRESETS, load_recipe, recipe_names
    from pe_dpo.recipe.describe import formula
    from pe_dpo.recipe.loss_section import LossSection
    from pe_dpo.recipe.presets import ALIASES

    shipped = {name: load_recipe(name).loss.preset for name in recipe_names()}
    parts = []
    for name, preset in PRESETS.items():
        others = [other for other, ours in ALIASES.items() if ours == name]
        whole = [f"`{recipe}`" for recipe, of in shipped.items() if of == name]
        values = ", ".join(f"{key}: {value}" for key, value in preset.values.items())
        lines = [
            f"## {preset.title}\n\n{preset.source}.",
            f"```yaml\nloss: {{preset: {name}}}\n# the same as\nloss: {{{values}}}\n```",
            f"```text\n{formula(LossSection(preset=name))}\n```",
        ]
        lines += [f"Elsewhere: {', '.join(f'`{other}`' for other in others)}."] if others else []
        lines += [f"Whole recipes: {', '.join(whole)}."] if whole else []
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts)


def scripts() -> str:
    """Return the scripts of examples/, whole."""
    folder = Path(__file__).parents[1] / "examples"
    return "\n".join(
        f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n" for path in sorted(folder.glob("*.py"))
    )


BESIDE = (
    "pe_dpo.data.prepare_pairs",
    "pe_dpo.data.EncodedPair",
    "pe_dpo.inference.policy.load_policy",
    "pe_dpo.objective.Loss",
    "pe_dpo.metrics.table.PairTable",
    "pe_dpo.metrics.catalogue.Metric",
    "pe_dpo.metrics.estimates.mean_change",
)
"""Names that scripts of one's own may want beside the public ones."""


def api() -> str:
    """Return the directives by which Sphinx documents every public name of the package."""
    import pe_dpo

    return "\n".join(f"## {name}\n\n{_autodoc(f'pe_dpo.{name}')}" for name in pe_dpo.__all__)


def beside() -> str:
    """Return the directives for names that are not frozen."""
    return "\n".join(_autodoc(name) for name in BESIDE)


def _autodoc(name: str) -> str:
    module, _, last = name.rpartition(".")
    is_class = inspect.isclass(getattr(import_module(module), last))
    kind, members = ("class", "   :members:\n") if is_class else ("function", "")
    return f"```{{eval-rst}}\n.. auto{kind}:: {name}\n{members}```\n"


def every_command() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command of the command line with the words that call it: `("recipes", "list")`."""
    from pe_dpo.cli import app

    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from (((name, below), one) for below, one in command.commands.items())
        else:
            yield (name,), command


def _resolve(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The definition that a field refers to, or the field itself."""
    while "$ref" in field:
        field = schema["$defs"][field["$ref"].removeprefix("#/$defs/")]
    return field


def _key_row(name: str, field: Mapping[str, Any], schema: Mapping[str, Any], *, needed: bool) -> tuple[str, str, str, str]:
    default = "**needed**" if needed else _value(field["default"]) if "default" in field else "none"
    return f"`{name}`", _cell(_kind(field, schema)), default, _cell(field.get("description", ""))


def _kind(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a key takes, in words, from its JSON schema."""
    if "$ref" in field and "enum" not in _resolve(field, schema):
        return "an object, [below](#a-place-of-data)"
    field = _resolve(field, schema)
    if found := field.get("anyOf") or field.get("oneOf"):
        kinds = dict.fromkeys(_kind(one, schema) for one in found)
        return ", ".join(kinds)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"a list of: {_kind(field.get('items', {}), schema)}"
    if field.get("type") == "object":
        return f"names, each with: {_kind(field.get('additionalProperties', {}), schema)}"
    words = "a date" if field.get("format") == "date" else SCALARS[field["type"]]
    bounds = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field and abs(field[key]) < 1e9]
    return " ".join((words, ", ".join(bounds))).strip()


def _value(value: Any) -> str:
    from pe_dpo.convert.draft import in_yaml

    return f"`{in_yaml(value)}`"


def _takes(annotation: Any) -> str:
    """What an argument or option takes, in words, from the annotation of the parameter that it gives."""
    if get_origin(annotation) in (UnionType, Union):
        return " or ".join(_takes(one) for one in get_args(annotation) if one is not NoneType)
    if get_origin(annotation) is list:
        return f"{_takes(get_args(annotation)[0])}, repeatable"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    return PYTHON[annotation]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("<", "\\<").replace("*", "\\*")


PARTS = {one.__name__: one for one in (recipe_keys, recipes, commands, metrics, errors, scripts, api, beside, papers)}

PAGE = Path(__file__).parents[1] / "docs" / "papers.md"
BEGIN, END = "<!-- papers -->\n", "\n<!-- end -->\n"

if __name__ == "__main__":
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{papers()}{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        for name in sys.argv[1:] or PARTS:
            print(PARTS[name]())

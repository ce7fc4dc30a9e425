"""How finely the package is divided, counted from its source: figures that may only go down.

A reader pays for every name. A helper that is used once and only holds lines of its caller, or a record that is built at one
place and read at the next, is a stop on the way that explains nothing; a function of several screens is read by nobody.

- A line of code is neither empty nor a comment nor part of a docstring.
- Functions are all `def`, methods and inner ones too. Their length is from the `def` to the last line, docstring included.
- A function is used once where its name stands once in code (as a name or an attribute), outside of imports and `__all__`: in
  its own file if the name is `_private`, in the whole package if not. `__dunder__` methods are called by Python and left out.
- It is short where it has at most six lines of code.
- Records are classes that are a NamedTuple, a dataclass, a TypedDict or a BaseModel; those of `recipe/` are the file format
  that a person writes, and left out.
- Ten parameters or more, without self and cls, are counted outside of `cli/`, where an option is a parameter.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import pe_dpo

ROOT = Path(pe_dpo.__file__).parent

LIMITS = {
    "functions per 1,000 lines of code": 70,
    "records per 1,000 lines of code": 4.0,
    "functions used once, %": 32,
    "functions used once of at most six lines, %": 8,
    "functions of ten parameters or more": 2,
    "functions over 50 lines, %": 5,
    "lines of the longest function": 109,  # preference_loss, most of which is its docstring
}
"""The most that each figure may be; a change that lowers one lowers its limit."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
RECORDS = {"NamedTuple", "TypedDict", "BaseModel", "dataclass"}


class Source(NamedTuple):
    """One file."""

    room: str
    tree: ast.Module
    code: set[int]
    """Numbers of its lines of code."""
    names: Counter[str]
    """How often each name or attribute stands in it."""


def read(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    code = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            for text in filter(is_text, node.body):
                code -= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    names = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    names.update(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return Source(path.relative_to(ROOT).parts[0], tree, code, names)


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring, of a module, a class, a function or a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_record(node: ast.ClassDef) -> bool:
    marks = [getattr(mark, "func", mark) for mark in node.decorator_list]  # dataclass and dataclass(frozen=True)
    return any(getattr(part, "id", getattr(part, "attr", None)) in RECORDS for part in (*node.bases, *marks))


def functions(source: Source) -> Iterator[Function]:
    yield from (node for node in ast.walk(source.tree) if isinstance(node, Function))


def parameters(function: Function) -> int:
    given = function.args
    return len([one for one in (*given.posonlyargs, *given.args, *given.kwonlyargs) if one.arg not in ("self", "cls")])


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def figures() -> dict[str, float]:
    sources = [read(path) for path in sorted(ROOT.rglob("*.py"))]
    everywhere = sum((source.names for source in sources), Counter[str]())
    every = [(source, function) for source in sources for function in functions(source)]
    code = sum(len(source.code) for source in sources)
    classes = [node for source in sources if source.room != "recipe" for node in ast.walk(source.tree)
               if isinstance(node, ast.ClassDef)]  # fmt: skip
    once = [
        sum(function.lineno <= line <= (function.end_lineno or 0) for line in source.code)
        for source, function in every
        if not function.name.startswith("__")
        and (source.names if function.name.startswith("_") else everywhere)[function.name] == 1
    ]
    return {
        "functions per 1,000 lines of code": 1000 * len(every) / code,
        "records per 1,000 lines of code": 1000 * sum(map(is_record, classes)) / code,
        "functions used once, %": 100 * len(once) / len(every),
        "functions used once of at most six lines, %": 100 * sum(lines <= 6 for lines in once) / len(every),
        "functions of ten parameters or more": sum(
            parameters(function) >= 10 and source.room != "cli" for source, function in every
        ),
        "functions over 50 lines, %": 100 * sum(length(function) > 50 for _, function in every) / len(every),
        "lines of the longest function": max(length(function) for _, function in every),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return figures()


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.slow
def test_the_package_is_not_divided_more_finely_than_it_was(name: str, found: dict[str, float]) -> None:
    assert found[name] <= LIMITS[name]

"""Who may import whom, read from the source.

Imports go downwards only, so that each room can be read, tested and used without those above it: the loss without a trainer,
the data without a model, a recipe without torch. A library that is dear to import or likely to change is known to one room
only, so that `pe-dpo --help` stays quick and a new version of it is met in one place. Only the command line talks to people:
what prints or swallows errors elsewhere cannot be used as a library.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pe_dpo

ROOT = Path(pe_dpo.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
FILES = {file: ast.parse(path.read_text(encoding="utf-8")) for file, path in SOURCES.items()}

LEVELS = (
    {"errors", "disk", "hub", "links", "progress", "quantizations"},
    {"log"},
    {"recipe", "metrics", "objective"},
    {"runs", "data", "model"},
    {"inference"},
    {"audit"},
    {"training", "evaluation", "merging", "export", "chat"},
    {"experiments", "quickstart"},
    {"report"},
    {"cli"},
)
"""From the ground floor up; a room may import rooms of lower levels, and no other room of its own."""
ROOMS = set().union(*LEVELS)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ONLY_IN = {
    "bitsandbytes": ("model/quantization.py",),
    "peft": ("model/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "gguf": ("export/gguf_file.py",),
    "matplotlib": ("report/",),
}
NEVER_IN = {
    "torch": ("recipe/", "metrics/", "errors.py"),
    "transformers": ("recipe/", "metrics/", "objective/"),
    "pydantic": ("objective/", "model/"),
}
HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes", "accelerate", "pydantic", "numpy", "yaml", "rich"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules imported anywhere in a tree, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide their room"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "pe_dpo" else [module]


def room(name: str) -> str:
    """The room of a file or of a dotted name below `pe_dpo.`."""
    return name.removesuffix(".py").replace("/", ".").split(".")[0]


def libraries(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def test_every_room_is_listed() -> None:
    assert {room(file) for file in FILES} - {"__init__", "__main__"} == ROOMS


@pytest.mark.parametrize("file", [file for file in FILES if room(file) in ROOMS])
def test_imports_go_downwards_only(file: str) -> None:
    ours = {room(name.removeprefix("pe_dpo.")) for name in imports(FILES[file]) if name.startswith("pe_dpo.")}
    assert {other for other in ours - {room(file)} if LEVEL[other] >= LEVEL[room(file)]} == set()


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_known_to_one_room(library: str) -> None:
    users = [file for file, tree in FILES.items() if library in libraries(tree)]
    assert [file for file in users if not file.startswith(ONLY_IN[library])] == []


@pytest.mark.parametrize("library", NEVER_IN)
def test_a_room_stays_free_of_a_library(library: str) -> None:
    assert [file for file, tree in FILES.items() if file.startswith(NEVER_IN[library]) and library in libraries(tree)] == []


@pytest.mark.parametrize("file", ["__init__.py", "__main__.py", "links.py", *(file for file in FILES if room(file) == "cli")])
def test_the_front_door_imports_nothing_heavy_until_a_command_runs(file: str) -> None:
    """Functions import what they need; what only a type checker sees does not count."""
    now = [node for node in FILES[file].body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)]
    names = set(imports(ast.Module(now, [])))
    assert {name.split(".")[0] for name in names} & HEAVY == set()
    assert {room(name.removeprefix("pe_dpo.")) for name in names if name.startswith("pe_dpo.")} <= {
        "cli",
        "errors",
        "links",
        "quantizations",
        "log",
        "progress",
    }


REPORT = ", ".join(f"pe_dpo.{file.removesuffix('.py').replace('/', '.')}" for file in FILES if room(file) == "report")


@pytest.mark.parametrize("module", ["pe_dpo.experiments.compare", "pe_dpo.metrics.catalogue", REPORT])
def test_a_comparison_and_a_report_need_neither_torch_nor_training(module: str) -> None:
    """Transitively, in a process of its own: what a room imports may import more."""
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split())
    assert loaded & {"torch", "transformers", "pe_dpo.training", "pe_dpo.data", "pe_dpo.objective"} == set()


def test_only_the_command_line_prints() -> None:
    def prints(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "sys.stdout.write")

    found = {file for file, tree in FILES.items() if any(prints(node) for node in ast.walk(tree))}
    assert {file for file in found if room(file) != "cli"} == set()


def test_no_error_is_swallowed_blindly() -> None:
    def is_blind(node: ast.AST) -> bool:
        if not isinstance(node, ast.ExceptHandler):
            return False
        caught = node.type and {ast.unparse(one) for one in getattr(node.type, "elts", [node.type])}
        is_broad = not caught or bool(caught & {"Exception", "BaseException"})
        return is_broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))

    assert [f"{file}:{node.lineno}" for file, tree in FILES.items() for node in ast.walk(tree) if is_blind(node)] == []


LOADERS = {"from_pretrained", "from_config"}


def test_no_code_of_a_model_repository_is_ever_run() -> None:
    """Left to itself transformers asks on the terminal, and a y that comes from anywhere runs it."""
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS):
                continue
            if ast.unparse(node.func.value).startswith("Peft"):  # reads an adapter; has no such code
                continue
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{file}:{node.lineno}: {ast.unparse(node.func)}"

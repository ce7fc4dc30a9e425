"""Who may import whom, read from the source.

Imports go downwards only, so that each room can be read, tested and used without those above it: the loss without a trainer,
the data without a model, a recipe without torch. A library that is dear to import or likely to change is known to one room
only, so that `pe-dpo --help` stays quick and a new version of it is met in one place. Only the command line talks to people:
what prints or swallows errors elsewhere cannot be used as a library.
"""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import pe_dpo

ROOT = Path(pe_dpo.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}

LEVELS = (
    {"hub", "links", "printable", "progress", "quantizations", "startup"},
    {"errors"},
    {"disk", "interruption", "log"},
    {"recipe", "metrics", "objective"},
    {"runs", "data", "model"},
    {"inference"},
    {"audit", "estimate"},
    {"training", "evaluation", "merging", "export", "chat"},
    {"experiments", "quickstart"},
    {"report", "convert"},
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
    "trl": ("convert/proof.py",),
}
NEVER_IN = {
    "torch": ("recipe/", "metrics/", "runs/", "errors.py"),
    "transformers": ("recipe/", "metrics/", "objective/"),
    "pydantic": ("objective/", "model/"),
}
HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes", "accelerate", "pydantic", "numpy", "yaml", "rich"}


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Dotted names of all modules that some nodes of a tree import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide their room"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "pe_dpo" else [module]


def room(name: str) -> str:
    """The room of a file or of a dotted name below `pe_dpo.`."""
    return name.removesuffix(".py").replace("/", ".").split(".")[0]


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """Of each file; read when a test asks, so that processes that run none of these do not."""
    return {file: ast.parse(path.read_text(encoding="utf-8")) for file, path in SOURCES.items()}


@pytest.fixture(scope="module")
def all_nodes(trees: dict[str, ast.Module]) -> dict[str, list[ast.AST]]:
    return {file: list(ast.walk(tree)) for file, tree in trees.items()}


@pytest.fixture(scope="module")
def imported(all_nodes: dict[str, list[ast.AST]]) -> dict[str, set[str]]:
    """By each file, inside functions too."""
    return {file: set(imports(nodes)) for file, nodes in all_nodes.items()}


@pytest.fixture(scope="module")
def libraries(imported: dict[str, set[str]]) -> dict[str, set[str]]:
    return {file: {name.split(".")[0] for name in names} for file, names in imported.items()}


def test_every_room_is_listed() -> None:
    assert {room(file) for file in SOURCES} - {"__init__", "__main__"} == ROOMS


def test_imports_go_downwards_only(imported: dict[str, set[str]]) -> None:
    upwards = {}
    for file in [file for file in SOURCES if room(file) in ROOMS]:
        ours = {room(name.removeprefix("pe_dpo.")) for name in imported[file] if name.startswith("pe_dpo.")}
        upwards[file] = {other for other in ours - {room(file)} if LEVEL[other] >= LEVEL[room(file)]}
    assert {file: others for file, others in upwards.items() if others} == {}


def imported_when_run(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports in a tree, inside functions too, without those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # no expression imports
            yield from imported_when_run(child)


@pytest.mark.parametrize("package", [ROOT, Path(__file__).parents[1] / "benchmarks"], ids=["pe_dpo", "benchmarks"])
@pytest.mark.slow
def test_no_two_modules_need_each_other(package: Path, trees: dict[str, ast.Module]) -> None:
    """An import inside a function counts: it only puts off the question which of the two is below the other."""
    paths = {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in package.rglob("*.py")}
    known = {SOURCES[file]: tree for file, tree in trees.items()}
    parsed = {name: known.get(path) or ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    modules = {name.removesuffix(".__init__"): tree for name, tree in parsed.items()}
    needed: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for one in imported_when_run(tree):
            within = f"{one.module}." if isinstance(one, ast.ImportFrom) else ""
            for alias in one.names:
                module = f"{within}{alias.name}"
                needed[name].add(module if module in modules else within.rstrip("."))
    graphlib.TopologicalSorter(needed).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_known_to_one_room(library: str, libraries: dict[str, set[str]]) -> None:
    users = [file for file, names in libraries.items() if library in names]
    assert [file for file in users if not file.startswith(ONLY_IN[library])] == []


@pytest.mark.parametrize("library", NEVER_IN)
def test_a_room_stays_free_of_a_library(library: str, libraries: dict[str, set[str]]) -> None:
    assert [file for file, names in libraries.items() if file.startswith(NEVER_IN[library]) and library in names] == []


@pytest.mark.parametrize("file", ["__init__.py", "__main__.py", "links.py", *(file for file in SOURCES if room(file) == "cli")])
def test_the_front_door_imports_nothing_heavy_until_a_command_runs(file: str, trees: dict[str, ast.Module]) -> None:
    """Functions import what they need; what only a type checker sees does not count."""
    now = [node for node in trees[file].body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)]
    names = set(imports(ast.walk(ast.Module(now, []))))
    assert {name.split(".")[0] for name in names} & HEAVY == set()
    assert {room(name.removeprefix("pe_dpo.")) for name in names if name.startswith("pe_dpo.")} <= {
        "cli",
        "disk",
        "errors",
        "links",
        "quantizations",
        "log",
        "printable",
        "progress",
        "interruption",
        "startup",
    }


@pytest.mark.slow
def test_a_comparison_and_a_report_need_neither_torch_nor_training() -> None:
    """Transitively, in a process of its own: what a room imports may import more."""
    modules = [f"pe_dpo.{file.removesuffix('.py').replace('/', '.')}" for file in SOURCES if room(file) == "report"]
    code = f"import sys, pe_dpo.experiments.compare, pe_dpo.metrics.catalogue, {', '.join(modules)}; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split())
    assert loaded & {"torch", "transformers", "pe_dpo.training", "pe_dpo.data", "pe_dpo.objective"} == set()


def test_only_the_command_line_prints(all_nodes: dict[str, list[ast.AST]]) -> None:
    def prints(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call) or getattr(node.func, "id", getattr(node.func, "attr", "")) not in words:
            return False
        return ast.unparse(node.func) in ("print", "typer.echo", "sys.stdout.write")

    words = ("print", "echo", "write")
    found = {file for file, nodes in all_nodes.items() if any(map(prints, nodes))}
    assert {file for file in found if room(file) != "cli"} == set()


FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
COMMAND = re.compile(r"\b(pe-dpo|vllm|python|llama-quantize) ((?![,;.:)] )[^`\n])*")
"""A program with what is given to it, up to the end of the clause."""


def texts(node: ast.AST) -> Iterator[str]:
    """Strings in a tree, without docstrings: an f-string with … for its values, the words of a command in one string."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        for part in node.values:
            yield from texts(part) if isinstance(part, ast.FormattedValue) else ()
    elif isinstance(node, ast.List) and node.elts and COMMAND.match(f"{getattr(node.elts[0], 'value', '')} "):
        yield " ".join(word for child in node.elts for word in texts(child))
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def flags_outside_commands(tree: ast.AST) -> list[str]:
    return [text for text in texts(tree) if FLAG.search(COMMAND.sub("", text))]


def test_only_the_command_line_names_flags(trees: dict[str, ast.Module]) -> None:
    """Who calls a function has no flags: a message names an argument in backticks, and `cli.options` says it as a flag.

    Commands that are shown to be copied have theirs.
    """
    found = {file: flags_outside_commands(tree) for file, tree in trees.items() if room(file) != "cli"}
    assert {file: texts for file, texts in found.items() if texts} == {}


@pytest.mark.parametrize(("code", "found"), [
    ('raise E(f"{name}: name it with --base")', ["…: name it with --base"]),
    ('x = f"{x}: finish it with pe-dpo train {recipe} --resume"', []),
    ('x = "pe-dpo train R, or choose another --output"', ["pe-dpo train R, or choose another --output"]),
    ('["pe-dpo", "eval", run, *(["--scale", "0.5"] if x else [])]', []),
    ('["--scale", "0.5"]', ["--scale"]),
    ('"""Read --set key=VALUE."""', []),
])  # fmt: skip
def test_a_flag_is_told_from_a_command(code: str, found: list[str]) -> None:
    assert flags_outside_commands(ast.parse(code)) == found


def test_a_class_name_means_one_thing(all_nodes: dict[str, list[ast.AST]]) -> None:
    places: dict[str, list[str]] = {}
    for file, nodes in all_nodes.items():
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(file)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


BORDERS = {"experiments/point.py", "experiments/on_ray.py", "training/trackers.py"}
"""Behind which anybody's code runs, once in each file: what it raises is the failure of one run of a sweep, or of a tracker."""


def test_no_error_is_swallowed_blindly_but_at_a_border(all_nodes: dict[str, list[ast.AST]]) -> None:
    def is_blind(node: ast.AST) -> bool:
        if not isinstance(node, ast.ExceptHandler):
            return False
        caught = node.type and {ast.unparse(one) for one in getattr(node.type, "elts", [node.type])}
        is_broad = not caught or bool(caught & {"Exception", "BaseException"})
        return is_broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))

    assert sorted(file for file, nodes in all_nodes.items() for node in nodes if is_blind(node)) == sorted(BORDERS)


LOADERS = {"from_pretrained", "from_config"}


def test_no_code_of_a_model_repository_is_ever_run(all_nodes: dict[str, list[ast.AST]]) -> None:
    """Left to itself transformers asks on the terminal, and a y that comes from anywhere runs it."""
    for file, nodes in all_nodes.items():
        for node in nodes:
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS):
                continue
            if ast.unparse(node.func.value).startswith("Peft"):  # reads an adapter; has no such code
                continue
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{file}:{node.lineno}: {ast.unparse(node.func)}"

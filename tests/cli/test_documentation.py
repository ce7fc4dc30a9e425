"""What the documentation shows works: every command runs, recipes and imports are there."""

import ast
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
import tomllib
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fake_runs
import pytest
import typer
import yaml

import pe_dpo as package
from pe_dpo.cli import app
from pe_dpo.cli.options import OnceEach
from pe_dpo.errors import PeDpoError
from pe_dpo.recipe import PRESETS, Recipe, recipe_from_yaml
from pe_dpo.recipe.loss_section import LossSection

EMBEDDED, PAIRS = (Path(package.__file__).parent / "quickstart" / name for name in ("base", "pairs"))
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
COMMAND_LINE = typer.main.get_command(app)
TUTORIAL = ROOT / "docs" / "tutorial.md"
CLICK = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""The errors of typer's parser, of click's own class or of typer's copy."""


class Block(NamedTuple):
    """Code on a page."""

    where: str
    language: str
    lines: list[str]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page: fenced ones, also in lists, and indented ones."""
    name, language, lines, indented, start = page.relative_to(ROOT), None, [], [], 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"\s*```([\w{}-]*)", line)
        if fence and language not in (None, ""):
            yield Block(f"{name}:{start}", language.strip(), lines)
            language, lines = None, []
        elif fence:
            language, lines, start = fence[1] or " ", [], number + 1
        elif language is not None:
            lines.append(line)
        elif line.startswith("    "):
            indented = [*indented, line.strip()]
            continue
        if indented:
            yield Block(f"{name}:{number - len(indented)}", "indented", indented)
            indented = []


EVERY_BLOCK = [block for page in PAGES for block in blocks(page)]


def command_lines(block: Block) -> Iterator[str]:
    """Yield the lines that are commands, with those that go on below them; what stands behind two spaces is said of them."""
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(block.lines)).splitlines():
        if line.strip().startswith(("pe-dpo ", "torchrun ", "make ", "python ", "pip ")):
            yield re.split(r"\s{2,}", line.strip())[0]


SHOWN = [(block.where, line) for block in EVERY_BLOCK for line in command_lines(block)]
IN_TEXT = [
    (str(page.relative_to(ROOT)), " ".join(line.split()))
    for page in PAGES
    for line in re.findall(r"(?<!`)`(pe-dpo [^`]+)`(?!`)", page.read_text(encoding="utf-8"))
]


def refusal(words: list[str]) -> str:
    """Return what the command line says to these words before anything is run; nothing where it takes them."""
    command = COMMAND_LINE
    name, rest = words[0], words[1:]
    if name in ("--help", "--version", "COMMAND"):
        return ""
    if name not in command.commands:
        return f"no command {name}"
    command = command.commands[name]
    if hasattr(command, "commands") and rest:
        name, *rest = rest
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    try:
        command.make_context(name, list(rest))
    except (CLICK, PeDpoError) as error:
        return getattr(error, "message", "") or str(error)
    return ""


def test_there_is_something_to_check() -> None:
    assert len(SHOWN) > 60 and len(IN_TEXT) > 40
    assert refusal(["train", "my.yaml", "--nonsense"]) and refusal(["trains"]) and refusal(["recipes", "shows", "dpo"])
    assert refusal(["train", "my.yaml", "--resume"]) == ""
    assert issubclass(OnceEach, typer.core.TyperCommand)


def test_every_command_line_that_a_page_shows_is_taken() -> None:
    """A flag that is renamed and not renamed here fails; `…` stands for what a reader puts in."""
    found = []
    for where, line in SHOWN:
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            words = words[words.index("pe_dpo") :]
        if words[0] in ("pe-dpo", "pe_dpo") and (said := refusal(words[1:])):
            found.append(f"{where}: {line}: {said}")
    assert found == []


def test_a_how_to_shows_its_commands_whole() -> None:
    """Above 100 characters a page is scrolled sideways; what a comment says may lie there."""
    assert [
        (block.where, line)
        for block in EVERY_BLOCK
        for line in block.lines
        if "how-to/" in block.where and line.startswith("pe-dpo ") and len(line.partition("  #")[0]) > 100
    ] == []


def test_every_command_that_a_sentence_names_is_taken() -> None:
    """There, what a command needs may be left out."""
    found = []
    for where, line in IN_TEXT:
        said = refusal(shlex.split(line.replace("(", "").replace(")", ""))[1:])
        if said and not re.search(r"[Mm]issing (argument|option|parameter)|requires an argument|^'?\w+'?$", said):
            found.append(f"{where}: {line}: {said}")
    assert found == []


def test_every_target_extra_and_benchmark_that_a_page_names_is_there(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    from benchmarks.__main__ import _parser

    measures = _parser()._subparsers._group_actions[0].choices
    found = []
    for where, line in [*SHOWN, *IN_TEXT]:
        words = shlex.split(line, comments=True)
        if words[0] == "make" and words[1] not in makefile:
            found.append(f"{where}: {line}")
        if words[0] == "pip":
            found += [f"{where}: {line}" for extra in re.findall(r"pe-dpo\[([\w,]+)\]", line) if extra not in extras]
        if words[:3] == ["python", "-m", "benchmarks"] and words[3] not in measures:
            found.append(f"{where}: {line}")
        if words[0] == "python" and words[1].endswith(".py") and not (ROOT / words[1]).is_file():
            found.append(f"{where}: {line}")
    assert found == []


def test_every_recipe_that_a_page_shows_is_one() -> None:
    """A part of one, too; a base and data are put in where the block leaves them out."""
    shown = [block for block in EVERY_BLOCK if block.language == "yaml" and "papers.md" not in block.where]
    assert len(shown) > 2
    for block in shown:
        indent = len(block.lines[0]) - len(block.lines[0].lstrip())
        text = "\n".join(line[indent:] for line in block.lines)
        sections = yaml.safe_load(text)
        assert set(sections) <= set(Recipe.model_fields), block.where
        if "base" not in (sections.get("model") or {}):
            text += "\nmodel: {base: some-base}"
        if "train" not in (sections.get("data") or {}):
            text = (
                re.sub(r"(?m)^data: \{", "data: {train: pairs.jsonl, ", text)
                if "data" in sections
                else f"{text}\ndata: {{train: pairs.jsonl}}"
            )
        recipe_from_yaml(text, block.where, ["output=runs/shown"])


def test_each_paper_is_the_recipe_of_its_preset() -> None:
    """Every preset with its source, and two ways to write it that are one loss; `tools/reference.py --write` makes the page."""
    import reference

    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert f"{reference.BEGIN}{reference.papers()}{reference.END}" in page
    parts = re.findall(r"## (.+)\n\n(.+)\n\n```yaml\n(.+)\n# the same as\n(.+)\n```", page)
    assert [(title, source) for title, source, *_ in parts] == [(one.title, f"{one.source}.") for one in PRESETS.values()]
    for _, _, named, written in parts:
        one, other = (LossSection.model_validate(yaml.safe_load(text)["loss"]) for text in (named, written))
        assert one.model_dump(exclude={"preset"}) == other.model_dump(exclude={"preset"})


def test_every_python_block_compiles_and_imports_what_is_there() -> None:
    shown = [block for block in EVERY_BLOCK if block.language == "python"]
    assert len(shown) > 2
    for block in shown:
        indent = len(block.lines[0]) - len(block.lines[0].lstrip())
        tree = ast.parse("\n".join(line[indent:] for line in block.lines).replace("…", "..."), block.where)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "pe_dpo":
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == [], block.where


def test_the_reference_has_every_key_command_and_metric() -> None:
    """Told from the models and the command line, and not from the tables that are made of them."""
    import reference

    from pe_dpo.metrics.catalogue import METRICS

    keys, options = reference.recipe_keys(), reference.commands()

    def names(model: type, above: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            inner = field.annotation if hasattr(field.annotation, "model_fields") else None
            yield from names(inner, f"{above}{name}.") if inner else [f"{above}{name}"]

    wanted = list(names(Recipe))
    assert len(wanted) > 70 and [name for name in wanted if f"| `{name}` |" not in keys] == []
    assert [line for line in keys.splitlines() if line.endswith("|  |")] == []  # each is explained
    command = COMMAND_LINE
    flags = [flag for one in command.commands.values() for option in one.params for flag in option.opts if flag[0] == "-"]
    assert [flag for flag in flags if f"`{flag}`" not in options and flag != "--help"] == []
    assert [name for name in command.commands if f"## pe-dpo {name}" not in options] == []
    assert [key for key in METRICS if f"| `{key}` |" not in reference.metrics()] == []


def test_every_page_stands_in_the_table_of_contents_and_every_link_leads_somewhere() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.S)
    entries = [line for tree in trees for line in tree.splitlines() if line[:1].isalpha()]
    listed = {re.sub(r".*<(.+)>", r"\1", entry) for entry in entries}
    pages = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert listed == pages - {"index"}
    found = []
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "gpu" / "README.md"]:
        text = re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8"))
        for link in re.findall(r"\]\(([^)\s:#]+)", text):
            if not (page.parent / link).exists():
                found.append(f"{page.relative_to(ROOT)}: {link}")
    assert found == []


def test_pages_quote_of_quickstart_what_its_picture_shows() -> None:
    picture = (ROOT / "docs" / "_static" / "quickstart.svg").read_text(encoding="utf-8")
    starts = ("accuracy, summed", "reward accuracy ", "chosen, nats", "rejected, nats")
    shown = [block for page in (TUTORIAL, ROOT / "docs" / "reading-a-run.md") for block in blocks(page)]
    quoted = [line for block in shown for line in block.lines if line.startswith(starts)]
    numbers = [number for line in quoted for number in re.findall(r"-?\d+\.\d+", re.sub(r"\[.*?\]", "", line))]
    assert (len(quoted), len(numbers)) == (8, 16)
    assert [number for number in numbers if number not in picture] == []


PLACES = {
    **dict.fromkeys(("RUN", "ADAPTER", "runs/mine", "runs/qwen3-4b-dpo"), "runs/quickstart"),
    **dict.fromkeys(("RECIPE", "hh.yaml", "politeness.yaml", "docs/study/harmless.yaml"), "my.yaml"),
    **dict.fromkeys(("BASE", "Qwen/Qwen3-4B-Instruct-2507"), str(EMBEDDED)),
    **{"OUT": "tuned", "FOLDER": "tuned-gguf", "NAME": "qwen3-4b-dpo", "URL": "http://127.0.0.1:8080"},
}
"""What stands for the names on the pages; a folder behind -o is made as it is named."""
FILES = {"FILE": "config_qlora.yaml"} | PLACES, {"FILE": "pairs.jsonl"} | PLACES
"""For `convert`, and for all others."""
NOT_RUN = {
    "pe-dpo COMMAND --help": "stands for all commands; tests/cli/test_help.py",
    "pe-dpo export BASE --plain -o FOLDER": "takes a base of codes; tests/export/test_plain_folder.py",
    "pe-dpo train recipe.yaml": "a heading, the recipe of which is any",
    "torchrun --nproc-per-node 2 -m pe_dpo train my.yaml": "starts processes; tests/training/test_distributed.py",
}
"""Lines that no test of this file runs, and why."""
ORDER = ("data", "audit", "train", "merge", "export")
"""What others go on with is made before them."""


def lines_to_run() -> list[str]:
    """Every line of a block, and of a sentence those that are whole and name what they are about."""
    shown = [line for _, line in SHOWN if line.startswith(("pe-dpo ", "torchrun "))]
    told = [line for _, line in IN_TEXT if len(line.split()) > 2 and "…" not in line and not refusal(shlex.split(line)[1:])]
    return [line for line in dict.fromkeys(shown + told) if line not in NOT_RUN]


@pytest.mark.slow
def test_every_comparison_and_page_of_a_sweep_is_made(pe_dpo, tmp_path, monkeypatch) -> None:
    """On sweeps that nobody trained, each folder that a line names being one."""
    monkeypatch.chdir(tmp_path)
    grid = [{}, {"loss.beta": 0.025}, {"loss.beta": 0.4}, {"mixout.p": 0.5}]
    lines = [line for line in lines_to_run() if is_of_sweeps(line)]
    assert len(lines) >= 8
    for name in {word for line in lines for word in line.split()[2:] if word.startswith(("runs/", "politeness"))}:
        fake_runs.write_sweep(
            tmp_path / name, grid, pairs=12, prompts=8, snapshots=0, scales=(0.5,), steps=1, seeds=(0, 1), seed=len(name)
        )
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        done = pe_dpo(*words, *(["--repeats", 100] if words[0] == "compare" else []))
        assert done.code == 0 and (words[0] == "report" or "measured policies" in done.out), (line, done.err)


def is_of_sweeps(line: str) -> bool:
    """Whether a command is for what a sweep left."""
    return line.startswith("pe-dpo compare ") or re.match(r"pe-dpo report (runs/my-sweep|politeness)", line) is not None


@pytest.fixture(scope="module")
def walk(pe_dpo, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder that the tutorial leaves, its commands run in their order on the embedded base, and what each of them said."""
    folder = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = [json.loads(line) for line in (PAIRS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:24]]
        write_rows(folder / "pairs.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
        (recipe,) = ("\n".join(block.lines) for block in blocks(TUTORIAL) if block.language == "yaml")
        for here, there in (("Qwen/Qwen3-0.6B", str(EMBEDDED)), ("eval: 0.05", "eval: 0.2"),
                            ("pairs_per_step: 64", "pairs_per_step: 4, max_steps: 1, keep_best: accuracy/policy")):  # fmt: skip
            assert here in recipe
            recipe = recipe.replace(here, there)
        (folder / "my.yaml").write_text(recipe, encoding="utf-8")
        said = {"pe-dpo quickstart": pe_dpo("train", "my.yaml", "-o", "runs/quickstart", "--lr", "1e-2")}
        for block in blocks(TUTORIAL):
            for line in command_lines(block):
                if line.startswith("pe-dpo "):
                    said[line] = pe_dpo(*shlex.split(line, comments=True)[1:])
    return folder, said


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.slow
def test_the_tutorial_runs_as_it_stands(walk, monkeypatch) -> None:
    """Its commands, and its program: what it loads answers."""
    folder, said = walk
    monkeypatch.chdir(folder)
    assert len(said) == 12
    assert {line: done.err for line, done in said.items() if done.code} == {}
    assert "serves what was trained" in said["pe-dpo merge runs/quickstart -o tuned"].out
    assert (folder / "runs" / "quickstart" / "report.html").is_file()
    (program,) = ("\n".join(block.lines) for block in blocks(TUTORIAL) if block.language == "python")
    found: dict[str, object] = {}
    exec(compile(program, str(TUTORIAL), "exec"), found)
    assert found["answer"].shape[1] > found["prompt"]["input_ids"].shape[1]


@pytest.fixture
def pushed(walk, monkeypatch) -> list[str]:
    """What was sent to a stand-in for a hub; a stand-in for a server answers the golden prompts as the model does."""

    def answered(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        if not request.data:
            return io.BytesIO(b'{"data": [{"id": "tuned"}]}')
        golden = (walk[0] / "tuned-gguf" / "golden_prompts.jsonl").read_text(encoding="utf-8").splitlines()
        texts = {one["prompt"]: one["text"] for one in map(json.loads, golden)}
        asked = json.loads(request.data)["messages"][-1]["content"]
        return io.BytesIO(json.dumps({"choices": [{"message": {"content": texts[asked]}}]}).encode())

    monkeypatch.setattr("urllib.request.urlopen", answered)
    pushed = []
    monkeypatch.setattr("pe_dpo.export.push.check_access", lambda name: "a token")
    monkeypatch.setattr("pe_dpo.export.push.push_folder", lambda place, name, **how: pushed.append(place.name) or "sent")
    return pushed


def asked(words: list[str]) -> tuple[str, ...]:
    """Return what a command is asked for, wherever it puts it: who merges one run into folders of three names does it once."""
    return tuple(word for before, word in zip(["", *words], words, strict=False) if "-o" not in (before, word))


@pytest.mark.slow
def test_every_other_command_that_a_page_shows_runs(pe_dpo, walk, pushed, monkeypatch) -> None:
    """On what the tutorial left, with files of the names on the pages; a sweep is planned and not trained."""
    folder, said = walk
    monkeypatch.chdir(folder)
    configs = ROOT / "tests" / "convert" / "configs"
    for name, source in (("config_qlora.yaml", "zephyr-7b-dpo-qlora.yaml"), ("train.sh", "trl-dpo-lora.sh"),
                         ("dpo.yaml", "unsloth-zephyr-dpo.yaml")):  # fmt: skip
        shutil.copy(configs / source, name)
    write_rows(folder / "questions.jsonl", [{"prompt": "Name a bird."}])
    Path("judge.py").write_text("def score(prompts, answers):\n    return [float(len(answer)) for answer in answers]\n")
    lines = [line for line in lines_to_run() if line not in said and not is_of_sweeps(line)]
    assert len(lines) > 40 and set(NOT_RUN) <= {line for _, line in [*SHOWN, *IN_TEXT]}
    names = {line: line.split()[1] for line in lines}
    found, ran = {}, {asked(shlex.split(line)[1:]) for line in said}
    for line in sorted(lines, key=lambda line: ORDER.index(names[line]) if names[line] in ORDER else len(ORDER)):
        words = shlex.split(line, comments=True)[1:]
        words = [word if before == "-o" else FILES[words[0] != "convert"].get(word, word)
                 for before, word in zip(["", *words], words, strict=False)]  # fmt: skip
        if columns := re.search(r"data\.columns=(.*)", words[-1]):
            theirs = yaml.safe_load(columns[1])
            rows = [json.loads(row) for row in Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
            write_rows(folder / "renamed.jsonl", [{theirs[key]: value for key, value in row.items()} for row in rows])
            words[1] = "renamed.jsonl"
        if words[0] == "sweep":
            words.append("--plan")
        if words[:2] == ["recipes", "copy"]:
            words[-1] = f"copy-{len(ran)}.yaml"
        if asked(words) in ran or ("--prove" in words and importlib.util.find_spec("trl") is None):
            continue
        ran.add(asked(words))
        if "-o" in words:
            place = Path(words[words.index("-o") + 1])
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/quit\n"))
        done = pe_dpo(*words)
        if done.code:
            found[line] = done.err
        if line == "pe-dpo chat runs/mine":
            assert re.search(r"\nyou +Hi\n(.*\n)*base +", done.out)
    assert found == {}
    assert pushed == ["tuned", "quickstart"]

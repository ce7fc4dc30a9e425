"""Help: there for every command, quick, and without the heavy libraries."""

import os
import re
import shlex
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

COMMANDS = [
    (), ("quickstart",), ("convert",), ("data",), ("check",), ("audit",), ("train",), ("eval",), ("recipes",),
    ("recipes", "list"), ("recipes", "show"), ("recipes", "losses"), ("recipes", "copy"), ("recipes", "schema"), ("report",),
    ("serve",),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(pe_dpo, command):
    done = pe_dpo(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert " ".join(["pe-dpo", *command, "["]) in done.out.splitlines()[0]


@pytest.mark.parametrize("command", ["train", "quickstart"])
def test_the_dials_people_turn_most_are_flags(pe_dpo, command):
    page = pe_dpo(command, "--help").out
    dials = ["loss", "beta", "gamma", "margin", "link", "mixout", "lr", "epochs", "seed", "output", "set"]
    # With a value: `<float>`, or FLOAT as earlier versions of typer write it.
    assert [dial for dial in dials if not re.search(rf"--{dial} [<A-Z]", page)] == []


def test_the_first_page_names_every_command(pe_dpo):
    page = pe_dpo("--help").out
    assert all(f"\n  {command[0]} " in page for command in COMMANDS if len(command) == 1)


@pytest.mark.slow
def test_every_command_is_listed_whole_and_its_help_ends_with_one_line_that_works(pe_dpo):
    """At 80 columns; that a line works is here that each of its words is read: a run of the quickstart is not made for it."""
    from typer.main import get_command

    from pe_dpo.cli import app

    group = get_command(app)
    for path, parent in [((), group), (("recipes",), group.commands["recipes"])]:
        page = pe_dpo(*path, "--help", columns=80).out
        assert "…" not in page and "..." not in page.partition("Commands:")[2]
        assert all(re.search(rf"^  {name}  +\S.*\w$", page, re.MULTILINE) for name in parent.commands)
    for name, command in group.commands.items():
        for path, one in [
            ((name,), command),
            *(((name, inner), two) for inner, two in getattr(command, "commands", {}).items()),
        ]:
            example = pe_dpo(*path, "--help", columns=80).out.rstrip().splitlines()[-1].removeprefix("  Example: ")
            words = shlex.split(example.partition(" > ")[0])
            assert words[: 1 + len(path)] == ["pe-dpo", *path] or words[:2] == ["pe-dpo", name]
            if not getattr(one, "commands", None):
                one.make_context(name, words[1 + len(path) :]).close()


def test_the_version_is_told(pe_dpo):
    from pe_dpo import __version__

    assert pe_dpo("--version") == (0, f"pe-dpo {__version__}\n", "")


@pytest.mark.parametrize("arguments", [
    ("nonsense",), ("train",), ("train", "x.yaml", "--nonsense"), ("train", "x.yaml", "--beta", "y"),
])  # fmt: skip
def test_a_mistyped_command_is_a_usage_error_with_a_hint_at_the_help(pe_dpo, arguments):
    done = pe_dpo(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "--help' for help." in done.err


@pytest.mark.parametrize("arguments", [(), ("recipes",)])
def test_without_a_command_the_help_is_shown_and_the_exit_code_says_usage(pe_dpo, arguments):
    done = pe_dpo(*arguments)
    assert done.code == 2
    assert "Commands:" in done.out + done.err


HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes", "numpy", "yaml", "accelerate"}


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "heavy"), [
    (["--help"], HEAVY | {"pydantic"}),
    (["train", "--help"], HEAVY),  # typer 0.29 itself imports pydantic when a command has parameters
    (["recipes", "list", "--help"], HEAVY),
])  # fmt: skip
def test_help_imports_no_heavy_library(arguments, heavy):
    """In a fresh process, because this one has them already."""
    program = (
        f"import sys\nfrom pe_dpo.cli import main\nsys.argv = ['pe-dpo', *{arguments}]\n"
        f"try: main()\nexcept SystemExit: print('found', sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "found []"


@pytest.mark.slow
def test_a_command_imports_what_it_needs_and_no_more(tiny_base, tiny_pairs, tmp_path):
    """In one process, from the lightest to the heaviest: each may bring its own libraries alone.

    Torch and the class of a Llama take 3.8 CPU seconds, PEFT with Trainer 2.
    """
    recipe, golden = tmp_path / "tiny.yaml", tmp_path / "golden_prompts.jsonl"
    recipe.write_text(f"model: {{base: '{tiny_base}', quantize: none}}\ndata: {{train: '{tiny_pairs}'}}\n")
    golden.write_text("")
    heavy = "torch transformers.modeling_utils transformers.trainer peft bitsandbytes datasets matplotlib trl gguf ray"
    commands = [
        ["recipes", "list"],
        ["recipes", "losses"],
        ["golden", str(golden), "http://127.0.0.1:9"],
        ["data", str(tiny_pairs)],
        ["data", "--recipe", str(recipe)],
        ["check", str(recipe)],
    ]
    program = (
        "import sys\nfrom pe_dpo.cli import main\n"
        f"for words in {commands}:\n"
        "    sys.argv = ['pe-dpo', *words]\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        f"    print('found', words[0], *(name for name in {heavy.split()} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("found ")]
    assert found == [
        ["recipes"], ["recipes"], ["golden"], ["data"], ["data", "torch"], ["check", "torch", "transformers.modeling_utils"],
    ]  # fmt: skip


@pytest.mark.slow
def test_help_takes_little_longer_than_the_library_it_is_written_with():
    """Side by side, best of three, so that a busy machine slows both; on two quiet cores 68 ms, typer 57 and bare Python 10."""
    measured = {"help": ["-m", "pe_dpo", "--help"], "typer": ["-c", "import typer"]}
    seconds = dict.fromkeys(measured, float("inf"))
    for _ in range(3):
        for name, arguments in measured.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    assert seconds["help"] < 3 * seconds["typer"]


@pytest.mark.parametrize("theirs", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_of_a_card_grows_its_segments_unless_it_was_told_otherwise(theirs):
    """Before torch is imported: after that it would be too late."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    program = (
        "import os, sys; from pe_dpo import cli\n"
        "cli.app = lambda: print('torch' in sys.modules, [os.environ.get(name) for name in cli.ALLOCATOR])\n"
        "cli.main()"
    )
    given = {name: value for name, value in os.environ.items() if name not in names} | (
        {theirs: "backend:native"} if theirs else {}
    )
    printed = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True, check=True).stdout
    wanted = ["expandable_segments:True", None] if theirs is None else [given.get(name) for name in names]
    assert printed.strip() == f"False {wanted}"


@pytest.mark.parametrize(
    ("given", "card", "wanted"),
    [
        ({}, False, {"GOMP_SPINCOUNT": "5000"}),
        ({}, True, {}),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True, {"GOMP_SPINCOUNT": "5000"}),
        ({"OMP_WAIT_POLICY": "active"}, False, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "7"}, False, {"GOMP_SPINCOUNT": "7"}),
        ({"KMP_BLOCKTIME": "0"}, False, {"KMP_BLOCKTIME": "0"}),
    ],
)
def test_threads_that_wait_on_a_cpu_soon_sleep_unless_they_were_told_otherwise(monkeypatch, tmp_path, given, card, wanted):
    """Before torch is imported, and never where there is a card."""
    from pe_dpo import cli

    environ = dict(given)
    monkeypatch.setattr(cli, "os", SimpleNamespace(environ=environ))
    monkeypatch.setattr(cli, "GPUS", (str(tmp_path / "no-device"), *([str(tmp_path)] if card else [])))
    monkeypatch.setattr(cli, "app", lambda: None)
    cli.main()
    assert {name: environ[name] for name in cli.WAITING if name in environ} == wanted

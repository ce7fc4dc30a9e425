"""Commands that are printed for copying do what they say in a shell, whatever the name of the folder."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest

import pe_dpo as package
from pe_dpo.cli.held_out import show_result
from pe_dpo.export.gguf_tokenizer import refuse
from pe_dpo.runs.files import remedy
from pe_dpo.runs.serving import model_commands

NAME = """it's "my" $HOME; run"""
PROGRAM = "|".join(
    ("pe-dpo [a-z]+", "vllm serve", "transformers serve", "ollama (?:create|run)", "llama-server", "llama-quantize",
     "convert_hf_to_gguf.py", "cd")
)  # fmt: skip
BEFORE_A_NAME = re.compile(rf"(?:{PROGRAM}|--(?!max-lora-rank)[a-z-]+|-[a-z]) $")  # that one is a number
ROOT = Path(package.__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_command_is_put_together_without_quoting(file):
    """Read from the source: in an f-string that names a command, what follows it or one of its options is quoted."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.JoinedStr):
            continue
        words = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        if not re.search(rf"(?:{PROGRAM}) ", words):
            continue
        for before, part in zip(node.values, node.values[1:], strict=False):
            if isinstance(part, ast.FormattedValue) and isinstance(before, ast.Constant) and BEFORE_A_NAME.search(before.value):
                assert "quote" in ast.unparse(part.value), f"{file}:{node.lineno}: {ast.unparse(part.value)}"


@pytest.fixture
def renamed(trained, tmp_path):
    """A copy of a finished run in a folder of a name that a shell would take apart."""
    return Path(shutil.copytree(trained[0], tmp_path / NAME))


def commands(text):
    """The words of each pe-dpo command in a text, as a shell reads them; a command ends with its line, or at a ; or `."""
    found = []
    for start in re.finditer(r"pe-dpo (?=[a-z]+ )", text):
        lexer = shlex.shlex(text[start.start() :].partition("\n")[0].partition("`")[0], posix=True, punctuation_chars=";,")
        lexer.whitespace_split = True
        words = []
        for word in lexer:
            if set(word) <= set(";,"):
                break
            words.append(word)
        found.append(words)
    return found


@pytest.mark.slow
def test_a_run_is_merged_by_the_command_that_training_ends_with(pe_dpo, recipe_file, tmp_path):
    done = pe_dpo("train", recipe_file, "-o", tmp_path / NAME)
    assert ["pe-dpo", "merge", str(tmp_path / NAME), "-o", "MODEL"] in commands(done.out)


@pytest.mark.slow
def test_an_interrupted_run_is_gone_on_with_by_the_command_that_it_ends_with(renamed, capsys):
    import typer

    from pe_dpo.training.train import StartCheck, TrainResult

    with pytest.raises(typer.Exit):
        show_result(TrainResult(renamed, {}, {}, StartCheck(1, 0.0, 0.0, 0.0), 1, 15, []))
    assert ["pe-dpo", "train", str(renamed / "recipe.yaml"), "--resume"] in commands(capsys.readouterr().out)


def test_the_remedies_of_errors_can_be_copied(pe_dpo, renamed):
    assert commands(remedy(renamed, ["0.5"])) == [["pe-dpo", "eval", str(renamed), "--scale", "0.5"]]
    (renamed / "eval_pairs.parquet").write_bytes(b"torn")
    done = pe_dpo("report", renamed)
    assert ["pe-dpo", "eval", str(renamed)] in commands(done.err)
    (renamed / "adapter_model.safetensors").unlink()
    (renamed / "run.json").write_text('{"status": "interrupted"}')
    for command in ("eval", "compare"):
        done = pe_dpo(command, renamed)
        assert any(words[:4] == ["pe-dpo", "train", str(renamed / "recipe.yaml"), "--resume"] for words in commands(done.err))


def test_commands_that_serve_quote_what_they_name():
    assert [shlex.split(line)[-1] for line in model_commands(NAME)] == [NAME, NAME]
    text = str(refuse(Path(NAME), "no")).partition("llama.cpp converts it: ")[2]
    convert, quantize = text.split(", and for K-quants then: ")
    assert shlex.split(convert)[2:5] == [NAME, "--outfile", f"{NAME}-f16.gguf"]
    assert shlex.split(quantize)[1:3] == [f"{NAME}-f16.gguf", f"{NAME}-Q4_K_M.gguf"]


def test_a_sweep_is_compared_by_the_command_that_it_ends_with(capsys):
    from pe_dpo.cli.sweep import _say_what_is_next
    from pe_dpo.experiments.plan import Point
    from pe_dpo.experiments.point import PointState

    _say_what_is_next([PointState(Point("base", {}, 0, "x"), "finished")], NAME)
    assert commands(capsys.readouterr().out) == [["pe-dpo", "compare", NAME], ["pe-dpo", "report", NAME]]


def test_a_folder_that_is_no_model_is_merged_by_the_command_that_export_tells(pe_dpo, renamed, tmp_path):
    done = pe_dpo("export", renamed, "-o", tmp_path / "out")
    assert ["pe-dpo", "merge", str(renamed), "-o", "MODEL"] in commands(done.err)

"""`pe-dpo export` as a user calls it."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import pe_dpo
from pe_dpo.cli.export import export
from pe_dpo.errors import ModelError, PeDpoError, UsageError
from pe_dpo.export.golden import QUESTIONS

BASE = Path(pe_dpo.__file__).parent / "quickstart" / "base"


def run(*arguments: Any) -> str:
    """What the command prints; its errors are raised."""
    app = typer.Typer()
    app.command()(export)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, PeDpoError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_an_export_holds_the_model_the_modelfile_and_golden_prompts(tmp_path: Path) -> None:
    model = shutil.copytree(BASE, tmp_path / "model")
    (model / "merge_report.json").write_text("{}")  # by which `serve` knows whose it is
    output = run(model, "-o", tmp_path / "Vale", "--gguf", "bf16")
    files = ["Modelfile", "Vale.gguf", "golden_prompts.jsonl", "merge_report.json"]
    assert sorted(file.name for file in (tmp_path / "Vale").iterdir()) == files
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["Vale", "model"]
    assert "mean KL 0 nats on 5 golden prompts" in output and "tokens the same" in output
    assert "ollama create vale -f Modelfile" in output and f"llama-server -m {tmp_path / 'Vale' / 'Vale.gguf'}" in output
    assert (tmp_path / "Vale" / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./Vale.gguf\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_every_kind_is_written_and_measured(tmp_path: Path, kind: str) -> None:
    output = run(BASE, "-o", tmp_path / "out", "--gguf", kind)
    assert f"({kind}, 29 tensors" in output and "read back: mean KL" in output
    assert ("answers the same" in output) == (kind in ("q8_0", "q4_0"))


@pytest.mark.slow
def test_prompts_come_from_a_file_of_pairs(tmp_path: Path, tiny_pairs: Path) -> None:
    run(BASE, "-o", tmp_path / "out", "--gguf", "q8_0", "--prompts", tiny_pairs / "test.jsonl")
    lines = (tmp_path / "out" / "golden_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["prompt"] for line in (tiny_pairs / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [json.loads(line)["prompt"] for line in lines] == asked[:5]
    assert not set(asked) & set(QUESTIONS)


@pytest.mark.slow
def test_a_chat_template_that_is_none_of_blocks_is_left_to_ollama(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    text = (model / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text(text + "{{ messages | length }}", encoding="utf-8")
    output = run(model, "-o", tmp_path / "out", "--gguf", "bf16")
    assert "warning: no TEMPLATE in the Modelfile: the chat template cannot be written" in " ".join(output.split())
    written = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert "REQUIRES 0.30.0\n" in written and "TEMPLATE " not in written


@pytest.mark.slow
def test_a_copy_that_answers_otherwise_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pe_dpo.export import gguf_file

    monkeypatch.setattr(gguf_file, "permuted", lambda tensor, name, config: tensor)
    with pytest.raises(ModelError, match="the GGUF file is not the model"):
        run(BASE, "-o", tmp_path / "out", "--gguf", "bf16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "what"), [("run.json", "a run"), ("adapter_config.json", "an adapter")])
def test_what_is_not_merged_is_refused_with_the_command_that_merges(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=f"is {what}, not a whole model; merge it first: pe-dpo merge"):
        run(tmp_path, "-o", tmp_path / "out", "--gguf", "f16")


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="is not empty"):
        run(BASE, "-o", tmp_path, "--gguf", "f16")


@pytest.mark.slow
def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(BASE, "-o", tmp_path / "out", "--gguf", "bf16")
    assert (tmp_path / "out" / "out.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to do"),
        (["--gguf", "q4_k_m", "-o", "out"], "write one of f32"),
        (["--gguf", "f16"], "go together"),
        (["--gguf", "f16", "-o", "out", "--prompts", "nowhere.jsonl"], "no such file"),
    ],
)
def test_requests_that_make_no_sense_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(BASE, *arguments)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        run(tmp_path / "nowhere", "-o", tmp_path / "out", "--gguf", "f16")


@pytest.mark.slow
@pytest.mark.parametrize("with_gguf", [True, False])
def test_a_push_takes_the_export_or_else_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_gguf: bool) -> None:
    pushed: list[tuple[Path, str, bool]] = []

    def push_folder(folder: Path, name: str, *, private: bool = True) -> str:
        pushed.append((folder, name, private))
        return "pushed to the hub"

    hub = types.SimpleNamespace(push_folder=push_folder, check_access=lambda name: "token")
    monkeypatch.setitem(sys.modules, "pe_dpo.export.push", hub)
    more = ["-o", tmp_path / "out", "--gguf", "bf16"] if with_gguf else []
    output = run(BASE, *more, "--push", "me/mine")
    assert pushed == [(tmp_path / "out" if with_gguf else BASE, "me/mine", True)]
    assert "pushed to the hub" in output
    card, own = ((folder / "README.md").read_text(encoding="utf-8") for folder in (pushed[0][0], BASE))
    assert card.startswith(own.rstrip())
    assert ("## The GGUF file\n\n`out.gguf`, bf16: read back: mean KL 0 nats" in card) == with_gguf


def test_a_run_is_pushed_and_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter is; a GGUF file is made of a whole model."""
    pushed: list[Path] = []
    hub = types.SimpleNamespace(push_folder=lambda folder, *_, **__: pushed.append(folder) or "there", check_access=str)
    monkeypatch.setitem(sys.modules, "pe_dpo.export.push", hub)
    for name in ("run.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    assert "there" in run(tmp_path, "--push", "me/mine") and pushed == [tmp_path]
    with pytest.raises(UsageError, match="is a run, not a whole model; merge it first"):
        run(tmp_path, "-o", tmp_path / "out", "--gguf", "bf16", "--push", "me/mine")
    assert pushed == [tmp_path]


def test_a_push_without_a_model_card_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BASE, model, ignore=shutil.ignore_patterns("README.md"))
    with pytest.raises(UsageError, match=r"README\.md: is missing"):
        run(model, "-o", tmp_path / "out", "--gguf", "bf16", "--push", "me/mine")
    assert not (tmp_path / "out").exists()

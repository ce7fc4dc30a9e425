"""`pe-dpo report`: a page and files beside it, or one line that says why not."""

import json
import subprocess
import sys

import fake_runs
import pytest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of few pairs and with the curve of its loss alone: half of the plots take half of the time."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fake_runs.write_run(folder, {"loss.beta": 0.1}, fake_runs.make_world(12, 12), samples=0, snapshots=0, steps=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: line[key] for key in ("step", "loss", "eval_loss") if key in line} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return folder


@pytest.mark.slow
def test_a_run_becomes_a_page_with_its_files(pe_dpo, run, tmp_path) -> None:
    done = pe_dpo("report", run, "-o", tmp_path / "new" / "page.html", "--figures", tmp_path / "figures")
    assert (done.code, done.err) == (0, "")
    verdict, *missing, last = done.out.splitlines()
    assert "held-out pair" in verdict
    assert len(missing) == len(set(missing)) == 4
    assert all(line.startswith("not in it: ") for line in missing)
    assert last.startswith(f"{tmp_path / 'new' / 'page.html'}; ")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert {"table.md", "loss.png"} <= {path.name for path in (tmp_path / "figures").iterdir()}
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".md", ".png"}
    assert not (run / "report").exists()


def test_by_default_a_report_lies_in_the_run(pe_dpo, tmp_path) -> None:
    run = fake_runs.write_run(tmp_path / "run", {"loss.beta": 0.1}, fake_runs.make_world(), samples=0, finished=False)
    (run / "metrics.jsonl").unlink()  # no plots, drawn sooner
    done = pe_dpo("report", run)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("This run is not finished (status: training")
    assert (run / "report.html").is_file()
    assert (run / "report" / "table.md").is_file()


@pytest.mark.slow
def test_a_report_needs_neither_torch_nor_transformers(run, tmp_path) -> None:
    """In a fresh process, because this one has them already."""
    program = (
        "import sys\nfrom pe_dpo.cli import main\ntry: main()\n"
        "except SystemExit as ended: print(ended.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "report", run, "-o", tmp_path / "page.html", "--figures", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize(("arguments", "words"), [
    (["nowhere"], "no such folder"),
    (["."], "neither a run"),
])  # fmt: skip
def test_what_is_neither_a_run_nor_a_sweep_is_a_usage_error(pe_dpo, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    done = pe_dpo("report", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert words in done.err


def test_a_page_is_a_file_and_not_a_folder(pe_dpo, run, tmp_path) -> None:
    done = pe_dpo("report", run, "-o", tmp_path)
    assert done.code == 2
    assert f"--output {tmp_path}: is a folder" in done.err


def test_a_folder_that_cannot_be_made_is_named(pe_dpo, run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    done = pe_dpo("report", run, "-o", tmp_path / "page.html", "--figures", tmp_path / "file")
    assert done.code == 2
    assert f"{tmp_path / 'file'}: cannot be written" in done.err

"""What a path stands for: one file, a folder by its names, a saved dataset, or a name of the Hub."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from paths_to_pairs import load_pairs

from pe_dpo.data.sources import divide_names, find_places
from pe_dpo.errors import DataError

ROWS = [
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "yes", "rejected": "no", "margin": 0.5},
    {"prompt": [{"role": "user", "content": "Ho"}], "chosen": "yea", "rejected": "nay", "margin": 1.0},
]
TEXT_ROW = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(("names", "train", "held_out"), [
    (["train", "test", "all"], ["train"], ["test"]),
    (["train", "train.messages", "test"], ["train"], ["test"]),
    (["train-00000-of-00002", "train-00001-of-00002", "dev"], ["train-00000-of-00002", "train-00001-of-00002"], ["dev"]),
    (["train_prefs", "train_sft", "test_prefs", "test_sft"], ["train_prefs"], ["test_prefs"]),
    (["train", "test", "validation"], ["train"], ["validation"]),
    (["pairs", "test"], ["pairs"], ["test"]),
    (["a", "b"], ["a", "b"], []),
    (["validation"], ["validation"], []),
    (["training", "tests"], ["training", "tests"], []),
    (["training", "evaluation", "testing", "heldout"], ["training"], ["evaluation"]),
    (["training", "testing"], ["training"], ["testing"]),
    (["helpful-train", "helpful-test"], ["helpful-train"], ["helpful-test"]),
    (["dpo_train_v1", "dpo_eval_v1", "notes"], ["dpo_train_v1"], ["dpo_eval_v1"]),
    (["pairs", "pairs.held_out"], ["pairs"], ["pairs.held_out"]),
    (["pairs", "my holdout", "held-out-2"], ["pairs"], ["held-out-2"]),
    (["Train", "Test"], ["Train"], ["Test"]),
    (["a-valid", "a-test", "b"], ["b"], ["a-valid"]),
    (["helpful-train", "harmless-train", "helpful-test", "test"], ["helpful-train", "harmless-train"], ["test"]),
    (["helpful-train-00000-of-00002", "helpful-train-00001-of-00002", "helpful-dev"],
     ["helpful-train-00000-of-00002", "helpful-train-00001-of-00002"], ["helpful-dev"]),
    (["train", "helpful-train", "evaluation"], ["train"], []),
    (["more-train", "pairs"], ["more-train", "pairs"], []),
    (["a-train-test", "b"], ["a-train-test", "b"], []),
    (["latest", "contest", "devil", "trainer", "evaluations"], ["latest", "contest", "devil", "trainer", "evaluations"], []),
    (["helpful-test", "harmless-test"], ["helpful-test", "harmless-test"], []),
])  # fmt: skip
def test_names_divide_into_training_and_held_out(names: list[str], train: list[str], held_out: list[str]) -> None:
    assert divide_names(names) == (train, held_out)


def test_a_folder_uses_its_train_and_test_files_and_names_the_others(write_lines: Callable[..., Path]) -> None:
    for name in ("train.jsonl", "test.jsonl", "all.jsonl"):
        folder = write_lines(TEXT_ROW, name=name).parent
    (folder / "LICENSE").write_text("not data")
    ((_, train, held_out, unused),) = find_places(str(folder))
    assert ([*train], [*held_out], unused) == (["train.jsonl"], ["test.jsonl"], ["all.jsonl"])


def test_test_files_of_a_folder_are_never_trained_on_for_their_longer_names(write_lines: Callable[..., Path]) -> None:
    for name in ("helpful-train.jsonl", "helpful-test.jsonl", "harmless-eval.jsonl"):
        folder = write_lines(TEXT_ROW, name=name).parent
    ((_, train, held_out, unused),) = find_places(str(folder))
    assert ([*train], [*held_out], unused) == (["helpful-train.jsonl"], ["harmless-eval.jsonl"], ["helpful-test.jsonl"])
    ((_, train, held_out, unused),) = find_places(f"{folder}/*.jsonl")
    assert ([*train], [*held_out], unused) == (["helpful-train.jsonl"], ["harmless-eval.jsonl"], ["helpful-test.jsonl"])


def test_folders_below_a_glob_say_a_side_by_their_words_where_the_file_says_none(tmp_path: Path) -> None:
    for name in ("training/a", "evaluation/a", "model-eval/train", "more/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(TEXT_ROW))
    ((_, train, held_out, unused),) = find_places(f"{tmp_path}/**/*.jsonl")
    assert (len(train), [*held_out], unused) == (3, ["a.jsonl"], [])
    assert [where for where, _ in held_out["a.jsonl"]] == ["a.jsonl:1"]


@pytest.mark.parametrize(("names", "train", "held_out"), [
    (["training", "evaluation"], ["x.json/training"], ["x.json/evaluation"]),
    (["helpful-train", "helpful-test"], ["x.json/helpful-train"], ["x.json/helpful-test"]),
    (["data", "test"], ["x.json/data"], ["x.json/test"]), (["train", "held_out"], ["x.json/train"], []),
])  # fmt: skip
def test_splits_of_a_json_document_are_divided_as_files_are(
    tmp_path: Path, names: list[str], train: list[str], held_out: list[str]
) -> None:
    (tmp_path / "x.json").write_text(json.dumps({name: [{**TEXT_ROW, "prompt": name}] for name in names}))
    ((_, found, others, _),) = find_places(str(tmp_path / "x.json"))
    assert ([*found], [*others]) == (train, held_out)
    assert [values["prompt"] for rows in found.values() for _, values in rows] == names[:1]


def test_a_document_of_splits_in_a_folder_is_to_be_named_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"training": [TEXT_ROW], "evaluation": [TEXT_ROW]}))
    with pytest.raises(
        DataError, match=r"x\.json: holds several lists of rows \(training, evaluation\); name this file itself"
    ):
        load_pairs(tmp_path)
    path.write_text(json.dumps({"about": "pairs", "training": [TEXT_ROW]}))
    assert [pair.chosen for pair in load_pairs(tmp_path)[0]] == ["yes"]


def test_a_document_of_one_pair_is_no_document_of_splits(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({**TEXT_ROW, "test_cases": [{"in": 1}]}))
    assert [pair.chosen for pair in load_pairs(tmp_path / "x.json")[0]] == ["yes"]


def test_the_held_out_side_of_a_folder_is_read_when_asked(write_lines: Callable[..., Path]) -> None:
    write_lines(TEXT_ROW)
    folder = write_lines({**TEXT_ROW, "prompt": "Ho"}, name="test.jsonl").parent
    assert [pair.where for pair in load_pairs(folder, split="held_out")[0]] == ["test.jsonl:1"]


def test_a_file_has_no_held_out_side(write_lines: Callable[..., Path]) -> None:
    ((_, _, held_out, unused),) = find_places(str(write_lines(TEXT_ROW)))
    assert (held_out, unused) == ({}, [])


def test_two_training_files_that_differ_in_their_suffix_are_refused(write_lines: Callable[..., Path]) -> None:
    write_lines(TEXT_ROW, name="train.json")
    folder = write_lines(TEXT_ROW, name="train.jsonl").parent
    with pytest.raises(DataError, match=r"train\.jsonl and train\.json differ only in their suffix; name one"):
        find_places(str(folder))


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no data file in this folder; found notes\.txt; name a \.json"):
        find_places(str(tmp_path))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_every_format_gives_the_same_messages_and_margins(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text(json.dumps(ROWS) if suffix == "json" else "\n".join(map(json.dumps, ROWS)))
    pairs, _ = load_pairs(path)
    assert [(pair.prompt[0]["content"], pair.chosen[0]["content"], pair.margin) for pair in pairs] == [
        ("Hi", "yes", 0.5), ("Ho", "yea", 1.0)]  # fmt: skip


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_cells_of_csv_and_tsv_are_texts_and_margins_numbers(tmp_path: Path, suffix: str, separator: str) -> None:
    lines = [["prompt", "chosen", "rejected", "margin"], ["1+1", "2", '"two\nlines"', "0.5"]]
    (tmp_path / f"x.{suffix}").write_text("\r\n".join(separator.join(cells) for cells in lines))
    (pair,), _ = load_pairs(tmp_path / f"x.{suffix}")
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == ("1+1", "2", "two\nlines", 0.5)
    assert pair.where == f"x.{suffix} row 1"


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert [pair.where for pair in load_pairs(tmp_path / "x.json")[0]] == ["x.json:1", "x.json:2"]


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    pairs, report = load_pairs(tmp_path / "saved")
    assert [pair.where for pair in pairs] == ["saved row 1", "saved row 2"]
    assert report.files == {"saved": 2}


def test_a_saved_dataset_with_splits_is_divided_by_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "test": data, "extra": data}).save_to_disk(str(tmp_path / "saved"))
    ((_, train, held_out, unused),) = find_places(str(tmp_path / "saved"))
    assert ([*train], [*held_out], unused) == (["saved/train"], ["saved/test"], ["saved/extra"])
    assert [where for where, _ in held_out["saved/test"]] == ["saved/test row 1", "saved/test row 2"]


def test_images_of_a_saved_dataset_are_not_decoded_but_refused_or_ignored(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(dict.fromkeys(TEXT_ROW, datasets.Value("string")) | {"image": datasets.Image()})
    rows = {name: [cell] for name, cell in TEXT_ROW.items()} | {"image": [{"bytes": b"\x89PNG no image", "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        DataError, match=r"saved row 1: 'image' has content.*in every row; train without it: data\.ignore: \[image\]"
    ):
        load_pairs(tmp_path / "saved")
    assert [pair.prompt for pair in load_pairs(tmp_path / "saved", ignore=["image"])[0]] == ["Hi"]


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/folder", "a/b/c", "~/missing"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(DataError, match=r"there is no such file or folder.*check the spelling"):
        find_places(name)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_dpo.data.sources.hub_is_reachable", lambda: False)
    with pytest.raises(DataError, match=r"nobody/nothing: there is no such file or folder.*the Hub cannot be reached"):
        find_places("nobody/nothing")


def test_a_hub_dataset_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr("pe_dpo.data.sources.hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": data}))
    assert [pair.where for pair in load_pairs("owner/name")[0]] == ["owner/name/train row 1", "owner/name/train row 2"]


def test_a_name_that_the_hub_does_not_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(name: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist")

    monkeypatch.setattr("pe_dpo.data.sources.hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"owner/name: there is no such file.*doesn't exist.*check the name"):
        find_places("owner/name")


@pytest.mark.slow
def test_importing_the_data_room_imports_nothing_heavy() -> None:
    code = "import sys, pe_dpo.data; print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

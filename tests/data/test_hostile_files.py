"""Files that are made to fill memory, never to end, or to break their reader are one line, at once."""

import gzip
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from paths_to_pairs import load_pairs
from pyarrow import parquet

from pe_dpo.data import files, text_files
from pe_dpo.data.files import read_rows
from pe_dpo.data.template import foreign_template
from pe_dpo.errors import DataError


def refused(path: Path, **settings: Any) -> str:
    """What is said of a file, in one line, at once and within 300 MB."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError) as error:
        load_pairs(path, **settings)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - began < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    return str(error.value).replace(f"{path.parent}/", "")


def test_a_row_that_is_too_large_is_passed_over_without_being_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(text_files, "LARGEST_ROW", 4_000_000)
    path = tmp_path / "x.jsonl"
    row = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n"
    path.write_text(row * 2 + json.dumps({"prompt": "p", "chosen": "c" * 5_000_000, "rejected": "r"}) + "\n" + row)
    assert refused(path).startswith("x.jsonl:3: has 5 MB, and a row may have 4; shorten its texts, or leave it out")
    pairs, report = load_pairs(path, bad_rows="drop")
    assert len(pairs) == 3 and len(report.dropped) == 1


@pytest.mark.parametrize(("row", "said"), [
    ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply"),
    ('{"prompt": ' + "[" * 200 + "]" * 200 + ', "chosen": "a", "rejected": "b"}', "is nested too deeply: more than 100 lists"),
    ('{"prompt": ' + "9" * 10_000 + "}", "an integer of more digits than Python reads"),
    ('{"prompt": "p", "chosen": "a", "rejected": "b", "x\\ud800": 1}', r"has a key with half a surrogate pair ('\ud800')"),
    ('{"prompt": "p", "chosen": "a\\ud800", "rejected": "b"}', "half a surrogate pair"),
    ('{"prompt": "p", "chosen": "a\\u0000", "rejected": "b"}', "NUL"),
    ("{'prompt': " + "-" * 100_000 + "1}", "is not valid JSON"),
    ("{'prompt': " + "(" * 100_000 + "1}", "is not valid JSON"),
    ("{" + ", ".join(f'"k{number}": 1' for number in range(30_000)) + ', "k29999": 2}', "has the key 'k29999' twice"),
])  # fmt: skip
def test_a_row_that_is_made_to_break_its_reader_is_one_error(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(row + "\n")
    assert said in refused(path)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("x.csv", "prompt,chosen,rejected\np,c,r\np,\"c" + "c\n" * 20_000,
     "x.csv row 2 has 1 MB, and a row may have 1; shorten its texts, or leave it out; look for an open"),
    ("x.csv", ",".join(f"c{number}" for number in range(20_000)), "x.csv: has 20,000 columns"),
    ("x.jsonl.gz", b"\n" * 300_000, "x.jsonl.gz: unpacks to more than 10 MB, 200 times its size or more"),
    ("x.json.gz", b"[" + b" " * 11_000_000, "x.json.gz: unpacks to more than 10 MB, 200 times its size or more"),
])  # fmt: skip
def test_a_file_that_is_made_to_fill_memory_is_one_error(
    tmp_path: Path, monkeypatch: Any, name: str, content: str | bytes, said: str
) -> None:
    monkeypatch.setattr(text_files, "LARGEST_ROW", 1_000_000)
    monkeypatch.setattr(text_files, "_SMALL", 10_000_000)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, 9) if isinstance(content, bytes) else content.encode())
    assert said in refused(path)


def test_parquet_that_unpacks_to_gigabytes_is_one_error(tmp_path: Path, monkeypatch: Any) -> None:
    """A value that is written once, and stands in every row or many times in one; with a part of the bounds."""
    monkeypatch.setattr(text_files, "_SMALL", 10_000_000)
    monkeypatch.setattr(files, "_MOST_MEMORY", 30_000_000)
    big, path = "x" * 50_000, tmp_path / "x.parquet"
    once = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), pyarrow.array([big]))
    prompts = pyarrow.array(["p"] * 300)
    table = {"prompt": prompts, "chosen": once, "rejected": prompts}
    parquet.write_table(pyarrow.table(table), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1_000
    assert "x.parquet: unpacks to more than 10 MB, 200 times its size or more, as no data does" in refused(path)
    turns = pyarrow.StructArray.from_arrays([once, prompts], ["content", "role"])
    one_row = pyarrow.ListArray.from_arrays(pyarrow.array([0, 300], pyarrow.int32()), turns)
    parquet.write_table(pyarrow.table({"chosen": one_row, "rejected": one_row}), path, compression="zstd", store_schema=False)
    # Where the memory is not there that decoding it takes, it ends so (measured with 2,000 times 1 MB in one row).
    assert "unpacks to more than" in (said := refused(path)) or "alloc of size" in said


@pytest.mark.parametrize("name", ["pipe.jsonl", "/dev/zero", "zero.jsonl"])
def test_what_is_no_file_is_said_to_be_what_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "pipe.jsonl":
        os.mkfifo(path)
    elif name == "zero.jsonl":
        path.symlink_to("/dev/zero")
    said = f"is {'a pipe' if name == 'pipe.jsonl' else 'a device'}, which may have no end; write the rows into a file"
    assert said in refused(path)
    if path.suffix:
        with pytest.raises(DataError, match=said):
            next(read_rows(path))


def test_a_text_of_many_tags_is_looked_through_once() -> None:
    """Twelve seconds for 200,000 characters, and the square of it for more, when every tag was tried as the first."""
    began = time.process_time()
    assert foreign_template(["USER: " * 200_000], ["a"], "", is_chat=True) is None
    assert foreign_template(["USER: a" * 200_000 + " ASSISTANT:"], ["a"], "", is_chat=True) == "Vicuna's USER: … ASSISTANT:"
    assert time.process_time() - began < 2

"""Whatever the layout, the encoding and the dialect of a file: the pairs of the plain one, or a line that names the remedy."""

import datetime
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from paths_to_pairs import load_pairs, prepare_pairs

from pe_dpo.data import data_hash
from pe_dpo.data.files import data_format, read_rows
from pe_dpo.data.sources import find_places
from pe_dpo.errors import DataError
from pe_dpo.recipe import DataSection

ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]
ONE, TWO = (json.dumps(row) for row in ROWS)
LINES = f"{ONE}\n{TWO}\n"
CELLS = "prompt,chosen,rejected\na,b,c\nd,e,f\n"
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
BOM = b"\xef\xbb\xbf"

LAYOUTS = {
    "columns": ("x.json", json.dumps(COLUMNS)),
    "pandas' default": ("x.json", json.dumps({name: dict(zip("01", cells, strict=True)) for name, cells in COLUMNS.items()})),
    "pandas' index": ("x.json", json.dumps({"0": ROWS[0], "1": ROWS[1]})),
    "pandas' split": ("x.json", json.dumps({"columns": [*COLUMNS], "index": [0, 1],
                      "data": [[*row.values()] for row in ROWS]})),
    "pandas' table": ("x.json", json.dumps({"schema": {"fields": []}, "data": ROWS})),
    "rows by a name": ("x.json", json.dumps({"one": ROWS[0], "two": ROWS[1]})),
    "rows under a name": ("x.json", json.dumps({"version": 1, "rows": ROWS})),
    "rows under train alone": ("x.json", json.dumps({"train": ROWS})),
    "trailing commas": ("x.json", f'[{ONE[:-1]},}},{TWO},]'),
    "lists one after the other": ("x.json", f"[{ONE}]\n[{TWO}]\n"),
    "objects over several lines": ("x.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "Python's list": ("x.json", repr(ROWS)),
    "UTF-32": ("x.json", json.dumps(ROWS).encode("utf-32")),
    "list as lines": ("x.jsonl", json.dumps(ROWS)),
    "list over lines as lines": ("x.jsonl", f"[\n{ONE},\n{TWO}\n]\n"),
    "objects over lines as lines": ("x.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "lines that end in commas": ("x.jsonl", f"{ONE},\n{TWO},\n"),
    "lines with trailing commas": ("x.jsonl", f"{ONE[:-1]},}}\n{TWO}\n"),
    "two objects on a line": ("x.jsonl", f"{ONE} {TWO}"),
    "Python's objects": ("x.jsonl", "".join(f"{row | {'id': None, 'old': True, 'n': -1.5}}\n" for row in ROWS)),
    "old Mac's lines": ("x.jsonl", LINES.replace("\n", "\r")),
    "files put together, each with its mark": ("x.jsonl", BOM + ONE.encode() + b"\n" + BOM + TWO.encode()),
    "two marks": ("x.jsonl", BOM * 2 + LINES.encode()),
    "UTF-16": ("x.jsonl", LINES.encode("utf-16")),
    "packed JSON": ("x.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "packed lines": ("x.ndjson.gz", gzip.compress(LINES.encode())),
    "packed cells": ("x.csv.gz", gzip.compress(CELLS.encode())),
    "packed tabs": ("X.TSV.GZ", gzip.compress(CELLS.replace(",", "\t").encode())),
    "semicolons": ("x.csv", CELLS.replace(",", ";")),
    "tabs under CSV": ("x.csv", CELLS.replace(",", "\t")),
    "commas under TSV": ("x.tsv", CELLS),
    "Excel's first line": ("x.csv", "sep=;\r\n" + CELLS.replace(",", ";").replace("\n", "\r\n")),
    "index of pandas": ("x.csv", ",prompt,chosen,rejected\n0,a,b,c\n1,d,e,f\n"),
    "empty last column": ("x.csv", CELLS.replace("\n", ",\n")),
    "spaces in the header": ("x.csv", CELLS.replace(",", ", ", 2)),
    "mark and CRLF": ("x.csv", BOM + CELLS.replace("\n", "\r\n").encode()),
    "old Mac's cells": ("x.csv", CELLS.replace("\n", "\r")),
    "UTF-16 cells": ("x.csv", CELLS.encode("utf-16")),
    "UTF-16 cells without a mark": ("x.csv", CELLS.encode("utf-16-le")),
    "blank lines in CSV": ("x.csv", "\n" + CELLS.replace("d,e", "\n  \nd,e") + "\n"),
    "quotes around all": ("x.csv", '"prompt";"chosen";"rejected"\n"a";"b";"c"\n"d";"e";"f"\n'),
}  # fmt: skip


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(("name", "content"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_gives_the_pairs_of_the_plain_file(
    tmp_path: Path, tokenizer: Any, name: str, content: str | bytes
) -> None:
    plain = prepare_pairs(write(tmp_path, "plain.jsonl", LINES), tokenizer=tokenizer, eval=0).train
    found = prepare_pairs(write(tmp_path, name, content), tokenizer=tokenizer, eval=0).train
    assert [tokenizer.decode(pair.prompt_ids) for pair in found] == ["a", "d"]
    assert [tokenizer.decode(pair.chosen_ids) for pair in found] == ["b<e>", "e<e>"]
    assert data_hash(found) == data_hash(plain)


REFUSED = {
    "header twice": ("x.csv", CELLS + CELLS, "x.csv row 3: repeats the header, as files do that were put together"),
    "column twice": ("x.csv", "prompt,chosen, chosen\na,b,c\n", "x.csv: has the column 'chosen' twice; keep one"),
    "spaces behind separators": ("x.csv", 'prompt, chosen, rejected\na, "b, x", "c"\n',
                                 "x.csv row 1: has a space behind every"),
    "quote after a backslash": ("x.csv", 'prompt,chosen,rejected\n"a \\"b\\"",b,c\n',
                                "x.csv:2: is not valid CSV.*written twice"),
    "header alone": ("x.csv", "prompt,chosen,rejected\n", "x.csv: no row can be used of 0 read.*a header alone"),
    "Windows-1252": ("x.csv", "prompt,chosen,rejected\na,b,c\nHi,Grüße,Go\n".encode("cp1252"),
                     "x.csv row 2: is not valid UTF-8: byte 0xfc at 5 .in Windows-1252 it would be in 'Grüße'.; save the file"),
    "Windows-1252 in JSON": ("x.json", f'[{ONE},\n{{"prompt": "é"}}]'.encode("cp1252"),
                             "x.json:2: is not valid UTF-8: byte 0xe9"),
    "columns of two lengths": ("x.json", json.dumps(COLUMNS | {"chosen": ["b"]}),
                               r"lengths \(prompt 2, chosen 1, rejected 2\)"),
    "lists of two names": ("x.json", json.dumps({"rows": ROWS, "more": ROWS}), r"several lists of rows \(rows, more\)"),
    "header in another encoding": ("x.csv", "prömpt,chosen,rejected\na,b,c\n".encode("cp1252"), "x.csv:1: is not valid UTF-8"),
    "split with a short row": ("x.json", '{"columns": ["prompt", "chosen"], "data": [["a"]]}', "x.json row 1: is a list"),
    "empty JSON": ("x.json", "\n", "x.json: no row can be used of 0 read: the file is empty"),
    "key twice in Python's object": ("x.jsonl", "{'prompt': 'a', 'chosen': 'b', 'chosen': 'x'}\n",
                                     "x.jsonl:1: has the key 'chosen'"),
    "Python's call": ("x.jsonl", "{'prompt': 'a', 'chosen': array(['b'])}\n", "x.jsonl:1: is not valid JSON"),
    "digits beyond Python": ("x.jsonl", ONE[:-1] + ', "id": ' + "9" * 5000 + "}\n",
                             "x.jsonl:1: .*more digits than Python reads"),
    "first row cut": ("x.jsonl", f"{ONE[:20]}\n{TWO}\n", "x.jsonl:1: is not valid JSON"),
    "web page": ("x.jsonl", "\n<!doctype HTML>\n<html>", "x.jsonl: is an HTML page, so the download failed"),
    "pointer": ("x.parquet", "version https://git-lfs.github.com/spec/v1\n",
                "x.parquet: is a pointer of Git LFS.*git lfs pull"),
    "archive under another name": ("x.csv", b"PK\x03\x04abc", "x.csv: is a ZIP archive or a spreadsheet, whatever its name"),
    "Parquet under another name": ("x.jsonl", b"PAR1abc", "x.jsonl: is Parquet, whatever its name; name it .parquet"),
    "cut archive": ("x.jsonl.gz", gzip.compress((LINES * 99).encode())[:-20],
                    "x.jsonl.gz: cannot be unpacked.*may have been cut"),
    "archive with flipped bits": ("x.jsonl.gz", gzip.compress(LINES.encode())[:-8] + b"12345678",
                                  "cannot be unpacked .CRC check"),
    "other packing": ("x.jsonl.zst", b"x", "x.jsonl.zst: is packed in a way that is not read; unpack it first"),
    "packed Parquet": ("x.parquet.gz", b"x", "x.parquet.gz: is packed in a way that is not read; unpack it first"),
    "archive of files": ("x.tar.gz", b"x", "x.tar.gz: is packed in a way that is not read; unpack it first"),
    "spreadsheet": ("x.xlsx", b"x", "x.xlsx: is a spreadsheet; save the sheet as CSV in UTF-8"),
    "Arrow": ("x.arrow", b"ARROW1", "x.arrow: is an Arrow file; write it as .parquet, or name the folder that save_to_disk"),
    "no suffix": ("pairs", LINES, "pairs: the format cannot be told from ''; one of .json"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_one_meaning_is_refused_with_the_remedy(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as raised:
        load_pairs(write(tmp_path, name, content))
    assert len(str(raised.value)) < 400


def test_a_json_file_of_splits_is_divided_like_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "x.json", json.dumps({"version": 1, "train": ROWS[:1], "test": ROWS[1:], "extra": ROWS}))
    ((_, train, held_out, _),) = find_places(str(path))
    assert list(train["x.json/train"]) == [("x.json/train row 1", ROWS[0])]
    assert list(held_out["x.json/test"]) == [("x.json/test row 1", ROWS[1])]
    ((_, train, held_out, unused),) = find_places(DataSection(train={"path": str(path), "split": "test"}).train)
    assert ([*train], [*held_out], unused) == (["x.json/test"], [], ["x.json/train"])


def test_one_object_of_messages_is_one_row_and_no_columns(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
           "rejected": [{"role": "assistant", "content": "c"}]}  # fmt: skip
    assert [values for _, values in read_rows(write(tmp_path, "x.json", json.dumps(row)))] == [row]


def test_one_object_of_lists_is_one_row_where_messages_are_among_them(tmp_path: Path) -> None:
    row = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": [], "tools": ["x"]}
    assert [values for _, values in read_rows(write(tmp_path, "x.json", json.dumps(row)))] == [row]


def test_rows_under_data_are_read_whatever_stands_beside_them(tmp_path: Path) -> None:
    path = write(tmp_path, "x.json", json.dumps({"data": ROWS, "errors": [{"code": 1}]}))
    assert [values for _, values in read_rows(path)] == ROWS


def test_columns_of_messages_are_columns(tmp_path: Path) -> None:
    answers = [[{"role": "assistant", "content": name}] for name in "be"]
    path = write(tmp_path, "x.json", json.dumps({"prompt": ["a", "d"], "chosen": answers, "rejected": answers}))
    assert [values["chosen"] for _, values in read_rows(path) if isinstance(values, dict)] == answers


def test_line_breaks_and_quotes_inside_cells_stay(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", 'prompt,chosen,rejected\r\n"a\r\nb","say ""hi""\n\nx", c \r\n')
    ((pair,), _) = load_pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("a\r\nb", 'say "hi"\n\nx', " c ")


def test_columns_of_csv_without_a_name_are_told_as_not_read_by_their_place(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", ",prompt,chosen,rejected,\nid-7,a,b,c,note\n8,d,e,f,\n")
    pairs, report = load_pairs(path)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [("a", "b", "c"), ("d", "e", "f")]
    assert report.unread_columns == ["column 1", "column 5"]


def test_separators_that_are_no_line_breaks_stay_in_a_row(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0bd"
    path = write(tmp_path, "x.jsonl", json.dumps(ROWS[0] | {"prompt": text}, ensure_ascii=False) + "\n" + TWO)
    assert [pair.prompt for pair in load_pairs(path)[0]] == [text, "d"]


def test_a_row_that_is_not_utf8_is_left_out_alone_where_that_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", CELLS.encode() + b"g,\xff,i\nj,k,l\n")
    pairs, report = load_pairs(path, bad_rows="drop")
    assert [pair.prompt for pair in pairs] == ["a", "d", "j"]
    assert report.dropped["malformed"] == ["x.csv row 3: is not valid UTF-8: byte 0xff at 2 (in Windows-1252 it would be in "
                                           "'ÿ'); save the file as UTF-8"]  # fmt: skip


@pytest.mark.parametrize(("name", "suffix"), [
    ("a.jsonl", ".jsonl"), ("A.JSONL", ".jsonl"), ("a.b.csv.gz", ".csv"), ("a.parquet", ".parquet"), ("a.parquet.gz", None),
    ("a.gz", None), ("a.txt", None), ("a", None), (".json", None),
])  # fmt: skip
def test_the_format_is_told_by_the_suffix(name: str, suffix: str | None) -> None:
    assert data_format(Path(name)) == suffix


TOOL_ROWS = [
    {"prompt": [{"role": "user", "content": "a"}],
     "chosen": [{"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}],
     "rejected": [{"role": "assistant", "content": "c"}]},
    {"prompt": [{"role": "user", "content": "d"}],
     "chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": {"z": 2}}}}]}],
     "rejected": [{"role": "assistant", "content": "f"}]},
]  # fmt: skip


def test_nulls_that_arrow_invents_are_not_there(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TOOL_ROWS), tmp_path / "x.parquet")
    datasets.Dataset.from_list(TOOL_ROWS).save_to_disk(str(tmp_path / "saved"))
    assert [values for _, values in read_rows(tmp_path / "x.parquet")] == TOOL_ROWS
    ((_, train, _, _),) = find_places(str(tmp_path / "saved"))
    assert [values for _, values in train["saved"]] == TOOL_ROWS


def test_a_cell_that_is_null_in_parquet_stays_null(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "margin": [None, 1.0]}), tmp_path / "x.parquet")
    assert [values for _, values in read_rows(tmp_path / "x.parquet")] == [
        {"prompt": "a", "margin": None}, {"prompt": "b", "margin": 1.0}]  # fmt: skip


def string_tables() -> dict[str, pyarrow.Table]:
    plain = pyarrow.table(COLUMNS)
    types = {"large": pyarrow.large_string(), "views": pyarrow.string_view(), "bytes": pyarrow.binary()}
    tables = {name: plain.cast(pyarrow.schema([(column, kind) for column in COLUMNS])) for name, kind in types.items()}
    tables["dictionary"] = pyarrow.table({name: plain[name].dictionary_encode() for name in COLUMNS})
    tables["index"] = plain.append_column("__index_level_0__", pyarrow.array(["x", "y"]))
    others = {"when": [datetime.datetime(2026, 1, 2)] * 2, "pixels": [b"\x89PNG\xff"] * 2, "price": [Decimal("0.5")] * 2}
    tables["others"] = pyarrow.table({**COLUMNS, **others, "big": pyarrow.array([2**64 - 1] * 2, pyarrow.uint64())})
    return tables


@pytest.mark.parametrize("kind", ["large", "views", "bytes", "dictionary", "index", "others"])
def test_texts_of_every_type_of_arrow_are_texts(tmp_path: Path, kind: str) -> None:
    pyarrow.parquet.write_table(string_tables()[kind], tmp_path / "x.parquet")
    pairs, report = load_pairs(tmp_path / "x.parquet")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [("a", "b", "c"), ("d", "e", "f")]
    assert set(report.unread_columns) == ({"when", "pixels", "price", "big"} if kind == "others" else set())


def test_bytes_that_are_no_text_are_refused_by_name(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({**COLUMNS, "prompt": [b"caf\xe9", b"d"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet row 1: column 'prompt' is bytes that are not text in UTF-8"):
        load_pairs(tmp_path / "x.parquet")


def test_maps_of_arrow_and_messages_by_columns_are_objects_and_messages(tmp_path: Path) -> None:
    arguments = pyarrow.array([[("city", "Bern")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    prompt = pyarrow.array([{"role": ["system", "user"], "content": ["kind", "a"]}])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompt, "arguments": arguments}), tmp_path / "x.parquet")
    messages = [{"role": "system", "content": "kind"}, {"role": "user", "content": "a"}]
    assert [values for _, values in read_rows(tmp_path / "x.parquet")] == [{"prompt": messages, "arguments": {"city": "Bern"}}]


def test_the_same_rows_are_the_same_pairs_in_every_format(tmp_path: Path, chat_tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    user = {"role": "user", "content": "Wie heißt \u201eFluss\u201c?\r\n\tJa"}
    rows: list[dict[str, Any]] = [
        {"prompt": [user], "chosen": [{"role": "assistant", "content": "Bach\u2028\U0001f600"}],
         "rejected": [{"role": "assistant", "content": ' "Strom", nein '}], "margin": 0.5},
        {"prompt": [{"role": "system", "content": "Kurz"}, user], "chosen": [{"role": "assistant", "content": "a;b|c"}],
         "rejected": [{"role": "assistant", "content": "0"}], "margin": 2.0},
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = [{name: json.dumps(cell, ensure_ascii=False) for name, cell in row.items()} for row in rows]
    quoted = [
        "prompt;chosen;rejected;margin",
        *(";".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) for row in table),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    places = [
        write(tmp_path, "x.jsonl", lines), write(tmp_path, "y.jsonl.gz", gzip.compress(lines.encode("utf-16"))),
        write(tmp_path, "x.json", json.dumps({name: [row[name] for row in rows] for name in rows[0]})),
        write(tmp_path, "py.jsonl", "".join(f"{row}\n" for row in rows)), write(tmp_path, "x.csv", "\r\n".join(quoted)),
        tmp_path / "x.parquet", tmp_path / "saved",
    ]  # fmt: skip
    found = [prepare_pairs(place, tokenizer=chat_tokenizer, eval=0).train for place in places]
    assert [pair.margin for pair in found[0]] == [0.5, 2.0]
    assert chat_tokenizer.decode(found[0][0].chosen_ids).startswith("Bach\u2028\U0001f600<|im_end|>")
    assert len({data_hash(pairs) for pairs in found}) == 1

"""Every malformed file gives one DataError that says where, what was found, and what to do."""

from pathlib import Path

import pyarrow
import pytest
from paths_to_pairs import load_pairs
from pyarrow import parquet

from pe_dpo.errors import DataError

GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
MESSAGES = (
    b'{"prompt": [{"role": "user", "content": "p"}], "chosen": %s, "rejected": [{"role": "assistant", "content": "b"}]}\n'
)


def row(prompt: bytes = b'"p"', chosen: bytes = b'"a"', rest: bytes = b"") -> bytes:
    return b'{"prompt": ' + prompt + b', "chosen": ' + chosen + b', "rejected": "b"' + rest + b"}\n"


MALFORMED = {
    "missing column": ("x.jsonl", GOOD + b'{"prompt": "p", "chosen": "a"}\n', "x.jsonl:2", "no column 'rejected'", "correct"),
    "null answer": ("x.jsonl", GOOD + row(chosen=b"null"), "x.jsonl:2", "'chosen' is null", "text"),
    "number for text": ("x.jsonl", GOOD + row(chosen=b"5"), "x.jsonl:2", "'chosen' is the number 5", "text"),
    "number in the first row": ("x.jsonl", row(chosen=b"5") + GOOD, "x.jsonl:1", "'chosen' is the number 5", "text"),
    "true for text": ("x.jsonl", GOOD + row(prompt=b"true"), "x.jsonl:2", "'prompt' is true", "text"),
    "list among texts": ("x.jsonl", GOOD + row(chosen=b'["a"]'), "x.jsonl:2", "'chosen' is a list", "text"),
    "blank line before a bad row": ("x.jsonl", GOOD + b"\n\r\n" + row(chosen=b"5"), "x.jsonl:4", "number 5", "text"),
    "cut last line": ("x.jsonl", GOOD + b'{"prompt": "p", "cho', "x.jsonl:2", "not valid JSON", "fetch it again"),
    "not JSON": ("x.jsonl", GOOD + b"prompt,chosen\n" + GOOD, "x.jsonl:2", "not valid JSON", "correct the row"),
    "line break in a text": ("x.jsonl", GOOD + b'{"prompt": "p\n' + GOOD, "x.jsonl:2", "character at column 14",
                             "correct the row"),
    "row that is a list": ("x.jsonl", GOOD + b'["p", "a", "b"]\n', "x.jsonl:2", "is a list", "an object"),
    "key twice": ("x.jsonl", GOOD + row(rest=b', "chosen": "c"'), "x.jsonl:2", "'chosen' twice", "keep one"),
    "key twice in an array": ("x.json", b"[" + GOOD + b"," + row(rest=b', "chosen": "c"') + b"]", "x.json row 2",
                              "'chosen' twice", "keep one"),
    "key twice in the only object": ("x.json", row(rest=b', "chosen": "c"'), "x.json", "'chosen' twice", "keep one"),
    "not UTF-8": ("x.jsonl", GOOD + b'{"prompt": "caf\xe9"}\n', "x.jsonl:2", "not valid UTF-8: byte 0xe9", "save the file"),
    "cut UTF-16": ("x.json", "[]".encode("utf-16")[:-1], "x.json", "utf-16", "save the file as UTF-8"),
    "NUL": ("x.jsonl", GOOD + row(prompt=b'"a\\u0000"'), "x.jsonl:2", "NUL character at 2", "remove"),
    "half a surrogate pair": ("x.jsonl", GOOD + row(prompt=b'"a\\ud83d"'), "x.jsonl:2", "(U+D83D) at 2", "remove"),
    "NaN margin": ("x.jsonl", GOOD + row(rest=b', "margin": NaN'), "x.jsonl:2", "'margin' is nan", "finite number"),
    "true margin": ("x.jsonl", GOOD + row(rest=b', "margin": true'), "x.jsonl:2", "'margin' is True", "finite number"),
    "text for a score": ("x.jsonl", row(rest=b', "chosen_score": "good", "rejected_score": 1'), "x.jsonl:1",
                         "'chosen_score' is 'good'", "finite number"),
    "empty file": ("x.jsonl", b"", "x.jsonl", "the file is empty", "pairs are expected"),
    "empty array": ("x.json", b"[]", "x.json", "the file is empty", "pairs are expected"),
    "cut array": ("x.json", b"[" + GOOD + b",", "x.json:2", "not valid JSON", "fetch it again"),
    "text for a document": ("x.json", b'"hello"', "x.json", "holds text", "a list of objects"),
    "nested without end": ("x.jsonl", GOOD + b"[" * 100_000 + b"\n", "x.jsonl:2", "nested too deeply", "flat object"),
    "margin beyond numbers": ("x.jsonl", GOOD + row(rest=b', "margin": 1' + b"0" * 400), "x.jsonl:2", "'margin' is 1000",
                              "finite number"),
    "integer beyond Python": ("x.jsonl", GOOD + row(rest=b', "id": 1' + b"0" * 5000), "x.jsonl:2", "not valid JSON",
                              "correct"),
    "unknown role": ("x.jsonl", MESSAGES % b'[{"role": "robot", "content": "a"}]', "x.jsonl:1", "role 'robot'", "user"),
    "answer by the user": ("x.jsonl", MESSAGES % b'[{"role": "user", "content": "a"}]', "x.jsonl:1",
                           "begins with a turn of the role 'user'", "assistant"),
    "answer that ends with the user": (
        "x.jsonl", MESSAGES % b'[{"role": "assistant", "content": "a"}, {"role": "user", "content": "c"}]',
        "x.jsonl:1", "ends with a turn of the role 'user'", "assistant"),
    "message without content": ("x.jsonl", MESSAGES % b'[{"role": "assistant"}]', "x.jsonl:1", "content' is null", "text"),
    "image in a message": ("x.jsonl", MESSAGES % b'[{"role": "assistant", "content": [{"type": "image"}]}]', "x.jsonl:1",
                           "not text (image)", "only text"),
    "empty list of messages": ("x.jsonl", MESSAGES % b"[]", "x.jsonl:1", "'chosen' is an empty list", "messages"),
    "message that is text": ("x.jsonl", MESSAGES % b'[{"from": "gpt", "value": "a"}, "b"]', "x.jsonl:1", "chosen[1]' is text",
                             "role and content"),
    "CSV row too short": ("x.csv", b"prompt,chosen,rejected\np,a,b\np,a\n", "x.csv row 2", "before column 'rejected'", "fill"),
    "CSV row too long": ("x.csv", b"prompt,chosen,rejected\np,a,b,c\n", "x.csv row 1", "1 more cells", "quote"),
    "CSV column twice": ("x.csv", b"prompt,chosen,rejected,chosen\np,a,b,c\n", "x.csv", "column 'chosen' twice", "keep one"),
    "CSV quote left open": ("x.csv", b'prompt,chosen,rejected\np,a,"b\n', "x.csv:2", "not valid CSV", "quotes"),
    "CSV not UTF-8": ("x.csv", b"prompt,chosen,rejected\np,a,\xff\n", "x.csv row 1", "not valid UTF-8", "save the file"),
    "Parquet that is none": ("x.parquet", b"PAR1 and then nothing", "x.parquet", "cannot be read as Parquet", "fetch"),
    "unknown suffix": ("x.txt", GOOD, "x.txt", "cannot be told from '.txt'", ".jsonl"),
    "prompts that differ by a space": (
        "x.jsonl",
        b'{"chosen": [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "a"}],'
        b' "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}]}\n',
        "x.jsonl:1", "character 3 is 'Hi ' in chosen, 'Hi' in rejected", "make them equal"),
    "transcripts without a shared tag": (
        "x.jsonl",
        b'{"chosen": "\\n\\nHuman: Hi \\n\\nAssistant: a", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: b"}\n',
        "x.jsonl:1", "share no Assistant tag: they differ from character 12", "make the prompts equal"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "where", "found", "remedy"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_one_error_with_place_finding_and_remedy(
    tmp_path: Path, name: str, content: bytes, where: str, found: str, remedy: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        load_pairs(tmp_path / name)
    message = str(raised.value)
    assert message.split(": ")[0].endswith(where)
    assert found in message
    assert remedy in message


@pytest.mark.parametrize("bad", [b"{cut", b'{"prompt": "\xff"}', b"[1]", b'{"prompt": 5, "chosen": "a", "rejected": "b"}'])
def test_malformed_rows_are_dropped_and_named_when_asked(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD + bad + b"\n" + GOOD)
    pairs, report = load_pairs(tmp_path / "x.jsonl", bad_rows="drop")
    assert [pair.where for pair in pairs] == ["x.jsonl:1", "x.jsonl:3"]
    assert report.rows_read == 3
    assert len(report.dropped["malformed"]) == 1
    assert report.dropped["malformed"][0].startswith("x.jsonl:2: ")


def test_a_file_of_malformed_rows_alone_says_the_first_flaw(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"[1]\n[2]\n")
    with pytest.raises(DataError, match=r"x\.jsonl: no row can be used of 2 read: x\.jsonl:1: is a list"):
        load_pairs(tmp_path / "x.jsonl", bad_rows="drop")


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + GOOD,
    GOOD.replace(b"\n", b"\r\n"),
    b"\n\n" + GOOD + b"\n",
    GOOD.rstrip(b"\n"),
], ids=["BOM", "CRLF", "blank lines", "no line break at the end"])  # fmt: skip
def test_harmless_byte_order_marks_and_line_ends_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    pairs, _ = load_pairs(tmp_path / "x.jsonl")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [("p", "a", "b")]


def test_a_parquet_file_with_a_column_twice_is_an_error(tmp_path: Path) -> None:
    names = ["prompt", "chosen", "rejected", "chosen"]
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 4, names=names), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: has the column 'chosen' twice; keep one"):
        load_pairs(tmp_path / "x.parquet")


def test_columns_without_a_name_behind_the_others_are_harmless(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,,\np,a,b,,\n", encoding="utf-8")
    assert len(load_pairs(tmp_path / "x.csv")[0]) == 1


def test_texts_that_look_like_dates_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(row(chosen=b'"2020-01-01"'))
    assert load_pairs(tmp_path / "x.jsonl")[0][0].chosen == "2020-01-01"


def test_an_answer_of_25_megabytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(row(chosen=b'"' + b"a" * 25_000_000 + b'"'))
    assert len(load_pairs(tmp_path / "x.jsonl")[0][0].chosen) == 25_000_000


def test_a_long_answer_in_a_csv_is_no_fault(tmp_path):
    answer = "word " * 30_000
    (tmp_path / "long.csv").write_text(f"prompt,chosen,rejected\nq,{answer},no\n", encoding="utf-8")
    (pair,), _ = load_pairs(tmp_path / "long.csv")
    assert pair.chosen == answer

"""`pe-dpo data`: the screen, its JSON, and the exit code for scripts."""

import json
import shlex

import pytest
from rich.cells import cell_len

CLEAN = [{"prompt": f"Number {n}?", "chosen": "Yes.", "rejected": "Nay."} for n in range(20)]


@pytest.fixture
def write(tmp_path):
    def to_file(*rows, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to_file


def test_the_screen_without_a_model(pe_dpo, write):
    done = pe_dpo("data", write(*CLEAN, CLEAN[0]), columns=80, is_screen=True)
    assert (done.code, done.err) == (0, "")
    lines = [line.rstrip() for line in done.out.strip().splitlines()]
    assert lines[:2] == ["read 21 rows: pairs.jsonl (21)", "understood as prompt (text), chosen and rejected (text)"]
    assert "lengths are characters" in lines
    assert "no prompt that is held out is read in training" in lines
    assert r"  prompt    29  [user]\nNumber 0?\n[assistant]\n" in lines  # the shortest
    assert "  chosen    5   «Yes.␃»" in lines
    assert lines[-3:] == [
        "needs a decision",
        "  1  exact duplicate (pairs.jsonl:21): each counts as often as it is there; keep",
        "     one",
    ]


def test_with_a_tokenizer_the_pairs_are_what_the_model_reads(pe_dpo, write, tiny_base):
    out = pe_dpo("data", write(*CLEAN), "--base", tiny_base, columns=80, is_screen=True).out
    assert "written with the tokenizer's chat template" in out
    assert "  chosen    5   «Yes.<|im_end|>»" in out
    assert out.endswith("\nnothing was found that needs a decision\n")


def test_strict_says_by_the_exit_code_whether_something_needs_a_decision(pe_dpo, write):
    assert pe_dpo("data", write(*CLEAN), "--strict").code == 0
    assert pe_dpo("data", write(*CLEAN, CLEAN[0]), "--strict").code == 1
    assert pe_dpo("data", write(*CLEAN, CLEAN[0])).code == 0


def test_the_same_as_json(pe_dpo, write):
    done = pe_dpo("data", write(*CLEAN, CLEAN[0]), "--json", "--strict")
    found = json.loads(done.out)
    assert (done.code, done.err, found["needs_decision"], found["data"]["unit"]) == (1, "", True, "characters")
    assert [(one["what"], one["number"], one["rows"]) for one in found["findings"]] == [
        ("exact duplicate", 1, ["pairs.jsonl:21"])
    ]
    assert found["pairs"][0]["chosen"]["parts"] == [{"text": "Yes.␃", "scored": True}]


def test_columns_are_mapped_as_in_other_commands(pe_dpo, write):
    path = write(*({"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in CLEAN))
    done = pe_dpo("data", path, "--set", "data.columns={prompt: q, chosen: good, rejected: bad}")
    assert done.code == 0
    assert "read 20 rows: pairs.jsonl (20)" in done.out


def test_the_map_that_an_error_shows_can_be_given_as_it_stands(pe_dpo, write):
    path = write(*({"my question": row["prompt"], "good one": row["chosen"], "bad one": row["rejected"]} for row in CLEAN))
    *_, flag = pe_dpo("data", path).err.splitlines()
    option, given = shlex.split(flag)
    assert option == "--set"
    assert pe_dpo("data", path, option, given).code == 0


def test_a_recipe_names_base_and_data(pe_dpo, write, recipe_file):
    out = pe_dpo("data", "--recipe", recipe_file).out
    assert "24 pairs to train on, 9 held out (test.jsonl)" in out
    assert "read 20 rows: pairs.jsonl (20)" in pe_dpo("data", write(*CLEAN), "--recipe", recipe_file).out


def test_a_folder_with_a_tokenizer_alone_serves(pe_dpo, write, tiny_base, tmp_path):
    import shutil

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for path in tiny_base.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(path, folder)
    assert "«Yes.<|im_end|>»" in pe_dpo("data", write(*CLEAN), "--base", folder).out


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "error: nothing to look at: name a file, a folder or a hub id, or a recipe with --recipe"),
    (["x.jsonl", "--set", "data.train=y.jsonl"], "data.train is given twice; give it once"),
    (["x.jsonl"], "error: x.jsonl: there is no such file or folder"),
])  # fmt: skip
def test_what_cannot_be_looked_at_is_said(pe_dpo, arguments, said):
    done = pe_dpo("data", *arguments)
    assert (done.code != 0, done.out) == (True, "")
    assert said in done.err


def test_many_kinds_of_findings_stay_within_a_screen(pe_dpo, write):
    def bad(*words):
        return [{**CLEAN[0], column: value} for column in words for value in (1, None, [], {}, True, ["x"], {"x": 1})]

    long_words = [{**CLEAN[0], "margin": letter * 500} for letter in "abcdefgh"]
    done = pe_dpo("data", write(*CLEAN, *long_words, *bad("prompt", "chosen", "rejected")), columns=80, is_screen=True)
    assert (done.code, done.err) == (0, "")
    assert "\n  8  malformed: column 'margin' is" in done.out  # one kind, whatever the value
    assert "kinds more; all of them with --json" in done.out
    assert len(done.out.splitlines()) <= 65
    assert max(map(len, done.out.splitlines())) <= 80


def test_no_control_character_of_the_data_reaches_the_terminal_and_nothing_is_wider_than_it(pe_dpo, write):
    rows = [{"prompt": "p\x1b[2J\a" + "长" * 300, "chosen": "[red]\x9b" + "w" * 500, "rejected": "\r\t" + "汉字 " * 200}]
    done = pe_dpo("data", write(*rows), "--set", "data.eval=0", columns=80, is_screen=True)
    assert set(done.out) & {"\x1b", "\a", "\x9b", "\r", "\t"} == set()
    assert max(map(cell_len, done.out.splitlines())) <= 80
    assert "[red]\\x9bwww" in done.out
    assert "[…]" in done.out

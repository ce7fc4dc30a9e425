"""`pe-dpo estimate`: one screen, or JSON, of what a run takes."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

NAME = "llama-3.1-8b-dpo-norm"


@pytest.fixture(scope="module")
def screen(pe_dpo):
    """What 80 columns show of a recipe on a card."""
    return cache(lambda gpu: pe_dpo("estimate", NAME, "--gpu", gpu, columns=80))


@pytest.mark.parametrize("gpu", ["RTX 4090", "8GB", "H200", "cpu"])
@pytest.mark.slow
def test_it_fits_one_screen_of_80_columns(screen, gpu):
    done = screen(gpu)
    lines = done.out.splitlines()
    assert (done.code, done.err) == (int(gpu == "8GB"), "")
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24


@pytest.mark.slow
def test_it_says_the_parts_the_rows_and_the_hours(screen):
    out = screen("RTX 4090").out
    assert "meta-llama/Llama-3.1-8B-Instruct: 8.03 B parameters, nf4, bfloat16, rank 16" in out
    assert "  codes          3.60 GB   6.98 B weights as codes, with scales" in out
    assert "  optimizer      0.34 GB   adamw_torch" in out
    assert re.search(r"rows          1\d\.\d\d GB   of up to 2,\d\d\d tokens; activations kept", out)
    assert re.search(r"486 steps of 3\d\.\d s, 1\d\.\d s more for the reference; 7 h \d\d in all", out)
    assert "83% of 165.2 TFLOP/s" in out


@pytest.mark.slow
def test_what_does_not_fit_lists_what_would_help(screen):
    done = screen("8GB")
    assert done.code == 1
    assert re.search(r"does not fit: the check before training needs 1\d\.\d GB", done.out)
    assert "adapter.rank: 8 (a smaller adapter)" in done.out
    assert " in all" not in done.out
    assert "elsewhere: RTX 3090" in done.out


@pytest.mark.slow
def test_nothing_is_said_of_a_reference_that_is_not_used_nor_of_codes_that_are_not_there(pe_dpo):
    """The held-out 1,000 pairs have two answers of 120 bytes each in the store."""
    out = pe_dpo("estimate", "qwen3-0.6b-mixout-ready", "--gpu", "24GB").out
    assert re.search(r"^971 steps of \d\.\d s; \d+ min in all$", out, re.MULTILINE)
    assert "reference store 240 kB" in out
    assert "  weights        1.19 GB   all, in 16 bits" in out
    assert "note: sizes of the base are those that the package keeps, as its files are not\n  here" in out


@pytest.mark.slow
def test_the_keys_of_json_are_the_documented_ones(pe_dpo):
    found = json.loads(pe_dpo("estimate", NAME, "--gpu", "H200", "--json").out)
    text = (Path(__file__).parents[2] / "docs" / "estimate.md").read_text(encoding="utf-8").partition("## JSON")[2]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    keys = [key for row in rows for key in re.findall(r"`([\w ]+)`", row[0])]
    assert keys == list(found)
    for row in rows:
        for key in re.findall(r"`([\w ]+)`", row[0]):
            documented = set(re.findall(r"`([\w ]+)`", row[1]))
            if key in ("base", "card", "rows", "data", "time", "disk", "merge"):
                assert documented >= set(found[key]), key


def test_pairs_that_are_here_are_encoded(pe_dpo, recipe_file):
    out = pe_dpo("estimate", recipe_file, "--gpu", "cpu").out
    assert re.search(r"24 pairs of \d+ \+ \d+ \+ \d+ tokens \(the pairs of .*, encoded\)", out.replace("\n  ", " "))


def test_lengths_can_be_given(pe_dpo, recipe_file):
    found = json.loads(pe_dpo("estimate", recipe_file, "--tokens", "30,20,20", "--pairs", 1000, "--json").out)
    assert found["data"]["source"] == "around the means given"
    assert (found["data"]["pairs"], found["data"]["held_out"]) == (950, 50)


@pytest.mark.parametrize(("options", "message"), [
    (["--tokens", "a,b"], "--tokens a,b: write three numbers with commas between them, as 170,320,320"),
    (["--tokens", "1,2"], "--tokens: three mean lengths in tokens are expected"),
    (["--pairs", "3"], "--pairs: says how many pairs there are whose mean lengths --tokens gives; give both"),
    (["--tokens", "nan,inf,5"], "--tokens: three mean lengths in tokens are expected"),
    (["--tokens", "100000,100,100"], "--tokens: pairs of 100000, 100, 100 tokens are longer than "),
    (["--gpu", "abacus"], "--gpu: abacus is not in the table; name one of RTX 3060"),
])  # fmt: skip
def test_what_cannot_be_is_a_line(pe_dpo, recipe_file, options, message):
    done = pe_dpo("estimate", recipe_file, *options)
    assert (done.code, done.out) == (2, "")
    assert message in done.err

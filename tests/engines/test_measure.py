"""What an answer's distance from the expected one is, and when it is beyond its bound."""

import json
from pathlib import Path

import pytest

from benchmarks.engines.measure import Case, measure, reference_of, request_for
from benchmarks.engines.table import put_table

EXPECTED = {
    "logprobs": [[-1.0, -2.0]],
    "tokens": [[1], [2]],
    "greedy": [[5, 6]] * 2,
    "leads": [[1.0, 0.05]] * 2,
    "chat_lengths": [3, 4],
    "chat_greedy": [[7], [8]],
    "chat_leads": [[1.0], [1.0]],
}


def test_a_part_that_is_off_is_beyond_the_bound_and_a_near_tie_is_not():
    answer = {"logprobs": [[-1.0, -2.04]], "tokens": [[1], [3]], "greedy": [[5, 6], [5, 9]]}
    found = measure(Case("merged", 0.05), answer, EXPECTED)
    assert found["difference"] == pytest.approx(0.04)
    assert (found["tokens"], found["prompts"], found["near_ties"]) == ([1, 2], [1, 2], 1)
    assert found["broken"] == ["tokens 1 of 2"]
    assert measure(Case("merged", 0.01), answer, EXPECTED)["broken"] == ["0.04 nats", "tokens 1 of 2", "prompts 1 of 2"]
    assert measure(Case("merged", 0.01, known="drops a factor"), answer, EXPECTED)["broken"] == []


def test_a_chat_that_is_not_shown_is_held_to_its_length_and_to_how_it_goes_on():
    answer = {"chat_lengths": [3, 5], "chat_greedy": [[7], [8]]}
    assert measure(Case("merged"), answer, EXPECTED) == {"chats": [1, 2], "broken": ["chats 1 of 2"]}
    answer = {"chat_lengths": [3, 4], "chat_greedy": [[9], [8]]}
    assert measure(Case("merged"), answer, EXPECTED)["chats"] == [1, 2]
    assert measure(Case("merged"), {"chat_lengths": [3, 4], "chat_greedy": [[7], [8]]}, EXPECTED)["broken"] == []


def test_an_adapter_is_held_against_its_merge_before_rounding(tmp_path: Path):
    assert reference_of(Case("base", options={"lora": "adapter-none"})) == "merged-none-float32"
    assert reference_of(Case("gguf-lora", options={"lora": "gguf-lora/lora.gguf"})) == "merged-float32"
    assert reference_of(Case("gguf-f16")) == "merged"
    assert reference_of(Case("gguf-q8_0")) == "gguf-q8_0"


def test_names_in_options_are_paths_and_a_command_is_the_one_that_a_package_prints(tmp_path: Path):
    def get(name: str) -> Path:
        return tmp_path / name

    get("adapter").mkdir()
    serving = [{"engine": "vllm", "command": "vllm serve org/base --tokenizer FOLDER --lora-modules tuned=FOLDER"}]
    (get("adapter") / "base.json").write_text(json.dumps({"id": "org/base", "serving": serving}))
    options = {"lora": "gguf-lora/lora.gguf", "base": "base", "cache": "f16", "command": "adapter"}
    found = request_for(Case("adapter", options=options), {"ids": [[1]], "options": {"vocabulary": 9}}, get)
    package, base = str(get("adapter")), str(get("base"))
    assert found["ids"] == [[1]]
    assert found["options"] == {
        "vocabulary": 9,
        "lora": str(tmp_path / "gguf-lora" / "lora.gguf"),
        "base": base,
        "cache": "f16",
        "command": ["vllm", "serve", base, "--tokenizer", package, "--lora-modules", f"tuned={package}"],
    }


def test_a_table_takes_the_place_of_the_one_before(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- engines -->\nold\n<!-- end -->\nafter\n")
    put_table(page, "| new |")
    assert page.read_text() == "before\n<!-- engines -->\n| new |\n<!-- end -->\nafter\n"

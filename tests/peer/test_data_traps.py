"""The data: what TRL trains on without a word, and that here it is counted and named, or an error with its place."""

import json
import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths_to_pairs import load_pairs, prepare_pairs
from recorded import recording

from pe_dpo.errors import DataError, RecipeError
from pe_dpo.recipe import load_recipe

pytest.importorskip("trl", reason="TRL is not installed; it comes with the peer extra")
pytestmark = pytest.mark.peer

END = 257
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"


def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# Pairs that are longer than max_length: 1 BOS, 10 prompt bytes, the answers' bytes, EOS

CUT_TO_EQUAL = row("a" * 10, "b" * 30, "b" * 30 + "c")
NO_ROOM = row("p" * 30, "x", "y")
SHORT = row("q", "x", "y")
TOO_LONG = [CUT_TO_EQUAL, NO_ROOM, SHORT]


def test_trl_cuts_the_ends_of_answers_until_both_are_the_same_and_have_no_end(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any], peer_batch: Callable[..., Any]
) -> None:
    peer = peer_trainer(make_base(), [CUT_TO_EQUAL], max_length=21)
    chosen, rejected = peer_batch(peer)["input_ids"].tolist()
    assert chosen == rejected
    assert END not in chosen


def test_trl_leaves_out_rows_whose_prompt_fills_the_budget_without_a_message(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any]
) -> None:
    with recording(logger=logging.getLogger("trl")) as said:
        peer = peer_trainer(make_base(), TOO_LONG, max_length=21)
    assert [kept["prompt"] for kept in peer.train_dataset] == ["a" * 10, "q"]
    assert said == []


def test_pairs_that_are_too_long_are_left_out_with_their_count_and_rows(
    write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    data = prepare_pairs(write_lines(TOO_LONG), tokenizer=tokenizer, max_length=21, eval=0.0)
    assert [pair.where for pair in data.train] == ["train.jsonl:3"]
    dropped = data.report.dropped["longer than max_length"]
    assert dropped == ["train.jsonl:1", "train.jsonl:2"]
    assert "left out: 2 longer than max_length (train.jsonl:1, train.jsonl:2)" in data.report.lines()


def test_cutting_prompts_keeps_answers_whole_and_says_which(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    path = write_lines(TOO_LONG)
    data = prepare_pairs(path, tokenizer=tokenizer, max_length=21, eval=0.0, overlong="truncate_prompt")
    kept = {pair.where: pair for pair in data.train}
    assert list(kept) == ["train.jsonl:2", "train.jsonl:3"]
    assert tokenizer.decode(kept["train.jsonl:2"].prompt_ids) == "<s>" + "p" * 18
    assert tokenizer.decode(kept["train.jsonl:2"].chosen_ids) == "x</s>"
    assert data.report.noted["prompt cut at its beginning"] == ["train.jsonl:2"]
    assert data.report.dropped["answers alone longer than max_length"] == ["train.jsonl:1"]


# BOS, when the prompts are rendered already

RENDERED = row("<s>Say hi", " Hi", " No")


def test_trl_puts_a_second_bos_before_a_rendered_prompt(
    make_base: Callable[..., Any], peer_trainer: Callable[..., Any]
) -> None:
    peer = peer_trainer(make_base(), [RENDERED])
    assert peer.train_dataset[0]["prompt_ids"][:3] == [256, 256, peer.processing_class.convert_tokens_to_ids("S")]


@pytest.mark.parametrize("prompt", ["<s>Say hi", "Say hi"])
def test_our_rows_begin_with_exactly_one_bos(encode: Callable[..., list[Any]], prompt: str) -> None:
    (pair,) = encode([RENDERED | {"prompt": prompt}])
    assert [index for index, token in enumerate(pair.prompt_ids) if token == 256] == [0]


def test_a_row_whose_text_has_two_bos_is_an_error_that_names_it(encode: Callable[..., list[Any]]) -> None:
    with pytest.raises(DataError, match=r"^train\.jsonl:2: begins with two BOS tokens"):
        encode([SHORT, RENDERED | {"prompt": "<s><s>Say hi"}])


# Pairs that teach nothing

NOTHING_TO_LEARN = {
    "identical": [row("p", "x", "x")],
    "empty": [row("p", "", "")],
    "contradictory": [row("p", "x", "y"), row("p", "y", "x")],
}


@pytest.mark.parametrize("rows", NOTHING_TO_LEARN.values(), ids=NOTHING_TO_LEARN.keys())
def test_trl_trains_on_pairs_that_teach_nothing_without_a_message(
    make_base: Callable[..., Any],
    peer_trainer: Callable[..., Any],
    rows: list[dict[str, str]],
) -> None:
    with recording(logger=logging.getLogger("trl")) as said:
        peer = peer_trainer(make_base(), rows, noise=False, per_device_train_batch_size=2, max_steps=1)
        peer.train()
    assert peer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert peer.state.log_history[0]["grad_norm"] < 1e-6
    assert said == []


def test_identical_and_empty_pairs_never_train_and_are_named(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    path = write_lines([row("p", "x", "x"), row("p", "", "y"), SHORT, row("p", "y", " ")])
    data = prepare_pairs(path, tokenizer=tokenizer, max_length=99, eval=0.0)
    assert [pair.where for pair in data.train] == ["train.jsonl:3"]
    assert data.report.dropped == {
        "identical answers": ["train.jsonl:1"],
        "empty answer": ["train.jsonl:2", "train.jsonl:4"],
    }


def test_duplicated_and_contradictory_pairs_are_named(write_lines: Callable[..., Path], tokenizer: Any) -> None:
    path = write_lines([row("p", "x", "y"), row("p", "x", "y"), row("p", "y", "x")])
    data = prepare_pairs(path, tokenizer=tokenizer, max_length=99, eval=0.0)
    assert data.report.noted == {
        "exact duplicate": ["train.jsonl:2"],
        "contradicts an earlier pair (a over b, b over a)": ["train.jsonl:3"],
    }


# Whole dialogues whose prompts differ by a space


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ALMOST_ONE_PROMPT = {"chosen": dialogue("hi", "x"), "rejected": dialogue("hi ", "y")}


def test_trls_message_names_neither_the_row_nor_the_difference(
    make_base: Callable[..., Any], make_tokenizer: Callable[..., Any], peer_trainer: Callable[..., Any]
) -> None:
    chat = {"processing_class": make_tokenizer(template=TEMPLATE)}
    rows = [{"chosen": dialogue("a", "x"), "rejected": dialogue("a", "y")}, ALMOST_ONE_PROMPT]
    with pytest.raises((IndexError, ValueError)) as raised:  # which of them depends on the hash seed of the process
        peer_trainer(make_base(), rows, data=chat)
    assert str(raised.value) in (
        "list index out of range",
        "Cannot apply chat template to an empty conversation. Provide at least one message.",
    )


def test_our_message_names_the_row_the_columns_and_the_difference(write_lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as raised:
        load_pairs(write_lines([{"chosen": dialogue("a", "x"), "rejected": dialogue("a", "y")}, ALMOST_ONE_PROMPT]))
    assert str(raised.value).startswith(
        "train.jsonl:2: the prompts inside columns 'chosen' and 'rejected' differ: turn 1 (user) at character 3 is "
        "'hi' in chosen, 'hi ' in rejected; make them equal"
    )


# Where the prompt of a transcript ends

TRANSCRIPT = {
    "chosen": "\n\nHuman: Is it hot?\n\nAssistant: It isn't.",
    "rejected": "\n\nHuman: Is it hot?\n\nAssistant: It is.",
}


def test_trl_moves_half_a_word_of_the_answer_into_the_prompt() -> None:
    from trl import extract_prompt

    assert extract_prompt(TRANSCRIPT)["prompt"].endswith("\n\nAssistant: It is")
    assert extract_prompt(TRANSCRIPT)["chosen"] == "n't."


def test_our_prompt_ends_at_the_last_assistant_tag_that_both_share(write_lines: Callable[..., Path]) -> None:
    ((pair,), _) = load_pairs(write_lines([TRANSCRIPT]))
    assert pair.prompt == "\n\nHuman: Is it hot?\n\nAssistant:"
    assert (pair.chosen, pair.rejected) == (" It isn't.", " It is.")


@pytest.mark.real
def test_on_real_transcripts_trl_cuts_inside_answers_and_ours_never(shared: Path) -> None:
    from trl import extract_prompt

    path = shared / "data" / "hh-harmless" / "all.jsonl"
    if not path.is_file():
        pytest.skip("no data/hh-harmless/all.jsonl in the shared folder")
    lines = path.read_text(encoding="utf-8").splitlines()
    theirs = [extract_prompt(json.loads(line))["prompt"] for line in lines]
    assert sum(not prompt.rstrip(" ").endswith("\n\nAssistant:") for prompt in theirs) > 0.1 * len(lines)
    ours, _ = load_pairs(path)
    assert len(ours) == len(lines)
    assert all(pair.prompt.endswith("\n\nAssistant:") for pair in ours)


# Unknown keys in a recipe


def test_trls_script_takes_no_notice_of_an_unknown_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nactivation_checkpointing: false\n"
        "model_name_or_path: none\nuse_peft: true\nlora_rr: 8\n"
    )
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--config", str(recipe)])
    with pytest.raises(ValueError, match=r"^Either `datasets` or `dataset_name` must be provided"):
        runpy.run_module("trl.scripts.dpo", run_name="__main__")


def test_an_unknown_key_is_an_error_with_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {base: b}\ndata: {train: d}\nadapter:\n  alpha: 8\n  rnk: 8\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe)
    assert str(raised.value) == f"{recipe}:5: adapter.rnk: unknown key; did you mean adapter.rank?"


def test_a_misspelt_key_of_another_tool_is_an_error_with_its_line(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {base: b}\ndata: {train: d}\nlora_rr: 8\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:3: lora_rr: unknown key"):
        load_recipe(recipe)

"""What the linter finds in a data set, and which of it needs a decision."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import build_tokenizer

from pe_dpo.data.lint import Finding, Lint, lint
from pe_dpo.recipe import DataSection

SENTENCE = "This answer is one whole sentence of more than a hundred characters, and it ends, as sentences do, with a stop"


def row(prompt: str, chosen: Any = "yes", rejected: str = "nay") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.fixture
def look(write_lines: Callable[..., Path]) -> Callable[..., Lint]:
    """Lint rows; with characters unless a tokenizer is given."""

    def run(*rows: Any, tokenizer: Any = None, **settings: Any) -> Lint:
        section = DataSection(train=str(write_lines(*rows)), **{"eval": 0.0, **settings})
        return lint(section, tokenizer=tokenizer)

    return run


def finding(found: Lint, beginning: str) -> Finding:
    (one,) = (one for one in found.findings if one.what.startswith(beginning))
    return one


@pytest.mark.parametrize("with_tokenizer", [True, False], ids=["tokens", "characters"])
def test_duplicates_contradictions_and_rows_that_cannot_train_need_a_decision(
    look: Callable[..., Lint], tokenizer: Any, with_tokenizer: bool
) -> None:
    rows = row("a"), row("a"), row("a", "nay", "yes"), row("b", " "), row("c", "x", "x"), row("d", None)
    found = look(*rows, tokenizer=tokenizer if with_tokenizer else None)
    assert found.needs_decision
    assert [(one.what, one.rows) for one in found.findings if one.needs_decision] == [
        ("malformed: column 'chosen' is null; text, as in the first rows, is expected", ["train.jsonl:6"]),
        ("left out: empty answer", ["train.jsonl:4"]),
        ("left out: identical answers", ["train.jsonl:5"]),
        ("exact duplicate", ["train.jsonl:2"]),
        ("contradicts an earlier pair (a over b, b over a)", ["train.jsonl:3"]),
    ]
    assert all(one.remedy for one in found.findings if one.needs_decision)


def test_clean_pairs_need_no_decision(look: Callable[..., Lint]) -> None:
    found = look(row("a"), row("b", "no", "ye"), row("c", "one", "two"))
    assert (found.findings, found.needs_decision) == ([], False)


def test_malformed_rows_of_one_kind_are_one_finding(look: Callable[..., Lint]) -> None:
    found = look(row("a"), *({**row("b"), "margin": f"much{n}"} for n in range(5)), {"prompt": "c"})
    counts = {one.what.partition(" (")[0]: one.number for one in found.findings}
    assert sorted(counts.values()) == [1, 5]


def test_three_pairs_are_decoded_with_prompt_answer_end_and_what_is_scored(
    look: Callable[..., Lint], chat_tokenizer: Any
) -> None:
    rows = row("middle", "yes, sir", "no"), row("of them all the longest", "yes", "no"), row("s", "y", "n")
    found = look(*rows, tokenizer=chat_tokenizer)
    assert [pair.where for pair in found.examples] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:2"]
    pair = found.examples[0]
    assert pair.prompt == "<|im_start|>user\nmiddle<|im_end|>\n<|im_start|>assistant\n"
    assert pair.prompt_tokens == 3 + len("user\nmiddle\nassistant\n")  # three special tokens, else bytes
    assert pair.chosen == {
        "parts": [{"text": "yes, sir<|im_end|>", "scored": True}], "tokens": 9, "scored": 9, "end": "<|im_end|>",
    }  # fmt: skip


def test_length_bias_by_hand(look: Callable[..., Lint]) -> None:
    """Chosen 2, 3, 4, 2 characters, rejected 1, 2, 2, 4: longer in three of four; of 16 pairs across rows 9.5 are longer."""
    found = look(row("a", "xx", "y"), row("b", "xxx", "yy"), row("c", "xxxx", "yy"), row("d", "xx", "yyyy"))
    assert found.length_bias["chosen_longer"] == found.length_bias["predicts"] == 0.75
    assert found.length_bias["auc"] == pytest.approx((1 + 2 * 0.5 + 3 + 3 + 0.5 + 1 + 2 * 0.5) / 16)
    low, high = found.length_bias["interval"]
    assert (low, high) == pytest.approx((0.3006, 0.9544), abs=1e-4)  # Wilson's, for 4 independent pairs
    assert not found.needs_decision  # four pairs do not tell


def test_length_that_tells_the_label_needs_a_decision(look: Callable[..., Lint]) -> None:
    found = look(*(row(f"{n}", "short", "longer text") for n in range(30)))
    one = finding(found, "pairs in which the shorter answer is chosen")
    assert (one.number, one.needs_decision) == (30, True)
    assert found.length_bias["predicts"] == 1.0


@pytest.mark.parametrize(("pairs", "tells"), [(5, False), (6, True)])
def test_few_pairs_do_not_tell_that_length_does(look: Callable[..., Lint], pairs: int, tells: bool) -> None:
    """Wilson's intervals of 5 of 5 and 6 of 6 begin at 0.566 and 0.610."""
    assert look(*(row(f"{n}", "longer", "short") for n in range(pairs))).needs_decision == tells


def test_answers_that_were_cut_off_are_found_and_many_need_a_decision(look: Callable[..., Lint]) -> None:
    cut = [row(f"{n}", SENTENCE, SENTENCE + " !") for n in range(2)]
    whole = [row(f"x{n}", SENTENCE + ".", SENTENCE[1:] + "!") for n in range(38)]
    one = finding(look(*cut, *whole), "chosen answers whose last sentence")
    assert (one.number, one.rows, one.needs_decision) == (2, ["train.jsonl:1", "train.jsonl:2"], False)
    assert finding(look(*cut, *whole[:20]), "chosen answers whose last sentence").needs_decision


def test_a_limit_at_which_answers_were_cut_is_found(look: Callable[..., Lint]) -> None:
    rows = [row(f"{n}", f"{n:02}" + "x" * 98, f"{n:02}" + "y" * (20 + n)) for n in range(20)]
    one = finding(look(*rows), "answers of exactly 100 characters")
    assert (one.number, one.needs_decision) == (20, True)


def test_answers_without_an_end_are_found(look: Callable[..., Lint]) -> None:
    one = finding(look(row("a"), tokenizer=build_tokenizer(eos=None)), "pairs whose answers have no end token")
    assert (one.rows, one.needs_decision) == (["train.jsonl:1"], True)


def test_rows_that_are_too_long_are_said_once(look: Callable[..., Lint], tokenizer: Any) -> None:
    rows = [row("p" * (40 if n < 3 else 4) + f"{n:02}") for n in range(20)]
    found = look(*rows, tokenizer=tokenizer, max_length=20)
    assert [(one.what[:40], one.number, one.rows) for one in found.findings] == [
        ("3 of 20 rows (15%) are left out because ", 3, ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"])
    ]
    few = look(*rows, *(row(f"x{n:02}") for n in range(100)), tokenizer=tokenizer, max_length=20)
    assert [(one.what, one.needs_decision) for one in few.findings] == [("left out: longer than max_length", False)]


def test_no_length_is_too_long_without_a_tokenizer(look: Callable[..., Lint]) -> None:
    assert look(row("p" * 5000), row("q"), max_length=20).report.kept == 2


def test_messages_and_tools_are_looked_at_without_a_tokenizer(look: Callable[..., Lint]) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chosen = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 + 1?"}]
    rejected = [{"role": "assistant", "content": "two"}]
    found = look({"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": [{"type": "function"}]})
    (pair,) = found.examples
    assert pair.prompt == '[tools]\n[{"type": "function"}]\n[system]\nBe kind.\n[user]\n1 + 1?\n[assistant]\n'
    assert "".join(part["text"] for part in pair.chosen["parts"]) == f"[{json.dumps(call)}]␃"
    assert pair.rejected["end"] == "␃"


@pytest.mark.slow
def test_looking_without_a_tokenizer_loads_neither_torch_nor_transformers(write_lines: Callable[..., Path]) -> None:
    program = (
        "import sys; from pe_dpo.cli import main\n"
        f"sys.argv = ['pe-dpo', 'data', {str(write_lines(row('a')))!r}]\n"
        "try: main()\nexcept SystemExit: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_of_several_turns_the_last_one_is_looked_at_for_its_end(look: Callable[..., Lint], chat_tokenizer: Any) -> None:
    def turns(last: str) -> list[dict[str, str]]:
        said = ("assistant", SENTENCE + "."), ("user", "And?"), ("assistant", last)
        return [{"role": role, "content": content} for role, content in said]

    rows = [{"prompt": [{"role": "user", "content": "Go on"}], "chosen": turns(SENTENCE), "rejected": turns(SENTENCE + "!")}]
    found = look(*rows, tokenizer=chat_tokenizer)
    assert [one.what for one in found.findings if one.needs_decision] == ["chosen answers whose last sentence has no end"]
    (pair,) = found.examples
    assert [part["scored"] for part in pair.chosen["parts"]] == [True, False, True]
    assert pair.chosen["scored"] == len(f"{SENTENCE}.") + 1 + len(SENTENCE) + 1


def test_what_can_be_done_stands_beside_what_was_found(look: Callable[..., Lint]) -> None:
    alpaca = row("### Instruction:\nHi\n\n### Response:\n")
    found = look({**alpaca, "chosen_score": 1, "rejected_score": 2}, {**row("b"), "chosen_score": 2, "rejected_score": 1})
    assert [(one.what.partition(" (")[0], one.rows, one.remedy, one.needs_decision) for one in found.findings] == [
        ("scores that contradict the labels", ["train.jsonl:1"], "decide whether the scores or the labels are right", True),
        ("text that is already written with a chat template", ["train.jsonl:1"],
         "give the bare texts, or write data.template: plain", True),
    ]  # fmt: skip


def test_copies_that_a_weight_asks_for_are_looked_at_once(write_lines: Callable[..., Path]) -> None:
    path = write_lines(row("a", SENTENCE, "nay"), *(row(f"{n}", "yes", "no!") for n in range(30)))
    section = DataSection.model_validate({"train": [{"path": str(path), "weight": 2}], "eval": 0.0})
    found = lint(section)
    assert found.report.kept == 62
    assert [(one.what, one.number) for one in found.findings] == [("chosen answers whose last sentence has no end", 1)]

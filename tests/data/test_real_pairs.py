"""Real preference data with real tokenizers: it loads by its path alone, and what is odd in it is counted."""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from paths_to_pairs import load_pairs, prepare_pairs

from pe_dpo.data import PreparedData
from pe_dpo.data.lint import lint
from pe_dpo.errors import DataError
from pe_dpo.recipe import DataSection

SHARED = Path(os.environ.get("PE_DPO_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no real data: set PE_DPO_SHARED to a folder with data, models"),
]
WITH_MESSAGES = {"lf-dpo-en", "lf-dpo-zh", "orca-openai-format"}
FOLDERS = sorted(path.name for path in (SHARED / "data").glob("*/")) if SHARED.is_dir() else []
FILES = sorted(str(path.relative_to(SHARED / "data")) for path in (SHARED / "data").glob("*/*.json*"))
LOADABLE = [name for name in FOLDERS + FILES if not name.startswith("stack")]


@cache
def tokenizer_of(model: str) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(SHARED / "models" / model))


@cache
def prepared(name: str) -> PreparedData:
    """All of a data set."""
    return prepare_pairs(SHARED / "data" / name, tokenizer=tokenizer_of("hh-dialogue-4m"), max_length=100_000)


@cache
def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / "data" / name).read_text().splitlines() if line]


@pytest.mark.parametrize("name", LOADABLE)
def test_every_data_set_loads_with_a_chat_template_by_its_path(name: str) -> None:
    data = prepare_pairs(SHARED / "data" / name, tokenizer=tokenizer_of("hh-dialogue-4m"), max_length=100_000, limit=120)
    assert min(len(data.train), len(data.held_out)) > 0


@pytest.mark.parametrize("name", LOADABLE)
def test_every_data_set_of_texts_loads_without_a_chat_template_and_messages_are_refused(name: str) -> None:
    tokenizer = tokenizer_of("stories260k")
    path = SHARED / "data" / name
    if name.split("/")[0] in WITH_MESSAGES or "messages" in name:
        with pytest.raises(DataError, match="the tokenizer has no chat template"):
            prepare_pairs(path, tokenizer=tokenizer, max_length=100_000, limit=120)
    else:
        data = prepare_pairs(path, tokenizer=tokenizer, max_length=100_000, limit=120)
        assert {int(pair.prompt_ids[0]) for pair in data.train} == {tokenizer.bos_token_id}
        assert {int(pair.chosen_ids[-1]) for pair in data.train} == {tokenizer.eos_token_id}


@pytest.mark.parametrize("name", ["stack-exchange-tiny", "stack-exchange-tiny/stack_exchange_paired_tiny.json"])
def test_stack_exchange_is_answered_with_the_map_to_write_and_that_map_works(name: str) -> None:
    with pytest.raises(DataError) as raised:
        load_pairs(SHARED / "data" / name)
    assert str(raised.value).endswith("\ndata: {columns: {prompt: question, chosen: response_j, rejected: response_k}}")
    columns = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    assert len(load_pairs(SHARED / "data" / name, columns=columns)[0]) == 25


@pytest.mark.parametrize(("name", "rows", "train", "held_out"), [
    ("hh-harmless", 2312, 2074, 234),  # 2,077 - 3 and 235 - 1 empty answers
    ("rasbt-politeness", 1100, 982, 112),  # 986 - 4 and 114 - 2 identical pairs
    ("wmt-mqm-ted-ende", 1641, 1465, 176),
])  # fmt: skip
def test_folders_are_divided_by_their_files(name: str, rows: int, train: int, held_out: int) -> None:
    data = prepared(name)
    assert (data.report.rows_read, len(data.train), len(data.held_out)) == (rows, train, held_out)


@pytest.mark.parametrize(("name", "kind", "fact", "count"), [
    ("hh-harmless", "dropped", "empty answer", 4),
    ("hh-harmless", "noted", "an answer of several turns, the assistant's scored", 5),
    # one text is the beginning of the other in 5 pairs; in the 4 others of them the shorter is empty
    ("hh-harmless", "noted", "one answer is the beginning of the other", 1),
    ("rasbt-politeness", "dropped", "identical answers", 6),
    ("wmt-mqm-ted-ende", "noted", "contradicts an earlier pair (a over b, b over a)", 8),
    ("lf-dpo-en", "noted", "exact duplicate", 5),
    ("lf-dpo-zh", "noted", "exact duplicate", 11),
])  # fmt: skip
def test_rows_known_to_be_suspicious_are_counted(name: str, kind: str, fact: str, count: int) -> None:
    data = prepared(name)
    assert len(getattr(data.report, kind)[fact]) == count


def test_prompts_of_transcripts_are_those_of_the_explicit_data() -> None:
    explicit = {
        (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]): row["prompt"]
        for name in ("train.jsonl", "test.jsonl")
        for row in rows_of(f"hh-harmless-explicit/{name}")
    }
    pairs, _ = load_pairs(SHARED / "data" / "hh-harmless" / "all.jsonl")
    compared = [(pair.prompt, explicit.get((pair.prompt + pair.chosen, pair.prompt + pair.rejected))) for pair in pairs]
    assert sum(expected is None for _, expected in compared) == 5  # rows whose sides have different numbers of turns
    assert [prompt for prompt, expected in compared if expected not in (None, prompt)] == []


def test_no_prompt_of_a_transcript_holds_a_part_of_the_answers_as_the_longest_common_text_does() -> None:
    rows = rows_of("hh-harmless/all.jsonl")
    texts = [(row["chosen"], row["rejected"]) for row in rows]
    common = [next((n for n, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), 0) for pair in texts]
    tags = [re.match(r"(?s).*\n\nAssistant:", pair[0][:end]) for pair, end in zip(texts, common, strict=True) if end]
    ends = [end for end in common if end]
    assert sum(end > tag.end() + 1 for end, tag in zip(ends, tags, strict=True) if tag) > 400  # the fault avoided here
    pairs, _ = load_pairs(SHARED / "data" / "hh-harmless" / "all.jsonl")
    assert all(pair.prompt.endswith("\n\nAssistant:") for pair in pairs)


def test_texts_and_messages_of_the_same_pairs_become_the_same_ids() -> None:
    folder = SHARED / "data" / "hh-harmless-explicit"
    one, other = (
        prepare_pairs(folder / name, tokenizer=tokenizer_of("hh-dialogue-4m"), max_length=100_000, eval=0).train
        for name in ("test.jsonl", "test.messages.jsonl")
    )
    assert [pair.prompt_ids.tolist() + pair.chosen_ids.tolist() for pair in one] == [
        pair.prompt_ids.tolist() + pair.chosen_ids.tolist() for pair in other]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "count"), [
    ("lf-dpo-en", "exact duplicate", 5),
    ("lf-dpo-zh", "exact duplicate", 11),
    ("wmt-mqm-ted-ende", "contradicts an earlier pair (a over b, b over a)", 8),
    ("rasbt-politeness", "left out: identical answers", 6),
    ("hh-harmless", "left out: empty answer", 4),
    ("orca-openai-format", "pairs in which the shorter answer is chosen", 218),
])  # fmt: skip
def test_what_is_odd_in_a_data_set_needs_a_decision_without_any_model(name: str, what: str, count: int) -> None:
    found = lint(DataSection(train=str(SHARED / "data" / name)))
    assert [one.number for one in found.findings if one.what == what and one.needs_decision] == [count]
